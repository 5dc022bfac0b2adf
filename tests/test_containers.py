"""Docker and podman: whole plans from options and host, and what setup makes of what an engine says."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

import envkernel
from envkernel import Bind, Launch, Output, Plan, Step, UserError
from support.host import FakeHost

CONNECTION = {
    **{name + "_port": 5000 + number for number, name in enumerate(envkernel.STREAMS)},
    "ip": "127.0.0.1",
    "transport": "tcp",
    "key": "secret",
}
FILE = "/run/user/1000/jupyter/kernel-1.json"
TEXT = json.dumps(CONNECTION).encode()
FACTS = FakeHost(files={FILE: TEXT}, programs=["/usr/bin/docker", "/usr/bin/podman"])
COMMAND = ["python", "-m", "ipykernel_launcher", "-f", envkernel.CONNECTION_FILE]
FOLDER = f"/tmp/envkernel-1000/{envkernel.kernel_key(FILE)}"
ENVIRON = {"PATH": "/usr/bin", "USER": "me", "JPY_PARENT_PID": "7"}
PRIVATE = f"--mount=type=bind,src={FOLDER},dst=/run/envkernel"
LABELS = ["--label=envkernel=x", "--label=envkernel.user=me", "--label=envkernel.uid=1000"]
TOLD = "--env=ENVKERNEL_CONNECTION_FILE=/run/envkernel/connection.json"
KERNEL = ["image", "python", "-m", "ipykernel_launcher", "-f", "/run/envkernel/connection.json"]


def plan(mode: str = "docker", engine: list[str] | None = None, given: Any = None, **options: Any) -> Plan:
    reported = {name.replace("_", "-"): value for name, value in options.items()}
    step = Step(mode, {"program": f"/usr/bin/{mode}", **reported}, ["image"], engine or [])
    launch = Launch([], COMMAND, {"name": "x", "connection-file": FILE})
    return envkernel.plan_engine(step, Plan(COMMAND, ENVIRON, given=given), FACTS, launch)


UNIX_NUMBERS = {name + "_port": number for number, name in enumerate(envkernel.STREAMS, 1)}
ON_UNIX_SOCKETS = {**UNIX_NUMBERS, "transport": "ipc", "ip": f"{FOLDER}/s"}


def own_connection(made: Plan) -> Any:
    """Return what the kernel's own connection file says."""
    assert made.supervision is not None
    return json.loads(dict(made.supervision.files)[f"{FOLDER}/connection.json"])


def test_docker_on_the_hosts_network() -> None:
    made = plan(identity="user", init=True, reach="ipc")
    assert made.argv == [
        *["/usr/bin/docker", "run", "--rm", "--pull=never", "--init", "--name=envkernel-x-cafe0123"],
        *LABELS,
        *["--network=host", "--user=1000:100", "--group-add=27", PRIVATE],
        *[TOLD, "--env=HOME=/run/envkernel/home", "--env=TINI_KILL_PROCESS_GROUP=1"],
        *KERNEL,
    ]
    supervision = made.supervision
    assert supervision is not None
    assert supervision.directory == FOLDER
    assert list(dict(supervision.files)) == [f"{FOLDER}/connection.json", f"{FOLDER}/home/.envkernel"]
    assert supervision.relay == ON_UNIX_SOCKETS
    assert supervision.signal == ["/usr/bin/docker", "kill", "--signal={signal}", "envkernel-x-cafe0123"]
    assert supervision.cleanup == [["/usr/bin/docker", "rm", "-f", "-v", "envkernel-x-cafe0123"]]
    assert made.environ == {"PATH": "/usr/bin", "USER": "me"}
    assert "secret" not in " ".join(made.argv)


