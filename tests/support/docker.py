"""A private Docker daemon, with images, for one run of the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Iterator

import pytest

from support import done, free_subnet, missing
from support.containers import Engine, short_directory
from support.images import make_rootfs


class Daemon:
    """A dockerd in a directory, with a bridge of its own and no rules for iptables."""

    def __init__(self, directory: Path, bridge: str = "ek") -> None:
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.bridge = f"{bridge}{os.getpid()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        options = [f"--data-root={self.directory}/data", f"--exec-root={self.directory}/exec"]
        options += [
            f"--pidfile={self.directory}/pid",
            f"--host=unix://{self.socket}",
            f"--bridge={self.bridge}",
        ]
        options += [f"--{name}=false" for name in ("iptables", "ip6tables", "ip-masq", "ip-forward")]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["dockerd", *options], stdout=log, stderr=log, env={"PATH": os.environ["PATH"]}
            )
        deadline = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.1)
        self.socket.chmod(0o666)

    def answers(self) -> bool:
        """Return whether the daemon answers."""
        argv = ["docker", "--host", f"unix://{self.socket}", "version"]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def stop(self) -> None:
        """Stop the daemon and wait until it has gone."""
        if self.process:
            self.process.terminate()
            self.process.wait(60)
            self.process = None
        for line in Path("/proc/mounts").read_text().splitlines():  # its network namespace
            if line.split()[1].startswith(f"{self.directory}/"):
                done("umount", line.split()[1])

    @contextlib.contextmanager
    def running(self) -> Iterator[Daemon]:
        """Have the daemon with its network run for as long as the context lasts."""
        # with an address of its own, which would else change with the containers that come and go
        done("ip", "link", "add", "name", self.bridge, "address", "02:00:5e:00:00:01", "type", "bridge")
        try:
            done("ip", "address", "add", f"{free_subnet()}.1/24", "dev", self.bridge)
            done("ip", "link", "set", self.bridge, "up")
            self.start()
            yield self
        finally:
            self.stop()
            done("ip", "link", "delete", self.bridge)


class Docker(Engine):
    """The Docker of the tests."""

    def __init__(self, daemon: Daemon) -> None:
        environ = {
            "DOCKER_HOST": f"unix://{daemon.socket}",
            "DOCKER_CONFIG": str(daemon.directory / "config"),
        }
        super().__init__("docker", shutil.which("docker") or "docker", environ)
        self.daemon = daemon


@contextlib.contextmanager
def running_docker() -> Iterator[Docker]:
    """Have a Docker run with the images ``python`` (ipykernel) and ``bare`` (Python alone)."""
    for program in ("dockerd", "docker", "runc", "mmdebstrap"):
        if not shutil.which(program):
            missing(program)
    if os.getuid():
        missing("the rights to start dockerd (root)")
    with short_directory("docker") as directory:
        daemon = Daemon(directory)
        with daemon.running():
            engine = Docker(daemon)
            engine.add_image(make_rootfs("python", "python3-ipykernel"), "python")
            engine.add_image(make_rootfs("bare", "python3-minimal"), "bare")
            yield engine
            for container in engine.containers():
                engine.call("rm", "-f", container["Id"])


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Docker]:
    """The Docker of `running_docker`."""
    with running_docker() as engine:
        yield engine


@pytest.fixture
def docker(docker_engine: Docker) -> Iterator[Docker]:
    """The Docker, for one test, which has to leave no container."""
    with docker_engine.nothing_left():
        yield docker_engine
