"""Real Lmod and Environment Modules: variable by variable what ``module`` makes of a bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import SCRIPT, difference, missing
from support.jupyter import PRINT_ENVIRON, Jupyter
from support.modules import BYTES, QUOTED, Modules

pytestmark = pytest.mark.live

LOADS = {
    "one": [["load", "gcc/12"]],
    "hierarchy": [["load", "gcc/12", "mpi/4"]],
    "swap in a conflict": [["load", "clang/16"]],
    "default version": [["load", "gcc"]],
    "paths": [["load", "paths/1"]],
    "a stack of values": [["load", "push/1", "push2/1"]],
    "unset": [["load", "unset/1"]],
    "alias": [["load", "alias/1"]],
    "noise": [["load", "noisy/1"]],
    "a module that loads": [["load", "loads/1"]],
    "many": [["load", "gcc/13", "mpi/4", "paths/1", "push/1", "noisy/1", "py/1"]],
}
LMOD_ONLY = {
    "family": [["load", "family/one", "family2/two"]],
    "warning": [["load", "warning/1"]],
    "message": [["load", "message/1"]],
    "prints": [["load", "prints/1"]],
    "sticky": [["load", "sticky/1"]],
    "depends": [["load", "dependent/1"]],
    "function": [["load", "function/1"]],
    "unload": [["unload", "gcc"], ["load", "paths/1"]],
    "shell commands": [["load", "execute/1", "gcc/12"]],
    "a sourced script": [["load", "paths/1", "sources/1"]],
    "other modes' commands": [["load", "executed/1"]],
}
STARTS: dict[str, dict[str, str]] = {
    "clean": {},
    "values": {
        "GONE": "1",
        "PUSHED": "zero",
        "MANPATH": "/m:/n",
        "CC": "cc",
        "PATH": "/to/be/removed:/usr/bin:/bin",
    },
    "odd values": {"A": "a\nb", "B": "caf\udce9 \udcff", "C": "", "D": "'\"$(id)`id`\\"},
}


@pytest.fixture(params=["lmod", "environment_modules"])
def modules(request: pytest.FixtureRequest) -> Modules:
    """Each module system."""
    return request.getfixturevalue(request.param)


def arguments(calls: list[list[str]]) -> list[str]:
    """Return what a user types after ``envkernel lmod`` for some ``module`` calls."""
    words: list[str] = []
    for verb, *names in calls:
        if verb == "purge":
            words.append("--purge")
        elif verb == "use":
            words += [f"--use={name}" for name in names]
        elif verb == "restore":
            words += [f"--restore={name}" for name in names]
        else:
            words += [("-" if verb == "unload" else "") + name for name in names]
    return words


def assert_same(jupyter: Jupyter, modules: Modules, calls: list[list[str]], start: dict[str, str]) -> None:
    """Compare a kernel's environment with that of a bash that ran the same ``module`` calls."""
    environ = {**modules.environ, **start}
    spec = jupyter.dry_run("lmod", *arguments(calls), *PRINT_ENVIRON, environ=environ)
    ours = jupyter.run_environ(spec, environ)
    theirs = modules.bash({**jupyter.environ, **environ}, *calls)
    assert difference(ours, theirs) == {}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("calls", LOADS)
def test_the_environment_is_the_same(calls: str, start: str, jupyter: Jupyter, modules: Modules) -> None:
    assert_same(jupyter, modules, LOADS[calls], STARTS[start])


@pytest.mark.parametrize("calls", LMOD_ONLY)
def test_what_only_lmod_has(calls: str, jupyter: Jupyter, lmod: Modules) -> None:
    assert_same(jupyter, lmod, LMOD_ONLY[calls], {})


def test_from_loaded_modules(jupyter: Jupyter, modules: Modules) -> None:
    loaded = modules.bash({**jupyter.environ, **modules.environ}, ["load", "gcc/12", "mpi/4", "push/1"])
    for calls in (
        [["purge"], ["load", "paths/1"]],
        [["unload", "mpi"], ["load", "paths/1"]],
        [["load", "push2/1"]],
        [["purge"], ["load", "gcc/13", "mpi/4"]],
    ):
        spec = jupyter.dry_run("lmod", *arguments(calls), *PRINT_ENVIRON, environ=loaded)
        ours = jupyter.run_environ(spec, loaded, replace=True)
        assert difference(ours, modules.bash(loaded, *calls)) == {}, calls


def test_shell_commands_of_an_unload(jupyter: Jupyter, lmod: Modules) -> None:
    loaded = lmod.bash({**jupyter.environ, **lmod.environ}, ["load", "executed/1"])
    calls = [["unload", "executed"], ["load", "gcc/12"]]
    spec = jupyter.dry_run("lmod", *arguments(calls), *PRINT_ENVIRON, environ=loaded)
    ours = jupyter.run_environ(spec, loaded, replace=True)
    assert ours["UNLOADED"] == "yes"
    assert difference(ours, lmod.bash(loaded, *calls)) == {}


def test_a_sticky_module_survives_a_purge(jupyter: Jupyter, lmod: Modules) -> None:
    loaded = lmod.bash({**jupyter.environ, **lmod.environ}, ["load", "sticky/1", "gcc/12"])
    spec = jupyter.dry_run("lmod", "--purge", "paths/1", *PRINT_ENVIRON, environ=loaded)
    ours = jupyter.run_environ(spec, loaded, replace=True)
    assert ours["STICKY"] == "1"
    assert "CC" not in ours


