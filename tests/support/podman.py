"""A private Podman, with images, for one run of the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Iterator

import pytest

from support import missing
from support.containers import Engine, short_directory
from support.images import make_rootfs

_CONTAINERS = """
[containers]
default_ulimits = ["nofile=10000:10000", "nproc=30000:30000"]
[engine]
runtime = "runc"
events_logger = "file"
cgroup_manager = "cgroupfs"
tmp_dir = "{directory}/tmp"
[network]
network_config_dir = "{directory}/networks"
"""

_STORAGE = """
[storage]
driver = "overlay"
graphroot = "{directory}/storage"
rootless_storage_path = "{directory}/storage"
runroot = "{directory}/run"
"""


def podman_environ(directory: Path) -> dict[str, str]:
    """Configure a Podman that keeps everything in `directory`; return the environment that says so."""
    (directory / "containers.conf").write_text(_CONTAINERS.format(directory=directory))
    (directory / "storage.conf").write_text(_STORAGE.format(directory=directory))
    (directory / "networks").mkdir()
    return {
        "CONTAINERS_CONF": str(directory / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
    }


def need_podman() -> str:
    """Return the path of podman; skip (in CI: fail) where something is missing."""
    for program in ("podman", "runc", "mmdebstrap"):
        if not shutil.which(program):
            missing(program)
    if os.getuid():
        missing("the rights to make images with mmdebstrap (root)")
    return shutil.which("podman") or "podman"


@contextlib.contextmanager
def running_podman() -> Iterator[Engine]:
    """Have a Podman of root's with the images ``localhost/python`` and ``localhost/bare``."""
    program = need_podman()
    with short_directory("podman") as directory:
        engine = Engine("podman", program, podman_environ(directory))
        engine.add_image(make_rootfs("python", "python3-ipykernel"), "localhost/python")
        engine.add_image(make_rootfs("bare", "python3-minimal"), "localhost/bare")
        yield engine
        engine.call("rm", "-f", "-a", "-t", "0")
        engine.call("rmi", "-f", "-a")


@pytest.fixture(scope="session")
def podman_engine() -> Iterator[Engine]:
    """The Podman of `running_podman`."""
    with running_podman() as engine:
        yield engine


@pytest.fixture
def podman(podman_engine: Engine) -> Iterator[Engine]:
    """The Podman, for one test, which has to leave no container."""
    with podman_engine.nothing_left():
        yield podman_engine
