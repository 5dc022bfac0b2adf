"""Kernels in containers of a real YARN, through Skein, and the recipe of Skein's own document."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import psutil
import pytest
from jupyter_client import BlockingKernelClient

from support import memory
from support.clusters import Errors, alive, driven_kernel, node_processes, processes, run_process
from support.jupyter import Jupyter, Kernel, run_protocol_tests
from support.slurm import run_sshd, wait_for
from support.yarn import Yarn

pytestmark = pytest.mark.live

ENDED = ("FINISHED", "FAILED", "KILLED")


@pytest.fixture(scope="module")
def skein_client(yarn: Yarn) -> Iterator[Any]:
    """A client to look at YARN with."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in yarn.environ.items():
            patch.setenv(name, value)
        import skein  # looks at the environment when it is loaded

        client = skein.Client(log=False)
    yield client
    client.close()


@pytest.fixture
def cluster(jupyter: Jupyter, yarn: Yarn, skein_client: Any) -> Iterator[Any]:
    """YARN, known to the private Jupyter; afterwards no application is left."""
    jupyter.environ.update(yarn.environ)
    yield skein_client
    wait_for(lambda: not running(skein_client), "the end of the applications", 15)
    assert not list(Path("/tmp").glob("envkernel-node-*"))


def running(client: Any) -> list[str]:
    return [report.id for report in client.get_applications(states=("submitted", "accepted", "running"))]


def final(client: Any, number: str, seconds: float = 15) -> tuple[str, str]:
    """State and final status of an application that has ended, or does so within some seconds."""
    wait_for(lambda: str(client.application_report(number).state) in ENDED, f"the end of {number}", seconds)
    report = client.application_report(number)
    return str(report.state), str(report.final_status)


def install(jupyter: Jupyter, name: str, packed: Path, *options: str) -> None:
    jupyter.setup("yarn", name, "--linger=1", "--memory=512", *options, packed)


def test_life_of_a_kernel(
    jupyter: Jupyter, yarn: Yarn, cluster: Any, packed: Path, errors: Errors, tmp_path: Path
) -> None:
    """Environment, interrupt, restarts in the same application, two at once, logs, success."""
    (tmp_path / "settings file").write_text("sent along")
    options = (
        "--vcores=2",
        "--queue=small",
        "--env",
        "GREETING=a b",
        f"--file=s.ini={tmp_path}/settings file",
    )
    install(jupyter, "life", packed, *options)
    with jupyter.kernel("life", stderr=errors.file) as kernel:
        [number] = running(cluster)
        report = cluster.application_report(number)
        assert (report.name, report.queue) == ("life", "root.small")
        assert kernel.environ()["GREETING"] == "a b"
        assert kernel.environ()["SKEIN_APPLICATION_ID"] == number
        assert "/environment" in kernel.value("__import__('sys').prefix") + kernel.environ()["VIRTUAL_ENV"]
        assert kernel.value("open('s.ini').read()") == "sent along"
        key = json.loads(Path(kernel.manager.connection_file).read_text())["key"]
        agent = psutil.Process(int(kernel.value("__import__('os').getppid()")))
        for process in (agent, *agent.children(), run_process(kernel), *run_process(kernel).children()):
            assert not any(key in text for text in [*process.cmdline(), *process.environ().values()])
        store = cluster.connect(number).kv
        assert list(store) == ["envkernel.agent"], "the orders with the secret have been taken out"
        assert b"secret" not in store["envkernel.agent"]
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        assert memory.megabytes(memory.family(kernel.pid)) <= 30
        assert memory.megabytes([process.pid for process in node_processes(kernel)], others=0) <= 30
        kernel.restart()
        kernel.restart(now=True)
        assert kernel.value("1 + 1") == "2"
        assert running(cluster) == [number], "a restart gets the same application"
        text, _ = kernel.execute(
            "import os; n = os.write(2, b'to the log of the container\\n'); print('x' * 9_999_999)"
        )
        assert text.count("x") == 9_999_999
        kernel.shutdown()
        assert final(cluster, number) == ("FINISHED", "SUCCEEDED")
    assert f"YARN application {number} was submitted" in errors.text()
    assert f"{number} waits: ACCEPTED" in errors.text()
    logs = yarn.dir.glob(f"logs/{number}/*/kernel.log")
    assert any("to the log of the container" in log.read_text() for log in logs)


