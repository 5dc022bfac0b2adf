"""What all tests share: the fixtures of tests/support, one module per outside thing."""

import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # kernels of the tests must not inherit that

pytest_plugins = [
    "support.jupyter",
    "support.venvs",
    "support.modules",
    "support.conda",
    "support.images",
    "support.apptainer",
    "support.slurm",
    "support.clusters",
    "support.yarn",
    "support.docker",
    "support.podman",
    "support.registry",
    "support.browser",  # imports others of these
    "support.modes",
]


TOGETHER = {
    **dict.fromkeys(("slurm", "jobs", "yarn"), "cluster"),
    **dict.fromkeys(("docker", "clients", "lab", "languages", "reasons", "check", "hard_cases"), "docker"),
    "kernels": "kernels",  # needs no image: the first to need one makes it meanwhile
    "podman": "podman",
}
"""Files of live tests that share daemons, and so run in one worker; any other file runs for itself.

In the order in which they start: what takes longest comes first."""


def group_of(path, parameter=""):
    """Return what a file of tests runs together with; a test of all modes, by the daemon of its mode."""
    from support.modes import GROUPS  # not earlier: its assertions would not be explained

    own = path if not parameter else f"{path}[{parameter}]"
    return GROUPS.get(parameter.partition("-")[0]) or TOGETHER.get(Path(path).stem.partition("_")[2], own)


def mode_of(nodeid):
    """Return the mode that a test of all modes is about."""
    from support.modes import MAKERS

    parameter = nodeid.partition("[")[2].rstrip("]")
    return parameter if parameter in MAKERS else ""


def pytest_collection_modifyitems(items):
    """Have the groups run first."""
    order = list(TOGETHER.values())
    for item in items:
        item.group = group_of(item.path, mode_of(item.nodeid))
    items.sort(key=lambda item: order.index(item.group) if item.group in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deal out whole files, or those that share daemons, to the workers of pytest-xdist."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid.partition("::")[0], mode_of(nodeid))

    config.option.loadscopereorder = False  # ours is kept
    return Files(config, log)


def pytest_itemcollected(item):
    """Try a live test once more where it fails: daemons, clocks and two busy cores are not ours.

    The summary names each test that needed it (-rR); one that fails twice has failed.
    """
    if item.get_closest_marker("live"):
        item.add_marker(pytest.mark.flaky(reruns=1))


def utf8(value):
    """Return data with each surrogate in its strings as an escape."""
    if isinstance(value, dict):
        return {utf8(key): utf8(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(utf8, value))
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


@pytest.hookimpl(hookwrapper=True)
def pytest_report_to_serializable():
    """Have pytest-xdist carry reports that show paths which are not UTF-8: it ends with an error there."""
    outcome = yield
    outcome.force_result(utf8(outcome.get_result()))