def test_any_value_arrives_as_it_is(jupyter: Jupyter, modules: Modules) -> None:
    """Here bash is no reference: it runs a value's second line as a command."""
    expected = {**QUOTED, **(BYTES if modules.name == "lmod" else {})}
    names = ["quoted/1", "bytes/1"] if modules.name == "lmod" else ["quoted/1"]
    for start in ({}, {"LANG": "C.UTF-8"}):
        environ = {**modules.environ, **start}
        spec = jupyter.dry_run("lmod", *names, *PRINT_ENVIRON, environ=environ)
        ours = jupyter.run_environ(spec, environ)
        if modules.name != "lmod" and not start:  # Tcl writes no such character where the locale is C
            ours["Q_UNICODE"] = expected["Q_UNICODE"]
        assert {name: ours.get(name) for name in expected} == expected
        assert "EVIL" not in ours


def test_more_directories(jupyter: Jupyter, lmod: Modules) -> None:
    directory = lmod.root / "directory with space"
    assert_same(jupyter, lmod, [["use", str(directory)], ["load", "spaced/1"]], {})


def test_a_collection(jupyter: Jupyter, lmod: Modules) -> None:
    environ = {**jupyter.environ, **lmod.environ}
    loaded = lmod.bash(environ, ["load", "gcc/12", "paths/1"])
    subprocess.run([*lmod.command, "bash", "save", "mine"], env=loaded, check=True, capture_output=True)
    assert_same(jupyter, lmod, [["restore", "mine"]], {})
    said = jupyter.envkernel(
        "lmod", "--name=x", "--user", "--restore=nonesuch", *PRINT_ENVIRON, environ=lmod.environ, status=1
    )
    assert "nonesuch" in said.stderr


@pytest.mark.parametrize("name", ["nosuch/1", "failing/1", "needs/1", "gcc/99", "--version", "a b;id"])
def test_what_cannot_be_loaded_is_an_error_at_setup(name: str, jupyter: Jupyter, modules: Modules) -> None:
    said = jupyter.envkernel(
        "lmod", "--name=x", "--user", "gcc/12", name, *PRINT_ENVIRON, environ=modules.environ, status=None
    )
    assert said.returncode == (2 if name == "--version" else 1), said.stderr
    assert name in said.stderr or "licence server is down" in said.stderr
    assert not jupyter.kernels.exists()


@pytest.mark.parametrize("name", ["error/1", "syntax/1"])
def test_what_lmod_cannot_load_is_an_error(name: str, jupyter: Jupyter, lmod: Modules) -> None:
    said = jupyter.envkernel(
        "lmod", "--name=x", "--user", name, *PRINT_ENVIRON, environ=lmod.environ, status=1
    )
    assert name in said.stderr
    assert not jupyter.kernels.exists()


def test_what_the_modules_say_reaches_stderr(jupyter: Jupyter, lmod: Modules) -> None:
    spec = jupyter.dry_run("lmod", "message/1", "noisy/1", "warning/1", *PRINT_ENVIRON, environ=lmod.environ)
    result = jupyter.run(spec, lmod.environ)
    for text in (b"welcome", b"to stderr", b"noise on stderr", b"this module is old"):
        assert text in result.stderr


def test_without_a_login_shell(jupyter: Jupyter, modules: Modules) -> None:
    """A Jupyter started by systemd has none of the variables that setup had."""
    spec = jupyter.dry_run("lmod", "gcc/12", "mpi/4", *PRINT_ENVIRON, environ=modules.environ)
    theirs = modules.bash({**jupyter.environ, **modules.environ}, ["load", "gcc/12", "mpi/4"])
    ours = jupyter.run_environ(spec)
    for name in ("CC", "MPI_HOME", "PATH", "MODULEPATH", "LOADEDMODULES"):
        assert ours[name] == theirs[name]


def test_the_python_of_a_module_is_the_kernels(jupyter: Jupyter, modules: Modules, kernel_venv: Path) -> None:
    jupyter.setup("lmod", "py", "py/1", environ=modules.environ)
    with jupyter.kernel("py") as kernel:
        assert kernel.value("__import__('sys').prefix") == str(kernel_venv)
        assert kernel.environ()["PY_MODULE"] == "1"


def test_a_python_that_no_module_brought_is_refused(jupyter: Jupyter, modules: Modules) -> None:
    said = jupyter.envkernel("lmod", "--name=x", "--user", "gcc/12", environ=modules.environ, status=1)
    assert "python" in said.stderr
    assert not jupyter.kernels.exists()


def test_a_module_that_goes_missing_is_named_in_the_notebook(
    jupyter: Jupyter, lmod: Modules, tmp_path: Path
) -> None:
    directory = tmp_path / "modulefiles"
    directory.mkdir()
    module = directory / "late.lua"
    module.write_text('setenv("LATE", "1")\n')
    jupyter.setup("lmod", "late", f"--use={directory}", "late", "py/1", environ=lmod.environ)
    module.unlink()
    with jupyter.kernel("late", environ=lmod.environ) as kernel:
        said, error = kernel.execute("print(1)")
        assert error
        assert "late" in said + error


def test_no_module_system_is_an_error(jupyter: Jupyter, tmp_path: Path) -> None:
    """With paths that lead nowhere, in a root of its own where neither system is installed."""
    if os.geteuid() != 0:
        missing("the right to mount something over Lmod")
    script = f"mount -t tmpfs none /usr/share/lmod && exec {sys.executable} {SCRIPT} lmod --name=x a"
    environ = {**jupyter.environ, "LMOD_CMD": "/nowhere", "MODULEPATH": "/nowhere"}
    said = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=environ, capture_output=True, text=True, check=False
    )
    assert said.returncode == 1, said.stderr
    assert "module system" in said.stderr
