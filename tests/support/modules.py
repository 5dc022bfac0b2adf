"""Real module systems, Lmod and Environment Modules, with a tree of modules that are not easy."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from support import bash_environ, done, made_once, missing

LMOD = Path("/usr/share/lmod/lmod")

# Modules for both systems, in the Tcl that both read.  {root}: directory of the tree.  {venv}: an
# environment with ipykernel.
TCL = {
    "core/gcc/12": """
        conflict gcc clang
        setenv CC gcc-12
        prepend-path PATH {root}/gcc-12/bin
        prepend-path MODULEPATH {root}/gcc-12
    """,
    "core/gcc/13": """
        conflict gcc clang
        setenv CC gcc-13
        prepend-path PATH {root}/gcc-13/bin
        prepend-path MODULEPATH {root}/gcc-13
    """,
    "core/clang/16": "conflict gcc\nsetenv CC clang-16",
    "gcc-12/mpi/4": "setenv MPI_HOME {root}/gcc-12/mpi-4\nprepend-path PATH {root}/gcc-12/mpi-4/bin",
    "gcc-13/mpi/4": "setenv MPI_HOME {root}/gcc-13/mpi-4\nprepend-path PATH {root}/gcc-13/mpi-4/bin",
    "core/paths/1": """
        prepend-path PATH /paths/first
        append-path PATH /paths/last
        prepend-path MANPATH "/paths/with space"
        append-path OTHERPATH /paths/other
        prepend-path --delim "," COMMAS one
        prepend-path --delim "," COMMAS two
        remove-path PATH /to/be/removed
    """,
    "core/push/1": "pushenv PUSHED one",
    "core/push2/1": "pushenv PUSHED two",
    "core/unset/1": "unsetenv GONE",
    "core/alias/1": "set-alias ll {ls -l}\nsetenv ALIASED yes",
    "core/noisy/1": 'puts stderr "noise on stderr"\nsetenv NOISY 1',
    "core/failing/1": 'setenv NEVER 1\nputs stderr "licence server is down"\nexit 1',
    "core/needs/1": "module load nosuch/1\nsetenv NEVER 1",
    "core/loads/1": "module load gcc/12\nsetenv LOADS yes",
    "core/py/1": "prepend-path PATH {venv}/bin\nsetenv PY_MODULE 1",
}

QUOTED = {
    "Q_SINGLE": "it's 'quoted'",
    "Q_DOUBLE": 'say "hi"',
    "Q_SHELL": "$HOME ${HOME} `id` $(id) ; id & # | > < * ? [a] {b,c} ~ !! %s %(x)s",
    "Q_BACK": "a\\b\\\\c",
    "Q_LAST_BACK": "ends in \\",
    "Q_NEWLINE": "one\ntwo\n",
    "Q_TAB": "a\tb",
    "Q_EMPTY": "",
    "Q_SPACES": "  a  b  ",
    "Q_UNICODE": "caf\u00e9 \u65e5",
    "Q_PYTHON": "x'; os.environ['EVIL'] = 'y'; z = \"",
    "Q_STATEMENT": "a\nos.environ['EVIL'] = 'y'\nb",
    "Q_BRACES": "}}{",
}
"""What the module quoted/1 sets, in both systems."""

BYTES = {
    "B_LATIN": "caf\udce9",
    "B_CR": "a\rb",
    "B_CRLF": "a\r\nb",
    "B_CONTROL": "\x01\x7f\x1b[0m",
    "B_FF": "\udcff",
}
"""What the module bytes/1 of Lmod sets beyond that."""


def in_lua(text: str) -> str:
    """Return `text` as a string of Lua, each byte by its number."""
    return '"' + "".join(f"\\{byte:03}" for byte in os.fsencode(text)) + '"'


def in_tcl(text: str) -> str:
    """Return `text` as a word of Tcl, each character by its number."""
    return '"' + "".join(f"\\u{ord(character):04x}" for character in text) + '"'


# What only Lmod has, in its Lua.
LUA = {
    "core/family/one": 'family("flavour")\nsetenv("FLAVOUR", "one")',
    "core/family2/two": 'family("flavour")\nsetenv("FLAVOUR", "two")',
    "core/warning/1": 'setenv("WARNED", "1")\nLmodWarning("this module is old")',
    "core/message/1": 'LmodMessage("welcome")\nio.stderr:write("to stderr\\n")\nsetenv("MESSAGE", "1")',
    "core/prints/1": "print(\"import os; os.environ['EVIL'] = 1\")\nsetenv('PRINTS', '1')",
    "core/error/1": 'setenv("NEVER", "1")\nLmodError("licence server is down")',
    "core/syntax/1": "setenv(",
    "core/sticky/1": 'add_property("lmod", "sticky")\nsetenv("STICKY", "1")',
    "core/dependent/1": 'depends_on("gcc/13")\nsetenv("DEPENDENT", "1")',
    "core/quoted/1": "\n".join(f'setenv("{name}", {in_lua(value)})' for name, value in QUOTED.items()),
    "core/bytes/1": "\n".join(f'setenv("{name}", {in_lua(value)})' for name, value in BYTES.items()),
    "core/function/1": 'set_shell_function("greet", "echo hi", "echo hi")\nsetenv("FUNCTION", "1")',
    "directory with space/spaced/1": 'setenv("SPACED", "1")',
    "core/execute/1": 'execute{cmd="export EXECUTED=1", modeA={"load"}}\nsetenv("AFTER", "1")',
    "core/executed/1": 'execute{cmd="export UNLOADED=yes", modeA={"unload"}}\nsetenv("AFTER", "1")',
    "core/sources/1": 'local here = pathJoin(myFileName():match("(.*)/"), "profile")\n'
    """execute{cmd=". '" .. here .. "'", modeA={"load"}}\nprepend_path("PATH", "/from/module")""",
}


class Modules:
    """A module system and its tree.

    name: ``lmod`` or ``modules``.  command: starts a command line.  environ: what a login shell adds.
    """

    def __init__(self, name: str, command: list[str], environ: dict[str, str], root: Path) -> None:
        self.name = name
        self.command = command
        self.environ = environ
        self.root = root

    def bash(self, environ: dict[str, str], *calls: list[str]) -> dict[str, str]:
        """Return the environment after ``module ...`` calls in a bash, as the shell function does."""
        start = " ".join(map(shlex.quote, [*self.command, "bash"]))
        script = "\n".join(f'eval "$({start} {" ".join(map(shlex.quote, call))})"' for call in calls)
        return bash_environ(script, environ)


def write_tree(root: Path, venv: Path, lua: bool) -> None:
    """Write the module tree below `root`."""
    for name, text in TCL.items():
        lines = [
            line.strip()
            for line in text.replace("{root}", str(root)).replace("{venv}", str(venv)).split("\n")
        ]
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["#%Module1.0", *lines, ""]))
    if not lua:
        lines = [f"setenv {name} {in_tcl(value)}" for name, value in QUOTED.items()]
        (root / "core" / "quoted").mkdir()
        (root / "core" / "quoted" / "1").write_text("\n".join(["#%Module1.0", *lines, ""]))
    for name, text in LUA.items() if lua else ():
        path = root / (name + ".lua")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    if lua:
        profile = 'export FROM_PROFILE="it\'s $AFTER" PATH=/profile:$PATH\nunset GONE\nNOT_EXPORTED=1\n'
        (root / "core" / "sources" / "profile").write_text(profile)


@pytest.fixture(scope="session")
def lmod(tmp_path_factory: pytest.TempPathFactory, kernel_venv: Path) -> Modules:
    """Debian's Lmod."""
    if not (LMOD / "libexec" / "lmod").exists():
        missing("Lmod (Debian: apt install lmod)")
    root = tmp_path_factory.mktemp("lmod") / "tree"
    write_tree(root, kernel_venv, lua=True)
    start = {"PATH": "/usr/bin:/bin", "HOME": str(root), "MODULEPATH": str(root / "core")}
    login = bash_environ(f". {LMOD}/init/bash", start)
    environ = {
        name: value for name, value in login.items() if name.startswith(("LMOD", "MODULE", "BASH_FUNC"))
    }
    return Modules("lmod", [str(LMOD / "libexec" / "lmod")], environ, root)


