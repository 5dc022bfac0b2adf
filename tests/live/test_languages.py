"""Kernels of other languages, found by --kernel in the environment itself."""

import contextlib
import json
import os
import queue
import shutil
import sys
import time
from pathlib import Path

import pytest

from support import done, missing
from support.images import make_rootfs
from support.venvs import BASE_PYTHON, ENVIRON, UV, install

pytestmark = pytest.mark.live


@pytest.fixture(scope="session")
def polyglot(tmp_path_factory):
    """A virtualenv with the kernels of bash and of xeus-python, each installed as its documentation says."""
    path = tmp_path_factory.mktemp("polyglot") / "venv"
    done(UV, "venv", "-q", "--python", BASE_PYTHON, path, env=ENVIRON)
    install(path, "bash_kernel", "xeus-python")
    done(path / "bin" / "python", "-m", "bash_kernel.install", "--sys-prefix", env=ENVIRON)
    return path


@pytest.fixture(scope="session")
def r_environment(tmp_path_factory):
    """A conda environment with R, as conda lays it out; R and IRkernel are Debian's."""
    program = shutil.which("R", path="/usr/bin")
    if not program or not os.path.isdir("/usr/lib/R/site-library/IRkernel"):
        missing("Debian's r-cran-irkernel")
    prefix = tmp_path_factory.mktemp("r") / "envs" / "statistics"
    (prefix / "conda-meta").mkdir(parents=True)
    (prefix / "bin").mkdir()
    (prefix / "bin" / "R").symlink_to(program)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    code = f"IRkernel::installspec(user = FALSE, prefix = '{prefix}')"
    done("/usr/bin/Rscript", "-e", code, env=environ)
    return prefix


CASES = {
    "bash": ("bash", "echo $((6 * 7))", "42\n", "echo now; sleep 60", ""),
    "xpython": ("python", "print(6 * 7)", "42\n", "", ""),
    "ir": ("R", "cat(6 * 7)", "42", "cat('now')\nSys.sleep(60)", ""),
}
"""By kernel: language, code, what it prints, code that an interrupt ends, and the error's name."""


def check_files(jupyter, name, directory, mode):
    """Compare the logos and metadata with those that the environment's own kernelspec has."""
    own = json.loads((directory / "kernel.json").read_text())
    spec = jupyter.spec(name)
    assert spec["language"] == own["language"]
    metadata = {key: value for key, value in spec["metadata"].items() if key != "envkernel"}
    assert metadata == own.get("metadata", {})
    assert spec.get("interrupt_mode") == own.get("interrupt_mode")
    assert spec["metadata"]["envkernel"]["mode"] == mode
    installed = {path.name: path.read_bytes() for path in (jupyter.kernels / name).iterdir()}
    for path in directory.iterdir():
        if path.name != "kernel.json":
            assert (installed[path.name] == path.read_bytes()) == (path.name != "logo-svg.svg")
    assert b"<circle" in installed["logo-svg.svg"]


def nudge(client):
    """Ask until something is received on iopub: what IRkernel published before it was subscribed to is lost.

    jupyter_server does the same for its clients; `execute_interactive` would wait for ever.
    """
    for _ in range(60):
        client.kernel_info(reply=True, timeout=20)
        with contextlib.suppress(queue.Empty):
            while client.get_iopub_msg(timeout=0.3)["content"].get("execution_state") != "idle":
                pass
            return
    raise AssertionError("nothing was received on iopub")


def check_kernel(jupyter, name, case):
    """Run code in a kernel, interrupt it, and go on."""
    language, code, printed, sleep, error = CASES[case]
    assert jupyter.spec(name)["language"] == language
    with jupyter.kernel(name) as kernel:
        nudge(kernel.client)
        assert kernel.execute(code) == (printed, None)
        if not sleep:
            return
        message = kernel.client.execute(sleep)
        while kernel.client.get_iopub_msg(timeout=20)["msg_type"] != "stream":
            pass  # IRkernel ends where the signal comes before it evaluates the code
        start = time.monotonic()
        kernel.manager.interrupt_kernel()
        while True:
            reply = kernel.client.get_shell_msg(timeout=20)
            if reply["parent_header"]["msg_id"] == message:
                break
        assert time.monotonic() - start < 10
        assert reply["content"]["status"] in ("error", "abort", "aborted")
        assert error in reply["content"].get("ename", "")
        assert kernel.execute(code) == (printed, None)


