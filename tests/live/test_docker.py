"""Kernels in containers of a real Docker daemon."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from support import done, missing
from support.containers import USER, PlainUser, short_directory
from support.docker import Daemon, Docker
from support.engine_cases import EngineCases, listeners, until
from support.jupyter import Jupyter

pytestmark = pytest.mark.live


class TestDocker(EngineCases):
    @pytest.fixture
    def engine(self, docker: Docker) -> Docker:
        return docker

    def test_a_daemon_that_goes_and_comes_back(self, jupyter: Jupyter, python_rootfs: Path) -> None:
        if os.getuid():
            missing("root")
        with short_directory("docker") as directory, Daemon(directory, "ekdown").running() as daemon:
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

    def test_rootless(self, python_rootfs: Path) -> None:
        """A plain user's own daemon: the kernel is root inside, which is the user outside."""
        for program in ("rootlesskit", "slirp4netns", "newuidmap"):
            if not shutil.which(program):
                missing(program)
        with short_directory("rootless") as directory:
            user = PlainUser(directory, {})
            (user.home / "run").mkdir(mode=0o700)
            os.chown(user.home / "run", USER, USER)
            contrib = "/usr/share/docker.io/contrib:/usr/sbin:/sbin"  # where Debian has dockerd-rootless.sh
            user.environ["PATH"] += f":{contrib}"
            user.environ["XDG_RUNTIME_DIR"] = str(user.home / "run")
            seen = user.run(ROOTLESS, str(python_rootfs))
            done("rm", "-rf", user.home)  # layers of the daemon's belong to further numbers of the user's
        assert seen == {"inside": 0, "owner": USER, "interrupted": "KeyboardInterrupt", "left": []}

    @pytest.mark.parametrize("options", [["--network=bridge"], ["--network=bridge", "--transport=tcp"]])
    def test_a_network_of_its_own(self, place: Jupyter, engine: Docker, options: list[str]) -> None:
        self.setup(place, engine, "bridge", *options, self.image)
        with place.kernel("bridge") as kernel:
            reported = json.loads(Path(kernel.manager.connection_file).read_text())
            ports = {reported[name] for name in reported if name.endswith("_port")}
            tables = [container["NetworkSettings"]["Ports"] for container in engine.containers()]
            found = [one for table in tables for ends in table.values() for one in ends or ()]
            published = {int(one["HostPort"]) for one in found}
            assert bool(published) == (len(options) == 2)
            # published ports have an address of their own; other workers' clusters listen on others
            mine = {ip for ip, port in listeners() if port in ports | published}
            assert "127.0.0.1" in mine
            assert all(ip.startswith("127.") for ip in mine)
            assert {one["HostIp"] for one in found} <= mine - {"127.0.0.1"}
            assert "eth0" in kernel.value("__import__('socket').if_nameindex()")

    def test_r(self, place: Jupyter, engine: Docker, r_rootfs: Path) -> None:
        engine.add_image(r_rootfs, "r")
        spec = place.setup("docker", "r", "--kernel=ir", "--network=none", "r")
        assert spec["language"] == "R"
        with place.kernel("r") as kernel:
            assert kernel.execute("cat(6 * 7)") == ("42", None)
            kernel.interrupt_r()
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


ROOTLESS = """
import json, os, subprocess, sys
from pathlib import Path
from support.containers import Engine
from support.engine_cases import until
from support.jupyter import Jupyter
home, run = os.environ["HOME"], os.environ["XDG_RUNTIME_DIR"]
options = [f"--data-root={home}/data", f"--exec-root={run}/exec", f"--pidfile={run}/pid"]
options += ["--iptables=false", "--ip6tables=false"]
log = open(home + "/log", "wb")
daemon = subprocess.Popen(["dockerd-rootless.sh", *options], stdout=log, stderr=log)
try:
    engine = Engine("docker", "docker", {"DOCKER_HOST": f"unix://{run}/docker.sock"})
    place = Jupyter(Path(home) / "j")
    place.environ.update(engine.environ, XDG_RUNTIME_DIR=run)
    os.environ.update(place.environ)
    answers = lambda: not subprocess.run(["docker", "version"], capture_output=True).returncode
    until(lambda: daemon.poll() is not None or answers(), 60)
    assert answers(), open(home + "/log").read()
    links = Path(home) / "links"
    links.mkdir()
    for name in ("bin", "lib", "lib64", "sbin"):
        (links / name).symlink_to(f"usr/{name}")
    engine.add_image(links, "links")
    words = ["--python=python3", "--pwd", f"--bind={sys.argv[1]}/usr:/usr:ro", "links"]
    place.setup("docker", "own", *words)
    with place.kernel("own", cwd=home) as kernel:
        kernel.value("open('made', 'w').write('x')")
        seen = {"inside": int(kernel.value("__import__('os').getuid()"))}
        seen["owner"] = os.stat(home + "/made").st_uid
        seen["interrupted"] = kernel.interrupt_in("import time; time.sleep(60)")[0]
    seen["left"] = engine.ids()
finally:
    daemon.terminate()
    daemon.wait(30)
print(json.dumps(seen))
"""
