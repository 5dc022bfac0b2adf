"""What a kernel that can't start, or is not as it should be, says of it."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from support.jupyter import Jupyter


def reason(jupyter: Jupyter, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start a broken kernel; return the error that a cell gets, and all that was published for it."""
    published: list[dict[str, Any]] = []
    with jupyter.kernel(name) as kernel:
        reply = kernel.client.execute_interactive(
            "1 + 1", timeout=20, output_hook=published.append, allow_stdin=False
        )["content"]
        key = kernel.manager.session.key.decode()
    assert reply["status"] == "error"
    assert reply["ename"] == "KernelDidNotStart"
    said = json.dumps([message["content"] for message in published]) + json.dumps(reply)
    assert key not in said
    assert "Traceback" not in said
    run_in_batch(jupyter, name, reply["evalue"])
    return reply, {message["msg_type"]: message["content"] for message in published}


def run_in_batch(jupyter: Jupyter, name: str, evalue: str) -> None:
    """Run a notebook with nbclient, as nbconvert and papermill do: its first cell has to fail, at once."""
    cells = [nbformat.v4.new_code_cell(code) for code in ("1 + 1", "2 + 2")]
    book = nbformat.v4.new_notebook(cells=cells)
    start = time.monotonic()
    with pytest.raises(CellExecutionError) as failure:
        NotebookClient(book, kernel_name=name).execute(env=jupyter.environ)
    assert time.monotonic() - start < 15
    changing = "-[0-9a-f]{8}"  # in a container's name
    assert re.sub(changing, "", evalue) in re.sub(changing, "", str(failure.value).replace("\n", " "))
    assert [len(cell.outputs) for cell in cells] == [2, 0]


def checked(jupyter: Jupyter, name: str, status: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Check a kernel; return what it said as data, and the errors by step."""
    result = json.loads(jupyter.envkernel("check", name, "--json", status=status).stdout)
    assert result["ok"] == (status == 0)
    return result, {row["step"]: row["error"] for row in result["steps"]}
