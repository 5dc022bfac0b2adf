"""What the tests of Slurm and of YARN share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import psutil
import pytest

from support.jupyter import Jupyter, Kernel
from support.slurm import wait_for


def run_process(kernel: Kernel) -> psutil.Process:
    return psutil.Process(kernel.pid)


def node_processes(kernel: Kernel) -> list[psutil.Process]:
    """envkernel's processes on the node: the starter, which is the kernel's parent, and the agent."""
    starter = psutil.Process(int(kernel.value("__import__('os').getppid()")))
    pid = int(kernel.value("__import__('os').getpid()"))
    return [starter, *(child for child in starter.children() if child.pid != pid)]


def alive(pids: list[int]) -> list[int]:
    """Those of some processes that live; a zombie does not, however long its parent lets it lie."""
    return [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def processes(*words: str) -> list[psutil.Process]:
    """The processes that have each of some words in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or ()
        if all(any(word in argument for argument in command) for word in words):
            found.append(process)
    return found


DRIVER = """
import sys, time
from jupyter_client import KernelManager
manager = KernelManager(kernel_name=sys.argv[1], connection_file=sys.argv[2])
manager.start_kernel()
client = manager.blocking_client()
client.start_channels()
client.wait_for_ready(timeout=30)
request = client.execute("", silent=True)  # not answered by what speaks for a kernel that still starts
while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != request:
    pass
print(manager.provisioner.process.pid, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def driven_kernel(jupyter: Jupyter, name: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A kernel that a Jupyter of its own has started; yields that Jupyter and the run process."""
    connection = jupyter.root / "runtime" / f"kernel-{name}.json"
    argv = [sys.executable, "-c", DRIVER, name, str(connection)]
    environ = {**os.environ, **jupyter.environ}
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        try:
            yield driver, psutil.Process(int(driver.stdout.readline()))
        finally:
            driver.kill()
            connection.unlink()  # Jupyter's own, which it could not remove


class Errors:
    """What a kernel's run process says on stderr."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")

    def text(self) -> str:
        return self.path.read_text(errors="replace")

    def wait(self, words: str, seconds: float = 10) -> str:
        try:
            wait_for(lambda: words in self.text(), words, seconds)
        except TimeoutError:
            raise AssertionError(f"no {words!r} in:\n{self.text()}") from None
        return self.text()


@pytest.fixture
def errors(tmp_path: Path) -> Iterator[Errors]:
    said = Errors(tmp_path / "stderr")
    yield said
    said.file.close()