@pytest.fixture(scope="session")
def environment_modules(tmp_path_factory: pytest.TempPathFactory, kernel_venv: Path) -> Modules:
    """Debian's Environment Modules, unpacked because the package can't be installed beside Lmod."""
    tclsh = shutil.which("tclsh")
    if not tclsh:
        missing("tclsh (Debian: apt install tcl)")
    directory = made_once("environment-modules", fetch_package)
    [script] = directory.glob("usr/lib/*/modulecmd.tcl")
    root = tmp_path_factory.mktemp("modules") / "tree"
    write_tree(root, kernel_venv, lua=False)
    environ = {
        "MODULES_CMD": str(script),
        "MODULEPATH": str(root / "core"),
        "MODULESHOME": str(directory / "usr/share/modules"),
    }
    return Modules("modules", [tclsh, str(script)], environ, root)


def fetch_package(directory: Path) -> None:
    """Download the Debian package that `directory` is called after, and unpack it there."""
    package = directory.stem
    if not shutil.which("apt-get"):
        missing(f"apt-get, which fetches {package}")
    directory.mkdir()
    said = subprocess.run(
        ["apt-get", "download", "-q", package], cwd=directory, capture_output=True, text=True, check=False
    )
    if said.returncode:
        missing(f"the Debian package {package}: {said.stderr.strip()}")
    [archive] = directory.glob("*.deb")
    done("dpkg", "-x", archive, directory)
    archive.unlink()
