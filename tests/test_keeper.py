"""Keeper: run process and keeper, and that nothing is left of it however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any, Callable, Iterator

import psutil
import pytest

import envkernel

DRIVER = """
import json, os, sys
import envkernel

class Lingering(envkernel.Program):
    # Survives its run process as a job does; a restart is a new process.

    digest, what = "digest", "job"

    async def attach(self):
        os.kill(self.pid, 9)
        self.sockets.clear()
        for number in range(1, 6):  # a kernel that is slow to die still listens
            os.unlink(f"{self.supervision.relay['ip']}-{number}")
        read, end = os.pipe()
        self.stderr = read
        self.pid = envkernel.spawn(self.plan.argv, self.plan.environ, err=end)
        os.close(end)

    async def wait(self):
        end = await super().wait()
        self.over = False
        return end

class Faulty(envkernel.Program):  # its keeper meets a fault of our own
    async def wait(self):
        raise KeyError("a fault")

envkernel.Keeper.HOLD = 60  # the clients of these tests are no ZeroMQ, however slow the machine is
reported = json.loads(sys.argv[1])
supervision = envkernel.Supervision(reported.pop("directory"), **reported.pop("supervision"))
plan = envkernel.Plan(reported.pop("argv"), {**os.environ, **reported.pop("environ", {})}, where="a test")
supervision.files = [(path, text.encode()) for path, text in supervision.files]
try:
    launch = envkernel.Launch([], [], reported["options"])
    Lingering.linger = launch.options.get("linger", 0)
    program = Lingering if Lingering.linger else Faulty if "faulty" in launch.options else envkernel.Program
    sys.exit(envkernel.keep(program(plan, supervision, envkernel.Host()), launch))
except envkernel.UserError as error:
    os.write(2, envkernel.error_text(error))
    sys.exit(77)
"""
"""Does what `run` does with a plan; 77 means the error kernel."""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    directory = tmp_path / "base" / "kernel"

    def start(
        argv: list[str], environ: dict[str, str] | None = None, **supervision: Any
    ) -> subprocess.Popen[bytes]:
        options = supervision.pop("options", {})
        reported = {
            "directory": supervision.pop("directory", str(directory)),
            "argv": argv,
            "supervision": supervision,
            "environ": environ or {},
            "options": options,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(reported)],
            cwd=os.path.dirname(envkernel.__file__),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    with contextlib.suppress(OSError, ValueError):  # one that waits for a restart
        os.kill(json.loads(Path(f"{directory}.lock").read_text())["session"], signal.SIGTERM)
    assert until(lambda: not directory.parent.exists(), 10)


def until(true: Callable[[], Any], seconds: float = 5) -> Any:
    """Wait until something is true; return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = true()
        if value:
            return value
        time.sleep(0.02)
    return true()


