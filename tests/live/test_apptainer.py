"""Singularity and Apptainer: each test on the strict stand-in and, where it is installed, on the real one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Iterator

import pytest
from jupyter_client import KernelManager
from jupyter_client.connect import write_connection_file

from support import SCRIPT, done, memory, missing
from support.apptainer import Apptainer
from support.containers import USER, PlainUser, short_directory
from support.engine_cases import AS_USER, graded_output, listeners, until
from support.jupyter import Jupyter, Kernel, run_protocol_tests, wait_for

pytestmark = pytest.mark.live

# ---- what the stand-in is strict about, tried on the real one too -----------------------------------


@pytest.fixture(scope="session")
def tree(apptainer: Apptainer, python_rootfs: Path) -> Path:
    """An image that is a directory."""
    return python_rootfs


def test_only_what_is_bound_is_visible(apptainer: Apptainer, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    seen = ["exec", "--contain", "--bind", f"{tmp_path}:/.envkernel:ro", tree, "sh", "-c"]
    assert apptainer.run(*seen, "cat /.envkernel/file").stdout == "text"
    assert apptainer.run(*seen, f"ls {tmp_path} || echo hidden").stdout == "hidden\n"
    assert "Read-only" in apptainer.run(*seen, "touch /.envkernel/new", status=1).stderr


def test_a_bind_without_source_is_refused(apptainer: Apptainer, tree: Path) -> None:
    said = apptainer.run("exec", "--bind", "/no/such/directory:/a", tree, "true", status=255)
    assert "mount source /no/such/directory doesn't exist" in said.stderr


@pytest.mark.parametrize("option", ["--volume=/a:/b", "--network-alias", "-v"])
def test_options_it_does_not_have_are_refused(apptainer: Apptainer, tree: Path, option: str) -> None:
    assert "unknown" in apptainer.run("exec", option, tree, "true", status=1).stderr


def test_the_host_is_there_unless_contained(apptainer: Apptainer, tree: Path, tmp_path: Path) -> None:
    assert apptainer.run("exec", tree, "ls", "-d", "/proc/self", tmp_path).returncode == 0
    assert apptainer.run("exec", "--contain", tree, "sh", "-c", "ls -A ~ /tmp; pwd").stdout.split() == [
        *("/root:", "/tmp:"),
        os.path.expanduser("~root"),
    ]


def test_variables_are_evaluated_unless_told_otherwise(
    apptainer: Apptainer, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINERENV_X", '$(echo evaluated) "q"')
    show = ("exec", "--cleanenv", tree, "printenv", "X")
    assert apptainer.run(*show).stdout == 'evaluated "q"\n'
    monkeypatch.setenv("APPTAINER_NO_EVAL", "1")
    assert apptainer.run(*show).stdout == '$(echo evaluated) "q"\n'


# ---- kernels ----------------------------------------------------------------------------------------

SETUP = ("--python=python3",)
ENDLESS = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"


def readers_of(secret: str) -> list[str]:
    """Return the processes that have a text in their arguments or environment."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                if directory.name != str(os.getpid()) and secret.encode() in (directory / name).read_bytes():
                    found.append(f"{directory}/{name}")
    return found


@pytest.fixture
def place(jupyter: Jupyter, apptainer: Apptainer) -> Jupyter:
    """A private Jupyter that finds the engine, and has a runtime directory as a login has."""
    jupyter.environ["PATH"] = f"{apptainer.directory}:{jupyter.environ['PATH']}"
    runtime = jupyter.root / "user"
    runtime.mkdir(mode=0o700)
    jupyter.environ["XDG_RUNTIME_DIR"] = str(runtime)
    return jupyter


def private_directories(place: Jupyter) -> list[Path]:
    """Return the private directories of running kernels."""
    return [path for path in place.root.glob("*/envkernel*/*") if path.is_dir()]


