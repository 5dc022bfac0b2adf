"""Conda environments: variable by variable what ``conda activate`` makes, scripts sourced by a real bash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import difference
from support.conda import activate, make_conda, make_root
from support.jupyter import PRINT_ENVIRON, Jupyter

pytestmark = pytest.mark.live

STATE: dict[str, Any] = {
    "Mixed_Case": "1",
    "PATH": "/evil",
    "NUMBER": 3,
    "NOTHING": None,
    "UNSET": "***unset***",
    "LIST": [1, "a"],
    "QUOTED": 'it\'s "q" $(id) `id` ; \\ \n%s',
    "UNICODE": "café 日",
}
ACTIVATE = {
    "b.sh": "export B=$CONDA_PREFIX:$NUMBER:$A\n",
    "a.sh": "export A=1 PATH=/added:$PATH\nfalse\nreturn 3\n",
    ".hidden.sh": "export HIDDEN=$CONDA_SHLVL\n",
    "noise.sh": "echo noise; echo noise >&2; cat\n",
    "options.sh": "set -eu\n",
    "spaces and 'quotes' $(touch pwned).sh": "export SPACES=1 BYTES=$'\\xff\\n'\n",
    "not.txt": "export NOT=1\n",
    "other.csh": "setenv X 1\n",
    "function.sh": "greet() { :; }; export -f greet; alias ll=ls; NOT_EXPORTED=1\n",
    "unset.sh": "unset GONE\n",
}
DEACTIVATE = {
    "b.sh": "export LEFT=$LEFT:b:$CONDA_PREFIX:$CONDA_SHLVL; unset B\n",
    "a.sh": "export LEFT=$LEFT:a; unset A HIDDEN SPACES\n",
    "fails.sh": "nosuchprogram; return 1\n",
}
STARTS: dict[str, dict[str, str]] = {
    "clean": {},
    "what is set stays in reach": {"NUMBER": "mine", "QUOTED": "old\n'", "UNSET": "u", "GONE": "1"},
    "level zero": {"CONDA_SHLVL": "0", "CONDA_PREFIX": "/nowhere"},
    "no level": {"CONDA_PREFIX": "/nowhere", "CONDA_DEFAULT_ENV": "nowhere"},
    "something gone is active": {"CONDA_SHLVL": "2", "CONDA_PREFIX": "/nowhere", "CONDA_DEFAULT_ENV": "x"},
    "condabin is there": {"PATH": "/elsewhere/condabin:/usr/bin:/bin"},
    "odd PATH": {"PATH": "/usr//bin/::/bin/../x:./y:/a b:"},
    "prompt": {"PS1": "$ ", "CONDA_PROMPT_MODIFIER": "(old) "},
    "odd values": {"V1": "a\nb", "V2": "caf\udce9 \udcff", "V3": "", "V4": "'\"$(id)`id`\\", "E.F": "2"},
    "shell functions": {"BASH_FUNC_conda%%": "() {  echo hi\n}"},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root prefix with two environments: ``rich`` has everything, ``plain`` nothing."""
    root = make_root(tmp_path / "mini conda")
    make_conda(
        root / "envs" / "rich",
        state=STATE,
        env_vars={
            "b.json": {"from_b": "b", "NUMBER": 2},
            "a.json": {"from_b": "a", "FROM_A": ""},
            ".hidden": {"H": "h"},
        },
        activate=ACTIVATE,
        deactivate=DEACTIVATE,
    )
    make_conda(root / "envs" / "plain")
    return root


@pytest.mark.parametrize("name", ["rich", "plain"])
def test_the_environment_is_the_same(name: str, jupyter: Jupyter, root: Path) -> None:
    prefix = root / "envs" / name
    spec = jupyter.dry_run("conda", prefix, *PRINT_ENVIRON)
    for label, start in STARTS.items():
        theirs = activate({**jupyter.environ, **start}, prefix, root)
        assert difference(jupyter.run_environ(spec, start), theirs) == {}, label


def test_the_reference_itself_sees_the_scripts(jupyter: Jupyter, root: Path) -> None:
    found = activate(jupyter.environ, root / "envs" / "rich", root)
    assert found["B"] == f"{root}/envs/rich:3:1"
    assert found["PATH"].startswith("/added:")
    assert found["HIDDEN"] == "1"
    assert found["SPACES"] == "1"
    assert "NOT" not in found


@pytest.mark.parametrize("first", ["rich", "plain", "base"])
@pytest.mark.parametrize("second", ["rich", "plain", "base"])
def test_switching_from_an_active_environment(first: str, second: str, jupyter: Jupyter, root: Path) -> None:
    prefixes = {"base": root, "rich": root / "envs" / "rich", "plain": root / "envs" / "plain"}
    active = activate(jupyter.environ, prefixes[first], root)
    spec = jupyter.dry_run("conda", prefixes[second], *PRINT_ENVIRON)
    ours = jupyter.run_environ(spec, active, replace=True)
    assert difference(ours, activate(active, prefixes[second], root)) == {}
    # ... also where the active environment's directory is no longer on PATH, and from the third level
    moved = {**active, "PATH": "/usr/bin:/bin"}
    ours = jupyter.run_environ(spec, moved, replace=True)
    assert difference(ours, activate(moved, prefixes[second], root)) == {}
    third = activate(activate(active, prefixes["plain"], root), prefixes["rich"], root)
    ours = jupyter.run_environ(spec, third, replace=True)
    assert difference(ours, activate(third, prefixes[second], root)) == {}


