"""A real Slurm for the tests: munge, slurmctld and three slurmd, one of them behind a network.

Everything is private: the key, the sockets, the state and the logs stand in one temporary directory,
the daemons listen on ports of their own, and the node ``far`` lives in a network namespace of its own
with an address of its own (a veth pair joins it to the host), so that its loopback is not the submit
host's and a relay really crosses a network.  Nothing of it is left after :meth:`Slurm.stop`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Iterator, Sequence

import pytest

from support import free_subnet, missing

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "ip", "nsenter")

CONF = """\
ClusterName=envkernel
SlurmctldHost={host}({submit})
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,NoShared
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
DefMemPerCPU=500
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=3
InactiveLimit=0
MinJobAge=30
SlurmdTimeout=300
SlurmctldTimeout=10
MessageTimeout=5
UnkillableStepTimeout=30
OverTimeLimit=0
PropagateResourceLimits=NONE
NodeName=near NodeHostname={host} NodeAddr={submit} Port={ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=spare NodeHostname={host} NodeAddr={submit} Port={ports[2]} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=far NodeHostname={host} NodeAddr={far} Port={ports[3]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=near,far Default=YES MaxTime=60 State=UP
PartitionName=near Nodes=near MaxTime=60 State=UP
PartitionName=far Nodes=far MaxTime=60 State=UP
PartitionName=spare Nodes=spare MaxTime=60 State=UP
"""


class Slurm:
    """The running cluster.  ``environ`` is what a client of it needs."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="envkernel-slurm-"))
        self.netns = f"ek{os.getpid()}"
        self.link = f"ekv{os.getpid()}"[:14]
        subnet = free_subnet()
        self.submit, self.far = f"{subnet}.1", f"{subnet}.2"
        self.environ = {"SLURM_CONF": str(self.dir / "slurm.conf")}
        self.own_environ = {**os.environ, **self.environ}  # a test's marks its own processes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = free_ports(4)

    # ---- start and stop -------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until the nodes are idle."""
        self.dir.chmod(0o755)  # the two-user tests read slurm.conf and talk to munge
        (self.dir / "state").mkdir()
        self._start_network()
        self._start_munge()
        conf = CONF.format(
            host=socket.gethostname().split(".")[0],
            dir=self.dir,
            submit=self.submit,
            far=self.far,
            ports=self.ports,
        )
        (self.dir / "slurm.conf").write_text(conf)
        self.spawn("slurmctld", ["slurmctld", "-D", "-i"])
        for node in ("near", "spare", "far"):
            self.start_node(node)
        self.wait_idle()

    def start_node(self, node: str) -> None:
        """Start the slurmd of `node`, in its namespace if it is the far one."""
        inside = ["nsenter", f"--net=/run/netns/{self.netns}"] if node == "far" else []
        self.spawn(f"slurmd-{node}", [*inside, "slurmd", "-D", "-N", node])

    def wait_idle(self, timeout: float = 30) -> None:
        """Wait until every node is idle (raises with the logs when that takes too long)."""
        deadline = time.monotonic() + timeout
        while set(self.run("sinfo", "-h", "-N", "-o", "%t").split()) != {"idle"}:
            if time.monotonic() > deadline:
                raise RuntimeError(self.run("sinfo", "-N") + self.logs())
            time.sleep(0.1)

    def repair(self, node: str, timeout: float = 60) -> None:
        """Bring a node back into service, whatever was done to it."""
        if f"slurmd-{node}" not in self.daemons:
            self.start_node(node)

        again = 0.0

        def idle() -> bool:
            nonlocal again
            if self.run("sinfo", "-h", "-n", node, "-p", node, "-o", "%T").strip() == "idle":
                return True
            if time.monotonic() > again:
                for state in ("DOWN", "RESUME"):  # the first ends what is still completing there
                    self.run(
                        "scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=x", check=False
                    )
                again = time.monotonic() + 5
            return False

        wait_for(idle, f"node {node}", timeout)

    def stop(self) -> None:
        """End jobs and daemons, remove namespace and directory."""
        with contextlib.suppress(Exception):
            if left := self.jobs():
                self.run("scancel", *left, check=False)
            self.wait_no_jobs(10)
        for name in reversed(list(self.daemons)):
            self.end(name)
        subprocess.run(["ip", "netns", "del", self.netns], check=False)
        subprocess.run(["ip", "link", "del", self.link], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.dir, ignore_errors=True)

    def end(self, name: str, sig: int = signal.SIGTERM) -> None:
        """End one daemon and wait for it."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(sig)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _start_network(self) -> None:
        peer = self.link + "p"
        for command in (
            ["ip", "netns", "add", self.netns],
            ["ip", "link", "add", self.link, "type", "veth", "peer", "name", peer],
            ["ip", "link", "set", peer, "netns", self.netns],
            ["ip", "addr", "add", f"{self.submit}/24", "dev", self.link],
            ["ip", "link", "set", self.link, "up"],
            ["ip", "-n", self.netns, "addr", "add", f"{self.far}/24", "dev", peer],
            ["ip", "-n", self.netns, "link", "set", peer, "up"],
            ["ip", "-n", self.netns, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)

    def _start_munge(self) -> None:
        key = self.dir / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        self.spawn(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",
                f"--socket={self.dir}/munge.socket",
                f"--key-file={key}",
                f"--pid-file={self.dir}/munged.pid",
                f"--seed-file={self.dir}/munged.seed",
                f"--log-file={self.dir}/munged.log",
            ],
        )
        wait_for((self.dir / "munge.socket").exists, "munged's socket", 10)

    def spawn(self, name: str, argv: list[str]) -> None:
        """Start the daemon `name` in a session of its own."""
        log = (self.dir / f"{name}.out").open("ab")
        with log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", *argv],
                env=self.own_environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    # ---- what tests ask it ----------------------------------------------------------------

    def run(self, *argv: str, check: bool = True) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(
            argv, env={**os.environ, **self.environ}, capture_output=True, text=True, timeout=30
        )
        if check and done.returncode:
            raise RuntimeError(f"{argv}: {done.stderr}{self.logs()}")
        return done.stdout

    def jobs(self) -> list[str]:
        """The ids of the jobs that are pending, running or ending."""
        return self.run("squeue", "-h", "-o", "%i", check=False).split()

    def wait_no_jobs(self, timeout: float = 10) -> None:
        """Wait until there is no job left."""
        wait_for(lambda: not self.jobs(), "the end of the jobs", timeout)

    def on_far(self, *argv: str) -> str:
        """The output of a command in the namespace of the far node."""
        return subprocess.run(
            ["ip", "netns", "exec", self.netns, *argv], capture_output=True, text=True, check=True
        ).stdout

    @contextlib.contextmanager
    def sshd(self, directory: Path) -> Iterator[Path]:
        """Run an sshd on the far node; yields a directory with an ``ssh`` that has the right key and
        address."""
        with run_sshd(directory, "far", self.far, ["nsenter", f"--net=/run/netns/{self.netns}"]) as programs:
            yield programs

    def logs(self) -> str:
        """The ends of all logs, for a failure's message."""
        lines = []
        for path in sorted(self.dir.glob("*.out")):
            text = path.read_text(errors="replace")
            lines += [
                f"--- {path.name}",
                *[line for line in text.splitlines()[-20:] if "pmi" not in line.lower()],
            ]
        return "\n" + "\n".join(lines)


@contextlib.contextmanager
def run_sshd(directory: Path, node: str, address: str, inside: Sequence[str] = ()) -> Iterator[Path]:
    """Run an sshd at an address of `node`, started by the command `inside`.

    Yields a directory with an ``ssh`` that has the right key and address.
    """
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    os.makedirs("/run/sshd", exist_ok=True)
    [port] = free_ports(1)
    server = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", str(port), "-h", str(directory / "host")]
    keys = f"AuthorizedKeysFile={directory}/user.pub"
    for option in (f"ListenAddress={address}", keys, "PidFile=none", "StrictModes=no", "UsePAM=no"):
        server += ["-o", option]
    config = f"Host {node}\n HostName {address}\n Port {port}\n IdentityFile {directory}/user\n"
    config += f" UserKnownHostsFile {directory}/known\n StrictHostKeyChecking accept-new\n"
    (directory / "config").write_text(config)
    (directory / "bin").mkdir()
    (directory / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {directory}/config "$@"\n')
    (directory / "bin" / "ssh").chmod(0o755)

    def listens() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((address, port)) == 0

    with subprocess.Popen([*inside, *server], stderr=subprocess.DEVNULL) as daemon:
        try:
            wait_for(listens, "sshd", 5)
            yield directory / "bin"
        finally:
            daemon.terminate()


def free_ports(count: int) -> list[int]:
    """`count` TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def wait_for(condition, what: str, timeout: float) -> None:
    """Wait until `condition()` is true, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.05)


@contextlib.contextmanager
def running_slurm() -> Iterator[Slurm]:
    """Have a Slurm run: nodes near and spare on this host, far in a network namespace."""
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    if lacking:
        missing(f"programs of Slurm: {', '.join(lacking)}")
    if os.geteuid() != 0:
        missing("root, for Slurm's daemons and a network namespace")
    cluster = Slurm()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The Slurm of `running_slurm`."""
    with running_slurm() as cluster:
        yield cluster
