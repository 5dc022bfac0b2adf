"""Chains of environment modes: what the same commands, one after the other, make of one bash."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from support import bash_environ, difference
from support.conda import activate, make_conda, make_root
from support.jupyter import PRINT_ENVIRON, Jupyter
from support.modules import Modules
from support.venvs import create_venv

pytestmark = pytest.mark.live


class Places:
    """What the chains are made of: a module system, a conda environment and a virtualenv."""

    def __init__(self, modules: Modules, root: Path, venv: Path) -> None:
        self.modules = modules
        self.root = root
        self.prefix = root / "envs" / "one"
        self.venv = venv

    def words(self, mode: str) -> list[str]:
        """Return what a user types for one link of a chain."""
        words = {"conda": [str(self.prefix)], "virtualenv": [str(self.venv)], "lmod": ["gcc/12", "paths/1"]}
        return [mode, *words[mode]]

    def apply(self, mode: str, environ: dict[str, str]) -> dict[str, str]:
        """Return the environment after that link, by the real thing."""
        if mode == "conda":
            return activate(environ, self.prefix, self.root)
        if mode == "lmod":
            return self.modules.bash(environ, ["load", "gcc/12", "paths/1"])
        return bash_environ(f". {shlex.quote(str(self.venv / 'bin' / 'activate'))}", environ)


@pytest.fixture
def places(lmod: Modules, tmp_path: Path) -> Places:
    """Everything that a chain can be made of here."""
    root = make_root(tmp_path / "conda root")
    scripts = {"s.sh": "export SEEN=$CC:$VIRTUAL_ENV\n"}
    make_conda(root / "envs" / "one", state={"CC": "from conda"}, activate=scripts)
    return Places(lmod, root, create_venv("uv", tmp_path / "ven v").parents[1])


def chain_words(places: Places, modes: list[str]) -> list[str]:
    """Return a chain as it is typed, without ``envkernel`` and the first mode."""
    words: list[str] = []
    for mode in modes:
        words += ["--", *places.words(mode)]
    return words[2:]


@pytest.mark.parametrize(
    "modes",
    [
        ["lmod", "conda"],
        ["lmod", "virtualenv"],
        ["conda", "virtualenv"],
        ["virtualenv", "conda"],
        ["conda", "lmod"],
        ["virtualenv", "lmod"],
        ["lmod", "conda", "virtualenv"],
        ["virtualenv", "virtualenv"],
        ["lmod", "lmod"],
    ],
    ids="+".join,
)
def test_each_link_sees_what_the_one_before_made(modes: list[str], jupyter: Jupyter, places: Places) -> None:
    environ = {**jupyter.environ, **places.modules.environ}
    spec = jupyter.dry_run(modes[0], *chain_words(places, modes), *PRINT_ENVIRON, environ=environ)
    assert spec["metadata"]["envkernel"]["mode"] == "+".join(modes)
    theirs = environ
    for mode in modes:
        theirs = places.apply(mode, theirs)
    assert difference(jupyter.run_environ(spec, environ), theirs) == {}


def test_variables_given_with_env_win(jupyter: Jupyter, places: Places) -> None:
    given = {
        "CC": "mine",
        "NEW": "a b'\"$(id)\n{connection_file}",
        "BYTES": "caf\udce9",
        "EMPTY": "",
        "PATH": "/x",
    }
    words = [f"--env={name}={value}" for name, value in given.items()]
    environ = {**jupyter.environ, **places.modules.environ}
    typed = [*words, *chain_words(places, ["lmod", "virtualenv"]), *PRINT_ENVIRON]
    ours = jupyter.run_environ(jupyter.dry_run("lmod", *typed, environ=environ), environ)
    assert {name: ours[name] for name in given} == given


def test_the_kernel_is_that_of_the_last_environment(
    jupyter: Jupyter, lmod: Modules, conda_kernel: Path, kernel_venv: Path
) -> None:
    typed = ["py/1", "--", "conda", conda_kernel, "--"]
    typed += ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    jupyter.setup("lmod", "last", *typed, environ=lmod.environ)
    with jupyter.kernel("last", environ=lmod.environ) as kernel:
        assert kernel.value("__import__('sys').prefix") == str(conda_kernel)
        environ = kernel.environ()
        assert environ["PY_MODULE"] == "1"
        assert environ["ACTIVATED"] == "science"
        assert environ["PATH"].split(":")[:2] == [
            f"{conda_kernel}/bin",
            f"{conda_kernel.parents[1]}/condabin",
        ]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_link_that_is_missing_is_named(
    broken: int, jupyter: Jupyter, places: Places, tmp_path: Path
) -> None:
    links = [places.words("virtualenv"), places.words("conda")]
    links[broken][1] = str(tmp_path / "nowhere")
    typed = [*links[0][1:], "--", *links[1], *PRINT_ENVIRON]
    said = jupyter.envkernel("virtualenv", "--name=x", "--user", *typed, status=1)
    assert str(tmp_path / "nowhere") in said.stderr
    assert not jupyter.kernels.exists()
