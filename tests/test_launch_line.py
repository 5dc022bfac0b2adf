"""The command line in a kernelspec: how Python is brought to run this file, quickly and under any name."""

import os
import subprocess
import sys

import pytest

import envkernel

SOURCE = open(envkernel.__file__, encoding="utf-8").read()
VERSION = envkernel.__version__ + "\n"

LOADER_OF_2_0 = """\
import sys, marshal
from _frozen_importlib_external import SourceFileLoader, cache_from_source
path = sys.argv[1]
loader = SourceFileLoader('envkernel', path)
module = type(sys)('envkernel')
module.__file__ = path
sys.modules['envkernel'] = module
try:
    store = open(cache_from_source(path, optimization='launch'), 'rb', 0)
    stamp, parts = marshal.loads(store.read(int(store.read(8))))
    if stamp != sorted(loader.path_stats(path).items()):
        raise ValueError
    module.STORE = store, store.tell(), parts
    code = marshal.loads(store.read(parts['launch'][1]))
except Exception:
    try:
        code = loader.get_code('envkernel')
    except EOFError:
        code = compile(loader.get_data(path), path, 'exec', dont_inherit=True)
exec(code, module.__dict__)
sys.exit(module.main(sys.argv[2:]))
"""
"""What kernelspecs had in their argv before."""


@pytest.fixture(params=["ek", "my kernel's launcher.txt", "envkernel.py"])
def script(request, tmp_path):
    path = tmp_path / "some where" / request.param
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def call(script, *words, loader=envkernel.LOADER):
    argv = [sys.executable, "-I", "-S", "-c", loader, str(script), *words]
    return subprocess.run(argv, env={}, capture_output=True, text=True, check=False)


def write(script):
    return envkernel.write_bytecode(sys.executable, str(script), envkernel.Host())


def test_it_is_one_short_line():
    assert len(envkernel.LOADER) < 160
    assert "\n" not in envkernel.LOADER


@pytest.mark.parametrize("loader", [envkernel.LOADER, LOADER_OF_2_0], ids=["now", "2.0"])
def test_it_runs_the_file_with_and_without_bytecode(loader, script):
    cache = script.parent / "__pycache__"
    for _ in range(2):
        assert call(script, "--version", loader=loader).stdout == VERSION
    (file,) = cache.iterdir()
    for content in (file.read_bytes()[:10], b"\0\0\0\0" + file.read_bytes()[4:]):
        file.write_bytes(content)
        assert call(script, "--version", loader=loader).stdout == VERSION
    script.write_text(SOURCE.replace('__version__ = "', '__version__ = "9.'))
    assert call(script, "--version", loader=loader).stdout == "9." + VERSION


@pytest.mark.parametrize("loader", [envkernel.LOADER, LOADER_OF_2_0], ids=["now", "2.0"])
def test_it_becomes_the_kernel_or_says_why_not(loader, script, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    words = ["venv", "run", "--format=2", "--connection-file", "/k", str(venv), "--", "/bin/echo", "{x}"]
    done = call(script, *words, loader=loader)
    assert (done.returncode, done.stdout) == (0, "{x}\n"), done.stderr
    broken = call(script, *words[:5], "/gone", *words[6:], loader=loader)
    assert broken.returncode == 1
    assert "There is no virtualenv at /gone." in broken.stderr
    missing = call(script, "venv", "run", str(venv), "--", "nosuchprogram", loader=loader)
    assert missing.returncode == 127


def test_bytecode_is_written_once_and_for_all_who_may_read_the_file(script):
    script.chmod(0o644)
    old = os.umask(0o077)
    try:
        assert write(script) == ""
    finally:
        os.umask(old)
    (file,) = (script.parent / "__pycache__").iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
    assert file.parent.stat().st_mode & 0o777 == 0o755
    before = file.stat().st_mtime_ns
    assert write(script) == ""
    assert file.stat().st_mtime_ns == before


def test_bytecode_that_cannot_be_kept_is_reported(script):
    (script.parent / "__pycache__").write_text("in its place")
    assert "compiles it" in write(script)
