"""A kernel that can't start says so in the protocol: each way to break one, each way to reach it."""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import uuid
from pathlib import Path

import jupyter_kernel_test
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager

from support import done
from support.containers import PlainUser, short_directory
from support.jupyter import Kernel, marked_processes, wait_for
from support.reasons import reason

pytestmark = pytest.mark.live


def copy_venv(venv, path):
    shutil.copytree(venv, path, symlinks=True, copy_function=os.link)
    return path


@pytest.fixture
def gone(jupyter, kernel_venv, tmp_path):
    """A virtualenv kernel whose environment is gone.  Returns where it was."""
    path = copy_venv(kernel_venv, tmp_path / "gone")
    jupyter.setup("virtualenv", "gone", path)
    shutil.rmtree(path)
    return path


def test_a_missing_environment(jupyter, gone):
    reply, published = reason(jupyter, "gone")
    assert reply["evalue"].startswith(f"There is no virtualenv at {gone}.")
    shown = published["display_data"]["data"]["text/plain"].splitlines()
    assert shown[1:] == [reply["traceback"][0].partition(": ")[2], *reply["traceback"][1:]]
    assert str(gone) not in "".join(published["error"]["traceback"]), "the same text twice in one cell"
    assert str(gone) in published["display_data"]["data"]["text/html"]
    log = jupyter.envkernel("log", "gone").stdout
    assert f"not started: There is no virtualenv at {gone}." in log
    start = log.splitlines()[0].partition("@")[0]  # of a later launch's path, the one by nbclient
    assert f"Log of this launch: {start}@" in "\n".join(reply["traceback"])


def test_a_missing_interpreter(jupyter, kernel_venv, tmp_path):
    path = copy_venv(kernel_venv, tmp_path / "venv")
    jupyter.setup("virtualenv", "headless", path)
    for python in (path / "bin").glob("python*"):
        python.unlink()
    (path / "bin" / "python").symlink_to("/usr/bin/python3.0")  # as after an upgrade of the system
    evalue = reason(jupyter, "headless")[0]["evalue"]
    assert f"There is no python in the virtualenv {path}." in evalue
    assert "Its Python is gone (it was /usr/bin/python3.0); create it again: `python3 -m venv --cle" in evalue


def test_a_missing_ipykernel(jupyter, kernel_venv, tmp_path):
    path = copy_venv(kernel_venv, tmp_path / "venv")
    jupyter.setup("virtualenv", "empty", path)
    for module in path.glob("lib/python*/site-packages/ipykernel*"):
        shutil.rmtree(module) if module.is_dir() else module.unlink()
    evalue = reason(jupyter, "empty")[0]["evalue"]
    assert "There is no ipykernel_launcher" in evalue
    assert f"uv pip install --python {path}/bin/python ipykernel" in evalue  # uv's environments have no pip


def test_a_program_that_the_system_refuses(jupyter, kernel_venv, tmp_path):
    path = copy_venv(kernel_venv, tmp_path / "venv")
    jupyter.setup("virtualenv", "odd", path)
    python = path / "bin" / "python"
    python.unlink()
    python.write_text("#!/no/such/interpreter\n")
    python.chmod(0o755)
    evalue = reason(jupyter, "odd")[0]["evalue"]
    assert str(python) in evalue


def test_a_missing_conda_environment(jupyter, conda_kernel, tmp_path):
    path = copy_venv(conda_kernel, tmp_path / "conda")
    jupyter.setup("conda", "conda", path)
    shutil.rmtree(path)
    assert f"There is no conda environment at {path}." in reason(jupyter, "conda")[0]["evalue"]


def test_a_missing_module(jupyter, lmod, kernel_venv):
    jupyter.environ.update(lmod.environ)
    jupyter.setup("lmod", "modules", "gcc/12", "--", "virtualenv", kernel_venv)
    (lmod.root / "core/gcc/12").rename(lmod.root / "core/gcc/.12")
    try:
        reply, published = reason(jupyter, "modules")
    finally:
        (lmod.root / "core/gcc/.12").rename(lmod.root / "core/gcc/12")
    assert "`module load gcc/12` failed." in reply["evalue"]
    assert "gcc/12" in "\n".join(reply["traceback"][3:]), "what Lmod said"
    assert "module spider" in published["display_data"]["data"]["text/html"]