@pytest.mark.parametrize("network", ["none", "bridge", "course"])
def test_any_other_network_is_reached_by_unix_sockets(network: str) -> None:
    made = plan(engine=[f"--network={network}"])
    assert made.supervision is not None
    assert made.supervision.relay == ON_UNIX_SOCKETS
    assert made.argv.count(f"--network={network}") == 1
    assert "--network=host" not in made.argv
    assert not any(token.startswith("--publish") for token in made.argv)
    assert own_connection(made) == {
        **CONNECTION,
        **UNIX_NUMBERS,
        "transport": "ipc",
        "ip": "/run/envkernel/s",
    }


LOOPBACK = "127.203.1.2"
"""The kernel's own loopback address, from what `FakeHost` has for random."""


@pytest.mark.parametrize("options", [{"transport": "tcp"}, {"reach": "tcp"}, {}])
def test_on_the_hosts_network_a_kernel_of_tcp_has_a_loopback_address_of_its_own(
    options: dict[str, str],
) -> None:
    """Jupyter's port numbers; Jupyter's own address stays free.  Also where setup has seen nothing."""
    made = plan(**options)
    assert made.supervision is not None
    assert own_connection(made) == {**CONNECTION, "ip": LOOPBACK}
    assert made.supervision.relay.items() <= {**CONNECTION, "ip": LOOPBACK}.items()
    assert "--network=host" in made.argv
    assert not any(token.startswith("--publish") for token in made.argv)


def test_ports_are_published_on_loopback_where_sockets_cannot_cross() -> None:
    made = plan(no_host_network=True, transport="tcp")
    assert [token for token in made.argv if token.startswith("--publish")] == [
        f"--publish={LOOPBACK}:{port}:{port}" for port in range(5000, 5005)
    ]
    assert made.supervision is not None
    assert own_connection(made) == {**CONNECTION, "ip": "0.0.0.0"}
    assert made.supervision.relay.items() <= {**CONNECTION, "ip": LOOPBACK}.items()


@pytest.mark.parametrize(
    "jupyters", [{"ip": "0.0.0.0"}, {"transport": "ipc", "ip": "/j", **UNIX_NUMBERS}], ids=["any", "ipc"]
)
def test_a_kernel_of_tcp_where_jupyters_numbers_are_not_free(jupyters: dict[str, Any]) -> None:
    host = FakeHost(files={FILE: json.dumps({**CONNECTION, **jupyters}).encode()})
    step = Step("docker", {"program": "/d", "transport": "tcp"}, ["image"])
    launch = Launch([], COMMAND, {"name": "x", "connection-file": FILE})
    made = envkernel.plan_engine(step, Plan(COMMAND, ENVIRON), host, launch)
    own = own_connection(made)
    ports = [own[name + "_port"] for name in envkernel.STREAMS]
    assert len({*ports, *range(5000, 5005)}) == 10
    assert min(ports) > 60999  # above those that Linux gives to connections
    assert (own["transport"], own["ip"]) == ("tcp", LOOPBACK)


@pytest.mark.parametrize(
    ("mode", "engine", "listens", "transport"),
    [
        ("docker", [], True, "ipc"),
        ("docker", [], False, "tcp"),
        ("docker", ["--network=bridge"], False, "tcp"),
        ("docker", ["--network=none"], True, "ipc"),
        ("docker", ["--network=none"], False, None),
        ("apptainer", [], False, "tcp"),
        ("apptainer", ["--net"], False, None),
    ],
)
def test_how_a_kernel_is_reached_is_what_setup_has_seen(
    mode: str, engine: list[str], listens: bool, transport: str | None
) -> None:
    host = FakeHost()
    host.listening = listens
    step = Step(mode, {"shared": True}, ["image"], engine)
    found = envkernel.find_transport(Launch([step], COMMAND), host, {})
    assert found.options == {"shared": True, **({"reach": transport} if transport else {})}
    given = step.replace(options={"transport": "tcp"})
    assert envkernel.find_transport(Launch([given], []), host, {}) == given


