"""The file alone: copied elsewhere under another name, with any Python, where nothing can be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import SCRIPT, missing, read_environ
from support.jupyter import PRINT_ENVIRON, Jupyter
from support.modules import Modules
from support.venvs import create_venv, creators, found_pythons

pytestmark = pytest.mark.live

LOADED = {"__future__", "os", "stat", "_stat", "posixpath", "genericpath", "_collections_abc"}
LOADED |= {"importlib", "importlib.machinery", "importlib._bootstrap", "importlib._bootstrap_external"}
LOADED |= {"types", "warnings"}  # which importlib needs in older Pythons
"""All that the run phase may load on top of a bare interpreter: each module costs every kernel start."""

PYTHON_KERNEL = ["--", sys.executable, "-c", "pass", "{connection_file}"]
"""A kernel command that is a Python, as most are: for other programs the run phase also loads ``signal``."""


def usable_pythons() -> dict[str, str]:
    """Return the Pythons that envkernel supports, oldest first."""
    return {
        version: path
        for version, path in found_pythons().items()
        if [int(part) for part in version.split(".")[:2]] >= [3, 8]
    }


@pytest.fixture(params=["ek", "my kernel's launcher.txt", "envkernel.py", ".hidden"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the file under some name, in a directory of its own."""
    path = tmp_path / "bin directory" / request.param
    path.parent.mkdir()
    shutil.copy(SCRIPT, path)
    return path


def with_python(spec: dict[str, Any], python: str) -> dict[str, Any]:
    """Return a kernelspec that is run by another Python."""
    return {**spec, "argv": [python, *spec["argv"][1:]]}


def loaded(argv: list[str], environ: dict[str, str]) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """Run a Python command line; return the modules that it loads."""
    timed = [argv[0], "-X", "importtime", *argv[1:]]
    result = subprocess.run(timed, env=environ, capture_output=True, text=True, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip() for line in lines[1:]}, result


def test_any_name_and_any_python(copy: Path, jupyter: Jupyter, activate_scripts: dict[str, Path]) -> None:
    path = activate_scripts["uv"].parents[1]
    spec = jupyter.dry_run("virtualenv", path, *PRINT_ENVIRON, script=copy)
    assert str(copy) in spec["argv"]
    assert spec["argv"][1:3] == ["-I", "-S"]
    pythons = usable_pythons()
    oldest, *_, newest = [*pythons, *pythons]  # the same one where there is one only
    versions = [oldest, newest]
    for python in (pythons[version] for version in versions):
        for _ in range(2):  # without bytecode, then with it
            assert jupyter.run_environ(with_python(spec, python))["VIRTUAL_ENV"] == str(path)
    minors = {version.rpartition(".")[0] for version in versions}
    assert len(list((copy.parent / "__pycache__").iterdir())) == len(minors)


