"""Kernelspecs: which kernel, what is in kernel.json, and how it is installed."""

import json
import os
import stat
import sys

import pytest

import envkernel
from envkernel import Kernel, Launch, Output, Plan, Request, Step, UserError
from support.host import FakeHost

CF = "{connection_file}"
INSIDE = "/e/share/jupyter/kernels"


def choose(common=None, command=None, files=(), programs=("/e/bin/python", "/e/bin/xr")):
    request = Request({"name": "x", **(common or {})}, [], command)
    plan = Plan([], {}, ["/e/bin"], "the environment /e", "install %s")
    return envkernel.choose_kernel(request, plan, FakeHost(files, programs))


def test_the_default_is_ipykernel():
    assert choose() == Kernel(["python", "-m", "ipykernel_launcher", "-f", CF])


def test_r_in_the_environment():
    made = choose({"kernel": "ir"})
    assert made.command == ["R", "--slave", "-e", "IRkernel::main()", "--args", CF]
    assert made.language == "R"


def test_a_kernelspec_that_the_environment_holds_is_taken_over():
    spec = {
        "argv": ["/build/place/bin/xr", "-f", CF],
        "language": "R",
        "interrupt_mode": "message",
        "kernel_protocol_version": "5.5",
        "metadata": {"debugger": False},
        "display_name": "xeus R",
    }
    files = {f"{INSIDE}/xr/kernel.json": json.dumps(spec).encode(), f"{INSIDE}/xr/logo-32x32.png": b"png"}
    assert choose({"kernel": "xr"}, files=files) == Kernel(
        ["xr", "-f", CF],
        "R",
        display_name="xeus R",
        metadata={"debugger": False},
        interrupt_mode="message",
        protocol="5.5",
        files={"logo-32x32.png": b"png"},
        directory=f"{INSIDE}/xr",
    )


def test_an_unknown_kernel_gets_a_suggestion():
    with pytest.raises(UserError, match="no kernel named ipykernl in the environment /e") as caught:
        choose({"kernel": "ipykernl"})
    assert caught.value.hint == "Did you mean ipykernel?"


def test_a_broken_kernelspec_in_the_environment_is_said():
    with pytest.raises(UserError, match=f"The kernelspec {INSIDE}/xr is broken"):
        choose({"kernel": "xr"}, files={f"{INSIDE}/xr/kernel.json": b"{"})


@pytest.mark.parametrize(
    ("common", "typed", "command"),
    [
        ({"kernel-cmd": "R -e 'a b' {connection_file}"}, None, ["R", "-e", "a b", CF]),
        ({}, ["R", "-e", "a b", CF], ["R", "-e", "a b", CF]),
        ({"kernel-cmd": "/usr/bin/R " + CF, "kernel-make-path-relative": True}, None, ["R", CF]),
        ({"python": "python3.9"}, None, ["python3.9", "-m", "ipykernel_launcher", "-f", CF]),
        ({"python": "./bin/python"}, None, ["/cwd/bin/python", "-m", "ipykernel_launcher", "-f", CF]),
        ({"python": "SELF"}, None, [sys.executable, "-m", "ipykernel_launcher", "-f", CF]),
    ],
)
def test_kernel_commands(common, typed, command):
    assert choose(common, typed).command == command


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"kernel-cmd": "R"}, "The kernel command has no {connection_file}"),
        ({"kernel-cmd": "R 'open"}, "The kernel command has an open quote"),
        ({"kernel-cmd": " "}, "The kernel command has no {connection_file}"),
    ],
)
def test_a_kernel_command_that_cannot_work_is_refused(common, message):
    with pytest.raises(UserError) as caught:
        choose(common)
    assert message in caught.value.message
    assert caught.value.status == 2


@pytest.mark.parametrize(
    ("common", "command", "message"),
    [
        ({"kernel": "ir", "kernel-template": "demo"}, None, "--kernel and --kernel-template exclude"),
        ({"kernel-cmd": f"R {CF}"}, ["python", CF], "--kernel-cmd and a kernel command after -- exclude"),
        ({"python": "python3"}, ["python", CF], "--python and a kernel command after -- exclude"),
    ],
)
def test_two_kernels_for_one_are_refused(common, command, message):
    with pytest.raises(UserError) as caught:
        envkernel.check_request(Request({"name": "x", **common}, [Step("virtualenv", {}, ["/v"])], command))
    assert message in caught.value.message
    assert caught.value.status == 2


