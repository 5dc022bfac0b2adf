"""Cluster modes: what is planned, what Slurm's words mean, and the proof between relay and agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import tempfile
import time
import unittest.mock
from pathlib import Path
from typing import Any, Sequence

import hypothesis
import hypothesis.strategies as st
import pytest

import envkernel
from envkernel import Launch, Output, Plan, Step, UserError
from support.host import FakeHost

SRUN = "/opt/slurm/bin/srun"
COMMAND = ["python3", "-m", "ipykernel_launcher", "-f", envkernel.CONNECTION_FILE]


def host(**given: Any) -> FakeHost:
    return FakeHost(programs={SRUN, "/usr/bin/ssh"}, **given)


def plan(options: dict[str, Any], engine: list[str], environ: dict[str, str], srun: str = SRUN) -> Plan:
    rest = Launch([Step("virtualenv", {}, ["/env"])], COMMAND, {"name": "x"})
    step = Step("slurm", {"srun": srun, **options}, [], engine)
    return envkernel.plan_slurm(step, Plan(COMMAND, environ), FakeHost(programs={srun}), rest)


def test_slurm_plan() -> None:
    environ = {"PATH": "/bin", "JPY_PARENT_PID": "7", "JUPYTERHUB_API_TOKEN": "secret", "SLURM_CONF": "/c"}
    argv = [SRUN, "--nodes=1", "--ntasks=1", "--job-name=x", "--partition=gpu", "--gres", "gpu:1"]
    argv += ["python3", "-I", "-S", "-c", envkernel.NODE_BOOT]
    kept = {"PATH": "/bin", "SLURM_CONF": "/c"}
    rest = Launch([Step("virtualenv", {}, ["/env"])], COMMAND, {"name": "x"})
    assert plan({}, ["--partition=gpu", "--gres", "gpu:1"], environ) == Plan(
        argv,
        kept,
        where="the Slurm job",
        install="install %s on the nodes",
        job=envkernel.SlurmJob(argv, kept, rest, {}),
    )


def test_slurm_plan_takes_the_name_and_python_that_were_given() -> None:
    argv = plan({"node-python": "/opt/py/bin/python"}, ["--job-name=mine"], {}).argv
    assert argv[3:6] == ["--job-name=mine", "/opt/py/bin/python", "-I"]


def test_job_inside_a_job_is_a_new_one() -> None:
    inside = {"SLURM_JOB_ID": "5", "SLURM_CPUS_ON_NODE": "1", "SLURM_CONF": "/c", "HOME": "/h"}
    assert plan({}, [], inside).environ == {"SLURM_CONF": "/c", "HOME": "/h"}
    assert plan({}, ["--jobid=5"], inside).environ == inside


def test_directories_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    assert plan({}, [], {}).job.directories("/n") == ["/n", "/home/u"]
    assert plan({}, ["--chdir=/x"], {}).job.directories("/n") == []
    assert plan({}, [], {"SLURM_WORKING_DIR": "/x"}).job.directories("/n") == []
    files = {"envkernel.py": "/e"}
    job = envkernel.YarnJob([], {}, Launch([], []), {}, {"files": files})
    assert job.directories("/n") == ["/n"]
    job.spec["files"]["a"] = "/a"
    assert job.directories("/n") == [], "the files are in the container's own directory"


def test_first_directory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/")
    envkernel.enter_directory([], "n1")
    assert os.getcwd() == "/"
    envkernel.enter_directory([str(tmp_path), "/usr"], "n1")
    assert os.getcwd() == str(tmp_path)
    envkernel.enter_directory([f"{tmp_path}/no", "/usr"], "n1")
    assert os.getcwd() == "/usr"
    said = capfd.readouterr().err
    assert said == f"envkernel: The node n1 has no directory {tmp_path}/no: the kernel starts in /usr.\n"


def test_options_of_the_job() -> None:
    options = {"queue-timeout": "60", "linger": "0.5", "tunnel": "ssh", "tunnel-program": "/usr/bin/ssh"}
    job = plan({**options, "node-ports": "5000-5009", "node-transport": "tcp"}, [], {}).job
    assert job is not None
    assert (job.queue_timeout, job.linger, job.tunnel) == (60, 0.5, "/usr/bin/ssh")
    assert (job.node_ports, job.transport) == ("5000-5009", "tcp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue-timeout": "soon"}, "--queue-timeout takes seconds, not 'soon'"),
        ({"linger": "x"}, "--linger takes seconds"),
        ({"node-ports": "70-60"}, "no range of ports"),
        ({"node-ports": "ssh"}, "no range of ports"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, str], message: str) -> None:
    with pytest.raises(envkernel.UserError, match=message) as caught:
        envkernel.setup_slurm(Step("slurm", options), host(), {"PATH": "/opt/slurm/bin"}, {})
    assert caught.value.status == 2


def setup(status: int, said: bytes, engine: list[str]) -> Step:
    argv = (SRUN, "--test-only", "--nodes=1", "--ntasks=1", *engine, "true")
    world = host(answers={argv: Output(status, b"", said)})
    return envkernel.setup_slurm(Step("slurm", {}, [], engine), world, {"PATH": "/bin:/opt/slurm/bin"}, {})


def test_setup_records_srun() -> None:
    assert setup(0, b"srun: Job 3 to start at ...", ["--mem=1G"]) == Step(
        "slurm", {"srun": SRUN}, [], ["--mem=1G"]
    )


def test_setup_asks_slurm_whether_it_would_take_the_job() -> None:
    said = (
        b"srun: error: invalid partition specified: x\nallocation failure: Invalid partition name specified"
    )
    with pytest.raises(envkernel.UserError) as caught:
        setup(1, said, ["--partition=x"])
    assert caught.value.message == "Slurm refuses the job: Invalid partition name specified."
    assert "sinfo" in caught.value.hint
    assert caught.value.status == 1


def test_setup_without_slurm() -> None:
    with pytest.raises(envkernel.UserError, match="no srun on this machine"):
        envkernel.setup_slurm(Step("slurm"), host(), {"PATH": "/bin"}, {})


def test_setup_finds_ssh_for_the_tunnel() -> None:
    options = {"tunnel": "ssh"}
    found = envkernel.check_node_options(options, host(), {"PATH": "/usr/bin"})
    assert found == {"tunnel": "ssh", "tunnel-program": "/usr/bin/ssh"}
    with pytest.raises(envkernel.UserError, match="no ssh"):
        envkernel.check_node_options(options, host(), {"PATH": "/bin"})


@pytest.mark.parametrize("option", ["--pty", "--nodes=2", "--input=none", "--multi"])
def test_options_of_srun_that_a_kernel_cannot_have(option: str) -> None:
    with pytest.raises(envkernel.UserError, match="can't be used") as caught:
        setup(0, b"", [option])
    assert caught.value.status == 2


def test_srun_state() -> None:
    job = plan({}, [], {}).job
    assert job is not None
    said = "hello\nsrun: job 12 queued and waiting for resources\n"
    assert job.read_state("", "") == ("", False, "")
    assert job.read_state(said, "") == ("12", True, "")
    assert job.read_state(said + "srun: job 12 has been allocated resources\n", "") == ("12", False, "")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "slurmstepd: error: *** STEP 4.0 ON far CANCELLED AT 2026-11-21T03:00:00 DUE TO TIME LIMIT ***",
            "The Slurm job 4 has reached its time limit.",
        ),
        (
            "slurmstepd: error: *** STEP 4.0 ON far CANCELLED AT 2026-11-21T03:00:00 ***",
            "The Slurm job 4 was cancelled.",
        ),
        ("srun: Job allocation 4 has been revoked", "The Slurm job 4 was cancelled."),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=4.0.",
            "The Slurm job 4 has used more memory than it asked for.",
        ),
        ("srun: error: Node failure on far", "The node of Slurm job 4 has failed."),
        (
            "slurmstepd: error: execve(): python9: No such file or directory",
            "The node of Slurm job 4 has no such Python.",
        ),
        (
            "srun: error: Unable to allocate resources: Unable to contact slurm controller (connect failure)",
            "Slurm does not answer.",
        ),
        (
            "srun: error: Unable to allocate resources: Requested node configuration is not available",
            "Slurm refuses the job: Requested node configuration is not available.",
        ),
        ("srun: something else", "The Slurm job 4 has ended (srun: exit status 1)."),
        ("the kernel's last wordssrun: Job allocation 4 has been revoked", "The Slurm job 4 was cancelled."),
        ("a kernel's oom", "The Slurm job 4 has ended (srun: exit status 1)."),
    ],
)
def test_why_a_job_ended(said: str, message: str) -> None:
    job = plan({}, [], {}).job
    assert job is not None
    message_here = "The Slurm job 4 has ended (srun: exit status 1)."
    error = asyncio.run(job.explain(message_here, said + "\na line of the kernel", "4", answers({})))
    assert error.message == message
    assert "kernel" not in error.detail


def answers(known: dict[tuple[str, ...], Output]) -> Any:
    """What `JobProgram.ask` returns."""

    async def ask(argv: Sequence[str]) -> Output:
        return known.get(tuple(argv), Output(127))

    return ask


ABORTED = "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"
STATE = ("/opt/slurm/bin/squeue", "-h", "-t", "all", "-j", "4", "-o", "%T")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"CANCELLED\n", "The Slurm job 4 was cancelled."),
        (b"TIMEOUT\n", "The Slurm job 4 has reached its time limit."),
        (b"NODE_FAIL\n", "The node of Slurm job 4 has failed."),
        (b"OUT_OF_MEMORY\n", "The Slurm job 4 has used more memory than it asked for."),
        (b"FAILED\n", "The Slurm job 4 has ended (srun: signal 9)."),
        (b"", "The Slurm job 4 has ended (srun: signal 9)."),
    ],
)
def test_slurm_is_asked_where_srun_does_not_say_why(state: bytes, message: str) -> None:
    job = plan({}, [], {}).job
    assert job is not None
    ended = "The Slurm job 4 has ended (srun: signal 9)."
    error = asyncio.run(job.explain(ended, ABORTED, "4", answers({STATE: Output(0, state)})))
    assert error.message == message


def test_pending_job_is_explained_by_squeue() -> None:
    job = plan({}, [], {}).job
    argv = (SRUN.replace("srun", "squeue"), "-h", "-j", "4", "-t", "PENDING", "-o", "%r|%S")

    def pending(said: bytes) -> str:
        return asyncio.run(job.pending("4", answers({argv: Output(0, said)})))

    assert pending(b"Resources|N/A\n") == "Slurm job 4 waits: Resources (no node has enough room)"
    later = "Slurm job 4 waits: QOSGrpMem; expected start 2001-11-21 10:00"
    assert pending(b"QOSGrpMem|2001-11-21T10:00:00\n") == later
    today = time.strftime("%Y-%m-%dT12:49:30")
    assert pending(f"QOSGrpMem|{today}".encode()).endswith("; expected start 12:49")
    assert pending(b"") == ""
    assert asyncio.run(job.pending("4", answers({}))) == ""


@pytest.mark.parametrize(("answers", "status"), [(True, 0), (False, 1)])
def test_cancel_finds_the_job_by_the_session_of_its_srun(tmp_path: Path, answers: bool, status: int) -> None:
    """An id is not needed: srun may have been killed before it said it."""
    old, new = "2020-01-01T00:00:00", "2099-01-01T00:00:00"
    rows = f"7 41 {new} 8 42 {old} 9 42 {new} 10 421 {new}"
    squeue = f"printf '%-20s%-20s%-20s\\n' {rows}" if answers else "exit 1"
    for name, code in (("squeue", squeue), ("scancel", f'echo "$@" >> {tmp_path}/cancelled')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    job = plan({}, [], {}, f"{tmp_path}/srun").job
    done = subprocess.run(job.cancel(42, ""), check=False)
    assert done.returncode == status, "where Slurm does not answer it has to be tried again"
    assert not answers or (tmp_path / "cancelled").read_text() == "--quiet 9\n"
    assert job.cancel(42, "12") == [f"{tmp_path}/scancel", "--quiet", "12"]
    assert plan({}, ["--jobid=5"], {}).job.cancel(42, "5") == [], "the user's own job"


def test_agent_listens_within_the_range_of_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(envkernel.UserError, match=f"--node-ports={port}-{port} can be opened") as caught:
            envkernel.listen_on_node({"tunnel": "ssh", "node-ports": f"{port}-{port}"}, {})
        assert "wider range" in caught.value.hint
        sock = envkernel.listen_on_node({"tunnel": "ssh", "node-ports": f"{port}-{port + 9}"}, {})
        assert port < sock.getsockname()[1] <= port + 9
        sock.close()


def test_memory_of_a_container_is_what_all_its_processes_have() -> None:
    me = os.getpid()
    page = os.sysconf("SC_PAGESIZE")
    files = {
        f"/proc/{me}/statm": b"9 %d 0" % ((10 << 20) // page),
        f"/proc/{me}/task/{me}/children": b"77 ",
        "/proc/77/statm": b"9 %d 0" % ((600 << 20) // page),
    }
    problem = envkernel.over_memory({"SKEIN_RESOURCE_MEMORY": "512"}, host(files=files), me)
    assert problem is not None
    assert problem["message"].endswith("than it asked for: 610 of 512 MiB.")
    assert problem["hint"] == "Ask for more: --memory=1220."
    assert envkernel.over_memory({"SKEIN_RESOURCE_MEMORY": "1024"}, host(files=files), me) is None
    assert envkernel.over_memory({}, host(files=files), me) is None


def test_kills_for_want_of_memory_are_counted() -> None:
    one = {"/proc/self/cgroup": b"5:devices:/x\n4:memory:/slurm/a b\n0::/\n"}
    one["/sys/fs/cgroup/memory/slurm/a b/memory.oom_control"] = b"under_oom 0\noom_kill 3\n"
    two = {"/proc/self/cgroup": b"0::/job\n", "/sys/fs/cgroup/job/memory.events": b"oom 9\noom_kill 2\n"}
    assert [envkernel.memory_kills(host(files=files)) for files in (one, two, {})] == [3, 2, 0]


PACKED = ["bin/activate", "./bin/python", "lib/python3.11/site-packages/skein/__init__.py"]
IPYKERNEL = "lib/python3.11/site-packages/ipykernel_launcher.py"


YARN_PROGRAMS = ("/usr/bin/java", "/usr/bin/yarn", "/cwd/e.tar.gz")
YARN_HOST = FakeHost(programs=YARN_PROGRAMS)


def yarn_setup(
    names: list[str] | None, options: dict[str, Any], path: str = "/usr/bin", **given: Any
) -> Step:
    world = FakeHost(programs=YARN_PROGRAMS, **given)
    with unittest.mock.patch.object(envkernel, "archive_names", return_value=names):
        return envkernel.setup_yarn(Step("yarn", options, ["e.tar.gz"]), world, {"PATH": path}, {})


def queue_answers(status: int, out: bytes, queue: str = "default") -> dict[Any, Output]:
    return {(*envkernel.yarn_client(), "check", queue): Output(status, out)}


def test_yarn_setup_makes_paths_absolute() -> None:
    step = yarn_setup(
        [*PACKED, IPYKERNEL],
        {"queue": "big", "file": ["a.ini=conf/a.ini"]},
        files={"/cwd/conf/a.ini": b""},
        answers=queue_answers(0, b"", "big"),
    )
    options = {"queue": "big", "file": ["a.ini=/cwd/conf/a.ini"]}
    assert step == Step("yarn", options, ["/cwd/e.tar.gz"])


@pytest.mark.parametrize(
    ("names", "options", "path", "message", "status"),
    [
        (None, {}, "/usr/bin", "There is no packed environment /cwd/e.tar.gz", 1),
        (["bin/python"], {}, "/usr/bin", "has no bin/activate", 1),
        (PACKED[:2], {}, "/usr/bin", "has no skein", 1),
        (PACKED, {}, "/usr/bin", "has no ipykernel", 1),
        ([*PACKED, IPYKERNEL], {}, "/nowhere", "There is no java on this machine", 1),
        ([*PACKED, IPYKERNEL], {"memory": "2G"}, "/usr/bin", "--memory takes a number, not '2G'", 2),
        ([*PACKED, IPYKERNEL], {"vcores": "0"}, "/usr/bin", "--vcores takes a number", 2),
        ([*PACKED, IPYKERNEL], {"file": ["x"]}, "/usr/bin", "names no file", 2),
        ([*PACKED, IPYKERNEL], {"file": ["../x=/y"]}, "/usr/bin", "names no file", 2),
        ([*PACKED, IPYKERNEL], {"file": ["x=/y"]}, "/usr/bin", "There is no /y to send along", 1),
    ],
)
def test_yarn_setup_says_what_is_missing(
    names: list[str] | None, options: dict[str, Any], path: str, message: str, status: int
) -> None:
    with pytest.raises(envkernel.UserError) as caught:
        yarn_setup(names, options, path)
    assert message in caught.value.message
    assert caught.value.status == status


def test_yarn_setup_passes_on_what_the_helper_says() -> None:
    error = b'{"message": "YARN has no queue x.", "hint": "h", "status": 1, "detail": ""}'
    said = envkernel.ANNOUNCES + b'{"error": ' + error + b"}\n"
    with pytest.raises(envkernel.UserError, match="YARN has no queue x"):
        yarn_setup([*PACKED, IPYKERNEL], {"queue": "x"}, answers=queue_answers(1, said, "x"))
    with pytest.raises(envkernel.UserError, match="Skein could not speak with YARN"):
        yarn_setup([*PACKED, IPYKERNEL], {"queue": "x"}, answers=queue_answers(1, b"", "x"))


def test_yarn_plan() -> None:
    rest = Launch([], COMMAND, {"name": "x"})
    step = Step("yarn", {"memory": "2048", "vcores": "2", "queue": "q", "file": ["a=/a"]}, ["/cwd/e.tar.gz"])
    environ = {"HADOOP_CONF_DIR": "/c", "JPY_PARENT_PID": "7"}
    argv = [*envkernel.yarn_client(), "submit"]
    spec = {
        "name": "x",
        "queue": "q",
        "memory": 2048,
        "vcores": 2,
        "environment": "/cwd/e.tar.gz",
        "files": {"a": "/a", "envkernel.py": os.path.abspath(envkernel.__file__)},
    }
    assert envkernel.plan_yarn(step, Plan(COMMAND, environ), YARN_HOST, rest) == Plan(
        argv,
        {"HADOOP_CONF_DIR": "/c"},
        where="the YARN container",
        install="install %s in the environment and pack /cwd/e.tar.gz again",
        job=envkernel.YarnJob(argv, {"HADOOP_CONF_DIR": "/c"}, rest, step.options, spec),
    )
    with pytest.raises(envkernel.UserError, match=r"There is no /gone.tar.gz any more"):
        envkernel.plan_yarn(step.replace(targets=["/gone.tar.gz"]), Plan([], {}), YARN_HOST, rest)


def test_yarn_state() -> None:
    job = envkernel.YarnJob([], {}, Launch([], []), {}, {})
    said = "x\nenvkernel: YARN application application_1_0002 waits: ACCEPTED\n"
    waits = "YARN application application_1_0002 waits: ACCEPTED"
    assert job.read_state(said, "") == ("application_1_0002", False, waits)
    assert job.read_state("", "application_1_0002") == ("application_1_0002", False, "")
    submitted = "envkernel: YARN application application_1_0002 was submitted.\n"
    assert job.read_state(submitted, "") == ("application_1_0002", False, "")


def test_no_text_of_the_user_is_in_the_containers_script() -> None:
    assert envkernel.YARN_SCRIPT == (
        "source environment/bin/activate\nexport PATH\nexec python -I envkernel.py yarn agent\n"
    )


def test_node_connection() -> None:
    jupyter = {"ip": "127.0.0.1", "transport": "tcp", "key": "k", "curve_secretkey": "c"}
    jupyter.update({name + "_port": 5000 for name in envkernel.STREAMS})  # type: ignore[misc]
    own = envkernel.node_connection(jupyter, "ipc", "/tmp/f")
    assert own == {
        "ip": "/tmp/f/kernel",
        "transport": "ipc",
        "key": "k",
        "curve_secretkey": "c",
        "shell_port": 1,
        "iopub_port": 2,
        "stdin_port": 3,
        "control_port": 4,
        "hb_port": 5,
    }
    ports = envkernel.node_connection({**jupyter, "ip": "*"}, "tcp", "/tmp/f")
    assert ports["ip"] == "127.0.0.1"
    assert len({ports[name + "_port"] for name in envkernel.STREAMS}) == 5


def test_directories_that_nobody_uses_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays where all processes of a node were killed at once."""
    with tempfile.TemporaryDirectory(prefix="ek", dir="/tmp") as root:  # for the paths of unix sockets
        monkeypatch.setenv("TMPDIR", root)
        stale, stale_lock = envkernel.make_node_directory()
        os.close(stale_lock)
        used, lock = envkernel.make_node_directory()
        again, second = envkernel.make_node_directory()
        names = {os.path.basename(path) + end for path in (used, again) for end in ("", ".lock")}
        assert set(os.listdir(os.path.dirname(stale))) == names
        for path in (used, again):
            envkernel.remove_node_directory(path)
        assert os.listdir(root) == []
        os.close(lock)
        os.close(second)


