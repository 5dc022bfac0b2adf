"""Kernels in containers of a real Podman."""

from __future__ import annotations

import pytest

from support.containers import Engine
from support.engine_cases import EngineCases

pytestmark = pytest.mark.live


class TestPodman(EngineCases):
    image = "localhost/python"

    @pytest.fixture
    def engine(self, podman: Engine) -> Engine:
        return podman
