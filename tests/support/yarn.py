"""A real YARN for the tests: a ResourceManager and a NodeManager of Hadoop 3.4 on 127.0.0.1.

The jars come from Maven Central once (``yarn-pom.xml`` names them) into
the tests' cache; ``fs.defaultFS`` is ``file:///`` and containers are run
by the DefaultContainerExecutor.  A small ``yarn`` command answers ``yarn classpath --glob``, which is
all that Skein asks of it.  Nothing runs after :meth:`Yarn.stop`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Iterator
from xml.sax.saxutils import escape

import pytest

from support import done, made_once, missing
from support.slurm import free_ports, wait_for

PROGRAMS = ("java", "mvn")
LEASH = ["setpriv", "--pdeathsig=TERM"]  # ends with the tests, however they end
HADOOP = "3.4.1"
REGISTERED = "NodeManager from node"  # what the ResourceManager logs of one
RM = "org.apache.hadoop.yarn.server.resourcemanager"
POM = Path(__file__).with_name("yarn-pom.xml")
# Guice and cglib reach into java.lang; Hadoop's own scripts pass the same to Java 17.
# What lives for a short time is not worth an optimizing compiler.
JAVA = """\
#!/bin/sh
exec {java} -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData \\
    --add-opens=java.base/java.lang=ALL-UNNAMED "$@"