@pytest.mark.parametrize("change", ["--format=99", "--nonsense=1"])
def test_a_broken_kernelspec(jupyter, kernel_venv, change):
    spec = jupyter.setup("virtualenv", "broken", kernel_venv)
    at = spec["argv"].index("--format=2") + change.startswith("--n")
    spec["argv"][at : at + 1] = [change] + spec["argv"][at : at + 1] * change.startswith("--n")
    (jupyter.kernels / "broken" / "kernel.json").write_text(json.dumps(spec))
    evalue = reason(jupyter, "broken")[0]["evalue"]
    assert "kernelspec" in evalue
    assert "envkernel update" in evalue


@pytest.mark.parametrize(
    ("options", "end", "words", "hint"),
    [
        ([], "exit 3", "ended before it answered (exit status 3)", "by hand"),
        ([], "kill -9 $$", "was killed (SIGKILL)", "--memory"),
        ([], "exec /no/such/kernel", "can't run the kernel's program", "Dockerfile"),
        ([], "exec /etc/passwd", "can't run the kernel's program", "Dockerfile"),
        (["--memory=30m", "--memory-swap=30m"], "tail /dev/zero", "ran out of memory", "--memory"),
    ],
    ids=["fails", "killed", "127", "126", "memory"],
)
def test_a_kernel_that_ends_in_its_container_before_it_answers(jupyter, docker, options, end, words, hint):
    jupyter.environ.update(docker.environ)
    command = ["sh", "-c", f"echo no licence >&2; {end}", "{connection_file}"]
    jupyter.setup("docker", "ends", *options, "python", "--", *command)
    reply, published = reason(jupyter, "ends")
    shown = "\n".join(reply["traceback"])
    assert words in reply["evalue"]
    assert hint in reply["evalue"]
    assert "no licence" in shown
    assert "no licence" in published["display_data"]["data"]["text/html"]
    log = jupyter.envkernel("log", "ends").stdout
    assert "stderr:\n  no licence\n" in log
    assert "\nended: exit status " in log


def test_the_log_says_why_a_kernel_that_had_answered_ended(jupyter, docker):
    jupyter.environ.update(docker.environ)
    jupyter.setup("docker", "lost", "--python=python3", "python")
    with jupyter.kernel("lost") as kernel:
        assert kernel.execute("6 * 7") == ("42", None)
        [name] = docker.call("ps", "--filter=label=envkernel=lost", "--format={{.Names}}").split()
        docker.call("kill", name)
        deadline = time.monotonic() + 20
        while "\nended: " not in jupyter.envkernel("log", "lost").stdout and time.monotonic() < deadline:
            time.sleep(0.1)
        kernel.restart()
        said, error = kernel.execute("6 * 7")
        assert "The previous kernel ended" in said
        assert (said[-2:], error) == ("42", None)
        assert kernel.execute("6 * 7") == ("42", None)
        first, second = jupyter.envkernel("log", "lost").stdout.split("\n\n")
    assert first.startswith("The last abnormal end: ")
    assert "\nended: exit status 137\nreason: " in first
    assert "was killed" in first.partition("reason: ")[2]
    assert second.endswith("running: yes\n")


def test_what_a_container_needs_is_gone(jupyter, docker, tmp_path):
    """A directory, the image, the engine itself: each was there at setup.  (The daemon: test_docker.)"""
    jupyter.environ.update(docker.environ)
    engine, data = tmp_path / "docker", tmp_path / "data"
    engine.symlink_to(docker.program)
    data.mkdir()
    docker.call("tag", "python", "course:1")
    words = [f"--engine={engine}", "--mount", f"type=bind,src={data},dst=/data", "--python=python3"]
    jupyter.setup("docker", "course", *words, "course:1")
    data.rmdir()
    reply, _ = reason(jupyter, "course")
    assert reply["evalue"].startswith("docker can't start the container.")
    assert f"bind source path does not exist: {data}" in "\n".join(reply["traceback"])
    data.mkdir()
    docker.call("rmi", "course:1")
    evalue = reason(jupyter, "course")[0]["evalue"]
    assert "There is no image course:1 here. Fetch it: docker pull course:1" in evalue
    engine.unlink()
    evalue = reason(jupyter, "course")[0]["evalue"]
    assert str(engine) in evalue


FORBIDDEN = """
import json, os, shutil, subprocess, sys
from pathlib import Path
from support.jupyter import Jupyter
home = Path(os.environ["HOME"])
place = Jupyter(home / "j")
os.environ.update(place.environ)
venv = home / "venv"
shutil.copytree(sys.argv[1], venv, symlinks=True)
place.setup("virtualenv", "mine", venv)
venv.chmod(0)
with place.kernel("mine") as kernel:
    shown = kernel.execute("1")[1]
file = home / "kernel.json"
file.write_text("{}")
file.chmod(0)
argv = [str(file) if word == "{connection_file}" else word for word in place.spec("mine")["argv"]]
blind = subprocess.run(argv, env=place.environ, capture_output=True, text=True, timeout=20)
venv.chmod(0o700)
print(json.dumps([shown, blind.returncode, blind.stderr]))
"""


