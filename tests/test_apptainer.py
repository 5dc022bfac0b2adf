"""Singularity and Apptainer: whole plans, and what setup makes of a command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

import envkernel
from envkernel import Output, Plan, Step, Supervision, UserError
from support.host import FakeHost

PORTS = {f"{name}_port": 50001 + number for number, name in enumerate(envkernel.STREAMS)}
CONNECTION = json.dumps({"transport": "tcp", "ip": "127.0.0.1", "key": "secret", **PORTS}).encode()
FILE = "/run/user/1000/kernel-1.json"
FOLDER = "/tmp/envkernel-1000/" + envkernel.kernel_key(FILE)
ENGINE = "/opt/bin/apptainer"
COMMAND = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
INNER = "/run/envkernel/connection.json"
KERNEL = ["python", "-m", "ipykernel_launcher", "-f", INNER]


def set_inside(**more: str) -> dict[str, str]:
    """Return the variables by which the engine is reported what to set inside."""
    inside = {"PYTHONNOUSERSITE": "1", "ENVKERNEL_CONNECTION_FILE": INNER, **more}
    both = {
        f"{family}ENV_{name}": value
        for family in ("APPTAINER", "SINGULARITY")
        for name, value in inside.items()
    }
    return {**both, "APPTAINER_NO_EVAL": "1", "SINGULARITY_NO_EVAL": "1"}


@pytest.fixture
def host() -> FakeHost:
    files = {"/images/a.sif": b"", FILE: CONNECTION, "/data/x": b"", "/cwd/b/x": b""}
    return FakeHost(files=files, programs=[ENGINE])


def plan(host: FakeHost, *tokens: str, environ: dict[str, str] | None = None) -> Plan:
    """Return the plan of a kernelspec's tokens."""
    old = not tokens[2].startswith("--format=")
    launch = envkernel.legacy_launch(tokens, host) if old else envkernel.launch_from_argv(tokens)
    return envkernel.plan_launch(launch, host, {"PATH": "/opt/bin", **(environ or {})})


def run(*options: str, mode: str = "apptainer", image: str = "/images/a.sif") -> list[str]:
    """Return the tokens of a kernelspec as setup writes them."""
    head = [mode, "run", "--format=2", "--connection-file", FILE, "--name=x", f"--program={ENGINE}"]
    return [*head, *options, image, "--", *COMMAND]


def test_whole_plan(host: FakeHost) -> None:
    supervision = Supervision(FOLDER, leader=False, connection=json.loads(CONNECTION))
    ports = {**PORTS, "transport": "tcp", "ip": "127.203.1.2"}  # setup has seen nothing else
    supervision.relay = ports
    supervision.files = [
        (FOLDER + "/connection.json", json.dumps({**json.loads(CONNECTION), **ports}).encode())
    ]
    supervision.explain = envkernel.ApptainerEnd("/images/a.sif")
    options = ["--bind=/data:/coursedata:ro", "--pass=--contain"]
    leaks = {"PYTHONPATH": "/x", "LD_LIBRARY_PATH": "/y", "JPY_PARENT_PID": "1", "JUPYTERHUB_API_TOKEN": "t"}
    assert plan(host, *run(*options), environ={**leaks, "LANG": "C"}) == Plan(
        [ENGINE, "exec", "--contain", f"--bind={FOLDER}:/run/envkernel", "--bind=/data:/coursedata:ro"]
        + ["/images/a.sif", *KERNEL],
        {"PATH": "/opt/bin", "LANG": "C", **set_inside()},
        where="the image /images/a.sif",
        install="pip install %s (a line for %%post of its definition file)",
        supervision=supervision,
        run_once=[ENGINE, "exec", "--contain", "--bind=/data:/coursedata:ro", "/images/a.sif"],
    )


def test_no_network_of_the_host_means_unix_sockets_and_a_relay(host: FakeHost) -> None:
    for tokens in (["--pass=--network=none"], ["--pass=--net"]):
        supervision = plan(host, *run(*tokens)).supervision
        assert supervision is not None
        own = json.loads(supervision.files[0][1])
        assert own == {
            **json.loads(CONNECTION),
            **{f"{name}_port": number for number, name in enumerate(envkernel.STREAMS, 1)},
            "transport": "ipc",
            "ip": "/run/envkernel/s",
        }
        assert supervision.relay["ip"] == FOLDER + "/s"


