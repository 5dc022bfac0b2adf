"""Root file systems for container images, made of Debian packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from support import done, made_once, missing
from support.venvs import BASE_PYTHON, ENVIRON, UV

PYTHON = ("python3-ipykernel",)


def make_rootfs(name: str, *packages: str) -> Path:
    """Return a directory with a minimal Debian and some packages, kept for the next run of the tests."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]

    def make(directory: Path) -> None:
        words = ["mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io"]
        words += [f"--include={','.join(packages)}"] if packages else []
        if os.getuid() == 0:
            subprocess.run([*words, "--format=directory", suite, str(directory)], check=True)
            directory.chmod(0o755)
            return
        archive = directory.with_suffix(".tar")  # a directory would belong to others of the user's numbers
        if not shutil.which(words[0]) or subprocess.run([*words, suite, archive], check=False).returncode:
            missing("mmdebstrap for an ordinary user (it needs newuidmap and a line in /etc/subuid)")
        directory.mkdir(mode=0o755)
        done("tar", "-x", "--no-same-owner", "--exclude=./dev/*", "-f", archive, "-C", directory)
        archive.unlink()

    return made_once(f"rootfs-{suite}-{name}", make)


@pytest.fixture(scope="session")
def python_rootfs() -> Path:
    """A root file system with Python and ipykernel.  Not to be changed."""
    return make_rootfs("python", *PYTHON)


@pytest.fixture(scope="session")
def new_ipykernel(tmp_path_factory: pytest.TempPathFactory, python_rootfs: Path) -> Path:
    """The newest ipykernel in a directory for PYTHONPATH, for the Python of `python_rootfs`."""
    directory = tmp_path_factory.mktemp("ipykernel") / "new"
    version = max((python_rootfs / "usr/bin").glob("python3.*[0-9]")).name[len("python") :]
    words = [
        "pip",
        "install",
        "-q",
        "--target",
        directory,
        "--python",
        BASE_PYTHON,
        "--python-version",
        version,
    ]
    done(UV, *words, "ipykernel", env=ENVIRON)
    return directory


@pytest.fixture(scope="session")
def bare_rootfs() -> Path:
    """A root file system with Python and without any kernel.  Not to be changed."""
    return make_rootfs("bare", "python3-minimal")


@pytest.fixture(scope="session")
def r_rootfs() -> Path:
    """A root file system with R and IRkernel.  Not to be changed."""
    return make_rootfs("r", "r-cran-irkernel")
