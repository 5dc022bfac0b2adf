"""Setup and the management commands as a user meets them: output, exit status, what is on disk."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from base64 import b64encode

import pytest

import envkernel

SCRIPT = os.path.abspath(envkernel.__file__)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A home and Jupyter directories of this test's own; with a virtualenv that has no ipykernel."""
    for name in ("HOME", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "home").mkdir()
    for name in ("JUPYTER_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_EXE", "LMOD_CMD", "MODULES_CMD"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path


@pytest.fixture
def call(world, capfd, monkeypatch):
    """Call envkernel; return exit status, stdout and stderr."""

    def call(*words):
        monkeypatch.chdir(world)
        capfd.readouterr()
        status = envkernel.main([str(word) for word in words])
        return (status, *capfd.readouterr())

    return call


def kernels(world):
    directory = world / "jupyter_data_dir" / "kernels"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


TEST_IT = f"Test it: {envkernel.called_as()} check"
TRUE = ("--", "/bin/true", "{connection_file}")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["virtualenv", "gone"], "There is no virtualenv at {world}/gone.", "python3 -m venv {world}/gone"),
        (
            ["virtualenv", "bare"],
            "There is no ipykernel_launcher in the virtualenv {world}/bare",
            "pip install ipy",
        ),
        (
            ["virtualenv", "bare", "--kernel=ir"],
            "There is no R in the virtualenv {world}/bare.",
            "Install R there, or give its absolute path",
        ),
        (["virtualenv", "bare", "--kernel=irr"], "There is no kernel named irr in", "Did you mean ir?"),
        (
            ["virtualenv", "bare", "--python=python2.1"],
            "There is no python2.1 in the virtualenv",
            "choose one of them with --python",
        ),
        (
            ["virtualenv", "bare", "--", "/gone/k", "{connection_file}"],
            "There is no program /gone/k.",
            "Install it",
        ),
        (
            ["virtualenv", "bare", "--kernel-template=none"],
            "no kernel named none to take as a template",
            "Known",
        ),
        (
            ["conda", "bare"],
            "There is no conda environment named bare.",
            "envkernel virtualenv {world}/bare.",
        ),
        (
            ["conda", "./bare"],
            "{world}/bare is a virtualenv, not a conda environment.",
            "Use the virtualenv {world}/bare: envkernel virtualenv {world}/bare.",
        ),
        (["conda", "./none"], "There is no conda environment at {world}/none.", "conda create --prefix"),
        (
            ["virtualenv", "bare/bin/activate"],
            "{world}/bare/bin/activate is not a virtualenv.",
            "envkernel virtualenv {world}/bare.",
        ),
        (
            ["virtualenv", "project"],
            "{world}/project is not a virtualenv.",
            "Use the virtualenv {world}/project/.venv: envkernel virtualenv {world}/project/.venv.",
        ),
        (
            ["conda", "environment.yml"],
            "There is no conda environment named environment.yml.",
            "conda env create --prefix DIR --file {world}/environment.yml",
        ),
        (
            ["virtualenv", "environment.yml"],
            "{world}/environment.yml describes an environment",
            "conda env create --prefix DIR --file {world}/environment.yml",
        ),
        (["virtualenv", "conda"], "{world}/conda is a conda environment", "envkernel conda {world}/conda."),
        (["virtualenv", "notes"], "{world}/notes is a file, not a virtualenv.", "Give the directory"),
        (
            ["virtualenv", "by-uv"],
            "There is no ipykernel_launcher",
            "Try: uv pip install --python {world}/by-uv/bin/python ipykernel.",
        ),
    ],
)
def test_what_is_missing_is_said_at_setup_and_nothing_is_installed(call, world, words, message, hint):
    (world / "project").mkdir()
    (world / "conda" / "conda-meta").mkdir(parents=True)
    for name in ("environment.yml", "notes"):
        (world / name).write_text("")
    for name in ("project/.venv", "by-uv"):
        shutil.copytree(world / "bare", world / name, symlinks=True)
    with open(world / "by-uv" / "pyvenv.cfg", "a") as file:
        file.write("uv = 0.9.1\n")
    status, out, err = call(words[0], "--name=x", "--user", *words[1:])
    assert status == 1
    assert out == ""
    assert message.format(world=world) in err
    assert hint.format(world=world) in err
    assert "Traceback" not in err
    assert not (world / "jupyter_data_dir").exists()


def test_a_name_that_exists_is_refused_without_replace(call, world):
    assert call("virtualenv", "--name=X", "--user", "bare", *TRUE)[0] == 0
    status, _, err = call("virtualenv", "--name=x", "--user", "bare", "--display-name=new", *TRUE)
    assert status == 1
    assert "There is a kernel named x already" in err
    assert "--replace" in err
    spec = world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json"
    assert json.loads(spec.read_text())["display_name"] == "X (virtualenv)"
    assert call("virtualenv", "--name=x", "--user", "--replace", "bare", "--display-name=new", *TRUE)[0] == 0
    assert json.loads(spec.read_text())["display_name"] == "new"
    assert kernels(world) == ["x"]


