"""A few rounds of the kill storm (`support.storm`) in every mode; ``tests/bench/storm.py`` plays more."""

from __future__ import annotations

import os

import pytest

from support.modes import MAKERS, Mode
from support.storm import Storm, victims_of

pytestmark = pytest.mark.live

JUPYTERS = ("group", "run", "clients", "jupyter", "agent", "container", "job")
"""What the suite kills in every mode that has it: what a user, an administrator or Jupyter does."""
KEEPERS = ("keeper", "jupyter+subreaper", "jupyter+keeper", "everyone", "two")
"""And what takes those away that clean up."""


def play(mode: Mode, victims: tuple[str, ...]) -> None:
    """Play a round for each victim; a failure names its seed.

    ``tests/bench/storm.py --only=MODE:SEED`` plays that round again.
    """
    first = int(os.environ.get("ENVKERNEL_STORM_SEED", "0"))
    choice = victims_of(mode)
    seeds = [first * len(choice) + choice.index(victim) for victim in victims if victim in choice]
    with Storm([mode]) as storm:
        outcomes = list(storm.play({mode.key: seeds}, parallel=4))
    assert len(outcomes) == len(seeds)
    wrong = [str(outcome) for outcome in outcomes if not outcome.good]
    assert not wrong, "\n".join(wrong)


LATE = pytest.mark.xfail(reason="issue 9: a JVM kills an application, on a busy machine not within 11 s")


@pytest.mark.parametrize(
    "mode", [pytest.param(key, marks=LATE if key == "yarn" else ()) for key in MAKERS], indirect=True
)
def test_nothing_is_left_of_what_is_killed(mode: Mode) -> None:
    play(mode, JUPYTERS)


@pytest.mark.parametrize(
    "mode",
    [pytest.param(key, marks=LATE if key == "yarn" else ()) for key in MAKERS if key != "virtualenv"],
    indirect=True,
)
def test_nothing_is_left_where_keepers_die(mode: Mode) -> None:
    play(mode, KEEPERS)
