"""Random command lines, kernelspecs, connection files and answers of other programs (hypothesis).

Whatever comes, envkernel does what was asked or says in its own words what is wrong: no traceback, and no
text of the user's or another program's is ever run by a shell or by Python.  ENVKERNEL_FUZZ=N tries N times
as many examples, other ones each time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Sequence

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import envkernel
from envkernel import CONNECTION_FILE, Launch, Plan, Step, UserError
from support.host import FakeHost

pytestmark = pytest.mark.live

TIMES = int(os.environ.get("ENVKERNEL_FUZZ", "1"))
CANARY = "canary-was-run"
FAKE = """#!/bin/sh
case "$*" in
*--help*) cat "$FUZZ_HELP" ;;
*) cat "$FUZZ_ANSWER"; exit "$FUZZ_STATUS" ;;
esac
"""
"""In the place of every engine and module system: says what a test wants."""
PROGRAMS = [
    "docker",
    "podman",
    "apptainer",
    "singularity",
    "srun",
    "squeue",
    "sinfo",
    "scontrol",
    "yarn",
    "conda",
    "lmod",
]

CALL = f"touch {CANARY}"
SIMPLE = """
- -- --- = --= ~ / .. {{connection_file}} {connection_file} {x %s \udcff\udc80 é * / /bin/true python run
--name --name= --name=a/b --name=.. --user --user=me --user=0 --replace --verbose --help=x --nope
--env --env=A --env= --env=A=b=c --env==x --bind --bind= --bind=, --bind=/:/x:ro --bind=/a:b:c:d -v -v/a:/b
--mount=type=bind --mount=, --mount=type=bind,src=/,dst=/x,copy --pwd --workdir= --workdir=x --gpu
--transport=udp --transport=tcp --pull=x --pull=never --shared --keep --engine=x -it -e -eA=b --rm -d -p 80:80
--linger=x --linger=-1 --linger=1e400 --linger=nan --node-ports=5-1 --node-ports=x-y --queue-timeout=inf
--tunnel=rsh --node-transport=ipc --node-python= --partition=x --kernel=ir --kernel-cmd=' --kernel-cmd=
--kernel= --python=SELF --python= --language= --kernel-template=x --network=none --network
conda virtualenv lmod docker apptainer slurm yarn
"""
CODE = (f"$({CALL})", f"`{CALL}`", f";{CALL};", f"'; {CALL} #", f'"; {CALL} #', f"a\n{CALL}\n", f"| {CALL}")
PREFIXES = ("", "--env=A=", "--bind=/", "--kernel=", "--kernel-cmd=", "--python=", "--display-name=")
NASTY = (
    "",
    " ",
    "--display-name=\n",
    "--env=A\n=x",
    *SIMPLE.split(),
    *(p + code for p in PREFIXES for code in CODE),
)
TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12)
WORD = st.sampled_from(NASTY) | st.sampled_from(NASTY) | TEXT
WORDS = st.lists(WORD, max_size=6)
MODES = ("conda", "virtualenv", "lmod", "docker", "podman", "singularity", "apptainer", "slurm", "yarn")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(NASTY) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def fuzz(times: int) -> Any:
    """Return hypothesis' settings: the same examples each time, unless more are asked for."""
    return settings(
        max_examples=times * TIMES,
        derandomize=TIMES == 1,
        database=None,
        phases=[phase for phase in Phase if phase is not Phase.shrink or TIMES > 1],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class World:
    """A home with a virtualenv and fake programs, in which envkernel is called."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / "work"
        self.data = root / "data"
        for directory in (self.work, self.data, root / "home", root / "bin", root / "tmp"):
            directory.mkdir()
        for name in PROGRAMS:
            (root / "bin" / name).write_text(FAKE)
            (root / "bin" / name).chmod(0o755)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
        gone = subprocess.Popen(["true"])
        gone.wait()
        self.environ = {
            "PATH": f"{root}/bin:/usr/bin:/bin",
            "HOME": str(root / "home"),
            "TMPDIR": str(root / "tmp"),
            "JUPYTER_DATA_DIR": str(self.data),
            "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
            "JUPYTER_CONFIG_DIR": str(root / "config"),
            "JPY_PARENT_PID": str(gone.pid),  # nobody waits for a kernel that says why it didn't start
            "FUZZ_HELP": str(root / "help"),
            "FUZZ_ANSWER": str(root / "answer"),
            "FUZZ_STATUS": "0",
            "LANG": "C.UTF-8",
        }
        self.say(b"", b"")

    def say(self, usage: bytes, answer: bytes, status: int = 0) -> None:
        """Have the fake programs print something."""
        (self.root / "help").write_bytes(usage)
        (self.root / "answer").write_bytes(answer)
        self.environ["FUZZ_STATUS"] = str(status)

    def call(self, *words: str, environ: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Call envkernel in a process of its own; return its exit status, stdout and stderr.

        A traceback, a signal, more than 20 s and a canary that was run fail the test.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if not pid:
                self._become({**self.environ, **(environ or {})}, out.fileno(), errors.fileno(), words)
            _, status = os.waitpid(pid, 0)
            texts = []
            for file in (out, errors):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        reported = f"{words} ended with {status}:\n{texts[0][-2000:]}\n{texts[1][-4000:]}"
        assert os.WIFEXITED(status), reported
        code = os.WEXITSTATUS(status)
        assert code != 99, reported
        assert "Traceback" not in texts[1], reported
        assert not list(self.root.rglob(CANARY)), reported
        return code, texts[0], texts[1]

    def _become(self, environ: dict[str, str], out: int, errors: int, words: Sequence[str]) -> None:
        try:
            os.setsid()
            os.environ.clear()
            os.environ.update(environ)
            os.chdir(self.work)
            null = os.open(os.devnull, os.O_RDONLY)
            for number, file in enumerate((null, out, errors)):
                os.dup2(file, number)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            signal.alarm(15)
            code = envkernel.main(list(words))
            sys.stdout.flush()
            os._exit(code if (isinstance(code, int) and 0 <= code < 99) or code in (126, 127, 130) else 98)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
            os._exit(99)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


def check_said(code: int, said: str) -> None:
    """An error is one of ours: a sentence that begins with our name."""
    assert code in (0, 1, 2, 127), (code, said)
    if code:
        assert "envkernel" in said, said


# ---- setup ---------------------------------------------------------------------------------------------


@fuzz(100)
@given(st.sampled_from(MODES), WORDS)
@example("docker", ["--user=me", "python", "--", f"$({CALL})", "{connection_file}"])
@example("slurm", ["--", "--", "--"])
def test_any_command_line(world: World, mode: str, words: list[str]) -> None:
    code, _, said = world.call(mode, "--dry-run", *words)
    check_said(code, said)


@fuzz(20)
@given(
    WORDS,
    st.sampled_from(
        ["list", "show", "log", "remove", "update", "stop", "completion", "check", "-", "install"]
    ),
)
def test_any_management_line(world: World, words: list[str], command: str) -> None:
    code, _, said = world.call(command, *words)
    check_said(code, said)


@fuzz(40)
@given(st.dictionaries(st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,5}\Z"), WORD, max_size=3), WORDS)
def test_what_is_given_reaches_the_kernel(world: World, values: dict[str, str], words: list[str]) -> None:
    """Byte for byte: variables and arguments of a virtualenv's kernel, through kernel.json and `run`."""
    for name in ("PATH", "VIRTUAL_ENV", "_", "PWD", "SHLVL", "PS1", "PYTHONHOME"):
        values.pop(name, None)
    command = ["/usr/bin/python3", "-I", "-S", "-c", SHOW, *words, "{connection_file}"]
    given_words = [f"--env={name}={value}" for name, value in values.items()]
    code, out, said = world.call(
        "virtualenv", "--dry-run", "--name=x", *given_words, str(world.root / "venv"), "--", *command
    )
    assert code == 0, said
    spec, _ = json.JSONDecoder().raw_decode(out)
    line = [word.replace("{connection_file}", "/c.json") for word in spec["argv"]]
    result = subprocess.run(
        line, env={**world.environ, **spec.get("env", {})}, capture_output=True, cwd=world.work, check=False
    )
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["argv"] == [word.replace("{connection_file}", "/c.json") for word in command[5:]]
    assert {name: shown["environ"].get(name) for name in values} == values
    assert not list(world.root.rglob(CANARY))


SHOW = "import json, os, sys; print(json.dumps({'argv': sys.argv[1:], 'environ': dict(os.environ)}))"


# ---- run, and what is installed ----------------------------------------------------------------------------


def changed(draw: Any, line: list[str]) -> list[str]:
    """Return a line with some of its words changed, gone, doubled or added."""
    line = list(line)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(line) - 1)))
        kind = draw(st.sampled_from(["change", "drop", "double", "add", "cut"]))
        if kind == "change" and line:
            line[at] = draw(WORD)
        elif kind == "drop" and line:
            del line[at]
        elif kind == "double" and line:
            line.insert(at, line[at])
        elif kind == "cut":
            del line[at:]
        else:
            line.insert(at, draw(WORD))
    return line


