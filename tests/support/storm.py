"""A kill storm: kernels whose processes are killed at random moments, and what is left of them.

A round starts one kernel as Jupyter does, kills one or two of its processes after 0 to 3 s, and looks at
what is left 10 s later.  It knows nothing of how envkernel works: processes are found by a mark in their
environment or arguments, which the setup's ``--name`` and ``--env`` put there, and by their place in the
process tree.
All that a round does follows from its seed, but not how busy the machine is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from jupyter_client import BlockingKernelClient

from support import SCRIPT
from support.jupyter import MARK, Jupyter, wait_for
from support.modes import Mode

LINGER = 1.0
"""Seconds more for a job: what `support.modes` gives as --linger."""
SPAN = {"yarn": 10.0}
"""Within how many seconds after the start the kill comes, where 3 are too early for anything to be there."""
STAYS = 15.0
"""Seconds after the limit within which something is late; after that it stays."""
PLACEHOLDER = "5107" + "0" * 20

PORTS = itertools.count(12000 + os.getpid() * 50 % 15000)

JUPYTER = """
import json, os, subprocess, sys
order = json.loads(sys.argv[1])
environ = dict(os.environ, **order["env"], JPY_PARENT_PID=str(os.getpid()))
errors = open(order["stderr"], "ab")
kernel = subprocess.Popen(order["argv"], env=environ, cwd=order["cwd"], stdin=subprocess.DEVNULL,
    stdout=errors, stderr=errors, start_new_session=True)