def test_dry_run_prints_the_kernelspec_and_writes_nothing(call, world):
    status, out, _ = call("virtualenv", "--name=x", "--user", "--dry-run", "bare", *TRUE)
    spec = json.loads(out)
    assert status == 0
    assert spec["argv"][:5] == [sys.executable, "-I", "-S", "-c", envkernel.LOADER]
    assert spec["argv"][5] == SCRIPT
    assert spec["argv"][-2:] == ["/bin/true", "{connection_file}"]
    assert str(world / "bare") in spec["argv"]
    assert not (world / "jupyter_data_dir").exists()


def test_where_jupyter_does_not_look_is_said(call, world):
    status, out, _ = call("virtualenv", "--name=x", f"--prefix={world}/p", "bare", *TRUE)
    assert status == 0
    assert f"JUPYTER_PATH={world}/p/share/jupyter" in out
    status, out, _ = call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    assert "JUPYTER_PATH" not in out


def test_a_place_that_cannot_be_written_is_an_error(call, world):
    (world / "file").write_text("")
    status, _, err = call("virtualenv", "--name=x", f"--prefix={world}/file", "bare", *TRUE)
    assert status == 1
    assert f"can't be written to {world}/file/share/jupyter/kernels/x" in err


def test_list_show_update_remove(call, world):
    call("virtualenv", "--name=x", "--user", "--env=A=1", "bare", *TRUE)
    status, out, _ = call("list", "--json")
    directory = str(world / "jupyter_data_dir" / "kernels" / "x")
    row = {
        "name": "x",
        "mode": "virtualenv",
        "target": str(world / "bare"),
        "directory": directory,
        "state": "ok",
    }
    assert (status, json.loads(out)) == (0, [row])
    assert call("list")[1].splitlines()[1].split() == list(row.values())
    shown = json.loads(call("show", "x", "--json")[1])
    assert shown["command"][:3] == ["envkernel", "virtualenv", "--name=x"]
    assert shown["argv"] == ["/bin/true", "{connection_file}"]
    assert shown["environment"]["A"] == "1"
    assert shown["environment"]["VIRTUAL_ENV"] == str(world / "bare")
    assert "+ A=1" in call("show", "x")[1]
    spec = world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json"
    before = spec.read_text()
    spec.write_text(before.replace('"python"', '"broken"'))
    assert call("update", "x")[0] == 0
    assert spec.read_text() == before
    assert call("remove", "x")[0] == 0
    assert kernels(world) == []
    assert call("list", "--json")[1].strip() == "[]"


def test_a_remove_that_fails_leaves_the_whole_kernel(call, world, monkeypatch):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    directory = world / "jupyter_data_dir" / "kernels"
    before = sorted(directory.rglob("*"))

    def fail(path):
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        status, _, err = call("remove", "x")
    assert (status, sorted(directory.rglob("*"))) == (1, before)
    assert f"{directory}/x can't be removed: Permission denied." in err
    assert call("remove", "x")[0] == 0
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("change", ["--format=9", "--foo"])
def test_update_mends_what_its_own_hint_sends_there(call, world, change):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    path = world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json"
    before = path.read_text()
    spec = json.loads(before)
    at = spec["argv"].index("--format=2")
    spec["argv"][at : at + 1] = [change] if "format" in change else ["--format=2", change]
    path.write_text(json.dumps(spec))
    assert "envkernel update x" in call("show", "x")[1]
    assert "envkernel update x" in call("check", "x")[2]
    status, _, err = call("update", "x")
    assert (status, path.read_text()) == (0, before), err


def test_update_needs_neither_the_logo_that_was_given(call, world):
    (world / "my.svg").write_text("<svg/>")
    call("virtualenv", "--name=x", "--user", "--logo=my.svg", "bare", *TRUE)
    (world / "my.svg").unlink()
    for _ in range(2):
        status, _, err = call("update", "x")
        assert status == 0, err
    directory = world / "jupyter_data_dir" / "kernels" / "x"
    assert (directory / "logo-svg.svg").read_text() == "<svg/>"


def test_remove_takes_the_logs_of_that_kernel_only(call, world):
    for name in ("x", "x.y"):
        call("virtualenv", f"--name={name}", "--user", "bare", *TRUE)
        envkernel.start_log(name, f"of {name}\n", os.environ)
    assert call("remove", "x")[0] == 0
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    assert "The kernel x has no launch log" in call("log", "x")[2]
    assert "of x.y" in call("log", "x.y")[1]


def test_list_runs_no_activation_script(call, world):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    with open(world / "bare" / "bin" / "activate", "a") as file:
        file.write(f"\ntouch {world}/ran; echo noise >&2\n")
    status, out, err = call("list", "--json")
    assert (status, err, json.loads(out)[0]["state"]) == (0, "", "ok")
    assert not (world / "ran").exists()
    assert call("show", "x")[0] == 0
    assert (world / "ran").exists()


def test_check_at_setup_finds_the_kernel_where_jupyter_does_not(call, world, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "")
    words = ["virtualenv", "--name=x", f"--prefix={world}/p", "--check", "bare"]
    status, out, err = call(*words, "--", "/bin/false", "{connection_file}")
    assert status == 1
    assert "There is no kernel named" not in err
    assert "start " in out


