"""Real clients: each runs a notebook on whole kernels, and says why a broken one did not start."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pexpect
import pytest

from support.jupyter import Jupyter, marked_processes

pytestmark = pytest.mark.live

CODE = "import sys; print('answer', 6 * 7, sys.prefix)"
WHOLE = ["venv", "conda", "chain", "docker"]


def program(name):
    """Return a program of the Python that runs the tests."""
    return str(Path(sys.executable).parent / name)


class Desk:
    """A Jupyter with kernels.  prefixes: what sys.prefix is in each.  reason: why `broken` does not start."""

    def __init__(self, jupyter):
        self.jupyter = jupyter
        self.prefixes = {}
        self.reason = ""

    def call(self, directory, *argv):
        """Run a client in a directory; return its exit status and all it said."""
        said = subprocess.run(
            [program(argv[0]), *map(str, argv[1:])],
            env={**self.jupyter.environ, "PATH": f"{program('')}:{self.jupyter.environ['PATH']}"},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return said.returncode, said.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory, kernel_venv, conda_kernel, lmod, docker_engine):
    root = tmp_path_factory.mktemp("clients")
    desk = Desk(Jupyter(root / "jupyter"))
    jupyter = desk.jupyter
    jupyter.environ.update(lmod.environ)
    jupyter.environ.update(docker_engine.environ)
    jupyter.setup("virtualenv", "venv", kernel_venv)
    jupyter.setup("conda", "conda", conda_kernel)
    jupyter.setup("lmod", "chain", "gcc/12", "--", "virtualenv", kernel_venv)
    jupyter.setup("docker", "docker", "--python=python3", "python")
    desk.prefixes = {"venv": kernel_venv, "conda": conda_kernel, "chain": kernel_venv, "docker": "/usr"}
    gone = root / "gone"
    shutil.copytree(kernel_venv, gone, symlinks=True, copy_function=os.link)
    jupyter.setup("virtualenv", "broken", gone)
    shutil.rmtree(gone)
    desk.reason = f"There is no virtualenv at {gone}."
    yield desk
    left = jupyter.leftovers()
    assert not left, f"left behind by clients:\n{left}"
    assert not docker_engine.ids()


def notebook(path, kernel, *codes):
    """Write a notebook for a kernel."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes or [CODE]])
    book.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(book, path)
    return path.name


def outputs(path):
    """Return the texts below the cells of an executed notebook."""
    cells = nbformat.read(path, 4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def run_jupyter_run(desk, kernel, directory):
    (directory / "code.py").write_text(CODE)
    return desk.call(directory, "jupyter-run", "--kernel", kernel, "code.py")


def run_nbclient(desk, kernel, directory):
    status, said = desk.call(
        directory, "jupyter-execute", "--inplace", notebook(directory / "x.ipynb", kernel)
    )
    return status, said + (outputs(directory / "x.ipynb") if status == 0 else "")


def run_nbconvert(desk, kernel, directory):
    name = notebook(directory / "x.ipynb", kernel)
    return desk.call(directory, "jupyter-nbconvert", "--to=notebook", "--execute", "--stdout", name)


def run_papermill(desk, kernel, directory):
    name = notebook(directory / "x.ipynb", "python3")
    options = ["--kernel", kernel, "--no-progress-bar", "--log-output"]
    return desk.call(directory, "papermill", *options, name, "out.ipynb")


def graded_notebook(path, kernel):
    """Write a notebook with one cell that nbgrader grades."""
    path.parent.mkdir(parents=True)
    notebook(path, kernel)
    book = nbformat.read(path, 4)
    marks = {"schema_version": 3, "grade_id": "a", "grade": True, "points": 1, "locked": False}
    book.cells[0].metadata["nbgrader"] = {**marks, "solution": True, "task": False}
    nbformat.write(book, path)


def run_nbgrader(desk, kernel, directory):
    """Release and autograde an assignment; return the output in the graded notebook as well."""
    graded_notebook(directory / "source/ps1/p1.ipynb", kernel)
    graded_notebook(directory / "submitted/alice/ps1/p1.ipynb", kernel)
    (directory / "nbgrader_config.py").write_text(
        f"c = get_config(); c.CourseDirectory.root = {str(directory)!r}\n"
    )
    status, said = desk.call(directory, "nbgrader", "generate_assignment", "ps1")
    assert status == 0, said
    status, said = desk.call(directory, "nbgrader", "autograde", "ps1")
    graded = directory / "autograded/alice/ps1/p1.ipynb"
    return status, said + (outputs(graded) if graded.exists() else "")


CLIENTS = [run_jupyter_run, run_nbclient, run_nbconvert, run_papermill, run_nbgrader]


@pytest.mark.parametrize("kernel", WHOLE)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__[4:])
def test_a_client_runs_a_kernel(client, kernel, desk, tmp_path):
    status, said = client(desk, kernel, tmp_path)
    assert status == 0, said
    assert f"answer 42 {desk.prefixes[kernel]}" in said


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__[4:])
def test_a_client_fails_with_the_reason(client, desk, tmp_path):
    start = time.monotonic()
    status, said = client(desk, "broken", tmp_path)
    assert status != 0
    assert desk.reason in said.replace("\n", " ").replace("  ", " "), said
    assert "Timeout" not in said
    # nbgrader counts an error as the student's, so there the kernel must not answer at all
    assert ("KernelDidNotStart" in said) == (client is not run_nbgrader)
    assert not list(tmp_path.glob("autograded/**/*.ipynb"))
    assert time.monotonic() - start < 30


