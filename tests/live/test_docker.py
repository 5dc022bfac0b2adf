"""Kernels in containers of a real Docker daemon."""

from __future__ import annotations

from typing import Iterator

import pytest

from support.engine_cases import EngineCases
from support.docker import Docker


pytestmark = pytest.mark.live


class TestDocker(EngineCases):
    @pytest.fixture
    def engine(self, docker: Docker) -> Docker:
        return docker