def test_list_says_what_is_broken(call, world):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    (world / "bare").rename(world / "moved")
    assert json.loads(call("list", "--json")[1])[0]["state"] == f"There is no virtualenv at {world}/bare."
    status, out, _ = call("show", "x")
    assert status == 0
    assert "There is no virtualenv" in out
    status, _, err = call("check", "x")
    assert status == 1
    assert f"There is no virtualenv at {world}/bare." in err


def test_a_kernelspec_of_envkernel_1_is_listed_and_updated(call, world):
    directory = world / "jupyter_data_dir" / "kernels" / "old"
    directory.mkdir(parents=True)
    argv = [
        "/usr/bin/envkernel",
        "virtualenv",
        "run",
        str(world / "bare"),
        "--",
        "/bin/true",
        "{connection_file}",
    ]
    own = {"env": {"A": "${HOME}/x"}, "metadata": {"course": 1}, "interrupt_mode": "message"}
    spec = {"argv": argv, "display_name": "Old one", "language": "R", **own}
    (directory / "kernel.json").write_text(json.dumps(spec))
    (directory / "logo-svg.svg").write_text("<svg/>")
    assert json.loads(call("list", "--json")[1])[0]["name"] == "old"
    assert call("update", "old")[:2] == (0, f"Updated the kernel old in {directory}\n{TEST_IT} old\n")
    assert "--user" in json.loads(call("show", "old", "--json")[1])["command"]
    new = json.loads((directory / "kernel.json").read_text())
    assert (new["display_name"], new["language"]) == ("Old one", "R")
    assert new["metadata"]["envkernel"]["mode"] == "virtualenv"
    assert new["argv"][-2:] == argv[-2:]
    assert (new["env"], new["interrupt_mode"], new["metadata"]["course"]) == (own["env"], "message", 1)
    logo = (directory / "logo-svg.svg").read_bytes()
    assert b64encode(b"<svg/>") in logo
    assert call("update", "old")[0] == 0
    assert json.loads((directory / "kernel.json").read_text())["env"] == own["env"]
    assert (directory / "logo-svg.svg").read_bytes() == logo


@pytest.mark.parametrize("command", ["show", "check", "update", "remove"])
def test_commands_name_what_is_not_there(call, world, command):
    call("virtualenv", "--name=demo", "--user", "bare", *TRUE)
    status, _, err = call(command, "dmeo")
    assert status == 1
    assert "There is no kernel named dmeo." in err
    assert "Did you mean demo?" in err
    foreign = world / "jupyter_data_dir" / "kernels" / "native"
    foreign.mkdir()
    (foreign / "kernel.json").write_text('{"argv": ["python3"], "display_name": "n", "language": "python"}')
    status, _, err = call(command, "native")
    assert status == 1
    assert "was not made by envkernel" in err
    assert foreign.exists()
    assert call(command)[0] == 2
    assert call(command, "demo", "more")[0] == 2
    assert call(command, "demo", "--what")[0] == 2


def test_self_contained_needs_neither_the_script_nor_its_place(call, world):
    call("virtualenv", "--name=x", f"--prefix={world}/p", "--self-contained", "bare", *TRUE)
    directory = world / "p" / "share" / "jupyter" / "kernels" / "x"
    argv = json.loads((directory / "kernel.json").read_text())["argv"]
    assert argv[5] == str(directory / "envkernel.py")
    assert (directory / "envkernel.py").read_text() == open(SCRIPT).read()
    done = subprocess.run([word.replace("{connection_file}", "/x") for word in argv], check=False)
    assert done.returncode == 0


def test_create_makes_a_virtualenv_with_ipykernel(call, world):
    status, _, err = call("virtualenv", "--name=x", "--user", "--create", "--dry-run", "new")
    assert status == 2
    assert "--dry-run writes nothing" in err
    status, _, err = call("virtualenv", "--name=x", "--user", "--create", "new")
    assert status == 0, err
    assert json.loads(call("show", "x", "--json")[1])["argv"][0] == str(world / "new" / "bin" / "python")


@pytest.mark.parametrize("extra", [["--python=python2.1"], ["--kernel=irr"]])
def test_a_create_that_fails_leaves_no_virtualenv(call, world, extra):
    status, _, err = call("virtualenv", "--name=x", "--user", "--create", *extra, "deep/new")
    assert status == 1
    assert "python2.1" in err or "irr" in err
    assert not (world / "deep").exists()
    assert kernels(world) == []


def test_create_does_not_touch_what_is_there(call, world):
    (world / "mine").mkdir()
    status, _, err = call("virtualenv", "--name=x", "--user", "--create", "mine")
    assert status == 1
    assert f"{world}/mine is there already and no virtualenv." in err
    assert (world / "mine").exists()


def test_create_installs_ipykernel_into_a_virtualenv_that_misses_it(call, world):
    subprocess.run([sys.executable, "-m", "venv", world / "half"], check=True)
    status, _, err = call(
        "virtualenv", "--name=x", "--user", "--create", f"--python={sys.executable}", "half"
    )
    assert status == 0, err
    assert json.loads(call("show", "x", "--json")[1])["argv"][0] == str(world / "half" / "bin" / "python")


