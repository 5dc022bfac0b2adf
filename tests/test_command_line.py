"""The command line: what a user types, and what is said where it can't be understood."""

import pytest

import envkernel
from envkernel import Launch, Mode, Option, Request, Step, UserError, parse_setup
from support import host
from support.host import FakeHost

ENGINE = b"""
  -B, --bind string     a bind
  -v, --volume string   a volume
      --user string     who
      --rm              remove
  -i, --interactive     stdin
  -t, --tty             a terminal
"""


@pytest.fixture
def engine_mode(monkeypatch):
    """A mode with an engine."""
    mode = Mode(
        "box",
        "",
        [Option("--gpu", "", run=True)],
        setup=lambda step, *_: step,
        plan=lambda step, plan, *_: plan,
        target="IMAGE",
        engine=lambda *_: [["/bin/box", "start"]],
        container=True,
    )
    monkeypatch.setitem(envkernel.MODES, "box", mode)
    monkeypatch.setitem(host.HELP, "start", ENGINE)


def parse(*tokens):
    return parse_setup(tokens, FakeHost())


def refused(*tokens):
    with pytest.raises(UserError) as caught:
        parse(*tokens)
    assert caught.value.status == 2
    return caught.value


def test_options_stand_before_and_after_the_target():
    expected = Request({"name": "x", "user": True}, [Step("conda", {}, ["/e"])])
    assert parse("conda", "--name=x", "--user", "/e") == expected
    assert parse("conda", "/e", "--user", "--name", "x") == expected


@pytest.mark.parametrize("value", ["-c 'x y' {connection_file}", "--user", "--user --", "=", "%s"])
def test_values_may_begin_with_anything(value):
    given = parse("conda", f"--kernel-cmd={value}", "--display-name", "-1", "/e").common
    assert given == {"kernel-cmd": value, "display-name": "-1"}


def test_a_chain_and_a_kernel_command():
    words = [
        "lmod",
        "--name=x",
        "--purge",
        "cuda/12",
        "-gcc",
        "--",
        "venv",
        "/v",
        "--",
        "python",
        "--",
        "conda",
    ]
    assert parse(*words) == Request(
        {"name": "x"},
        [Step("lmod", {"purge": True}, ["cuda/12", "-gcc"]), Step("virtualenv", {}, ["/v"])],
        ["python", "--", "conda"],
    )


def test_env_is_taken_as_one_word_and_as_two():
    request = parse("conda", "--name=x", "--env", "A=1", "--env", "B", "2", "--env=C=3=4", "/e")
    assert request.common["env"] == ["A=1", "B=2", "C=3=4"]


@pytest.mark.usefixtures("engine_mode")
def test_env_is_envkernels_after_any_mode_of_a_chain(monkeypatch):
    monkeypatch.setitem(host.HELP, "start", ENGINE + b"      --env string   a variable\n")
    request = parse(
        "lmod", "--name=x", "--env=A=1", "m", "--", "box", "--env", "B=2", "img", "--env", "C", "3"
    )
    assert request.common == {"name": "x", "env": ["A=1", "B=2", "C=3"]}
    assert request.steps[1] == Step("box", {}, ["img"])


@pytest.mark.parametrize(
    ("typed", "engine", "targets"),
    [
        (["--bind", "/a:/b", "img"], ["--bind=/a:/b"], ["img"]),
        (["--bind=/a:/b", "img"], ["--bind=/a:/b"], ["img"]),
        (["img", "--bind", "/a:/b"], ["--bind=/a:/b"], ["img"]),
        (["-B/a:/b", "img"], ["--bind=/a:/b"], ["img"]),
        (["-it", "img"], ["--interactive", "--tty"], ["img"]),
        (["-itB", "/a:/b", "img"], ["--interactive", "--tty", "--bind=/a:/b"], ["img"]),
        (["--rm", "img"], ["--rm"], ["img"]),
        (["-v", "/a:/b", "img"], ["--volume=/a:/b"], ["img"]),
        (["--user=7", "img"], ["--user=7"], ["img"]),
        (["--bind", "--", "img"], None, None),
    ],
)
@pytest.mark.usefixtures("engine_mode")
def test_what_is_the_engines_goes_to_the_engine(typed, engine, targets):
    if engine is None:
        assert "--bind needs a value" in refused("box", "--name=x", *typed).message
        return
    step = parse("box", "--name=x", *typed).steps[0]
    assert step.engine == engine
    assert step.targets == targets


