"""A newcomer's first session, typed into a real terminal (tmux)."""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid

import pytest

from support import SCRIPT, missing

pytestmark = pytest.mark.live


class Terminal:
    """A terminal of tmux's, with a server of its own."""

    def __init__(self, directory, environ):
        program = shutil.which("tmux")
        if not program:
            missing("tmux")
        self.start = [program, "-S", str(directory / "socket"), "-f", "/dev/null"]
        self.environ = {**environ, "TERM": "screen", "PS1": "$ "}
        shell = ["env", "-i", *(f"{name}={value}" for name, value in self.environ.items())]
        self.call("new-session", "-d", "-x", "150", "-y", "200", *shell, "bash", "--norc", "--noprofile")

    def call(self, *words):
        done = subprocess.run([*self.start, *words], capture_output=True, text=True, check=True)
        return done.stdout

    def screen(self):
        """Return what is on the screen, lines that were too wide joined again."""
        return self.call("capture-pane", "-p", "-J").rstrip()

    def type(self, line, patience=60):
        """Type a line, wait until it is done, return what it said and its exit status."""
        mark = uuid.uuid4().hex[:8]
        self.call("send-keys", "-l", f"{line}; echo {mark[:4]}''{mark[4:]} $?")
        self.call("send-keys", "Enter")
        deadline = time.monotonic() + patience
        while True:
            screen = self.screen()
            found = re.search(rf"^(.*){mark} (\d+)$", screen, re.S | re.M)
            if found:
                said = found[1].rpartition(f"echo {mark[:4]}''{mark[4:]} $?")[2]
                return said.strip(), int(found[2])
            assert time.monotonic() < deadline, f"{line!r} did not end:\n{screen}"
            time.sleep(0.1)

    def close(self):
        subprocess.run([*self.start, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def terminal(jupyter, tmp_path):
    """A shell in which ``envkernel`` is a command, as after ``pip install``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "envkernel").write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n')
    (programs / "envkernel").chmod(0o755)
    path = f"{programs}:{os.path.dirname(sys.executable)}:{jupyter.environ['PATH']}"
    window = Terminal(tmp_path, {**jupyter.environ, "PATH": path})
    yield window
    window.close()


def test_the_first_session(terminal, jupyter, kernel_venv, tmp_path):
    """Looks for help, mistypes, sets up, tests, breaks, asks why, removes."""
    said, status = terminal.type("envkernel")
    assert status == 2
    assert "usage: envkernel MODE [--name=NAME]" in said
    assert "virtualenv" in said

    said, status = terminal.type("envkernel virtualenv -h")
    assert status == 0
    assert "--display-name" in said

    said, status = terminal.type("envkernel virtulenv --name=first ~/nothing")
    assert status == 2
    assert "Did you mean virtualenv" in said

    said, status = terminal.type("envkernel virtualenv --user --name=first ~/nothing")
    assert status == 1
    assert f"There is no virtualenv at {jupyter.environ['HOME']}/nothing." in said
    assert not (jupyter.kernels / "first").exists()

    project = tmp_path / "project"
    shutil.copytree(kernel_venv, project, symlinks=True, copy_function=os.link)
    said, status = terminal.type(f"envkernel virtualenv --user --nam=first {project}")
    assert status == 2
    assert "Did you mean --name" in said

    said, status = terminal.type(f"envkernel virtualenv --user --name=first {project}")
    assert status == 0
    offered = re.search(r"^Test it: (envkernel check first)$", said, re.M)
    assert offered

    said, status = terminal.type(offered[1])
    assert status == 0, said
    assert re.search(r"^leftovers +[0-9.]+ s +ok$", said, re.M)

    said, status = terminal.type("envkernel list")
    assert re.search(rf"^first +virtualenv +{project} .* ok$", said, re.M)

    (tmp_path / "code.py").write_text("import sys; print('prefix', sys.prefix)")
    said, status = terminal.type(f"jupyter run --kernel=first {tmp_path}/code.py")
    assert (said.splitlines()[-1], status) == (f"prefix {project}", 0)

    shutil.move(project, tmp_path / "elsewhere")
    said, status = terminal.type(f"jupyter run --kernel=first {tmp_path}/code.py")
    assert status != 0
    assert f"There is no virtualenv at {project}." in said
    said, status = terminal.type("envkernel log first")
    assert f"not started: There is no virtualenv at {project}." in said
    said, status = terminal.type("envkernel check first")
    assert status == 1
    assert f"There is no virtualenv at {project}." in said

    said, status = terminal.type("envkernel remove first")
    assert status == 0
    said, status = terminal.type("envkernel list")
    assert said == "envkernel has made no kernel that Jupyter finds here."
