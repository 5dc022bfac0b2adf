"""Apptainer: the real one where it is installed, and always the strict stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import missing

STANDIN = Path(__file__).with_name("standin_apptainer.py")
REAL = shutil.which("apptainer") or ""


class Apptainer:
    """An installed Apptainer.

    kind: ``real`` or ``standin``.  directory: where the programs ``apptainer`` and ``singularity`` are.
    """

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.directory = directory

    @property
    def program(self) -> str:
        """Path of ``apptainer``."""
        return str(self.directory / "apptainer")

    def run(self, *words: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        result = subprocess.run(
            [self.program, *map(os.fspath, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert status is None or result.returncode == status, result.stderr
        return result

    def image(self, rootfs: Path, file: Path) -> Path:
        """Make an image file of a root file system."""
        self.run("build", "--force", file, rootfs)
        return file


def kinds() -> list[str]:
    """Return which Apptainers there are to test with."""
    return ["standin", *(["real"] if REAL else [])]


@pytest.fixture(scope="session", params=kinds())
def apptainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Apptainer:
    """An Apptainer, one after the other."""
    return link_apptainer(request.param, tmp_path_factory.mktemp("apptainer"))


def link_apptainer(kind: str, directory: Path) -> Apptainer:
    """Put ``apptainer`` and ``singularity`` of a kind into a directory."""
    if kind == "standin" and os.getuid():
        missing("root, which the stand-in for Apptainer needs, or a real Apptainer")
    for name in ("apptainer", "singularity"):
        (directory / name).symlink_to(STANDIN if kind == "standin" else Path(REAL))
    return Apptainer(kind, directory)


@pytest.fixture(scope="session")
def sif(apptainer: Apptainer, python_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file with Python and ipykernel."""
    return apptainer.image(python_rootfs, tmp_path_factory.mktemp("sif") / "kernel.sif")
