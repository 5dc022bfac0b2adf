"""Shell completion: the scripts, asked by the shells themselves."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import envkernel

ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_envkernel 2> "$ERRORS"
grep -v 'compopt: not currently executing' "$ERRORS" >&2
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path):
    """Return a function that writes the completion script of a shell and returns its path."""

    def write(shell):
        path = tmp_path / f"completion.{shell}"
        path.write_text(envkernel.SHELLS[shell])
        return str(path)

    return write


@pytest.fixture
def two_kernels(tmp_path):
    """Return an environment with ``envkernel`` on PATH and two kernels that it has made."""
    program = tmp_path / "bin" / "envkernel"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{envkernel.__file__}" "$@"\n')
    program.chmod(0o755)
    for name in ("deep", "science"):
        spec = {"argv": ["python"], "display_name": name, "metadata": {"envkernel": {"version": "2.0.0"}}}
        directory = tmp_path / "data" / "kernels" / name
        directory.mkdir(parents=True)
        (directory / "kernel.json").write_text(json.dumps(spec))
    path = f"{program.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_PATH": ""}


QUESTIONS = [
    (["envkernel", "con"], {"conda"}),
    (["envkernel", "co"], {"conda", "completion"}),
    (["envkernel", "conda", "--pre"], {"--prefix="}),
    (["envkernel", "conda", "--pr"], {"--prefix="}),
    (["envkernel", "venv", "--dis"], {"--display-name="}),
    (["envkernel", "lmod", "--pu"], {"--purge"}),
    (["envkernel", "virtualenv", "--pu"], set()),
    (["envkernel", "lmod", "x", "--", "virt"], {"virtualenv"}),
    (["envkernel", "lmod", "x", "--", "lis"], set()),
    (["envkernel", "conda", "x", "--", "lmod", "--pu"], {"--purge"}),
    (["envkernel", "conda", "x", "--", "lmod", "--na"], set()),
    (["envkernel", "list", "--"], {"--json"}),
    (["envkernel", "completion", ""], {"bash", "zsh", "fish"}),
    (["envkernel", "show", ""], {"deep", "science"}),
    (["envkernel", "check", "s"], {"science"}),
    (["envkernel", "conda", "--logo", "=", "/tm"], set()),
]


def words_of(value):
    """Return the name of a parameter, the same in each worker of pytest-xdist."""
    return " ".join(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize(("words", "expected"), QUESTIONS, ids=words_of)
def test_bash(words, expected, script, two_kernels, tmp_path):
    said = subprocess.run(
        ["bash", "--norc", "-c", ASK_BASH, "bash", script("bash"), *words],
        env={**two_kernels, "ERRORS": str(tmp_path / "errors")},
        capture_output=True,
        text=True,
    )
    assert said.stderr == ""
    assert set(said.stdout.split()) == expected


@pytest.fixture
def lmod_with(monkeypatch):
    """Return a function that changes the mode lmod."""

    def change(**changes):
        mode = envkernel.MODES["lmod"].replace(**changes)
        monkeypatch.setitem(envkernel.MODES, "lmod", mode)

    return change


def answers(capsys, shell, *words):
    status = envkernel.main(["completion", shell, "--", *words])
    lines = capsys.readouterr().out.splitlines()
    assert status == (0 if lines else 1)
    return lines


def test_choices_are_values_of_their_option(lmod_with, capsys):
    option = envkernel.Option("--network", "How it is reached.", metavar="HOW", choices=("unix", "host"))
    lmod_with(options=[option])
    assert answers(capsys, "bash", "lmod", "--network", "u") == ["unix"]
    assert answers(capsys, "bash", "lmod", "--network", "=", "u") == ["unix"]
    assert answers(capsys, "bash", "lmod", "--network", "=") == ["unix", "host"]
    assert answers(capsys, "fish", "lmod", "--network=u") == ["--network=unix\t"]


def test_the_engines_options_are_completed_too(lmod_with, capsys):
    help = "  -e, --gpus gpu-request   GPUs\\n      --rm   remove\\n"
    lmod_with(engine=lambda *_: [["/bin/sh", "-c", f"printf '{help}'"]])
    assert answers(capsys, "bash", "lmod", "--gp") == ["--gpus="]
    assert answers(capsys, "fish", "lmod", "--rm") == ["--rm\tOption of lmod."]


@pytest.mark.parametrize("shell", envkernel.SHELLS)
def test_each_option_is_a_candidate(shell, capsys):
    found = "\n".join(answers(capsys, shell, "conda", "--"))
    for option in envkernel.COMMON_OPTIONS:
        assert (f"--{option.name}" in found) == option.setup, option


def test_an_unknown_shell_is_an_error(capfd):
    assert envkernel.main(["completion", "zhs"]) == 2
    assert "Did you mean zsh" in capfd.readouterr().err


@pytest.mark.live
@pytest.mark.parametrize(("words", "expected"), QUESTIONS[:-1], ids=words_of)
def test_fish(words, expected, script, two_kernels, tmp_path):
    fish = shutil.which("fish")
    assert fish, "fish is missing: tests/apt.txt"
    said = subprocess.run(
        [fish, "--no-config", "-c", f"source {script('fish')}; complete -C '{' '.join(words)}'"],
        env={**two_kernels, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert said.stderr == ""
    found = {line.split("\t")[0] for line in said.stdout.splitlines()}
    assert found == expected


@pytest.mark.live
@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("envkernel cond", "envkernel conda "),
        ("envkernel conda --sys", "envkernel conda --sys-prefix"),
        ("envkernel conda --disp", "envkernel conda --display-name="),
        ("envkernel conda x -- lmod --pu", "envkernel conda x -- lmod --purge"),
        ("envkernel check sc", "envkernel check science "),
        ("envkernel completion fi", "envkernel completion fish "),
    ],
)
def test_zsh(typed, becomes, script, two_kernels, tmp_path):
    """A key press in a real terminal: zsh completes nowhere else."""
    pexpect = pytest.importorskip("pexpect")
    zsh = shutil.which("zsh")
    assert zsh, "zsh is missing: tests/apt.txt"
    terminal = pexpect.spawn(
        zsh, ["-f"], env={**two_kernels, "HOME": str(tmp_path), "TERM": "dumb"}, encoding="utf-8", timeout=10
    )
    try:
        terminal.sendline(f"PROMPT='ready> '; autoload -Uz compinit; compinit -u; source {script('zsh')}")
        terminal.sendline("bindkey '^X' push-line; echo go-$((1 + 1))")
        terminal.expect("go-2")
        terminal.expect("ready> ")
        terminal.send(typed + "\t")
        terminal.expect_exact(becomes)
    finally:
        terminal.close(force=True)


def test_the_command_prints_the_script():
    said = subprocess.run(
        [sys.executable, envkernel.__file__, "completion", "bash"], capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (0, "")
    assert "complete -o default -F _envkernel envkernel" in said.stdout
