"""A private Jupyter: its directories, envkernel run in it, and kernels started through jupyter_client."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import time
import unittest
import uuid
from pathlib import Path
from typing import Any, Iterator

import jupyter_kernel_test
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.kernelspec import KernelSpecManager

from support import SCRIPT, describe_machine, read_environ

MARK = "ENVKERNEL_TEST_MARK"

PRINT_ENVIRON = ["--", "/usr/bin/env", "-0", "CONNECTION_FILE={connection_file}"]
"""A kernel command that prints the environment a kernel would see, for `Jupyter.run_environ`."""


def marked_processes(mark: str) -> dict[int, str]:
    """Return the processes that have `mark` in their environment, with their command lines; no zombies."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                    command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(directory.name)] = os.fsdecode(command)
    return found


class Kernel:
    """A running kernel and its client."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    def execute(self, code: str, timeout: float = 60) -> tuple[str, str | None]:
        """Run code in the kernel: what it printed and returned, and the error it ended with.

        An error does not abort what is sent next: ipykernel would do that (``stop_on_error``) until its
        event loop comes round once more, and on a busy machine the next request is there before.
        """
        texts: list[str] = []

        def keep(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                texts.append(content["text"])
            elif message["msg_type"] in ("execute_result", "display_data"):
                texts.append(content["data"].get("text/plain", ""))
            elif message["msg_type"] == "clear_output":
                texts.clear()

        reply = self.client.execute_interactive(
            code, timeout=timeout, output_hook=keep, allow_stdin=False, stop_on_error=False
        )
        content = reply["content"]
        error = None if content["status"] == "ok" else f"{content.get('ename')}: {content.get('evalue')}"
        return "".join(texts), error

    def value(self, expression: str) -> str:
        """Return what an expression prints in the kernel; an error fails the test."""
        text, error = self.execute(f"print({expression}, end='')")
        assert error is None, error
        return text

    def environ(self) -> dict[str, str]:
        """Return the environment that the kernel was started with, byte by byte."""
        return read_environ(bytes.fromhex(self.value("open('/proc/self/environ', 'rb').read().hex()")))

    @property
    def pid(self) -> int:
        """Process that Jupyter started (in exec modes: the kernel itself)."""
        return self.manager.provisioner.process.pid

    def interrupt_in(self, code: str, timeout: float = 20) -> tuple[str, float]:
        """Interrupt code once it runs: the name of the error it ends with, and the seconds until then."""
        message = self.client.execute(f"print('started', flush=True)\n{code}", stop_on_error=False)
        deadline = time.monotonic() + timeout
        while True:
            published = self.client.get_iopub_msg(timeout=deadline - time.monotonic())
            if published["parent_header"].get("msg_id") == message and published["msg_type"] == "stream":
                break
        start = time.monotonic()
        self.manager.interrupt_kernel()
        while True:
            reply = self.client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == message:
                return reply["content"].get("ename", reply["content"]["status"]), time.monotonic() - start

    def answer(self, code: str, text: str) -> tuple[str, str]:
        """Run code that asks for input and gets `text`: what it asked, and what it printed."""
        printed: list[str] = []
        asked: list[str] = []

        def reply(message: dict[str, Any]) -> None:
            asked.append(message["content"]["prompt"])
            self.client.input(text)

        def keep(message: dict[str, Any]) -> None:
            printed.append(message["content"].get("text", ""))

        self.client.execute_interactive(
            code, timeout=20, output_hook=keep, stdin_hook=reply, allow_stdin=True
        )
        return "".join(asked), "".join(printed)

    def debug(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a message of the Debug Adapter Protocol over the control channel; return the answer's body."""
        content = {"type": "request", "seq": 0, "command": command, "arguments": arguments}
        message = self.client.session.msg("debug_request", content)
        self.client.control_channel.send(message)
        while True:
            reply = self.client.get_control_msg(timeout=20)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                assert reply["content"]["success"], reply["content"]
                return dict(reply["content"].get("body") or {})

    def stop_in(self, code: str, line: int) -> tuple[str, int, str]:
        """Run code with a breakpoint, then on to its end: function, line and variable m where it stopped."""
        self.debug("initialize", clientID="test", adapterID="", pathFormat="path")
        self.debug("attach")
        source = {"path": self.debug("dumpCell", code=code)["sourcePath"]}
        points = self.debug("setBreakpoints", source=source, breakpoints=[{"line": line}], lines=[line])
        assert [point["verified"] for point in points["breakpoints"]] == [True]
        self.debug("configurationDone")
        request = self.client.execute(code)
        while True:
            published = self.client.get_iopub_msg(timeout=20)
            if published["content"].get("event") == "stopped":
                thread = published["content"]["body"]["threadId"]
                break
        frame = self.debug("stackTrace", threadId=thread)["stackFrames"][0]
        scope = self.debug("scopes", frameId=frame["id"])["scopes"][0]
        rows = self.debug("variables", variablesReference=scope["variablesReference"])["variables"]
        self.debug("continue", threadId=thread)
        while self.client.get_shell_msg(timeout=20)["parent_header"].get("msg_id") != request:
            pass
        self.debug("disconnect")
        return frame["name"], frame["line"], {row["name"]: row["value"] for row in rows}["m"]

    def interrupt_r(self) -> None:
        """Interrupt R while it sleeps: it has to reply within 10 seconds.

        IRkernel ends where the signal comes before it evaluates the code, so that code has to be received
        first.
        """
        request = self.client.execute("cat('now')\nSys.sleep(60)")
        while self.client.get_iopub_msg(timeout=20)["msg_type"] != "stream":
            pass
        self.manager.interrupt_kernel()
        assert self.client.get_shell_msg(timeout=10)["parent_header"]["msg_id"] == request

    def restart(self, now: bool = False) -> float:
        """Restart the kernel; return the seconds until it answers again."""
        start = time.monotonic()
        self.manager.restart_kernel(now=now)
        wait_for(self.client)
        return time.monotonic() - start

    def shutdown(self) -> float:
        """Shut the kernel down as Jupyter does; return the seconds it took."""
        start = time.monotonic()
        self.manager.shutdown_kernel()
        return time.monotonic() - start


