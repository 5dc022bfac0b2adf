"""`envkernel check`: what it finds, in kernels that are whole, broken, exposed and untidy."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.jupyter import marked_processes
from support.reasons import checked

pytestmark = pytest.mark.live

STEPS = ["start", "ready", "execute", "listening", "interrupt", "restart", "shutdown", "leftovers"]

EXPOSED = """
import binascii, os, socket, subprocess, sys
file = os.fsencode(sys.argv[1])
key = f"{binascii.crc32(file):08x}{binascii.crc32(file[::-1], 1):08x}"
os.makedirs(f"{os.environ['TMPDIR']}/envkernel-{os.getuid()}/{key}", exist_ok=True)
door = socket.socket()
door.bind(("0.0.0.0", 0))
door.listen()
sleeper = subprocess.Popen(["sleep", "40"], start_new_session=True)
print("sleeper", sleeper.pid, file=sys.stderr, flush=True)
sys.argv[1:] = ["-f", sys.argv[1]]
from ipykernel.kernelapp import launch_new_instance
launch_new_instance()
"""


def test_a_whole_kernel_passes_at_setup_already(jupyter, kernel_venv):
    setup = jupyter.envkernel("virtualenv", "--name=whole", "--user", "--check", kernel_venv)
    lines = setup.stdout.splitlines()
    assert "Test it" not in setup.stdout
    assert [line.split()[0] for line in lines[-8:]] == STEPS
    assert [line.split()[-1] for line in lines[-8:]] == ["ok"] * 8
    assert "--check" not in jupyter.spec("whole")["metadata"]["envkernel"]["command"]


def test_a_broken_kernel_gets_the_notebooks_message(jupyter, kernel_venv, tmp_path):
    path = tmp_path / "gone"
    shutil.copytree(kernel_venv, path, symlinks=True, copy_function=os.link)
    jupyter.setup("virtualenv", "broken", path)
    shutil.rmtree(path)
    said = jupyter.envkernel("check", "broken", status=1).stderr
    with jupyter.kernel("broken") as kernel:
        shown = kernel.execute("1")[1]
    error = checked(jupyter, "broken", 1)[0]["error"]
    assert shown == f"KernelDidNotStart: {error['message']} {error['hint']}"
    assert said == f"envkernel: {error['message']}\n  {error['hint']}\n"


def test_a_kernel_that_only_fails_when_it_runs(jupyter, kernel_venv):
    command = ["--", "python", "-c", "import sys; sys.exit('no licence')", "{connection_file}"]
    jupyter.setup("virtualenv", "dies", kernel_venv, *command)
    result, errors = checked(jupyter, "dies", 1)
    assert "died" in errors["ready"]
    assert "no licence" in result["stderr"]


def test_a_kernel_that_leaves_the_notebooks_directory_is_found(jupyter, kernel_venv, tmp_path):
    code = "import os, sys; os.chdir('/'); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["--", "python", "-c", code, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    jupyter.setup("virtualenv", "lost", kernel_venv, *command)
    said = json.loads(jupyter.envkernel("check", "lost", "--json", status=1, cwd=tmp_path).stdout)
    errors = {row["step"]: row["error"] for row in said["steps"]}
    assert errors["execute"] == f"it works in / instead of {tmp_path}"


def test_open_ports_and_what_stays_are_found(jupyter, kernel_venv):
    words = ["--", "python", "-c", EXPOSED, "{connection_file}"]
    jupyter.setup("virtualenv", "untidy", kernel_venv, *words)
    result, errors = checked(jupyter, "untidy", 1)
    sleepers = [line.split()[1] for line in result["stderr"].splitlines() if line.startswith("sleeper ")]
    try:
        assert errors["listening"].startswith("others can reach it at 0.0.0.0, port ")
        assert len(sleepers) == 2  # the second one since the restart
        for pid in sleepers:
            assert f"process {pid} (sleep 40)" in errors["leftovers"]
        private = f"{jupyter.environ['TMPDIR']}/envkernel-{os.getuid()}"
        (directory,) = os.listdir(private)
        assert f"directory {private}/{directory}" in errors["leftovers"]
        assert {step for step, error in errors.items() if error} == {"listening", "leftovers"}
    finally:
        for pid in marked_processes(jupyter.mark):
            os.kill(pid, 9)


def test_a_container_that_stays_is_found(jupyter, docker):
    """A real one, with the kernel's label."""
    jupyter.environ.update(docker.environ)
    jupyter.setup("docker", "boxed", "--python=python3", "python")
    with ThreadPoolExecutor() as pool:
        check = pool.submit(checked, jupyter, "boxed", 1)
        while not docker.ids() and not check.done():
            time.sleep(0.1)
        label = "--label=envkernel=boxed"
        docker.call("run", "-d", "--pull=never", "--name=forgotten", label, "bare", "sleep", "99")
        _, errors = check.result()
    docker.call("rm", "-f", "forgotten")
    found = {step: error for step, error in errors.items() if error}
    assert found == {"leftovers": "still there: container forgotten"}