@pytest.mark.usefixtures("engine_mode")
def test_an_engine_is_asked_in_the_environment_of_the_modes_before_it(monkeypatch):
    """A module may bring the engine."""
    seen = []
    modules = Mode(
        "modules",
        "",
        [],
        setup=lambda step, *_: step.replace(targets=["set up"]),
        plan=lambda step, plan, *_: plan.replace(environ={**plan.environ, "PATH": f"/{step.targets[0]}"}),
        target="MODULE",
    )
    monkeypatch.setitem(envkernel.MODES, "modules", modules)
    box = envkernel.MODES["box"]
    asked = box.replace(engine=lambda *words: seen.append(words[2]["PATH"]) or [["/bin/box", "start"]])
    monkeypatch.setitem(envkernel.MODES, "box", asked)
    start = {"PATH": "/start"}
    chain = ["modules", "m", "--", "box", "--rm", "-i", "img"]
    assert parse_setup(chain, FakeHost(), start).steps[1].engine == ["--rm", "--interactive"]
    assert seen == ["/set up"]
    parse_setup(["box", "--rm", "img"], FakeHost(), start)
    assert seen == ["/set up", "/start"]
    parse_setup(["modules", "m", "--", "box", "--gpu", "img"], FakeHost(), start)
    assert len(seen) == 2  # nobody asks an engine for an option of envkernel's own


@pytest.mark.usefixtures("engine_mode")
def test_user_alone_is_envkernels():
    request = parse("box", "--name=x", "--user", "img")
    assert request.common == {"name": "x", "user": True}
    assert request.steps[0].engine == []


@pytest.mark.usefixtures("engine_mode")
def test_an_option_that_neither_knows_is_refused_with_a_suggestion():
    error = refused("box", "--name=x", "--bidn=/a:/b", "img")
    assert error.message == "Neither envkernel nor box knows the option --bidn."
    assert "--bind" in error.hint


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["cnoda", "--name=x", "/e"], "There is no mode or command named 'cnoda'.", "conda"),
        (["conda", "--nmae=x", "/e"], "envkernel conda has no option --nmae.", "--name"),
        (["conda", "--name"], "--name needs a value.", "--name NAME"),
        (["conda", "--name=x"], "conda needs PREFIX-OR-NAME.", "Usage: envkernel conda"),
        (["conda", "--name=x", "/e", "python"], "python is too much", "follows --"),
        (["conda", "--name=x", "--user=me", "/e"], "--user takes no value.", "Leave '=me' out."),
        (["conda", "--name=x", "/e", "--"], "Nothing follows the --.", "leave the -- out"),
        (
            ["lmod", "a", "--", "conda", "--name=x", "/e"],
            "--name belongs to the kernel",
            "before the first --",
        ),
        (["conda", "--name=x", "--env", "A"], "--env A has no value.", "--env A=VALUE"),
        (["conda", "--name=x", "--env", "A", "--env=B=1", "/e"], "--env A has no value.", "--env A=VALUE"),
        (["conda", "--name=x", "--prefix=--", "/e"], "--prefix was given an empty value.", "Leave it out"),
        (["conda", "--name=x", "--prefix=", "/e"], "--prefix was given an empty value.", "Leave it out"),
        (["conda", "--name=x", ""], "conda was given an empty PREFIX-OR-NAME.", "Usage"),
        (["conda", "--name=science"], "conda needs", "--name=science is the name that the kernel gets."),
        (["conda", "--gpu", "/e"], "conda has no option --gpu.", "an option of apptainer, docker, podman"),
        (["slurm", "conda", "science"], "conda science is too much", "envkernel slurm ... -- conda ..."),
        (["conda", "/e", "--", "-m", "x"], "begins with an option, -m.", "-- python -m x"),
        (["docker", "--pull=x", "img"], "invalid choice: 'x' (choose from ", "envkernel docker -h"),
        (["install"], "There is no mode or command named 'install'.", "envkernel conda science"),
        (["uninstall", "x"], "There is no mode or command named 'uninstall'.", "Did you mean remove?"),
    ],
)
def test_what_cannot_be_understood_gets_a_sentence_and_a_hint(words, message, hint):
    error = refused(*words)
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({}, "The kernel has no name."),
        ({"name": "a b"}, "'a b' can't be the name of a kernel."),
        ({"name": "../x"}, "'../x' can't be the name of a kernel."),
        ({"name": "-x"}, "'-x' can't be the name of a kernel."),
        ({"name": "x", "user": True, "prefix": "/p"}, "--user and --prefix exclude each other."),
        ({"name": "x", "env": ["=1"]}, "--env =1 names no variable."),
    ],
)
def test_common_options_at_odds_are_refused(common, message):
    with pytest.raises(UserError) as caught:
        envkernel.check_request(Request(common, []))
    assert caught.value.message == message
    assert caught.value.status == 2


@pytest.mark.parametrize("mode", ["conda", "virtualenv"])
def test_a_kernelspec_of_envkernel_1_is_read(mode):
    tokens = [mode, "run", "/path/env", "--", "python", "-m", "ipykernel_launcher", "-f", "/run/k.json"]
    assert envkernel.launch_from_argv(tokens) == Launch(
        [Step(mode, {}, ["/path/env"])], tokens[4:], legacy=True
    )


