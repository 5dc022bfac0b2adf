"""Kernels in jobs of a real Slurm: on this host, and on a node behind a network."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import psutil
import pytest
from jupyter_client import KernelManager

from support import memory
from support.apptainer import Apptainer
from support.clusters import Errors, alive, driven_kernel, node_processes, processes, run_process
from support.docker import Docker
from support.jupyter import Jupyter, Kernel, run_protocol_tests
from support.modules import Modules
from support.slurm import Slurm, wait_for
from support.venvs import found_pythons

pytestmark = pytest.mark.live

COMMAND = ("-m", "ipykernel_launcher", "-f", "{connection_file}")
NODE_FILES = "envkernel-node-*"


@pytest.fixture
def other(jupyter: Jupyter, cluster: Slurm, tmp_path: Path) -> Jupyter:
    """A second Jupyter with the same kernels: what is left of a kernel is reported apart by its Jupyter."""
    second = Jupyter(tmp_path / "other")
    second.environ.update(cluster.environ)
    return second


@pytest.fixture
def cluster(jupyter: Jupyter, slurm: Slurm) -> Iterator[Slurm]:
    """Slurm, known to the private Jupyter; afterwards there is no job and nothing left on the nodes."""
    jupyter.environ.update(slurm.environ)
    yield slurm
    slurm.wait_no_jobs(10)
    wait_for(lambda: not node_directories(), "the end of the directories on the nodes", 3)


def node_directories() -> list[Path]:
    return list(Path("/tmp").glob(NODE_FILES))


def install(jupyter: Jupyter, name: str, *options: str, chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """Set a kernel up that runs on a node with the Python of the tests."""
    return jupyter.setup("slurm", name, "--linger=1", *options, "--", *(chain or (sys.executable, *COMMAND)))


def srun_of(kernel: Kernel) -> psutil.Process:
    [keeper] = run_process(kernel).children()
    [srun] = keeper.children()
    assert srun.name() == "srun"
    return srun


def all_gone(cluster: Slurm, pids: list[int], seconds: float = 10) -> None:
    """Nothing of a kernel may be left after some seconds: no job, no process, no file."""

    def gone() -> bool:
        return not cluster.jobs() and not alive(pids) and not node_directories()

    try:
        wait_for(gone, "the end", seconds)
    except TimeoutError:
        left = [psutil.Process(pid) for pid in alive(pids)]
        raise AssertionError(f"left: {left} {cluster.jobs()} {node_directories()}") from None


def all_pids(kernel: Kernel) -> list[int]:
    """Every process of a kernel: Jupyter's side and the node's (the namespaces share process ids)."""
    here = run_process(kernel)
    agent = int(kernel.value("__import__('os').getppid()"))
    there = psutil.Process(agent)
    return [process.pid for root in (here, there) for process in (root, *root.children(recursive=True))]


# ---- life ---------------------------------------------------------------------------------------


def test_kernel_on_a_node_behind_a_network(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    install(jupyter, "far", "--partition=far", "--env", "GREETING=a b {c} %:$")
    jupyter.environ.update(JUPYTERHUB_API_TOKEN="not for the cluster")
    with jupyter.kernel("far", stderr=errors.file) as kernel:
        there = os.stat(f"/run/netns/{cluster.netns}").st_ino
        assert kernel.value("__import__('os').stat('/proc/self/ns/net').st_ino") == str(there)
        [job] = cluster.jobs()
        environ = kernel.environ()
        assert environ["GREETING"] == "a b {c} %:$"
        assert "JUPYTERHUB_API_TOKEN" not in environ
        assert environ["SLURM_JOB_ID"] == job
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        assert kernel.value("1 + 1") == "2"
        here = memory.family(kernel.pid)
        assert len(here) == 2
        assert memory.megabytes(here) <= 30
        assert memory.megabytes([process.pid for process in node_processes(kernel)], others=0) <= 30
        first = kernel.value("__import__('os').getpid()")
        kernel.restart()
        kernel.restart(now=True)
        assert kernel.value("__import__('os').getpid()") != first
        assert cluster.jobs() == [job], "a restart gets the same job"
        pids = all_pids(kernel)
        assert kernel.shutdown() < 3
        all_gone(cluster, pids)
    assert "signed, but crosses the network to far readable" in errors.text()


@pytest.mark.parametrize("which", [0, -1], ids=["oldest", "newest"])
def test_agent_and_relay_run_on_any_python(
    jupyter: Jupyter, cluster: Slurm, errors: Errors, which: int
) -> None:
    """The node's own python3 is another one than the submit host's, and so is the one that Jupyter starts."""
    pythons = [path for version, path in found_pythons().items() if not version.startswith(("3.6", "3.7"))]
    python = Path(pythons[which])
    jupyter.environ["PATH"] = f"{python.parent}:{jupyter.environ['PATH']}"
    spec = install(jupyter, "other", "--partition=far", "--node-ports=41000-41003")
    spec["argv"][0] = str(python)
    (jupyter.kernels / "other" / "kernel.json").write_text(json.dumps(spec))
    with jupyter.kernel("other", stderr=errors.file) as kernel:
        agent = psutil.Process(int(kernel.value("__import__('os').getppid()")))
        for process in (agent, run_process(kernel)):
            assert os.path.samefile(process.exe(), python.resolve())
        assert [port in range(41000, 41004) for _, port in listening(cluster, kernel)] == [True]
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        kernel.restart(now=True)
        assert len(kernel.value("'x' * 5_000_000")) == 5_000_000
        pids = all_pids(kernel)
        kernel.shutdown()
        all_gone(cluster, pids)
    assert "Traceback" not in errors.text()


def test_hung_kernel_is_restarted_at_once(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "hung", "--partition=near")
    with jupyter.kernel("hung") as kernel:
        kernel.client.execute("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
        assert kernel.restart(now=True) < 10
        assert kernel.value("1 + 1") == "2"


def test_kernel_that_crashes_says_how(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "crash", "--partition=far")
    with jupyter.kernel("crash") as kernel:
        kernel.client.execute("import os; os._exit(7)")
        wait_for(lambda: run_process(kernel).status() == psutil.STATUS_ZOMBIE, "the end", 10)
        assert kernel.manager.provisioner.process.wait(5) == 7


def test_the_suite_of_jupyter_kernel_test(
    jupyter: Jupyter, cluster: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    install(jupyter, "suite", "--partition=far")
    run_protocol_tests("suite")


def test_list_and_stop_know_a_job(jupyter: Jupyter, cluster: Slurm, kernel_venv: Path) -> None:
    partition = "brief" + os.urandom(3).hex()
    cluster.run("scontrol", "create", "PartitionName=" + partition, "Nodes=far", "State=UP")
    install(jupyter, "brief", "--partition=" + partition, chain=("virtualenv", str(kernel_venv)))
    with jupyter.kernel("brief") as kernel:
        (row,) = json.loads(jupyter.envkernel("list", "--json").stdout)
        assert row["target"] == str(kernel_venv)
        assert re.fullmatch(f"ok, running: (job {cluster.jobs()[0]}|process {kernel.pid})", row["state"])
        assert jupyter.envkernel("stop", "brief").stdout.startswith("Ended: ")
        cluster.wait_no_jobs(10)
        wait_for(lambda: not kernel.manager.is_alive(), "the end of the process that Jupyter started", 10)
    cluster.run("scontrol", "delete", "PartitionName=" + partition)
    (row,) = json.loads(jupyter.envkernel("list", "--json").stdout)
    assert row["state"] == "Slurm refuses the job: Invalid partition name specified."
    shown = json.loads(jupyter.envkernel("show", "brief", "--json").stdout)
    assert shown["node"]["environment"]["VIRTUAL_ENV"] == str(kernel_venv)


def test_chain_of_modules_and_virtualenv(
    jupyter: Jupyter, cluster: Slurm, lmod: Modules, kernel_venv: Path
) -> None:
    jupyter.environ.update(lmod.environ)
    chain = ("lmod", "gcc/12", "--", "virtualenv", str(kernel_venv))
    spec = install(jupyter, "chain", "--partition=far", "--kernel=python3", chain=chain)
    assert "curve" in spec["metadata"]["supported_encryption"], "read where setup can see it"
    assert (jupyter.kernels / "chain" / "logo-64x64.png").exists()
    with jupyter.kernel("chain") as kernel:
        assert kernel.value("__import__('os').environ['CC']") == "gcc-12"
        assert kernel.value("__import__('sys').prefix") == str(kernel_venv)
        assert kernel.environ()["VIRTUAL_ENV"] == str(kernel_venv)
        assert kernel.environ()["SLURMD_NODENAME"] == "far"


def test_chain_with_a_container(
    jupyter: Jupyter, cluster: Slurm, apptainer: Apptainer, python_rootfs: Path
) -> None:
    """The container's own clean-up works on the node, below the agent."""
    jupyter.environ["PATH"] = f"{apptainer.directory}:{jupyter.environ['PATH']}"
    box = ("apptainer", "--contain", str(python_rootfs))
    install(jupyter, "boxed", "--partition=far", chain=(*box, "--", "python3", *COMMAND))
    typed = ("--partition=far", "--", *box, "--", "nosuch", "{connection_file}")
    said = jupyter.envkernel("slurm", "--name=empty", "--user", *typed, status=1)
    assert "There is no nosuch in" in said.stderr
    with jupyter.kernel("boxed") as kernel:
        assert kernel.environ()["SLURMD_NODENAME"] == "far"
        assert kernel.value("__import__('os').path.exists('/work')") == "False"
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        kernel.restart(now=True)
        assert kernel.value("1 + 1") == "2"


