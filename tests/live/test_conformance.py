"""The promises of ``CONTRACT.md``, each tried in every mode: a new mode is one more row of `MAKERS`.

Tests of a mode share one running kernel, in the order of this file; `Life` is that kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import time
from pathlib import Path
from typing import Iterator

import psutil
import pytest

from support import ROOT
from support.jupyter import Jupyter, Kernel, private_jupyter, wait_for
from support.modes import MAKERS, Mode
from support.slurm import wait_for as wait_until

LISTENERS = ("environments", "containers", "slurm, yarn")
"""The rows of README's table of what listens."""
GREETING = "a b {c} %:$ 'q\" é"
LEAKS = {
    "JUPYTERHUB_API_TOKEN": "of-the-host",
    "PYTHONPATH": "/of-the-host",
    "PYTHONHOME": "",
    "LD_LIBRARY_PATH": "/of-the-host",
    "JPY_OF_THE_HOST": "of-the-host",
}
HANG = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"


class Life:
    """A kernel of a mode that runs while its tests do.

    place: its Jupyter.  work: the notebook's directory.  log: the file that is the kernel's stderr.
    """

    def __init__(self, mode: Mode, place: Jupyter, work: Path) -> None:
        self.mode = mode
        self.place = place
        self.work = work
        self.name = f"life{place.mark[:12]}"
        self.log = place.root / "stderr"
        self.kernel: Kernel

    @property
    def key(self) -> str:
        """The key that nobody else may read."""
        return str(json.loads(Path(self.kernel.manager.connection_file).read_text())["key"])

    def ready(self) -> Kernel:
        """Return the kernel, with nothing of an earlier test in its way."""
        wait_for(self.kernel.client)
        return self.kernel

    def end(self) -> None:
        """End the kernel, if no earlier test has."""
        if self.kernel.manager.is_alive():
            self.kernel.shutdown()
            wait_until(lambda: not self.mode.running(self.name), "the end of the shared kernel", 11)

    def family(self) -> list[psutil.Process]:
        """Return all processes of this host that belong to the kernel: Jupyter started or named them."""
        found = []
        tokens = (self.place.mark.encode(), self.name.encode())
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                directory = Path(f"/proc/{process.pid}")
                text = (directory / "environ").read_bytes() + (directory / "cmdline").read_bytes()
                if process.pid != os.getpid() and any(token in text for token in tokens):
                    found.append(process)
        return found


def words_of(mode: Mode, work: Path) -> list[str]:
    """Return a setup's words, with which the kernel starts in the notebook's directory."""
    if mode.kind != "container":
        return mode.words
    if "--shared" in mode.words:  # the container is there before the notebook
        return [f"--bind={work}", "--pwd", *mode.words]
    contain = ["--contain"] if mode.mode == "apptainer" else []  # else the debugger's cells stay in /tmp
    return ["--pwd", *contain, *mode.words]