@pytest.mark.parametrize("name", ["bash", "xpython"])
def test_a_kernel_of_the_virtualenv(name, jupyter, polyglot):
    jupyter.setup("virtualenv", f"my-{name}", f"--kernel={name}", polyglot)
    check_files(jupyter, f"my-{name}", polyglot / "share/jupyter/kernels" / name, "virtualenv")
    check_kernel(jupyter, f"my-{name}", name)


def test_an_interrupt_does_to_xeus_python_what_it_does_natively(jupyter, polyglot):
    """xeus-python 0.19 as PyPI has it ends at SIGINT, which its kernelspec asks for.

    (With ``interrupt_mode: message`` it would take no notice: the code runs on.)
    """
    directory = polyglot / "share/jupyter/kernels/xpython"
    spec = json.loads((directory / "kernel.json").read_text())
    assert "interrupt_mode" not in spec
    spec["argv"][0] = str(polyglot / "bin" / "python")
    native = jupyter.kernels / "native"
    native.mkdir(parents=True)
    (native / "kernel.json").write_text(json.dumps(spec))
    jupyter.setup("virtualenv", "ours", "--kernel=xpython", polyglot)
    ends = []
    for name in ("native", "ours"):
        with jupyter.kernel(name) as kernel:
            kernel.client.execute("import time\nfor _ in range(600): time.sleep(0.1)")
            while kernel.client.get_iopub_msg(timeout=20)["msg_type"] != "execute_input":
                pass
            time.sleep(0.5)
            kernel.manager.interrupt_kernel()
            ends.append(kernel.manager.provisioner.process.wait(10))
    assert ends == [0, 0]


def test_r_of_a_conda_environment(jupyter, r_environment):
    jupyter.setup("conda", "statistics", "--kernel=ir", r_environment)
    check_files(jupyter, "statistics", r_environment / "share/jupyter/kernels/ir", "conda")
    check_kernel(jupyter, "statistics", "ir")


def test_r_by_its_name_alone(jupyter, r_environment):
    """Where no kernelspec is installed beside R, --kernel=ir knows the command."""
    kernels = r_environment / "share"
    hidden = kernels.rename(r_environment / "hidden")
    try:
        jupyter.setup("conda", "plain-r", "--kernel=ir", r_environment)
    finally:
        hidden.rename(kernels)
    check_kernel(jupyter, "plain-r", "ir")


@pytest.fixture(scope="session")
def r_image(docker_engine):
    """An image with Debian's IRkernel, its kernelspec where IRkernel::installspec puts it."""
    docker_engine.add_image(make_rootfs("r", "r-cran-irkernel"), "r-plain")
    copy = "mkdir -p /usr/share/jupyter/kernels; cp -r /usr/lib/R/site-library/IRkernel/kernelspec $_/ir"
    docker_engine.call("run", "--name=r-setup", "--pull=never", "r-plain", "sh", "-c", copy)
    docker_engine.call("commit", "r-setup", "r")
    docker_engine.call("rm", "r-setup")
    return "r"


def test_r_inside_of_a_container(jupyter, docker, r_image, tmp_path):
    jupyter.environ.update(docker.environ)
    jupyter.setup("docker", "boxed-r", "--kernel=ir", r_image)
    docker.call("create", "--name=look", r_image)
    docker.call("cp", "look:/usr/share/jupyter/kernels/ir", str(tmp_path / "ir"))
    docker.call("rm", "look")
    check_files(jupyter, "boxed-r", tmp_path / "ir", "docker")
    check_kernel(jupyter, "boxed-r", "ir")
