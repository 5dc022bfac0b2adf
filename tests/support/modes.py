"""Every mode that a kernel can run in, as one row each: what tests and benchmarks of all modes go through.

A row says how a kernel is set up and what the mode runs outside of this host's processes (containers, jobs).
A new mode is one more entry of `MAKERS`.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from support.apptainer import Apptainer, link_apptainer
from support.containers import Engine
from support.docker import running_docker
from support.images import make_rootfs
from support.podman import running_podman
from support.slurm import running_slurm
from support.venvs import make_kernel_venv
from support.yarn import make_packed, running_yarn

COMMAND = ("-m", "ipykernel_launcher", "-f", "{connection_file}")

Get = Callable[[str], Any]
"""Returns a thing that modes need by the name of its fixture."""


class Mode:
    """One way to run a kernel.

    key: its name in tables.  mode: envkernel's.  words: what a setup gets after the common options.
    environ: what Jupyter needs to find the engine or the cluster.
    kind: ``environment``, ``container`` or ``cluster``.  patience: seconds that a start may take.
    """

    outside = ""
    """What runs outside of this host's processes: ``container``, ``job`` or nothing."""

    cleanup_limit = 10.0
    """Seconds after which nothing may be left of a kernel that was killed."""

    def __init__(
        self, key: str, mode: str, words: list[str], environ: dict[str, str], kind: str, patience: float = 30
    ) -> None:
        self.key = key
        self.mode = mode
        self.words = words
        self.environ = environ
        self.kind = kind
        self.patience = patience

    def running(self, mark: str) -> dict[str, str]:
        """Return the containers or jobs that have `mark` in what identifies them, with their names."""
        return {}

    def end(self, number: str, how: random.Random) -> str:
        """End one of those by its engine; return how."""
        return ""

    def remove(self, number: str) -> None:
        """Remove one of those, whatever state it is in."""


class EnvironmentMode(Mode):
    """The kernel replaces the process that Jupyter started."""


class ContainerMode(Mode):
    """Docker and Podman."""

    outside = "container"

    def __init__(self, key: str, engine: Engine, words: list[str]) -> None:
        super().__init__(key, engine.name, ["--python=python3", *words], engine.environ, "container")
        self.engine = engine

    def running(self, mark: str) -> dict[str, str]:
        rows = self.engine.call("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Labels}}")
        return {row.split()[0]: row.split()[1] for row in rows.splitlines() if mark in row}

    def end(self, number: str, how: random.Random) -> str:
        words = how.choice([["kill"], ["stop", "-t", "1"], ["rm", "-f"]])
        with contextlib.suppress(AssertionError):  # it ends or is only being created at this moment
            self.engine.call(*words, number)
        return words[0]

    def remove(self, number: str) -> None:
        with contextlib.suppress(AssertionError):
            self.engine.call("rm", "-f", number)


class ApptainerMode(Mode):
    """Apptainer, whose containers are processes of this host."""

    def __init__(self, key: str, apptainer: Apptainer, words: list[str]) -> None:
        environ = {"PATH": f"{apptainer.directory}:/usr/local/bin:/usr/bin:/bin"}
        super().__init__(key, "apptainer", ["--python=python3", *words], environ, "container")


class SlurmMode(Mode):
    """Jobs of Slurm."""

    outside = "job"

    def __init__(self, key: str, cluster: Any, words: list[str]) -> None:
        words = ["--linger=1", *words, "--", sys.executable, *COMMAND]
        super().__init__(key, "slurm", words, cluster.environ, "cluster")
        self.cluster = cluster

    def running(self, mark: str) -> dict[str, str]:
        rows = self.cluster.run("squeue", "-h", "-o", "%i %j %T", check=False).splitlines()
        return {row.split()[0]: row for row in rows if mark in row}

    def end(self, number: str, how: random.Random) -> str:
        self.cluster.run("scancel", number, check=False)
        return "scancel"

    def remove(self, number: str) -> None:
        self.cluster.run("scancel", number, check=False)


