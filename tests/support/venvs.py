"""Virtual environments, by everyone who makes them: venv of every Python found, virtualenv, uv."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import cache_dir, done, missing

UV = shutil.which("uv") or os.path.join(os.path.dirname(sys.executable), "uv")
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)

ENVIRON = {
    name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
}
"""For the makers: the caches lie in our own directory, whatever HOME a test has."""
ENVIRON.update(
    UV_CACHE_DIR=str(cache_dir() / "uv"), VIRTUALENV_OVERRIDE_APP_DATA=str(cache_dir() / "virtualenv")
)

# One release of each kind of bin/activate that virtualenv and uv ever wrote.
RELEASES = ("virtualenv==20.23.1", "virtualenv==20.26.0", "virtualenv==20.34.0", "virtualenv==20.36.1")
RELEASES += ("virtualenv==21.0.0", "virtualenv", "uv==0.5.31", "uv")


@functools.lru_cache(maxsize=None)
def found_pythons() -> dict[str, str]:
    """Return every CPython >= 3.6 of this machine that can make environments, by its version."""
    home = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    beside = Path(BASE_PYTHON).resolve().parents[2]  # pyenv keeps its versions side by side
    paths = [BASE_PYTHON, *map(str, [*home.glob("versions/3.*/bin/python"), *beside.glob("3.*/bin/python")])]
    paths += [f"/usr/bin/python3.{minor}" for minor in range(6, 20)]
    pythons = {}
    for path in paths:
        question = "import ensurepip, platform, venv; print(platform.python_version())"
        said = (
            subprocess.run([path, "-c", question], capture_output=True, text=True, check=False)
            if (os.access(path, os.X_OK))
            else None
        )
        if said and said.returncode == 0:
            pythons.setdefault(said.stdout.strip(), path)
    return dict(sorted(pythons.items(), key=lambda item: [int(part) for part in item[0].split(".")[:2]]))


def creators() -> list[str]:
    """Return the names of everyone who can make an environment here, for `create_venv`."""
    return [f"venv-{version}" for version in found_pythons()] + list(RELEASES)


def create_venv(creator: str, path: Path, prompt: str = "") -> Path:
    """Let `creator` make an environment without packages at `path`; return its bin/activate."""
    words = ["--prompt", prompt] if prompt else []
    if creator.startswith("venv-"):
        done(found_pythons()[creator[5:]], "-m", "venv", "--without-pip", *words, path, env=ENVIRON)
    else:
        tool = creator.partition("==")[0]
        start = [tool, "--no-pip", "--no-setuptools"] if tool == "virtualenv" else [tool, "venv", "-q"]
        start += ["--no-wheel"] if creator == "virtualenv==20.23.1" else []
        runner = [UV, "tool", "run", "--no-config", "--python", BASE_PYTHON, "--from", creator]
        said = subprocess.run(
            [*runner, *start, *words, path], env=ENVIRON, capture_output=True, text=True, check=False
        )
        if said.returncode and "No solution found" in said.stderr:
            missing(f"{creator} on PyPI")
        assert said.returncode == 0, said.stderr
    return path / "bin" / "activate"


def install(prefix: Path, *packages: str) -> None:
    """Install packages into the environment at `prefix`, quickly."""
    done(UV, "pip", "install", "-q", "--python", prefix / "bin" / "python", *packages, env=ENVIRON)


@pytest.fixture(scope="session")
def kernel_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with ipykernel.  Tests leave it as it is."""
    return make_kernel_venv(tmp_path_factory.mktemp("kernel") / "venv")


def make_kernel_venv(path: Path) -> Path:
    """Make an environment with ipykernel; return its path."""
    done(UV, "venv", "-q", "--python", BASE_PYTHON, path, env=ENVIRON)
    install(path, "ipykernel")
    return path


@pytest.fixture(scope="session")
def activate_scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bin/activate of one fresh environment per creator."""
    directory = tmp_path_factory.mktemp("venvs")
    return {creator: create_venv(creator, directory / creator.replace("=", "-")) for creator in creators()}
