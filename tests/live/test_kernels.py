"""A kernel of each environment mode behaves as the native one: protocol, interrupt, restart, end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from support.jupyter import Jupyter, marked_processes, run_protocol_tests
from support.modules import Modules

pytestmark = pytest.mark.live

SHOW_DESCRIPTORS = """
import os
for descriptor in os.listdir("/proc/self/fd"):
    if os.path.lexists("/proc/self/fd/" + descriptor):
        print(os.readlink("/proc/self/fd/" + descriptor))
"""

MODES = ["virtualenv", "conda", "lmod", "chain"]


@pytest.fixture(params=MODES)
def name(request: pytest.FixtureRequest, jupyter: Jupyter) -> str:
    """An installed kernel of each mode."""
    return install_kernel(request, jupyter, request.param)


def install_kernel(request: pytest.FixtureRequest, jupyter: Jupyter, mode: str) -> str:
    """Install a kernel of that mode; return its name."""
    venv: Path = request.getfixturevalue("kernel_venv")
    prefix: Path = request.getfixturevalue("conda_kernel")
    modules: Modules = request.getfixturevalue("lmod")
    typed = {
        "virtualenv": ["virtualenv", venv],
        "conda": ["conda", prefix],
        "lmod": ["lmod", "py/1"],
        "chain": ["lmod", "gcc/12", "--", "virtualenv", venv],
    }[mode]
    jupyter.setup(str(typed[0]), f"in-{mode}", *typed[1:], environ=modules.environ)
    return f"in-{mode}"


def test_a_notebook_runs(name: str, jupyter: Jupyter) -> None:
    cells = [
        "import os, sys\nx = 6 * 7\nx",
        "print('out'); print('err', file=sys.stderr)",
        "os.getppid()",
        "1/0",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name=name, timeout=60, allow_errors=True).execute(env=jupyter.environ)
    nbformat.validate(notebook)
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[0][0].data["text/plain"] == "42"
    assert {output.name: output.text for output in outputs[1]} == {"stdout": "out\n", "stderr": "err\n"}
    assert outputs[2][0].data["text/plain"] == str(os.getpid())  # exec: no process between
    assert outputs[3][0].ename == "ZeroDivisionError"


def test_interrupt(name: str, jupyter: Jupyter) -> None:
    with jupyter.kernel(name) as kernel:
        kernel.execute("x = 1")
        error, seconds = kernel.interrupt_in("import time; time.sleep(60)")
        assert error == "KeyboardInterrupt"
        assert seconds < 5
        assert kernel.value("x") == "1"


def test_restart(name: str, jupyter: Jupyter) -> None:
    with jupyter.kernel(name) as kernel:
        kernel.execute("x = 1")
        first = kernel.pid
        kernel.restart()
        assert kernel.execute("x")[1] == "NameError: name 'x' is not defined"
        assert kernel.pid != first
        assert list(marked_processes(jupyter.mark)) == [kernel.pid]


def test_restart_of_a_kernel_that_hangs(name: str, jupyter: Jupyter) -> None:
    with jupyter.kernel(name) as kernel:
        kernel.client.execute(
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15])\nwhile 1: pass"
        )
        time.sleep(0.3)
        kernel.restart(now=True)
        assert kernel.value("6 * 7") == "42"
        assert list(marked_processes(jupyter.mark)) == [kernel.pid]


def test_shutdown_leaves_nothing_and_is_quick(name: str, jupyter: Jupyter) -> None:
    with jupyter.kernel("python3") as native:
        native.execute("1")
        usual = native.shutdown()
    with jupyter.kernel(name) as kernel:
        assert kernel.value("open('/proc/self/task/%d/children' % __import__('os').getpid()).read()") == ""
        ours = kernel.shutdown()
    assert ours < usual + 1  # a zombie below the kernel costs 2.5 s


def test_a_kernel_that_is_killed_leaves_nothing(name: str, jupyter: Jupyter) -> None:
    with jupyter.kernel(name) as kernel:
        os.killpg(os.getpgid(kernel.pid), signal.SIGKILL)
        kernel.manager.provisioner.process.wait(10)
        deadline = time.monotonic() + 10
        while marked_processes(jupyter.mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not marked_processes(jupyter.mark)


def test_the_kernel_sees_no_trace_of_the_launch(name: str, jupyter: Jupyter) -> None:
    """No descriptor, signal mask, working directory or argument of envkernel's own reaches the kernel."""
    with jupyter.kernel("python3") as native, jupyter.kernel(name, alone=False) as kernel:
        for expression in (
            "__import__('os').getcwd()",
            "oct(__import__('os').umask(0o22))",
            "sorted(__import__('signal').pthread_sigmask(0, []))",
            "__import__('resource').getrlimit(__import__('resource').RLIMIT_NOFILE)",
            "[l for l in open('/proc/self/status') if l.startswith(('SigIgn', 'SigBlk'))]",
        ):
            assert kernel.value(expression) == native.value(expression), expression
        assert "envkernel" not in kernel.value("open('/proc/self/cmdline').read()")
        text, error = kernel.execute(SHOW_DESCRIPTORS)
        assert error is None
        assert "envkernel" not in text
        assert "memfd" not in text


def test_ten_at_once(name: str, jupyter: Jupyter) -> None:
    with contextlib.ExitStack() as stack:
        kernels = [stack.enter_context(jupyter.kernel(name, alone=False)) for _ in range(10)]
        assert len({kernel.value("__import__('os').getpid()") for kernel in kernels}) == 10


def test_the_protocol(name: str, jupyter: Jupyter) -> None:
    run_protocol_tests(name)


def test_check_tries_it_all(name: str, jupyter: Jupyter, lmod: Modules) -> None:
    said = json.loads(jupyter.envkernel("check", name, "--json", environ=lmod.environ).stdout)
    assert said["ok"]
    assert [step["error"] for step in said["steps"]] == [""] * len(said["steps"])
    steps = " ".join(step["step"] for step in said["steps"])
    for word in ("start", "execute", "interrupt", "restart", "shut"):
        assert word in steps
    assert not jupyter.leftovers()


def test_list_and_show_name_what_it_is(name: str, jupyter: Jupyter, lmod: Modules) -> None:
    [row] = json.loads(jupyter.envkernel("list", "--json", environ=lmod.environ).stdout)
    assert (row["name"], row["state"]) == (name, "ok")
    shown = json.loads(jupyter.envkernel("show", name, "--json", environ=lmod.environ).stdout)
    assert name in json.dumps(shown)