class YarnMode(Mode):
    """Applications of YARN: a new JVM has to end one whose client was killed, which took up to 18 s."""

    outside = "job"
    cleanup_limit = 30.0

    def __init__(self, key: str, cluster: Any, words: list[str], client: Any) -> None:
        words = ["--linger=1", "--memory=512", *words]
        super().__init__(key, "yarn", words, cluster.environ, "cluster", patience=60)
        self.client = client

    def running(self, mark: str) -> dict[str, str]:
        reports = self.client.get_applications(states=("submitted", "accepted", "running"))
        return {report.id: f"{report.name} {report.state}" for report in reports if mark in report.name}

    def end(self, number: str, how: random.Random) -> str:
        with contextlib.suppress(Exception):
            self.client.kill_application(number)
        return "kill"

    def remove(self, number: str) -> None:
        self.end(number, random.Random())


MAKERS: dict[str, Callable[[Get], Mode]] = {
    "virtualenv": lambda get: EnvironmentMode(
        "virtualenv", "virtualenv", [str(get("kernel_venv"))], {}, "environment"
    ),
    "docker": lambda get: ContainerMode("docker", get("docker_engine"), ["python"]),
    "docker-none": lambda get: ContainerMode(
        "docker-none", get("docker_engine"), ["--network=none", "python"]
    ),
    "docker-shared": lambda get: ContainerMode("docker-shared", get("docker_engine"), ["--shared", "python"]),
    "podman": lambda get: ContainerMode("podman", get("podman_engine"), ["localhost/python"]),
    "apptainer": lambda get: ApptainerMode("apptainer", get("standin"), [str(get("standin_sif"))]),
    "slurm": lambda get: SlurmMode("slurm", get("slurm"), ["--partition=far"]),
    "yarn": lambda get: YarnMode("yarn", get("yarn"), [str(get("packed"))], get("skein_client")),
}
"""All modes, by their names in tables."""

GROUPS = {"docker": "docker", "podman": "podman", "slurm": "cluster", "yarn": "cluster"}
"""Which daemons a mode shares with other tests, by the first part of its name: see ``conftest.py``."""


class Things(contextlib.ExitStack):
    """What modes need, for a program without pytest: started when first asked for, ended at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """Return a thing by the name of its fixture."""
        if name not in self.found:
            self.found[name] = self._make(name)
        return self.found[name]

    def _make(self, name: str) -> Any:
        running = {
            "docker_engine": running_docker,
            "podman_engine": running_podman,
            "slurm": running_slurm,
            "yarn": running_yarn,
        }
        if name in running:
            return self.enter_context(running[name]())
        if name == "skein_client":
            return self.enter_context(skein_client_of(self.get("yarn")))
        directory = Path(self.enter_context(tempfile.TemporaryDirectory(prefix=f"envkernel-{name}-")))
        directory.chmod(0o755)
        if name == "kernel_venv":
            return make_kernel_venv(directory / "venv")
        if name == "packed":
            return make_packed(directory)
        if name == "standin":
            return link_apptainer("standin", directory)
        assert name == "standin_sif", name
        return self.get("standin").image(make_rootfs("python", "python3-ipykernel"), directory / "kernel.sif")


@contextlib.contextmanager
def skein_client_of(yarn: Any) -> Iterator[Any]:
    """Yield a client to look at a YARN with."""
    before = {name: os.environ.get(name) for name in yarn.environ}
    os.environ.update(yarn.environ)
    try:
        import skein  # looks at the environment when it is loaded

        client = skein.Client(log=False)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="session")
def skein_client(yarn: Any) -> Iterator[Any]:
    """A client to look at YARN with."""
    with skein_client_of(yarn) as client:
        yield client


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Apptainer:
    """The strict stand-in for Apptainer."""
    return link_apptainer("standin", tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="session")
def standin_sif(standin: Apptainer, python_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file with Python and ipykernel for the stand-in."""
    return standin.image(python_rootfs, tmp_path_factory.mktemp("standin-sif") / "kernel.sif")


@pytest.fixture(scope="session")
def mode(request: pytest.FixtureRequest) -> Mode:
    """The mode that a test is parametrized with (``indirect``)."""
    return MAKERS[request.param](request.getfixturevalue)
