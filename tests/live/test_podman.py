"""Kernels in containers of a real Podman."""

from __future__ import annotations

import pytest

from support.engine_cases import EngineCases
from support.containers import Engine


pytestmark = pytest.mark.live


class TestPodman(EngineCases):
    image = "localhost/python"

    @pytest.fixture
    def engine(self, podman: Engine) -> Engine:
        return podman