@pytest.mark.parametrize("version", usable_pythons())
def test_every_python_runs_it(version: str, jupyter: Jupyter, lmod: Modules, tmp_path: Path) -> None:
    python = usable_pythons()[version]
    path = create_venv(f"venv-{version}", tmp_path / "env").parents[1]
    link = ["gcc/12", "--", "virtualenv", path]
    spec = jupyter.dry_run("lmod", *link, *PRINT_ENVIRON, environ=lmod.environ)
    ours = jupyter.run_environ(with_python(spec, python))
    assert (ours["VIRTUAL_ENV"], ours["CC"]) == (str(path), "gcc-12")
    said = subprocess.run([python, "-I", "-S", SCRIPT, "--help"], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")


def test_as_a_program(jupyter: Jupyter, activate_scripts: dict[str, Path], tmp_path: Path) -> None:
    """A file copied onto a login node is made executable and called by its name."""
    program = tmp_path / "envkernel"
    shutil.copy(SCRIPT, program)
    program.chmod(0o755)
    environ = {**jupyter.environ, "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"}
    path = activate_scripts["uv"].parents[1]
    typed = [program, "virtualenv", "--name=x", "--user", path, *PRINT_ENVIRON]
    subprocess.run(typed, env=environ, check=True, capture_output=True)
    assert jupyter.run_environ(jupyter.spec("x"))["VIRTUAL_ENV"] == str(path)


def test_the_run_phase_loads_next_to_nothing(
    jupyter: Jupyter, activate_scripts: dict[str, Path], conda_kernel: Path, lmod: Modules
) -> None:
    venv = activate_scripts["uv"].parents[1]
    launches = {
        "virtualenv": ["virtualenv", venv],
        "conda": ["conda", conda_kernel],  # has a state file: that is JSON
        "lmod": ["lmod", "gcc/12"],
        "chain": ["lmod", "gcc/12", "--", "virtualenv", venv],
    }
    for name, words in launches.items():
        spec = jupyter.dry_run(str(words[0]), *words[1:], *PYTHON_KERNEL, environ=lmod.environ)
        for python in usable_pythons().values():
            bare, _ = loaded([python, "-I", "-S", "-c", "pass"], jupyter.environ)
            ours, result = loaded(with_python(spec, python)["argv"], jupyter.environ)
            assert result.returncode == 0, result.stderr
            more = ours - bare - LOADED
            assert not more or (name == "conda" and "json" in more), (name, python)


def test_a_conda_environment_without_variables_needs_no_json(jupyter: Jupyter, tmp_path: Path) -> None:
    (tmp_path / "env" / "conda-meta").mkdir(parents=True)
    spec = jupyter.dry_run("conda", tmp_path / "env", *PYTHON_KERNEL)
    bare, _ = loaded([sys.executable, "-I", "-S", "-c", "pass"], jupyter.environ)
    assert loaded(spec["argv"], jupyter.environ)[0] - bare <= LOADED


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A directory with a copy of the file, in which nothing can be written, not even by root."""
    directory = tmp_path / "read only"
    directory.mkdir()
    shutil.copy(SCRIPT, directory / "ek")
    return directory


def read_only_run(
    directory: Path, argv: list[str], environ: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run a program for which `directory` is a read-only file system."""
    if os.geteuid() != 0:
        missing("the right to mount something read-only")
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    start = ["unshare", "--mount", "sh", "-c", script, str(directory)]
    return subprocess.run([*start, *argv], env=environ, capture_output=True, check=False)


@pytest.mark.parametrize("cached", ["no directory", "stale", "broken", "another version", "right"])
def test_where_nothing_can_be_written(
    cached: str, read_only: Path, jupyter: Jupyter, activate_scripts: dict[str, Path]
) -> None:
    path = activate_scripts["uv"].parents[1]
    environ = {**jupyter.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    spec = jupyter.setup("virtualenv", "x", path, *PRINT_ENVIRON, script=read_only / "ek")
    jupyter.run(spec)
    cache = read_only / "__pycache__"
    compiled = list(cache.iterdir())
    assert len(compiled) == 1
    if cached == "no directory":
        shutil.rmtree(cache)
    elif cached == "stale":
        os.utime(read_only / "ek", (time.time() + 100,) * 2)
    for item in compiled:
        if cached == "broken":
            item.write_bytes(item.read_bytes()[:10])
        elif cached == "another version":
            item.write_bytes(b"\0\0\0\0" + item.read_bytes()[4:])
    before = {item: item.read_bytes() for item in cache.glob("*")}
    result = read_only_run(read_only, spec["argv"], environ)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    assert read_environ(result.stdout)["VIRTUAL_ENV"] == str(path)
    assert {item: item.read_bytes() for item in cache.glob("*")} == before


def test_an_edited_file_is_compiled_again(jupyter: Jupyter, tmp_path: Path) -> None:
    path = tmp_path / "ek"
    text = SCRIPT.read_text()
    venv = create_venv(creators()[0], tmp_path / "env").parents[1]
    for version in ("9.9.1", "9.9.2"):
        path.write_text(text.replace("__version__ = ", f'__version__ = "{version}"  # was ', 1))
        said = jupyter.envkernel("--version", script=path)
        assert said.stdout.strip() == version
        spec = jupyter.dry_run("virtualenv", venv, *PRINT_ENVIRON, script=path)
        jupyter.run(spec)
        assert spec["metadata"]["envkernel"]["version"] == version


def test_a_python_path_that_would_break_it_is_ignored(
    jupyter: Jupyter, activate_scripts: dict[str, Path], tmp_path: Path
) -> None:
    """Neither PYTHON* variables nor files in the current directory get between."""
    for name in ("os.py", "stat.py", "json.py", "envkernel.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('wrong module')\n")
    spec = jupyter.dry_run("virtualenv", activate_scripts["uv"].parents[1], *PRINT_ENVIRON)
    environ = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere", "PYTHONSTARTUP": "/nowhere"}
    environ.update(PYTHONINSPECT="1", PYTHONWARNINGS="error", PYTHONIOENCODING="ascii", PYTHONDEVMODE="1")
    ours = jupyter.run_environ(spec, environ, cwd=tmp_path)
    del environ["PYTHONHOME"]  # as bin/activate does
    assert {name: ours.get(name) for name in environ} == environ
