"""Kernels in containers of a real Podman."""

from __future__ import annotations

from typing import Any

import pytest

from support import done
from support.containers import USER, Engine, PlainUser
from support.engine_cases import AS_USER, EngineCases
from support.podman import podman_environ

pytestmark = pytest.mark.live


class TestPodman(EngineCases):
    image = "localhost/python"
    chosen = (0, f"1234 is {USER}")

    @pytest.fixture
    def engine(self, podman: Engine) -> Engine:
        return podman

    def as_user(self, user: PlainUser, engine: Engine) -> Any:
        """Podman is rootless here: the user has one of their own, with an own image store."""
        folder = user.home / "podman"
        folder.mkdir()
        runtime = user.home / "run"
        runtime.mkdir(mode=0o700)
        user.environ = {**user.environ, **podman_environ(folder), "XDG_RUNTIME_DIR": str(runtime)}
        tar = folder / "image.tar"
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
