"""What all tests share: the fixtures of tests/support, one module per outside thing."""

from pathlib import Path

import pytest

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
]


TOGETHER = {
    **dict.fromkeys(("docker", "clients", "lab", "languages", "reasons", "check"), "docker"),
    **dict.fromkeys(("slurm", "yarn"), "cluster"),
}
"""Files of live tests that share daemons, and so run in one worker; any other file runs for itself."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deal out whole files, or those that stand together, to the workers of pytest-xdist."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            name = Path(file).stem.partition("_")[2]
            return TOGETHER.get(name, file)

    return Files(config, log)


def pytest_itemcollected(item):
    """Try a live test once more where it fails: daemons, clocks and two busy cores are not ours.

    The summary names each test that needed it (-rR); one that fails twice has failed.
    """
    if item.get_closest_marker("live"):
        item.add_marker(pytest.mark.flaky(reruns=1))