def ended(process: psutil.Process) -> bool:
    """Return whether a process is over, even where nobody has taken its exit status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def read_pid(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text()))


SLEEPER = "import os, sys, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"


def test_directory_and_files_are_private_and_gone_with_the_program(tmp_path: Path, launch: Any) -> None:
    directory = tmp_path / "base" / "kernel"
    pid_file = tmp_path / "pid"
    process = launch(python(SLEEPER.format(str(pid_file))), files=[(f"{directory}/sub/key", "secret")])
    pid = read_pid(pid_file)
    assert (directory / "sub" / "key").read_text() == "secret"
    modes = [
        stat.S_IMODE(path.stat().st_mode) for path in (directory.parent, directory, directory / "sub" / "key")
    ]
    assert modes == [0o700, 0o700, 0o600]
    os.kill(pid, signal.SIGKILL)
    assert process.wait(5) == 77
    assert until(lambda: not directory.parent.exists())


@pytest.mark.parametrize("how", ["group", "run process", "keeper"])
def test_sigkill_leaves_nothing(tmp_path: Path, launch: Any, how: str) -> None:
    directory = tmp_path / "base" / "kernel"
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    cleanup = [["/bin/sh", "-c", 'echo "$0" >> "$1"', "cleaned", str(mark)]]
    process = launch(python(SLEEPER.format(str(pid_file))), cleanup=cleanup)
    program = psutil.Process(read_pid(pid_file))
    keeper = program.parent()
    assert keeper.ppid() == process.pid
    assert os.getsid(keeper.pid) == os.getsid(program.pid) == keeper.pid
    if how == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "keeper":
        keeper.kill()
        _, err = process.communicate(timeout=5)
        assert process.returncode == 1
        assert b"The process that keeps the kernel was killed." in err
    else:
        process.kill()
    assert until(lambda: ended(program))
    assert until(lambda: not directory.parent.exists())
    assert mark.read_text() == "cleaned\n"
    assert until(lambda: ended(keeper), 10)


def test_a_keeper_that_is_killed_while_nobody_reads_stderr(tmp_path: Path, launch: Any) -> None:
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    cleanup = [["/bin/sh", "-c", 'echo "$0" >> "$1"', "cleaned", str(mark)]]
    process = launch(python(SLEEPER.format(str(pid_file))), cleanup=cleanup)
    program = psutil.Process(read_pid(pid_file))
    process.stderr.close()
    program.parent().kill()
    assert process.wait(5) == 1
    assert until(lambda: ended(program) and mark.exists())


@pytest.mark.parametrize(
    "text", ['{"directory": "/x/k", "session": 1, "boot": "b", "unheard of": 1}', '{"dir', ""]
)
def test_the_recipe_of_another_version_is_read_as_far_as_possible(tmp_path: Path, text: str) -> None:
    path = tmp_path / "k.lock"
    path.write_text(text)
    with open(path, "rb") as file:
        recipe = envkernel.read_recipe(file.fileno(), str(path))
    assert (recipe.directory, recipe.session) == ("/x/k" if text.endswith("}") else str(tmp_path / "k"), 0)


def test_the_key_is_in_no_reason(tmp_path: Path, launch: Any) -> None:
    code = "import sys; sys.stderr.write('the key is k-e-y'); sys.exit(3)"
    process = launch(python(code), connection={**Sockets(tmp_path).connection, "key": "k-e-y"})
    assert process.wait(10) == 77
    said = process.stderr.read().decode()
    assert said.count("k-e-y") == 1, "what the kernel itself has said"
    assert "the key is ***" in said


def test_what_both_left_is_removed_by_the_next_start(tmp_path: Path, launch: Any) -> None:
    """Run process and keeper are killed at once: another kernel's start cleans up."""
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    directory = tmp_path / "base" / "kernel"
    cleanup = [["/bin/sh", "-c", 'echo "$0" >> "$1"', "cleaned", str(mark)]]
    process = launch(python(SLEEPER.format(str(pid_file))), cleanup=cleanup)
    program = psutil.Process(read_pid(pid_file))
    os.kill(process.pid, signal.SIGSTOP)
    program.parent().kill()
    process.kill()
    process.wait()
    assert until(lambda: directory.exists() and program.is_running())
    other = launch(python("import time; time.sleep(1)"), directory=str(tmp_path / "base" / "other"))
    assert other.wait(5) == 77
    assert until(lambda: ended(program) and not directory.exists())
    assert mark.read_text() == "cleaned\n"


def test_end_of_jupyter_ends_the_program(tmp_path: Path) -> None:
    """Jupyter is between this test and the run process, and is killed."""
    directory, pid_file = tmp_path / "base" / "kernel", tmp_path / "pid"
    reported = {
        "directory": str(directory),
        "argv": python(SLEEPER.format(str(pid_file))),
        "supervision": {},
        "options": {},
    }
    jupyter = (
        "import os, subprocess, sys\n"
        "environ = {**os.environ, 'JPY_PARENT_PID': str(os.getpid())}\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], env=environ, start_new_session=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", jupyter, "-c", DRIVER, json.dumps(reported)],
        cwd=os.path.dirname(envkernel.__file__),
    )
    program = psutil.Process(read_pid(pid_file))
    run_process = program.parent().parent()
    process.kill()
    process.wait()
    assert until(lambda: ended(run_process) and ended(program))
    assert until(lambda: not directory.parent.exists())