print(kernel.pid, flush=True)
kernel.wait()
sys.stdin.read()
"""
"""In the place of Jupyter: starts the kernel as jupyter_client does, and takes its exit status."""

SUBREAPER = """
import ctypes, json, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
environ = dict(os.environ, **json.loads(sys.argv[1]))
driver = subprocess.Popen(sys.argv[2:], env=environ)
print(driver.pid, flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
sys.stdin.read()
"""
"""Adopts what Jupyter leaves behind, as ``systemd --user`` does."""


class Process:
    """A process of a round, as it was when it was found."""

    def __init__(self, pid: int) -> None:
        directory = Path(f"/proc/{pid}")
        self.pid = pid
        stat = (directory / "stat").read_text().rpartition(") ")[2].split()
        self.state, self.parent, self.start = stat[0], int(stat[1]), int(stat[19])
        self.argv = (directory / "cmdline").read_bytes().split(b"\0")[:-1]
        self.environ = (directory / "environ").read_bytes() if self.state != "Z" else b""

    def __str__(self) -> str:
        command = os.fsdecode(b" ".join(self.argv))
        return f"process {self.pid} (parent {self.parent}): {command[:60]} ... {command[-100:]}"

    @property
    def is_kernel(self) -> bool:
        """Return whether this is the kernel itself."""
        return b"ipykernel_launcher" in self.argv[1:4] and b"python" in self.argv[0]

    @property
    def in_job(self) -> bool:
        """Return whether it runs in a job, on the node."""
        return b"\0SLURM_STEP_ID=" in self.environ or b"\0CONTAINER_ID=container_" in self.environ


_table_lock = threading.Lock()
_table: tuple[float, list[Process]] = (0.0, [])


def all_processes(age: float = 0.1) -> list[Process]:
    """Return all processes; what was found within the last `age` seconds is good enough."""
    global _table
    with _table_lock:
        if time.monotonic() - _table[0] > age:
            found = []
            for name in os.listdir("/proc"):
                if name.isdigit() and int(name) != os.getpid():
                    with contextlib.suppress(OSError, IndexError, ValueError):
                        process = Process(int(name))
                        if process.state not in "ZX":
                            found.append(process)
            _table = (time.monotonic(), found)
        return _table[1]


class Outcome:
    """What became of a round.

    left: what was there after the limit.  stays: and was there for long after that.
    seconds: until all was gone.
    survived: the kernel went on, and Jupyter killed its process group.  hung: it went on, but did not answer.
    """

    def __init__(self, mode: str, seed: int, victim: str) -> None:
        self.mode = mode
        self.seed = seed
        self.victim = victim
        self.what = ""
        self.moment = 0.0
        self.seconds = 0.0
        self.survived = False
        self.hung = ""
        self.left: list[str] = []
        self.stays = False
        self.before_sweep: list[str] = []
        self.stderr = ""

    @property
    def good(self) -> bool:
        """Return whether nothing was left and nothing hung."""
        return not (self.left or self.hung)

    def __str__(self) -> str:
        text = f"{self.mode}:{self.seed} {self.victim} ({self.what}) after {self.moment:.2f} s"
        text += ", survived" if self.survived else ""
        text += f", gone after {self.seconds:.1f} s" if not self.stays else ", stays"
        rows = [self.hung] if self.hung else []
        rows += [f"left: {item}" for item in self.left]
        rows += [f"before the next start: {item}" for item in self.before_sweep if self.left]
        said = [f"stderr: {line}" for line in self.stderr.splitlines()[-6:]] if rows else []
        return "\n    ".join([text, *rows, *said])


VICTIMS: dict[str, tuple[str, ...]] = {
    "environment": ("group", "run", "jupyter"),  # below a subreaper a native ipykernel stays as well
    "container": (
        *("group", "run", "keeper", "client", "clients", "other", "kernel", "two"),
        *("jupyter", "jupyter+subreaper", "jupyter+keeper", "everyone"),
    ),
}
VICTIMS["cluster"] = (*VICTIMS["container"], "agent")


def victims_of(mode: Mode) -> tuple[str, ...]:
    """Return what can be killed in a mode.

    group: the process group that Jupyter started.  run: its leader alone.
    keeper: another of envkernel's processes.  agent: envkernel on the node.
    client: the engine's client or srun, clients: with its own children.
    other: anything else that is no kernel.
    everyone: all of envkernel's processes on this host at once; the next start has to sweep what is left.
    """
    return (*VICTIMS[mode.kind], *([mode.outside] if mode.outside else []))


class Round:
    """One kernel that is started and killed.  root: directory of all that belongs to it, with a short
    path."""

    def __init__(self, mode: Mode, template: str, root: Path, seed: int) -> None:
        self.mode = mode
        self.random = random.Random(f"{mode.key}:{seed}")
        choice = victims_of(mode)
        self.victim = choice[seed % len(choice)]
        self.outcome = Outcome(mode.key, seed, self.victim)
        self.mark = "5107" + uuid.uuid4().hex[:20]
        self.root = root
        self.place = Jupyter(root)
        self.spec = json.loads(template.replace(PLACEHOLDER, self.mark))
        self.connection = root / "runtime" / "kernel-storm.json"
        self.stderr = root / "stderr"
        self.environ = {**self.place.environ, **mode.environ, MARK: self.mark}
        self.environ["XDG_RUNTIME_DIR"] = str(root / "user")
        (root / "user").mkdir(mode=0o700)
        self.launched = 0
        self.drivers: list[subprocess.Popen[str]] = []
        self.jupyter = self.run = 0
        self.command: list[bytes] = []
        self.numbers: set[str] = set()
        self.clients: list[BlockingKernelClient] = []

    # ---- as Jupyter does it

    def write_connection(self) -> None:
        """Write a connection file with ports that nobody listens on."""
        ports: list[int] = []
        while len(ports) < 5:
            port = next(PORTS)
            with socket.socket() as sock, contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                ports.append(port)
        names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
        self.ports = ports
        self.content = json.dumps(
            {
                **dict(zip(names, ports)),
                "ip": "127.0.0.1",
                "key": uuid.uuid4().hex,
                "transport": "tcp",
                "signature_scheme": "hmac-sha256",
                "kernel_name": "",
            }
        )
        with open(os.open(self.connection, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(self.content)

    def start(self, subreaper: bool = False) -> None:
        """Start a Jupyter and its kernel."""
        self.write_connection()
        values = {"{connection_file}": str(self.connection), "{resource_dir}": str(self.root)}
        argv = []
        for word in self.spec["argv"]:
            for name, value in values.items():
                word = word.replace(name, value)
            argv.append(word)
        order = {
            "argv": argv,
            "env": self.spec.get("env", {}),
            "stderr": str(self.stderr),
            "cwd": str(self.root / "home"),
        }
        python = [sys.executable, "-I", "-S", "-c"]
        command = [*python, JUPYTER, json.dumps(order)]
        environ = self.environ
        if subreaper:
            own = {name: value for name, value in self.environ.items() if name != MARK}
            mark = json.dumps({MARK: self.mark})
            command, environ = [*python, SUBREAPER, mark, *command], own
        driver = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.drivers.append(driver)
        assert driver.stdout
        numbers = [int(driver.stdout.readline()) for _ in range(1 + subreaper)]
        self.launched += 1
        self.jupyter, self.run = (numbers[0], numbers[1]) if subreaper else (driver.pid, numbers[0])
        self.begin = time.monotonic()

    def connect(self) -> BlockingKernelClient:
        """Connect a client, as a notebook does at once."""
        client = BlockingKernelClient()
        client.load_connection_info(json.loads(self.content))
        client.start_channels(hb=False)
        client.kernel_info()
        self.clients.append(client)
        return client

    # ---- its processes

    def ours(self) -> list[Process]:
        """Return the processes of the kernel, without the Jupyter that started it."""
        tokens = [self.mark.encode(), *(number.encode() for number in self.numbers if len(number) > 20)]
        tokens += [f"\0SLURM_JOB_ID={number}\0".encode() for number in self.numbers if number.isdigit()]
        drivers = {self.jupyter, *(driver.pid for driver in self.drivers)}
        return [
            process
            for process in all_processes(0.0 if self.hurry else 0.1)
            if process.pid not in drivers
            and any(
                token in process.environ or any(token in word for word in process.argv) for token in tokens
            )
        ]

    hurry = False

    def sorted_processes(self) -> dict[str, list[Process]]:
        """Return the processes by what they are."""
        found: dict[str, list[Process]] = {}
        processes = self.ours()
        mine = {process.pid for process in processes if process.pid == self.run}
        for process in processes:
            if process.pid == self.run and not self.command and not process.is_kernel:
                self.command = process.argv
        for process in processes:
            if process.pid == self.run:
                kind = "run"
            elif process.is_kernel:
                kind = "kernel"
            elif process.in_job:
                kind = "agent" if b"python" in process.argv[0] else "other"
            elif self.command and process.argv == self.command:
                kind = "keeper"
                mine.add(process.pid)
            else:
                kind = ""
            if kind:
                found.setdefault(kind, []).append(process)
        for process in processes:
            if not any(process in others for others in found.values()):
                kind = "client" if process.parent in mine else "other"
                found.setdefault(kind, []).append(process)
        commands = [process.argv for process in found.get("client", [])]
        for process in list(found.get("other", [])):
            if process.argv in commands:  # srun's own child
                found["other"].remove(process)
                found["client"].append(process)
        return {kind: processes for kind, processes in found.items() if processes}

    # ---- the kill

    def find(self, kind: str) -> Callable[[], str] | None:
        """Return what kills a victim, or None where it is not there."""
        found = self.sorted_processes()
        if kind == "group":
            return lambda: self._kill(-self.run, "group")
        if kind == "jupyter" or kind == "jupyter+subreaper":
            return lambda: self._kill(self.jupyter, "jupyter")
        if kind == self.mode.outside:
            numbers = self.mode.running(self.mark)
            self.numbers.update(numbers)
            return (lambda: self.mode.end(min(numbers), self.random)) if numbers else None
        if kind == "everyone":
            if not found.get("keeper"):
                return None
            both = [*found.get("run", []), *found["keeper"]]
            return lambda: self._kill_all(both, "run and keeper")
        if kind == "jupyter+keeper":
            if not found.get("keeper"):
                return None
            return lambda: "+".join(
                [self._kill_all(found["keeper"], "keeper"), self._kill(self.jupyter, "jupyter")]
            )
        if kind == "two":
            pairs = [(name, process) for name, processes in found.items() for process in processes]
            if len(pairs) < 2:
                return None
            two = self.random.sample(sorted(pairs, key=lambda pair: (pair[0], pair[1].start)), 2)
            names = "+".join(name for name, _ in two)
            if {name for name, _ in two} <= {"run", "keeper"}:
                self.outcome.victim = "everyone"
            return lambda: self._kill_all([process for _, process in two], names)
        if kind == "clients" and found.get("client"):
            return lambda: self._kill_all(found["client"], f"{len(found['client'])} clients")
        if found.get(kind):
            one = self.random.choice(found[kind])
            return lambda: self._kill_all([one], kind)
        return None

    def _kill(self, pid: int, name: str) -> str:
        assert abs(pid) > 1, "that would be everybody"
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if pid < 0 else os.kill)(abs(pid), signal.SIGKILL)
        return name

    def _kill_all(self, processes: Iterable[Process], name: str) -> str:
        for process in processes:
            self._kill(process.pid, name)
        return name

    def kill(self) -> None:
        """Kill the victim at its moment; where it is not there yet, when it is; else the group."""
        span = SPAN.get(self.mode.key, 3.0)
        moment = self.random.choice([0.0, self.random.random() * 0.3, 1.0]) * span
        moment = self.random.random() * span if moment == span else moment
        if self.victim in ("kernel", "other", "agent"):
            moment = max(moment, 0.05)
        time.sleep(max(0.0, self.begin + moment - time.monotonic()))
        self.hurry = True
        deadline = time.monotonic() + (self.mode.patience if self.victim in ("agent", "job", "kernel") else 8)
        action = None
        while action is None and time.monotonic() < deadline:
            action = self.find(self.victim)
            if action is None:
                time.sleep(0.02)
        if action is None:
            self.outcome.victim = "group"
            action = lambda: self._kill(-self.run, f"no {self.victim}")  # noqa: E731
        self.outcome.moment = time.monotonic() - self.begin
        self.outcome.what = action()
        self.killed = time.monotonic()
        self.hurry = False

    # ---- what is left

    def leftovers(self, thorough: bool = True) -> list[str]:
        """Return what is left of the kernel."""
        left = [str(process) for process in self.ours()]
        for directory in ("runtime", "tmp", "user"):
            for top, directories, files in os.walk(
                self.root / directory
            ):  # rglob fails where one goes meanwhile
                paths = [("directory", name) for name in directories] + [("file", name) for name in files]
                for kind, name in paths:
                    path = Path(top, name)
                    if path != self.connection:
                        left.append(f"{kind} {path.relative_to(self.root)}")
        sockets = Path("/proc/net/unix").read_text().splitlines()
        left += [f"socket {row.split()[-1]}" for row in sockets if self.mark in row or f"{self.root}/" in row]
        mounts = Path("/proc/mounts").read_text().splitlines()
        left += [f"mount {row}" for row in mounts if self.mark in row or f" {self.root}/" in row]
        for path in ("/proc/net/tcp", "/proc/net/tcp6"):
            for row in Path(path).read_text().splitlines()[1:]:
                address, state = row.split()[1], row.split()[3]
                if state == "0A" and int(address.rpartition(":")[2], 16) in self.ports:
                    left.append(f"listening port {int(address.rpartition(':')[2], 16)}")
        if thorough or not left:
            running = self.mode.running(self.mark)
            self.numbers.update(running)
            left += [f"{self.mode.outside} {name}" for name in running.values()]
        return left

    def alive(self) -> bool:
        """Return whether the process that Jupyter started lives."""
        with contextlib.suppress(OSError):
            return Process(self.run).state not in "ZX"
        return False

    def settle(self) -> None:
        """Let Jupyter notice; a kernel that goes on has to answer, and is killed then."""
        if self.victim.startswith("jupyter"):
            return
        while self.alive() and time.monotonic() < self.killed + 6:
            time.sleep(0.1)
        if not self.alive():
            return
        self.outcome.survived = True
        try:
            client = self.connect()
            wait_for(client, self.mode.patience)
            info = client.kernel_info(reply=True, timeout=10)["content"]
            if info.get("implementation") != "ipython":  # it says why there is no kernel
                self.watch_the_failed()
        except Exception as error:  # RuntimeError: no answer
            if self.alive():
                self.outcome.hung = f"the run process goes on, but no kernel answers: {error!r}"
        self._kill(-self.run, "group")
        self.killed = time.monotonic()

    def watch_the_failed(self) -> None:
        """While Jupyter's process only says why there is no kernel, all that it started has to go."""
        limit = time.monotonic() + self.limit  # an engine may have taken long to notice
        while True:
            found = self.sorted_processes()
            left = [str(process) for kind in ("client", "kernel", "agent") for process in found.get(kind, [])]
            left += [f"{self.mode.outside} {name}" for name in self.mode.running(self.mark).values()]
            if not left:
                return
            if time.monotonic() > limit:
                self.outcome.left += [f"beside the error: {item}" for item in left]
                return
            time.sleep(0.25)

    @property
    def limit(self) -> float:
        """Within how many seconds after the kill everything has to be gone."""
        return self.mode.cleanup_limit + (LINGER if self.mode.kind == "cluster" else 0)

    def watch(self) -> list[str]:
        """Wait until nothing is left; return what is there after the limit."""
        limit = self.killed + self.limit
        left = self.leftovers(False)
        while left and time.monotonic() < limit:
            time.sleep(0.25)
            left = self.leftovers(False)
        self.outcome.seconds = time.monotonic() - self.killed
        if not left:
            return []
        kept = left = self.leftovers()
        while left and time.monotonic() < limit + STAYS:
            time.sleep(0.5)
            left = self.leftovers(False)
        self.outcome.seconds = time.monotonic() - self.killed
        self.outcome.stays = bool(left)
        return kept

    def sweep(self) -> None:
        """Start the kernel once more, as the next user of it does; what was left has to go with it."""
        deadline = time.monotonic() + self.limit
        while (left := self.leftovers(False)) and time.monotonic() < deadline:
            time.sleep(0.25)
        self.outcome.before_sweep = left
        for driver in self.drivers:
            driver.kill()
        self.start()
        with contextlib.suppress(Exception):
            self.connect().wait_for_ready(timeout=self.mode.patience)
        self._kill(-self.run, "group")
        self.killed = time.monotonic()

    def play(self) -> Outcome:
        """Play the round; nothing is left after it, whatever envkernel left."""
        try:
            self.start(self.victim == "jupyter+subreaper")
            if self.random.random() < 0.5:
                self.connect()
            self.kill()
            self.settle()
            if self.outcome.victim == "everyone":
                self.sweep()
            self.outcome.left += self.watch()
            if self.connection.read_text() != self.content:
                self.outcome.left.append("a changed connection file")
            self.outcome.stderr = self.stderr.read_text(errors="replace")
            if "Traceback" in self.outcome.stderr:
                self.outcome.hung += "a traceback on stderr"
        finally:
            self.clean_up()
        return self.outcome

    def clean_up(self) -> None:
        """Remove all that is left."""
        for client in self.clients:
            client.stop_channels()
        for driver in self.drivers:
            driver.kill()
            driver.communicate()
        if self.outcome.left or self.outcome.seconds == 0:
            self.numbers.clear()  # only what has the mark may be killed by its number
            for process in self.ours():
                self._kill(process.pid, "")
            for number in self.mode.running(self.mark):
                self.mode.remove(number)
            for row in Path("/proc/mounts").read_text().splitlines():
                if f" {self.root}/" in row:
                    subprocess.run(["umount", "-l", row.split()[1]], check=False)
        shutil.rmtree(self.root, ignore_errors=True)


class Storm:
    """All rounds of some modes."""

    def __init__(self, modes: Iterable[Mode], script: Path = SCRIPT) -> None:
        self.modes = list(modes)
        self.script = script
        self.root = Path(tempfile.mkdtemp(prefix="ekst-", dir="/tmp"))
        self.root.chmod(0o755)
        self.count = itertools.count()

    def template(self, mode: Mode) -> str:
        """Return the kernel.json of a mode, with `PLACEHOLDER` where a round's mark is to be."""
        place = Jupyter(self.root / f"setup-{mode.key}")
        common = [f"--name=storm-{PLACEHOLDER}", "--user", f"--env=STORM_MARK={PLACEHOLDER}"]
        place.envkernel(mode.mode, *common, *mode.words, environ=mode.environ, script=self.script)
        text = (place.kernels / f"storm-{PLACEHOLDER}" / "kernel.json").read_text()
        directory = str(self.script.resolve().parent)
        assert directory in text, f"the kernelspec does not run the envkernel of {directory}: {text}"
        return text

    def play(self, seeds: dict[str, Iterable[int]], parallel: int = 5) -> Iterator[Outcome]:
        """Play the rounds with these seeds, some at the same time; yield what became of each."""
        jobs: list[tuple[Mode, str, int]] = []
        for mode in self.modes:
            template = self.template(mode)
            jobs += [(mode, template, seed) for seed in seeds[mode.key]]
        random.Random(0).shuffle(jobs)  # not all of one mode at the same time

        def play(job: tuple[Mode, str, int]) -> Outcome:
            mode, template, seed = job
            return Round(mode, template, self.root / str(next(self.count)), seed).play()

        with ThreadPoolExecutor(parallel) as pool:
            for future in [pool.submit(play, job) for job in jobs]:
                yield future.result()

    def close(self) -> None:
        """Remove the directory of all rounds."""
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