def node_pids(kernel: Kernel) -> list[int]:
    """The processes of a kernel and its agent."""
    return [int(kernel.value(f"__import__('os').{name}()")) for name in ("getpid", "getppid")]


def test_two_kernels_and_the_suite_of_jupyter_kernel_test(
    jupyter: Jupyter, cluster: Any, packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in jupyter.environ.items():
        if name in ("HADOOP_CONF_DIR", "SKEIN_CONFIG", "JAVA_HOME", "PATH"):
            monkeypatch.setenv(name, value)
    install(jupyter, "suite", packed)
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    with jupyter.kernel("suite", cwd=str(notebooks)) as first:
        assert first.value("__import__('os').getcwd()") == str(notebooks)
        run_protocol_tests("suite")
        assert first.value("6 * 7") == "42"


def test_exit_in_a_kernel_behind_ssh_is_success(
    jupyter: Jupyter, yarn: Yarn, cluster: Any, packed: Path, tmp_path: Path
) -> None:
    with run_sshd(tmp_path, "localhost", "127.0.0.1") as ssh:
        jupyter.environ["PATH"] = f"{ssh}:{yarn.environ['PATH']}"
        install(jupyter, "leave", packed, "--tunnel=ssh")
        with jupyter.kernel("leave") as kernel:
            [number] = running(cluster)
            connections = [c for process in node_processes(kernel) for c in process.net_connections("inet")]
            [place] = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
            assert place.ip == "127.0.0.1"
            assert processes("ssh", f"/tunnel:127.0.0.1:{place.port}"), "the way to the agent"
            kernel.client.execute("exit")
            kernel.manager.provisioner.process.wait(10)
            assert final(cluster, number) == ("FINISHED", "SUCCEEDED")


def test_failing_kernel_is_a_failure(jupyter: Jupyter, cluster: Any, packed: Path, errors: Errors) -> None:
    jupyter.setup("yarn", "fails", "--linger=0", packed, "--", "python", "-c", "exit(3)", "{connection_file}")
    with jupyter.kernel("fails", stderr=errors.file) as kernel:
        text, error = kernel.execute("1")
        assert "ended before it answered (exit status 3)" in str(error) + text
        number = re.findall(r"application_\d+_\d+", errors.text())[0]
        assert final(cluster, number)[1] == "FAILED"


def test_application_killed_from_outside(
    jupyter: Jupyter, cluster: Any, packed: Path, errors: Errors
) -> None:
    install(jupyter, "victim", packed)
    with jupyter.kernel("victim", stderr=errors.file) as kernel:
        [number] = running(cluster)
        pids = [
            int(kernel.value("__import__('os').getpid()")),
            int(kernel.value("__import__('os').getppid()")),
        ]
        cluster.kill_application(number)
        wait_for(lambda: not alive(pids), f"the end of {pids}", 10)
        kernel.manager.provisioner.process.wait(20)
    said = errors.text()
    assert f"The YARN application {number} has ended: killed." in said
    assert "was killed by user" in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_the_run_process(jupyter: Jupyter, cluster: Any, packed: Path, number: int) -> None:
    install(jupyter, "orphan", packed)
    with jupyter.kernel("orphan") as kernel:
        [application] = running(cluster)
        pids = [
            int(kernel.value("__import__('os').getpid()")),
            int(kernel.value("__import__('os').getppid()")),
        ]
        os.killpg(kernel.pid, number)
        kernel.manager.provisioner.process.wait(5)
        wait_for(lambda: not alive(pids), f"the end of {pids}", 10)
        assert final(cluster, application, 10) == ("FINISHED", "SUCCEEDED")


def test_container_out_of_memory(jupyter: Jupyter, cluster: Any, packed: Path, errors: Errors) -> None:
    """The NodeManager kills a container that has more than it asked for."""
    install(jupyter, "full", packed)
    with jupyter.kernel("full", stderr=errors.file) as kernel:
        [number] = running(cluster)
        pids = node_pids(kernel)
        kernel.client.execute("b = bytes(range(256)) * 2_400_000; import time; time.sleep(60)")
        wait_for(lambda: not alive(pids), f"the end of {pids}", 10)
        kernel.manager.provisioner.process.wait(20)
        assert final(cluster, number)[0] in ENDED
    said = errors.text()
    assert "has used more memory than it asked for" in said, said
    assert "--memory=" in said


def test_node_manager_is_lost(jupyter: Jupyter, yarn: Yarn, cluster: Any, packed: Path) -> None:
    """Its containers' processes live on, and so does the kernel, until its notebook is shut down."""
    install(jupyter, "lost", packed)
    try:
        with jupyter.kernel("lost") as kernel:
            [number] = running(cluster)
            pids = node_pids(kernel)
            masters = [process.pid for process in processes("skein.ApplicationMaster", number)]
            yarn.crash_node()
            assert kernel.value("6 * 7") == "42"
            assert alive(pids) == pids
            kernel.shutdown()
            wait_for(lambda: not alive(pids), f"the end of {pids}", 10)
            yarn.start_node()
            wait_for(lambda: not alive(masters), f"the end of {masters}", 10)
    finally:
        if "nodemanager" not in yarn.daemons:
            yarn.start_node()


def test_death_of_jupyter(jupyter: Jupyter, cluster: Any, packed: Path) -> None:
    install(jupyter, "widow", packed, "--linger=60")
    with driven_kernel(jupyter, "widow") as (driver, run):
        [number] = running(cluster)
        agents = processes("import marshal,sys,zlib")
        roots = [run, *agents]
        pids = [process.pid for root in roots for process in (root, *root.children(recursive=True))]
        assert len(pids) >= 4, "run process, keeper, agent and kernel"
        driver.kill()
        wait_for(lambda: not alive(pids), f"the end of {pids}", 10)
        assert final(cluster, number, 10) == ("FINISHED", "SUCCEEDED")


def test_shutdown_before_it_runs(jupyter: Jupyter, cluster: Any, packed: Path, errors: Errors) -> None:
    """Nothing of a kernel that nobody waits for any more is ever started."""
    from jupyter_client import KernelManager

    install(jupyter, "early", packed)
    manager = KernelManager(kernel_name="early")
    manager.start_kernel(env=jupyter.environ, stderr=errors.file)
    errors.wait("was submitted", 20)
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()
    wait_for(lambda: not running(cluster), "the end of the application", 15)


def test_setup_says_what_is_missing(jupyter: Jupyter, cluster: Any, packed: Path, tmp_path: Path) -> None:
    queue = jupyter.envkernel("yarn", "--name=no", "--user", "--queue=nosuch", packed, status=1).stderr
    assert "YARN has no queue nosuch that can be used" in queue
    assert "There are: default, small." in queue
    broken = {"HADOOP_CONF_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = jupyter.envkernel("yarn", "--name=no", "--user", packed, status=1, environ=broken).stderr
    assert "There is no yarn on this machine" in command
    assert not (jupyter.kernels / "no").exists()


SPEC = """
name: ipython-demo
services:
  ipython:
    resources:
      memory: 1024
      vcores: 1
    files:
      environment: {packed}
    script: |
      source environment/bin/activate
      python -m skein.recipes.ipython_kernel
"""
"""As the document has it; what it calls ``commands`` is ``script`` since Skein 0.8."""


def test_recipe_of_skeins_document(jupyter: Jupyter, cluster: Any, packed: Path, tmp_path: Path) -> None:
    """Seven steps by hand, as the document has them: submit, fetch the connection file, connect, exit."""
    (tmp_path / "ipython-demo.yaml").write_text(SPEC.format(packed=packed))
    environ = {**os.environ, **jupyter.environ}

    def skein(*words: str) -> str:
        argv = [sys.executable, "-m", "skein.cli", *words]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    number = skein("application", "submit", "ipython-demo.yaml").split()[-1]
    info = skein("kv", "get", number, "--key", "ipython.kernel.info", "--wait")
    (tmp_path / "kernel.json").write_text(info)
    client = BlockingKernelClient(connection_file=str(tmp_path / "kernel.json"))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=30)
    assert Kernel(None, client).value("6 * 7") == "42"  # type: ignore[arg-type]
    client.stop_channels()
    console = [sys.executable, "-m", "jupyter_console", "--simple-prompt", "--existing", "kernel.json"]
    said = subprocess.run(
        console,
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        input="print(6*7)\nexit\n",
        timeout=60,
    )
    assert "42" in said.stdout, said
    assert final(cluster, number) == ("FINISHED", "SUCCEEDED")
    assert "SUCCEEDED" in skein("application", "status", number)