@pytest.mark.parametrize(
    ("common", "options", "command"),
    [
        ({"kernel": "ir", "kernel-cmd": f"R {CF}", "python": "SELF"}, {}, None),  # as in 1.x
        ({"kernel-template": "ir", "kernel-cmd": f"R {CF}"}, {}, None),
        ({"kernel": "ir"}, {}, ["R", CF]),
        ({"kernel-template": "ir"}, {}, ["R", CF]),
        ({"python": "python3.12"}, {"create": True}, ["python", CF]),  # which makes the virtualenv
    ],
)
def test_a_command_may_stand_beside_the_kernel_it_is_for(common, options, command):
    step = Step("virtualenv", options, ["/v"])
    assert envkernel.check_request(Request({"name": "x", **common}, [step], command)) is None


def test_a_mistyped_mode_after_the_dashes_gets_a_suggestion():
    with pytest.raises(UserError) as caught:
        choose(command=["cnda", "x"])
    assert caught.value.hint == "Did you mean conda?"


def test_kernel_json():
    request = Request({"name": "x", "user": True, "env": ["A=a$b"]}, [], None)
    launch = Launch(
        [Step("lmod", {"recorded": ["LMOD_CMD=/l"]}, ["-m"]), Step("conda", {"root": "/r"}, ["/e"])], []
    )
    kernel = Kernel([], "R", metadata={"debugger": True}, interrupt_mode="message", protocol="5.4")
    assert envkernel.kernelspec_json(request, launch, kernel, ["argv"]) == {
        "argv": ["argv"],
        "display_name": "x (lmod+conda)",
        "language": "R",
        "metadata": {
            "debugger": True,
            "envkernel": {
                "version": envkernel.__version__,
                "mode": "lmod+conda",
                "command": ["lmod", "--name=x", "--user", "--env=A=a$b", "-m", "--", "conda", "/e"],
            },
        },
        "env": {"A": "%:a%24b"},
        "interrupt_mode": "message",
        "kernel_protocol_version": "5.4",
    }


def test_the_recorded_command_is_read_back():
    words = ["lmod", "--name=x", "--env=A=1", "--purge", "cuda", "--", "virtualenv", "/v", "--", "python", CF]
    request = envkernel.parse_setup(words, FakeHost())
    assert envkernel.setup_command(request, request.steps) == words


@pytest.mark.parametrize(
    ("argv", "tokens"),
    [
        (["/p", "-I", "-S", "-c", envkernel.LOADER, "/s", "conda", "run"], ["conda", "run"]),
        (["/opt/bin/envkernel", "conda", "run", "/e", "--", "x"], ["conda", "run", "/e", "--", "x"]),
        (["/py", "/opt/envkernel.py", "lmod", "run", "m"], ["lmod", "run", "m"]),
        (["python", "-m", "ipykernel_launcher"], []),
        ([], []),
    ],
)
def test_our_kernelspecs_are_known_by_their_argv(argv, tokens):
    assert envkernel.run_tokens(argv) == tokens


# installing


@pytest.fixture
def umask():
    old = os.umask(0o077)
    yield
    os.umask(old)


def install(directory, text="1", readable=True):
    envkernel.install_kernelspec(str(directory), {"argv": [text]}, {"logo-svg.svg": b"<svg/>"}, readable)


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.usefixtures("umask")
def test_a_kernelspec_is_readable_for_a_group_whatever_the_umask(tmp_path):
    directory = tmp_path / "opt" / "share" / "jupyter" / "kernels" / "x"
    install(directory)
    assert json.loads((directory / "kernel.json").read_text()) == {"argv": ["1"]}
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in [directory, *directory.iterdir(), *directory.parents]
    }
    assert modes["kernel.json"] == 0o644
    assert {modes[name] for name in ("x", "kernels", "jupyter", "share", "opt")} == {0o755}
    assert tree(tmp_path / "opt" / "share" / "jupyter") == [
        "kernels",
        "kernels/x",
        "kernels/x/kernel.json",
        "kernels/x/logo-svg.svg",
    ]