def test_kernel_starts_in_the_notebooks_directory(
    jupyter: Jupyter, cluster: Slurm, errors: Errors, tmp_path: Path
) -> None:
    """As with plain srun; where the node lacks it, in HOME."""
    notebooks = tmp_path / "note books"
    notebooks.mkdir()
    (notebooks / "data.csv").write_text("1,2")
    install(jupyter, "here", "--partition=far")
    with jupyter.kernel("here", cwd=str(notebooks)) as kernel:
        assert kernel.value("open('data.csv').read()") == "1,2"
        assert kernel.environ()["SLURM_SUBMIT_DIR"] == str(notebooks)
        kernel.restart()
        assert kernel.value("__import__('os').getcwd()") == str(notebooks)
    install(jupyter, "given", "--partition=far", "--chdir=/usr")
    with jupyter.kernel("given", cwd=str(notebooks)) as kernel:
        assert kernel.value("__import__('os').getcwd()") == "/usr"
    bare = tmp_path / "node-python"
    (notebooks / "deep").mkdir()
    hide = f"mount -t tmpfs none '{notebooks}' && exec /usr/bin/python3 \"$@\""
    bare.write_text(f'#!/bin/sh\nexec unshare --mount sh -c {shlex.quote(hide)} sh "$@"\n')
    bare.chmod(0o755)
    install(jupyter, "lacks", "--partition=far", f"--node-python={bare}")
    with jupyter.kernel("lacks", cwd=str(notebooks / "deep"), stderr=errors.file) as kernel:
        assert kernel.value("__import__('os').getcwd()") == jupyter.environ["HOME"]
    assert f"The node far has no directory {notebooks}/deep: the kernel starts in" in errors.text()


