"""How much memory envkernel uses next to a kernel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterable, Iterator

import psutil


def family(root: int) -> list[int]:
    """Return envkernel's processes for one kernel on this host: `root`, and those with its command line.

    What it forked and did not execute another program has that too: reaper and keeper.
    """
    command = psutil.Process(root).cmdline()
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["cmdline"] == command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def mappings(pid: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what a process has mapped: the file with its offset, and the kilobytes of each kind."""
    name, sizes = "", {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.partition(" ")[0]:
            if sizes:
                yield name, sizes
            fields = line.split(maxsplit=5)
            name, sizes = f"{fields[5] if len(fields) == 6 else ''}@{fields[2]}", {}
        elif rest.endswith(" kB"):
            sizes[key] = int(rest.split()[0])
    if sizes:
        yield name, sizes


def megabytes(pids: Iterable[int], others: int = 1) -> float:
    """Return the memory of a kernel's company in MB, as if `others` processes more ran its interpreter.

    Proportional (PSS), but PSS divides the code of the interpreter and its modules among all Pythons of the
    machine, and on a machine that runs tests these are many.  Jupyter is usually one, on a node nobody.
    """
    pids = list(pids)
    total = 0.0
    code: dict[str, int] = {}
    for pid in pids:
        program = os.path.realpath(f"/proc/{pid}/exe")
        for name, sizes in mappings(pid):
            file = name.rpartition("@")[0]
            if file == program or "/lib-dynload/" in file or "libpython" in file:
                total += sizes["Private_Dirty"] + sizes["Shared_Dirty"] / len(pids)
                clean = sizes["Private_Clean"] + sizes["Shared_Clean"]
                code[name] = max(clean, code.get(name, 0))
            else:
                total += sizes["Pss"]
    return (total + sum(code.values()) * len(pids) / (len(pids) + others)) * 1024 / 1e6
