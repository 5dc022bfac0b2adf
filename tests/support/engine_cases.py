"""What has to hold for docker and podman alike; `test_docker` and `test_podman` run it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import psutil
import pytest

import envkernel
from support import SCRIPT, done, memory
from support.containers import USER, Engine, PlainUser, short_directory
from support.jupyter import Jupyter, Kernel, run_protocol_tests, wait_for

ENDLESS = "import time\nwhile True: time.sleep(1)"


def until(true: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until something is true; return it."""
    end = time.monotonic() + seconds
    value = true()
    while not value and time.monotonic() < end:
        time.sleep(0.05)
        value = true()
    return value


def listeners() -> set[tuple[str, int]]:
    """Return the addresses (IP, port) on which something listens on this machine, by ``ss``."""
    lines = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = [line.split()[3].rpartition(":") for line in lines]
    return {(ip, int(port)) for ip, _, port in addresses}


def secrets_seen(engine: Engine, key: str) -> list[str]:
    """Return where a key can be read: processes' arguments and environments, what `inspect` says."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    if key.encode() in (directory / name).read_bytes():
                        found.append(str(directory / name))
    found += [container["Id"] for container in engine.containers() if key in json.dumps(container)]
    return found


def commands_below(pid: str) -> str:
    """Return the command lines of what a process has started."""
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(int(pid)).children(recursive=True)
        return "\n".join("\0".join(process.cmdline()) for process in below)
    return ""


def at_a_terminal(place: Jupyter, words: list[str], answer: str) -> tuple[int, str]:
    """Run envkernel at a terminal where a person answers; return its exit status and what was to be seen."""
    screen, terminal = os.openpty()
    with os.fdopen(screen, "r+b", buffering=0) as person:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            env=place.environ,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        person.write(answer.encode())
        seen = b""
        with contextlib.suppress(OSError):  # EIO: nobody holds the terminal any more
            while more := os.read(screen, 1 << 16):
                seen += more
        return process.wait(60), seen.decode()


class EngineCases:
    """The cases; a subclass gives the fixture `engine`."""

    image = "python"

    @pytest.fixture
    def place(self, jupyter: Jupyter, engine: Engine) -> Jupyter:
        """A private Jupyter that finds the engine."""
        jupyter.environ.update(engine.environ)
        return jupyter

    def setup(
        self, place: Jupyter, engine: Engine, name: str, *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        return place.setup(engine.name, name, "--python=python3", *arguments, **options)

    @pytest.mark.parametrize("network", ["host", "none"])
    def test_a_kernel_like_any_other(self, place: Jupyter, engine: Engine, network: str) -> None:
        self.setup(place, engine, "life", f"--network={network}", self.image)
        before = listeners()
        with place.kernel("life") as kernel:
            path = Path(kernel.manager.connection_file)
            original = path.read_bytes()
            reported = json.loads(original)
            ports = {reported[name] for name in reported if name.endswith("_port")}
            # Nothing is exposed.
            new = {(ip, port) for ip, port in listeners() - before if port in ports}
            assert {port for _, port in new} == ports
            assert {ip for ip, _ in new} == {"127.0.0.1"}
            assert secrets_seen(engine, reported["key"]) == []
            (directory,) = (Path(place.environ["TMPDIR"]) / f"envkernel-{os.getuid()}").glob("*/")
            copy = directory / "connection.json"
            assert stat.S_IMODE(copy.stat().st_mode) == 0o600
            assert stat.S_IMODE(directory.stat().st_mode) & 0o777 == 0o700
            assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
            assert json.loads(copy.read_text())["key"] == reported["key"]
            (container,) = engine.containers()
            assert container["Name"].strip("/").startswith("envkernel-life-")
            assert container["Config"]["Labels"]["envkernel"] == "life"
            assert f"running: {container['Name'].strip('/')}" in place.envkernel("list").stdout
            # Nothing leaks into it.
            environ = kernel.environ()
            leaks = ("JPY_", "JUPYTER", "PYTHON", "LD_", "TMPDIR", "XDG_", "ENVKERNEL_TEST")
            assert [name for name in environ if name.startswith(leaks)] == []
            # It can be interrupted as often as one likes: docker's client ends itself at the third SIGINT.
            for _ in range(4):
                name, seconds = kernel.interrupt_in("import time; time.sleep(60)")
                assert name == "KeyboardInterrupt"
                assert seconds < 2
            # A kernel that hangs is restarted at once, on the same ports.
            kernel.client.execute(f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{ENDLESS}")
            time.sleep(0.3)
            assert kernel.restart(now=True) < 8
            assert kernel.value("6 * 7") == "42"
            assert path.read_bytes() == original
            assert len(engine.ids()) == 1
            both = until(lambda: [memory.family(kernel.pid)] * (len(memory.family(kernel.pid)) == 2))
            assert memory.megabytes(both[0]) <= 30
            # It can ask, and be debugged.
            assert kernel.answer("print(input('name? '))", "Ada") == ("name? ", "Ada\n")
            code = "def twice(n):\n    m = 2 * n\n    return m\n\ntwice(21)"
            assert kernel.stop_in(code, 3) == ("twice", 3, "42")
            assert kernel.shutdown() < 5
            assert until(lambda: engine.ids() == [])
        assert not {port for _, port in listeners()} & ports

    def test_interrupt_reaches_what_the_kernel_runs(self, place: Jupyter, engine: Engine) -> None:
        """os.system ignores SIGINT itself; natively the whole process group gets it."""
        self.setup(place, engine, "group", self.image)
        with place.kernel("group") as kernel:
            assert kernel.interrupt_in("import os; os.system('sleep 60')")[1] < 3

    @pytest.mark.parametrize(("what", "after"), [("group", 0.0), ("group", 0.15), ("jupyter", 1.0)])
    def test_sigkill_leaves_nothing(self, place: Jupyter, engine: Engine, what: str, after: float) -> None:
        """Also in the middle of a start: what the engine is about to create has to go as well."""
        spec = self.setup(place, engine, "killed", "--network=none", self.image)
        connection = place.root / "runtime" / "kernel-x.json"
        starter = (
            "import os, subprocess, sys\n"
            "os.environ['JPY_PARENT_PID'] = str(os.getpid())\n"
            "sys.exit(subprocess.run(sys.argv[1:], start_new_session=True).returncode)\n"
        )
        write = "from jupyter_client.connect import write_connection_file as w; import sys; w(sys.argv[1])"
        subprocess.run([sys.executable, "-c", write, str(connection)], check=True)
        argv = [word.replace("{connection_file}", str(connection)) for word in spec["argv"]]
        jupyter = subprocess.Popen(
            [sys.executable, "-c", starter, *argv], env={**place.environ, **spec.get("env", {})}
        )
        children = Path(f"/proc/{jupyter.pid}/task/{jupyter.pid}/children")
        assert until(children.read_text)
        supervisor = children.read_text().split()[0]
        assert until(lambda: f"{engine.name}\0run" in commands_below(supervisor))
        if after == 1.0:
            assert until(engine.ids)
        time.sleep(after)
        if what == "jupyter":
            jupyter.kill()
        else:
            os.killpg(int(supervisor), signal.SIGKILL)
        jupyter.wait(10)
        assert until(lambda: engine.ids() == [])
        assert until(lambda: not list(Path(place.environ["TMPDIR"]).iterdir()))
        connection.unlink()

    def test_what_ends_the_container_is_said(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "ended", self.image)
        for how, words in (("stop", "was stopped"), ("kill", "was killed")):  # the engine's reason
            with self.watched(place, "ended") as (kernel, log):
                (container,) = engine.containers()
                engine.call(how, *(["-t", "1"] if how == "stop" else []), container["Id"])
                assert until(lambda kernel=kernel: not kernel.manager.is_alive())
                kernel.restart(now=True)
                assert words in kernel.execute("print('again')")[0]  # above what the first cell shows
                assert kernel.execute("print('again')") == ("again\n", None)
            said = log.read_text()
            assert "envkernel: The kernel's container envkernel-ended-" in said
            assert words in said

    @contextlib.contextmanager
    def watched(self, place: Jupyter, name: str, **options: Any) -> Iterator[tuple[Kernel, Path]]:
        """Start a kernel whose stderr goes to a file."""
        log = place.root / f"{name}.log"
        with open(log, "w") as file, place.kernel(name, stderr=file, **options) as kernel:
            yield kernel, log

    def test_a_kernel_that_eats_all_memory(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "oom", "--memory=200m", "--memory-swap=200m", self.image)
        with self.watched(place, "oom") as (kernel, log):
            kernel.client.execute("x = bytearray(1 << 29)")
            assert until(lambda: not kernel.manager.is_alive(), 20)
        assert "ran out of memory and was killed" in log.read_text()

    def test_ten_at_once(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "many", "--network=none", self.image)
        with contextlib.ExitStack() as stack:
            kernels = [stack.enter_context(self.started(place, "many")) for _ in range(10)]
            for number, (_, client) in enumerate(kernels):
                wait_for(client, 90)
                reply = client.execute_interactive(f"assert {number} + 1", timeout=30)
                assert reply["content"]["status"] == ("ok" if number + 1 else "error")
            assert len(engine.ids()) == 10
            for manager, _ in kernels:
                manager.request_shutdown()

    @contextlib.contextmanager
    def started(
        self, place: Jupyter, name: str, cwd: str | None = None, **traits: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Start a kernel without waiting for it.  traits: of its KernelManager."""
        from jupyter_client import KernelManager

        manager = KernelManager(kernel_name=name, **traits)
        manager.start_kernel(env=place.environ, cwd=cwd)
        client = manager.blocking_client()
        client.start_channels()
        try:
            yield manager, client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()

    def test_names_and_paths_with_any_character(
        self, place: Jupyter, engine: Engine, kernel_venv: Path
    ) -> None:
        """In a chain, where --env after the second mode is envkernel's as well."""
        directory = place.root / "we ird, 'q\" ;{x}$(touch no)"
        directory.mkdir()
        (directory / "file").write_text("text")
        escaped = str(directory).replace(",", "\\,")
        value = "a 'b' \"c\" {d} $e"
        here = [engine.name, f"--bind={escaped}:/in side,;'", "--pwd", "--env", f"X={value}", self.image]
        place.setup("virtualenv", "odd", "--python=python3", "--env=Y=other", kernel_venv, "--", *here)
        with place.kernel("odd", cwd=str(directory)) as kernel:
            assert kernel.value("open('/in side,;\\'/file').read()") == "text"
            assert kernel.value("__import__('os').getcwd()") == str(directory)
            assert kernel.value("__import__('os').environ['X']") == value
            assert kernel.value("__import__('os').environ['Y']") == "other"
            kernel.value("open('new', 'w').write('x')")
            # `inspect` shows it, as it does all variables of a container; no argv does.
            assert [path for path in secrets_seen(engine, "a 'b'") if path.endswith("/cmdline")] == []
        assert (directory / "new").read_text() == "x"
        assert sorted(os.listdir(directory)) == ["file", "new"]

    def test_a_copied_directory_goes_with_the_kernel(
        self, place: Jupyter, engine: Engine, tmp_path: Path
    ) -> None:
        data = tmp_path / "data"
        data.mkdir()
        (data / "file").write_text("text")
        self.setup(
            place,
            engine,
            "copy",
            f"--mount=type=bind,src={data},dst=/data,copy",
            "--copy-workdir",
            self.image,
        )
        with place.kernel("copy", cwd=str(data)) as kernel:
            kernel.value("open('/data/file', 'w').write('changed')")
            kernel.value("open('other', 'w').write('x')")
            assert kernel.value("__import__('os').getcwd()") == str(data)
        assert (data / "file").read_text() == "text"
        assert os.listdir(data) == ["file"]

    def test_an_image_without_the_kernel_is_refused(self, place: Jupyter, engine: Engine) -> None:
        image = self.image.replace("python", "bare")
        said = place.envkernel(engine.name, "--name=bare", "--user", "--python=python3", image, status=1)
        assert "ipykernel" in said.stderr
        assert "RUN pip install ipykernel" in said.stderr
        assert not (place.kernels / "bare").exists()

    def test_an_image_that_is_missing(self, place: Jupyter, engine: Engine) -> None:
        said = place.envkernel(engine.name, "--name=no", "--user", "--pull=never", "no/such:image", status=1)
        assert "There is no image no/such:image here." in said.stderr
        assert f"{engine.name} pull no/such:image" in said.stderr
        self.setup(place, engine, "gone", self.image)
        spec = json.loads((place.kernels / "gone" / "kernel.json").read_text())
        spec["argv"] = ["no/such:image" if word == self.image else word for word in spec["argv"]]
        (place.kernels / "gone" / "kernel.json").write_text(json.dumps(spec))
        with place.kernel("gone") as kernel:
            _, error = kernel.execute("1")
            assert error is not None
            assert "There is no image no/such:image here." in error

    def test_an_image_is_fetched_from_a_registry(
        self, place: Jupyter, engine: Engine, registry: str, python_rootfs: Path, tmp_path: Path
    ) -> None:
        """An image of some links; what they lead to is shown from outside."""
        for name in ("bin", "lib", "lib64", "sbin"):
            (tmp_path / "rootfs" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "rootfs" / name).symlink_to(f"usr/{name}")
        image = f"{registry}/{engine.name}/links"
        plain = ["--tls-verify=false"] if engine.name == "podman" else []
        engine.add_image(tmp_path / "rootfs", image)
        engine.call("push", *plain, image)
        engine.call("rmi", image)
        words = [
            engine.name,
            "--name=fetched",
            "--user",
            *plain,
            f"--bind={python_rootfs}/usr:/usr:ro",
            image,
        ]
        missing = f"There is no image {image} here"
        assert missing in place.envkernel(*words, "--pull=never", status=1).stderr
        status, screen = at_a_terminal(place, words, "n\n")
        assert status == 1
        assert f"Fetch it now ({engine.name} pull {image})? [Y/n]" in screen
        assert screen.count(missing) == 2
        assert not (place.kernels / "fetched").exists()
        status, screen = at_a_terminal(place, [*words, "--python=python3"], "\n")
        assert status == 0, screen
        assert ("Pull complete" if engine.name == "docker" else "Writing manifest") in screen, screen
        with place.kernel("fetched") as kernel:
            assert kernel.value("__import__('os').readlink('/bin')") == "usr/bin"
        engine.call("rmi", image)
        said = place.envkernel(
            *words, "--replace", "--kernel=image"
        )  # as `docker run` does where nobody can be asked
        assert "[Y/n]" not in said.stdout + said.stderr
        engine.call("rmi", image)

    def test_jupyters_own_unix_sockets(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "ipc", self.image)
        with self.started(place, "ipc", transport="ipc", ip=str(place.root / "ipc")) as (manager, client):
            wait_for(client)
            assert Kernel(manager, client).value("6 * 7") == "42"
        assert until(lambda: not list(place.root.glob("ipc-*")))

    def test_encrypted_end_to_end(self, place: Jupyter, engine: Engine, new_ipykernel: Path) -> None:
        """CurveZMQ, whose keys Jupyter puts into the connection file where the kernel says that it can."""
        newer = [f"--bind={new_ipykernel}:/new:ro", "-e", "PYTHONPATH=/new"]
        spec = self.setup(place, engine, "curve", "--network=none", *newer, self.image)
        assert spec["metadata"]["supported_encryption"] == ["curve"]
        with self.started(place, "curve", transport_encryption="required") as (manager, client):
            wait_for(client)
            reported = json.loads(Path(manager.connection_file).read_text())
            assert secrets_seen(engine, reported["curve_secretkey"]) == []
            assert Kernel(manager, client).value("6 * 7") == "42"

    def test_kernels_that_share_a_container(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        """They start at once, and what is done to one does not touch the other."""
        for name in ("data", "here/one", "here/two"):
            (tmp_path / name).mkdir(parents=True)
        options = ["--shared", "--network=none", "--pwd", f"--bind={tmp_path}/here:/there"]
        options += [f"--mount=type=bind,src={tmp_path}/data,dst=/data,copy"]
        self.setup(place, engine, "both", *options, self.image)
        directories = Path(place.environ["TMPDIR"]) / f"envkernel-{os.getuid()}"
        with self.started(place, "both", cwd=str(tmp_path / "here/one")) as (first, one), self.started(
            place, "both", cwd=str(tmp_path / "here/two")
        ) as (second, two):
            wait_for(one)
            wait_for(two)
            (container,) = engine.containers()
            assert container["Name"].strip("/").startswith("envkernel-both-shared-")
            a, b = Kernel(first, one), Kernel(second, two)
            assert memory.megabytes(memory.family(b.pid)) <= 30
            b.value("globals().update(x=1)")
            assert [k.value("__import__('os').getcwd()") for k in (a, b)] == ["/there/one", "/there/two"]
            a.value("open('/data/file', 'w').write('text')")
            assert b.value("open('/data/file').read()") == "text"
            assert len(list(directories.glob("shared-*.0/file"))) == 1
            assert a.interrupt_in("import os; os.system('sleep 60')")[1] < 5
            a.client.execute(f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{ENDLESS}")
            time.sleep(0.3)
            assert a.restart(now=True) < 10
            assert a.value("6 * 7") == "42"
            assert b.value("x") == "1"
            visible = "[n for n in __import__('os').listdir('/run/envkernel') if len(n) == 16]"
            assert len(eval(a.value(visible))) == 2
            a.shutdown()
            assert b.value("x") == "1"
            assert [one["Id"] for one in engine.containers()] == [container["Id"]]
        assert until(lambda: engine.ids() == [])
        assert until(lambda: not directories.exists())
        assert os.listdir(tmp_path / "data") == []

    def test_remove_says_what_still_runs(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "removed", "--network=none", self.image)
        with place.kernel("removed") as kernel:
            said = place.envkernel("remove", "removed").stdout
            assert "Still running, until their notebooks are shut down: envkernel-removed-" in said
            assert kernel.value("6 * 7") == "42"

    def test_stop_ends_what_runs_for_a_kernel(self, place: Jupyter, engine: Engine) -> None:
        engine.call("tag", self.image, "stopped:1")
        self.setup(place, engine, "stopped", "--network=none", "stopped:1")
        with place.kernel("stopped") as kernel:
            (container,) = engine.containers()
            name = container["Name"].strip("/")
            assert place.envkernel("stop", "stopped").stdout == f"Ended: {name}\n"
            assert until(lambda: engine.ids() == [])
            assert until(lambda: not kernel.manager.is_alive())
        engine.call("rmi", "stopped:1")
        said = place.envkernel("list").stdout
        assert "There is no image stopped:1 here.\n" in said
        assert "running" not in said

    def test_stop_ends_a_container_that_is_kept(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "kept", "--shared", "--keep", self.image)
        with self.started(place, "kept") as (_, client):
            wait_for(client)
        (container,) = engine.containers()
        name = container["Name"].strip("/")
        assert until(lambda: f"ok, running: {name}\n" in place.envkernel("list").stdout)
        (place.kernels / "kept").rename(place.kernels / "other")
        spec = place.kernels / "other" / "kernel.json"
        spec.write_text(spec.read_text().replace("--name=kept", "--name=other"))
        assert f"leftover  {name}" in place.envkernel("list").stdout
        assert place.envkernel("stop", "kept").stdout == f"Ended: {name}\n"
        assert engine.ids() == []

    def test_a_shared_container_that_is_kept(self, place: Jupyter, engine: Engine) -> None:
        self.setup(place, engine, "kept", "--shared", "--keep", self.image)
        seen = []
        for _ in range(2):
            with self.started(place, "kept") as (_, client):
                wait_for(client)
                seen += engine.ids()
            time.sleep(0.5)
            assert engine.ids() == seen[-1:]
        assert seen[0] == seen[1]
        base = Path(place.environ["TMPDIR"]) / f"envkernel-{os.getuid()}"
        assert list(base.rglob("*.lock")) != []
        engine.call("rm", "-f", *seen[:1])
        place.envkernel("remove", "kept")
        assert not base.exists()

    def test_the_installed_engine_says_which_options_it_has(self, engine: Engine) -> None:
        program = shutil.which(engine.name) or ""
        options = envkernel.EngineOptions([[program, "run"]], envkernel.Host(), os.environ)
        assert len(options.known) > 100
        for flag, known in {
            "-v": ("--volume", "="),
            "--rm": ("--rm", ""),
            "--net": ("--net", "="),  # its help does not mention this one
            "--memroy": None,
            "-Z": None,
        }.items():
            assert options.find(flag) == known

    def test_a_kernelspec_of_envkernel_1(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        """As it was written, and after an update."""
        data = tmp_path / "data"
        data.mkdir()
        (data / "file").write_text("text")
        argv = [sys.executable, str(SCRIPT), engine.name, "run", "--connection-file", "{connection_file}"]
        argv += [
            "--pwd",
            "--bind",
            f"{data}:/coursedata",
            "--network",
            "none",
            "-e",
            "OLD=1",
            self.image,
            "--",
        ]
        argv += ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (place.kernels / "old").mkdir(parents=True)
        spec = {"argv": argv, "display_name": "old", "language": "python"}
        (place.kernels / "old" / "kernel.json").write_text(json.dumps(spec))
        for update in (False, True):
            if update:
                place.envkernel("update", "old")
                assert place.spec("old")["metadata"]["envkernel"]["mode"] == engine.name
            with place.kernel("old", cwd=str(tmp_path)) as kernel:
                assert (
                    kernel.value("open('/coursedata/file').read() + __import__('os').environ['OLD']")
                    == "text1"
                )
                assert kernel.value("__import__('os').getcwd()") == str(tmp_path)
                assert kernel.value("__import__('socket').if_nameindex()") == "[(1, 'lo')]"
                assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"

    def test_podkernels_example(self, place: Jupyter, engine: Engine) -> None:
        """An image that starts the kernel itself, reported where the connection file is by a variable."""
        shell = "exec python3 -m ipykernel_launcher -f $PODKERNEL_CONNECTION_FILE"
        arguments = ["--kernel=image", "-e", "PODKERNEL_CONNECTION_FILE=/run/envkernel/connection.json"]
        arguments += [self.image, "--entrypoint=/bin/sh", "--", "-c", shell]
        place.setup(engine.name, "podkernel", *arguments)
        with place.kernel("podkernel") as kernel:
            assert kernel.value("__import__('os').environ['ENVKERNEL_CONNECTION_FILE']").endswith(".json")

    def test_an_image_is_built_and_built_again(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        directory = tmp_path / "image"
        directory.mkdir()
        file = directory / "Dockerfile"
        file.write_text(f"FROM {self.image}\nARG A\nENV BUILT=$A\n")
        words = ["--build", directory, "--build-arg", "A=one"]
        said = place.envkernel(engine.name, "--name=dry", "--dry-run", *words).stdout
        assert said.splitlines()[1:] == [f"{engine.program} build --build-arg=A=one {directory}"]
        self.setup(place, engine, "built", *words)
        first = place.spec("built")["argv"]
        with place.kernel("built") as kernel:
            assert kernel.value("__import__('os').environ['BUILT']") == "one"
        file.write_text(f"FROM {self.image}\nENV BUILT=two\n")
        place.envkernel("update", "built")
        assert place.spec("built")["argv"] != first
        with place.kernel("built") as kernel:
            assert kernel.value("__import__('os').environ['BUILT']") == "two"
        for image in (first, place.spec("built")["argv"]):
            engine.call("rmi", next(word for word in image if word.startswith("sha256:")))

    def test_a_built_image_stays_and_a_failing_build_is_said(
        self, place: Jupyter, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tag keeps it from `image prune`; it is removed with the kernel."""
        (tmp_path / "Dockerfile").write_text(f"FROM {self.image}\nENV BUILT=one\n")
        words = [engine.name, "--name=stays", "--user", "--python=python3", "--build", tmp_path]
        said = place.envkernel(*words, "-f", tmp_path / "none", status=1).stderr
        assert f"The image of {tmp_path} can't be built." in said
        assert "Traceback" not in said
        self.setup(place, engine, "stays", "--build", tmp_path)
        engine.call("image", "prune", "-f")
        with place.kernel("stays") as kernel:
            assert kernel.value("__import__('os').environ['BUILT']") == "one"
        assert until(lambda: engine.ids() == [])
        for name, value in engine.environ.items():
            monkeypatch.setenv(name, value)
        tag = f"envkernel/stays:{os.getuid()}"
        assert tag in engine.call("images", "--format={{.Repository}}:{{.Tag}}")
        launch = envkernel.launch_from_argv(envkernel.run_tokens(place.spec("stays")["argv"]))
        envkernel.remove_built_image(launch.steps[0], "stays", envkernel.Host())
        assert tag not in engine.call("images", "--format={{.Repository}}:{{.Tag}}")

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("--device=/dev/nosuch", "it does not exist on this machine"),
            ("--gpu", "the GPUs of this machine"),
        ],
    )
    def test_what_the_engine_lacks_is_named(
        self, place: Jupyter, engine: Engine, option: str, words: str
    ) -> None:
        said = place.envkernel(engine.name, "--name=no", "--user", option, self.image, status=1).stderr
        assert words in said
        assert "No shell" not in said

    def test_a_kernel_that_only_knows_tcp(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        """Setup sees that; the kernel's ports are its own, and Jupyter's are not its to take."""
        script = tmp_path / "tcp.py"
        script.write_text(
            "import json, sys\n"
            "assert json.load(open(sys.argv[2]))['transport'] == 'tcp'\n"
            "from ipykernel.kernelapp import launch_new_instance\n"
            "launch_new_instance()\n"
        )
        words = [f"--bind={script}:/tcp.py:ro", self.image]
        place.setup(engine.name, "tcp", *words, "--", "python3", "/tcp.py", "-f", "{connection_file}")
        with place.kernel("tcp") as kernel:
            reported = json.loads(Path(kernel.manager.connection_file).read_text())
            mine = {ip for ip, port in listeners() if port == reported["shell_port"]}
            assert "127.0.0.1" in mine
            assert len(mine) == 2
            assert all(ip.startswith("127.") for ip in mine)
            assert kernel.value("6 * 7") == "42"
            assert kernel.restart(now=True) < 8
            assert kernel.value("6 * 7") == "42"

    def test_files_belong_to_the_user(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        """A plain user who may talk to root's daemon; without network, so through sockets of the user's."""
        with short_directory("user") as directory:
            seen = self.as_user(PlainUser(directory, engine.environ), engine)
            chosen = seen.pop("chosen")
            assert seen == {"inside": USER, "owner": [USER, USER], "left": []}
            assert chosen[0] == self.chosen[0], chosen[1]
            assert self.chosen[1] in chosen[1]

    chosen = (1, "The kernel would be another user than you (number 1234)")
    """What becomes of a plain user's --user=1234: exit status of setup, and what is said then."""

    def test_a_user_of_ones_choice(self, place: Jupyter, engine: Engine) -> None:
        """Another one than root, who starts it; on the host the private directory stays closed to others."""
        self.setup(place, engine, "guest", f"--user={USER}", "--network=none", self.image)
        with place.kernel("guest") as kernel:
            assert kernel.value("__import__('os').getuid()") == str(USER)
            base = Path(place.environ["TMPDIR"]) / f"envkernel-{os.getuid()}"
            (directory,) = base.glob("*/")
            seen = [path.stat() for path in (base, directory, directory / "connection.json")]
            assert [one.st_uid for one in seen] == [0, USER, USER]
            assert [stat.S_IMODE(one.st_mode) & 0o777 for one in seen] == [0o700, 0o700, 0o600]

    def as_user(self, user: PlainUser, engine: Engine) -> Any:
        return user.run(AS_USER, engine.name, self.image)

    def test_grading_without_network(self, place: Jupyter, engine: Engine, tmp_path: Path) -> None:
        self.setup(place, engine, "course", "--network=none", "--pwd", self.image)
        assert graded_output(place, tmp_path / "course", "course") == [["['lo']\n"]]
        assert until(lambda: engine.ids() == [])

    def test_the_suite_of_jupyter_kernel_test(
        self, place: Jupyter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.setup(place, engine, "suite", "--network=none", self.image)
        for name, value in place.environ.items():
            monkeypatch.setenv(name, value)
        run_protocol_tests("suite")


def graded_output(place: Jupyter, course: Path, kernel: str) -> list[Any]:
    """Autograde a submission as the document of envkernel 1.x describes it; return what its test printed.

    It prints the names of the network interfaces that it saw, after it tried to connect to something.
    """
    code = (
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 1))\n"
        "except OSError as e:\n    seen = e.errno\n"
        "names = [n for _, n in socket.if_nameindex()]"
    )
    for stage in ("source/ps1", "submitted/bitdiddle/ps1"):
        (course / stage).mkdir(parents=True)
        solution = code if "bitdiddle" in stage else "pass"
        (course / stage / "p1.ipynb").write_text(graded_notebook(solution))
    tool = [sys.executable, "-m", "nbgrader"]
    base = [f"--CourseDirectory.root={course}", "--CourseDirectory.course_id=c"]
    for command in (
        ["generate_assignment", "ps1", "--force"],
        ["autograde", "ps1", f"--ExecutePreprocessor.kernel_name={kernel}"],
    ):
        environ = {**place.environ, "PATH": f"{sys.prefix}/bin:{place.environ['PATH']}"}
        done(*tool, *command, *base, env=environ, cwd=course)
    (graded,) = (course / "autograded").rglob("p1.ipynb")
    outputs = json.loads(graded.read_text())["cells"][-1]["outputs"]
    return [output.get("text") for output in outputs]


def graded_notebook(solution: str) -> str:
    """Return a notebook with a solution and a test of it."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    def cell(source: str, name: str, **reported: Any) -> Any:
        about = {"grade": False, "locked": False, "solution": False, "task": False}
        about.update(points=1, schema_version=3)
        return new_code_cell(source, metadata={"nbgrader": {**about, "grade_id": name, **reported}})

    cells = [cell(solution, "answer", solution=True), cell("print(names)", "test", grade=True, locked=True)]
    kernelspec = {"name": "python3", "display_name": "Python 3"}
    return nbformat.writes(new_notebook(cells=cells, metadata={"kernelspec": kernelspec}))


AS_USER = """
import json, os, sys
from pathlib import Path
from support.jupyter import Jupyter
place = Jupyter(Path(os.environ["HOME"]) / "j")
place.environ.update({n: v for n, v in os.environ.items() if n.startswith(("DOCKER", "CONTAINERS", "XDG"))})
os.environ.update(place.environ)
work = Path(os.environ["HOME"]) / "work"
work.mkdir()
place.setup(sys.argv[1], "mine", "--python=python3", "--network=none", "--pwd", *sys.argv[2:])
with place.kernel("mine", cwd=str(work)) as kernel:
    kernel.value("open('made', 'w').write('x')")
    kernel.value("open(__import__('os').path.expanduser('~/x'), 'w').write('x')")
    uid = int(kernel.value("__import__('os').getuid()"))
    kernel.interrupt_in("import time; time.sleep(60)")
made = (work / "made").stat()
words = [sys.argv[1], "--name=other", "--user", "--python=python3", "--network=none", "--pwd", "--user=1234"]
said = place.envkernel(*words, sys.argv[2], status=None)
chosen = [said.returncode, said.stderr]
if not said.returncode:
    with place.kernel("other", cwd=str(work)) as kernel:
        kernel.value("open('theirs', 'w').write('x')")
        inside = kernel.value("__import__('os').getuid()")
        chosen[1] = f"{inside} is {(work / 'theirs').stat().st_uid}"
left = os.listdir(place.environ["TMPDIR"])
print(json.dumps({"chosen": chosen, "inside": uid, "owner": [made.st_uid, made.st_gid], "left": left}))
"""
