"""Cases in which one mode runs inside another, a client goes away, or nobody reads what a kernel says."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import nbformat
import pytest

from support.containers import USER
from support.docker import Docker
from support.jupyter import Jupyter
from support.modes import Mode
from support.slurm import Slurm
from support.slurm import wait_for as wait_until

pytestmark = pytest.mark.live

ONLY_TCP = """
import json, sys
path = sys.argv[sys.argv.index("-f") + 1]
if json.load(open(path)).get("transport", "tcp") != "tcp":
    sys.exit("this kernel only knows tcp")
from ipykernel.kernelapp import launch_new_instance
sys.argv[1:] = ["-f", path]
launch_new_instance()
"""
"""A kernel that cannot listen on unix sockets, as most kernels in other languages than Python."""


@pytest.fixture
def docker_place(jupyter: Jupyter, docker: Docker) -> Jupyter:
    """A private Jupyter that finds docker."""
    jupyter.environ.update(docker.environ)
    return jupyter


@pytest.fixture
def cluster(jupyter: Jupyter, slurm: Slurm) -> Iterator[Slurm]:
    """Slurm, known to the private Jupyter; afterwards there is no job and nothing left on the nodes."""
    jupyter.environ.update(slurm.environ)
    yield slurm
    slurm.wait_no_jobs(12)
    wait_until(
        lambda: not list(Path("/tmp").glob("envkernel-node-*")), "the end of the nodes' directories", 3
    )


# ---- users and transports --------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["root", str(USER), f"{USER}:{USER}"])
def test_a_user_of_ones_choice_on_the_hosts_network(docker_place: Jupyter, docker: Docker, user: str) -> None:
    docker_place.setup("docker", "user", "--python=python3", f"--user={user}", "python")
    with docker_place.kernel("user") as kernel:
        assert kernel.value("__import__('os').getuid()") == ("0" if user == "root" else str(USER))
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        kernel.restart(now=True)
        assert kernel.value("6 * 7") == "42"
        path = kernel.value("get_ipython().config.IPKernelApp.connection_file")
        assert int(kernel.value(f"oct(__import__('os').stat({path!r}).st_mode & 0o777)"), 8) == 0o600


@pytest.mark.parametrize(
    "words",
    [
        ["docker", "python"],
        ["docker", "--network=bridge", "--transport=tcp", "python"],
        ["slurm", "--linger=1", "--partition=far", "--node-transport=tcp"],
    ],
    ids=["host", "bridge", "slurm"],
)
def test_a_kernel_that_only_knows_tcp(docker_place: Jupyter, cluster: Slurm, words: list[str]) -> None:
    python = sys.executable if words[0] == "slurm" else "python3"
    command = ["--", python, "-c", ONLY_TCP, "-f", "{connection_file}"]
    docker_place.setup(words[0], "tcp", *words[1:], *command)
    with docker_place.kernel("tcp") as kernel:
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        kernel.restart(now=True)
        assert kernel.value("6 * 7") == "42"


# ---- a container on a node -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["--network=none"], ["--pwd"]],
    ids=lambda options: " ".join(options) or "host",
)
def test_a_container_on_a_node(
    docker_place: Jupyter, docker: Docker, cluster: Slurm, options: list[str], tmp_path: Path
) -> None:
    """One keeper on the submit host and one on the node."""
    words = ["--python=python3", "--linger=1", "--partition=near", "--", "docker", *options, "python"]
    docker_place.setup("slurm", "boxed", *words)
    with docker_place.kernel("boxed", cwd=str(tmp_path)) as kernel:
        assert kernel.value("__import__('os').path.exists('/.dockerenv')") == "True"
        if "--pwd" in options:
            assert kernel.value("__import__('os').getcwd()") == str(tmp_path)
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        assert kernel.answer("print(input('name? '))", "Ada") == ("name? ", "Ada\n")
        kernel.restart()
        kernel.restart(now=True)
        assert kernel.value("6 * 7") == "42"
        assert (len(docker.ids()), len(cluster.jobs())) == (1, 1)
        kernel.shutdown()
        wait_until(lambda: not docker.ids() and not cluster.jobs(), "the end", 11)


def test_the_death_of_jupyter_ends_a_container_on_a_node(
    docker_place: Jupyter, docker: Docker, cluster: Slurm
) -> None:
    words = ["--python=python3", "--linger=1", "--partition=near", "--", "docker", "--network=none", "python"]
    docker_place.setup("slurm", "boxed", *words)
    with docker_place.kernel("boxed") as kernel:
        os.killpg(kernel.pid, 9)
        kernel.manager.provisioner.process.wait(5)
        wait_until(lambda: not docker.ids() and not cluster.jobs(), "the end", 11)


# ---- nobody reads what it says ---------------------------------------------------------------------


def test_a_pipe_ends_with_its_client(
    docker_place: Jupyter, cluster: Slurm, tmp_path: Path, docker: Docker
) -> None:
    """``jupyter nbconvert --execute ... 2>&1 | tee log`` ends, though what lingers beside a job goes on."""
    docker_place.setup("docker", "box", "--python=python3", "--network=none", "python")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    docker_place.setup("slurm", "job", "--linger=25", "--partition=near", "--", *command)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")])
    nbformat.write(book, tmp_path / "n.ipynb")
    for name in ("box", "job"):
        argv = [sys.executable, "-m", "nbconvert", "--execute", "--to=notebook", "--stdout", "n.ipynb"]
        argv += [f"--ExecutePreprocessor.kernel_name={name}"]
        environ = {**os.environ, **docker_place.environ}
        with subprocess.Popen(
            argv, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout
            text = b""
            while b'"nbformat_minor"' not in text and (more := process.stdout.read1()):
                text += more
            assert b"42" in text, text
            begin = time.monotonic()
            while process.stdout.read1():
                pass
            assert time.monotonic() - begin < 8, "the pipe is closed when the client ends"
            assert process.wait(10) == 0
    cluster.run("scancel", *cluster.jobs(), check=False)
    wait_until(lambda: not docker_place.leftovers(0), "the end", 10)


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """A pipe that nobody reads and into which nothing goes any more."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(1 << 12))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x")
        os.set_blocking(writer, True)
        assert fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK == 0
        yield writer
    finally:
        os.close(writer)
        os.close(reader)


