"""Kernels in containers of a real Docker daemon."""

from __future__ import annotations

import pytest

from support.docker import Docker
from support.engine_cases import EngineCases

pytestmark = pytest.mark.live


class TestDocker(EngineCases):
    @pytest.fixture
    def engine(self, docker: Docker) -> Docker:
        return docker