@pytest.mark.parametrize(
    "options",
    [[], ["--contain"], ["--containall", "--no-home"], ["--contain", "--network=none"]],
    ids=" ".join,
)
def test_a_kernel_like_any_other(place: Jupyter, sif: Path, options: list[str]) -> None:
    place.setup("apptainer", "life", *SETUP, *options, sif)
    before = listeners()
    with place.kernel("life") as kernel:
        path = Path(kernel.manager.connection_file)
        original = path.read_bytes()
        reported = json.loads(original)
        ports = {reported[name] for name in reported if name.endswith("_port")}
        new = listeners() - before
        assert {port for _, port in new} >= ports
        assert {ip for ip, port in new if port in ports} == {"127.0.0.1"}
        assert readers_of(reported["key"]) == []
        (directory,) = private_directories(place)
        copy = directory / "connection.json"
        modes = [
            one.stat().st_mode & 0o777 for one in (directory.parent, directory, copy)
        ]  # ipykernel makes it sticky
        assert modes == [0o700, 0o700, 0o600]
        assert json.loads(copy.read_text())["key"] == reported["key"]
        assert f"ok, running: process {kernel.pid}\n" in place.envkernel("list").stdout
        for _ in range(3):
            name, seconds = kernel.interrupt_in("import time\nwhile True: time.sleep(0.1)")
            assert name == "KeyboardInterrupt"
            assert seconds < 2
        # before a restart: a question is lost where the client's stdin channel is not there again yet
        assert kernel.answer("print(input('name? '))", "Ada") == ("name? ", "Ada\n")
        kernel.client.execute(ENDLESS)
        time.sleep(0.3)
        assert kernel.restart(now=True) < 8
        assert kernel.restart() < 8
        assert kernel.value("6 * 7") == "42"
        assert path.read_bytes() == original
        assert len(private_directories(place)) == 1
        if options:  # ipykernel leaves the cell in /tmp, which is the host's unless contained
            assert kernel.stop_in("def twice(n):\n    m = 2 * n\n    return m\n\ntwice(21)", 3) == (
                "twice",
                3,
                "42",
            )
        both = until(lambda: [memory.family(kernel.pid)] * (len(memory.family(kernel.pid)) == 2))
        assert memory.megabytes(both[0]) <= 30
        assert kernel.shutdown() < 5
        assert until(lambda: not private_directories(place))
    assert not {port for _, port in listeners()} & ports


def test_one_interrupt_is_one(place: Jupyter, sif: Path) -> None:
    """Apptainer passes SIGINT on to a kernel that has had it already, being in its group."""
    place.setup("apptainer", "once", *SETUP, "--pid", sif)
    with place.kernel("once") as kernel:
        count = "import signal, time; n = []; signal.signal(signal.SIGINT, lambda *a: n.append(1)); "
        kernel.client.execute(count + "print('started', flush=True); time.sleep(2)")
        time.sleep(0.7)
        kernel.manager.interrupt_kernel()
        time.sleep(1.5)
        assert kernel.value("len(n)") == "1"


def test_interrupt_reaches_what_the_kernel_runs(place: Jupyter, sif: Path) -> None:
    """os.system ignores SIGINT itself; natively the whole process group gets it."""
    place.setup("apptainer", "group", *SETUP, sif)
    with place.kernel("group") as kernel:
        message = kernel.client.execute("import os; os.system('sleep 60')")
        time.sleep(0.7)
        kernel.manager.interrupt_kernel()
        replies = (kernel.client.get_shell_msg(timeout=5) for _ in range(5))
        assert any(reply["parent_header"]["msg_id"] == message for reply in replies)