@pytest.mark.parametrize(
    ("identity", "tokens"),
    [
        ("user", ["--user=1000:100", "--group-add=27"]),
        ("keep-id", ["--userns=keep-id"]),
        ("root", ["--user=0:0"]),
        ("given", []),
    ],
)
def test_identity(identity: str, tokens: list[str]) -> None:
    argv = plan("podman", identity=identity).argv
    assert [one for one in argv if one.startswith(("--user", "--group-add"))] == tokens
    has_home = any(one.startswith("--env=HOME=") for one in argv)
    assert has_home == (identity in ("user", "keep-id"))


def test_selinux_and_gpu() -> None:
    assert "--security-opt=label=disable" in plan("podman", no_selinux=True).argv
    assert "--gpus=all" in plan(gpu=True).argv
    assert "--device=nvidia.com/gpu=all" in plan("podman", gpu=True).argv
    amd = FakeHost(files={"/dev/kfd": b""}, programs=["/usr/bin/docker"])
    step = Step("docker", {"gpu": True}, ["image"])
    assert "--device=/dev/kfd" in envkernel.plan_engine(step, Plan([], ENVIRON), amd, Launch([], [])).argv


def test_podman_signals_what_the_kernel_runs_by_the_pid_of_its_init() -> None:
    supervision = plan("podman", init=True).supervision
    assert supervision is not None
    program, name = "/usr/bin/podman", "envkernel-x-cafe0123"
    assert supervision.init == [program, "inspect", "--format={{.State.Pid}}", name]
    assert supervision.cleanup == [[program, "rm", "-f", "-v", "-t", "0", name]]


def test_the_users_values_are_in_no_argv() -> None:
    made = plan(given={"TOKEN": "abc", "ODD": "a'b\nc", "LD_LIBRARY_PATH": "/x"})
    assert made.supervision is not None
    assert dict(made.supervision.files)[f"{FOLDER}/env"] == b"TOKEN=abc\nLD_LIBRARY_PATH=/x\n"
    assert f"--env-file={FOLDER}/env" in made.argv
    assert "--env=ODD" in made.argv
    assert made.environ == {"PATH": "/usr/bin", "USER": "me", "ODD": "a'b\nc"}
    assert not any("abc" in token or "a'b" in token for token in made.argv)


def test_working_directory_binds_and_copies() -> None:
    made = plan(bind=["/a:/b:ro", "/c\\,d"], pwd=True, workdir="/b")
    assert "--mount=type=bind,src=/a,dst=/b,readonly" in made.argv
    assert '--mount=type=bind,"src=/c,d","dst=/c,d"' in made.argv
    assert "--mount=type=bind,src=/cwd,dst=/cwd" in made.argv
    assert "--workdir=/b" in made.argv
    copied = plan(copy_workdir=True, mount=["type=bind,src=/data,dst=/data,copy"])
    assert copied.supervision is not None
    assert copied.supervision.copies == [("/cwd", FOLDER + ".0"), ("/data", FOLDER + ".1")]
    assert f"--mount=type=bind,src={FOLDER}.0,dst=/cwd" in copied.argv
    assert f"--mount=type=bind,src={FOLDER}.1,dst=/data" in copied.argv
    assert "--workdir=/cwd" in copied.argv


def test_the_root_directory_is_not_bound() -> None:
    host = FakeHost(files={FILE: TEXT}, programs=["/usr/bin/docker"], cwd="/")
    step = Step("docker", {"pwd": True}, ["image"])
    launch = Launch([], COMMAND, {"connection-file": FILE})
    with pytest.raises(UserError, match="directory / can't be bound"):
        envkernel.plan_engine(step, Plan(COMMAND, ENVIRON), host, launch)