async def shake(ours: bytes, theirs: bytes) -> tuple[socket.socket, socket.socket, list[Any]]:
    """Let keeper and agent prove their secrets to each other; also returns what each came to."""
    left, right = socket.socketpair()
    for sock in (left, right):
        sock.setblocking(False)
    steps = (envkernel.shake_hands(left, ours, 3), envkernel.shake_hands(right, theirs))

    async def closing(step: Any, sock: socket.socket) -> Any:
        try:
            return await step
        except OSError:
            sock.close()
            raise

    ends = [closing(step, sock) for step, sock in zip(steps, (left, right))]
    return left, right, await asyncio.gather(*ends, return_exceptions=True)


def test_sides_with_the_same_secret_find_each_other() -> None:
    left, right, (_, number) = asyncio.run(shake(b"s" * 32, b"s" * 32))
    assert number == 3
    left.send(b"x")
    assert right.recv(9) == b"x"  # nothing of the proof is left in the stream
    left.close()
    right.close()


def test_wrong_secret_gets_nothing() -> None:
    _, _, results = asyncio.run(shake(b"s" * 32, b"t" * 32))
    assert all(isinstance(result, ConnectionError) for result in results)


def serving_agent() -> tuple[envkernel.Agent, socket.socket]:
    """An agent without a kernel, and the socket on which it listens."""
    listener = envkernel.listen_on_node({"tunnel": "ssh", "node-ports": ""}, {})
    near, far = map(envkernel.Channel, socket.socketpair())
    orders = {"secret": b"s".hex() * 32, "tunnel": "", "announce-to": 0}
    agent = envkernel.Agent(orders, listener, near, os.pipe()[0])
    agent.far = far  # it stays open
    return agent, listener