def test_nothing_of_the_host_leaks_in(place: Jupyter, sif: Path) -> None:
    leaks = {
        "PYTHONPATH": "/of-the-host",
        "PYTHONHOME": "/of-the-host",
        "LD_LIBRARY_PATH": "/of-the-host",
        "LD_PRELOAD": "",
        "JUPYTERHUB_API_TOKEN": "of-the-host",
        "JPY_API_TOKEN": "of-the-host",
        "CONDA_PREFIX": "/of-the-host",
        "VIRTUAL_ENV": "/of-the-host",
        "R_LIBS_USER": "/of-the-host",
    }
    values = {
        "PYTHONPATH": "/mine",
        "PATH": "/mine:/usr/bin:/bin",
        "ODD": "$(touch /tmp/x) `id` \\ \" ' ${HOME} {x}",
    }
    options = [word for item in values.items() for word in ("--env", "=".join(item))]
    place.setup("apptainer", "env", *SETUP, *options, "--cleanenv", sif)
    place.setup("apptainer", "leak", *SETUP, sif)
    with place.kernel("env", environ=leaks) as kernel:
        inside = kernel.environ()
        assert {name: inside[name] for name in values} == values
        assert not [one for one in readers_of("touch /tmp/x") if one.endswith("cmdline")]
    with place.kernel("leak", environ=leaks) as kernel:
        inside = kernel.environ()
        assert not {
            name for name, value in inside.items() if "of-the-host" in value or name.startswith("JPY_")
        }
        assert inside["PYTHONNOUSERSITE"] == "1"
        assert kernel.value("__import__('sys').flags.no_user_site") == "1"


def test_names_and_paths_with_any_character(place: Jupyter, apptainer: Apptainer, sif: Path) -> None:
    directory = place.root / "we ird, 'q\" ;{x}$(touch no):é"
    directory.mkdir()
    (directory / "file").write_text("text")
    image = directory / sif.name
    image.symlink_to(sif)
    escaped = str(directory).replace(",", "\\,").replace(":", "\\:")
    place.setup("apptainer", "odd", *SETUP, "--contain", f"--bind={escaped}:/in side\\,;'", "--pwd", image)
    with place.kernel("odd", cwd=str(directory)) as kernel:
        assert kernel.value("open('/in side,;\\'/file').read()") == "text"
        assert kernel.value("__import__('os').getcwd()") == str(directory)
        kernel.value("open('new', 'w').write('x')")
    assert sorted(os.listdir(directory)) == ["file", sif.name, "new"]