def test_a_shared_container() -> None:
    made = plan(shared=True, engine=["--network=none"])
    again = plan(shared=True, engine=["--network=none"])
    other = plan(shared=True, engine=["--network=none", "--cpus=1"])
    assert made.supervision is not None
    assert again.supervision is not None
    assert other.supervision is not None
    assert made.supervision.shared == again.supervision.shared
    assert made.supervision.shared != other.supervision.shared
    shared = made.supervision.shared
    assert shared is not None
    assert shared.start[-4:] == ["--detach", "--entrypoint=sleep", "image", "2147483647"]
    name = shared.alive[-1]
    inside = f"/run/envkernel/{envkernel.kernel_key(FILE)}"
    assert made.argv == [
        *["/usr/bin/docker", "exec", f"--env=ENVKERNEL_CONNECTION_FILE={inside}/connection.json", name],
        *["sh", "-c", 'echo $$ > "$0" && exec "$@"', f"{inside}/pid"],
        *["python", "-m", "ipykernel_launcher", "-f", f"{inside}/connection.json"],
    ]


@pytest.mark.parametrize(
    ("bind", "engine", "workdir"),
    [
        (["/:/host"], [], "/host/cwd"),
        (["/:/host", "/cwd"], [], "/cwd"),
        (["/c:/c"], ["--volume=/cwd:/in/side:ro"], "/in/side"),
    ],
)
def test_each_kernel_of_a_shared_container_works_in_its_notebooks_directory(
    bind: list[str], engine: list[str], workdir: str
) -> None:
    made = plan(shared=True, pwd=True, bind=bind, engine=engine)
    assert made.argv[:3] == ["/usr/bin/docker", "exec", "--workdir=" + workdir]
    assert made.supervision is not None
    assert made.supervision.shared is not None
    assert not any(token.startswith("--workdir") for token in made.supervision.shared.start)


def test_a_directory_that_a_shared_container_does_not_show() -> None:
    with pytest.raises(UserError, match="directory /cwd can't be seen in the shared container"):
        plan(shared=True, pwd=True, bind=["/c"], engine=["--volume=named:/cwd"])


def test_copies_belong_to_the_shared_container() -> None:
    supervision = plan(shared=True, mount=["type=bind,src=/data,dst=/data,copy"]).supervision
    assert supervision is not None
    assert supervision.shared is not None
    copy = f"/tmp/envkernel-1000/{os.path.basename(os.path.dirname(supervision.directory))}.0"
    assert (supervision.copies, supervision.shared.copies) == ([], [("/data", copy)])
    assert f"--mount=type=bind,src={copy},dst=/data" in supervision.shared.start


def test_a_kernelspec_of_envkernel_1() -> None:
    tokens = ["docker", "run", "--connection-file", FILE, "--pwd", "--bind", "/a:/b", "--network", "none"]
    launch = envkernel.launch_from_argv([*tokens, "-e", "X=1", "image", "--", "python", "-f", FILE])
    made = envkernel.plan_launch(launch, FACTS, ENVIRON)
    assert made.argv[-4:] == ["image", "python", "-f", "/run/envkernel/connection.json"]
    assert {"--network=none", "--env=X=1", "--mount=type=bind,src=/a,dst=/b"} <= set(made.argv)
    assert "--user=1000:100" in made.argv


def test_a_broken_connection_file() -> None:
    host = FakeHost(files={FILE: b"{}"}, programs=["/usr/bin/docker"])
    launch = Launch([], COMMAND, {"connection-file": FILE})
    with pytest.raises(UserError, match="can't be read"):
        envkernel.plan_engine(Step("docker", {}, ["image"]), Plan(COMMAND, ENVIRON), host, launch)


def nature(mode: str, said: dict[str, Any], engine: list[str] | None = None) -> dict[str, Any]:
    argv = ("/d", "info", "--format={{json .}}")
    host = FakeHost(answers={argv: Output(0, json.dumps(said).encode())})
    step = envkernel.engine_info(Step(mode, {"program": "/d"}, ["image"], engine or []), host, {})
    assert step.mode == ("podman" if "host" in said else "docker")
    return {name: value for name, value in step.options.items() if name != "program"}


ROOTLESS = {"security": {"rootless": True}}


