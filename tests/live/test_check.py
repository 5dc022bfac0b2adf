"""`envkernel check`: what it finds, in kernels that are whole, broken, exposed and untidy."""

import json
import os
import shutil

import pytest

from support.jupyter import marked_processes

pytestmark = pytest.mark.live

STEPS = ["start", "ready", "execute", "listening", "interrupt", "restart", "shutdown", "leftovers"]

EXPOSED = """
import socket, subprocess, sys
door = socket.socket()
door.bind(("0.0.0.0", 0))
door.listen()
sleeper = subprocess.Popen(["sleep", "40"], start_new_session=True)
print("sleeper", sleeper.pid, file=sys.stderr, flush=True)
sys.argv[1:] = ["-f", sys.argv[1]]
from ipykernel.kernelapp import launch_new_instance
launch_new_instance()
"""


def checked(jupyter, name, status):
    """Check a kernel; return what it said as data, and the errors by step."""
    result = json.loads(jupyter.envkernel("check", name, "--json", status=status).stdout)
    assert result["ok"] == (status == 0)
    return result, {row["step"]: row["error"] for row in result["steps"]}


def test_a_whole_kernel_passes_at_setup_already(jupyter, kernel_venv):
    setup = jupyter.envkernel("virtualenv", "--name=whole", "--user", "--check", kernel_venv)
    lines = setup.stdout.splitlines()
    assert "Test it: envkernel check whole" in lines
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


def test_open_ports_and_processes_that_stay_are_found(jupyter, kernel_venv):
    words = ["--", "python", "-c", EXPOSED, "{connection_file}"]
    jupyter.setup("virtualenv", "untidy", kernel_venv, *words)
    result, errors = checked(jupyter, "untidy", 1)
    sleepers = [line.split()[1] for line in result["stderr"].splitlines() if line.startswith("sleeper ")]
    try:
        assert errors["listening"].startswith("others can reach it at 0.0.0.0, port ")
        assert len(sleepers) == 2  # the second one since the restart
        for pid in sleepers:
            assert f"process {pid} (sleep 40)" in errors["leftovers"]
        assert {step for step, error in errors.items() if error} == {"listening", "leftovers"}
    finally:
        for pid in marked_processes(jupyter.mark):
            os.kill(pid, 9)