def test_what_a_user_may_not_read(kernel_venv):
    """An environment that belongs to others, and a connection file: then nobody can be answered."""
    with short_directory("forbidden") as directory:
        venv = directory / "venv"
        shutil.copytree(kernel_venv, venv, symlinks=True)
        user = PlainUser(directory, {})
        shown, status, said = user.run(FORBIDDEN, str(venv))
    assert (
        f"You may not read {directory}/home/venv, so the virtualenv {directory}/home/venv can't be used."
        in shown
    )
    assert status == 1
    assert said.startswith(f"envkernel: You may not read {directory}/home/venv")
    assert "The notebook can't show this: PermissionError(13, 'Permission denied')" in said


def test_a_kernel_that_crashes_is_heard_when_jupyter_starts_it_again(jupyter, kernel_venv, tmp_path):
    """No process remains next to a kernel of a virtualenv, except for the one that Jupyter had to start
    again."""
    path = copy_venv(kernel_venv, tmp_path / "venv")
    script = path / "bin" / "activate"
    text = script.read_text().replace(str(kernel_venv), str(path))
    script.unlink()  # a link, so that the other environment keeps its own
    script.write_text(text)
    jupyter.setup("virtualenv", "crashing", path)
    (module,) = path.glob("lib/python*/site-packages/ipykernel/kernelapp.py")
    whole = module.read_bytes()
    module.unlink()
    module.write_text("raise ImportError('libice.so.9: cannot open shared object file')")
    said = jupyter.envkernel("virtualenv", "--name=no", "--user", path, status=1).stderr
    assert f"ipykernel is there but can't be loaded in the virtualenv {path}." in said
    manager = manager_of(jupyter, "crashing")
    manager.start_kernel(env=jupyter.environ)
    assert manager.provisioner.process.wait(20) == 1
    manager.restart_kernel(now=True)
    kernel = Kernel(manager, manager.blocking_client())
    kernel.client.start_channels()
    try:
        wait_for(kernel.client)
        shown = kernel.execute("1")[1]
        assert f"The kernel in the virtualenv {path} ended before it answered (exit status 1)." in shown
        assert "Its library libice.so.9 is missing" in shown
        log = jupyter.envkernel("log", "crashing").stdout
        assert "ImportError: libice.so.9: cannot open shared object file\nended: exit status 1\n" in log
        module.write_bytes(whole)
        kernel.restart()
        assert kernel.execute("6 * 7") == ("42", None)
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"
        for beside in (True, False):  # the second time the kernel has shown that it works
            assert (kernel.pid != int(kernel.value("__import__('os').getpid()"))) == beside
            kernel.restart()
        kernel.restart(now=True)
        assert kernel.pid == int(kernel.value("__import__('os').getpid()"))
    finally:
        kernel.client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def manager_of(jupyter, name, **traits):
    file = jupyter.root / "runtime" / f"kernel-{uuid.uuid4().hex}.json"
    return KernelManager(
        kernel_name=name, kernel_spec_manager=KernelSpecManager(), connection_file=str(file), **traits
    )


@pytest.mark.parametrize(
    "traits", [{"transport": "ipc"}, {"transport_encryption": "required"}], ids=["ipc", "curve"]
)
def test_other_transports(jupyter, gone, traits):
    path = jupyter.kernels / "gone" / "kernel.json"
    spec = json.loads(path.read_text())
    assert spec["metadata"].get("supported_encryption") == ["curve"], (
        "ipykernel's metadata were not taken over"
    )
    manager = manager_of(jupyter, "gone", **traits)
    if manager.transport == "ipc":  # the path of a unix socket has to be short
        manager.connection_file = str(Path(tempfile.mkdtemp(prefix="ek")) / "kernel.json")
    manager.start_kernel(env=jupyter.environ)
    connection = json.loads(Path(manager.connection_file).read_text())
    assert ("curve_secretkey" in connection) == ("transport_encryption" in traits)
    assert connection["transport"] == traits.get("transport", "tcp")
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        assert client.hb_channel.is_beating()
        reply = client.execute_interactive("1", timeout=20, output_hook=lambda message: None)
        assert reply["content"]["ename"] == "KernelDidNotStart"
        if manager.transport == "tcp":  # a client without encryption gets no answer
            plain = manager_of(jupyter, "gone").blocking_client()
            known = {name: value for name, value in connection.items() if not name.startswith("curve_")}
            plain.load_connection_info({**known, "key": connection["key"].encode()})
            plain.start_channels(iopub=False, stdin=False, hb=False)
            plain.kernel_info()
            with pytest.raises(queue.Empty):
                plain.get_shell_msg(timeout=1)
            plain.stop_channels()
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
        manager.cleanup_resources()
    if manager.transport == "ipc":
        os.rmdir(os.path.dirname(manager.connection_file))


