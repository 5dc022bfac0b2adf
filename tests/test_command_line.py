"""The command line: what a user types, and what is said where it can't be understood."""

import pytest

import envkernel
from envkernel import Launch, Mode, Option, Request, Step, UserError, parse_setup
from support import facts
from support.facts import FakeFacts

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
    monkeypatch.setitem(facts.HELP, "start", ENGINE)


def parse(*tokens):
    return parse_setup(tokens, FakeFacts())


def refused(*tokens):
    with pytest.raises(UserError) as caught:
        parse(*tokens)
    assert caught.value.status == 2
    return caught.value


def test_options_stand_before_and_after_the_target():
    expected = Request({"name": "x", "user": True}, [Step("conda", {}, ["/e"])])
    assert parse("conda", "--name=x", "--user", "/e") == expected
    assert parse("conda", "/e", "--user", "--name", "x") == expected


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
    monkeypatch.setitem(facts.HELP, "start", ENGINE + b"      --env string   a variable\n")
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
        (["conda", "--name=x", "/e", "python"], "python is too much", "after --"),
        (["conda", "--name=x", "--user=me", "/e"], "--user takes no value.", "Leave '=me' out."),
        (["conda", "--name=x", "/e", "--"], "Nothing stands after the --.", "leave the -- out"),
        (
            ["lmod", "a", "--", "conda", "--name=x", "/e"],
            "--name belongs to the kernel",
            "before the first --",
        ),
        (["conda", "--name=x", "--env", "A"], "--env A has no value.", "--env A=VALUE"),
        (["conda", "--name=x", "--env", "A", "--env=B=1", "/e"], "--env A has no value.", "--env A=VALUE"),
        (["conda", "--name=x", "--prefix=", "/e"], "--prefix was given an empty value.", "Leave it out"),
        (["conda", "--name=x", ""], "conda was given an empty PREFIX-OR-NAME.", "Usage"),
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


def test_every_option_has_help_and_every_mode_an_example(capsys):
    for mode in {mode.name: mode for mode in envkernel.MODES.values()}.values():
        assert mode.summary.endswith(".")
        assert mode.example.startswith(f"envkernel {mode.name} ")
        for option in [*mode.options, *envkernel.COMMON_OPTIONS]:
            assert option.help.endswith(".") or not option.setup
            assert not option.setup or f"--{option.name}" in envkernel.mode_help(mode)
    assert envkernel.main(["-h"]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in envkernel.COMMANDS)
    assert all(mode.name in overview for mode in envkernel.MODES.values())


def test_a_mistyped_command_line_exits_with_2_and_says_so_on_stderr(capfd):
    assert envkernel.main(["conda", "--nmae=x"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "envkernel: envkernel conda has no option --nmae.\n  Did you mean --name?\n"


def test_a_word_is_suggested_once():
    assert envkernel.near_words("--nmae", ["--name", "--name", "--net"]) == "Did you mean --name or --net?"


def test_a_name_that_no_folder_can_have_is_refused():
    request = Request({"name": "x" * 300}, [Step("virtualenv", {}, ["/v"])])
    with pytest.raises(UserError) as caught:
        envkernel.check_request(request)
    assert caught.value.status == 2
    assert "300 characters" in caught.value.message


def test_env_that_takes_the_target_is_told():
    error = refused("virtualenv", "--name=x", "--env", "FOO", "/v")
    assert error.message == "virtualenv needs PATH: --env FOO /v was read as FOO=/v."
    assert error.hint == "Write --env FOO=VALUE and PATH."


def test_an_empty_module_is_named():
    assert refused("lmod", "--name=x", "").message == "lmod was given an empty MODULE."