def test_an_lmod_kernelspec_of_envkernel_1_is_read():
    tokens = ["lmod", "run", "--purge", "anaconda3", "-gcc", "--", "python", "-m", "x"]
    step = Step("lmod", {"purge": True}, ["anaconda3", "-gcc"])
    assert envkernel.launch_from_argv(tokens) == Launch([step], ["python", "-m", "x"], legacy=True)


def help_of(capsys, *words):
    assert envkernel.main([*words, "-h"]) == 0
    return capsys.readouterr().out


def test_every_option_has_help_and_every_mode_an_example(capsys):
    for mode in {mode.name: mode for mode in envkernel.MODES.values()}.values():
        text = help_of(capsys, mode.name)
        assert mode.summary.endswith(".")
        assert mode.example.startswith(f"envkernel {mode.name} ")
        assert mode.example in text
        for option in [*mode.options, *envkernel.COMMON_OPTIONS]:
            assert option.help.endswith(".") or not option.setup
            shown = any(f"--{option.name}{end}" in text for end in (" ", "\n", ","))
            assert shown == option.setup, option


def test_help_names_modes_and_commands(capsys):
    text = help_of(capsys)
    assert all(name in text for name in envkernel.COMMANDS)
    assert all(name in text for name in envkernel.MODES)
    assert "  virtualenv (venv) " in text
    assert "envkernel update [options] NAME | --all\n" in help_of(capsys, "update")
    assert all(flag in text for flag in ("-h, --help", "-V, --version"))
    for name in envkernel.COMMANDS:
        assert help_of(capsys, name).startswith(f"usage: envkernel {name} ")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal_and_shows_a_modes_own_options_first(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(capsys, "docker")
    body = text[text.index("options of docker") : text.index("example:")]
    assert columns - 20 < max(map(len, body.splitlines())) < columns
    titles = ["options of docker:", "kernel:", "location:", "environment:", "other:"]
    places = [text.index("\n" + title) for title in titles]
    assert places == sorted(places)
    assert "{missing,always,never}" in text
    assert "(default: that of" in text
    assert "--format" not in text


def test_no_help_has_an_empty_title(capsys):
    assert "options of conda:" not in help_of(capsys, "conda")


@pytest.mark.parametrize("words", [["-V"], ["--version"]])
def test_the_version(words, capsys):
    assert envkernel.main(words) == 0
    assert capsys.readouterr().out == envkernel.__version__ + "\n"


def test_no_arguments_at_all_show_the_help_and_fail(capsys):
    assert envkernel.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: envkernel MODE")


def test_a_mistyped_command_line_exits_with_2_and_says_so_on_stderr(capfd):
    assert envkernel.main(["conda", "--nmae=x"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "envkernel: envkernel conda has no option --nmae.\n  Did you mean --name?\n"


def test_a_name_is_suggested_once():
    assert envkernel.suggestion("--nmae", ["--name", "--name", "--net"]) == "Did you mean --name or --net?"


def test_a_later_mode_without_its_target_is_not_told_of_a_name():
    error = refused("slurm", "--name=x", "--", "conda")
    assert error.message == "conda needs PREFIX-OR-NAME."
    assert error.hint.startswith("Usage: envkernel ... -- conda [options] PREFIX-OR-NAME ")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["conda", "science"], "science"),
        (["conda", "/opt/conda/envs/deep learning/"], "deep-learning"),
        (["virtualenv", "~/projects/my-env"], "my-env"),
        (["virtualenv", "~/projects/maps/.venv"], "maps"),
        (["virtualenv", "venv"], "cwd"),
        (["lmod", "--purge", "-gcc", "cuda/12", "py"], "cuda-12-py"),
        (["lmod", "--restore=mine"], "mine"),
        (["lmod", "--purge"], "lmod"),
        (["docker", "registry:5000/group/python:3.12"], "python-3.12"),
        (["docker", "python@sha256:0123"], "python"),
        (["docker", "--build", "./image"], "image"),
        (["apptainer", "/images/course.sif"], "course"),
        (["apptainer", "docker://python:3.12"], "python-3.12"),
        (["yarn", "/data/environment.tar.gz"], "yarn-environment"),
        (["lmod", "cuda", "--", "conda", "science"], "science"),
        (["slurm", "--", "conda", "science"], "slurm-science"),
        (["slurm", "--", "lmod", "cuda", "--", "conda", "science"], "slurm-science"),
        (["slurm", "--", "python3", "-f", "{connection_file}"], "slurm"),
    ],
)
def test_a_kernel_without_a_name_gets_that_of_its_target(words, name):
    request = parse(*words)
    assert envkernel.derive_name(request, FakeHost()) == name
    envkernel.check_request(Request({"name": name}, request.steps))


def test_options_before_the_mode_are_explained(capfd):
    assert envkernel.main(["--name=x", "conda", "/my env"]) == 2
    said = capfd.readouterr().err
    assert "--name=x comes before the mode." in said
    assert "envkernel conda --name=x '/my env'" in said


def test_an_empty_module_is_named():
    assert refused("lmod", "--name=x", "").message == "lmod was given an empty MODULE."