@pytest.fixture(scope="module")
def life(mode: Mode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """The running kernel of a mode; nothing may be left of it."""
    root = tmp_path_factory.mktemp("life")
    with private_jupyter(root / "j") as place, pytest.MonkeyPatch.context() as patch:
        place.environ.update(mode.environ)
        (root / "work").mkdir()
        (root / "work" / "data.csv").write_text("1,2")
        own = Life(mode, place, root / "work")
        place.setup(mode.mode, own.name, f"--env=GREETING={GREETING}", *words_of(mode, own.work))
        for name, value in LEAKS.items():
            if value and not name.startswith(("PYTHON", "LD_")):
                patch.setenv(name, value)
        leaks = {name: value for name, value in LEAKS.items() if value}
        if mode.kind == "environment":  # PYTHONPATH is the user's own there, and native kernels have it
            leaks.pop("PYTHONPATH")
        with open(own.log, "wb") as log, place.kernel(
            own.name, environ=leaks, cwd=str(own.work), stderr=log
        ) as kernel:
            own.kernel = kernel
            yield own
            for path in (place.root / "tmp").glob("ipykernel_*/*"):
                path.unlink()  # the debugger's cells, which ipykernel leaves where it runs on the host
        wait_until(lambda: not mode.running(own.name), f"the end of the {mode.outside}", 10)


pytestmark = [pytest.mark.live, pytest.mark.parametrize("mode", MAKERS, indirect=True)]


# ---- 1. the same environment ------------------------------------------------------------------------


def test_variables_reach_the_kernel_and_nothing_leaks(life: Life) -> None:
    environ = life.ready().environ()
    assert environ["GREETING"] == GREETING
    if life.mode.kind != "environment":
        leaks = [name for name, value in environ.items() if name in LEAKS or "of-the-host" in value]
        mine = ("PYTHONPATH", "LD_LIBRARY_PATH") if life.mode.mode == "slurm" else ()  # srun takes them along
        assert [name for name in leaks if name not in mine] == []
    if life.mode.kind == "container":
        assert [name for name in environ if name.startswith(("JPY_", "JUPYTER", "LD_"))] == []


def test_it_starts_in_the_notebooks_directory(life: Life) -> None:
    kernel = life.ready()
    assert kernel.value("__import__('os').getcwd()") == str(life.work)
    assert kernel.value("open('data.csv').read()") == "1,2"
    kernel.value("open('out.txt', 'w').write('x')")
    assert (life.work / "out.txt").read_text() == "x"


# ---- 4. nothing is exposed --------------------------------------------------------------------------


def test_only_loopback_listens(life: Life) -> None:
    """On this host; the agent's port on a node, which the handshake guards, is for `test_slurm`."""
    kernel = life.ready()
    reported = json.loads(Path(kernel.manager.connection_file).read_text())
    ports = {reported[name] for name in reported if name.endswith("_port")}
    rows = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout.splitlines()
    places = [row.split()[3].rpartition(":") for row in rows]
    assert {ip for ip, _, port in places if int(port) in ports} == {"127.0.0.1"}
    here = os.stat("/proc/self/ns/net").st_ino
    for process in life.family():
        if process.name() == "srun":  # its own port, guarded by munge
            continue
        if process.is_running() and os.stat(f"/proc/{process.pid}/ns/net").st_ino == here:
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    assert one.laddr.ip.startswith("127."), (process.cmdline(), one)


def test_who_listens_is_as_the_readme_says(life: Life) -> None:
    """Jupyter's ports are the kernel's own or the keeper's (a child of the run process)."""
    kernel = life.ready()
    reported = json.loads(Path(kernel.manager.connection_file).read_text())
    ports = {reported[name] for name in reported if name.endswith("_port")}
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines()]
    documented = {row[1].strip(): row[2] for row in rows if len(row) == 4 and row[1].strip() in LISTENERS}
    assert documented.keys() == set(LISTENERS)
    if life.mode.kind == "environment":
        assert "the kernel itself" in documented["environments"]
    else:
        assert "(keeper)" in documented["containers"]
        assert "the same (keeper)" in documented["slurm, yarn"]
    here = os.stat("/proc/self/ns/net").st_ino
    listening: dict[int, set[int]] = {}
    for process in life.family():
        with contextlib.suppress(psutil.Error):
            if os.stat(f"/proc/{process.pid}/ns/net").st_ino == here:
                found = [one.laddr.port for one in process.net_connections("inet") if one.status == "LISTEN"]
                listening[process.pid] = set(found)
    owners = [number for number, some in listening.items() if ports & some]
    assert len(owners) == 1
    assert listening[owners[0]] >= ports
    first = kernel.manager.provisioner.process.pid
    assert first == (owners[0] if life.mode.kind == "environment" else psutil.Process(owners[0]).ppid())
    if life.mode.kind == "container" and "--transport=tcp" not in life.mode.words:
        others = {number: some for number, some in listening.items() if number not in owners}
        assert all(len(some) < 2 for some in others.values()), others  # one is ipykernel's own, for debugpy


def test_nobody_else_reads_the_key(life: Life) -> None:
    key = life.key.encode()
    for process in psutil.process_iter():
        if process.pid != os.getpid():
            for what in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    assert key not in Path(f"/proc/{process.pid}/{what}").read_bytes(), process.cmdline()
    assert key not in life.log.read_bytes()
    engine = getattr(life.mode, "engine", None)
    if engine:
        assert key.decode() not in json.dumps(engine.containers())
    for path in life.place.root.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink() and key in path.read_bytes():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
                closed = [stat.S_IMODE(directory.stat().st_mode) & 0o077 == 0 for directory in path.parents]
                assert any(closed), path
                assert path.suffix == ".json", path


# ---- 2. a kernel like any other ---------------------------------------------------------------------


def test_interrupts(life: Life) -> None:
    kernel = life.ready()
    for _ in range(3):
        name, seconds = kernel.interrupt_in("import time; time.sleep(60)")
        assert name == "KeyboardInterrupt"
        assert seconds < 5
    assert kernel.value("6 * 7") == "42"


