"""What the tests of Slurm and of YARN share."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import psutil
import pytest

from support.jupyter import Kernel
from support.slurm import wait_for


def run_process(kernel: Kernel) -> psutil.Process:
    return psutil.Process(kernel.pid)


def alive(pids: list[int]) -> list[int]:
    """Those of some processes that live; a zombie does not, however long its parent lets it lie."""
    return [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


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
