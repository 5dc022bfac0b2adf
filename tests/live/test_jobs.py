"""What Slurm's users see of a job that is refused, ends early or leaves something: cell, log and `check`."""

import sys

import pytest

from support.reasons import checked, reason

pytestmark = pytest.mark.live


def test_a_refused_job_and_a_kernel_that_ends_on_its_node(jupyter, slurm):
    jupyter.environ.update(slurm.environ)
    command = ["/bin/sh", "-c", "echo no licence >&2; exit 3", "{connection_file}"]
    slurm.run("scontrol", "create", "PartitionName=short", "Nodes=near", "State=UP")
    jupyter.setup("slurm", "job", "--linger=1", "--partition=short", "--", *command)
    reply, _ = reason(jupyter, "job")
    assert "ended before it answered (exit status 3)" in reply["evalue"]
    assert "no licence" in "\n".join(reply["traceback"])
    log = jupyter.envkernel("log", "job").stdout
    assert "\nstderr:\n" in log
    assert "  no licence\n" in log
    assert "\nended: exit status 3\n" in log
    slurm.wait_no_jobs(10)
    slurm.run("scontrol", "delete", "PartitionName=short")
    reply, _ = reason(jupyter, "job")
    assert "nvalid partition" in "\n".join([reply["evalue"], *reply["traceback"]])
    assert "\nended: exit status 1\n" in jupyter.envkernel("log", "job").stdout


QUEUES = """
sbatch --quiet --partition=near --job-name=queued --output=/dev/null --chdir=/ --wrap 'sleep 99'
exec "$0" -m ipykernel_launcher -f "$1"
"""


def test_jobs_that_stay_are_found(jupyter, slurm):
    """Each start of this kernel submits a job of its own."""
    jupyter.environ.update(slurm.environ)
    command = ["/bin/sh", "-c", QUEUES, sys.executable, "{connection_file}"]
    jupyter.setup("slurm", "queued", "--linger=1", "--partition=near", "--", *command)
    _, errors = checked(jupyter, "queued", 1)
    jobs = slurm.jobs()
    slurm.run("scancel", *jobs)
    assert len(jobs) == 2  # the second one since the restart
    assert [step for step, error in errors.items() if error] == ["leftovers"]
    assert all(f"job {job}" in errors["leftovers"] for job in jobs)
    slurm.wait_no_jobs(10)
