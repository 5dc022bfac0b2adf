"""What all container modes read in the same way: binds, and the options of engines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import envkernel
from envkernel import Bind, Output, UserError
from support.host import FakeHost


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
    host = FakeHost(files={"/cwd/data/x": b"", "/home/me/my:file": b""})
    texts = ["data:/data/:ro", r"~/my\:file"]
    assert envkernel.setup_binds(texts, host) == [
        "/cwd/data:/data:ro",
        r"/home/me/my\:file:/home/me/my\:file",
    ]
    with pytest.raises(UserError, match="there is no /nowhere"):
        envkernel.setup_binds(["/nowhere:/x"], host)


HELP = """
Usage:  docker run [OPTIONS] IMAGE

Options:
      --add-host list                  Add a custom host-to-IP mapping
                                       (host:ip), see --help of it
  -d, --detach                         Run container in background
      --gpus gpu-request               GPU devices
      --blkio-weight-device strings   Device specific block IO relative weight
  -e, --env list                       Set environment variables
  -f, --file pathname or URL           Pathname or URL
      --help
"""


SRUN_HELP = """
  -A, --account=name          charge job
      --new-thing=x   does it
      --near=list specify a list
      --exclusive[=user]      for all
                              --mem >= --mem-per-cpu
  -B  --extra-node-info=S[:C[:T]]  combine
      --usage                 display
"""


def test_help_of_an_engine() -> None:
    assert envkernel.read_engine_help(HELP) == {
        "--add-host": ("--add-host", "="),
        "-d": ("--detach", ""),
        "--detach": ("--detach", ""),
        "--gpus": ("--gpus", "="),
        "--blkio-weight-device": ("--blkio-weight-device", "="),
        "-e": ("--env", "="),
        "--env": ("--env", "="),
        "-f": ("--file", "="),
        "--file": ("--file", "="),
        "--help": ("--help", ""),
    }
    assert envkernel.read_engine_help(SRUN_HELP) == {
        "-A": ("--account", "="),
        "--account": ("--account", "="),
        "--new-thing": ("--new-thing", "="),
        "--near": ("--near", "="),
        "--exclusive": ("--exclusive", "["),
        "-B": ("--extra-node-info", "="),
        "--extra-node-info": ("--extra-node-info", "="),
        "--usage": ("--usage", ""),
    }


class Engine(FakeHost):
    """A world with an engine whose help does not list all that it knows."""

    HIDDEN = {"--net": Output(1, b"", b"requires at least 1 argument"), "--quiet": Output(0, b"help")}
    LISTED = (
        b"  -B, --bind strings     a bind\n  -c, --contain          less\n  -n, --network string   which\n"
        b"  -I, --immediate[=s]    now\n      --pwd string       where\n"
    )

    def output(self, argv: list[str], environ: dict[str, str]) -> Output:
        self.asked.append(list(argv))
        assert environ["LC_ALL"] == "C"
        if argv[2:] == ["--help"]:
            return Output(0, self.LISTED)
        return self.HIDDEN.get(argv[2], Output(125, b"", f"unknown flag: {argv[2]}".encode()))


def ask(host: FakeHost) -> envkernel.EngineOptions:
    return envkernel.EngineOptions([["/opt/bin/engine", "exec"]], host, {})


@pytest.mark.parametrize(
    ("tokens", "canonical"),
    [
        (["-B", "/a:/b"], ["--bind=/a:/b"]),
        (["-B/a:/b"], ["--bind=/a:/b"]),
        (["-B=/a"], ["--bind=/a"]),
        (["--bind=/a=b"], ["--bind=/a=b"]),
        (["--bind==b"], ["--bind==b"]),
        (["-cnB", "/a"], ["--contain", "--network=B", None]),
        (["-cB", "/a"], ["--contain", "--bind=/a"]),
        (["--network", "none", "--contain"], ["--network=none", "--contain"]),
        (["--network=a b"], ["--network=a b"]),
        (["-c=true"], ["--contain=true"]),
        (["-I60", "--immediate", "-c"], ["--immediate=60", "--immediate", "--contain"]),
        (["--net", "none"], ["--net=none"]),
        (["--quiet", "--contain"], ["--quiet", "--contain"]),
        (["--bnid=/a"], [None]),
        (["-cx"], ["--contain", None]),
    ],
)
def test_engine_options_are_read_as_the_engine_itself_does(
    tokens: list[str], canonical: list[str | None]
) -> None:
    engine, queue = ask(Engine()), list(tokens)
    found: list[str | None] = []
    while queue:
        token = queue.pop(0)
        if not token.startswith("-") or not engine.read(token, queue, found):  # type: ignore[arg-type]
            found.append(None)
    assert found == canonical


def test_an_engine_is_asked_once_for_what_its_help_lists() -> None:
    host = Engine()
    engine = ask(host)
    assert [engine.find(flag) for flag in ("--bind", "-B", "-c")] == [
        *[("--bind", "=")] * 2,
        ("--contain", ""),
    ]
    assert len(host.asked) == 1


def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost(answers={("/bin/srun", "--help"): Output(1, b"", b"srun: no configuration")})
    with pytest.raises(UserError, match="/bin/srun does not say which options it has") as caught:
        envkernel.EngineOptions([["/bin/srun"]], host, {}).find("--mem")
    assert caught.value.detail == "srun: no configuration"


def test_the_value_of_an_option_before_the_others_are_read() -> None:
    assert envkernel.typed_value(["--engine=/e", "x"], "--engine") == "/e"
    assert envkernel.typed_value(["x", "--engine", "/e"], "--engine") == "/e"
    assert envkernel.typed_value(["--engines=/e", "--engine"], "--engine") == ""


def test_values_of_engine_options() -> None:
    tokens = ["--bind=/a", "--net", "--bind=/b", "--contain=false"]
    assert envkernel.engine_values(tokens, "--bind") == ["/a", "/b"]
    assert envkernel.engine_values(tokens, "--net", "--network") == ["true"]
    assert envkernel.engine_values(tokens, "--contain") == []


def test_find_engine() -> None:
    host = FakeHost(programs=["/opt/bin/singularity", "/else/engine"])

    def find(mode: str, **options: str) -> str:
        return envkernel.find_engine(envkernel.Step(mode, options), {"PATH": "/opt/bin:/else"}, host)

    assert find("singularity") == find("apptainer") == "/opt/bin/singularity"
    assert find("docker", engine="/else/engine") == find("docker", engine="engine") == "/else/engine"
    assert find("docker", program="/recorded") == "/recorded"
    with pytest.raises(UserError, match="no docker"):
        find("docker")
