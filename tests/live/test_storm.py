"""A few rounds of the kill storm (`support.storm`) in every mode; ``tests/bench/storm.py`` plays more."""

from __future__ import annotations

import os

import pytest

from support import ROOT
from support.modes import MAKERS, Mode
from support.storm import VICTIMS, Storm, victims_of

pytestmark = pytest.mark.live

JUPYTERS = ("group", "run", "clients", "jupyter", "agent", "container", "job")
"""What the suite kills in every mode that has it: what a user, an administrator or Jupyter does."""
KEEPERS = ("keeper", "jupyter+subreaper", "jupyter+keeper", "everyone", "two")
"""And what takes those away that clean up."""


DOCUMENTED = {
    "run process, or Jupyter's process group": ("group", "run"),
    "keeper": ("keeper",),
    "engine's client or srun": ("client", "clients"),
    "agent on the node": ("agent",),
    "Jupyter": ("jupyter", "jupyter+subreaper"),
    "container or job, through its engine": ("container", "job"),
    "run process and keeper at the same moment": ("everyone",),
}
"""What README's table says that may be killed, and the victims of the storm that play it."""


def test_the_readme_says_what_happens_to_each_victim() -> None:
    text = (ROOT / "README.md").read_text().partition("| killed (SIGKILL) |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert rows == list(DOCUMENTED)
    played = {victim for kind in VICTIMS.values() for victim in kind} | {"container", "job"}
    assert {victim for some in DOCUMENTED.values() for victim in some} <= played


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


@pytest.mark.parametrize("mode", MAKERS, indirect=True)
def test_nothing_is_left_of_what_is_killed(mode: Mode) -> None:
    play(mode, JUPYTERS)


@pytest.mark.parametrize("mode", [key for key in MAKERS if key != "virtualenv"], indirect=True)
def test_nothing_is_left_where_keepers_die(mode: Mode) -> None:
    play(mode, KEEPERS)
