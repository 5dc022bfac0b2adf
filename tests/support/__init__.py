"""One module per outside thing that envkernel works with; each defines its pytest fixtures."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "envkernel.py"
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "envkernel-tests"
CACHE = Path(os.environ.get("ENVKERNEL_TEST_CACHE") or CACHE)


def cache_dir() -> Path:
    """Return the private directory for what is made once and kept between runs, whatever HOME a test has."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return a directory of the cache; where it is not there yet, `make` fills it, in one process at a
    time."""
    directory = cache_dir() / name
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            new = Path(f"{directory}.new")
            shutil.rmtree(new, ignore_errors=True)
            make(new)
            new.rename(directory)
    return directory


def missing(what: str) -> NoReturn:
    """Skip the test because this machine lacks something; in CI nothing may be missing."""
    if IN_CI:
        pytest.fail(f"missing in CI: {what}", pytrace=False)
    pytest.skip(f"missing: {what}")


def done(*argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that has to succeed; where it fails, what it said is in the test's report."""
    result = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{argv} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result


def free_subnet() -> str:
    """Return the first three numbers of a /24 network that this machine does not use.

    Two processes begin to look at least four apart, so that they do not find the same one at once.
    """
    used = " ".join([*done("ip", "-4", "address").stdout.split(), *done("ip", "-4", "route").stdout.split()])
    first = os.getpid() * 4
    subnets = (f"10.{213 + index // 256 % 8}.{index % 256}" for index in range(first, first + 512))
    return next(subnet for subnet in subnets if f" {subnet}." not in f" {used}")


def describe_machine() -> str:
    """Return what may explain that a kernel is not reached: addresses, routes and who listens."""
    argvs = (["ip", "-br", "address"], ["ip", "neighbour"], ["ip", "route"], ["ss", "-ltnpH"])
    there = [argv for argv in argvs if shutil.which(argv[0])]
    said = [subprocess.run(argv, capture_output=True, text=True, check=False).stdout for argv in there]
    return "\n".join(said)


def read_environ(raw: bytes) -> dict[str, str]:
    """Return what ``env -0`` printed, or /proc/PID/environ holds, as a dictionary."""
    return dict(os.fsdecode(entry).partition("=")[::2] for entry in raw.split(b"\0") if entry)


NOT_COMPARED = frozenset(("_", "SHLVL", "PWD", "OLDPWD", "PS1"))
"""Variables that every bash rewrites: no part of what "the same environment" means."""


def difference(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Return the variables in which two environments differ, as (ours, theirs)."""
    names = (set(ours) | set(theirs)) - NOT_COMPARED
    pairs = {name: (ours.get(name), theirs.get(name)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def bash_environ(script: str, environ: dict[str, str], *words: str | Path) -> dict[str, str]:
    """Let a bash run `script` and return the environment it ends in: the reference for every mode.

    `words` are ``$1``...; what the script prints goes to stderr, and its failure does not end it.
    """
    argv = [
        "/bin/bash",
        "--noprofile",
        "--norc",
        "-c",
        f"{{ {script}\n}} >&2 </dev/null\nexec /usr/bin/env -0",
    ]
    result = subprocess.run([*argv, "bash", *map(str, words)], env=environ, capture_output=True, check=False)
    assert result.stdout, f"bash ended early:\n{os.fsdecode(result.stderr)}"
    return read_environ(result.stdout)