async def send_ping(listener: socket.socket) -> bytes:
    """Return what the agent answers to the keeper."""
    sock = socket.create_connection(listener.getsockname())
    sock.setblocking(False)
    await envkernel.shake_hands(sock, b"s" * 32, envkernel.ORDERS)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b'{"ping": 1}\n')
    answer = await asyncio.wait_for(reader.readline(), 5)
    writer.write(b'{"end": true}\n')
    return answer


def test_a_thousand_idle_strangers_do_not_keep_the_owner_out() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def scenario() -> None:
        agent, listener = serving_agent()
        serving = asyncio.ensure_future(agent.run())
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection(listener.getsockname()))
                await asyncio.sleep(0)
            assert await send_ping(listener) == b'{"pong": 1}\n'
            assert await asyncio.wait_for(serving, 5) == 0

    asyncio.run(scenario())


def test_stranger_learns_nothing_and_is_dropped() -> None:
    async def scenario() -> None:
        agent, listener = serving_agent()
        serving = asyncio.ensure_future(agent.run())
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: node\r\nUser-Agent: a stranger\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        assert await send_ping(listener)
        await serving

    asyncio.run(scenario())


def run_agent_with(steps: Any) -> int:
    """Return the status of an agent that serves while steps are taken; its loop must not complain."""

    async def scenario() -> int:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        agent, listener = serving_agent()
        serving = asyncio.ensure_future(agent.run())
        await steps(listener)
        if not serving.done():
            assert await send_ping(listener) == b'{"pong": 1}\n'
        status = await asyncio.wait_for(serving, 5)
        assert complaints == []
        return status

    return asyncio.run(scenario())