@pytest.mark.parametrize(
    "directory",
    [" a  b ", 'it\'s $(id) `id` "q" ; id & #%s {connection_file}', "back\\slash\\n", "new\nline", "café 日"]
    + ["caf\udce9 \udcff", "envs", "envs/x y", "$(touch pwned)"],
)
def test_any_directory_name(directory: str, jupyter: Jupyter, tmp_path: Path) -> None:
    scripts = {"one.sh": 'export ONE="$CONDA_PREFIX"\n'}
    prefix = make_conda(tmp_path / directory, state={"STATE": "1"}, activate=scripts)
    plain = make_conda(tmp_path / "plain" / directory)
    for path in (prefix, plain):
        spec = jupyter.dry_run("conda", path, *PRINT_ENVIRON, cwd=tmp_path)
        for start in ({}, STARTS["something gone is active"]):
            theirs = activate({**jupyter.environ, **start}, path)
            assert difference(jupyter.run_environ(spec, start), theirs) == {}
    assert not list(tmp_path.rglob("pwned"))


def test_names_are_resolved_at_setup(jupyter: Jupyter, root: Path, tmp_path: Path) -> None:
    elsewhere = make_conda(tmp_path / "elsewhere" / "named")
    home = make_conda(Path(jupyter.environ["HOME"]) / ".conda" / "envs" / "mine")
    known = Path(jupyter.environ["HOME"]) / ".conda" / "environments.txt"
    listed = make_conda(tmp_path / "listed")
    known.write_text(f"{listed}\n/gone/away\n")
    environ = {"CONDA_EXE": f"{root}/bin/conda", "CONDA_ENVS_PATH": str(tmp_path / "elsewhere")}
    names = {"rich": root / "envs/rich", "base": root, "root": root, "named": elsewhere, "mine": home}
    names["listed"] = listed
    for name, prefix in names.items():
        spec = jupyter.dry_run("conda", name, *PRINT_ENVIRON, environ=environ)
        assert str(prefix) in spec["argv"]
        assert jupyter.run_environ(spec)["CONDA_PREFIX"] == str(prefix)


def test_paths_are_made_absolute_but_links_are_kept(jupyter: Jupyter, root: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root / "envs" / "plain")
    spec = jupyter.dry_run("conda", "./link/../link/", *PRINT_ENVIRON, cwd=tmp_path)
    assert str(link) in spec["argv"]
    home = Path(jupyter.environ["HOME"]) / "env"
    home.symlink_to(link)
    assert str(home) in jupyter.dry_run("conda", "~/env", *PRINT_ENVIRON)["argv"]
    assert str(home) in jupyter.dry_run("conda", "$HOME/env", *PRINT_ENVIRON)["argv"]


def test_a_script_that_ends_the_shell_is_an_error(jupyter: Jupyter, tmp_path: Path) -> None:
    prefix = make_conda(tmp_path / "ends", activate={"end.sh": "echo going; exit 0\n"})
    said = jupyter.envkernel("conda", "--name=x", "--user", prefix, *PRINT_ENVIRON, status=1)
    assert "end.sh" in said.stderr
    assert not jupyter.kernels.exists()


def test_a_broken_state_file_is_named(jupyter: Jupyter, tmp_path: Path) -> None:
    for text in ("{", "[1]", '{"env_vars": [1]}', "\udcff"):
        prefix = make_conda(tmp_path / "broken")
        (prefix / "conda-meta" / "state").write_bytes(os.fsencode(text))
        said = jupyter.envkernel("conda", "--name=x", "--user", prefix, *PRINT_ENVIRON, status=1)
        assert f"{prefix}/conda-meta/state" in said.stderr
        assert not jupyter.kernels.exists()
        shutil.rmtree(prefix)


def test_what_is_missing_is_said_at_setup(jupyter: Jupyter, root: Path, tmp_path: Path) -> None:
    (tmp_path / "no conda").mkdir()
    for target, named in (
        (tmp_path / "gone", "no conda environment"),
        (tmp_path / "no conda", "no conda environment"),
        (root / "envs" / "plain", "python"),
        ("nonesuch", "nonesuch"),
    ):
        said = jupyter.envkernel("conda", "--name=x", "--user", target, status=1)
        assert named in said.stderr, target
        assert str(target) in said.stderr
        assert not jupyter.kernels.exists()


def test_the_hosts_python_is_never_taken_instead(
    jupyter: Jupyter, conda_kernel: Path, tmp_path: Path
) -> None:
    """The environment loses its Python after setup: Jupyter's kernel must not run another one."""
    copy = tmp_path / "copy"
    shutil.copytree(conda_kernel, copy, symlinks=True)
    jupyter.setup("conda", "copy", copy)
    (copy / "bin" / "python").unlink()
    with jupyter.kernel("copy") as kernel:
        said, error = kernel.execute("import sys; print(sys.executable)")
        assert error
        assert "python" in said + error
        assert str(copy) in said + error