@pytest.mark.parametrize(
    ("mode", "said", "recorded"),
    [
        ("docker", {"SecurityOptions": ["name=seccomp"]}, {"identity": "user"}),
        ("docker", {"SecurityOptions": ["name=rootless"]}, {"identity": "root", "no-host-network": True}),
        (
            "docker",
            {"OperatingSystem": "Docker Desktop"},
            {"identity": "user", "no-host-network": True, "reach": "tcp"},
        ),
        ("docker", {"SecurityOptions": ["name=selinux"]}, {"identity": "user", "no-selinux": True}),
        ("podman", {"host": {"security": {"rootless": False}}}, {"identity": "user"}),
        ("podman", {"host": ROOTLESS}, {"identity": "keep-id"}),
        ("docker", {"host": ROOTLESS}, {"identity": "keep-id", "engine": "/d"}),
        (
            "podman",
            {"host": {**ROOTLESS, "serviceIsRemote": True}},
            {"identity": "keep-id", "no-host-network": True, "reach": "tcp"},
        ),
    ],
)
def test_what_an_engine_says_of_itself(mode: str, said: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert nature(mode, said) == recorded


def test_a_user_that_was_given_is_left_alone() -> None:
    assert nature("podman", {"host": ROOTLESS}, ["--user=root"]) == {"identity": "given"}


ROOTFUL = "0 0 4294967295"


def settled(
    mode: str, said: str, me: int = 1000, engine: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    host = FakeHost(programs=[f"/usr/bin/{mode}"])
    host.ids = lambda: (me, me, [])  # type: ignore[method-assign]
    host.output = lambda argv, environ: Output(0, said.encode())  # type: ignore[method-assign]
    reported = {"program": f"/usr/bin/{mode}", "identity": "given"}
    step = Step(mode, {**reported, **more}, ["image"], engine or ["--user=7"])
    options = envkernel.container_user(step, host, {}).options
    return {name: value for name, value in options.items() if {**reported, **more}.get(name) != value}


@pytest.mark.parametrize(
    ("mode", "said", "me", "engine", "changed"),
    [
        ("docker", f"7 8 {ROOTFUL}", 0, ["--user=7"], {"guest": "7"}),
        ("docker", "7 8 0 100000 65536", 0, ["--user=7"], {"guest": "100007"}),  # userns-remap
        ("docker", f"1000 8 {ROOTFUL}", 1000, ["--user=1000"], {}),
        ("docker", f"0 0 {ROOTFUL}", 1000, ["--user=root"], {}),
        ("podman", "7 8 0 1000 1 1 100000 65536", 1000, ["--user=7"], {"identity": "keep-id:uid=7,gid=8"}),
        ("podman", "7 0 0 1000 1 1 100000 65536", 1000, ["--user=7"], {"identity": "keep-id:uid=7"}),
        ("podman", "0 0 0 1000 1 1 100000 65536", 1000, ["--user=root"], {}),
        ("docker", "sh: no such program", 1000, ["--user=7"], {}),
    ],
)
def test_a_user_who_is_not_you(
    mode: str, said: str, me: int, engine: list[str], changed: dict[str, Any]
) -> None:
    assert settled(mode, said, me, engine) == changed


@pytest.mark.parametrize(
    ("said", "engine"), [("7 7", ["--user=7"]), ("0 0", ["--user=root", "--network=none"])]
)
def test_a_user_who_could_not_be_reached(said: str, engine: list[str]) -> None:
    with pytest.raises(UserError, match="would be another user than you"):
        settled("docker", f"{said} {ROOTFUL}", engine=engine)
    with pytest.raises(UserError, match="--shared is for kernels that run as you"):
        settled("docker", f"7 7 {ROOTFUL}", 0, shared=True)


def test_the_private_directory_is_given_to_the_guest() -> None:
    made = plan(identity="given", guest="7", engine=["--user=7"])
    assert made.supervision is not None
    assert made.supervision.owner == 7
    assert "--userns=keep-id:uid=7,gid=8" in plan("podman", identity="keep-id:uid=7,gid=8").argv


def test_a_daemon_that_is_down() -> None:
    text = b"Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?"
    host = FakeHost(answers={("/d", "info", "--format={{json .}}"): Output(1, b"", text)})
    with pytest.raises(UserError, match="daemon does not answer") as caught:
        envkernel.engine_info(Step("docker", {"program": "/d"}, ["image"]), host, {})
    assert "systemctl start docker" in caught.value.hint


INSPECT, QUESTION = ["/d", "image", "inspect", "image"], "Fetch it now (d pull image)?"
PULL = ["/d", "pull", "--platform=linux/arm64", "image"]


@pytest.mark.parametrize(
    ("when", "here", "asked"),
    [
        (None, True, []),
        (None, False, [QUESTION, PULL]),
        ("missing", False, [PULL]),
        ("always", True, [PULL]),
        ("always", False, [PULL]),
        ("never", True, []),
    ],
)
def test_when_an_image_is_fetched(when: str | None, here: bool, asked: list[Any]) -> None:
    host = FakeHost(answers={tuple(INSPECT): Output(not here), tuple(PULL): Output(0)})
    options = {"pull": when, "program": "/d"}
    step = Step("docker", options, ["image"], ["--cpus=1", "--platform=linux/arm64"])
    assert envkernel.need_image(step, host, {}, {}) == "image"
    assert host.asked == [INSPECT, *asked]


@pytest.mark.parametrize(("when", "common"), [(None, {}), ("never", {}), (None, {"dry-run": True})])
def test_when_no_image_is_fetched(when: str | None, common: dict[str, Any]) -> None:
    host = FakeHost(answers={tuple(INSPECT): Output(1)})
    host.agreed = False
    step = Step("docker", {"pull": when, "program": "/d"}, ["image"])
    with pytest.raises(UserError, match="There is no image image here") as caught:
        envkernel.need_image(step, host, {}, common)
    assert caught.value.hint == "Fetch it: d pull image"
    assert host.asked == ([INSPECT] if when or common else [INSPECT, QUESTION])


def typed(*tokens: str) -> envkernel.Request:
    host = FakeHost(programs=["/usr/bin/docker"])
    return envkernel.parse_setup(["docker", "--name=x", *tokens], host, {"PATH": "/usr/bin"})


@pytest.mark.parametrize(
    "tokens",
    [
        ["--cpus", "2", "--bind", "/a:/b", "IMAGE"],
        ["--cpus=2", "--bind=/a:/b", "IMAGE"],
        ["IMAGE", "--bind", "/a:/b", "--cpus", "2"],
    ],
)
def test_engine_options_need_no_separator(tokens: list[str]) -> None:
    step = typed(*tokens).steps[0]
    assert step.options == {"bind": ["/a:/b"]}
    assert step.engine == ["--cpus=2"]
    assert step.targets == ["IMAGE"]


def test_whose_option_it_is() -> None:
    request = typed("--user", "--user=1:1", "-v", "/a:/b", "-itd", "IMAGE")
    assert request.common == {"name": "x", "user": True}
    assert request.steps[0].engine == [
        *("--user=1:1", "--volume=/a:/b", "--interactive", "--tty", "--detach")
    ]


def test_an_option_that_nobody_knows() -> None:
    with pytest.raises(UserError) as caught:
        typed("--memroy=1g", "IMAGE")
    assert caught.value.status == 2
    assert "--memory" in caught.value.hint


def test_an_engine_that_is_missing_is_named_before_its_options_are_read() -> None:
    with pytest.raises(UserError, match="There is no docker on this machine"):
        envkernel.parse_setup(["docker", "--name=x", "--cpus=1", "IMAGE"], FakeHost(), {"PATH": "/bin"})


def test_a_command_in_an_image_may_be_called_as_a_mode_is() -> None:
    words = ["docker", "--name=x", "IMAGE", "--", "conda", "run", "python", "{connection_file}"]
    request = envkernel.parse_setup(words, FakeHost(), {"PATH": "/bin"})
    assert request.command == words[4:]
    launch = envkernel.Launch([envkernel.Step("docker", {}, ["IMAGE"])], words[4:])
    tokens = envkernel.launch_to_argv(launch)
    assert envkernel.launch_from_argv(tokens).command == words[4:]


def test_options_of_build_and_run_find_their_places(docker: Engine) -> None:
    def output(argv: list[str], environ: dict[str, str]) -> Output:
        is_help = argv[-1] == "--help"
        return FakeHost.output(docker, argv, environ) if is_help else Engine.output(docker, argv, environ)

    docker.output = output  # type: ignore[method-assign]
    tokens = ["--build-arg=A=B", "--volume=/a:/b", "--no-cache"]
    step = Step("docker", {"build": "."}, ["mine"], tokens)
    made = envkernel.setup_container(step, docker, ENVIRON, {"name": "x"})
    assert made.engine == ["--volume=/a:/b"]
    assert made.options["build-option"] == ["--build-arg=A=B", "--no-cache", "--tag=mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy-workdir": True}, "--copy-workdir and --shared exclude each other"),
        ({"pwd": True}, "--pwd with --shared needs the directories"),
        ({"transport": "tcp"}, "--transport=tcp needs a network"),
    ],
)
def test_what_cannot_be_combined(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        envkernel.refuse_options(Step("docker", {"shared": True, **options}, ["image"], ["--network=none"]))
    assert caught.value.status == 2


def test_an_images_own_command_is_not_shared() -> None:
    steps = [Step("docker", {"shared": True, "program": "/d"}, ["image"])]
    request = envkernel.Request({"kernel": "image"}, steps)
    with pytest.raises(UserError, match="can't be run in a shared container"):
        envkernel.prepare_kernel(request, steps, FakeHost(), {})
    kernel, launch = envkernel.prepare_kernel(request.replace(command=["k"]), steps, FakeHost(), {})
    assert kernel.command == launch.command == ["k"]


def test_mounts_as_csv() -> None:
    assert envkernel.bind_token(Bind('/a"b', "/c d"), mount=True) == '--mount=type=bind,"src=/a""b",dst=/c d'
    token = '--mount=type=bind,"src=/a,b",dst=/c'
    assert token in plan(mount=['type=bind,"src=/a,b",dst=/c']).argv


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (125, "docker: Error response from daemon: No such image: x:latest", "There is no image x here."),
        (125, "Error: x: image not known", "There is no image x here."),
        (127, 'exec: "python": executable file not found', "can't run the kernel's program"),
        (125, "permission denied while trying to connect to the Docker daemon", "You may not talk"),
        (125, "error waiting for container: unexpected EOF", "went away"),
        (125, "something else", "can't start the container"),
    ],
)
def test_what_an_engine_could_not_do(status: int, said: str, message: str) -> None:
    error = envkernel.engine_error("/usr/bin/docker", "x", status, said)
    assert error is not None
    assert message in error.message
    assert error.hint