def test_replacing_leaves_the_new_one_only(tmp_path):
    directory = tmp_path / "kernels" / "x"
    install(directory, "1")
    (directory / "old").write_text("")
    install(directory, "2")
    assert json.loads((directory / "kernel.json").read_text()) == {"argv": ["2"]}
    assert tree(tmp_path) == ["kernels", "kernels/x", "kernels/x/kernel.json", "kernels/x/logo-svg.svg"]


def test_of_two_setups_at_once_the_second_is_refused(tmp_path):
    directory = tmp_path / "kernels" / "x"
    install(directory, "1")
    with pytest.raises(UserError, match="There is a kernel named x already") as caught:
        envkernel.install_kernelspec(str(directory), {"argv": ["2"]}, {}, True, replace=False)
    assert "--replace" in caught.value.hint
    assert json.loads((directory / "kernel.json").read_text()) == {"argv": ["1"]}
    assert tree(tmp_path) == ["kernels", "kernels/x", "kernels/x/kernel.json", "kernels/x/logo-svg.svg"]


@pytest.mark.parametrize("own", [True, False])
def test_the_lasting_python_is_never_that_of_a_virtualenv(tmp_path, monkeypatch, own):
    """Before 3.11, Python names the virtualenv's own as its base."""
    python = str(tmp_path / "x" / ".." / "bin" / "python")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(sys, "_base_executable", python if own else sys.base_prefix + "/bin/../bin/python3")
    found = envkernel.lasting_python(envkernel.Host())
    assert os.access(found, os.X_OK)
    assert not found.startswith(str(tmp_path))


def test_a_failed_install_leaves_the_old_one_untouched(tmp_path, monkeypatch):
    directory = tmp_path / "kernels" / "x"
    install(directory, "1")
    rename = os.rename

    def fail(source, target):
        if target == str(directory) and source.endswith("/new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="can't be written") as caught:
        install(directory, "2")
    assert "--user" in caught.value.hint
    assert json.loads((directory / "kernel.json").read_text()) == {"argv": ["1"]}
    assert tree(tmp_path) == ["kernels", "kernels/x", "kernels/x/kernel.json", "kernels/x/logo-svg.svg"]


def test_a_failed_first_install_leaves_nothing(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError):
        install(tmp_path / "share" / "jupyter" / "kernels" / "x")
    assert tree(tmp_path) == []


def test_what_another_setup_has_installed_meanwhile_is_left_alone(tmp_path, monkeypatch):
    directory = tmp_path / "share" / "kernels" / "x"

    def fail(source, target):
        (directory / "kernel.json").parent.mkdir()
        (directory / "kernel.json").write_text("theirs")
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="There is a kernel named x already"):
        envkernel.install_kernelspec(str(directory), {"argv": []}, {}, True, replace=False)
    assert (directory / "kernel.json").read_text() == "theirs"


def test_where_no_directory_can_be_made_nothing_is_renamed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os.path, "lexists", lambda path: path == "/old")
    monkeypatch.setattr(os, "rename", lambda *paths: pytest.fail(f"renamed {paths}"))
    with pytest.raises(UserError, match="can't be written"):
        install(tmp_path / "file" / "kernels" / "x")


def test_ipykernel_is_asked_for_its_metadata_and_logos():
    spec = {"argv": ["x"], "language": "python", "metadata": {"debugger": True}}
    spec["logos"] = {"logo-svg.svg": "s\xe9", "logo-other": ""}
    host = FakeHost(
        answers={
            ("/e/python", "-c", envkernel.DESCRIBE_IPYKERNEL): Output(
                0, b"noise\nipykernel:" + json.dumps(spec).encode() + b"\nbye"
            )
        },
    )
    plan = Plan(["/e/python", "-m", "ipykernel_launcher"], {})
    made = envkernel.describe_ipykernel(Kernel(["python"]), plan, host)
    assert made == Kernel(["python"], metadata={"debugger": True}, files={"logo-svg.svg": b"s\xe9"})


def test_an_ipykernel_that_cannot_be_loaded():
    asked = ("/e/python", "-c", envkernel.DESCRIBE_IPYKERNEL)
    host = FakeHost(answers={asked: Output(1, b"", b"no libzmq")})
    plan = Plan(["/e/python", "-m", "x"], {}, where="the env /e")
    with pytest.raises(UserError, match="can't be loaded in the env /e") as error:
        envkernel.describe_ipykernel(Kernel(["python"]), plan, host)
    assert error.value.detail == "no libzmq"