def test_notebooks_directory_in_a_container_on_a_node(
    jupyter: Jupyter,
    cluster: Slurm,
    docker: Docker,
    apptainer: Apptainer,
    python_rootfs: Path,
    tmp_path: Path,
) -> None:
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (notebooks / "data.csv").write_text("1,2")
    jupyter.environ.update(docker.environ)
    command = ("--", "python3", *COMMAND)
    jupyter.environ["PATH"] = f"{apptainer.directory}:{jupyter.environ['PATH']}"
    install(jupyter, "docker", "--partition=near", chain=("docker", "--pwd", "python", *command))
    install(
        jupyter, "apptainer", "--partition=far", chain=("apptainer", "--pwd", str(python_rootfs), *command)
    )
    for name in ("docker", "apptainer"):
        with jupyter.kernel(name, cwd=str(notebooks)) as kernel:
            assert kernel.value("__import__('os').getcwd()") == str(notebooks)
            assert kernel.value("open('data.csv').read()") == "1,2"


def test_two_nodes_at_once(jupyter: Jupyter, other: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "one", "--partition=near")
    install(jupyter, "two", "--partition=far")
    with jupyter.kernel("one") as one, other.kernel("two") as two:
        assert one.environ()["SLURMD_NODENAME"] == "near"
        assert two.environ()["SLURMD_NODENAME"] == "far"
        assert len(cluster.jobs()) == 2