ODD = {
    "null": {"argv": ["x"], "metadata": None},
    "list": {"argv": ["x"], "metadata": {"envkernel": []}},
    "text": {"argv": "x", "metadata": {}},
    "none": {},
}
BROKEN = {
    "target": ["virtualenv", "run", "--format=2", "--", "/bin/true"],
    "command": ["virtualenv", "run", "--format=2", "/x"],
    "token": ["virtualenv", "run", "--format=2", "%:%zz", "--", "/bin/true"],
    "short": ["virtualenv"],
    "future": ["virtualenv", "run", "--format=7", "/x", "--", "/bin/true"],
    "option": ["virtualenv", "run", "--format=2", "--what", "/x", "--", "/bin/true"],
}


def run_of(directory):
    return json.loads((directory / "kernel.json").read_text())["argv"][6:]


def test_no_odd_kernelspec_breaks_the_list(call, world):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    directory = world / "jupyter_data_dir" / "kernels"
    specs = dict(ODD)
    for name, tokens in BROKEN.items():
        argv = [sys.executable, "-I", "-S", "-c", envkernel.LOADER, SCRIPT, *tokens]
        specs[name] = {"argv": argv, "metadata": {"envkernel": {"mode": "?"}}}
    number = {"argv": [*argv[:6], *run_of(directory / "x")], "env": {"A": 4}}
    specs["number"] = {**number, "metadata": {"envkernel": {"mode": "virtualenv"}}}
    for name, spec in specs.items():
        (directory / name).mkdir()
        (directory / name / "kernel.json").write_text(json.dumps(spec))
    (directory / "deep").mkdir()
    (directory / "deep" / "kernel.json").write_text("[" * 100000)
    status, out, err = call("list", "--json")
    assert (status, err) == (0, "")
    states = {row["name"]: row["state"] for row in json.loads(out)}
    assert states.pop("x") == "ok"
    assert states.keys() == {*BROKEN, "number"}
    assert "ok" not in states.values()
    for name in states:
        assert call("show", name)[0] == 0
        status, _, err = call("check", name)
        assert status in (1, 2)
        assert "Traceback" not in err
        assert call("remove", name)[0] == 0
    assert call("list")[0] == 0


def test_an_update_elsewhere_changes_nothing(call, world, monkeypatch):
    (world / "start.sh").write_text("#!/bin/sh\n")
    (world / "start.sh").chmod(0o755)
    words = ["--name=MyEnv", "--user", "bare", "--", "./start.sh", "{connection_file}"]
    assert call("virtualenv", *words)[0] == 0
    path = world / "jupyter_data_dir" / "kernels" / "myenv" / "kernel.json"
    before = json.loads(path.read_text())
    assert before["display_name"] == "MyEnv (virtualenv)"
    monkeypatch.chdir("/")
    assert call("update", "myenv")[0] == 0
    after = json.loads(path.read_text())
    assert (after["argv"], after["display_name"]) == (before["argv"], before["display_name"])


def test_a_copied_kernelspec_is_updated_under_its_own_name(call, world):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    directory = world / "jupyter_data_dir" / "kernels"
    shutil.copytree(directory / "x", directory / "y")
    assert call("update", "y")[0] == 0
    assert "--name=y" in json.loads((directory / "y" / "kernel.json").read_text())["argv"]


def test_a_linked_kernelspec_is_unlinked(call, world):
    call("virtualenv", "--name=x", f"--prefix={world}/p", "bare", *TRUE)
    directory = world / "jupyter_data_dir" / "kernels"
    directory.mkdir(parents=True)
    (directory / "x").symlink_to(world / "p" / "share" / "jupyter" / "kernels" / "x")
    assert call("remove", "x")[0] == 0
    assert kernels(world) == []
    assert (world / "p" / "share" / "jupyter" / "kernels" / "x" / "kernel.json").exists()


def test_the_caches_of_a_self_contained_kernel_are_as_readable_as_the_kernel(call, world):
    old = os.umask(0o077)
    try:
        call("virtualenv", "--name=x", f"--prefix={world}/p", "--self-contained", "bare", *TRUE)
    finally:
        os.umask(old)
    cache = world / "p" / "share" / "jupyter" / "kernels" / "x" / "__pycache__"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in cache.iterdir()} == {0o644}


def test_what_a_terminal_cannot_show_is_escaped(call, world):
    name = os.fsdecode(b"h\xff\xc3\xa9")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", world / "bare2"], check=True)
    (world / "bare2").rename(world / name)
    call("virtualenv", "--name=x", "--user", "--env=Z=\udcff", str(world / name), *TRUE)
    for locale in ("C", "C.UTF-8"):
        environ = {**os.environ, "LC_ALL": locale, "PYTHONIOENCODING": "ascii:strict"}
        for words in (["list"], ["show", "x"], ["update", "x"]):
            done = subprocess.run(
                [sys.executable, SCRIPT, *words], env=environ, capture_output=True, check=False
            )
            assert done.returncode == 0
            assert b"Traceback" not in done.stderr
    assert json.loads(call("show", "x", "--json")[1])["environment"]["Z"] == "\udcff"


def test_a_setup_that_is_killed_while_it_replaces_leaves_the_old_kernel(call, world, monkeypatch):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    spec = world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json"
    before = spec.read_text()
    rename = os.rename

    def interrupted(source, target):
        if source.endswith("/new"):
            os.kill(os.getpid(), signal.SIGTERM)
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    status, _, err = call(
        "virtualenv", "--name=x", "--user", "--replace", "--display-name=new", "bare", *TRUE
    )
    assert (status, err) == (130, "")
    assert spec.read_text() == before
    assert sorted(path.name for path in (world / "jupyter_data_dir").iterdir()) == ["kernels"]


