"""The parts of the file that a launch loads: they stand on their own."""

import builtins
import os
import subprocess
import symtable
import sys

import pytest

import envkernel

SOURCE = open(envkernel.__file__, encoding="utf-8").read()

NEEDS_MORE = {
    # after load_rest(), or for a command line that loads all
    *("become_error_kernel", "check_targets", "find_mode", "legacy_launch", "salvage_launch"),
    *("setup_or_manage", "yarn_main"),
    "first_missing",  # what setup alone uses of the facts
    "compile_part",  # where the whole file was loaded
}
NEEDS_CONTAINERS = {
    *("supervise", "watched", "prepare", "private_folder", "remove_empty", "remove_tree"),
    "RemoteKernel",
}
"""What plans of other modes, and setup, use."""

FOR_MYPY = {"Any", "Callable", "Mapping", "NoReturn", "Self", "Sequence"}


def names(table):
    """Yield the global names that code refers to, without annotations (symtable leaves those out)."""
    for symbol in table.get_symbols():
        if symbol.is_global() and symbol.is_referenced():
            yield symbol.get_name()
    for child in table.get_children():
        yield from names(child)


def defined(source):
    return {
        symbol.get_name()
        for symbol in symtable.symtable(source, "x", "exec").get_symbols()
        if symbol.is_assigned() or symbol.is_namespace() or symbol.is_imported()
    }


@pytest.mark.parametrize(
    ("loaded", "allowed"),
    [
        (("launch",), NEEDS_MORE | NEEDS_CONTAINERS),
        (("launch", "beside", "containers"), NEEDS_MORE | {"RemoteKernel"}),
        (("launch", "beside", "streams", "submit"), NEEDS_MORE),
        (("launch", "beside", "streams", "agent"), NEEDS_MORE | {"RemoteKernel"}),
    ],
)
def test_what_is_loaded_refers_to_nothing_else(loaded, allowed):
    parts = envkernel.split_sections(SOURCE)
    own = set().union(*(defined(parts[name]) for name in loaded))
    used = set()
    for name in loaded:
        table = symtable.symtable(parts[name], "x", "exec")
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
        for child in table.get_children():
            if not child.get_name().startswith(("setup_", "conda_prefix")):
                used |= set(names(child))
    unknown = used - own - set(dir(builtins)) - FOR_MYPY - {"__file__", "__name__"}
    assert unknown <= allowed, unknown - allowed


def test_every_mode_is_of_one_kind():
    for mode in envkernel.MODES:
        assert (mode in envkernel.OTHER_MODES) == (mode not in ("conda", "virtualenv", "venv", "lmod")), mode


def test_lines_keep_their_numbers():
    for part in envkernel.split_sections(SOURCE).values():
        assert part.count("\n") == SOURCE.count("\n")


def boot(script, *words):
    argv = [sys.executable, "-I", "-S", "-c", envkernel.BOOT, str(script), *words]
    environ = {**os.environ, "JUPYTER_DATA_DIR": str(script.parent)}
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)


def test_boot_uses_our_cache_pythons_cache_or_the_source(tmp_path):
    script = tmp_path / "other name"
    script.write_text(SOURCE)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    words = ["venv", "run", "--format=2", "--connection-file", "/k", str(venv), "--", "/bin/echo", "{x}"]
    cache = tmp_path / "__pycache__"

    def works():
        done = boot(script, *words)
        assert (done.returncode, done.stdout) == (0, "{x}\n"), done.stderr
        broken = boot(script, *words[:5], "/gone", *words[6:])
        assert broken.returncode == 1
        assert "There is no virtualenv at /gone." in broken.stderr

    envkernel.compile_script(str(script))
    (own,) = cache.glob("*.opt-launch.pyc")
    works()
    own.write_bytes(b"broken")
    works()
    for file in cache.iterdir():
        file.unlink()
    works()
    envkernel.compile_script(str(script))
    script.write_text(SOURCE + "\n# a newer one\n")
    works()
    script.write_text(SOURCE.replace('"--version"', '"--what"'))
    assert boot(script, "--what").stdout == envkernel.__version__ + "\n"
