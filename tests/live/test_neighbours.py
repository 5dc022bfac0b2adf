"""Another user of the same machine, and of the node, tries all that can be reached while a kernel runs."""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import psutil
import pytest

from support import missing
from support.containers import short_directory
from support.jupyter import Jupyter, Kernel, private_jupyter, wait_for
from support.modes import MAKERS, Mode
from support.slurm import Slurm
from support.slurm import wait_for as wait_until

pytestmark = pytest.mark.live

NEIGHBOUR = r"""
import contextlib, json, os, socket, stat, sys
order = json.loads(sys.stdin.readline())
key = order["key"].encode()
got = []
for top in order["directories"]:
    for directory, directories, files in os.walk(top):
        for name in files:
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.stat(path).st_mode):
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.settimeout(2)
                        sock.connect(path)
                        got.append("connected to " + path)
                elif key in open(path, "rb").read():
                    got.append("the key in " + path)
        if os.access(directory, os.W_OK) and directory not in order["open"]:
            got.append("writable " + directory)
with open("/proc/net/unix") as rows:
    names = {row.split()[7] for row in rows.readlines()[1:] if len(row.split()) > 7}
for name in names:
    if any(word in name for word in order["words"]):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect("\0" + name[1:] if name[0] == "@" else name)
            got.append("connected to " + name)
for pid in os.listdir("/proc"):
    if pid.isdigit():
        for what in ("cmdline", "environ", "maps"):
            with contextlib.suppress(OSError):
                if key in open(f"/proc/{pid}/{what}", "rb").read():
                    got.append(f"the key in /proc/{pid}/{what}")
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                if int(pid) in order["pids"]:
                    got.append(f"descriptors of {pid}")
                    break
for pid in order["pids"]:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        got.append(f"signals to {pid}")
print(json.dumps(got))
"""

GARBAGE = r"""
import contextlib, json, os, resource, socket, sys
order = json.loads(sys.stdin.readline())
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
words = [b"", b"\0" * 10, b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f", b"\xff" * 5000,
    b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + b"\x04\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\6DEALER",
    *map(bytes.fromhex, order["replays"])]
held, answers = [], []
for number in range(order["count"]):
    with contextlib.suppress(OSError):
        port = order["ports"][number % len(order["ports"])]
        sock = socket.create_connection((order["host"], port), timeout=5)
        sock.settimeout(5)
        held.append(sock)
        sock.sendall(words[number % len(words)])
for sock in held[-len(words):] if order["listen"] else []:
    sock.settimeout(3)
    got = b""
    with contextlib.suppress(OSError):
        while more := sock.recv(4096):
            got += more
    answers.append(got.hex())
print(json.dumps([len(held), answers]), flush=True)
sys.stdin.readline()
"""


def as_nobody(code: str, order: dict[str, Any], netns: str = "") -> subprocess.Popen[str]:
    """Start Python code as another user, on the far node if asked to; it has got its order."""
    nobody = pwd.getpwnam("nobody")
    where = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    user = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    raised = ["prlimit", "--nofile=8192:8192"]
    argv = [*raised, *where, *user, "/usr/bin/python3", "-I", "-S", "-c", code]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env={"PATH": "/usr/bin:/bin"}
    )
    assert process.stdin
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return process


def answer_of(process: subprocess.Popen[str]) -> Any:
    """Return what it found out."""
    assert process.stdout
    return json.loads(process.stdout.readline())


@pytest.fixture
def street() -> Iterator[Path]:
    """A directory that everybody can enter, as /tmp is: only what envkernel does keeps others out."""
    if os.getuid():
        missing("root, to be a neighbour")
    with short_directory("street") as directory:
        (directory / "tmp").mkdir()
        (directory / "tmp").chmod(0o1777)
        yield directory


@pytest.fixture
def place(street: Path) -> Iterator[Jupyter]:
    """A private Jupyter below it, whose directory for temporary files everybody uses."""
    with private_jupyter(street / "j") as own:
        own.environ["TMPDIR"] = str(street / "tmp")
        yield own
        left = [str(path) for path in (street / "tmp").rglob("*") if "ipykernel" not in str(path)]
        assert left == []


def family(*words: str) -> list[int]:
    """Return the processes that have one of some words in their environment or arguments."""
    found = []
    for process in psutil.process_iter():
        text = b""
        for name in ("environ", "cmdline"):
            try:
                text += Path(f"/proc/{process.pid}/{name}").read_bytes()
            except OSError:
                break
        if process.pid != os.getpid() and any(word.encode() in text for word in words):
            found.append(process.pid)
    return found


