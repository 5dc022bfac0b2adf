"""A registry of container images on loopback, for one run of the tests."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from typing import Iterator

import pytest

from support import missing
from support.containers import short_directory


def listens(port: int) -> bool:
    """Return whether somebody listens on a port of loopback."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def registry() -> Iterator[str]:
    """Debian's docker-registry; the address under which engines find it."""
    program = shutil.which("docker-registry") or missing("docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with short_directory("registry") as directory:
        storage = {"filesystem": {"rootdirectory": str(directory / "data")}}
        reported = {"version": 0.1, "storage": storage, "http": {"addr": f"127.0.0.1:{port}"}}
        (directory / "config.yml").write_text(json.dumps(reported))
        with open(directory / "log", "wb") as log:
            process = subprocess.Popen([program, "serve", directory / "config.yml"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 20
            while not listens(port):
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)
