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


TOGETHER = {
    **dict.fromkeys(
        ("test_docker", "test_clients", "test_lab", "test_languages", "test_reasons", "test_check"), "docker"
    ),
    **dict.fromkeys(("test_slurm", "test_yarn", "test_jobs"), "cluster"),
}
"""Files that share daemons, and so run in one worker; any other file runs for itself."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Deal out the files to the workers of pytest-xdist, and try a live test once more where it fails.

    Daemons, clocks and two busy cores are not ours.  The summary names each test that was tried again (-rR);
    one that fails twice has failed.
    """
    for item in items:
        file = item.path.stem
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(file, file)))
        if item.get_closest_marker("live"):
            item.add_marker(pytest.mark.flaky(reruns=1))