# ---- what passes through the relay ---------------------------------------------------------------


def test_large_and_many_messages_pass_unchanged(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "bytes", "--partition=far")
    with jupyter.kernel("bytes") as kernel:
        code = "import random; text = random.Random(1).randbytes(50_000_000).hex(); print(text, end='')"
        text, error = kernel.execute(code, timeout=60)
        assert error is None
        digest = kernel.value("__import__('hashlib').sha256(text.encode()).hexdigest()")
        assert len(text) == 100_000_000
        assert hashlib.sha256(text.encode()).hexdigest() == digest
        message = kernel.client.execute("for i in range(20_000): display(i)")
        seen: list[str] = []
        while True:
            published = kernel.client.get_iopub_msg(timeout=60)
            if published["parent_header"].get("msg_id") != message:
                continue
            if published["msg_type"] == "display_data":
                seen.append(published["content"]["data"]["text/plain"])
            elif published["content"].get("execution_state") == "idle":
                break
        assert seen == [str(number) for number in range(20_000)]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_encrypted_end_to_end(jupyter: Jupyter, cluster: Slurm, errors: Errors, transport: str) -> None:
    """Jupyter's own CurveZMQ: the keys go along, and there is nothing to warn of."""
    spec = install(jupyter, "curve", "--partition=far", f"--node-transport={transport}")
    spec["metadata"]["supported_encryption"] = "curve"
    (jupyter.kernels / "curve" / "kernel.json").write_text(json.dumps(spec))
    manager = KernelManager(kernel_name="curve", transport_encryption="required")
    manager.start_kernel(env=jupyter.environ, stderr=errors.file)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=30)
        assert json.loads(Path(manager.connection_file).read_text())["curve_secretkey"]
        assert Kernel(manager, client).value("6 * 7") == "42"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    assert "readable" not in errors.text()


# ---- nothing is exposed --------------------------------------------------------------------------


