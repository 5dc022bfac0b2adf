"""Conda prefixes built by hand, and what ``conda activate`` makes of an environment.

Conda itself is on no registry that tests can reach.  `activate` follows the rules that were read off
conda 26.7: it writes the program that conda would print, quoted properly, and a real bash runs it.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any, Mapping

import pytest

from support import bash_environ, done
from support.venvs import BASE_PYTHON, ENVIRON, UV, install

SCRIPTS = ("activate", "deactivate")


def make_conda(
    prefix: Path,
    *,
    state: Mapping[str, Any] | None = None,
    env_vars: Mapping[str, Mapping[str, Any]] | None = None,
    activate: Mapping[str, str] | None = None,
    deactivate: Mapping[str, str] | None = None,
    history: str = "",
) -> Path:
    """Make what conda calls an environment at `prefix`.

    state: variables in conda-meta/state.  env_vars: by file in etc/conda/env_vars.d.
    activate, deactivate: scripts by name.  history: a line of conda-meta/history.
    """
    (prefix / "conda-meta").mkdir(parents=True)
    (prefix / "bin").mkdir(exist_ok=True)
    (prefix / "conda-meta" / "history").write_text(history)
    if state is not None:
        (prefix / "conda-meta" / "state").write_text(json.dumps({"version": 1, "env_vars": state}))
    for name, variables in (env_vars or {}).items():
        path = prefix / "etc" / "conda" / "env_vars.d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(variables))
    for kind, scripts in zip(SCRIPTS, (activate, deactivate)):
        for name, text in (scripts or {}).items():
            path = prefix / "etc" / "conda" / f"{kind}.d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(text))
    return prefix


def make_root(prefix: Path) -> Path:
    """Make a root prefix: an environment that holds conda."""
    make_conda(prefix)
    (prefix / "condabin").mkdir()
    for name in ("conda", "python"):
        (prefix / "bin" / name).write_text("#!/bin/sh\n")
        (prefix / "bin" / name).chmod(0o755)
    return prefix


def scripts_of(prefix: str | Path, kind: str) -> list[str]:
    """Return the scripts that conda sources, in order."""
    directory = Path(prefix) / "etc" / "conda" / f"{kind}.d"
    found = sorted(str(path) for path in directory.glob("*.sh")) if directory.is_dir() else []
    found += (
        [str(path) for path in directory.glob(".*.sh") if str(path) not in found]
        if directory.is_dir()
        else []
    )
    return sorted(found, reverse=kind == "deactivate")


def variables_of(prefix: Path) -> dict[str, str]:
    """Return the variables that an environment's files set; conda upper-cases the names when it exports."""
    found: dict[str, Any] = {}
    directory = prefix / "etc" / "conda" / "env_vars.d"
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        found.update(json.loads(path.read_text()))
    state = prefix / "conda-meta" / "state"
    if state.exists():
        found.update(json.loads(state.read_text()).get("env_vars", {}))
    texts = {name: "" if value is None else str(value) for name, value in found.items()}
    return {name: text for name, text in texts.items() if text != "***unset***" and name.upper() != "PATH"}


def activate(environ: Mapping[str, str], prefix: Path, root: Path | None = None) -> dict[str, str]:
    """Return the environment after ``conda activate PREFIX`` in a bash that starts with `environ`."""
    level = int(environ.get("CONDA_SHLVL") or 0)
    old = environ.get("CONDA_PREFIX", "") if level else ""
    path = [os.path.normpath(entry) for entry in environ.get("PATH", "/usr/bin").split(":")]
    if not old:
        # conda looks for condabin before it adds anything
        condabin = [f"{root}/condabin"] if root and not any(e.endswith("condabin") for e in path) else []
        path = [f"{prefix}/bin", *condabin, *path]
    elif f"{old}/bin" in path:
        path[path.index(f"{old}/bin")] = f"{prefix}/bin"
    else:
        path.insert(0, f"{prefix}/bin")
    name = "base" if prefix == root else prefix.name if prefix.parent.name == "envs" else str(prefix)
    if old == str(prefix):
        name = environ.get("CONDA_DEFAULT_ENV", name)
        exports = {"CONDA_SHLVL": str(level), "CONDA_PROMPT_MODIFIER": f"({name}) "}
    else:
        exports = {"CONDA_PREFIX": str(prefix), "CONDA_SHLVL": str(level + 1), "CONDA_DEFAULT_ENV": name}
        exports["CONDA_PROMPT_MODIFIER"] = f"({name}) "
        if old:
            exports[f"CONDA_PREFIX_{level}"] = old
        state = variables_of(prefix)
        exports.update({key.upper(): value for key, value in state.items()})
        kept = {f"__CONDA_SHLVL_{level}_{key}".upper(): environ[key] for key in state if key in environ}
        exports.update(kept)
    if root and old != str(prefix):
        conda = f"{root}/bin/conda"
        exports.update(CONDA_EXE=conda, _CONDA_EXE=conda, CONDA_PYTHON_EXE=f"{root}/bin/python")
        exports.update(_CONDA_ROOT=str(root), _CE_M="", _CE_CONDA="")
    lines = [f". {shlex.quote(script)}" for script in scripts_of(old, "deactivate")] if old else []
    lines += [f"export {key}={shlex.quote(value)}" for key, value in exports.items()]
    lines += [f"export PATH={shlex.quote(':'.join(path))}"]
    lines += [f". {shlex.quote(script)}" for script in scripts_of(prefix, "activate")]
    return bash_environ("\n".join(lines), dict(environ))


@pytest.fixture(scope="session")
def conda_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conda environment with ipykernel, below a root prefix.  Tests leave it as it is."""
    root = make_root(tmp_path_factory.mktemp("conda") / "root")
    prefix = root / "envs" / "science"
    done(UV, "venv", "-q", "--python", BASE_PYTHON, prefix, env=ENVIRON)
    install(prefix, "ipykernel")
    return make_conda(
        prefix,
        state={"SCIENCE": "from state"},
        activate={"one.sh": "export ACTIVATED=$CONDA_DEFAULT_ENV\n"},
        deactivate={"one.sh": "unset ACTIVATED\n"},
    )