WRITE_STDERR = "__import__('os').write(__import__('sys').stderr._original_stdstream_copy, bytes(1000))"
"""Past ipykernel, which shows what is written to descriptor 2 in the notebook; it fits into the pipes."""


@pytest.mark.parametrize("mode", ["docker", "docker-none", "slurm"], indirect=True)
def test_a_stderr_that_nobody_reads_stops_nothing(jupyter: Jupyter, mode: Mode) -> None:
    jupyter.environ.update(mode.environ)
    jupyter.setup(mode.mode, "quiet", *mode.words)
    with full_pipe() as writer, jupyter.kernel("quiet", stderr=writer) as kernel:
        assert kernel.value(WRITE_STDERR) == "1000"
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        kernel.restart(now=True)
        assert kernel.value("6 * 7") == "42"
        assert kernel.shutdown() < 6
    wait_until(lambda: not mode.running("quiet"), "the end", 10)


def test_an_install_directory_that_cannot_be_written(jupyter: Jupyter, kernel_venv: Path) -> None:
    """Setup says so before it does anything else that takes long, and with each way to choose another."""
    (jupyter.root / "file").write_text("")
    for words, environ in (
        (["--user"], {"JUPYTER_DATA_DIR": str(jupyter.root / "file" / "data")}),
        ([f"--prefix={jupyter.root}/file"], {}),
        (["--prefix=/proc/nosuch"], {}),
    ):
        said = jupyter.envkernel(
            "virtualenv", "--name=x", *words, str(kernel_venv), status=1, environ=environ
        ).stderr
        assert "can't be written" in said or "cannot be written" in said
        assert "--prefix" in said
    assert json.loads(jupyter.envkernel("list", "--json").stdout or "[]") in ([], {})