@pytest.fixture(autouse=True)
def signals():
    """envkernel.main takes over signals, as it is the program."""
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def test_a_template_brings_its_files_and_its_command(call, world):
    directory = world / "jupyter_data_dir" / "kernels" / "orig"
    directory.mkdir(parents=True)
    spec = {
        "argv": ["{resource_dir}/start.sh", "{connection_file}"],
        "display_name": "Original",
        "language": "x",
        "interrupt_mode": "message",
        "metadata": {"a": 1},
    }
    (directory / "kernel.json").write_text(json.dumps(spec))
    (directory / "start.sh").write_text('#!/bin/sh\necho "$VIRTUAL_ENV $1"\n')
    (directory / "start.sh").chmod(0o755)
    (directory / "logo-64x64.png").write_bytes(b"png")
    status, _, err = call("virtualenv", "--name=clone", "--user", "--kernel-template=orig", "bare")
    assert (status, err) == (0, "")
    clone = directory.parent / "clone"
    new = json.loads((clone / "kernel.json").read_text())
    assert (new["display_name"], new["language"], new["interrupt_mode"]) == ("Original", "x", "message")
    assert new["metadata"]["a"] == 1
    known = {"{connection_file}": "/run/k.json", "{resource_dir}": str(clone)}
    argv = [known.get(word, word) for word in new["argv"]]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"{world}/bare /run/k.json\n"


def write_spec(directory, spec):
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(json.dumps(spec))


def test_a_template_gives_its_variables_but_not_its_python(call, world):
    spec = {
        "argv": ["/other/bin/python3.9", "-c", "pass", "{connection_file}"],
        "env": {"A": "1", "B": "${HOME}/x"},
    }
    write_spec(world / "jupyter_data_dir" / "kernels" / "orig", spec)
    status, _, err = call(
        "virtualenv", "--name=clone", "--user", "--kernel-template=orig", "--env=A=2", "bare"
    )
    assert (status, err) == (0, "")
    new = json.loads((world / "jupyter_data_dir" / "kernels" / "clone" / "kernel.json").read_text())
    assert new["env"] == {"A": "2", "B": "${HOME}/x"}
    assert [word for word in new["argv"] if word.startswith("--env")] == ["--env=A", "--env=B"]
    assert json.loads(call("show", "clone", "--json")[1])["argv"][0] == str(world / "bare" / "bin" / "python")
    assert call("remove", "orig")[0] == 1
    shutil.rmtree(world / "jupyter_data_dir" / "kernels" / "orig")
    assert call("update", "clone")[0] == 0
    again = json.loads((world / "jupyter_data_dir" / "kernels" / "clone" / "kernel.json").read_text())
    assert (again["argv"], again["env"]) == (new["argv"], new["env"])


def test_a_kernelspec_with_another_loader_is_ours(call, world):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    path = world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json"
    spec = json.loads(path.read_text())
    spec["argv"][4] = spec["argv"][4].replace("import sys", "import  sys")
    path.write_text(json.dumps(spec))
    assert json.loads(call("list", "--json")[1])[0]["state"] == "ok"


def test_values_of_env_are_private_to_the_user(call, world):
    call("virtualenv", "--name=x", "--user", "--env=TOKEN=secret", "bare", *TRUE)
    spec = world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json"
    assert stat.S_IMODE(spec.stat().st_mode) == 0o600


def test_a_kernels_directory_on_another_file_system(call, world):
    elsewhere = tempfile.mkdtemp(dir="/dev/shm")
    try:
        (world / "jupyter_data_dir").mkdir()
        (world / "jupyter_data_dir" / "kernels").symlink_to(elsewhere)
        for _ in range(2):
            status, _, err = call("virtualenv", "--name=x", "--user", "--replace", "bare", *TRUE)
            assert (status, err) == (0, "")
        assert os.listdir(elsewhere) == ["x"]
    finally:
        shutil.rmtree(elsewhere)