def test_a_kernel_that_failed_by_itself_is_no_error_of_the_engine() -> None:
    assert envkernel.engine_error("/usr/bin/docker", "x", 1, "Traceback") is None


def test_relative_volumes_become_absolute() -> None:
    host = FakeHost()
    for token, absolute in (
        ("--volume=./data:/data:ro", "--volume=/cwd/data:/data:ro"),
        ("--volume=named:/data", "--volume=named:/data"),
        ("--workdir=x", "--workdir=x"),
    ):
        assert envkernel.absolute_value(token, "docker", host) == absolute


DAEMON = "docker: Error response from daemon: "
DEVICE = 'error gathering device information while adding custom device "/dev/nosuch": no such file'
REFUSED = 'exec: "/etc/passwd": permission denied: OCI permission denied'
NOT_FOUND = (
    "crun: executable file `python` not found in $PATH: OCI runtime attempted to invoke a command that"
)


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (126, "Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all", "the GPUs"),
        (125, DAEMON + 'could not select device driver "" with capabilities: [[gpu]]', "the GPUs"),
        (125, "Error: stat /dev/nosuch: no such file or directory", "it does not exist on this machine"),
        (127, DAEMON + DEVICE, "it does not exist on this machine"),
        (126, "Error: OCI runtime error: runc: unable to set memory limit to 1", "can't start the container"),
        (126, "Error: runc: unable to start container process: " + REFUSED, "can't run the kernel's program"),
        (127, f"Error: {NOT_FOUND} was not found", "can't run the kernel's program"),
        (127, "sh: 1: exec: /no/such/kernel: not found", "can't run the kernel's program"),
    ],
)
def test_an_engine_that_fails_is_told_from_a_program_that_is_missing(
    status: int, said: str, message: str
) -> None:
    error = envkernel.engine_error("/usr/bin/docker", "x", status, said)
    assert error is not None
    assert message in error.message
    assert error.detail == said


