"""Kernels that wait in a queue or start late in real engines, and clients with a shorter start-up limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Iterator

import nbformat
import pytest
from nbclient import NotebookClient

from support.jupyter import Jupyter, private_jupyter
from support.modes import MAKERS, Mode

pytestmark = pytest.mark.live

LIMIT = 6
"""Seconds that clients wait for a kernel; YARN takes longer by itself."""
SLOW = 'sleep 12; exec python3 -m ipykernel_launcher -f "$0"'
WORDS = {
    "docker": lambda words: [*words[1:], "--", "/bin/sh", "-c", SLOW, "{connection_file}"],
    "slurm": lambda words: ["--begin=now+12", *words],
    "yarn": lambda words: words,
}
"""What makes a kernel of a mode start late."""
STATES = {"docker": "kernel is starting", "slurm": "Slurm job", "yarn": "YARN application"}
"""What the cell says is waited for."""


@pytest.fixture
def place(mode: Mode, tmp_path: Path) -> Iterator[Jupyter]:
    """A Jupyter with the kernel ``late`` of a mode."""
    assert set(WORDS) <= set(MAKERS)
    with private_jupyter(tmp_path / "j") as place:
        place.environ.update(mode.environ)
        place.setup(mode.mode, "late", *WORDS[mode.key](mode.words))
        yield place


def write_notebook(path: Path, *codes: str) -> nbformat.NotebookNode:
    """Write a notebook for the kernel ``late``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    book.metadata.kernelspec = {"name": "late", "display_name": "late", "language": "python"}
    nbformat.write(book, path)
    return book


@pytest.mark.parametrize("mode", WORDS, indirect=True)
def test_a_notebook_waits_and_shows_for_what(place: Jupyter, mode: Mode, tmp_path: Path) -> None:
    """The state is in the cell while it waits; in the notebook is only the real output."""
    book = write_notebook(tmp_path / "x.ipynb", "print(6 * 7)", "x = 1", "x")
    shown: list[str] = []

    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):  # type: ignore[no-untyped-def]
            shown.append(msg["content"].get("data", {}).get("text/plain", ""))
            return super().process_message(msg, cell, cell_index)

    Client(book, kernel_name="late", startup_timeout=LIMIT).execute(env=place.environ)
    texts = [[one.get("text") or one.data["text/plain"] for one in cell.outputs] for cell in book.cells]
    assert texts == [["42\n"], [], ["1"]]
    assert any(STATES[mode.key] in text and "waited" in text for text in shown), shown


@pytest.mark.parametrize("mode", ["slurm"], indirect=True)
def test_nbgrader_waits_in_a_queue(place: Jupyter, tmp_path: Path) -> None:
    about = {"schema_version": 3, "grade_id": "a", "grade": True, "points": 1, "locked": False}
    for path in ("source/ps1/p1.ipynb", "submitted/alice/ps1/p1.ipynb"):
        book = write_notebook(tmp_path / path, "print('answer', 6 * 7)")
        book.cells[0].metadata["nbgrader"] = {**about, "solution": True, "task": False}
        nbformat.write(book, tmp_path / path)
    (tmp_path / "nbgrader_config.py").write_text(
        f"c = get_config(); c.CourseDirectory.root = {str(tmp_path)!r}; c.Execute.timeout = 120\n"
        f"c.Execute.startup_timeout = {LIMIT}\n"
    )
    for command in ("generate_assignment", "autograde"):
        done = subprocess.run(
            [sys.executable, "-m", "nbgrader", command, "ps1"],
            env={**place.environ, "PATH": f"{Path(sys.executable).parent}:{place.environ['PATH']}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
    graded = nbformat.read(tmp_path / "autograded/alice/ps1/p1.ipynb", 4)
    assert [output.get("text") for output in graded.cells[0].outputs] == ["answer 42\n"]