def run_lines(world: World) -> dict[str, list[str]]:
    """Return what setup writes after ``MODE``, for some modes."""
    lines = {}
    tail = ["--", "/bin/true", "{connection_file}"]
    for mode, words in {
        "virtualenv": [str(world.root / "venv"), *tail],
        "lmod": ["gcc/12", *tail],
        "docker": ["--bind=/:/x:ro", "--pwd", "image", *tail],
        "slurm": ["--partition=x", *tail],
    }.items():
        world.say(b"  -v, --volume list   x\n      --network network  x\n", b'{"Os": "linux"}\n')
        environ = {"LMOD_CMD": str(world.root / "bin" / "lmod")}
        code, out, _ = world.call(mode, "--dry-run", "--name=x", *words, environ=environ)
        if code == 0:
            argv = json.JSONDecoder().raw_decode(out)[0]["argv"]
            lines[mode] = argv[argv.index(mode) :]
    assert "virtualenv" in lines
    return lines


@fuzz(40)
@given(st.data())
def test_any_run_line(world: World, data: st.DataObject) -> None:
    lines = LINES.setdefault(str(world.root), run_lines(world))
    mode = data.draw(st.sampled_from(sorted(lines)))
    line = changed(data.draw, lines[mode][2:])
    line = [word.replace("{connection_file}", "/nowhere/c.json") for word in line]
    code, _, said = world.call(mode, "run", *line, environ={"LMOD_CMD": str(world.root / "bin" / "lmod")})
    assert code != 98, said