class Console:
    """``jupyter console`` in a terminal."""

    def __init__(self, desk, kernel):
        environ = {**desk.jupyter.environ, "TERM": "dumb", "COLUMNS": "200"}
        self.child = pexpect.spawn(
            program("jupyter-console"),
            ["--kernel", kernel, "--simple-prompt", "--no-confirm-exit"],
            env=environ,
            encoding="utf-8",
            timeout=30,
            dimensions=(50, 250),
        )

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.child.isalive():
            self.child.sendeof()
            self.child.expect(pexpect.EOF)
        self.child.close()

    def ask(self, code, answer):
        """Type code; wait for the answer and the next prompt."""
        self.child.sendline(code)
        self.child.expect(answer)
        self.child.expect(r"In \[\d+\]: ")


@pytest.mark.parametrize("kernel", WHOLE)
def test_the_console(kernel, desk):
    with Console(desk, kernel) as console:
        console.child.expect(r"In \[1\]: ")
        time.sleep(1)  # the console's subscription to what the kernel publishes may come after its prompt
        console.ask("6 * 7", r"Out\[1\]: 42")
        console.child.sendline("name = input('who? ')")
        console.child.expect(r"who\? (?!')")
        console.ask("me", "me")
        console.ask("name + name", "meme")
        console.ask("import sys; sys.prefix", str(desk.prefixes[kernel]))


def test_the_console_tells_the_reason_before_anything_is_typed(desk):
    with Console(desk, "broken") as console:
        console.child.expect_exact("The kernel broken did not start.")
        console.child.expect_exact(desk.reason)
        console.child.expect(r"In \[1\]: ")
        console.ask("1 + 1", "KernelDidNotStart")
    with Console(desk, "broken") as console:
        console.child.expect(r"In \[1\]: ")
        console.child.sendline("exit")
        console.child.expect(pexpect.EOF)
    assert not marked_processes(desk.jupyter.mark)


@pytest.mark.parametrize("kernel", [*WHOLE, "broken"])
def test_the_rules_of_vs_code(kernel, desk):
    """What its Jupyter extension hides or cannot start (vscode-jupyter#13796, #14172)."""
    spec = desk.jupyter.spec(kernel)
    argv = spec["argv"]
    assert os.path.isabs(argv[0])
    assert os.access(argv[0], os.X_OK)
    assert "{connection_file}" in argv
    assert [
        word for word in argv if "{" in word and word not in ("{connection_file}", "{resource_dir}")
    ] == []
    assert "kernel_provisioner" not in spec["metadata"]
    assert set(spec) <= {
        "argv",
        "display_name",
        "language",
        "metadata",
        "env",
        "interrupt_mode",
        "kernel_protocol_version",
    }
    assert all(isinstance(value, str) and "$" not in value for value in spec.get("env", {}).values())
    assert json.dumps(spec).isascii()
