"""Kernelspecs and command lines of envkernel 1.x, with the real environments."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from support import SCRIPT
from support.jupyter import Jupyter
from support.modules import Modules

pytestmark = pytest.mark.live

KERNEL = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The command ``envkernel`` as pip installs it, which a kernelspec of 1.x names."""
    path = tmp_path / "bin" / "envkernel"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{SCRIPT.read_text()}")
    path.chmod(0o755)
    return path


def write_spec(jupyter: Jupyter, argv: list[str]) -> None:
    """Write a kernelspec as envkernel 1.x did."""
    directory = jupyter.kernels / "old"
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "old", "language": "python"})
    )


@pytest.mark.parametrize("mode", ["conda", "virtualenv", "lmod"])
def test_its_kernelspecs_run(
    mode: str, jupyter: Jupyter, program: Path, kernel_venv: Path, conda_kernel: Path, lmod: Modules
) -> None:
    words = {
        "conda": [str(conda_kernel)],
        "virtualenv": [str(kernel_venv)],
        "lmod": ["--purge", "gcc/12", "py/1"],
    }
    write_spec(jupyter, [str(program), mode, "run", *words[mode], "--", *KERNEL])
    with jupyter.kernel("old", environ=lmod.environ) as kernel:
        prefix = conda_kernel if mode == "conda" else kernel_venv
        assert kernel.value("__import__('sys').prefix") == str(prefix)
        environ = kernel.environ()
        seen = {"conda": "CONDA_PREFIX", "virtualenv": "VIRTUAL_ENV", "lmod": "PY_MODULE"}[mode]
        assert environ[seen] == {"lmod": "1"}.get(mode, str(prefix))
        error, _ = kernel.interrupt_in("import time; time.sleep(60)")
        assert error == "KeyboardInterrupt"


def test_its_command_lines_are_taken(
    jupyter: Jupyter, kernel_venv: Path, conda_kernel: Path, lmod: Modules
) -> None:
    """As its README shows them."""
    for words in (
        ["conda", "--user", "--name=one", conda_kernel],
        ["conda", "--user", "--name=two", "--display-name=Two", "--python=python", conda_kernel],
        ["virtualenv", "--user", "--name=three", "--kernel-cmd", " ".join(KERNEL), kernel_venv],
        ["lmod", "--user", "--name=four", "--purge", "py/1"],
        ["lmod", "--user", "--name=five", f"--python={kernel_venv}/bin/python", "gcc/12"],
        ["virtualenv", "--name", "six", "--user", "--kernel=ipykernel", "--env", "A=1", kernel_venv],
    ):
        jupyter.envkernel(*map(str, words), environ=lmod.environ)
    names = ["one", "two", "three", "four", "five", "six"]
    assert sorted(os.listdir(jupyter.kernels)) == sorted(names)
    for name in names:
        with jupyter.kernel(name, environ=lmod.environ) as kernel:
            assert kernel.value("6 * 7") == "42"