def test_binds_and_directories(place: Jupyter, sif: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("text")
    copied = f"--mount=type=bind,src={data},dst=/copied,copy"
    place.setup(
        *(
            "apptainer",
            "binds",
            *SETUP,
            "--contain",
            f"-B{data}:/ro:ro,{data}:/rw",
            copied,
            "--copy-workdir",
            sif,
        )
    )
    with place.kernel("binds", cwd=str(data)) as kernel:
        assert kernel.execute("open('/ro/new', 'w')")[1].startswith("OSError")  # type: ignore[union-attr]
        kernel.value("open('/copied/file', 'w').write('changed')")
        kernel.value("open('other', 'w').write('x')")
        kernel.value("open('/rw/mine', 'w').write('x')")
        assert kernel.value("__import__('os').getcwd()") == str(data)
    assert (data / "file").read_text() == "text"
    assert sorted(os.listdir(data)) == ["file", "mine"]
    place.setup("apptainer", "srv", *SETUP, "--workdir=/srv", sif)
    with place.kernel("srv") as kernel:
        assert kernel.value("__import__('os').getcwd()") == "/srv"


def test_a_full_disk_for_the_copy(place: Jupyter, sif: Path, tmp_path: Path) -> None:
    if os.getuid():
        missing("root, for a file system of its own")
    data, small = tmp_path / "data", tmp_path / "small"
    for directory in (data, small):
        directory.mkdir()
    (data / "file").write_bytes(bytes(3 << 20))
    place.setup("apptainer", "workdir", *SETUP, "--copy-workdir", sif)
    place.setup("apptainer", "mount", *SETUP, f"--mount=type=bind,src={data},dst=/data,copy", sif)
    done("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)
    try:
        for name in ("workdir", "mount"):
            with place.kernel(name, environ={"TMPDIR": str(small)}, cwd=str(data)) as kernel:
                _, error = kernel.execute("1")
                assert f"{data}/file can't be copied" in str(error)
                assert "No space left on device" in str(error)
            assert until(lambda: os.listdir(small) == [])
    finally:
        done("umount", small)


@contextlib.contextmanager
def little_memory(pid: int, size: int) -> Iterator[None]:
    """Put a process into a control group that may have no more than `size` bytes."""
    first, unified = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    directory = (first if first.is_dir() else unified) / f"envkernel-test-{os.getpid()}"
    directory.mkdir()
    try:
        (directory / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(size))
        (directory / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        assert until(lambda: not (directory / "cgroup.procs").read_text())
        directory.rmdir()


def test_a_kernel_that_is_killed_says_why(place: Jupyter, sif: Path) -> None:
    place.setup("apptainer", "killed", *SETUP, sif)
    log = place.root / "stderr"
    for code, words in (
        ("import os; os.kill(os.getpid(), 9)", "was killed (SIGKILL)"),
        ("x = bytearray(1 << 29)", "was killed (SIGKILL), most likely because memory ran out.\n"),
    ):
        with open(log, "w") as file, place.kernel("killed", stderr=file) as kernel:
            pid = int(kernel.value("__import__('os').getpid()"))
            with little_memory(pid, 200 << 20):
                kernel.client.execute(code)
                assert until(lambda kernel=kernel: not kernel.manager.is_alive(), 20)
        assert f"envkernel: The kernel in a container of {sif} {words}" in log.read_text()


def test_a_writable_image(place: Jupyter, apptainer: Apptainer, bare_rootfs: Path, tmp_path: Path) -> None:
    """It has the mount points that are in it, and no others."""
    image = tmp_path / "image"
    subprocess.run(["cp", "-a", bare_rootfs, image], check=True)
    for options in (["--writable"], ["--writable", "--contain"]):
        code = "import sys; print(open(sys.argv[1]).read())"
        spec = place.setup(
            "apptainer",
            "writable",
            "--replace",
            *options,
            image,
            "--",
            "python3",
            "-c",
            code,
            "{connection_file}",
        )
        assert "--place=tmp" in spec["argv"]
        connection = place.root / "runtime" / "kernel-w.json"
        write_connection_file(str(connection))
        argv = [word.replace("{connection_file}", str(connection)) for word in spec["argv"]]
        argv.insert(argv.index("--name=writable"), "--no-error-kernel")
        done = subprocess.run(argv, env=place.environ, capture_output=True, text=True, check=False)
        assert json.loads(connection.read_text())["key"] in done.stdout, done.stderr
        connection.unlink()


def instances(apptainer: Apptainer) -> dict[str, int]:
    """Return the names of the instances that run, and the process of each."""
    said = apptainer.run("instance", "list", "--json")
    return {row["instance"]: row["pid"] for row in json.loads(said.stdout)["instances"]}


@pytest.mark.parametrize(
    ("what", "options"),
    [
        *((what, []) for what in ("group", "supervisor", "jupyter", "kernel")),
        *(
            (what, ["--containall", "--network=none"])
            for what in ("group", "supervisor", "jupyter", "kernel")
        ),
        *((what, ["--shared", "--contain"]) for what in ("group", "jupyter")),
        ("instance", ["--shared", "--contain", "--no-error-kernel"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_sigkill_leaves_nothing(
    place: Jupyter, apptainer: Apptainer, sif: Path, what: str, options: list[str]
) -> None:
    spec = place.setup("apptainer", "killed", *SETUP, *options, sif)
    before = instances(apptainer)
    connection = place.root / "runtime" / "kernel-x.json"
    write_connection_file(str(connection))
    argv = [word.replace("{connection_file}", str(connection)) for word in spec["argv"]]
    starter = (
        "import os, subprocess, sys\n"
        "os.environ['JPY_PARENT_PID'] = str(os.getpid())\n"
        "sys.exit(subprocess.run(sys.argv[1:], start_new_session=True).returncode)\n"
    )
    jupyter = subprocess.Popen([sys.executable, "-c", starter, *argv], env=place.environ)
    supervisor = until(lambda: children(jupyter.pid))[0]
    kernel = until(lambda: kernel_process(supervisor), 20)
    if what == "group":
        os.killpg(supervisor, signal.SIGKILL)
    else:
        pids = {"supervisor": supervisor, "jupyter": jupyter.pid, "kernel": kernel}
        os.kill(pids.get(what) or set(instances(apptainer).items()).difference(before.items()).pop()[1], 9)
    if what == "kernel":
        os.kill(jupyter.pid, signal.SIGKILL)
    jupyter.wait(10)
    connection.unlink()
    assert until(lambda: not place.leftovers(0)), place.leftovers(0)
    assert not private_directories(place)
    assert instances(apptainer) == before


def children(pid: int) -> list[int]:
    """Return the child processes of a process, those of all its threads."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def kernel_process(pid: int) -> int:
    """Return the kernel's process below another one, 0 where there is none yet."""
    for child in children(pid):
        words: list[bytes] = []
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        is_kernel = words[1:3] == [b"-m", b"ipykernel_launcher"] and b"python3" in words[0]
        found = child if is_kernel else kernel_process(child)
        if found:
            return found
    return 0


def test_ten_at_once(place: Jupyter, sif: Path) -> None:
    place.setup("apptainer", "many", *SETUP, "--network=none", sif)
    managers = []
    try:
        for number in range(10):
            manager = KernelManager(
                kernel_name="many", connection_file=str(place.root / "runtime" / f"k{number}.json")
            )
            manager.start_kernel(env=place.environ)
            managers.append((manager, manager.blocking_client()))
        for number, (_, client) in enumerate(managers):
            client.start_channels()
            client.wait_for_ready(timeout=90)
            reply = client.execute_interactive(f"assert {number} == {number}", timeout=30)
            assert reply["content"]["status"] == "ok"
        assert len(private_directories(place)) == 10
    finally:
        for manager, client in managers:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()
    assert until(lambda: not private_directories(place))


@contextlib.contextmanager
def started(place: Jupyter, name: str, count: int = 1, **traits: Any) -> Iterator[list[Kernel]]:
    """Start several kernels at the same moment, and have them end so.  traits: of their KernelManager."""
    managers = []
    for _ in range(count):
        file = place.root / "runtime" / f"kernel-{uuid.uuid4().hex}.json"
        managers.append(KernelManager(kernel_name=name, connection_file=str(file), **traits))
    clients: list[Any] = []
    try:
        for manager in managers:
            manager.start_kernel(env=place.environ)
            clients.append(manager.blocking_client())
        for client in clients:
            client.start_channels()
        for client in clients:
            wait_for(client)
        yield [Kernel(manager, client) for manager, client in zip(managers, clients)]
        for manager in managers:
            if manager.has_kernel:
                manager.request_shutdown()
    finally:
        for client in clients:
            client.stop_channels()
        for manager in managers:
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()


@pytest.mark.parametrize("options", [[], ["--contain", "--network=none"]], ids=" ".join)
def test_kernels_share_an_instance(
    place: Jupyter, apptainer: Apptainer, sif: Path, options: list[str]
) -> None:
    place.setup("apptainer", "shared", *SETUP, "--shared", *options, sif)
    before = instances(apptainer)
    for _ in range(2):  # a kernel that starts while the instance ends with the last gets one all the same
        with started(place, "shared", 2) as (first, second):
            (name,) = set(instances(apptainer)) - set(before)
            first.value("globals().update(x=1)")
    with started(place, "shared", 2) as (first, second):
        runs = [f"process {pid}" for pid in sorted((first.pid, second.pid))]
        assert ", ".join([f"ok, running: instance {name}", *runs]) + "\n" in place.envkernel("list").stdout
        assert first.interrupt_in("while True: pass")[0] == "KeyboardInterrupt"
        assert second.value("6 * 7") == "42"
        first.client.execute(ENDLESS)
        time.sleep(0.3)
        assert first.restart(now=True) < 10
        first.shutdown()
        said = place.envkernel("remove", "shared").stdout
        assert f"until their notebooks are shut down: instance {name}, process {second.pid}\n" in said
        assert second.value("6 * 7") == "42"
        assert until(lambda: len(list(place.root.glob("user/envkernel/*/*/connection.json"))) == 1)
    assert until(lambda: instances(apptainer) == before)


def test_an_instance_that_is_kept(place: Jupyter, apptainer: Apptainer, sif: Path) -> None:
    place.setup("apptainer", "kept", *SETUP, "--shared", "--keep", "--contain", sif)
    before = instances(apptainer)
    for seen in ("x", "xx"):
        with started(place, "kept") as (kernel,):
            kernel.value("open('/tmp/notes', 'a').write('x')")  # a contained /tmp is the instance's own
            assert kernel.value("open('/tmp/notes').read()") == seen
        (name,) = set(instances(apptainer)) - set(before)
    assert f"ok, running: instance {name}\n" in place.envkernel("list").stdout
    assert place.envkernel("stop", "kept").stdout == f"Ended: instance {name}\n"
    assert instances(apptainer) == before


def test_the_kernelspec_of_1x(place: Jupyter, sif: Path, tmp_path: Path) -> None:
    """The form that the document of envkernel 1.x shows, with a made-up course."""
    script = place.root / "envkernel"
    script.symlink_to(SCRIPT)
    argv = [sys.executable, str(script), "singularity", "run", "--connection-file", "{connection_file}"]
    argv += [
        "--contain",
        "--bind",
        f"{tmp_path}/:/coursedata",
        str(sif),
        "--",
        "python3",
        "-m",
        "ipykernel_launcher",
    ]
    directory = place.kernels / "old"
    directory.mkdir(parents=True)
    spec = {"argv": [*argv, "-f", "{connection_file}"], "display_name": "Singularity", "language": "python"}
    (directory / "kernel.json").write_text(json.dumps(spec))
    (tmp_path / "file").write_text("text")
    with place.kernel("old") as kernel:
        assert kernel.value("open('/coursedata/file').read()") == "text"
        assert kernel.interrupt_in("while True: pass")[0] == "KeyboardInterrupt"
    place.envkernel("update", "old")
    assert "--format=2" in place.spec("old")["argv"]
    with place.kernel("old") as kernel:
        assert kernel.value("open('/coursedata/file').read()") == "text"


def test_what_is_missing_is_said_at_setup(
    place: Jupyter, apptainer: Apptainer, bare_rootfs: Path, sif: Path
) -> None:
    def refused(*words: str | Path, status: int = 1) -> str:
        said = place.envkernel("apptainer", "--name=no", "--user", *SETUP, *words, status=status).stderr
        assert not (place.kernels / "no").exists()
        return said

    assert "pip install ipykernel (a line for %post" in refused(bare_rootfs)
    assert "There is no image /no/such.sif" in refused("/no/such.sif")
    assert (
        "choose one of them with --python"
        in place.envkernel("apptainer", "--name=no", "--user", sif, status=1).stderr
    )
    assert "there is no /no/such" in refused("--bind=/no/such:/a", sif)
    assert "Did you mean --contain" in refused("--contian", sif, status=2)
    junk = place.root / "junk.sif"
    junk.write_text("junk")
    assert "is no image" in refused(junk)
    environ = {"PATH": "/usr/bin:/bin"}
    said = place.envkernel("apptainer", "--name=no", "--user", sif, environ=environ, status=1)
    assert "There is no apptainer and no singularity" in said.stderr


def test_what_is_gone_is_said_in_the_notebook(place: Jupyter, sif: Path) -> None:
    image = place.root / "image.sif"
    image.symlink_to(sif)
    data = place.root / "directory"
    data.mkdir()
    place.setup("apptainer", "gone", *SETUP, f"--bind={data}:/data", image)
    data.rmdir()
    with place.kernel("gone") as kernel:
        _, error = kernel.execute("1")
        assert "A directory to bind does not exist." in str(error)
    image.unlink()
    with place.kernel("gone") as kernel:
        _, error = kernel.execute("1")
        assert f"There is no image {image}." in str(error)


def lacks_capabilities() -> bool:
    """Return whether root may not do all here (in some sandboxes): then the real %post can't be run."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    return int(status["CapBnd"], 16) != (1 << last + 1) - 1


def test_an_image_from_a_definition(place: Jupyter, apptainer: Apptainer, sif: Path, tmp_path: Path) -> None:
    if apptainer.kind == "real" and lacks_capabilities():
        missing("capabilities of root that a real %post needs")
    (tmp_path / "note").write_text("first")
    (tmp_path / "kernel.def").write_text(
        f"Bootstrap: localimage\nFrom: {sif}\n\n%files\n    note /note\n\n%post\n    echo post >> /note\n\n"
        '%runscript\n    exec python3 -m ipykernel_launcher -f "$ENVKERNEL_CONNECTION_FILE"\n'
    )
    image = tmp_path / "built.sif"
    place.setup("apptainer", "built", "--kernel=image", "--build", tmp_path / "kernel.def", image)
    with place.kernel("built") as kernel:
        assert kernel.value("open('/note').read()").split() == ["firstpost"]
    (tmp_path / "note").write_text("second")
    place.envkernel("update", "built")
    with place.kernel("built") as kernel:
        assert kernel.value("open('/note').read()").split() == ["secondpost"]
    (tmp_path / "kernel.def").write_text(f"Bootstrap: localimage\nFrom: {sif}\n\n%post\n    exit 3\n")
    said = place.envkernel("update", "built", status=1)
    assert "can't be built" in said.stderr
    assert image.exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


def test_the_suite_of_jupyter_kernel_test(place: Jupyter, sif: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.setup("apptainer", "suite", *SETUP, "--contain", "--network=none", sif)
    for name, value in place.environ.items():
        monkeypatch.setenv(name, value)
    run_protocol_tests("suite")


def test_grading_without_network(place: Jupyter, sif: Path, tmp_path: Path) -> None:
    place.setup("apptainer", "course", *SETUP, "--containall", "--no-home", "--network=none", "--pwd", sif)
    assert graded_output(place, tmp_path / "course", "course") == [["['lo']\n"]]
    assert until(lambda: not private_directories(place))


def test_r(place: Jupyter, r_rootfs: Path) -> None:
    spec = place.setup("apptainer", "r", "--kernel=ir", "--contain", "--network=none", r_rootfs)
    assert spec["language"] == "R"
    with place.kernel("r") as kernel:
        assert kernel.execute("cat(6 * 7)") == ("42", None)
        kernel.interrupt_r()


def test_jupyters_own_unix_sockets(place: Jupyter, sif: Path) -> None:
    place.setup("apptainer", "ipc", *SETUP, "--contain", sif)
    with started(place, "ipc", transport="ipc", ip=str(place.root / "ipc")) as (kernel,):
        assert kernel.value("6 * 7") == "42"
    assert until(lambda: not list(place.root.glob("ipc-*")))


def test_encrypted_end_to_end(place: Jupyter, sif: Path, new_ipykernel: Path) -> None:
    """CurveZMQ, whose keys Jupyter puts into the connection file where the kernel says that it can."""
    newer = [f"--bind={new_ipykernel}:/new:ro", "--env=PYTHONPATH=/new"]
    spec = place.setup("apptainer", "curve", *SETUP, "--network=none", *newer, sif)
    assert spec["metadata"]["supported_encryption"] == ["curve"]
    with started(place, "curve", transport_encryption="required") as (kernel,):
        reported = json.loads(Path(kernel.manager.connection_file).read_text())
        assert readers_of(reported["curve_secretkey"]) == []
        assert kernel.value("6 * 7") == "42"


def test_an_ordinary_user(place: Jupyter, apptainer: Apptainer, python_rootfs: Path) -> None:
    with short_directory("user") as directory:
        user = PlainUser(directory, {})
        engine = "--engine=" + os.path.realpath(apptainer.program)
        seen = user.run(AS_USER, "apptainer", str(python_rootfs), engine)
        del seen["chosen"]  # what docker and podman make of --user=X, which Apptainer does not have
        assert seen == {"inside": USER, "owner": [USER, USER], "left": []}
