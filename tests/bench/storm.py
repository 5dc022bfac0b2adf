#!/usr/bin/env python3
"""Kill kernels of every mode at random moments, and print what was left of them.

    tests/bench/storm.py [--rounds=N] [--modes=docker,slurm] [--parallel=K] [--envkernel=PATH] [--first=SEED]

N rounds of each mode; a round's seed chooses victim and moment (``support/storm.py``).  Prints every round
that left something with its seed, then a table by mode and victim.  Starts engines and clusters of its own
(as root).
``--only=slurm:17,docker:4`` plays these rounds alone.  Ends with 1 where something was left.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support import SCRIPT  # noqa: E402
from support.modes import MAKERS, Things  # noqa: E402
from support.storm import Outcome, Storm  # noqa: E402


def table(outcomes: list[Outcome]) -> str:
    """Return rounds, faults and cleanup times by mode and victim."""
    rows: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.mode, outcome.victim].append(outcome)
        rows[outcome.mode, "(all)"].append(outcome)
        rows["(all)", "(all)"].append(outcome)
    head = ("mode", "victim", "rounds", "left", "stays", "hung", "survived", "swept", "median s", "slowest s")
    lines = ["{:14}{:19}{:>7}{:>6}{:>7}{:>6}{:>10}{:>7}{:>10}{:>11}".format(*head)]
    order = [*MAKERS, "(all)"]
    for (mode, victim), some in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1])):
        times = sorted(outcome.seconds for outcome in some)
        count = (
            len(some),
            sum(bool(outcome.left) for outcome in some),
            sum(outcome.stays for outcome in some),
            sum(bool(outcome.hung) for outcome in some),
            sum(outcome.survived for outcome in some),
            sum(bool(outcome.before_sweep) for outcome in some),
        )
        line = "{:14}{:19}{:>7}{:>6}{:>7}{:>6}{:>10}{:>7}".format(mode, victim, *count)
        lines.append(f"{line}{times[len(times) // 2]:>10.1f}{times[-1]:>11.1f}")
    return "\n".join(lines)


def main() -> int:
    """Play the rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="of each mode")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--modes", default=",".join(MAKERS))
    parser.add_argument("--only", default="", help="rounds as MODE:SEED,...")
    parser.add_argument("--parallel", type=int, default=5)
    parser.add_argument("--envkernel", type=Path, default=SCRIPT, help="the envkernel.py to try")
    options = parser.parse_args()
    names = options.modes.split(",")
    seeds = {name: list(range(options.first, options.first + options.rounds)) for name in names}
    if options.only:
        pairs = [item.split(":") for item in options.only.split(",")]
        names = list(dict.fromkeys(name for name, _ in pairs))
        seeds = {name: [int(seed) for other, seed in pairs if other == name] for name in names}
    begin = time.monotonic()
    outcomes = []
    with Things() as things:
        modes = [MAKERS[name](things.get) for name in names]
        with Storm(modes, options.envkernel.resolve()) as storm:
            for outcome in storm.play(seeds, options.parallel):
                outcomes.append(outcome)
                if not outcome.good:
                    print(outcome, flush=True)
                elif os.isatty(1):
                    print(outcome)
    print(f"\n{len(outcomes)} rounds in {time.monotonic() - begin:.0f} s, {options.parallel} at once")
    print(table(outcomes))
    return not all(outcome.good for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
