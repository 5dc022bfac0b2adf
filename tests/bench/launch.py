#!/usr/bin/env python3
"""How long envkernel takes from its start to the kernel's, in each environment mode.

    tests/bench/launch.py [--rounds=N] [--conda=/path/to/bin/conda]

Every round runs every command once, in turn, so that what else the machine does hits all alike; a ratio
is the median of the ratios of each round.  The kernel is /bin/true, called python.
Ends with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support import SCRIPT, bash_environ, done  # noqa: E402
from support.conda import make_conda, make_root  # noqa: E402
from support.modules import LMOD, write_tree  # noqa: E402

BASH = ["/bin/bash", "--noprofile", "--norc", "-c"]
FLOOR = [sys.executable, "-I", "-S", "-c", "pass"]
BARE = "python3 -I -S -c pass"

CONNECTION_FILE = "/tmp/connection.json"
STARTS = itertools.count()
"""Each start has a connection file of its own, as Jupyter gives it: the same one again is a restart."""


class Row:
    """A command, what it is held against, and the ratio that is the goal (None: for information)."""

    def __init__(
        self, name: str, ours: Sequence[str], against: str, theirs: Sequence[str], goal: float | None
    ) -> None:
        self.name = name
        self.ours = tuple(ours)
        self.against = against
        self.theirs = tuple(theirs)
        self.goal = goal


class Bench:
    """Builds environments of every mode in a temporary directory, and the command lines to compare."""

    def __init__(self, directory: Path, conda: str) -> None:
        self.directory = directory
        self.conda = conda
        self.environ = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "LANG": "C.UTF-8"}
        self.environ["JUPYTER_DATA_DIR"] = str(directory / "jupyter")

    def launch(self, mode: str, *words: str | Path) -> list[str]:
        """Return the argv that a setup writes, with /bin/true as the kernel.

        It is called python, as most kernels: for others two signals are reset, which costs 5 ms.
        """
        kernel = self.directory / "python"
        if not kernel.exists():
            kernel.symlink_to("/bin/true")
        typed = [mode, "--name=bench", "--user", "--replace", *map(str, words)]
        done(sys.executable, SCRIPT, *typed, "--", kernel, "{connection_file}", env=self.environ)
        spec = json.loads((self.directory / "jupyter/kernels/bench/kernel.json").read_text())
        argv: list[str] = spec["argv"]
        return [word.replace("{connection_file}", CONNECTION_FILE) for word in argv]

    def rows(self) -> Iterator[Row]:
        """Build what is measured."""
        venv = self.directory / "venv"
        done(sys.executable, "-m", "venv", "--without-pip", venv)
        ours = self.launch("virtualenv", venv)
        yield Row("virtualenv", ours, BARE, FLOOR, 2.5)
        yield Row("virtualenv", ours, "bash: source bin/activate", sourcing(venv / "bin/activate"), None)
        edited = self.directory / "edited"
        shutil.copytree(venv, edited, symlinks=True)
        script = edited / "bin" / "activate"
        script.write_text(script.read_text().replace(str(venv), str(edited)) + "\nexport EDITED=1\n")
        ours = self.launch("virtualenv", edited)
        yield Row("virtualenv, edited", ours, "bash: source bin/activate", sourcing(script), None)
        yield from self.conda_rows()
        if (LMOD / "libexec" / "lmod").exists():
            yield from self.lmod_rows(venv)

    def conda_rows(self) -> Iterator[Row]:
        """conda environments: plain, with variables, with scripts."""
        root = Path(self.conda).resolve().parents[1] if self.conda else make_root(self.directory / "conda")
        prefix = make_conda(self.directory / "plain")
        state = make_conda(self.directory / "state", state={"A": "1"})
        scripts = make_conda(self.directory / "scripts", activate={"a.sh": "export A=1\n"})
        self.environ["CONDA_EXE"] = f"{root}/bin/conda"
        plain = self.launch("conda", prefix)
        yield Row("conda", plain, BARE, FLOOR, 1.8)
        yield Row("conda, variables", self.launch("conda", state), BARE, FLOOR, None)
        script = scripts / "etc/conda/activate.d/a.sh"
        yield Row(
            "conda, scripts", self.launch("conda", scripts), "bash: source a.sh", sourcing(script), None
        )
        if self.conda:
            program = f'eval "$({shlex.quote(self.conda)} shell.posix activate {prefix})"; exec /bin/true'
            yield Row("conda", plain, "bash: conda activate", [*BASH, program], 1 / 15)

    def lmod_rows(self, venv: Path) -> Iterator[Row]:
        """Lmod alone, and before a virtualenv."""
        write_tree(self.directory / "tree", venv, lua=True)
        self.environ["MODULEPATH"] = str(self.directory / "tree" / "core")
        self.environ.update(bash_environ(f". {LMOD}/init/bash", self.environ))
        bare = [self.environ["LMOD_CMD"], "python", "load", "gcc/12"]
        yield Row("lmod", self.launch("lmod", "gcc/12"), "lmod python load", bare, 1.7)
        chain = self.launch("lmod", "gcc/12", "--", "virtualenv", venv)
        yield Row("lmod + virtualenv", chain, "lmod python load", bare, None)


def sourcing(script: Path) -> list[str]:
    """Return the command by which a bash sources a script and then becomes the kernel."""
    return [*BASH, f". {shlex.quote(str(script))}; exec /bin/true"]


def seconds(argv: Sequence[str], environ: dict[str, str], quiet: int) -> float:
    """Return how long a program runs, from its start to its end."""
    actions = [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
    file = f"/tmp/kernel-{next(STARTS)}.json"
    argv = [word.replace(CONNECTION_FILE, file) for word in argv]
    start = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, environ, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - start
    assert status == 0, f"{argv} ended with {status}"
    return took


def opened(argv: Sequence[str], environ: dict[str, str]) -> str:
    """Return how many files a program opens before it executes the kernel; "-" without strace."""
    if not shutil.which("strace"):
        return "-"
    count = 0
    with tempfile.NamedTemporaryFile("r") as trace:
        command = ["strace", "-f", "-qq", "-e", "trace=openat,open,execve", "-o", trace.name, *argv]
        subprocess.run(command, env=environ, check=True, capture_output=True)
        for line in trace:
            if re.search(r'execve\("(/bin/true|[^"]*/envkernel-bench-[^"/]*/python)"', line):
                break
            count += "open" in line and "ENOENT" not in line
    return str(count)


def measure(bench: Bench, rows: Sequence[Row], rounds: int, say: Callable[[str], None]) -> bool:
    """Run the rounds and print the table; return whether every goal was met."""
    times: dict[tuple[str, ...], list[float]] = {argv: [] for row in rows for argv in (row.ours, row.theirs)}
    with open(os.devnull, "w") as quiet:
        for number in range(rounds + 2):
            for argv, found in times.items():
                took = seconds(argv, bench.environ, quiet.fileno())
                if number > 1:  # the first two fill caches
                    found.append(took)
    say(f"{'mode':20} {'ms':>7} {'files':>6}   {'against':27} {'ms':>7} {'files':>6} {'ratio':>7}  goal")
    met = True
    for row in rows:
        ours, theirs = times[row.ours], times[row.theirs]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        missed = row.goal is not None and ratio > row.goal
        met = met and not missed
        goal = "" if row.goal is None else f"<= {row.goal:.2f}{'  MISSED' if missed else ''}"
        files = [opened(argv, bench.environ) for argv in (row.ours, row.theirs)]
        left = f"{row.name:20} {statistics.median(ours) * 1000:7.1f} {files[0]:>6}"
        right = f"{row.against:27} {statistics.median(theirs) * 1000:7.1f} {files[1]:>6}"
        say(f"{left}   {right} {ratio:7.2f}  {goal}")
    return met


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure envkernel's launches in each environment mode.")
    parser.add_argument("--rounds", type=int, default=40, help="how often each command runs")
    parser.add_argument("--conda", default="", help="a real conda program, to compare with its activate")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="envkernel-bench-")))
        bench = Bench(directory, options.conda)
        rows = list(bench.rows())
        return 0 if measure(bench, rows, options.rounds, print) else 1


if __name__ == "__main__":
    sys.exit(main())