def reported(kernel: Kernel) -> dict[str, Any]:
    """Return what the connection file says."""
    return dict(json.loads(Path(kernel.manager.connection_file).read_text()))


@pytest.mark.parametrize("mode", MAKERS, indirect=True)
def test_a_neighbour_gets_nothing(place: Jupyter, mode: Mode, street: Path) -> None:
    place.environ.update(mode.environ)
    place.environ["TMPDIR"] = str(street / "tmp")
    name = f"near{place.mark[:12]}"
    place.setup(mode.mode, name, f"--env=NEAR={name}", *mode.words)
    with place.kernel(name) as kernel:
        info = reported(kernel)
        assert kernel.value("6 * 7") == "42"
        order = {
            "key": info["key"],
            "directories": [str(street), *map(str, Path("/tmp").glob("envkernel-node-*"))],
            "open": [str(street / "tmp")],
            "words": [str(street), name, place.mark, "envkernel-node"],
            "pids": family(name, place.mark),
        }
        with as_nobody(NEIGHBOUR, order) as neighbour:
            assert answer_of(neighbour) == []
        ports = [info[port] for port in info if port.endswith("_port")]
        order = {"host": "127.0.0.1", "ports": ports, "count": 300, "listen": False, "replays": []}
        with as_nobody(GARBAGE, order) as neighbour:
            assert answer_of(neighbour)[0] == 300
            assert kernel.value("6 * 7") == "42"
            unsigned(kernel, info)
            assert kernel.value("'stolen' in globals()") == "False"
            kernel.restart(now=True)
            assert kernel.value("6 * 7") == "42"
            assert neighbour.stdin
            neighbour.stdin.close()
        assert kernel.shutdown() < 6
    wait_until(lambda: not mode.running(name), "the end", 10)
    if mode.kind == "cluster":
        wait_until(lambda: not list((street / "tmp").iterdir()), "the end of the node's directories", 5)


def unsigned(kernel: Kernel, info: dict[str, Any]) -> None:
    """Send what a neighbour can who knows the ports and not the key."""
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient()
    client.load_connection_info({**info, "key": "x" * 32})
    client.start_channels(hb=False)
    client.execute("stolen = 1")
    client.shutdown()
    time.sleep(0.5)
    client.stop_channels()
    wait_for(kernel.client)


# ---- what is prepared in a directory for temporary files -----------------------------------------------


@pytest.mark.parametrize("trap", ["link", "directory", "open directory", "file"])
@pytest.mark.parametrize("mode", ["docker-none", "apptainer", "slurm"], indirect=True)
def test_a_trap_in_tmp(place: Jupyter, mode: Mode, street: Path, trap: str) -> None:
    """A kernel starts beside it or says what is wrong; nothing of it gets into somebody else's directory."""
    place.environ.update(mode.environ)
    place.environ["TMPDIR"] = str(street / "tmp")
    nobody = pwd.getpwnam("nobody").pw_uid
    theirs = street / "theirs"
    theirs.mkdir()
    os.chown(theirs, nobody, nobody)
    theirs.chmod(0o777)
    private = street / "tmp" / f"envkernel-{os.getuid()}"
    if trap == "link":
        private.symlink_to(theirs)
    elif trap == "file":
        private.write_text("")
    else:
        private.mkdir()
        private.chmod(0o700 if trap == "directory" else 0o777)
    os.lchown(private, nobody, nobody)
    name = f"trap{place.mark[:12]}"
    said = place.envkernel(mode.mode, f"--name={name}", "--user", *mode.words, status=None)
    seen: list[str] = []

    def look() -> None:
        while seen is not None and not done.is_set():
            seen.extend(str(path) for path in [*theirs.rglob("*"), *private.glob("*")] if path != theirs)
            time.sleep(0.01)

    if said.returncode:
        assert str(private) in said.stderr, said.stderr
    else:
        done = threading.Event()
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            with place.kernel(name) as kernel:
                content = kernel.client.execute_interactive("1", timeout=60, allow_stdin=False)["content"]
            assert content["status"] == "ok" or str(private) in content["evalue"], content
        finally:
            done.set()
            watcher.join()
    assert seen == []
    assert private.is_symlink() or private.exists(), "it was not ours to remove"
    if private.is_dir() and not private.is_symlink():
        assert private.stat().st_uid == nobody
        private.rmdir()
    else:
        private.unlink()
    wait_until(lambda: not mode.running(name), "the end", 10)


