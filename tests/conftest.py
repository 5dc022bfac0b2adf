"""What all tests share: the fixtures of tests/support, one module per outside thing."""

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


def pytest_collection_modifyitems(items):
    """Try a live test once more where it fails: daemons, clocks and two busy cores are not ours.

    The summary names each test that needed it (-rR); one that fails twice has failed.
    """
    for item in items:
        if item.get_closest_marker("live"):
            item.add_marker(pytest.mark.flaky(reruns=1))