def test_interrupts_do_not_end_it_and_a_restart_tries_again(jupyter, gone, kernel_venv):
    with jupyter.kernel("gone") as kernel:
        first = kernel.pid
        for _ in range(3):
            kernel.manager.interrupt_kernel()
        assert "There is no virtualenv" in kernel.execute("1")[1]
        kernel.restart()
        assert kernel.pid != first
        assert "There is no virtualenv" in kernel.execute("1")[1]
        copy_venv(kernel_venv, gone)
        kernel.restart(now=True)
        assert kernel.execute("6 * 7") == ("42", None)
        shutil.rmtree(gone)


def test_control_messages(jupyter, gone):
    with jupyter.kernel("gone") as kernel:
        for kind, status in (("interrupt", "ok"), ("usage", "error"), ("debug", None), ("kernel_info", "ok")):
            message = kernel.client.session.msg(kind + "_request", {"command": "attach", "seq": 1})
            kernel.client.control_channel.send(message)
            reply = kernel.client.get_control_msg(timeout=10)
            assert reply["msg_type"] == kind + "_reply"
            assert reply["parent_header"]["msg_id"] == message["header"]["msg_id"]
            assert reply["content"].get("status") == status
        start = time.monotonic()
        kernel.client.shutdown(reply=True, timeout=10)
        kernel.manager.provisioner.process.wait(10)
        assert time.monotonic() - start < 3


def test_messages_with_another_key_are_ignored(jupyter, gone):
    with jupyter.kernel("gone") as kernel:
        stranger = manager_of(jupyter, "gone").blocking_client()
        stranger.load_connection_info({**kernel.manager.get_connection_info(), "key": b"wrong"})
        stranger.start_channels(iopub=False, stdin=False, hb=False)
        stranger.execute("1")
        stranger.shell_channel.socket.send_multipart([b"no", b"message"])
        with pytest.raises(queue.Empty):
            stranger.get_shell_msg(timeout=1)
        stranger.stop_channels()
        assert "KernelDidNotStart" in kernel.execute("1")[1]


def test_it_ends_with_jupyter(jupyter, gone):
    """A Jupyter that is killed leaves no error kernel behind."""
    program = (
        "import sys, time; from jupyter_client import KernelManager\n"
        "manager = KernelManager(kernel_name='gone'); manager.start_kernel()\n"
        "client = manager.blocking_client(); client.start_channels(); client.wait_for_ready(30)\n"
        "print(manager.connection_file, flush=True); time.sleep(100)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program], env=jupyter.environ, stdout=subprocess.PIPE, text=True
    )
    file = server.stdout.readline().strip()
    assert len(marked_processes(jupyter.mark)) == 2
    server.kill()
    server.wait()
    server.stdout.close()
    os.unlink(file)
    deadline = time.monotonic() + 5
    while marked_processes(jupyter.mark):
        assert time.monotonic() < deadline, marked_processes(jupyter.mark)
        time.sleep(0.1)