# ---- the port on the node ----------------------------------------------------------------------------


@pytest.fixture
def cluster(jupyter: Jupyter, slurm: Slurm) -> Iterator[Slurm]:
    """Slurm, known to the private Jupyter; afterwards there is no job."""
    jupyter.environ.update(slurm.environ)
    yield slurm
    slurm.wait_no_jobs(12)


class Sniffer:
    """Keeps the first bytes that each connection to the far node carries."""

    def __init__(self, slurm: Slurm, port: int) -> None:
        self.sock = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)
        )  # ETH_P_ALL: also what goes out
        self.sock.bind((slurm.link, 0))
        self.sock.settimeout(0.2)
        self.port = port
        self.first: dict[int, bytes] = {}
        self.running = True
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self) -> None:
        while self.running:
            try:
                frame = self.sock.recv(1 << 16)
            except socket.timeout:
                continue
            if frame[12:14] != b"\x08\x00":
                continue
            packet = frame[14:]
            length, protocol = (packet[0] & 15) * 4, packet[9]
            if protocol == 6:
                source, target = struct.unpack("!HH", packet[length : length + 4])
                total = struct.unpack("!H", packet[2:4])[0]
                payload = packet[length + (packet[length + 12] >> 4) * 4 : total]
                if target == self.port and len(self.first.setdefault(source, b"")) < 400:
                    self.first[source] += payload

    def stop(self) -> list[bytes]:
        self.running = False
        self.thread.join()
        self.sock.close()
        return [data for data in self.first.values() if data]


def test_the_port_of_an_agent(jupyter: Jupyter, cluster: Slurm) -> None:
    """Garbage, half a handshake, replays and 1,200 idle connections: the owner is never locked out."""
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    jupyter.setup("slurm", "port", "--linger=1", "--partition=far", "--", *command)
    with jupyter.kernel("port") as kernel:
        rows = [row.split()[3].rpartition(":") for row in cluster.on_far("ss", "-ltnH").splitlines()]
        ports = [int(port) for host, _, port in rows if host == cluster.far and int(port) != cluster.ports[3]]
        assert len(ports) == 1, rows
        sniffer = Sniffer(cluster, ports[0])
        kernel.restart()
        kernel.value("1")
        replays = sniffer.stop()
        assert replays, "a restart opens connections"
        key = reported(kernel)["key"].encode()
        readable = any(key in data for data in replays)
        order = {
            "host": cluster.far,
            "ports": ports,
            "count": 1200,
            "listen": True,
            "replays": [data.hex() for data in replays[:6]],
        }
        with as_nobody(GARBAGE, order, cluster.netns) as neighbour:
            time.sleep(1)
            begin = time.monotonic()
            for _ in range(2):
                kernel.restart(now=True)
                assert kernel.value("6 * 7") == "42"
                assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
            assert time.monotonic() - begin < 30
            held, answers = answer_of(neighbour)
            assert held > 900
            for text in map(bytes.fromhex, answers):
                assert len(text) < 200, "a challenge at most"
                assert b"\xff\0\0\0\0\0\0\0\1\x7f" not in text, "no kernel answers"
            assert neighbour.stdin
            neighbour.stdin.close()
        assert kernel.value("6 * 7") == "42"
    assert not readable, "a restart sends the kernel's key over the network"


def test_files_on_a_node_are_closed_to_others(jupyter: Jupyter, cluster: Slurm) -> None:
    """Whatever the agent makes on its node while it starts."""
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    jupyter.setup("slurm", "files", "--linger=1", "--partition=far", "--", *command)
    wrong: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            for top in (Path(jupyter.environ["TMPDIR"]), Path("/tmp")):
                for path in top.glob("envkernel-*"):
                    try:
                        mode = path.lstat()
                    except OSError:
                        continue
                    if path.name.startswith("envkernel-node-") and stat.S_IMODE(mode.st_mode) & 0o077:
                        wrong.append(f"{path}: {stat.S_IMODE(mode.st_mode):o}")

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with jupyter.kernel("files") as kernel:
            assert kernel.value("6 * 7") == "42"
    finally:
        done.set()
        watcher.join()
    assert wrong == []