def test_an_image_that_was_built_is_built_again() -> None:
    error = envkernel.engine_error("/usr/bin/docker", "sha256:12", 125, "Error: No such image: sha256:12")
    assert error is not None
    assert error.message == "The image that was built for this kernel is gone."
    assert "envkernel update NAME" in error.hint


class Engine(FakeHost):
    """Docker with an image, of which everything works but what a test breaks."""

    build_status = 0

    def output(self, argv: list[str], environ: dict[str, str]) -> Output:
        self.asked.append(list(argv))
        said = {"info": b'{"SecurityOptions": ["x"]}', "run": b"  -c, --cpus decimal   how many\n"}
        return Output(0, said.get(argv[1], b""))

    def show(self, argv: list[str], environ: dict[str, str]) -> int:
        self.asked.append(list(argv))
        (file,) = (token.partition("=")[2] for token in argv if token.startswith("--iidfile="))
        if not self.build_status:
            self.files[file] = b"sha256:abc\n"
        return self.build_status


@pytest.fixture
def docker() -> Engine:
    return Engine(files={"/cwd/Dockerfile": b""}, programs=["/usr/bin/docker"])


def set_up(host: Engine, options: dict[str, Any], *targets: str, **common: Any) -> Step:
    return envkernel.setup_container(Step("docker", options, targets), host, ENVIRON, common)


