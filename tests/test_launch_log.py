"""The launch log: what it says, and that only the last ten stay."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import time

import pytest

import envkernel
from support.host import FakeHost

TOKENS = ["conda", "run", "--name=x", "/opt/my env", "--", "python", "-f", "/run/k.json"]
HEAD = (
    "started: 2033-05-18 03:33:20 +0000\n"
    "process: 77\n"
    "command: envkernel conda run --name=x '/opt/my env' -- python -f /run/k.json\n"
)


class Files(envkernel.Host):
    def __init__(self, files):
        self.files = files

    def read(self, path):
        return self.files.get(path)


def test_the_log_tells_the_command_and_the_difference():
    plan = envkernel.Plan(["/x/python", "-f", "{connection_file}"], {"PATH": "/x", "SAME": "1", "A_KEY": "s"})
    before = {"PATH": "/bin", "SAME": "1", "GONE": "secret"}
    assert envkernel.log_text(TOKENS, plan, before, 2e9, 77) == HEAD + (
        "runs: /x/python -f '{connection_file}'\nenvironment:\n  + A_KEY=***\n  + PATH=/x\n  - GONE\n"
    )


def test_without_a_plan_there_is_only_the_command():
    assert envkernel.log_text(TOKENS, None, {}, 2e9, 77) == HEAD


@pytest.mark.parametrize(
    ("assignment", "shown"),
    [
        ("OMP_NUM_THREADS=4", "OMP_NUM_THREADS=4"),
        ("AWS_SECRET_ACCESS_ID=x", "AWS_SECRET_ACCESS_ID=***"),
        ("jupyterhub_api_token=x", "jupyterhub_api_token=***"),
        ("DB=postgres://me:pw@host/db", "DB=***"),
        ("PAGE=https://host/", "PAGE=https://host/"),
        ("--pass=PASSWORD=x", "--pass=PASSWORD=***"),
        ("--pass=--env=A_TOKEN=x", "--pass=--env=A_TOKEN=***"),
        ("--pass=--bind=/a:/b", "--pass=--bind=/a:/b"),
        ("KEY", "KEY"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(assignment, shown):
    assert envkernel.masked(assignment) == shown


@pytest.mark.parametrize("word", ["", "it's", "a b", "$(x)", "`x`", "plain/path-1.0", "new\nline", "*"])
def test_words_are_quoted_for_a_shell(word):
    import shlex

    assert shlex.split(envkernel.quoted(word)) == [word]


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"JUPYTER_DATA_DIR": "/d", "XDG_DATA_HOME": "/x"}, "/d"),
        ({"XDG_DATA_HOME": "/x"}, "/x/jupyter"),
        ({}, os.path.expanduser("~/.local/share/jupyter")),
    ],
)
def test_the_data_directory_is_jupyters(environ, directory, monkeypatch):
    from jupyter_core.paths import jupyter_data_dir

    assert envkernel.data_dir(environ) == directory
    for name in ("JUPYTER_DATA_DIR", "XDG_DATA_HOME", "JUPYTER_PLATFORM_DIRS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert jupyter_data_dir() == directory


def test_the_last_ten_of_each_kernel_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    environ = {"JUPYTER_DATA_DIR": str(tmp_path / "data")}
    other, _ = envkernel.start_log("x-2", "other", environ, "kernel-1.json")
    started = [
        envkernel.start_log("x", f"launch {number}\n", environ, f"kernel-{number % 3}.json")
        for number in range(13)
    ]
    paths = [path for path, _ in started]
    assert [earlier for _, earlier in started] == ["", "", "", *paths[:10]]
    assert [os.path.exists(path) for path in paths] == [False] * 3 + [True] * 10
    assert os.path.exists(other)
    assert stat.S_IMODE(os.stat(paths[-1]).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(other)).st_mode) == 0o700
    envkernel.append_log(paths[-1], "ended: exit status 0")
    logs = envkernel.launch_logs("x", envkernel.Host())
    assert logs[0][:2] == (paths[-1], "launch 12\nended: exit status 0\n")
    assert [path for path, _, _ in logs] == paths[:2:-1]


def test_a_kernel_name_leads_to_no_other_directory(tmp_path):
    environ = {"JUPYTER_DATA_DIR": str(tmp_path / "data")}
    for name in ("..", "../../x", "/etc/passwd", "x" * 300, ""):
        path, _ = envkernel.start_log(name, "text", environ)
        assert os.path.dirname(path) == str(tmp_path / "data" / "envkernel")


def test_a_log_that_cant_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert envkernel.start_log("x", "text", {"JUPYTER_DATA_DIR": str(tmp_path / "file")}) == ("", "")
    envkernel.append_log("", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_kernels_that_start_at_once_all_have_a_log(tmp_path, monkeypatch):
    environ = {"JUPYTER_DATA_DIR": str(tmp_path / "data")}
    # what another start has removed by now
    monkeypatch.setattr(os, "listdir", lambda directory: [f"x@{number}-a.log" for number in range(12)])
    path, _ = envkernel.start_log("x", "text", environ)
    assert pathlib.Path(path).read_text() == "text"


def test_any_text_is_logged_in_a_locale_that_cannot_write_it(tmp_path):
    code = (
        "import sys, envkernel; assert sys.getfilesystemencoding() != 'utf-8'; data = sys.argv[1]\n"
        "path, _ = envkernel.start_log('x', chr(8364), {'JUPYTER_DATA_DIR': data})\n"
        "envkernel.append_log(path, chr(228) + chr(0xdcff))"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(argv, env=environ, cwd=os.path.dirname(envkernel.__file__), check=True)
    (log,) = (tmp_path / "envkernel").iterdir()
    assert log.read_bytes() == "\N{EURO SIGN}\N{LATIN SMALL LETTER A WITH DIAERESIS}".encode() + b"\xff\n"


LOST = envkernel.UserError("The Slurm job 12 was cancelled.", "Start the kernel again.", detail="srun: x key")


def test_the_last_abnormal_end_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    paths = []
    for end in (None, LOST, None, None):
        paths.append(envkernel.start_log("x", HEAD, os.environ)[0])
        envkernel.log_end(paths[-1], 0 if end is None else -9, end, b"began\n", "key")

    def said(**options):
        assert envkernel.log_command({"NAME": "x", **options}, envkernel.Host()) == 0
        return capsys.readouterr().out

    first, second = said().split("\n\n")
    assert first.startswith(f"The last abnormal end: {paths[1]}\nstarted: ")
    reason = "reason: The Slurm job 12 was cancelled. Start the kernel again.\n  srun: x ***"
    assert first.endswith("stderr:\n  began\nended: signal 9\n" + reason)
    assert second.startswith(f"{paths[3]}\nstarted: ")
    assert [part.split("\n")[0] for part in said(all=True).split("\n\n")] == [
        paths[3],
        paths[2],
        f"The last abnormal end: {paths[1]}",
        paths[0],
    ]
    envkernel.append_log(paths[3], "not started: no image")
    assert said().startswith(f"{paths[3]}\n")
    assert paths[1] not in said()


def test_the_state_of_the_process(monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", "/data")

    def state(text, command=b""):
        log = "/data/envkernel/x@1-k.log"
        host = FakeHost(files={log: text.encode(), "/proc/77/cmdline": command})
        ((path, same, lines),) = envkernel.launch_logs("x", host)
        assert (path, same) == (log, text)
        return lines.get("running", "")

    running = b"/x/python\0-f\0/run/k.json\0"
    assert state(HEAD, running) == "yes"
    assert state(HEAD, running.replace(b"k.json", b"other.json")).startswith("no")
    assert state(HEAD).startswith("no")
    assert state(HEAD + "ended: exit status 1\n", running) == ""
    assert state(HEAD + "not started: no image\n", running) == ""


@pytest.mark.parametrize(
    ("status", "words"), [(0, "exit status 0"), (137, "exit status 137"), (-9, "signal 9")]
)
def test_the_end_tells_status_and_stderr_without_the_key(tmp_path, status, words):
    log = tmp_path / "log"
    log.write_text(HEAD)
    envkernel.log_end(str(log), status, None, b"\x1b[31mred\x1b[0m abc\xff\nkey: 12-34", "12-34")
    assert log.read_text() == HEAD + f"stderr:\n  red abc\ufffd\n  key: ***\nended: {words}\n"


ANSWERED = b"  sl local rem st\n 0: 0100007F:C351 0100007F:9999 06 00000000:00000000\n"
"""Of /proc/net/tcp: somebody has been connected to port 50001."""


@pytest.mark.parametrize(
    ("more", "tcp", "transport", "age", "beside"),
    [
        ("", b"", "tcp", 5, True),
        ("", ANSWERED, "tcp", 5, False),
        ("", b"", "tcp", 500, False),
        ("", b"", "ipc", 5, False),
        ("not started: no image\n", b"", "tcp", 5, False),
        ("stderr:\nended: exit status 1\nnot started: x\n", ANSWERED, "tcp", 500, True),
        ("stderr:\nended: exit status 0\n", b"", "tcp", 5, False),
    ],
    ids=["silent", "answered", "long ago", "ipc", "broken", "still broken", "mended"],
)
def test_who_stands_beside_a_kernel_that_is_started_again(more, tcp, transport, age, beside):
    ports = {name + "_port": 50001 for name in envkernel.STREAMS}
    connection = {**ports, "ip": "127.0.0.1", "transport": transport}
    earlier = f"/d/envkernel/x@{time.time_ns() - age * 10**9}-1.log"
    files = {earlier: (HEAD + more).encode(), "/k": json.dumps(connection).encode(), "/proc/net/tcp": tcp}
    launch = envkernel.Launch([], [], {"connection-file": "/k", "earlier": earlier})
    plan = envkernel.Plan(["/x/python"], {"TMPDIR": "/tmp"})
    again = envkernel.watched(plan, launch, Files(files))
    assert (again.supervision is not None) == beside
    launch.options["connection-file"] = envkernel.CONNECTION_FILE  # nothing is launched: the command by hand
    assert envkernel.watched(plan, launch, Files(files)) == plan
    assert again.replace(supervision=None) == plan
    assert not beside or again.supervision.connection == connection


def test_what_env_gives_is_in_the_log_though_jupyter_has_set_it():
    plan = envkernel.Plan(["/k"], {"PATH": "/x", "N": "4"}, given={"N": "4", "A_KEY": "s"})
    text = envkernel.log_text(TOKENS, plan, {"PATH": "/x", "N": "4", "A_KEY": "s"}, 2e9, 77)
    assert text.endswith("environment:\n  + A_KEY=***\n  + N=4\n")