LINES: dict[str, dict[str, list[str]]] = {}


@fuzz(20)
@given(st.data())
def test_any_kernel_json(world: World, data: st.DataObject) -> None:
    """What somebody edited, or another program wrote, in every command that reads it."""
    tail = ["--", "/bin/true", "{connection_file}"]
    directory = world.data / "kernels" / "x"
    world.call("virtualenv", "--name=x", "--user", "--replace", str(world.root / "venv"), *tail)
    spec = json.loads((directory / "kernel.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = spec
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(JSON)
                break
            place = place[key]
    text = json.dumps(spec)
    if data.draw(st.integers(0, 9)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    (directory / "kernel.json").write_text(text)
    for line in ("list", "list --json", "show x", "log x", "update x", "remove x"):
        code, _, said = world.call(*line.split())
        check_said(code, said)
    assert (world.root / "venv" / "bin" / "python").exists()


KEYS = [*(name + "_port" for name in envkernel.STREAMS), "ip", "key", "transport"]
VALID = {**dict.fromkeys(KEYS, 5001), "ip": "127.0.0.1", "key": "k", "transport": "tcp"}


@fuzz(200)
@given(
    st.one_of(
        st.binary(max_size=60),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from(KEYS), JSON).map(
            lambda value: json.dumps({**VALID, **value}).encode()
        ),
    ),
    st.sampled_from(["ipc", "tcp"]),
)
@example(json.dumps(VALID).encode(), "tcp")
def test_any_connection_file(content: bytes, reach: str) -> None:
    """A container is planned with it, or it is refused."""
    host = FakeHost(files={"/c.json": content}, programs=["/usr/bin/docker"])
    step = Step("docker", {"program": "/usr/bin/docker", "reach": reach}, ["image"])
    launch = Launch([], ["python", "-f", CONNECTION_FILE], {"name": "x", "connection-file": "/c.json"})
    try:
        plan = envkernel.plan_engine(step, Plan(launch.command, {"PATH": "/usr/bin"}), host, launch)
    except UserError as error:
        said, transport = error.message, ""
    else:
        said, transport = "", plan.supervision.relay["transport"] if plan.supervision else "none"
    assert (said, transport) in (("The connection file /c.json can't be read.", ""), ("", reach))
    assert content != json.dumps(VALID).encode() or not said


# ---- what other programs print -----------------------------------------------------------------------------


PYTHON = st.sampled_from(
    [
        "os.environ['A'] = 'x'",
        'os.environ["A"] = "x\\\n y\\"z"',
        "os.environ['A'] = 'it\\'s'",
        "del os.environ['A']",
        f"import os; os.system('{CALL}')",
        f"os.environ['A'] = __import__('os').popen('{CALL}').read()",
        f'os.environ["A"] = "$({CALL})"',
        f'os.environ["A"] = "`{CALL}`"',
        "_mlstatus = True",
        "_mlstatus = False",
        "raise SystemExit",
        "os.environ['LD_PRELOAD'] = '/x'",
        "os.environ['",
        'os.environ["',
        "os.environ['A'] = '\\x41\\0'",
        f'exec("{CALL}")',
    ]
)


@fuzz(40)
@given(st.lists(PYTHON | TEXT, max_size=6), st.binary(max_size=20), st.sampled_from([0, 1]))
def test_any_answer_of_a_module_system(world: World, lines: list[str], rest: bytes, status: int) -> None:
    world.say(b"", "\n".join(lines).encode(errors="replace") + rest, status)
    for variable in ("LMOD_CMD", "MODULES_CMD"):
        environ = {variable: str(world.root / "bin" / "lmod")}
        code, out, said = world.call("lmod", "--dry-run", "--name=x", "gcc/12", "--", *TRUE, environ=environ)
        check_said(code, said)
        if code == 0:
            argv = json.JSONDecoder().raw_decode(out)[0]["argv"]
            line = [word.replace("{connection_file}", "/nowhere") for word in argv[argv.index("lmod") :]]
            world.call(*line, environ=environ)


TRUE = ("/bin/true", "{connection_file}")


@fuzz(40)
@given(
    st.sampled_from(["docker", "podman", "apptainer", "slurm"]),
    st.lists(
        st.sampled_from(
            [
                "  -v, --volume list   Bind mount a volume",
                "      --network network   Connect",
                "  -B, --bind strings   a user-bind path",
                "--",
                "-",
                "  -x",
                "      --" + "a" * 300,
                "  -N, --nodes=N  number of nodes",
                "\x1b[1m--bold\x1b[0m",
            ]
        )
        | TEXT,
        max_size=8,
    ),
    st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode())),
    st.sampled_from([0, 1, 125, 255]),
)
def test_any_answer_of_an_engine(
    world: World, mode: str, usage: list[str], answer: bytes, status: int
) -> None:
    world.say("\n".join(usage).encode(errors="replace"), answer, status)
    words = [] if mode == "slurm" else ["--bind=/:/x", "--network=none", "image"]
    code, _, said = world.call(mode, "--dry-run", "--name=x", *words, "--", *TRUE)
    check_said(code, said)
    world.say(b"", b"")