def test_a_kernel_does_not_inherit_what_python_ignores(call, world):
    call(
        "virtualenv", "--name=x", "--user", "bare", "--", "/bin/cp", "/proc/self/status", "{connection_file}"
    )
    argv = json.loads((world / "jupyter_data_dir" / "kernels" / "x" / "kernel.json").read_text())["argv"]
    target = str(world / "status")
    subprocess.run([target if word == "{connection_file}" else word for word in argv], check=True)
    child = subprocess.run(
        ["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True, check=True
    )
    ignored = next(line for line in open(target) if line.startswith("SigIgn"))
    assert ignored == child.stdout, "a shell that starts the tests in the background has them ignore SIGINT"
    assert not int(ignored.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_a_reader_of_the_list_may_stop_reading(call, world):
    call("virtualenv", "--name=x", "--user", "bare", *TRUE)
    done = subprocess.run(
        f"{sys.executable} {SCRIPT} -h | true", shell=True, capture_output=True, check=False, text=True
    )
    assert done.stderr == ""


def test_a_current_directory_that_is_gone(call, world):
    directory = world / "gone"
    directory.mkdir()
    command = [sys.executable, SCRIPT, "virtualenv", "--name=x", "--user", "env"]
    done = subprocess.run(
        ["/bin/sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *command],
        cwd=directory,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"The current directory is gone" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_version(call):
    assert call("--version") == (0, envkernel.__version__ + "\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list"], "Send it somewhere else."),
        (["--help"], "Send it somewhere else."),
        (["virtualenv", "--name=x", "--user", "--dry-run", "bare", *TRUE], "Send it somewhere else."),
        (["virtualenv", "--name=x", "--user", "bare", *TRUE], "Send it somewhere else."),
    ],
)
def test_output_that_cannot_be_written_is_an_error(world, words, said):
    with open("/dev/full", "wb") as full:
        call = [sys.executable, SCRIPT, *words]
        done = subprocess.run(call, cwd=world, stdout=full, stderr=subprocess.PIPE, text=True)
    message = "envkernel: The output can't be written: No space left on device.\n"
    assert (done.returncode, done.stderr[: len(message)]) == (1, message)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr  # what Python says where it fails again at its end


def test_a_closed_output_takes_nothing(world):
    call = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, SCRIPT, "list"]
    done = subprocess.run(call, cwd=world, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_user_whom_the_system_does_not_know_is_told_to_set_home(call, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    status, _, err = call("list")
    assert status == 1
    assert "Your home directory is not known" in err
    assert "Set HOME" in err


def test_a_hint_can_be_pasted(call, world):
    os.rename(world / "bare", world / "my $(env)")
    status, _, err = call("virtualenv", "--name=x", "--user", "my $(env)")
    assert status == 1
    assert f"Try: '{world}/my $(env)/bin/python' -m pip install ipykernel." in err
    for mode, make in (("virtualenv", "python3 -m venv"), ("conda", "conda create --prefix")):
        assert f"{make} '{world}/no; such'" in call(mode, "--name=x", "--user", "./no; such")[2]
    status, out, _ = call("virtualenv", "--name=x", f"--prefix={world}/a b", "my $(env)", *TRUE)
    assert f"JUPYTER_PATH='{world}/a b/share/jupyter'," in out


def test_the_python_from_elsewhere_is_the_one_to_install_into(call, world):
    shutil.copytree(world / "bare", world / "other", symlinks=True)
    status, _, err = call("virtualenv", "--name=x", "--user", "--python=other/bin/python", "bare")
    assert status == 1
    assert f"Try: {world}/other/bin/python -m pip install ipykernel." in err


def test_a_virtualenv_that_cannot_be_made_for_another_reason_needs_no_package(call):
    status, _, err = call("virtualenv", "--name=x", "--user", "--create", "a:b")
    assert status == 1
    assert "could not be made" in err
    assert "python3-venv" not in err


def test_list_and_show_print_no_terminal_codes(call, world):
    target, name = world / "a\nb\x1b[31m", "two\nlines\x1b[31m"
    os.rename(world / "bare", target)
    assert call("virtualenv", "--name=x", "--user", f"--display-name={name}", target, *TRUE)[0] == 0
    status, out, _ = call("list")
    assert (status, len(out.splitlines())) == (0, 2)
    assert "/a\\nb\\x1b[31m" in out
    out = call("show", "x")[1]
    assert "\x1b" not in out
    assert "kernel       x (two\\nlines\\x1b[31m)\n" in out


def test_how_it_was_called_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert envkernel.called_as() == f"{sys.executable} {os.path.abspath(envkernel.__file__)}"
    program = tmp_path / "my bin" / "envkernel"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert envkernel.called_as() == "envkernel"


def test_a_run_without_arguments_leaves_no_log(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    assert envkernel.main(["virtualenv", "run"]) == 2
    assert "virtualenv needs PATH" in capfd.readouterr().err
    assert not (tmp_path / "data").exists()


# what `list` and `stop` know without a start


@pytest.fixture
def tools(world, monkeypatch):
    """Programs that stand in for engines and Slurm: each is a shell script; they note how they are called."""
    bin_dir = world / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", f"{bin_dir}:/usr/bin:/bin")

    def make(**scripts):
        for name in {"docker": "", "podman": "", "apptainer": "", "singularity": "", **scripts}:
            path = bin_dir / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> {world}/calls\n{scripts.get(name, "exit 1")}\n')
            path.chmod(0o755)
        return bin_dir

    make()
    return make


def add_kernel(world, name, *steps, command=("/bin/true", "{connection_file}")):
    """Write a kernelspec as setup would, without its checks; return its argv."""
    directory = world / "jupyter_data_dir" / "kernels" / name
    directory.mkdir(parents=True)
    tokens = envkernel.launch_to_argv(envkernel.Launch(steps, command, {"name": name}))
    argv = [*envkernel.launcher(sys.executable, SCRIPT), *tokens]
    spec = {"argv": argv, "display_name": name, "language": "python"}
    (directory / "kernel.json").write_text(json.dumps(spec))
    return argv


def docker_step(world, image, **options):
    return envkernel.Step(
        "docker", {"program": f"{world}/bin/docker", "identity": "root", **options}, [image]
    )


def slurm_step(world, partition):
    return envkernel.Step("slurm", {"srun": f"{world}/bin/srun"}, [], [f"--partition={partition}"])


def states(call):
    status, out, err = call("list", "--json")
    assert (status, err) == (0, "")
    return {row["name"]: row for row in json.loads(out)}


NO_IMAGE = 'case "$*" in *inspect\\ gone) echo "Error: No such image: gone" >&2; exit 1;; ps*) ;; esac'
NO_PARTITION = """case "$*" in *=gone*)
    echo "allocation failure: Invalid partition name specified" >&2; exit 1;; esac"""


def test_the_list_is_true_without_a_start(call, world, tools):
    tools(docker=NO_IMAGE, srun=NO_PARTITION)
    bare = envkernel.Step("virtualenv", {}, [str(world / "bare")])
    lost = envkernel.Step("virtualenv", {}, [str(world / "lost")])
    add_kernel(world, "here", docker_step(world, "here"))
    add_kernel(world, "gone", docker_step(world, "gone"))
    add_kernel(world, "job", slurm_step(world, "open"), bare)
    add_kernel(world, "lost", slurm_step(world, "open"), lost)
    add_kernel(world, "refused", slurm_step(world, "gone"), bare)
    rows = states(call)
    assert {name: row["state"] for name, row in rows.items()} == {
        "here": "ok",
        "gone": "There is no image gone here.",
        "job": "ok",
        "lost": f"There is no virtualenv at {world}/lost.",
        "refused": "Slurm refuses the job: Invalid partition name specified.",
    }
    assert rows["job"]["target"] == str(world / "bare")
    calls = (world / "calls").read_text().splitlines()
    asked = ("docker image inspect ", "docker ps ", "podman ps ", "apptainer instance list")
    asked += ("singularity instance list", "srun --test-only ")
    assert all(line.startswith(asked) for line in calls), "something was started"
    assert len([line for line in calls if line.startswith("docker ps")]) == 1
    shown = json.loads(call("show", "lost", "--json")[1])
    assert shown["state"].startswith(f"There is no virtualenv at {world}/lost. ")


def test_a_program_that_does_not_answer_stops_no_list(call, world, tools, monkeypatch):
    monkeypatch.setattr(envkernel.TimedHost, "PATIENCE", 0.3)
    tools(docker="exec sleep 20", podman="exec sleep 20")
    add_kernel(world, "x", docker_step(world, "image"))
    start = time.monotonic()
    assert states(call)["x"]["state"] == f"{world}/bin/docker does not answer."
    assert time.monotonic() - start < 10


def test_thirty_kernels_are_listed_at_once(call, world, tools):
    """Each image takes its time; the machine may be busy, so the limit is that of asking one by one."""
    tools(docker='case "$1" in image) sleep 0.5; esac')
    for number in range(30):
        add_kernel(world, f"k{number}", docker_step(world, f"image{number}"))
    start = time.monotonic()
    rows = states(call)
    assert time.monotonic() - start < 7.5
    assert (len(rows), {row["state"] for row in rows.values()}) == (30, {"ok"})


def test_a_cluster_kernel_is_shown_whole(call, world, tools):
    tools(srun="")
    bare = envkernel.Step("virtualenv", {}, [str(world / "bare")])
    add_kernel(world, "job", slurm_step(world, "open"), bare)
    shown = json.loads(call("show", "job", "--json")[1])
    assert shown["argv"][-2:] == ["-c", "..."]
    assert shown["argv"][0] == f"{world}/bin/srun"
    assert shown["node"]["argv"] == ["/bin/true", "{connection_file}"]
    assert shown["node"]["environment"]["VIRTUAL_ENV"] == str(world / "bare")
    out = call("show", "job")[1]
    assert f"executes     {world}/bin/srun --nodes=1" in out
    assert "on the node  /bin/true '{connection_file}'\n" in out
    assert f"environment  + VIRTUAL_ENV={world}/bare\n" in out
    assert "import" not in out


@pytest.fixture
def start(world):
    """Start a process that is a kernel by its launch log."""
    started = []

    def start(name, *log, obeys=True):
        ignore = "" if obeys else "import signal; signal.signal(15, signal.SIG_IGN); "
        code = f"{ignore}import time; print(flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code, "/run/k.json"], stdout=subprocess.PIPE)
        process.stdout.readline()
        started.append(process)
        path, _ = envkernel.start_log(name, f"process: {process.pid}\ncommand: /run/k.json\n", os.environ)
        for line in log:
            envkernel.append_log(path, line)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_stop_ends_the_process_and_its_job(call, world, tools, start):
    tools(srun="", scancel="")
    add_kernel(
        world, "job", slurm_step(world, "open"), envkernel.Step("virtualenv", {}, [str(world / "bare")])
    )
    assert call("stop", "job")[:2] == (0, "Nothing runs for the kernel job.\n")
    process = start("job", "job: 12")
    assert states(call)["job"]["state"] == "ok, running: job 12"
    assert json.loads(call("show", "job", "--json")[1])["running"] == ["job 12"]
    assert call("stop", "job")[:2] == (0, "Ended: job 12\n")
    assert process.wait(5) == -signal.SIGTERM
    assert "scancel --quiet 12" in (world / "calls").read_text().splitlines()
    assert states(call)["job"]["state"] == "ok"


def test_stop_ends_a_process_that_does_not_obey(call, world, start):
    add_kernel(world, "x", envkernel.Step("virtualenv", {}, [str(world / "bare")]))
    process = start("x", obeys=False)
    assert states(call)["x"]["state"] == f"ok, running: process {process.pid}"
    assert call("stop", "x")[:2] == (0, f"Ended: process {process.pid}\n")
    assert process.wait(5) == -signal.SIGKILL


LEFT = """case "$1" in
    ps) [ -e {0}/ended ] || printf '%s\\n' envkernel-old-cafe0123 envkernel-kept-shared-0123456789abcdef ;;
    rm) touch {0}/ended ;;
esac"""


def test_what_belongs_to_no_kernel_is_listed_and_can_be_stopped(call, world, tools):
    tools(docker=LEFT.format(world))
    add_kernel(world, "kept", docker_step(world, "image", shared=True))
    rows = states(call)
    assert rows["kept"]["state"] == "ok, running: envkernel-kept-shared-0123456789abcdef"
    assert (rows["old"]["mode"], rows["old"]["target"]) == ("leftover", "envkernel-old-cafe0123")
    assert rows["old"]["state"].endswith("end it: envkernel stop old")
    assert call("stop", "old")[:2] == (0, "Ended: envkernel-old-cafe0123\n")
    assert "docker rm -f -v envkernel-old-cafe0123" in (world / "calls").read_text().splitlines()
    assert states(call).keys() == {"kept"}
    status, _, err = call("stop", "old")
    assert status == 1
    assert "There is no kernel named old." in err


def test_a_container_that_another_jupyter_runs_is_no_leftover(call, world, tools):
    tools(docker='[ "$1" != ps ] || echo envkernel-old-cafe0123')
    code = "import os; print(flush=True); os.read(0, 1)  # envkernel"
    argv = [sys.executable, "-I", "-S", "-c", code, "x", "docker", "run", "--name=old", "image"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert states(call) == {}
        process.stdin.close()
    assert states(call).keys() == {"old"}


@pytest.mark.parametrize("name", ["kept", "else"])
def test_remove_ends_a_kept_container_that_no_kernel_is_in(call, world, tools, name):
    kept = "envkernel-kept-shared-0123456789abcdef"
    tools(docker=f'case "$1" in ps) [ -e {world}/ended ] || echo {kept} ;; rm) touch {world}/ended ;; esac')
    add_kernel(world, "kept", docker_step(world, "image", shared=True, keep=True))
    code = "import os; print(flush=True); os.read(0, 1)  # envkernel"
    argv = [sys.executable, "-I", "-S", "-c", code, "x", "docker", "run", f"--name={name}", "image"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        status, out, err = call("remove", "kept")
        process.stdin.close()
    assert (status, err) == (0, "")
    assert ("Still running, until their notebooks are shut down: " + kept in out) == (name == "kept")
    assert (world / "ended").exists() == (name != "kept")


def test_update_all_goes_on_after_one_that_fails(call, world):
    for name in ("a", "b", "c"):
        shutil.copytree(world / "bare", world / name, symlinks=True)
        assert call("virtualenv", f"--name={name}", "--user", name, *TRUE)[0] == 0
        path = world / "jupyter_data_dir" / "kernels" / name / "kernel.json"
        path.write_text(path.read_text().replace('"python"', '"broken"'))
    shutil.rmtree(world / "b")
    status, out, err = call("update", "--all")
    assert status == 1
    assert [line.split()[3] for line in out.splitlines() if line.startswith("Updated")] == ["a", "c"]
    assert f"There is no virtualenv at {world}/b." in err
    assert "Not updated: b." in err
    languages = [
        json.loads(path.read_text())["language"] for path in world.glob("jupyter_data_dir/kernels/*/k*")
    ]
    assert sorted(languages) == ["broken", "python", "python"]
    assert call("update")[0] == 2
    status, _, err = call("update", "--all", "a")
    assert status == 2
    assert "--all updates every kernel." in err


def test_jupyters_own_kernel_is_not_made_by_envkernel(call):
    status, _, err = call("show", "python3")
    assert status == 1
    assert "The kernel python3 was not made by envkernel." in err


def test_create_asks_uv_for_the_package_that_its_environment_misses(call, world, tools):
    tools(uv=f"cd {world}/bare/lib/python3*/site-packages; touch ipykernel_launcher.py")
    with open(world / "bare" / "pyvenv.cfg", "a") as file:
        file.write("uv = 0.9.1\n")
    status, _, err = call("virtualenv", "--name=x", "--user", "--create", "bare", *TRUE)
    assert status == 0, err
    asked = f"uv pip install --python {world}/bare/bin/python ipykernel"
    assert asked in (world / "calls").read_text().splitlines()


@pytest.mark.parametrize("jupyter", [True, False])
def test_envkernels_own_environment_is_no_place_for_kernels(call, world, monkeypatch, jupyter):
    monkeypatch.setattr(sys, "prefix", str(world / "own"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: jupyter and name == "nbclient")
    status, out, _ = call("virtualenv", "--name=x", "--sys-prefix", "bare", *TRUE)
    assert status == 0
    assert (f"There is no Jupyter in {world}/own, and no other looks there: use --user." in out) != jupyter