REPLAY = envkernel.HANDSHAKE + bytes((envkernel.ORDERS,)) + b"n" * 32
FUZZ = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


@FUZZ
@hypothesis.given(st.lists(st.binary(max_size=80), max_size=4), st.booleans())
@hypothesis.example([REPLAY, b"p" * 32], True)
@hypothesis.example([REPLAY[:-1]], False)
@hypothesis.example([envkernel.HANDSHAKE + b"\xff" + b"n" * 32], False)
def test_any_bytes_at_the_agents_port(chunks: list[bytes], is_shut: bool) -> None:
    async def stranger(listener: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        for chunk in chunks:
            writer.write(chunk)
            await asyncio.sleep(0)
        if is_shut:
            writer.write_eof()
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            said = await asyncio.wait_for(reader.read(), 0.02)
            assert said == b"" or len(said) == 64  # at most its own proof
        writer.close()

    assert run_agent_with(stranger) == 0


ORDER = st.dictionaries(
    st.sampled_from(["ping", "signal", "start", "x"]),
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
    max_size=3,
)


@FUZZ
@hypothesis.given(st.lists(ORDER.map(json.dumps).map(str.encode) | st.binary(max_size=60), max_size=4))
@hypothesis.example([b"[" * 100_000])
@hypothesis.example([b"1"])
@hypothesis.example([b'{"signal": "x"}', b'{"start": null}'])
def test_any_order_to_the_agent(lines: list[bytes]) -> None:
    """Garbage ends the connection, as the keeper's death would; nothing is raised."""

    async def keeper(listener: socket.socket) -> None:
        sock = socket.create_connection(listener.getsockname())
        sock.setblocking(False)
        await envkernel.shake_hands(sock, b"s" * 32, envkernel.ORDERS)
        reader, writer = await asyncio.open_connection(sock=sock)
        for line in lines:
            writer.write(line + b"\n")
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(reader.read(), 0.02)
        writer.close()
        await asyncio.sleep(0.02)

    with unittest.mock.patch.object(envkernel, "send_signals"):  # would reach the test's own parent
        assert run_agent_with(keeper) == 0


def test_agent_ends_when_no_keeper_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envkernel, "SLOW_PATIENCE", 0.1)

    async def scenario() -> int:
        agent, _ = serving_agent()
        return await asyncio.wait_for(agent.run(), 5)

    assert asyncio.run(scenario()) == 0


