"""Kernels in containers of a real Docker daemon."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from support import done
from support.containers import short_folder
from support.docker import Daemon, Docker
from support.engine_cases import EngineCases, listeners, until
from support.jupyter import Jupyter

pytestmark = pytest.mark.live


class TestDocker(EngineCases):
    @pytest.fixture
    def engine(self, docker: Docker) -> Docker:
        return docker

    def test_a_daemon_that_goes_and_comes_back(self, jupyter: Jupyter, python_rootfs: Path) -> None:
        with short_folder("docker") as folder, Daemon(folder, "ekdown").running() as daemon:
            engine = Docker(daemon)
            engine.add_image(python_rootfs, "python")
            jupyter.environ.update(engine.environ)
            self.setup(jupyter, engine, "restarted", "python")
            with self.watched(jupyter, "restarted", alone=False) as (kernel, log):
                daemon.stop()
                assert until(lambda: not kernel.manager.is_alive())
            assert "The container engine went away" in log.read_text()
            said = jupyter.envkernel("docker", "--name=down", "--user", "python", status=1)
            assert "The Docker daemon does not answer." in said.stderr
            assert not (jupyter.kernels / "down").exists()
            with jupyter.kernel("restarted", alone=False) as broken:
                _, error = broken.execute("1")
                assert error is not None
                assert "The Docker daemon does not answer." in error
            assert until(lambda: not list(Path(jupyter.environ["TMPDIR"]).iterdir()))
            daemon.start()
            assert jupyter.leftovers(patience=20) == ""  # who cleans up has waited for the daemon
            assert engine.ids() == []

    @pytest.mark.parametrize("options", [["--network=bridge"], ["--network=bridge", "--transport=tcp"]])
    def test_a_network_of_its_own(self, place: Jupyter, engine: Docker, options: list[str]) -> None:
        self.setup(place, engine, "bridge", *options, self.image)
        before = listeners()
        with place.kernel("bridge") as kernel:
            assert {ip for ip, _ in listeners() - before} == {"127.0.0.1"}
            published = any(container["NetworkSettings"]["Ports"] for container in engine.containers())
            assert published == (len(options) == 2)
            assert "eth0" in kernel.value("__import__('socket').if_nameindex()")

    def test_r(self, place: Jupyter, engine: Docker, r_rootfs: Path) -> None:
        engine.add_image(r_rootfs, "r")
        spec = place.setup("docker", "r", "--kernel=ir", "--network=none", "r")
        assert spec["language"] == "R"
        with place.kernel("r") as kernel:
            assert kernel.execute("cat(6 * 7)") == ("42", None)
            request = kernel.client.execute("Sys.sleep(60)")
            time.sleep(1)
            kernel.manager.interrupt_kernel()
            reply = kernel.client.get_shell_msg(timeout=10)
            assert reply["parent_header"]["msg_id"] == request
        engine.call("rmi", "r")

    def test_a_full_disk_for_the_copy(self, place: Jupyter, engine: Docker, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        (data / "file").write_bytes(bytes(3 << 20))
        small = tmp_path / "small"
        small.mkdir()
        done("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)
        try:
            self.setup(place, engine, "full", "--copy-workdir", self.image)
            with place.kernel("full", environ={"TMPDIR": str(small)}, cwd=str(data)) as kernel:
                _, error = kernel.execute("1")
                assert error is not None
                assert "No space left on device" in error
            assert until(lambda: os.listdir(small) == [])
        finally:
            done("umount", small)