def test_it_asks(life: Life) -> None:
    assert life.ready().answer("print(input('name? '))", "Ada") == ("name? ", "Ada\n")


def test_the_debugger_stops_where_it_should(life: Life) -> None:
    code = "def twice(n):\n    m = 2 * n\n    return m\n\ntwice(21)"
    assert life.ready().stop_in(code, 3) == ("twice", 3, "42")


def test_restart(life: Life) -> None:
    kernel = life.ready()
    before = Path(kernel.manager.connection_file).read_bytes()
    kernel.value("globals().update(x=1)")
    kernel.restart()
    assert kernel.value("'x' in globals()") == "False"
    assert Path(kernel.manager.connection_file).read_bytes() == before


def test_a_hung_kernel_is_restarted_at_once(life: Life) -> None:
    kernel = life.ready()
    kernel.client.execute(HANG)
    time.sleep(0.3)
    assert kernel.restart(now=True) < 10
    assert kernel.value("6 * 7") == "42"
    assert len(life.mode.running(life.name)) == (1 if life.mode.outside else 0)


# ---- 7. what it wrote can be looked at --------------------------------------------------------------


def test_managing_while_it_runs(life: Life) -> None:
    life.ready()
    row = next(line for line in life.place.envkernel("list").stdout.splitlines() if life.name in line)
    assert "ok" in row
    shown = life.place.envkernel("show", life.name).stdout
    assert life.mode.mode in shown
    assert life.key not in shown
    log = life.place.envkernel("log", life.name).stdout
    assert life.name in log or "envkernel" in log
    assert life.key not in log
    assert GREETING not in life.place.envkernel("log", life.name).stderr


# ---- 3. nothing outlives it -------------------------------------------------------------------------


def test_shutdown_leaves_nothing(life: Life) -> None:
    kernel = life.ready()
    numbers = [process.pid for process in life.family()]
    for path in (life.place.root / "tmp").glob("ipykernel_*/*"):
        path.unlink()
    assert kernel.shutdown() < 6
    Path(kernel.manager.connection_file).unlink(missing_ok=True)

    def gone() -> bool:
        return not life.mode.running(life.name) and not life.place.leftovers(0)

    try:
        wait_until(gone, "the end", 11 if life.mode.kind == "cluster" else 10)
    except TimeoutError:
        left = (life.mode.running(life.name), life.place.leftovers(0))
        raise AssertionError(f"left of {numbers}: {left}") from None


def test_check_and_remove(life: Life) -> None:
    """`check` starts one more kernel; after it there is nothing either."""
    life.end()
    said = json.loads(life.place.envkernel("check", life.name, "--json", cwd=life.work).stdout)
    wrong = {row["step"]: row["error"] for row in said["steps"] if row["error"]}
    assert (said["ok"], wrong) == (True, {})
    life.place.envkernel("remove", life.name)
    assert not (life.place.kernels / life.name).exists()
    wait_until(lambda: not life.mode.running(life.name), "the end", 10)
    listed = life.place.envkernel("list").stdout.splitlines()
    assert [line for line in listed if life.name in line] == []


# ---- 5. the reason in the notebook ------------------------------------------------------------------


def test_a_kernel_that_ends_at_once_says_why(life: Life) -> None:
    """Its status and what it said are in the cell, in the log, and on stderr."""
    if life.mode.kind == "environment":
        return  # it is the process that Jupyter started: only the next start can tell, see `test_reasons`
    life.end()
    words = words_of(life.mode, life.work)
    words = [word for word in words if not word.startswith("--python=")]
    words = words[: words.index("--")] if "--" in words else words
    command = ["/bin/sh", "-c", "echo no licence >&2; exit 3", "{connection_file}"]
    name = f"{life.name}-ends"
    life.place.setup(life.mode.mode, name, "--replace", *words, "--", *command)
    log = life.place.root / "reason"
    with open(log, "wb") as file, life.place.kernel(name, stderr=file, cwd=str(life.work)) as kernel:
        content = kernel.client.execute_interactive("1", timeout=60, allow_stdin=False)["content"]
    said = "\n".join([content["evalue"], *content["traceback"]])
    assert "exit status 3" in said
    assert "no licence" in said
    assert "exit status 3" in life.place.envkernel("log", name).stdout
    assert "no licence" in log.read_text()
    life.place.envkernel("remove", name)
