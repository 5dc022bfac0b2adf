"""What all tests share: the fixtures of tests/support, one module per outside thing."""

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
    "support.browser",  # imports others of these
]