def as_nobody(*argv: str, netns: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program as another user, on the far node if asked to."""
    nobody = pwd.getpwnam("nobody")
    where = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    user = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    return subprocess.run([*where, *user, *argv], capture_output=True, text=True, check=False, timeout=30)


STRANGER = """
import socket, sys
for port in map(int, sys.argv[2:]):
    with socket.create_connection((sys.argv[1], port), timeout=5) as sock:
        sock.sendall(b"\\xff" + bytes(8) + b"\\x7f" + b"\\x03" + bytes(200))
        try:
            print(len(sock.recv(100)))
        except OSError as error:
            print(0)
"""


def test_another_user_of_the_node_gets_nothing(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "private", "--partition=far")
    with jupyter.kernel("private") as kernel:
        key = json.loads(Path(kernel.manager.connection_file).read_text())["key"]
        [(address, port)] = listening(cluster, kernel)
        assert address == cluster.far, "one port, on the one address that leads to the submit host"
        stranger = as_nobody("python3", "-c", STRANGER, address, str(port), netns=cluster.netns)
        assert stranger.stdout.split() == ["0"], stranger
        agent = kernel.value("__import__('os').getppid()")
        assert as_nobody("cat", f"/proc/{agent}/environ").returncode != 0
        assert not node_directories(), "the kernel's sockets have no name any more"
        path = Path(kernel.value("get_ipython().config.IPKernelApp.connection_file"))
        assert path.parts[:3] == ("/", "proc", agent), "the connection file is in memory"
        assert path.stat().st_mode & 0o777 == 0o600
        assert key in path.read_text()
        assert as_nobody("cat", str(path)).returncode != 0
        for pid in all_pids(kernel):
            for what in ("cmdline", "environ"):
                assert key.encode() not in Path(f"/proc/{pid}/{what}").read_bytes(), (pid, what)
        places = [str(cluster.dir), *map(str, jupyter.root.rglob("*.log"))]
        grep = subprocess.run(["grep", "-rlF", key, *places], capture_output=True, text=True, check=False)
        assert grep.stdout == "", "grep -r follows no links, and finds the key in no file"


def listening(cluster: Slurm, kernel: Kernel) -> list[tuple[str, int]]:
    """The addresses and ports on which the agent of a kernel listens."""
    pids = [f"pid={process.pid}," for process in node_processes(kernel)]
    lines = cluster.on_far("ss", "-ltnpH").splitlines()
    lines = [line for line in lines if any(pid in line for pid in pids)]
    places = (line.split()[3].rpartition(":") for line in lines)
    return [(host, int(port)) for host, _, port in places]


def test_only_loopback_listens_on_the_submit_host(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "loopback", "--partition=far")
    with jupyter.kernel("loopback") as kernel:
        [keeper] = run_process(kernel).children()
        for pid in (kernel.pid, keeper.pid):
            for connection in psutil.Process(pid).net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip == "127.0.0.1"
        assert sum(c.status == psutil.CONN_LISTEN for c in keeper.net_connections("inet")) == 5


def test_tunnel_through_ssh(
    jupyter: Jupyter, cluster: Slurm, errors: Errors, tmp_path: Path, sshd: Path
) -> None:
    environ = {"PATH": f"{sshd}:{jupyter.environ['PATH']}"}
    jupyter.environ.update(environ)
    install(jupyter, "tunnel", "--partition=far", "--tunnel=ssh")
    with jupyter.kernel("tunnel", stderr=errors.file) as kernel:
        assert kernel.value("6 * 7") == "42"
        assert [address for address, _ in listening(cluster, kernel)] == ["127.0.0.1"]
        kernel.restart(now=True)
        assert kernel.value("6 * 7") == "42"
    assert "readable" not in errors.text()


@pytest.fixture
def sshd(cluster: Slurm, tmp_path: Path) -> Iterator[Path]:
    """A directory with an ``ssh`` that reaches the far node."""
    with cluster.sshd(tmp_path) as directory:
        yield directory


# ---- the queue -----------------------------------------------------------------------------------


def test_more_kernels_than_cpus(jupyter: Jupyter, other: Jupyter, cluster: Slurm, errors: Errors) -> None:
    """The node has two CPUs: a third kernel waits, says for what, and starts when one has ended."""
    install(jupyter, "queued", "--partition=spare")
    with jupyter.kernel("queued"), other.kernel("queued") as second:
        manager = KernelManager(kernel_name="queued")
        manager.start_kernel(env=jupyter.environ, stderr=errors.file)
        client = manager.blocking_client()
        client.start_channels()
        try:
            said = errors.wait("waits: ")
            assert re.search(r"envkernel: Slurm job \d+ waits: (Resources|Priority) \(", said), said
            waiting = client.kernel_info()
            second.shutdown()
            client.wait_for_ready(timeout=20)
            assert Kernel(manager, client).value("1 + 1") == "2"
            assert waiting
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()
    log = jupyter.envkernel("log", "queued").stdout
    assert " waits: " in log


def test_queue_timeout_is_told_in_the_notebook(jupyter: Jupyter, other: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "late", "--partition=spare", "--exclusive", "--queue-timeout=1.5")
    with jupyter.kernel("late") as first:
        assert first.value("1") == "1"
        with other.kernel("late") as second:
            text, error = second.execute("1 + 1")
            assert "did not start within 1.5 s" in str(error) + text
            wait_for(lambda: len(cluster.jobs()) == 1, "the end of the waiting job", 10)


def test_restart_and_shutdown_of_a_kernel_that_waits(
    jupyter: Jupyter, cluster: Slurm, errors: Errors
) -> None:
    install(jupyter, "patient", "--partition=spare", "--exclusive")
    with jupyter.kernel("patient"):
        manager = KernelManager(kernel_name="patient")
        manager.start_kernel(env=jupyter.environ, stderr=errors.file)
        errors.wait("waits: ")
        manager.restart_kernel(now=True)
        client = manager.blocking_client()
        client.start_channels()
        client.execute("1 + 1")
        shown: list[str] = []
        while not re.search(r"Slurm job \d+ waits: ", "".join(shown)):
            message = client.get_iopub_msg(timeout=10)
            shown.append(message["content"].get("data", {}).get("text/plain", ""))
            assert len(shown) < 20, shown
        client.stop_channels()
        assert len(cluster.jobs()) == 2
        manager.shutdown_kernel(now=True)
        wait_for(lambda: len(cluster.jobs()) == 1, "the end of the waiting job", 10)
        manager.cleanup_resources()


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["near", "far"])
def test_kill_of_the_run_process(jupyter: Jupyter, cluster: Slurm, partition: str) -> None:
    install(jupyter, "killed", f"--partition={partition}")
    with jupyter.kernel("killed") as kernel:
        pids = all_pids(kernel)
        os.killpg(kernel.pid, signal.SIGKILL)
        kernel.manager.provisioner.process.wait(5)
        all_gone(cluster, pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_jupyter(jupyter: Jupyter, cluster: Slurm, number: int) -> None:
    install(jupyter, "orphan", "--partition=far", "--linger=60")
    with driven_kernel(jupyter, "orphan") as (driver, run):
        pids = [run.pid, *(child.pid for child in run.children(recursive=True))]
        pids += [process.pid for process in processes("import marshal,sys,zlib")]
        driver.send_signal(number)
        all_gone(cluster, pids)


def ends_with(
    jupyter: Jupyter,
    cluster: Slurm,
    errors: Errors,
    harm: Callable[[Kernel, str], object],
    seconds: float = 10,
    options: tuple[str, ...] = (),
) -> str:
    """Do harm to a kernel on the far node; everything has to end, and stderr to say why."""
    install(jupyter, "harmed", "--partition=far", *options)
    with jupyter.kernel("harmed", stderr=errors.file) as kernel:
        pids = all_pids(kernel)
        [job] = cluster.jobs()
        harm(kernel, job)
        kernel.manager.provisioner.process.wait(seconds)
        all_gone(cluster, pids, seconds)
    return errors.text()


def test_srun_killed(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    said = ends_with(jupyter, cluster, errors, lambda kernel, job: srun_of(kernel).kill())
    assert "srun: signal 9" in said


def test_srun_killed_before_the_number_of_its_job_is_known(jupyter: Jupyter, cluster: Slurm) -> None:
    """The allocation stays when srun is killed: Slurm is asked for what that session has submitted."""
    install(jupyter, "sudden", "--partition=far")
    manager = KernelManager(kernel_name="sudden")
    manager.start_kernel(env=jupyter.environ)
    try:
        wait_for(cluster.jobs, "the job", 10)
        keepers = psutil.Process(manager.provisioner.process.pid).children()
        for process in [child for keeper in keepers for child in keeper.children(recursive=True)]:
            process.kill()
        wait_for(lambda: not cluster.jobs(), "the end of the job", 10)
        wait_for(lambda: not processes("import marshal,sys,zlib"), "the end of the agent", 10)
    finally:
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def test_job_cancelled(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    said = ends_with(jupyter, cluster, errors, lambda kernel, job: cluster.run("scancel", job))
    assert re.search(r"The Slurm job \d+ was cancelled.", said), said
    log = jupyter.envkernel("log", "harmed").stdout
    assert re.search(r"\njob: \d+\n", log), log
    assert re.search(r"\nreason: The Slurm job \d+ was cancelled.", log), log


def test_time_limit(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    def expire(kernel: Kernel, job: str) -> None:
        cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now")  # looked at every 30 s

    said = ends_with(jupyter, cluster, errors, expire, 40)
    assert "has reached its time limit" in said, said


def test_out_of_memory(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    def fill(kernel: Kernel, job: str) -> None:
        kernel.client.execute("b = bytes(range(256)) * 2_400_000; import time; time.sleep(60)")

    said = ends_with(jupyter, cluster, errors, fill, 20, ("--mem=300M",))
    assert "has used more memory than it asked for" in said, said


def test_node_that_is_lost(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    """The network to the node breaks: each side gives the other up within 30 s."""
    install(jupyter, "lost", "--partition=far")
    try:
        with jupyter.kernel("lost", stderr=errors.file) as kernel:
            pids = all_pids(kernel)
            subprocess.run(["ip", "link", "set", cluster.link, "down"], check=True)
            wait_for(lambda: not alive(pids), f"the end of {pids}", 30)
    finally:
        subprocess.run(["ip", "link", "set", cluster.link, "up"], check=True)
        cluster.repair("far")
    assert "has not answered for 20 s" in errors.text()


def test_node_that_crashes(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    """slurmd and slurmstepd are gone at once; srun does not notice."""

    def crash(kernel: Kernel, job: str) -> None:
        agent = psutil.Process(int(kernel.value("__import__('os').getppid()")))
        steps = [process for process in agent.parents() if process.name().startswith("slurmstepd")]
        cluster.end("slurmd-far", signal.SIGKILL)
        for step in steps:
            step.kill()

    install(jupyter, "crashed", "--partition=far")
    try:
        with jupyter.kernel("crashed", stderr=errors.file) as kernel:
            pids = all_pids(kernel)
            crash(kernel, cluster.jobs()[0])
            wait_for(lambda: not alive(pids), f"the end of {pids}", 10)
            cluster.run("scontrol", "update", "NodeName=far", "State=DOWN", "Reason=crashed")
            wait_for(lambda: not cluster.jobs(), "the end of the job", 5)
    finally:
        cluster.repair("far")
    assert re.search("The node far broke off the connection|of Slurm job .* has failed", errors.text())


def test_node_that_slurm_sets_down(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    def set_down(kernel: Kernel, job: str) -> None:
        cluster.run("scontrol", "update", "NodeName=far", "State=DOWN", "Reason=test")

    try:
        said = ends_with(jupyter, cluster, errors, set_down)
    finally:
        cluster.repair("far")
    assert re.search(r"The node of Slurm job \d+ has failed.", said), said


def test_keeper_killed(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    said = ends_with(jupyter, cluster, errors, lambda kernel, job: run_process(kernel).children()[0].kill())
    assert "The process that keeps the job was killed" in said


def test_agent_killed(jupyter: Jupyter, cluster: Slurm, errors: Errors) -> None:
    def kill(kernel: Kernel, job: str) -> None:
        os.kill(int(kernel.value("__import__('os').getppid()")), signal.SIGKILL)

    said = ends_with(jupyter, cluster, errors, kill)
    assert "has ended (srun: exit status 137)" in said


# ---- what can't work is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--partition=nosuch",), "Invalid partition name specified"),
        (("--mem=9999G",), "Requested node configuration is not available"),
        (("--gres=gpu:1",), "Invalid generic resource"),
    ],
)
def test_setup_says_what_slurm_refuses(
    jupyter: Jupyter, cluster: Slurm, options: tuple[str, ...], message: str
) -> None:
    said = jupyter.envkernel(
        "slurm", "--name=no", "--user", *options, "--", sys.executable, *COMMAND, status=1
    )
    assert message in said.stderr
    assert not (jupyter.kernels / "no").exists()


def test_setup_says_that_it_can_look_on_this_host_only(jupyter: Jupyter, cluster: Slurm) -> None:
    typed = ("--partition=far", "--", "virtualenv", "/nowhere/env")
    said = jupyter.envkernel("slurm", "--name=no", "--user", *typed, status=1)
    assert "There is no virtualenv at /nowhere/env" in said.stderr
    assert "The nodes may have it, but setup can only look on this host." in said.stderr


def test_unknown_option_is_refused(jupyter: Jupyter, cluster: Slurm) -> None:
    said = jupyter.envkernel("slurm", "--name=no", "--user", "--partitoin=x", status=2)
    assert "--partition" in said.stderr


def test_missing_python_on_the_node(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "nopy", "--partition=far", "--node-python=/nosuch/python3")
    with jupyter.kernel("nopy") as kernel:
        text, error = kernel.execute("1")
        assert "has no such Python" in str(error) + text


def test_missing_environment_on_the_node(
    jupyter: Jupyter, cluster: Slurm, kernel_venv: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    venv.symlink_to(kernel_venv)
    install(jupyter, "gone", "--partition=far", chain=("virtualenv", str(venv)))
    venv.unlink()
    with jupyter.kernel("gone") as kernel:
        text, error = kernel.execute("1")
        assert "There is no virtualenv at" in str(error) + text


def test_missing_ipykernel_on_the_node(jupyter: Jupyter, cluster: Slurm) -> None:
    install(jupyter, "bare", "--partition=far", chain=("/usr/bin/python3", "-S", *COMMAND))
    with jupyter.kernel("bare") as kernel:
        text, error = kernel.execute("1")
        assert "There is no ipykernel_launcher in the PATH of node far" in str(error) + text
        assert "install ipykernel on the nodes" in str(error) + text
