"""Virtual environments: variable by variable what a bash has that sourced the real bin/activate."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
from pathlib import Path
from typing import Any, Dict

import pytest

from support import bash_environ, difference
from support.jupyter import PRINT_ENVIRON, Jupyter
from support.venvs import create_venv, creators, found_pythons

Scripts = Dict[str, Path]

pytestmark = pytest.mark.live

VENV = f"venv-{max(found_pythons(), key=lambda version: [int(part) for part in version.split('.')[:2]])}"
"""The maker of the newest venv."""

STARTS: dict[str, dict[str, str]] = {
    "clean": {},
    "another python": {"PYTHONHOME": "/x", "PYTHONPATH": "/y"},
    "empty PYTHONHOME": {"PYTHONHOME": ""},
    "another venv": {"VIRTUAL_ENV": "/old", "VIRTUAL_ENV_PROMPT": "old", "PATH": "/old/bin:/usr/bin:/bin"},
    "no prompt wanted": {"VIRTUAL_ENV_DISABLE_PROMPT": "1", "VIRTUAL_ENV_PROMPT": "old"},
    "empty wish": {"VIRTUAL_ENV_DISABLE_PROMPT": ""},
    "prompt": {"PS1": "$ "},
    "libraries": {"PKG_CONFIG_PATH": "/p", "TCL_LIBRARY": "/t", "TK_LIBRARY": "/u", "LD_LIBRARY_PATH": "/l"},
    "empty libraries": {"PKG_CONFIG_PATH": "", "TCL_LIBRARY": ""},
    "odd PATH": {"PATH": ":/usr/bin::/a b:$HOME:/bin:"},
    "exported leftovers": {"_OLD_VIRTUAL_PATH": "/o:/usr/bin:/bin", "_OLD_VIRTUAL_PYTHONHOME": "/h"},
    "empty leftovers": {"_OLD_VIRTUAL_PATH": "", "_OLD_VIRTUAL_PYTHONHOME": "", "PYTHONHOME": "/x"},
    "package leftovers": {"_OLD_PKG_CONFIG_PATH": "/p", "PKG_CONFIG_PATH": "/q"},
    "functions": {
        "BASH_FUNC_module%%": "() {  eval $(true)\n}",
        "BASH_FUNC_deactivate%%": "() {  export EVIL=1\n}",
    },
    "shell options": {
        "BASH_ENV": "/nowhere",
        "SHELLOPTS": "errexit:nounset",
        "POSIXLY_CORRECT": "1",
        "ENV": "x",
    },
    "odd values": {
        "A": "a\nb",
        "B": "caf\udce9 \udcff",
        "C": "",
        "D": "'\"$(id)`id`\\",
        "not a name": "1",
        "E.F": "2",
    },
    "login shell": {"LC_ALL": "C", "TERM": "xterm", "PWD": "/nowhere", "SHLVL": "3", "_": "x"},
}
SHELL_SETTINGS = ("BASH_ENV", "SHELLOPTS", "BASHOPTS", "POSIXLY_CORRECT")

FOLDERS = {
    "plain": "env",
    "spaces": " a  b ",
    "shell": 'it\'s $HOME `id` "q" ; id & #%s {connection_file}',
    "backslash": "back\\slash\\n",
    "unicode": "café 日",
    "prefix of an option": "-n",
}


def in_bash(script: Path, environ: dict[str, str]) -> dict[str, str]:
    """Return what sourcing `script` makes of an environment, whose shell settings stay as they are."""
    clean = {name: value for name, value in environ.items() if name not in SHELL_SETTINGS}
    kept = {name: environ[name] for name in SHELL_SETTINGS if name in environ}
    return {**bash_environ(f". {shlex.quote(str(script))}", clean), **kept}


def assert_same(jupyter: Jupyter, spec: dict[str, Any], script: Path, starts: Any = STARTS) -> None:
    """Compare a kernelspec that prints its environment with bash, from each start."""
    for label, start in starts.items():
        environ = {**jupyter.environ, **start}
        differences = difference(jupyter.run_environ(spec, start), in_bash(script, environ))
        assert differences == {}, f"{label}: {script}"


@pytest.mark.parametrize("creator", creators())
def test_the_environment_is_the_same(creator: str, jupyter: Jupyter, activate_scripts: Scripts) -> None:
    script = activate_scripts[creator]
    assert_same(jupyter, jupyter.dry_run("virtualenv", script.parents[1], *PRINT_ENVIRON), script)


@pytest.mark.parametrize("directory", FOLDERS)
@pytest.mark.parametrize("creator", ["venv", "virtualenv", "uv"])
def test_any_directory_name(creator: str, directory: str, jupyter: Jupyter, tmp_path: Path) -> None:
    """Where a creator wrote the name so that bash would run or lose a part of it, setup says so."""
    script = create_venv(VENV if creator == "venv" else creator, tmp_path / "venvs" / FOLDERS[directory])
    path = str(script.parents[1])
    if in_bash(script, jupyter.environ).get("VIRTUAL_ENV") == path:
        starts = {name: STARTS[name] for name in ("clean", "another venv", "no prompt wanted", "odd values")}
        assert_same(jupyter, jupyter.dry_run("virtualenv", path, *PRINT_ENVIRON), script, starts)
        return
    assert creator == "venv"
    assert directory == "shell"
    said = jupyter.envkernel("virtualenv", "--name=x", "--user", path, *PRINT_ENVIRON, status=1)
    assert "does not quote the name of its directory" in said.stderr


@pytest.mark.parametrize(
    "name", ["new\nline", b"caf\xe9 \xff", b"\x01\x1b[0m\x7f"], ids=["new line", "latin", "control"]
)
def test_a_moved_environment_with_any_name(name: str | bytes, jupyter: Jupyter, tmp_path: Path) -> None:
    made = create_venv(creators()[0], tmp_path / "made").parents[1]
    target = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    os.rename(made, target)
    path = Path(os.fsdecode(target))
    script = path / "bin" / "activate"
    spec = jupyter.dry_run("virtualenv", path, *PRINT_ENVIRON)
    assert_same(jupyter, spec, script, {"clean": {}})
    # ... and where its script names it
    text = script.read_bytes()
    if b'"' + os.fsencode(made) not in text:  # later creators quote only a path that needs it
        target = os.fsencode(shlex.quote(os.fsdecode(target)))
    script.write_bytes(text.replace(os.fsencode(made), target))
    assert_same(jupyter, spec, script, {"clean": {}, "another venv": STARTS["another venv"]})


@pytest.mark.parametrize(
    "creator", [*(f"venv-{version}" for version in found_pythons()), "virtualenv==20.26.0"]
)
@pytest.mark.parametrize("name", ["$(touch pwned)", "`touch pwned`", "';touch pwned;'", '";touch pwned;"'])
def test_a_directory_name_is_never_run(name: str, creator: str, jupyter: Jupyter, tmp_path: Path) -> None:
    path = create_venv(creator, tmp_path / name).parents[1]
    typed = ["virtualenv", "--name=x", "--user", path, *PRINT_ENVIRON]
    said = jupyter.envkernel(*typed, cwd=tmp_path, status=None)
    assert not (tmp_path / "pwned").exists()
    if said.returncode:  # the creator wrote the name so that bash would run it
        assert "does not quote the name of its directory" in said.stderr
        return
    ours = jupyter.run_environ(jupyter.spec("x"), cwd=tmp_path)
    assert (ours["VIRTUAL_ENV"], ours["PATH"]) == (str(path), f"{path}/bin:{jupyter.environ['PATH']}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("prompt", ["my project", "it's", '"$(id)`id`\\', "", "(x) "])
@pytest.mark.parametrize("creator", ["venv", "virtualenv", "uv"])
def test_a_prompt_of_ones_own(creator: str, prompt: str, jupyter: Jupyter, tmp_path: Path) -> None:
    name = VENV if creator == "venv" else creator
    script = create_venv(name, tmp_path / "env", prompt)
    starts = {label: STARTS[label] for label in ("clean", "no prompt wanted")}
    assert_same(jupyter, jupyter.dry_run("virtualenv", script.parents[1], *PRINT_ENVIRON), script, starts)


EDITS = {
    "exports": "export TOKEN='a b' PATH=/more:$PATH\nNOT_EXPORTED=1",
    "dotenv": 'set -a; source "$VIRTUAL_ENV/.env"; set +a',
    "unset": "unset A LD_LIBRARY_PATH; export -n C",
    "a failing command": "false; nosuchprogram; export AFTER=1",
    "return": "export BEFORE=1; return 3; export NEVER=1",
    "options": "set -u; set -e; export OPTIONS=1",
    "noise": 'echo noise; echo noise >&2; cat; read -r line; export READ="[$line]"',
    "a function": "greet() { echo hi; }; export -f greet; alias ll=ls",
    "an array": "declare -a LIST=(1 2); declare -x NUMBER=3; declare -i WHOLE=4; export WHOLE",
    "awkward values": "export NL=$'a\\nb' BYTES=$'caf\\xe9\\xff' CR=$'a\\r\\n' QUOTE=\"it's \\\"\"",
    "the directory": "cd /; export HERE=$PWD",
    "arguments": 'export ARGUMENTS="$#:$*"',
    "traps": "trap 'echo bye' EXIT; export TRAPPED=1",
    "descriptors": "exec 5</dev/null 3>&1; export OPENED=1",
    "jobs": "sleep 0.2 & export JOB=1",
    "prompt": "PS1=x; export PS1",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_script_is_sourced(
    edit: str, jupyter: Jupyter, activate_scripts: Scripts, tmp_path: Path
) -> None:
    source = activate_scripts[VENV].parents[1]
    path = tmp_path / "edited"
    shutil.copytree(source, path, symlinks=True)
    script = path / "bin" / "activate"
    script.write_text(script.read_text().replace(str(source), str(path)) + f"\n{EDITS[edit]}\n")
    (path / ".env").write_text("SECRET='s p a c e'\nEMPTY=\n")
    spec = jupyter.dry_run("virtualenv", path, *PRINT_ENVIRON)
    starts = {label: STARTS[label] for label in ("clean", "odd values", "libraries", "another venv")}
    assert_same(jupyter, spec, script, starts)


def test_a_script_that_ends_the_shell_is_an_error(
    jupyter: Jupyter, activate_scripts: Scripts, tmp_path: Path
) -> None:
    path = tmp_path / "ends"
    shutil.copytree(activate_scripts[creators()[0]].parents[1], path, symlinks=True)
    script = path / "bin" / "activate"
    script.write_text(script.read_text() + "\necho going; exit 0\n")
    said = jupyter.envkernel("virtualenv", "--name=x", "--user", path, *PRINT_ENVIRON, status=1)
    assert str(script) in said.stderr
    assert "exit" in said.stderr
    assert not jupyter.kernels.exists()


def test_a_linked_environment(jupyter: Jupyter, activate_scripts: Scripts, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(activate_scripts[creators()[0]].parents[1])
    spec = jupyter.dry_run("virtualenv", link, *PRINT_ENVIRON)
    assert str(link) in spec["argv"]
    assert_same(jupyter, spec, link / "bin" / "activate", {"clean": {}})


def test_switching_from_an_active_environment(jupyter: Jupyter, activate_scripts: Scripts) -> None:
    for first in (creators()[0], "virtualenv", "uv"):
        active = in_bash(activate_scripts[first], jupyter.environ)
        for second in ("virtualenv", VENV):
            script = activate_scripts[second]
            spec = jupyter.dry_run("virtualenv", script.parents[1], *PRINT_ENVIRON, environ=active)
            ours = jupyter.run_environ(spec, active, replace=True)
            assert difference(ours, in_bash(script, active)) == {}, (first, second)


def test_no_locale_of_pythons_own_reaches_the_kernel(jupyter: Jupyter, activate_scripts: Scripts) -> None:
    spec = jupyter.dry_run("virtualenv", activate_scripts["uv"].parents[1], *PRINT_ENVIRON)
    for start in ({}, {"LC_ALL": "C"}, {"LANG": "C"}, {"LC_CTYPE": "C.UTF-8"}, {"LC_CTYPE": "POSIX"}):
        ours = jupyter.run_environ(spec, start)
        locale = {name: value for name, value in ours.items() if name.startswith(("LC_", "LANG"))}
        assert locale == start


def test_an_empty_environment_is_enough(jupyter: Jupyter, activate_scripts: Scripts) -> None:
    script = activate_scripts["uv"]
    spec = jupyter.dry_run("virtualenv", script.parents[1], *PRINT_ENVIRON)
    for start in ({}, {"PATH": ""}, {"HOME": "/nonexistent"}):
        ours = jupyter.run_environ(spec, start, replace=True)
        assert difference(ours, in_bash(script, start)) == {}, start


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda path: shutil.rmtree(path), "no virtualenv"),
        (lambda path: shutil.rmtree(path / "bin"), "no virtualenv"),
        (lambda path: (path / "bin" / "python").unlink(), "python"),
        (lambda path: (path / "bin" / "python").chmod(0o644), "python"),
    ],
    ids=["gone", "no bin", "no python", "python not executable"],
)
def test_a_broken_environment_is_named_at_setup(
    break_it: Any, named: str, jupyter: Jupyter, tmp_path: Path
) -> None:
    path = create_venv(creators()[0], tmp_path / "env").parents[1]
    python = path / "bin" / "python"
    target = python.resolve()
    python.unlink()
    shutil.copy(target, python)
    assert stat.S_IXUSR & python.stat().st_mode
    break_it(path)
    said = jupyter.envkernel("virtualenv", "--name=x", "--user", path, status=1)
    assert named in said.stderr
    assert str(path) in said.stderr
    assert not jupyter.kernels.exists()


def test_an_environment_without_ipykernel_is_refused(jupyter: Jupyter, activate_scripts: Scripts) -> None:
    path = activate_scripts[VENV].parents[1]
    said = jupyter.envkernel("virtualenv", "--name=x", "--user", path, status=1)
    assert "ipykernel" in said.stderr
    assert "pip install" in said.stderr
    assert not jupyter.kernels.exists()


def test_create_makes_an_environment_with_ipykernel(jupyter: Jupyter, tmp_path: Path) -> None:
    path = tmp_path / "new env"
    spec = jupyter.setup("virtualenv", "made", "--create", path)
    assert (path / "bin" / "python").exists()
    with jupyter.kernel("made") as kernel:
        assert kernel.value("__import__('sys').prefix") == str(path)
    assert spec["metadata"]["envkernel"]["mode"] == "virtualenv"
