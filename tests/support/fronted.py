"""A kernel that starts late, behind a front: ``fronted.py CONNECTION_FILE``, as a kernelspec calls it.

The environment says how: DELAY, seconds until the kernel is started; HOLD, seconds until it answers itself;
FAIL, why it will not start; FAIL_LATER, why it ended before it answered; NOTICE, why the
kernel before it ended; TEXT, the state of the launch; KERNEL, the command; CACHE, for the kernel_info_reply.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import envkernel

STREAMS = ("shell", "iopub", "stdin", "control", "hb")


class Late:
    """One kernel and its front."""

    def __init__(self, connection: dict[str, Any], directory: Path) -> None:
        self.connection = connection
        self.directory = directory
        self.text = os.environ.get("TEXT", "Slurm job 12 waits: Priority")
        cache = os.environ.get("CACHE", "")
        kernel = envkernel.KernelProfile("late", "python", True, cache)
        self.front = envkernel.Front(connection, kernel, os.environ.get("NOTICE", ""))
        self.process: Any = None

    async def start(self) -> None:
        """Start the kernel on unix sockets in the directory, and wait until these are there."""
        ports = {name + "_port": number + 1 for number, name in enumerate(STREAMS)}
        own = {**self.connection, "transport": "ipc", "ip": f"{self.directory}/s", **ports}
        file = self.directory / "kernel.json"
        file.write_text(json.dumps(own))
        command = os.environ.get("KERNEL", f"{sys.executable} -m ipykernel_launcher -f {{}}").format(file)
        environ = {**os.environ, "JPY_PARENT_PID": str(os.getpid()), "TMPDIR": str(self.directory)}
        self.process = await asyncio.create_subprocess_exec(
            *shlex.split(command), env=environ, start_new_session=True
        )
        while len([*self.directory.glob("s[-:]?")]) < 5:
            await asyncio.sleep(0.01)

    async def connect(self, stream: int) -> socket.socket:
        """Return a socket that is connected with a stream of the kernel."""
        (path,) = self.directory.glob(f"s[-:]{stream + 1}")
        for attempt in range(100):
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(path))
                break
            except ConnectionRefusedError:
                sock.close()
                if attempt == 99:
                    raise
                await asyncio.sleep(0.01)
        sock.setblocking(False)
        return sock

    def signalled(self, number: int) -> None:
        """Do with a signal of Jupyter's what a keeper does."""
        if number == signal.SIGTERM:
            self.front.shutdown.set()
        elif not self.front.interrupt() and self.process:
            self.process.send_signal(number)

    async def launch(self) -> None:
        """Go through the states."""
        hold, delay = float(os.environ.get("HOLD", "0")), float(os.environ.get("DELAY", "0"))
        if delay >= hold:
            await asyncio.sleep(hold)
            self.front.wait(self.text)
        await asyncio.sleep(max(0, delay - hold))
        if os.environ.get("FAIL"):
            self.front.fail(envkernel.UserError(os.environ["FAIL"]))
            return
        await self.start()
        try:
            await self.front.go_live(self.connect)
        except OSError:
            self.front.fail(envkernel.UserError(os.environ["FAIL_LATER"]))
            return
        await self.process.wait()
        self.front.shutdown.set()


async def main(connection: dict[str, Any], directory: Path) -> None:
    late = Late(connection, directory)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, late.signalled, number)
    await late.front.listen()
    launch = loop.create_task(late.launch())
    parent = os.getppid()
    while (
        os.getppid() == parent
        and not late.front.shutdown.is_set()
        and not (launch.done() and launch.exception())
    ):
        await asyncio.sleep(0.05)
    await late.front.drain(1)
    if late.process and late.process.returncode is None:
        late.process.kill()
        await late.process.wait()
    if launch.done():
        launch.result()
    launch.cancel()


if __name__ == "__main__":
    child = os.fork()
    if child:  # what Jupyter signals, and may kill
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(child, number))
        sys.exit(os.waitpid(child, 0)[1])
    os.setsid()
    with tempfile.TemporaryDirectory(prefix="late") as name:
        asyncio.run(main(json.loads(Path(sys.argv[1]).read_text()), Path(name)))