def test_what_a_killed_keeper_left_is_removed(tmp_path: Path) -> None:
    def remove_stale(base: str) -> None:
        for recipe, stale_lock in envkernel.stale_recipes(base):
            envkernel.clean_up(recipe, {}, [stale_lock])

    base = tmp_path / "base"
    gone, alive = f"{base}/job-1", f"{base}/job-2"
    for directory in (gone, alive):
        lock = envkernel.take_lock(directory + ".lock")
        os.mkdir(directory)
        Path(directory, "keeper").touch()
        if directory == gone:
            os.close(lock)
    Path(f"{base}/other").touch()
    remove_stale(str(base))
    assert sorted(os.listdir(base)) == ["job-2", "job-2.lock", "other"]
    os.close(lock)
    remove_stale(str(base))
    assert os.listdir(base) == ["other"]
    remove_stale(f"{base}/nothing")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"srun: fatal: Could not establish a configuration source", "Slurm does not answer."),
        (b"srun: error: x", "Slurm can't be asked whether it takes such a job (srun: exit status 1)."),
    ],
)
def test_a_slurm_that_cannot_be_asked_has_no_job(said: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        setup(1, said, [])
    assert caught.value.message == message
    assert caught.value.detail == said.decode()
    assert "sinfo" in caught.value.hint


def test_misspelt_option_where_srun_finds_no_cluster() -> None:
    said = b"srun: fatal: Could not establish a configuration source"
    world = host(answers={(SRUN, "--help"): Output(1, b"", said)})
    with pytest.raises(UserError, match="Slurm does not answer") as caught:
        envkernel.EngineOptions([[SRUN]], world, {})
    assert "sinfo" in caught.value.hint


def test_what_a_kernel_says_is_no_news_of_its_own_job() -> None:
    """A kernel that runs srun itself has lines of srun's on its stderr."""
    for is_there, number in ((False, "4711"), (True, "4")):
        submission = object.__new__(envkernel.Submission)
        submission.keeper, submission.job, submission.id = unittest.mock.Mock(), plan({}, [], {}).job, "4"
        submission.keeper.tail = b"srun: job 4711 queued and waiting for resources\n"
        submission.keeper.launch.options = {}
        submission.agent, submission.waits, submission.state = unittest.mock.Mock(), True, ""
        submission.agent.done.return_value = is_there
        assert submission.on_stderr(b"x") == b"x"
        assert submission.id == number
