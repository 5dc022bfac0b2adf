"""What all container modes read in the same way: binds, and the options of engines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import envkernel
from envkernel import Bind, Output, UserError
from support.facts import FakeFacts


@pytest.mark.parametrize(
    ("text", "commas", "binds"),
    [
        ("/data", False, [Bind("/data")]),
        ("/data:/inside", False, [Bind("/data", "/inside")]),
        ("/data:/inside:ro", False, [Bind("/data", "/inside", "ro")]),
        ("/a,/b:/c:ro", True, [Bind("/a"), Bind("/b", "/c", "ro")]),
        ("/a,b:/c:ro,z", False, [Bind("/a,b", "/c", "ro,z")]),
        (r"/a\:b\,c:/c", True, [Bind("/a:b,c", "/c")]),
        (r"C\d:/c", False, [Bind(r"C\d", "/c")]),
    ],
)
def test_binds(text: str, commas: bool, binds: list[Bind]) -> None:
    assert envkernel.read_binds([text], commas) == binds


@pytest.mark.parametrize("text", ["", ":/a", "/a:b", "/a:/b:ro:z", "/a:"])
def test_what_is_no_bind(text: str) -> None:
    with pytest.raises(UserError, match="--bind can't be") as caught:
        envkernel.read_binds([text])
    assert caught.value.status == 2


@given(st.text(min_size=1), st.text(), st.sampled_from(["", "ro"]))
def test_a_bind_is_read_as_it_was_written(source: str, target: str, options: str) -> None:
    bind = Bind(source, "/" + target, options)
    assert envkernel.read_binds([str(bind)], commas=True) == [bind]


def test_binds_at_setup() -> None:
    facts = FakeFacts(files={"/cwd/data/x": b"", "/home/me/my:file": b""})
    texts = ["data:/data/:ro", r"~/my\:file"]
    assert envkernel.setup_binds(texts, facts) == [
        "/cwd/data:/data:ro",
        r"/home/me/my\:file:/home/me/my\:file",
    ]
    with pytest.raises(UserError, match="there is no /nowhere"):
        envkernel.setup_binds(["/nowhere:/x"], facts)


HELP = """
Usage:  docker run [OPTIONS] IMAGE

Options:
      --add-host list                  Add a custom host-to-IP mapping
                                       (host:ip), see --help of it
  -d, --detach                         Run container in background
      --gpus gpu-request               GPU devices
      --blkio-weight-device strings   Device specific block IO relative weight
  -e, --env list                       Set environment variables
      --help
"""


def test_help_of_an_engine() -> None:
    assert envkernel.parse_engine_help(HELP) == {
        "--add-host": True,
        "-d": False,
        "--detach": False,
        "--gpus": True,
        "--blkio-weight-device": True,
        "-e": True,
        "--env": True,
        "--help": False,
    }


TABLE = "B,bind= c,contain n,net network= !pwd="


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> FakeFacts:
    monkeypatch.setenv("PATH", "/nothing:/opt/bin")
    answers = {("/opt/bin/engine", "exec", "--help"): Output(0, b"  -x, --extra string   new\n")}
    return FakeFacts(programs=["/opt/bin/engine", "/else/engine"], answers=answers)


def test_options_are_those_of_the_installed_engine_and_the_hidden_ones(facts: FakeFacts) -> None:
    found = envkernel.engine_options(["other", "engine"], ["exec"], TABLE, [], facts)
    assert found == {"-x": True, "--extra": True, "--pwd": True}


@pytest.mark.parametrize(
    "tokens", [["--engine=/not/there"], ["--engine", "gone"], ["--connection-file", "x"]]
)
def test_options_out_of_the_table(facts: FakeFacts, tokens: list[str]) -> None:
    found = envkernel.engine_options(["engine"], ["exec"], TABLE, tokens, facts)
    assert found == envkernel.option_table(TABLE)
    assert found["-B"]
    assert not found["--contain"]
    assert facts.asked == []


@pytest.mark.parametrize(
    ("tokens", "canonical"),
    [
        (["-B", "/a:/b"], ["--bind=/a:/b"]),
        (["-B/a:/b"], ["--bind=/a:/b"]),
        (["-B=/a"], ["--bind=/a"]),
        (["-cnB", "/a"], ["--contain", "--net", "--bind=/a"]),
        (["--network", "none", "--contain"], ["--network=none", "--contain"]),
        (["--network=a b"], ["--network=a b"]),
    ],
)
def test_canonical_engine_options(tokens: list[str], canonical: list[str]) -> None:
    assert envkernel.canonical_engine(tokens, TABLE, envkernel.option_table(TABLE)) == canonical


def test_values_of_engine_options() -> None:
    tokens = ["--bind=/a", "--net", "--bind=/b", "--contain=false"]
    assert envkernel.engine_values(tokens, "--bind") == ["/a", "/b"]
    assert envkernel.engine_values(tokens, "--net", "--network") == ["true"]
    assert envkernel.engine_values(tokens, "--contain") == []


def test_find_program(facts: FakeFacts) -> None:
    environ = {"PATH": "/opt/bin:/else"}
    assert envkernel.find_program(["no", "engine"], environ, facts) == "/opt/bin/engine"
    assert envkernel.find_program(["/else/engine"], environ, facts) == "/else/engine"
    assert envkernel.find_program(["no"], environ, facts) == ""