def wait_for(client: Any, timeout: float = 60, executes: bool = True) -> None:
    """Wait until a kernel answers and what it publishes is received.

    A subscription may reach the kernel after its first answer; what it published before is lost then.
    A kernel that takes long to start is spoken for (`Front`), but for what is to be executed.
    """
    client.wait_for_ready(timeout=timeout)
    for asked in range(1, 41):
        request = client.kernel_info()
        with contextlib.suppress(queue.Empty):
            message = client.get_iopub_msg(timeout=0.5)
            for _ in range(asked):
                client.get_shell_msg(timeout=10)
            while message["parent_header"].get("msg_id") != request or message["content"].get(
                "execution_state"
            ) not in ("idle", "starting"):
                message = client.get_iopub_msg(timeout=10)
            break
    else:
        raise TimeoutError("the kernel publishes nothing")
    if not executes:
        return
    request = client.execute("", silent=True)  # not answered by what speaks for a kernel that still starts
    while client.get_shell_msg(timeout=timeout)["parent_header"].get("msg_id") != request:
        pass


class Jupyter:
    """A Jupyter of its own: HOME, data, runtime, configuration and temporary files below one directory.

    environ: the environment that Jupyter, envkernel and the kernels are started with.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.waits = True  # `kernel` waits for a kernel that executes code, not only for one that answers
        self.mark = uuid.uuid4().hex
        directories = {"HOME": "home", "TMPDIR": "tmp", "IPYTHONDIR": "home/.ipython"}
        directories.update({f"JUPYTER_{kind.upper()}_DIR": kind for kind in ("data", "runtime", "config")})
        self.environ = {name: str(root / directory) for name, directory in directories.items()}
        for directory in self.environ.values():
            Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.environ["JUPYTER_PATH"] = str(root / "path")
        self.environ["PATH"] = "/usr/local/bin:/usr/bin:/bin"
        self.environ[MARK] = self.mark

    @property
    def kernels(self) -> Path:
        """Directory of the user's kernelspecs."""
        return self.root / "data" / "kernels"

    def envkernel(
        self,
        *arguments: str | Path,
        status: int | None = 0,
        environ: dict[str, str] | None = None,
        script: str | Path = SCRIPT,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run envkernel.py as a user types it; `status` is the exit status it has to end with (None: any)."""
        result = subprocess.run(
            [sys.executable, str(script), *map(os.fspath, arguments)],
            env={**self.environ, **(environ or {})},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            **options,
        )
        said = f"{arguments} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
        assert status is None or result.returncode == status, said
        assert "Traceback" not in result.stderr, said
        return result

    def setup(self, mode: str, name: str, *arguments: str | Path, **options: Any) -> dict[str, Any]:
        """Install a kernel for the user; return its kernel.json."""
        self.envkernel(mode, f"--name={name}", "--user", *arguments, **options)
        return self.spec(name)

    def spec(self, name: str) -> dict[str, Any]:
        """Return the kernel.json of an installed kernel."""
        return json.loads((self.kernels / name / "kernel.json").read_text())

    def dry_run(self, mode: str, *arguments: str | Path, **options: Any) -> dict[str, Any]:
        """Return the kernel.json that a setup would write."""
        said = self.envkernel(mode, "--name=dry", "--dry-run", *arguments, **options)
        return json.loads(said.stdout)

    def run(
        self,
        spec: dict[str, Any],
        environ: dict[str, str] | None = None,
        replace: bool = False,
        status: int | None = 0,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the argv of a kernelspec to its end, filled in as jupyter_client does it.

        environ: added to Jupyter's, or (replace) in its place.  cwd: the current directory, as a notebook's.
        """
        start = {**({} if replace else self.environ), **(environ or {}), **spec.get("env", {})}
        names = {"connection_file": "/connection.json", "resource_dir": "/resources"}
        argv = [
            re.sub(r"\{([A-Za-z0-9_]+)\}", lambda m: names.get(m[1], m[0]), word) for word in spec["argv"]
        ]
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True}
        result = subprocess.run(argv, env=start, cwd=cwd, check=False, timeout=60, **quiet)
        assert status is None or result.returncode == status, os.fsdecode(result.stderr)
        return result

    def run_environ(
        self,
        spec: dict[str, Any],
        environ: dict[str, str] | None = None,
        replace: bool = False,
        **options: Any,
    ) -> dict[str, str]:
        """Run a kernelspec whose kernel command is `PRINT_ENVIRON`; return what a kernel would see."""
        found = read_environ(self.run(spec, environ, replace, **options).stdout)
        assert found.pop("CONNECTION_FILE") == "/connection.json"
        return found

    def leftovers(self, patience: float = 10) -> str:
        """Return what kernels left behind after at most `patience` seconds: nothing is how it should be."""
        deadline = time.monotonic() + patience
        while True:
            left = [f"process {pid}: {command}" for pid, command in marked_processes(self.mark).items()]
            for directory in ("runtime", "tmp"):
                for top, _, files in os.walk(self.root / directory):  # rglob fails where one goes meanwhile
                    left += [f"file {top}/{name}" for name in files]
            if not left or time.monotonic() > deadline:
                return "\n".join(left)
            time.sleep(0.05)

    @contextlib.contextmanager
    def kernel(
        self, name: str, environ: dict[str, str] | None = None, alone: bool = True, **options: Any
    ) -> Iterator[Kernel]:
        """Start a kernel by name, as Jupyter does; afterwards it is shut down and nothing may be left.

        environ: added to the environment.  alone: no other kernel runs when it ends.
        options: for `KernelManager.start_kernel`.
        """
        manager = KernelManager(
            kernel_name=name,
            kernel_spec_manager=KernelSpecManager(),
            connection_file=str(self.root / "runtime" / f"kernel-{uuid.uuid4().hex}.json"),
        )
        manager.start_kernel(env={**self.environ, **(environ or {})}, **options)
        client = manager.blocking_client()
        try:
            client.start_channels()
            try:
                wait_for(client, executes=self.waits)
            except (queue.Empty, TimeoutError):
                print(describe_machine())
                raise
            yield Kernel(manager, client)
        finally:
            client.stop_channels()
            if manager.has_kernel:
                manager.shutdown_kernel(now=True)
            manager.cleanup_resources()
        left = self.leftovers() if alone else ""
        assert not left, f"left behind by the kernel {name}:\n{left}"


