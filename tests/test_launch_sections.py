"""The part of the file that a launch in an environment loads: it stands on its own."""

import ast
import builtins
import subprocess
import symtable
import sys

import envkernel

SOURCE = open(envkernel.__file__, encoding="utf-8").read()

NEEDS_THE_REST = {
    # after load_rest(), or only for plans of modes that are not light
    *("become_error_kernel", "check_targets", "find_mode", "legacy_launch", "salvage_launch"),
    *("RemoteKernel", "supervise", "setup_or_manage", "yarn_main"),
    # what setup and the other modes use of the facts
    *("first_missing", "prepare", "private_folder", "remove_empty", "remove_tree"),
    # annotations of mypy's
    *("Any", "Callable", "Mapping", "NoReturn", "Self", "Sequence"),
}


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


def test_the_launch_sections_refer_to_nothing_else():
    launch, rest = envkernel.split_sections(SOURCE)
    own = defined(launch)
    used = set(names(symtable.symtable(launch, "x", "exec")))
    in_setup = {name for name in used if name in defined(rest)}
    code = {
        node.name: node
        for node in ast.parse(launch).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    setup_only = {name for name in code if name.startswith(("setup_", "conda_prefix"))}
    for name in setup_only:
        in_setup -= {node.id for node in ast.walk(code[name]) if isinstance(node, ast.Name)}
    assert in_setup <= NEEDS_THE_REST, in_setup - NEEDS_THE_REST
    unknown = used - own - defined(rest) - set(dir(builtins)) - NEEDS_THE_REST - {"__file__", "__name__"}
    assert not unknown


def test_every_mode_is_of_one_kind():
    for mode in envkernel.MODES:
        assert (mode in envkernel.OTHER_MODES) == (mode not in ("conda", "virtualenv", "venv", "lmod")), mode


def test_lines_keep_their_numbers():
    for part in envkernel.split_sections(SOURCE):
        assert part.count("\n") == SOURCE.count("\n")


def boot(script, *words):
    argv = [sys.executable, "-I", "-S", "-c", envkernel.BOOT, str(script), *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


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