def test_the_program_gets_the_keeper_as_jupyter(tmp_path: Path, launch: Any) -> None:
    mark = tmp_path / "mark"
    code = (
        f"import os; open({str(mark)!r}, 'w').write(os.environ['JPY_PARENT_PID'] + ' ' + str(os.getppid()))"
    )
    launch(python(code), {"JPY_PARENT_PID": "1"}).wait(5)
    first, second = mark.read_text().split()
    assert first == second


def test_the_next_start_waits_for_the_clean_up_of_the_last(tmp_path: Path, launch: Any) -> None:
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    slow = [["/bin/sh", "-c", 'sleep 1; echo cleaned > "$0" || true', str(mark)]]
    first = launch(python(SLEEPER.format(str(pid_file))), cleanup=slow)
    read_pid(pid_file)
    os.killpg(first.pid, signal.SIGKILL)
    second = launch(python(f"print(open({str(mark)!r}).read())"))
    out, _ = second.communicate(timeout=10)
    assert out == b"cleaned\n\n"


@pytest.mark.parametrize(("code", "status"), [("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_exit_status_of_a_kernel_that_had_answered(
    tmp_path: Path, launch: Any, code: str, status: int
) -> None:
    kernel = Sockets(tmp_path)
    process = launch(kernel.argv(then=code), connection=kernel.connection, relay=kernel.relay)
    client = kernel.client("shell")
    client.sendall(b"x" * 2000)
    assert len(client.recv(1 << 16)) > 0
    client.close()
    assert process.wait(10) == status


def test_a_kernel_that_never_answered_is_told_with_its_last_words(launch: Any) -> None:
    process = launch(python("import sys; sys.exit('No module named ipykernel')"))
    _, err = process.communicate(timeout=10)
    assert process.returncode == 77
    assert b"The kernel in a test ended before it answered (exit status 1)." in err
    assert err.count(b"No module named ipykernel\n") == 2  # passed on, and reported
    assert b"install ipykernel" in err


def test_stderr_nobody_reads_does_not_stop_the_front(tmp_path: Path, launch: Any) -> None:
    kernel = Sockets(tmp_path)
    write = "lambda: [os.write(2, b'x' * 9999) for _ in range(99)]"
    loud = f"import threading; threading.Thread(target={write}).start()"
    launch(kernel.argv(first=loud), connection=kernel.connection, relay=kernel.relay)
    client = kernel.client("shell")
    time.sleep(0.3)
    for _ in range(3):
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
    client.close()


def test_signals_go_to_the_program(tmp_path: Path, launch: Any) -> None:
    mark, pid_file = tmp_path / "mark", tmp_path / "pid"
    code = (
        "import signal, time, os\n"
        f"signal.signal(signal.SIGINT, lambda *args: open({str(mark)!r}, 'a').write('INT '))\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        "while True: time.sleep(1)\n"
    )
    process = launch(python(code))
    read_pid(pid_file)
    for count in range(1, 6):
        os.killpg(process.pid, signal.SIGINT)
        assert until(lambda count=count: mark.exists() and mark.read_text() == "INT " * count)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(5) == 143


def test_signals_go_through_the_command_that_passes_them_on(tmp_path: Path, launch: Any) -> None:
    mark, pid_file = tmp_path / "mark", tmp_path / "pid"
    command = ["/bin/sh", "-c", 'echo "$0" >> "$1"', "{signal}", str(mark)]
    process = launch(python(SLEEPER.format(str(pid_file))), signal=command)
    program = psutil.Process(read_pid(pid_file))
    process.send_signal(signal.SIGINT)
    assert until(lambda: mark.exists() and mark.read_text() == "INT\n")
    assert until(lambda: program.parent().children() == [program])
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert 2.5 < time.monotonic() - began < 5  # the time a kernel has for ending by itself
    assert until(lambda: ended(program))
    assert mark.read_text() == "INT\nTERM\n"


class Sockets:
    """A stand-in for a kernel: five unix sockets that echo, behind five ports of Jupyter's."""

    CODE = """
import os, select, socket, sys, time
{first}
time.sleep({wait})
ends = []
for number in range(1, 6):
    end = socket.socket(socket.AF_UNIX)
    end.bind("{relay}{sign}" + str(number))
    end.listen()
    ends.append(end)
listeners = list(ends)
received = set()
while True:
    for end in select.select(ends, [], [])[0]:
        if end in listeners:
            ends.append(end.accept()[0])
            continue
        data = end.recv(1 << 16)
        if data:
            received.add(end)
            end.sendall(data)
            continue
        ends.remove(end)
        if end in received:
            {then}
"""

    def __init__(self, tmp_path: Path) -> None:
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in envkernel.STREAMS]
        ports = {name + "_port": end.getsockname()[1] for name, end in zip(envkernel.STREAMS, listeners)}
        for end in listeners:
            end.close()
        self.connection = {"transport": "tcp", "ip": "127.0.0.1", **ports}
        self.path = str(tmp_path / "base" / "kernel" / "s")
        self.relay = {"transport": "ipc", "ip": self.path}

    def argv(self, wait: float = 0, sign: str = "-", first: str = "", then: str = "pass") -> list[str]:
        return python(self.CODE.format(wait=wait, relay=self.path, sign=sign, first=first, then=then))

    def client(self, stream: str) -> socket.socket:
        address = ("127.0.0.1", self.connection[stream + "_port"])

        def connect() -> socket.socket | None:
            try:
                return socket.create_connection(address)
            except OSError:
                return None

        return until(connect)


@pytest.mark.parametrize("sign", ["-", ":"])
def test_clients_get_in_as_soon_as_the_kernel_listens(tmp_path: Path, launch: Any, sign: str) -> None:
    kernel = Sockets(tmp_path)
    launch(kernel.argv(wait=1.3, sign=sign), connection=kernel.connection, relay=kernel.relay)
    clients = [kernel.client(stream) for stream in envkernel.STREAMS]
    for client in clients:
        client.settimeout(5)
        client.sendall(b"hello")
    assert [client.recv(5) for client in clients] == [b"hello"] * 5
    made = max(os.stat(f"{kernel.path}{sign}{number}").st_mtime for number in range(1, 6))
    assert time.time() - made < 0.5  # a look once a second would come 0.7 s later
    for client in clients:
        client.close()


def test_clients_get_in_though_the_directory_is_gone(tmp_path: Path, launch: Any) -> None:
    """A login system removes XDG_RUNTIME_DIR at the end of a session that Jupyter outlives."""
    kernel = Sockets(tmp_path)
    launch(kernel.argv(), connection=kernel.connection, relay=kernel.relay)
    for gone in (False, True):
        if gone:
            shutil.rmtree(tmp_path / "base")
        with kernel.client("shell") as client:
            client.settimeout(5)
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"


def test_run_process_and_keeper_do_not_wake(tmp_path: Path, launch: Any) -> None:
    kernel = Sockets(tmp_path)
    process = launch(kernel.argv(), connection=kernel.connection, relay=kernel.relay)
    client = kernel.client("shell")
    client.sendall(b"hello")
    assert client.recv(5) == b"hello"
    both = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    before = [sum(other.cpu_times()[:2]) for other in both]
    time.sleep(1.5)
    assert [sum(other.cpu_times()[:2]) for other in both] == before
    client.close()


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(envkernel.UserError, match="not yours alone") as caught:
        envkernel.take_lock(str(tmp_path / "kernel.lock"))
    assert "chmod 700" in caught.value.hint


def test_copy_keeps_links_and_is_not_stopped_by_pipes(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.mkdir()
    (source / "file").write_text("text")
    (source / "link").symlink_to("file")
    os.mkfifo(source / "pipe")
    envkernel.make_copies([(str(source), str(tmp_path / "base" / "b"))])
    assert sorted(os.listdir(tmp_path / "base" / "b")) == ["file", "link", "pipe"]
    assert os.readlink(tmp_path / "base" / "b" / "link") == "file"


def test_copy_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(envkernel.UserError, match=r"can't be copied to .*: No such file"):
        envkernel.make_copies([(str(tmp_path / "a"), str(tmp_path / "base" / "b"))])


def test_a_helper_in_a_group_of_its_own_goes_too(tmp_path: Path, launch: Any) -> None:
    """As Apptainer's squashfuse, when Apptainer was killed."""
    pid_file = tmp_path / "pid"
    helper = f"import os; os.setpgid(0, 0); {SLEEPER.format(str(pid_file))}"
    process = launch(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {helper!r}])"))
    program = psutil.Process(read_pid(pid_file))
    assert os.getpgid(program.pid) == program.pid
    process.kill()
    assert until(lambda: ended(program))


def test_signals_can_go_to_the_members_of_the_group_alone(tmp_path: Path, launch: Any) -> None:
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    say = f"signal.signal(signal.SIGINT, lambda *args: open({str(mark)!r}, 'a').write(%r))"
    kernel = f"import signal; {say % 'kernel '}; {SLEEPER.format(str(pid_file))}"
    code = f"import signal, subprocess, sys; {say % 'leader '}; "
    launch(python(code + f"subprocess.run([sys.executable, '-c', {kernel!r}])"), leader=False)
    run_process = psutil.Process(read_pid(pid_file)).parent().parent().parent()
    for count in range(1, 4):
        os.kill(run_process.pid, signal.SIGINT)
        assert until(lambda count=count: mark.exists() and mark.read_text() == "kernel " * count)


def test_a_private_directory_and_what_is_above_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    envkernel.private_directory(str(base / "shared"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (base, base / "shared")] == [0o700, 0o700]
    (tmp_path / "file").write_text("")
    with pytest.raises(envkernel.UserError, match="can't be made"):
        envkernel.private_directory(str(tmp_path / "file" / "no"))


def test_no_session_is_not_that_of_others(monkeypatch: Any) -> None:
    """Session 0 is that of the kernel's threads, and of what another PID namespace has started."""
    killed: list[int] = []
    monkeypatch.setattr(envkernel, "send_signals", lambda pids, number: killed.extend(pids))
    envkernel.end_session(0)
    assert killed == []


def test_a_cleanup_that_is_given_up_is_logged(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(envkernel, "retry", lambda *arguments: False)
    path, log = str(tmp_path / "base" / "kernel"), tmp_path / "log"
    log.touch()
    recipe = envkernel.Recipe(path, started=1.0, cleanup=[["scancel", "7"]], log=str(log))
    envkernel.clean_up(recipe, {}, [envkernel.take_lock(path + ".lock")])
    assert log.read_text() == "not cleaned up: scancel 7\n"
    assert os.listdir(tmp_path) == ["log"]


def test_a_cleanup_that_never_succeeds_is_given_up(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    began = time.monotonic()
    assert not envkernel.retry(["/bin/sh", "-c", 'echo x >> "$0"; false', str(mark)], {}, 2)
    assert not envkernel.retry(["/no/such/program"], {}, 0)
    assert time.monotonic() - began < 4
    assert mark.read_text() == "x\nx\n"


def test_a_restart_finds_the_keeper_that_lingers(tmp_path: Path, launch: Any) -> None:
    """The second run process has other ports and another stderr; the keeper is the same."""
    keepers = []
    for _ in range(3):
        kernel = Sockets(tmp_path)
        first = "sys.stderr.write('hello'); sys.stderr.flush(); open(%r, 'w').write(str(os.getpid()))"
        first += "; [os.path.exists(p) and os.unlink(p) for p in [{!r} + str(n) for n in range(1, 6)]]"
        pid_file = tmp_path / "pid"
        argv = kernel.argv(first=(first % str(pid_file)).format(kernel.path + "-"))
        options = {"linger": 600.0}  # however slow the machine is
        process = launch(argv, connection=kernel.connection, relay=kernel.relay, options=options)
        client = kernel.client("shell")
        client.settimeout(10)
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        keepers.append(psutil.Process(read_pid(pid_file)).ppid())
        process.kill()
        err = process.stderr.read()  # to its end: the keeper has let go of it

        assert err == b"hello"
        assert client.recv(5) == b""
        client.close()
    assert len(set(keepers)) == 1
    os.kill(keepers[0], signal.SIGTERM)
    assert until(lambda: not psutil.pid_exists(keepers[0]), 15)


def test_a_keeper_lingers_no_longer_than_that(tmp_path: Path, launch: Any) -> None:
    pid_file = tmp_path / "pid"
    process = launch(python(SLEEPER.format(str(pid_file))), options={"linger": 0.5})
    keeper = psutil.Process(read_pid(pid_file)).parent()
    process.kill()
    assert until(lambda: ended(keeper), 10)


def test_the_end_of_jupyter_does_not_wait_for_a_restart(tmp_path: Path, launch: Any) -> None:
    pid_file = tmp_path / "pid"
    jupyter = subprocess.Popen(["sleep", "60"])
    environ = {"JPY_PARENT_PID": str(jupyter.pid)}
    with unittest.mock.patch.dict(os.environ, environ):
        process = launch(python(SLEEPER.format(str(pid_file))), options={"linger": 600.0})
    program = psutil.Process(read_pid(pid_file))
    jupyter.kill()
    jupyter.wait()
    began = time.monotonic()
    assert process.wait(5) == 143
    assert until(lambda: ended(program))
    assert time.monotonic() - began < 2


def test_jupyter_and_keeper_killed_at_once(tmp_path: Path, launch: Any) -> None:
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    cleanup = [["/bin/sh", "-c", 'echo "$0" >> "$1"', "cleaned", str(mark)]]
    jupyter = subprocess.Popen(["sleep", "60"])
    with unittest.mock.patch.dict(os.environ, {"JPY_PARENT_PID": str(jupyter.pid)}):
        process = launch(python(SLEEPER.format(str(pid_file))), cleanup=cleanup)
    program = psutil.Process(read_pid(pid_file))
    os.kill(process.pid, signal.SIGSTOP)
    jupyter.kill()
    program.parent().kill()
    jupyter.wait()
    os.kill(process.pid, signal.SIGCONT)
    process.wait(5)
    assert until(lambda: ended(program) and mark.exists())


def test_a_fault_in_the_keeper_is_reported_and_cleaned_up(tmp_path: Path, launch: Any) -> None:
    pid_file, mark = tmp_path / "pid", tmp_path / "mark"
    cleanup = [["/bin/sh", "-c", 'echo "$0" >> "$1"', "cleaned", str(mark)]]
    options = {"faulty": True}
    process = launch(python(SLEEPER.format(str(pid_file))), cleanup=cleanup, options=options)
    assert process.wait(10) == 77
    said = process.stderr.read().decode()
    assert said.startswith("envkernel: envkernel has failed: KeyError('a fault').\nTraceback")
    assert said.endswith("  Report it.\n")
    assert until(mark.exists)
    assert until(lambda: not pid_file.exists() or not psutil.pid_exists(read_pid(pid_file)))


def test_jupyter_that_was_gone_at_the_start(tmp_path: Path, launch: Any) -> None:
    """The parent of now (a subreaper) is not taken for it."""
    pid_file = tmp_path / "pid"
    jupyter = subprocess.Popen(["true"])
    jupyter.wait()
    with unittest.mock.patch.dict(os.environ, {"JPY_PARENT_PID": str(jupyter.pid)}):
        process = launch(python(SLEEPER.format(str(pid_file))))
    assert process.wait(5) == 143
    assert until(lambda: not pid_file.exists() or not psutil.pid_exists(read_pid(pid_file)))