class ProtocolTests(jupyter_kernel_test.KernelTests):
    """What jupyter_kernel_test asks of a Python kernel."""

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = ({"text": "zi", "matches": {"zip"}},)
    complete_code_samples = ("1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n")
    incomplete_code_samples = ("print('''hello", "def f(x):\n  x*2")
    invalid_code_samples = ("import = 7q",)
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result = ({"code": "1+2+3", "result": "6"},)
    code_display_data = (
        {"code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))", "mime": "text/html"},
    )
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"
    supported_history_operations = ("tail", "search")  # "range" fails with the native kernel too
    code_history_pattern = "1?2*"

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        wait_for(cls.kc)


def run_protocol_tests(name: str) -> None:
    """Run jupyter_kernel_test on an installed Python kernel."""
    case = type("Case", (ProtocolTests,), {"kernel_name": name})
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    wrong = [text for _, text in [*result.failures, *result.errors]]
    assert not wrong, "\n".join(wrong)
    assert result.testsRun >= 12
    assert {reason for _, reason in result.skipped} == {"History range not supported"}


@pytest.fixture
def jupyter(tmp_path: Path) -> Iterator[Jupyter]:
    """A private Jupyter, which the test's own process belongs to as well."""
    with private_jupyter(tmp_path / "jupyter") as private:
        yield private


@contextlib.contextmanager
def private_jupyter(root: Path) -> Iterator[Jupyter]:
    """Have this process belong to a private Jupyter, which has to leave nothing."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        private = Jupyter(root)
        _belong_to(private, monkeypatch)
        yield private
        left = private.leftovers(patience=3)
        for pid in marked_processes(private.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        assert not left, f"left behind by the test:\n{left}"


def _belong_to(private: Jupyter, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("JUPYTER_", "JPY_", "CONDA", "VIRTUAL_ENV", "PYTHON", "LMOD_", "MODULE", "_LM")):
            monkeypatch.delenv(name)
    for name, value in private.environ.items():
        if name.startswith("JUPYTER_") or name in ("HOME", "IPYTHONDIR", MARK):
            monkeypatch.setenv(name, value)