def test_it_does_not_outlive_a_jupyter_that_ends_while_the_kernel_is_planned(jupyter, kernel_venv, tmp_path):
    path = copy_venv(kernel_venv, tmp_path / "slow")
    jupyter.setup("virtualenv", "slow", path)
    script = path / "bin" / "activate"
    text = script.read_text()
    script.unlink()  # a hard link
    script.write_text(text + "\nsleep 2\nunset VIRTUAL_ENV\n")
    program = (
        "import os, time; from jupyter_client import KernelManager\n"
        "manager = KernelManager(kernel_name='slow'); manager.start_kernel()\n"
        "time.sleep(0.7); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program], env=jupyter.environ, check=True)
    assert marked_processes(jupyter.mark)
    deadline = time.monotonic() + 6
    while marked_processes(jupyter.mark):
        assert time.monotonic() < deadline, marked_processes(jupyter.mark)
        time.sleep(0.1)
    for file in (jupyter.root / "tmp").glob("*.json"):  # of its connection
        file.unlink()


@pytest.mark.parametrize("stderr", ["closed", "full", "unread"])
def test_it_is_shown_whatever_stderr_is(jupyter, gone, stderr):
    read, end = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full:
        file = {"closed": None, "full": full, "unread": end}[stderr]
        close = {"preexec_fn": lambda: os.close(2)} if stderr == "closed" else {}
        with jupyter.kernel("gone", stderr=file, **close) as kernel:
            reply = kernel.client.execute_interactive("1", timeout=20, allow_stdin=False)["content"]
    os.close(end)
    assert reply["evalue"].startswith(f"There is no virtualenv at {gone}.")


def start_for(jupyter, name, python=""):
    """Run a kernelspec's argv on a connection file, with another Python if one is named."""
    spec = jupyter.spec(name)
    manager = manager_of(jupyter, name)
    manager.write_connection_file()
    argv = [manager.connection_file if word == "{connection_file}" else word for word in spec["argv"]]
    argv[0] = python or argv[0]
    try:
        return subprocess.run(
            argv, env=jupyter.environ, capture_output=True, text=True, timeout=20, check=False
        )
    finally:
        manager.cleanup_connection_file()


def test_it_can_be_turned_off(jupyter, kernel_venv, tmp_path):
    path = copy_venv(kernel_venv, tmp_path / "venv")
    jupyter.setup("virtualenv", "plain", "--no-error-kernel", path)
    shutil.rmtree(path)
    said = start_for(jupyter, "plain")
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith(f"envkernel: There is no virtualenv at {path}.\n")


def test_without_jupyter_client_and_pyzmq_the_notebook_shows_it_at_once(jupyter, gone, tmp_path):
    """The launching Python has nothing but its standard library."""
    bare = tmp_path / "bare"
    done(sys.executable, "-m", "venv", "--without-pip", bare)
    path = jupyter.kernels / "gone" / "kernel.json"
    spec = json.loads(path.read_text())
    spec["argv"][0] = str(bare / "bin" / "python")
    path.write_text(json.dumps(spec))
    manager = manager_of(jupyter, "gone")
    start = time.monotonic()
    manager.start_kernel(env=jupyter.environ)
    client = manager.blocking_client()
    client.start_channels()
    try:
        reply = client.execute_interactive("1", timeout=20, output_hook=lambda message: None)["content"]
        assert time.monotonic() - start < 1
        assert reply["evalue"].startswith(f"There is no virtualenv at {gone}.")
        client.kernel_info()
        info = client.get_shell_msg(timeout=10)["content"]
        assert info["language_info"]["name"] == "python"
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
        manager.cleanup_resources()


def test_a_port_that_is_taken_is_no_traceback(jupyter, gone):
    import socket

    manager = manager_of(jupyter, "gone")
    manager.write_connection_file()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", manager.shell_port))
        taken.listen()
        words = [
            manager.connection_file if w == "{connection_file}" else w for w in jupyter.spec("gone")["argv"]
        ]
        said = subprocess.run(words, env=jupyter.environ, capture_output=True, text=True, check=False)
    manager.cleanup_connection_file()
    assert said.returncode == 1
    assert "The notebook can't show this" in said.stderr
    assert "Traceback" not in said.stderr


def test_the_good_path_loads_none_of_it(jupyter, kernel_venv):
    command = ["--", sys.executable, "-c", "pass", "{connection_file}"]
    spec = jupyter.setup("virtualenv", "good", kernel_venv, *command)
    argv = [*spec["argv"]]
    argv[1:1] = ["-X", "importtime"]
    said = subprocess.run(argv, env=jupyter.environ, capture_output=True, text=True, check=True)
    loaded = {
        line.rpartition("|")[2].strip() for line in said.stderr.splitlines() if line.startswith("import time")
    }
    assert not loaded & {"site", "json", "re", "zmq", "jupyter_client", "signal", "html", "zlib", "struct"}


def test_the_suite_of_jupyter_kernel_test(jupyter, gone):
    """All of it that applies to a kernel that only ever fails."""

    class Protocol(jupyter_kernel_test.KernelTests):
        kernel_name = "gone"
        language_name = "python"
        file_extension = ".py"
        complete_code_samples = ("1", "for x in y:")
        completion_samples = ({"text": "zi", "matches": ()},)

        def test_error(self):
            """The suite's own wants nothing but the error; here the reason comes in HTML as well."""
            self.flush_channels()
            reply, published = self.execute_helper("1 + 1")
            assert reply["content"]["status"] == "error"
            assert [message["msg_type"] for message in published] == ["display_data", "error"]

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Protocol).run(result)
    Protocol.km.cleanup_resources()
    assert not result.errors + result.failures
    skipped = {test.id().rpartition("_")[2] for test, _ in result.skipped}
    assert skipped == {"stdout", "stderr", "result", "data", "history", "inspect", "pager", "output"}