def test_a_build_that_fails(docker: Engine) -> None:
    docker.build_status = 1
    with pytest.raises(UserError, match="The image of /cwd can't be built"):
        set_up(docker, {"build": "."}, name="x")


def test_a_built_image_is_tagged_and_removed_with_its_kernel(docker: Engine) -> None:
    step = set_up(docker, {"build": "."}, name="My.Course")
    assert step.targets == ["sha256:abc"]
    (build,) = (argv for argv in docker.asked if argv[1] == "build")
    assert build[3:] == ["--tag=envkernel/my-course:1000", "--label=envkernel.image=my.course", "/cwd"]
    docker.asked.clear()
    envkernel.remove_built_image(step, "My.Course", docker)
    assert [argv[1:] for argv in docker.asked] == [
        ["rmi", "envkernel/my-course:1000"],
        ["image", "prune", "--force", "--filter=label=envkernel.image=my.course"],
    ]
    docker.asked.clear()
    envkernel.remove_built_image(step.replace(targets=["python"]), "My.Course", docker)
    assert docker.asked == []


@pytest.mark.parametrize(
    ("options", "common", "warned"),
    [
        ({}, {}, True),
        ({"pwd": True}, {}, False),
        ({"workdir": "/srv"}, {}, False),
        ({"copy-workdir": True}, {}, False),
        ({}, {"dry-run": True}, False),
    ],
)
def test_files_that_are_lost_with_the_container(
    docker: Engine, capsys: pytest.CaptureFixture[str], options: Any, common: Any, warned: bool
) -> None:
    set_up(docker, options, "image", **common)
    said = capsys.readouterr().out
    assert ("--pwd" in said) == warned
    assert len(said.splitlines()) == warned