"""
YARN = """\
#!/bin/sh
[ "$*" = "classpath --glob" ] || exit 2
printf %s "{conf}"
printf ":%s" "{jars}"/*.jar
echo
"""
LOG4J = """\
log4j.rootLogger=INFO,stderr
log4j.appender.stderr=org.apache.log4j.ConsoleAppender
log4j.appender.stderr.target=System.err
log4j.appender.stderr.layout=org.apache.log4j.PatternLayout
log4j.appender.stderr.layout.ConversionPattern=%d %p %c{1}: %m%n
"""


def fetch_jars(directory: Path) -> None:
    """Let maven fetch Hadoop's jars into `directory`."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as work:
        shutil.copy(POM, Path(work) / "pom.xml")
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={directory}"]
        mvn = ["mvn", "-B", "-q", f"-Dhadoop={HADOOP}", *goal]
        subprocess.run(mvn, cwd=work, check=True, timeout=900, stdin=subprocess.DEVNULL)


class Yarn:
    """The running cluster.  ``environ`` is what a client of it needs (``HADOOP_CONF_DIR``, ``PATH``)."""

    def __init__(self) -> None:
        self.jars = made_once(f"hadoop-{HADOOP}", fetch_jars)
        self.dir = Path(tempfile.mkdtemp(prefix="envkernel-yarn-"))
        self.conf = self.dir / "conf"
        self.java = self.dir / "java" / "bin" / "java"
        self.environ = {
            "HADOOP_CONF_DIR": str(self.conf),
            "PATH": f"{self.dir}/bin:{os.environ['PATH']}",
            "SKEIN_CONFIG": str(self.dir / "skein"),
            "JAVA_HOME": str(self.java.parents[1]),
        }
        self.own_environ = {**os.environ, **self.environ}  # a test's marks its own processes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start both daemons and wait until the node is registered."""
        self._write_conf()
        self.spawn("resourcemanager", f"{RM}.ResourceManager")
        self.start_node()

    def start_node(self) -> None:
        """Start the NodeManager and wait until it is registered."""
        before = self.log("resourcemanager").count(REGISTERED)
        self.spawn("nodemanager", "org.apache.hadoop.yarn.server.nodemanager.NodeManager")
        wait_for(lambda: self._registered() > before, "the NodeManager", 60)

    def crash_node(self) -> None:
        """Kill the NodeManager; the processes of its containers live on.  `start_node` brings it back."""
        daemon = self.daemons.pop("nodemanager")
        daemon.kill()
        daemon.wait()

    def _registered(self) -> int:
        for name, daemon in self.daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"the {name} ended:\n{self.log(name)[-4000:]}")
        return self.log("resourcemanager").count(REGISTERED)

    def stop(self) -> None:
        """End daemons and containers, remove the directory."""
        for daemon in reversed(list(self.daemons.values())):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def spawn(self, name: str, main: str) -> None:
        """Start the daemon `name`, the Java class `main`."""
        classpath = f"{self.conf}:{self.jars}/*"
        with (self.dir / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig=TERM",
                    self.java,
                    f"-Dhadoop.log.dir={self.dir}",
                    f"-Djava.io.tmpdir={self.dir}",
                    "-cp",
                    classpath,
                    main,
                ],
                env=self.own_environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.dir,
            )

    def log(self, name: str) -> str:
        """What a daemon has logged."""
        return (self.dir / f"{name}.log").read_text(errors="replace")

    def _write_conf(self) -> None:
        for directory in (self.conf, self.dir / "bin", self.dir / "skein", self.java.parent):
            directory.mkdir(parents=True)
        self.java.write_text(JAVA.format(java=shutil.which("java")))
        self.java.chmod(0o755)
        rm = free_ports(8)
        addresses = (
            "address",
            "scheduler.address",
            "resource-tracker.address",
            "admin.address",
            "webapp.address",
        )
        yarn = {f"yarn.resourcemanager.{name}": f"127.0.0.1:{port}" for name, port in zip(addresses, rm)}
        yarn |= {
            "yarn.resourcemanager.hostname": "127.0.0.1",
            "yarn.node-attribute.fs-store.root-dir": f"file://{self.dir}/attributes",
            "yarn.nodemanager.hostname": "127.0.0.1",
            "yarn.nodemanager.address": f"127.0.0.1:{rm[5]}",
            "yarn.nodemanager.localizer.address": f"127.0.0.1:{rm[6]}",
            "yarn.nodemanager.webapp.address": f"127.0.0.1:{rm[7]}",
            "yarn.nodemanager.local-dirs": f"{self.dir}/local",
            "yarn.nodemanager.log-dirs": f"{self.dir}/logs",
            "yarn.nodemanager.resource.memory-mb": "8192",
            "yarn.nodemanager.resource.cpu-vcores": "8",
            "yarn.nodemanager.vmem-check-enabled": "false",
            "yarn.nodemanager.container-monitor.interval-ms": "500",
            "yarn.nodemanager.resource.memory.enforced": "false",  # else only control groups would kill
            "yarn.nodemanager.disk-health-checker.enable": "false",
            "yarn.nodemanager.delete.debug-delay-sec": "0",
            "yarn.nodemanager.env-whitelist": "JAVA_HOME,HADOOP_CONF_DIR",
            "yarn.scheduler.minimum-allocation-mb": "128",
            "yarn.resourcemanager.am.max-attempts": "1",
            "yarn.resourcemanager.nodemanagers.heartbeat-interval-ms": "100",
            "yarn.application.classpath": f"{self.conf},{self.jars}/*",
            "yarn.resourcemanager.scheduler.class": f"{RM}.scheduler.capacity.CapacityScheduler",
        }
        write_site(self.conf / "yarn-site.xml", yarn)
        # Skein compares the hosts of source and destination and fails on file:///, which has none
        # ("Cannot invoke String.equals(Object) because srcHost is null"): a view gives it a name.
        write_site(
            self.conf / "core-site.xml",
            {
                "fs.defaultFS": "viewfs://local/",
                "fs.viewfs.mounttable.local.linkMergeSlash": "file:///",
                "fs.viewfs.mounttable.local.homedir": f"{self.dir}/home",
                "hadoop.tmp.dir": f"{self.dir}/tmp",
            },
        )
        write_site(
            self.conf / "capacity-scheduler.xml",
            {
                "yarn.scheduler.capacity.root.queues": "default,small",
                "yarn.scheduler.capacity.root.default.capacity": "90",
                "yarn.scheduler.capacity.root.small.capacity": "10",
                "yarn.scheduler.capacity.maximum-am-resource-percent": "0.9",
            },
        )
        (self.conf / "log4j.properties").write_text(LOG4J)
        command = self.dir / "bin" / "yarn"
        command.write_text(YARN.format(conf=self.conf, jars=self.jars))
        command.chmod(0o755)


def write_site(path: Path, settings: dict[str, str]) -> None:
    """Write one of Hadoop's configuration files."""
    rows = "".join(
        f"<property><name>{escape(name)}</name><value>{escape(value)}</value></property>\n"
        for name, value in settings.items()
    )
    path.write_text(f"<configuration>\n{rows}</configuration>\n")


@contextlib.contextmanager
def running_yarn() -> Iterator[Yarn]:
    """Have a YARN run with the queues default and small."""
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    if lacking:
        missing(f"programs for YARN: {', '.join(lacking)}")
    cluster = Yarn()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def yarn() -> Iterator[Yarn]:
    """The YARN of `running_yarn`."""
    with running_yarn() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with skein and ipykernel, packed by venv-pack."""
    return make_packed(tmp_path_factory.mktemp("packed"))


def make_packed(directory: Path) -> Path:
    """Make an environment with skein and ipykernel, packed by venv-pack.

    What these two need is taken from the environment of the tests: a NodeManager without Hadoop's
    native library starts one chmod per file that it unpacks.
    """
    venv = directory / "venv"
    done(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = [sys.executable, "-m", "pip", "--python", venv, "install", "-q", "--no-deps", "--no-compile"]
    done(*pip, "skein", "ipykernel")
    [packages] = venv.glob("lib/python*/site-packages")
    rest = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    (packages / "rest.pth").write_text(rest)
    archive = directory / "environment.tar.gz"
    done(Path(sys.executable).with_name("venv-pack"), "-q", "-p", venv, "-o", archive)
    return archive