def test_network_by_the_engines_own_variables(host: FakeHost) -> None:
    supervision = plan(host, *run(), environ={"APPTAINER_NETWORK": "none"}).supervision
    assert supervision is not None
    assert supervision.relay


def test_values_of_env_are_in_no_argv_and_do_not_change_the_engine(host: FakeHost) -> None:
    made = plan(
        host,
        *run("--env=PATH", "--env=PYTHONPATH"),
        environ={"PATH": "/$(x)", "PYTHONPATH": "/mine", "HOME": "/h"},
    )
    assert "/mine" not in " ".join(made.argv)
    assert made.environ == {
        "PATH": envkernel.os.defpath,
        "HOME": "/h",
        **set_inside(PATH="/$(x)", PYTHONPATH="/mine"),
    }


def test_working_in_the_notebooks_directory(host: FakeHost) -> None:
    argv = plan(host, *run("--pwd")).argv
    assert argv[2:6] == [f"--bind={FOLDER}:/run/envkernel", "--bind=/cwd:/cwd", "--pwd=/cwd", "/images/a.sif"]
    argv = plan(host, *run("--pwd", "--workdir=/srv")).argv
    assert argv[3:5] == ["--bind=/cwd:/cwd", "--pwd=/srv"]


def test_copies_go_with_the_kernel(host: FakeHost) -> None:
    made = plan(host, *run("--copy-workdir", "--mount=type=bind,src=/data,dst=/d,readonly,copy"))
    assert made.supervision is not None
    assert made.supervision.copies == [("/cwd", FOLDER + ".0"), ("/data", FOLDER + ".1")]
    assert made.argv[3:6] == [
        f"--bind={FOLDER}.0:/cwd",
        f"--mount=type=bind,src={FOLDER}.1,dst=/d,readonly",
        "--pwd=/cwd",
    ]


@pytest.mark.parametrize(
    ("bind", "token"),
    [
        (r"/a b:/c", "--bind=/a b:/c"),
        (r"/a\:b:/c:ro", "--mount=type=bind,src=/a:b,dst=/c,readonly"),
        (r"/a\,b", '--mount=type=bind,"src=/a,b","dst=/a,b"'),
        ('/a"b:/c', '--mount=type=bind,"src=/a""b",dst=/c'),
        ("/$(x);{y}'", "--bind=/$(x);{y}':/$(x);{y}'"),
    ],
)
def test_names_with_odd_characters(host: FakeHost, bind: str, token: str) -> None:
    launch = envkernel.Launch(
        [Step("apptainer", {"bind": [bind], "program": ENGINE}, ["/images/a.sif"])], COMMAND
    )
    assert plan(host, *envkernel.launch_to_argv(launch)).argv[3] == token


def test_a_shared_container_is_an_instance(host: FakeHost) -> None:
    made = plan(
        host,
        *run("--shared", "--workdir=/srv", "--bind=/data", "--pass=--contain", "--env=A"),
        environ={"A": "1"},
    )
    assert made.supervision is not None
    shared = made.supervision.shared
    assert shared is not None
    name = shared.alive[2][len("instance://") :]
    directory, key = made.supervision.directory.rsplit("/", 1)
    assert made.argv[:4] == [ENGINE, "exec", "--pwd=/srv", "instance://" + name]
    assert made.argv[-1] == f"/run/envkernel/{key}/connection.json"
    assert shared == envkernel.Shared(
        [ENGINE, "exec", "instance://" + name, "echo", "true"],
        [ENGINE, "instance", "start", "--contain", f"--bind={directory}:/run/envkernel", "--bind=/data:/data"]
        + ["/images/a.sif", name],
        ["/bin/sh", "-c", '"$@" || true', "sh", ENGINE, "instance", "stop", name],
    )
    assert made.environ["APPTAINERENV_A"] == "1"
    assert not made.supervision.leader
    assert not made.supervision.cleanup


@pytest.mark.parametrize(
    ("devices", "flag"), [([], "--nv"), (["/dev/kfd"], "--rocm"), (["/dev/kfd", "/dev/nvidiactl"], "--nv")]
)
def test_gpu(host: FakeHost, devices: list[str], flag: str) -> None:
    host.files.update(dict.fromkeys(devices, b""))
    assert plan(host, *run("--gpu")).argv[2] == flag


