"""Kernels in containers of a real Podman."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import ROOT, done
from support.containers import USER, Engine, PlainUser
from support.engine_cases import AS_USER, EngineCases
from support.jupyter import Jupyter
from support.podman import podman_environ

pytestmark = pytest.mark.live


README = ROOT / "README.md"


class TestPodman(EngineCases):
    image = "localhost/python"
    chosen = (0, f"1234 is {USER}")

    @pytest.fixture
    def engine(self, podman: Engine) -> Engine:
        return podman

    def test_the_options_of_the_rocm_example(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        """As README has them, without the GPU."""
        (line,) = [line for line in README.read_text().splitlines() if "--group-add keep-groups" in line]
        (tmp_path / "Dockerfile").write_text(f"FROM {self.image}\n")
        self.setup(place, engine, "rocm", "--build", tmp_path, *line.split())
        with place.kernel("rocm") as kernel:
            assert kernel.value("6 * 7") == "42"

    def as_user(self, user: PlainUser, engine: Engine) -> Any:
        """Podman is rootless here: the user has one of their own, with an own image store."""
        directory = user.home / "podman"
        directory.mkdir()
        runtime = user.home / "run"
        runtime.mkdir(mode=0o700)
        user.environ = {**user.environ, **podman_environ(directory), "XDG_RUNTIME_DIR": str(runtime)}
        tar = directory / "image.tar"
        engine.call("save", "-o", str(tar), self.image)
        done("chown", "-R", f"{USER}:{USER}", user.home)
        loaded = user.run(LOAD, str(tar))
        assert "rootless: true" in loaded
        seen = user.run(AS_USER, "podman", self.image)
        user.run(RESET)
        return seen


LOAD = """
import json, subprocess, sys
subprocess.run(["podman", "load", "-q", "-i", sys.argv[1]], check=True, stdout=2)
print(json.dumps(subprocess.run(["podman", "info"], check=True, capture_output=True, text=True).stdout))
"""
RESET = """
import json, subprocess
subprocess.run(["podman", "system", "reset", "-f"], check=True, stdout=2)
print(json.dumps(""))
"""