@pytest.mark.parametrize(("extra", "inside"), [([], ""), (["--pass=--contain"], "/tmp/envkernel")])
def test_a_writable_image_gets_no_mount_point(host: FakeHost, extra: list[str], inside: str) -> None:
    argv = plan(
        host, *run("--place=tmp", "--pass=--writable", *extra), environ={"XDG_RUNTIME_DIR": "/cwd"}
    ).argv
    assert f"--bind={FOLDER}:{inside or FOLDER}" in argv
    assert argv[-1] == (inside or FOLDER) + "/connection.json"


def test_an_image_that_is_gone(host: FakeHost) -> None:
    with pytest.raises(UserError, match="There is no image /images/b"):
        plan(host, *run(image="/images/b.sif"))


# ---- kernelspecs of envkernel 1.x -------------------------------------------------------------------


def legacy(*tokens: str, image: str = "/l/simg/0.5.9.simg") -> list[str]:
    return ["singularity", "run", "--connection-file", FILE, *tokens, image, "--", *COMMAND[:-1], FILE]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine be on the PATH of this process."""
    monkeypatch.setenv("PATH", "/usr/bin:/opt/bin")


@pytest.mark.usefixtures("path")
def test_the_documented_kernelspec_of_1x(host: FakeHost) -> None:
    host.files["/l/simg/0.5.9.simg"] = b""
    made = plan(host, *legacy("--contain", "--bind", "/m/jh/coursedata/:/coursedata"))
    assert made.argv == [
        *(
            ENGINE,
            "exec",
            "--contain",
            f"--bind={FOLDER}:/run/envkernel",
            "--bind=/m/jh/coursedata/:/coursedata",
        ),
        *("/l/simg/0.5.9.simg", *KERNEL),
    ]


@pytest.mark.usefixtures("path")
def test_options_of_1x(host: FakeHost) -> None:
    host.files["/l/simg/0.5.9.simg"] = b""
    host.programs.add("/opt/bin/singularity")
    argv = plan(host, *legacy("--pwd", "--workdir", "/scratch", "-ec", "-B/a,/b:/c:ro", "--net")).argv
    assert argv == [
        *("/opt/bin/singularity", "exec", "--cleanenv", "--contain", "--net", "--workdir=/scratch"),
        *(
            f"--bind={FOLDER}:/run/envkernel",
            "--bind=/a:/a",
            "--bind=/b:/c:ro",
            "--bind=/cwd:/cwd",
            "--pwd=/cwd",
        ),
        *("/l/simg/0.5.9.simg", *KERNEL),
    ]


# ---- setup -------------------------------------------------------------------------------------------


def setup(host: FakeHost, mode: str, *tokens: str, common: dict[str, Any] | None = None) -> Step:
    """Return what setup makes of the tokens of one mode."""
    row = envkernel.MODES[mode]
    environ = {"PATH": "/usr/bin:/opt/bin", "HOME": "/home/me"}
    step = envkernel.parse_step(row, tokens, host, envkernel.Request({}, []), environ)
    return row.setup(step, host, environ, common or {})


class Engine(FakeHost):
    """A world where the engine starts what it is given, except for one thing it says."""

    fails = "FATAL:   stat /no/such/program: no such file or directory"

    def output(self, argv: list[str], environ: dict[str, str]) -> Output:
        if argv[-1] == "--help":
            return super().output(argv, environ)
        self.asked.append(list(argv))
        return Output(255, b"", self.fails.encode())


@pytest.fixture
def engine(host: FakeHost) -> Engine:
    return Engine(files=host.files, programs=host.programs)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_options_may_stand_anywhere(engine: Engine, order: int) -> None:
    options = [["--contain", "--bind", "b:/c"], ["-c", "-Bb:/c"], ["--bind=b:/c", "-c"]][order]
    for tokens in ([*options, "/images/a.sif"], ["/images/a.sif", *options]):
        assert setup(engine, "apptainer", *tokens) == Step(
            "apptainer", {"bind": ["/cwd/b:/c"], "program": ENGINE}, ["/images/a.sif"], ["--contain"]
        )


def test_singularity_falls_back_on_apptainer(engine: Engine) -> None:
    assert setup(engine, "singularity", "/images/a.sif").options["program"] == ENGINE
    engine.programs = {"/usr/bin/singularity"}
    assert setup(engine, "apptainer", "/images/a.sif").options["program"] == "/usr/bin/singularity"
    engine.programs = set()
    with pytest.raises(UserError, match="no apptainer and no singularity") as caught:
        setup(engine, "apptainer", "/images/a.sif")
    assert caught.value.status == 127


def test_the_two_meanings_of_workdir(engine: Engine) -> None:
    step = setup(engine, "apptainer", "--workdir=/srv", "-W", "scratch", "/images/a.sif")
    assert step.options["workdir"] == "/srv"
    assert step.engine == ["--workdir=/cwd/scratch"]
    words = envkernel.setup_command(envkernel.Request({}, [step]), [step])
    again = envkernel.parse_setup(words, engine, {"PATH": "/usr/bin:/opt/bin"}).steps[0]
    assert (again.options["workdir"], again.engine) == ("/srv", step.engine)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["/images/no.sif"], "There is no image /images/no.sif"),
        (["--bind=/no", "/images/a.sif"], "there is no /no"),
        ([], "needs IMAGE"),
        (["--build=no.def"], "no definition file /cwd/no.def"),
        (["--pull=never", "docker://x"], "There is no image /usr/local/share/envkernel/images/x-"),
    ],
)
def test_what_is_missing(engine: Engine, tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        setup(engine, "apptainer", *tokens)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("FATAL:   mount /a->/b error: mount source /a doesn't exist", "A directory to bind does not exist."),
        ("FATAL:   could not open image: image format not recognized", "/images/a.sif is no image."),
        (
            "FATAL:   Requesting capability set 0x00000020000100c7: operation not permitted",
            "The engine may not take the rights",
        ),
        ("FATAL:   anything else", "The container of /images/a.sif can't be started."),
    ],
)
def test_what_the_engine_refuses_at_setup(engine: Engine, said: str, message: str) -> None:
    engine.fails = said
    with pytest.raises(UserError, match=message) as caught:
        setup(engine, "apptainer", "/images/a.sif")
    assert said in caught.value.detail


def test_where_mount_points_can_not_be_made(engine: Engine) -> None:
    first = "FATAL:   container creation failed: destination /run/envkernel doesn't exist in container"

    def output(argv: list[str], environ: dict[str, str]) -> Output:
        return Output(255, b"", first.encode() if ":/run/envkernel" in str(argv) else Engine.fails.encode())

    engine.output = output  # type: ignore[method-assign]
    assert setup(engine, "apptainer", "/images/a.sif").options["place"] == "tmp"


def test_an_image_is_fetched_once_and_again_at_update(engine: Engine) -> None:
    key = envkernel.kernel_key("docker://gjaffe/tune:0.13")[:8]
    image = f"/home/me/.local/share/envkernel/images/tune_0.13-{key}.sif"
    pull = (ENGINE, "pull", image, "docker://gjaffe/tune:0.13")
    engine.answers[pull] = Output(0)
    step = setup(engine, "apptainer", "docker://gjaffe/tune:0.13", common={"user": True})
    assert step.targets == [image]
    assert step.options["uri"] == "docker://gjaffe/tune:0.13"
    assert engine.asked.count(list(pull)) == 1
    setup(engine, "apptainer", "docker://gjaffe/tune:0.13", common={"user": True})
    assert engine.asked.count(list(pull)) == 1
    again = ["--uri=docker://gjaffe/tune:0.13", image]
    assert setup(engine, "apptainer", *again, common={"update": True}) == step
    assert engine.asked.count(list(pull)) == 2


def test_images_of_the_same_name_are_two_files(engine: Engine) -> None:
    images = []
    for uri in ("docker://alice/tools:latest", "docker://bob/tools:latest"):
        name = f"/usr/local/share/envkernel/images/tools_latest-{envkernel.kernel_key(uri)[:8]}.sif"
        engine.answers[ENGINE, "pull", name, uri] = Output(0)
        images += setup(engine, "apptainer", uri).targets
    assert len(set(images)) == 2


def test_how_an_image_is_fetched(engine: Engine) -> None:
    image = (
        f"/usr/local/share/envkernel/images/b-{envkernel.kernel_key('docker://localhost:5000/a/b')[:8]}.sif"
    )
    pull = (ENGINE, "pull", "--no-https", "--authfile=/cwd/auth", image, "docker://localhost:5000/a/b")
    engine.answers[pull] = Output(0)
    words = ["--nv", "--no-https", "--authfile", "auth"]
    step = setup(engine, "apptainer", *words, "docker://localhost:5000/a/b")
    assert step.engine == ["--nv", "--no-https", "--authfile=/cwd/auth"]
    assert "build-option" not in step.options


def test_an_image_is_built_from_its_definition(engine: Engine) -> None:
    engine.files["/cwd/kernel.def"] = b""
    build = (ENGINE, "build", "--build-arg=A=B", "/cwd/my.sif", "/cwd/kernel.def")
    engine.answers[build] = Output(0)
    step = setup(engine, "apptainer", "--build=kernel.def", "--build-option=--build-arg=A=B", "my.sif")
    assert step.targets == ["/cwd/my.sif"]
    assert step.options["build"] == "/cwd/kernel.def"
    with pytest.raises(SystemExit) as caught:
        setup(engine, "apptainer", "--build=kernel.def", common={"dry-run": True})
    assert caught.value.code == 0


def test_values_that_an_old_engine_would_evaluate(engine: Engine) -> None:
    setup(engine, "apptainer", "/images/a.sif", common={"env": ["A=$(x)"]})
    engine.output = lambda argv, environ: Output(255, b"", Engine.fails.encode())  # type: ignore[method-assign]
    with pytest.raises(UserError, match="too old to set A as it is"):
        setup(engine, "apptainer", "/images/a.sif", common={"env": ["A=$(x)"]})


def test_the_images_own_command(engine: Engine) -> None:
    step = setup(engine, "apptainer", "/images/a.sif", common={"kernel": "image"})
    launch = envkernel.Launch([step], [])
    assert plan(engine, *envkernel.launch_to_argv(launch)).argv[1] == "run"


def test_unknown_options_are_refused_with_a_suggestion(engine: Engine) -> None:
    with pytest.raises(UserError, match="knows the option --contian") as caught:
        setup(engine, "apptainer", "--contian", "/images/a.sif")
    assert "--contain" in caught.value.hint


def test_what_runs_is_reported_by_process_and_instance(host: FakeHost, monkeypatch: Any) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", "/none")
    tokens = [token.replace(FILE, "{connection_file}") for token in run("--shared")]
    argv = ["/usr/bin/python3", "/x/envkernel.py", *tokens]
    started = "\0".join([*argv, ""]).replace("{connection_file}", FILE).encode()
    host.files.update({f"/proc/{pid}/cmdline": started for pid in (9, 10, 700, 701)})
    host.files["/proc/8/cmdline"] = started.replace(b"--name=x", b"--name=y")
    status = b"Name:\tpython3\nPPid:\t%d\nUid:\t%d\t%d\n"
    host.files.update({f"/proc/{pid}/status": status % (1, 1000, 1000) for pid in (8, 9, 10, 700)})
    host.files.update({f"/proc/{pid}/task/{pid}/children": b"11 " for pid in (8, 10, 700, 701)})
    host.files["/proc/9/task/9/children"] = b""  # it only waits to clean up
    host.files["/proc/701/status"] = status % (700, 1000, 1000)  # the keeper of 700
    host.files.update({"/proc/11/cmdline": started, "/proc/11/status": status % (1, 1001, 1001)})
    host.files["/proc/11/task/11/children"] = b"12 "  # another user's
    kernel = envkernel.Installed("x", "/k/x", {"argv": argv}, tokens, envkernel.launch_from_argv(tokens))
    launch = envkernel.launch_from_argv(tokens)
    name = "envkernel-" + envkernel.shared_name(launch.steps[0], launch, host)
    ask = (ENGINE, "instance", "list")
    host.answers[ask] = Output(0, b"INSTANCE NAME    PID    IP    IMAGE\nenvkernel-shared-12    7\n")
    processes = ["process 10", "process 700"]
    assert envkernel.listed(envkernel.find_running([kernel], host)["x"]) == processes
    host.answers[ask] = Output(0, f"INSTANCE NAME    PID\n{name}    12\n".encode())
    runs = envkernel.find_running([kernel], host)["x"]
    assert envkernel.listed(runs) == ["instance " + name, *processes]


def test_a_killed_kernel_is_told_from_one_that_memory_ran_out_for(host: FakeHost) -> None:
    host.files["/proc/vmstat"] = b"pgfault 7\noom_kill 3\n"
    supervision = plan(host, *run()).supervision
    assert supervision is not None
    assert supervision.explain is not None
    assert str(supervision.explain(137, "", host).message).endswith("a.sif was killed (SIGKILL).")  # type: ignore[union-attr]
    host.files["/proc/vmstat"] = b"pgfault 8\noom_kill 4\n"
    assert "because memory ran out" in supervision.explain(-9, "", host).message  # type: ignore[union-attr]
    assert supervision.explain(1, "", host) is None
