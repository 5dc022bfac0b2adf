#!/usr/bin/env python3
"""Make a Jupyter kernel run somewhere else: in a conda environment or virtualenv, under Lmod modules, in a
Docker, Podman, Singularity or Apptainer container, on a Slurm or YARN node.

Two phases.  *Setup* (``envkernel conda --name=x /path/to/env``) writes a kernelspec that re-invokes
this file.  *Run* (``... conda run ... -- python -m ipykernel_launcher -f FILE``, called by Jupyter)
builds the environment and executes the kernel.

The file reads top to bottom.  Planning is apart from effect: a mode is a function from options, `Host`
(the only access to the world) and environment to a `Plan`; only the last sections touch the world.

Imports are few on purpose.  Jupyter starts this file before each kernel, and every module costs:
``re`` 4 ms, ``json`` 5 ms, ``argparse`` 6 ms, ``subprocess`` 7 ms beside an interpreter that needs 5.
What only setup needs is imported where it is used.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import asyncio
    import socket
    from typing import Any, Awaitable, Callable, Coroutine, Iterator, Mapping, NoReturn, Sequence, Union

    from typing_extensions import Self, dataclass_transform

    Environ = Mapping[str, str]
else:

    def dataclass_transform() -> Any:  # for type checkers (PEP 681)
        return lambda cls: cls

# ---- constants ----------------------------------------------------------------------------------

__version__ = "2.1.0"

FORMAT = "2"
"""Version of the form in which a launch is written into a kernelspec."""

CONNECTION_FILE, RESOURCE_DIR = "{connection_file}", "{resource_dir}"
"""Jupyter's placeholders in a kernel command: its connection file, and the kernelspec's directory."""

LOADER = (
    "import sys,importlib.machinery as i;m=type(sys)('envkernel');m.__file__=f=sys.argv.pop(1);"
    "i.SourceFileLoader(m.__name__,f).exec_module(m);sys.exit(m.command())"
)
"""What the kernelspec gives to ``python -c``: import the file that the next argument names, whatever its
name, and run its `command`.  Python keeps the bytecode of what it imports, but of no script."""

STREAMS = ("shell", "iopub", "stdin", "control", "hb")
"""The five sockets of a kernel, in the order of their numbers."""


# ---- errors -------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can fix.

    message: one sentence that names the thing.  hint: what to do.  detail: further lines, such as what a
    program said.  status: exit status (1 fix it, 2 usage, 127 program not found).
    """

    def __init__(self, message: str, hint: str = "", status: int = 1, detail: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.status, self.detail = message, hint, status, detail

    def name_kernel(self, name: str) -> None:
        """Put the kernel's name into a hint that was given where it is not known."""
        self.hint = self.hint.replace("envkernel update NAME", "envkernel update " + name)


KNOWN_ERRORS: dict[str, tuple[tuple[tuple[str, ...], str, str], ...]] = {
    "engine": (
        (
            ("Cannot connect to the Docker daemon", "error during connect"),
            "The Docker daemon does not answer.",
            "Start it (systemctl start docker), or correct DOCKER_HOST.",
        ),
        (
            ("permission denied while trying to connect",),
            "You may not talk to the Docker daemon.",
            "Have an administrator add you to the group docker, or use podman.",
        ),
        (
            ("No such image", "image not known"),
            "There is no image {image} here.",
            "Fetch it: {engine} pull {image}",
        ),
        (
            ("error waiting for container", "unexpected EOF"),
            "The container engine went away, and the kernel with it.",
            "Restart the kernel when it is back.",
        ),
        (
            ("unresolvable CDI devices", "could not select device driver"),
            "{engine} can't give the container the GPUs of this machine.",
            "Install the NVIDIA Container Toolkit (for podman also: nvidia-ctk cdi generate), or drop --gpu.",
        ),
        (
            ("gathering device information", "stat /dev/"),
            "{engine} can't give the container a device: it does not exist on this machine.",
            "Correct --device, or leave it out.",
        ),
    ),
    "apptainer": (
        (
            ("executable file not found",),
            "The image {image} has no such program.",
            "Install it in %post of the image's definition file, for example: pip install ipykernel",
        ),
        (("mount source",), "A directory to bind does not exist.", "Create it, or leave it out."),
        (
            ("failed to set working directory",),
            "The directory to work in is not in the container.",
            "Bind it (--bind, --pwd), or name another one with --workdir.",
        ),
        (("image format not recognized",), "{image} is no image.", "Make it again: envkernel update NAME."),
        (
            ("equesting capability set",),
            "The engine may not take the rights that it starts containers with here.",
            "Let it use a user namespace: --userns.",
        ),
        (
            ("namespace",),
            "The engine may not create the namespaces of a container.",
            "Have an administrator allow user namespaces, or install the engine with setuid.",
        ),
    ),
    "srun": (
        (
            ("DUE TO TIME LIMIT", "job: TIMEOUT", "job: DEADLINE"),
            "The {job} has reached its time limit.",
            "Ask for more: --time=HOURS:00:00.",
        ),
        (
            ("DUE TO NODE FAILURE", "Node failure", "job: NODE_FAIL", "job: BOOT_FAIL"),
            "The node of {job} has failed.",
            "Start the kernel again: it gets another node.",
        ),
        (("DUE TO PREEMPTION", "job: PREEMPTED"), "The {job} was preempted.", "Start the kernel again."),
        (
            ("oom", "emory lim", "OUT_OF_MEMORY"),
            "The {job} has used more memory than it asked for.",
            "Ask for more: --mem=8G.",
        ),
        (
            ("has been revoked", "was cancelled", "Job cancelled", "CANCELLED AT", "job: CANCELLED"),
            "The {job} was cancelled.",
            "Start the kernel again.",
        ),
        (("execve()",), "The node of {job} has no such Python.", "Name one that it has: --node-python=PATH."),
        (
            ("Unable to contact slurm controller", "configuration source"),
            "Slurm does not answer.",
            "Ask whether it is down; `sinfo` has to work where Jupyter runs.",
        ),
        (
            ("Unable to allocate resources: ", "allocation failure: "),
            "Slurm refuses the job: {reason}.",
            "Change the options for srun: `sinfo -s` lists the partitions, `sinfo -Nl` what nodes have.",
        ),
    ),
}
"""What programs say when they fail: patterns (one is enough), message and hint; the first row counts."""


def explain(program: str, said: str, **names: str) -> UserError | None:
    """Return the error for what a program of `KNOWN_ERRORS` said.  names: what message and hint mention."""
    for patterns, message, hint in KNOWN_ERRORS.get(program, ()):
        if any(pattern in said for pattern in patterns):
            return UserError(message.format(**names), hint.format(**names), 1, said.strip())
    return None


def no_environment(what: str, path: str, host: Host, hint: str) -> UserError:
    """Return the error for a path that is no "conda environment" or "virtualenv", with where there is one."""
    closed = path + ("/bin/activate" if what == "virtualenv" else "/conda-meta")
    while not host.exists(closed) and closed not in ("", "/"):
        closed = os.path.dirname(closed)
    if closed and not host.is_readable(closed):
        message = f"You may not read {closed}, so the {what} {path} can't be used."
        return UserError(message, f"Ask its owner for the right to (ls -ld {closed}), or take another one.")
    inner = [f"{path}/{name}" for name in (".venv", "venv", "env")]
    for directory in (path, path.rpartition("/bin/")[0], *inner):
        is_conda = host.isdir(directory + "/conda-meta")
        if directory and (is_conda or host.exists(directory + "/bin/activate")):
            mode, found = ("conda", "conda environment") if is_conda else ("virtualenv", "virtualenv")
            kind = f"a {found}, not" if directory == path else "not"
            message = f"{path} is {kind} a {what}."
            return UserError(message, f"Use the {found} {directory}: envkernel {mode} {quoted(directory)}.")
    if path.endswith((".yml", ".yaml")):
        hint = f"Create it first (conda env create --prefix DIR --file {quoted(path)}), then give DIR."
        return UserError(f"{path} describes an environment, it is none.", hint)
    if host.exists(path) and not host.isdir(path):
        return UserError(f"{path} is a file, not a {what}.", "Give the directory of the environment.")
    return UserError(f"There is no {what} at {path}.", hint)


def usage_error(message: str, hint: str = "") -> UserError:
    """Return the error for a command line that can't be understood (exit status 2)."""
    return UserError(message, hint, status=2)


# ---- records ------------------------------------------------------------------------------------


@dataclass_transform()
class Record:
    """Plain data, compared by value: its annotated names are the fields.  (``dataclasses`` takes 10 ms.)"""

    def __init__(self, *values: Any, **named: Any) -> None:
        fields = type(self).__annotations__
        named.update(zip(fields, values))
        if len(values) > len(fields) or not named.keys() <= fields.keys():
            raise TypeError(f"{type(self).__name__} has only the fields {', '.join(fields)}.")
        for name, annotation in fields.items():
            value = named[name] if name in named else getattr(type(self), name)
            if annotation.startswith(("list[", "dict[")) and not annotation.endswith("None"):
                value = list(value or ()) if annotation.startswith("list[") else dict(value or {})
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        fields = ", ".join("{}={!r}".format(*item) for item in vars(self).items())
        return f"{type(self).__name__}({fields})"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy


class Option(Record):
    """One option of envkernel's own: the definition that setup, run, help and completion share."""

    spelling: str  # "--bind -B", the long flag first
    help: str
    metavar: str = ""  # empty where it takes no value
    many: bool = False  # may be repeated
    run: bool = False  # is written into the kernelspec
    setup: bool = True  # may be typed
    choices: Sequence[str] = ()
    group: str = ""  # its title in the help

    @property
    def flags(self) -> list[str]:
        return self.spelling.split()

    @property
    def name(self) -> str:
        return self.flags[0][2:]


class Step(Record):
    """One mode of a chain."""

    mode: str
    options: dict[str, Any] = {}  # by name: True for a flag, a list where one may be repeated
    targets: list[str] = []
    engine: list[str] = []  # what goes to the engine (docker run, apptainer exec, srun) unchanged


class Launch(Record):
    """What a kernelspec says: the chain of modes, then the kernel command with Jupyter's placeholders."""

    steps: list[Step]
    command: list[str]
    options: dict[str, Any] = {}  # the kernel's: name, connection-file, env, ...
    legacy: bool = False  # of 1.x


class Plan(Record):
    """What a launch will do: nothing has been done yet."""

    argv: list[str]  # takes this process's place, or runs below it where there is a supervision or a job
    environ: dict[str, str]
    search: list[str] | None = None  # where a bare program name has to be found; None: not on this host
    where: str = "this machine"  # the name of that in messages
    install: str = "install %s"  # how to do so there
    supervision: Supervision | None = None
    given: dict[str, str] = {}  # the variables of --env
    run_once: list[str] = []  # how a command is run once in a container; empty for none
    job: Job | None = None  # on a cluster


class Output(Record):
    """What a program said; status: its exit status, negative for a signal."""

    status: int
    out: bytes = b""
    err: bytes = b""


class Mode(Record):
    """A row of the registry."""

    name: str
    summary: str
    options: list[Option]
    setup: Callable[..., Step]  # (step, host, environ, common options): checks and normalises
    plan: Callable[..., Plan]  # (step, plan, host, rest): one fold of the launch; rest: after this step
    aliases: Sequence[str] = ()
    target: str = ""  # metavar of what follows the options; empty for none
    targets: tuple[int, int] = (1, 1)  # least and most of them
    minus: bool = False  # a target may begin with a minus
    remote: bool = False  # it takes the rest of the chain along: the fold ends here
    container: bool = False
    engine: Callable[..., list[list[str]]] | None = None  # (name, tokens, environ, host): its programs
    example: str = ""


MODES: dict[str, Mode] = {}
"""The registry: each mode by its name and its aliases."""


def register(*modes: Mode) -> None:  # each family of modes does so at the end of its section
    for mode in modes:
        MODES.update(dict.fromkeys((mode.name, *mode.aliases), mode))


# ---- kernelspec tokens --------------------------------------------------------------------------

_ESCAPE = "%:"
_PLACEHOLDERS = ((CONNECTION_FILE, "connection-file"), (RESOURCE_DIR, "resource-dir"))
"""Jupyter's placeholders, each with the option that gives what Jupyter has put in its place."""


def encode_token(text: str, force: bool = False, unsafe: str = "{") -> str:
    """Return `text` as it is, or percent-encoded after ``%:`` where Jupyter or we would take it for more."""
    raw = os.fsencode(text)
    plain = not force and not text.startswith(_ESCAPE) and not any(c in text for c in unsafe)
    if plain and all(31 < byte < 127 for byte in raw):
        return text
    is_kept = [31 < byte < 127 and byte not in b"%{}$" for byte in raw]
    return _ESCAPE + "".join(chr(byte) if kept else f"%{byte:02X}" for byte, kept in zip(raw, is_kept))


def decode_token(token: str) -> str:
    """Return the text of a token that `encode_token` wrote.  Raises UserError for any other token."""
    if not token.startswith(_ESCAPE):
        return token
    for name in ("connection_file", "resource_dir"):  # as 2.0 and 2.1.0 wrote it
        token = token.replace(f"%({name})", f"%7B{name}%7D")
    first, *parts = token[len(_ESCAPE) :].split("%")
    try:
        raw = b"".join([os.fsencode(first), *(bytes.fromhex(p[:2]) + os.fsencode(p[2:]) for p in parts)])
    except ValueError:
        raise broken_kernelspec(f"it has {token!r}") from None
    if b"\0" in raw:
        raise broken_kernelspec("it has a NUL in an argument")
    return os.fsdecode(raw)


def broken_kernelspec(reason: str) -> UserError:
    """Return the error for a kernelspec that this envkernel did not write like that."""
    return UserError(f"The kernelspec is broken: {reason}.", "Make it again: envkernel update NAME.")


def launch_to_argv(launch: Launch) -> list[str]:
    """Return the tokens of the run phase, from the mode's name on: the canonical form of a launch."""
    tokens: list[str] = []
    for index, step in enumerate(launch.steps):
        mode = MODES[step.mode]
        tokens += ["--", mode.name] if index else [mode.name]
        if index == 0:
            tokens += ["run", "--format=" + FORMAT, "--connection-file", CONNECTION_FILE]
            if any(RESOURCE_DIR in token for token in launch.command):
                tokens += ["--resource-dir", RESOURCE_DIR]
            shared = [option for option in COMMON_OPTIONS if option.run and option.setup]
            tokens += option_tokens(shared, launch.options, encode_token)
        tokens += option_tokens([option for option in mode.options if option.run], step.options, encode_token)
        tokens += ["--pass=" + encode_token(token) for token in step.engine]
        tokens += [encode_token(target, target.startswith("-")) for target in step.targets]
    tokens += ["--"]
    for index, text in enumerate(launch.command):
        whole = text in (CONNECTION_FILE, RESOURCE_DIR)
        tokens += [text if whole else encode_token(text, force=index == 0 and text in MODES)]
    return tokens


def option_tokens(
    options: Sequence[Option], values: Mapping[str, Any], encode: Callable[[str], str] = str
) -> list[str]:
    """Return the options that have a value as ``--flag`` and ``--flag=value``."""
    tokens: list[str] = []
    for option in options:
        value = values.get(option.name)
        for one in value or () if option.many else [value]:
            flag = "--" + option.name
            tokens += [flag] if one is True else [f"{flag}={encode(one)}"] if isinstance(one, str) else []
    return tokens


def split_chain(tokens: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return what is before the first ``--`` and what is after it; None where there is no ``--``."""
    end = list(tokens).index("--") if "--" in tokens else len(tokens)
    return list(tokens[:end]), list(tokens[end + 1 :]) if end < len(tokens) else None


def launch_from_argv(tokens: Sequence[str]) -> Launch:
    """Return the launch that a kernelspec describes (the inverse of `launch_to_argv`).  Raises UserError."""
    if not tokens:
        raise broken_kernelspec("its argv is not envkernel's")
    form = tokens[2] if len(tokens) > 2 else ""
    if not form.startswith("--format="):
        return legacy_launch(tokens)
    if form != "--format=" + FORMAT:
        raise broken_kernelspec(f"another version of envkernel wrote it ({form})")
    common: dict[str, Any] = {}
    steps: list[Step] = []
    rest: list[str] | None = [find_mode(tokens[0]).name, *tokens[2:]]
    while rest and rest[0] in MODES and not (steps and MODES[steps[-1].mode].container):
        mode, step = MODES[rest[0]], Step(MODES[rest[0]].name)
        known = {option.name: option for option in [*COMMON_OPTIONS, *mode.options]}
        own, rest = split_chain(rest[1:])
        while own:
            token = own.pop(0)
            name, equals, text = token[2:].partition("=")
            value: Any = decode_token(text) if equals else True
            if not token.startswith("--"):
                step.targets.append(decode_token(token))
            elif name == "pass":
                step.engine.append(value)
            elif name not in known:
                raise broken_kernelspec(f"it has an option that this envkernel does not know, --{name}")
            else:
                if known[name].metavar and not equals:
                    value = own.pop(0) if own else ""
                values = step.options if known[name] in mode.options else common
                values[name] = [*values.get(name, ()), value] if known[name].many else value
        check_targets(mode, step)
        steps.append(step)
    if not rest and not mode.container:  # an image may have a command of its own
        raise broken_kernelspec("the kernel command is missing")
    placeholders = {common[name]: placeholder for placeholder, name in _PLACEHOLDERS if name in common}
    return Launch(steps, [placeholders.get(token) or decode_token(token) for token in rest or ()], common)


# ---- options ------------------------------------------------------------------------------------


def recorded(spelling: str, help: str, metavar: str = "", many: bool = False) -> Option:
    """Return an option that setup writes into the kernelspec and nobody types."""
    return Option(spelling, help, metavar, many=many, run=True, setup=False)


_GROUPS = {
    "kernel": [
        Option("--name", "Name of the kernel in Jupyter (default: that of the target).", "NAME", run=True),
        Option("--display-name", "Name shown in menus.", "TEXT"),
        Option("--kernel", "ipykernel (default), ir, imatlab, or a kernelspec in the environment.", "NAME"),
        Option("--kernel-cmd", "Kernel command, quoted as in a shell, with {connection_file}.", "COMMAND"),
        Option("--kernel-template", "Take command, metadata and logos from an installed kernel.", "NAME"),
        Option("--kernel-make-path-relative", "Look for the kernel's program in the environment."),
        Option("--python", "Python in the environment (default: python; SELF: this one).", "PROGRAM"),
        Option("--language", "Language that the kernel is tagged with.", "LANG"),
        Option("--logo", "PNG or SVG file to show in launchers.", "FILE"),
    ],
    "location": [
        Option("--user", "Install for this user only, below the home directory."),
        Option("--sys-prefix", "Install into the Python that runs envkernel."),
        Option("--prefix", "Install in DIR/share/jupyter/kernels.", "DIR"),
        Option("--replace", "Replace the kernel that has this name."),
        Option("--self-contained", "Copy envkernel.py into the kernelspec."),
    ],
    "environment": [Option("--env", "Set a variable (repeatable).", "NAME=VALUE", many=True, run=True)],
    "other": [
        Option("--no-error-kernel", "If the kernel can't start, don't show why in the notebook.", run=True),
        Option("--check", "Test the new kernel, as `envkernel check` does."),
        Option("--dry-run", "Print the kernel.json and write nothing."),
        Option("--verbose -v", "Say more, at setup and at each start.", run=True),
        recorded("--format", "Form of this command line.", "N"),
        recorded("--connection-file", "Jupyter's connection file.", "FILE"),
        recorded("--resource-dir", "Directory of the kernelspec.", "DIR"),
    ],
}
COMMON_OPTIONS = [option.replace(group=group) for group, options in _GROUPS.items() for option in options]
"""Options of every mode; they come before the first ``--`` (``--env`` after any mode)."""

# ---- command line -------------------------------------------------------------------------------


def suggestion(name: str, known: Sequence[str], otherwise: str | None = None) -> str:
    """Return a hint that names what is most similar among the known names; else `otherwise`, or them all."""
    import difflib

    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), 3, 0.6)
    listed = f"Known are: {', '.join(known)}." if otherwise is None else otherwise
    return f"Did you mean {' or '.join(near)}?" if near else listed


def find_mode(name: str) -> Mode:
    """Return the mode of that name or alias.  Raises UserError (status 2) with a suggestion."""
    if name in MODES:
        return MODES[name]
    makes = "A mode makes a kernel, for example: envkernel conda science.  See: envkernel -h"
    usual = {"install": makes, "create": makes, "uninstall": "Did you mean remove?"}
    hint = usual.get(name) or suggestion(name, [*MODES, *COMMANDS])
    raise usage_error(f"There is no mode or command named {name!r}.", hint)


class Request(Record):
    """What a user typed: options of the kernel, the chain, the kernel command (None where there is none)."""

    common: dict[str, Any]
    steps: list[Step]
    command: list[str] | None = None


def parse_setup(tokens: Sequence[str], host: Host, environ: Mapping[str, str] | None = None) -> Request:
    """Read ``MODE [options] TARGET [-- MODE ... ] [-- KERNEL COMMAND]``.  Raises UserError (status 2)."""
    start = launch_environ(host) if environ is None else environ
    request = Request({}, [])
    rest: list[str] | None = list(tokens)
    while rest and (not request.steps or (rest[0] in MODES and not MODES[request.steps[-1].mode].container)):
        mode = find_mode(rest[0])
        own, rest = split_chain(rest[1:])
        request.steps.append(parse_step(mode, own, host, request, start))
    if rest == []:
        raise usage_error("Nothing follows the --.", "Give a kernel command or a mode, or leave the -- out.")
    if rest and rest[0].startswith("-") and request.common.get("kernel") != "image":  # it has its entrypoint
        hint = f"Put its program first: -- python {' '.join(map(quoted, rest))}"
        raise usage_error(f"The kernel command begins with an option, {rest[0]}.", hint)
    return request.replace(command=rest)


def check_targets(mode: Mode, step: Step, name: str = "", first: bool = True) -> None:
    """Raise UserError (status 2) unless `step` has as many targets as `mode` takes.  name: the kernel's."""
    usage = "Usage: " + usage_line(mode, first)
    if "" in step.targets:
        raise usage_error(f"{mode.name} was given an empty {mode.target.rstrip('.')}.", usage)
    if len(step.targets) < mode.targets[0]:
        explained = f"--name={name} is the name that the kernel gets. " if name and first else ""
        raise usage_error(f"{mode.name} needs {mode.target}.", explained + usage)
    surplus = step.targets[mode.targets[1] :]
    if surplus:
        chained = [name for name in surplus if name in MODES]
        hint = f"Put -- before the next mode: envkernel {mode.name} ... -- {' '.join(chained[:1])} ..."
        hint = hint if chained else usage + ". A kernel command follows --."
        takes = f"{mode.name} takes {mode.target or 'no argument'} and nothing more"
        raise usage_error(f"{takes}: {' '.join(surplus)} is too much.", hint)


def derive_name(request: Request, host: Host) -> str:
    """Return a name for a kernel that was given none: its last target's, behind that of a cluster's mode."""
    names: list[str] = []
    for step in request.steps:
        made_of = [step.options[name] for name in ("build", "uri", "restore") if name in step.options][:1]
        targets = [target for target in step.targets if not target.startswith("-")] or made_of
        if step.mode != "lmod" and targets:
            path = host.absolute(targets[0])
            is_usual = os.path.basename(path).strip(".") in ("venv", "env")
            targets = [os.path.basename(os.path.dirname(path) if is_usual else path).partition("@")[0]]
        earlier = [name for name in names if name == "slurm"] if targets else names
        names = [*earlier, *([step.mode] if MODES[step.mode].remote else []), *targets]
    name = "-".join(names) or request.steps[-1].mode
    for end in (".sif", ".simg", ".def", ".tar.gz", ".tgz", ".zip"):
        name = name[: -len(end)] if name.endswith(end) else name
    return "".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in name).strip(".-")


def parse_step(mode: Mode, tokens: Sequence[str], host: Host, request: Request, start: Environ) -> Step:
    """Read one mode's part of a command line; the options of the kernel go into `request`."""
    import functools

    @functools.lru_cache(maxsize=None)
    def engine() -> EngineOptions:  # it may exist only in the environment that the modes before it make
        near = [step for step in request.steps if not (MODES[step.mode].remote or MODES[step.mode].container)]
        environ = setup_steps(request.replace(steps=near), host, start)[1] if mode.engine else {}
        commands = mode.engine(mode.name, tokens, environ, host) if mode.engine else []
        return EngineOptions(commands, host, environ)

    first = not request.steps
    options = [option for option in COMMON_OPTIONS if first or option.name == "env"] + mode.options
    step = Step(mode.name)
    names = {option.name for option in mode.options}
    for name, value in read_options(mode.name, tokens, options, engine, step).items():
        values = step.options if name in names else request.common
        values[name] = [*values.get(name, []), *value] if isinstance(value, list) else value
    check_targets(mode, step, request.common.get("name", ""), first)
    return step


def parse_command(name: str, tokens: Sequence[str]) -> dict[str, Any]:
    """Read the arguments of a management command.  Raises UserError (status 2) for wrong ones."""
    command = COMMANDS[name]
    own, rest = split_chain(tokens)
    step = Step(name)
    values = read_options(name, own, command.options, lambda: EngineOptions([], Host(), {}), step)
    usage = f"See: envkernel {name} -h"
    surplus = step.targets[1 if command.argument else 0 :] + (rest or [] if name != "completion" else [])
    if surplus:
        raise usage_error(f"envkernel {name} can't do anything with {surplus[0]!r}.", usage)
    if command.argument and not step.targets and not (command.optional and "all" in values):
        raise usage_error(f"envkernel {name} needs {command.argument}.", usage)
    return {**values, **dict(zip([command.argument], step.targets)), "rest": rest}


def read_options(
    name: str, tokens: Sequence[str], options: list[Option], engine: Callable[[], EngineOptions], step: Step
) -> dict[str, Any]:
    """Return the values of envkernel's own options; targets and the engine's options go into `step`.

    By itself argparse would let ``--user`` take the image, and refuse -MODULE and values that begin with -.
    """
    flags = {flag: option for option in options for flag in option.flags}
    unloads = name in MODES and MODES[name].minus
    own: list[str] = []
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        flag, equals, _ = token.partition("=")
        option = flags.get(flag)
        may_be_engines = option and (flag[:2] != "--" or (equals and not option.metavar))  # -v, --user=X
        if token in ("-h", "--help"):
            own = [token]
            break
        if not token.startswith("-") or token == "-":
            step.targets.append(token)
        elif option and not (may_be_engines and engine().find(flag)):
            text = token[len(flag) + 1 :]
            if not option.metavar and equals:
                raise usage_error(f"--{option.name} takes no value.", "Leave %r out." % ("=" + text))
            if option.metavar and not equals:
                if not queue or queue[0] == "--":
                    hint = f"For example: --{option.name} {option.metavar}."
                    raise usage_error(f"--{option.name} needs a value.", hint)
                text = queue.pop(0)
            if option.name == "env" and "=" not in text:
                if not queue or queue[0].startswith("-"):
                    raise usage_error(f"--env {text} has no value.", f"Write it as --env {text}=VALUE.")
                text += "=" + queue.pop(0)
            if option.metavar and text in ("", "--"):  # argparse would drop the dashes
                hint = "Leave it out, or give it one."
                raise usage_error(f"--{option.name} was given an empty value.", hint)
            own.append(f"--{option.name}={text}" if option.metavar else "--" + option.name)
        elif flag == "--pass" and equals:  # as `setup_command` writes it
            step.engine.append(token[len("--pass=") :])
        elif not engine().read(token, queue, step.engine):
            if not unloads or token.startswith("--") or "-" + token in flags:
                raise unknown_option(name, flag, flags, engine())
            step.targets.append(token)
    return vars(make_parser().parse_args([name, *own]))


def unknown_option(name: str, flag: str, flags: Mapping[str, Option], engine: EngineOptions) -> UserError:
    """Return the error for an option that neither envkernel nor the engine knows."""
    if any(flag in option.flags for option in COMMON_OPTIONS) and name in MODES:
        return usage_error(f"{flag} belongs to the kernel and not to {name}.", "Put it before the first --.")
    known = [one for one, option in flags.items() if option.setup] + list(engine.known)
    hint = suggestion("-" * (flag[:2] != "--") + flag, known, "") if len(flag) > 2 else ""
    modes = sorted({mode.name for mode in MODES.values() for one in mode.options if flag in one.flags})
    hint = f"It is an option of {', '.join(modes)}. {hint}".strip() if modes else hint
    message = f"envkernel {name} has no option {flag}."
    message = f"Neither envkernel nor {name} knows the option {flag}." if engine.commands else message
    return usage_error(message, hint or f"See: envkernel {name} -h")


class EngineOptions:
    """The options of a mode's engine: those in its ``--help``, and those that it takes next to ``--help``."""

    UNKNOWN = ("unknown flag", "unknown shorthand", "unrecognized option", "invalid option", "is ambiguous")

    def __init__(self, commands: Sequence[Sequence[str]], host: Host, environ: Mapping[str, str]) -> None:
        self.commands, self.host, self.environ = commands, host, {**environ, "LC_ALL": "C"}
        self.known: dict[str, tuple[str, str]] = {}
        for command in commands:
            answer = host.output([*command, "--help"], self.environ)
            found = read_engine_help(os.fsdecode(answer.out))
            if not found:
                name, said = " ".join(command), os.fsdecode(answer.err).strip()
                message = f"{name} does not say which options it has."
                error = UserError(message, f"See: {name} --help", detail=said)
                raise explain(os.path.basename(command[0]), said) or error
            self.known = {**found, **self.known}

    def find(self, flag: str) -> tuple[str, str] | None:
        """Return an option's long name and how it takes a value, None where the engine does not know it."""
        for command in self.commands if flag not in self.known else ():
            answer = self.host.output([*command, flag, "--help"], self.environ)
            if not any(sign in os.fsdecode(answer.err) for sign in self.UNKNOWN):
                self.known[flag] = (flag, "=" if answer.status else "")
                break
        return self.known.get(flag)

    def read(self, token: str, queue: list[str], found: list[str]) -> bool:
        """Append an option to `found` as ``--flag`` or ``--flag=value``; return whether it is known."""
        short = not token.startswith("--")
        flag, equals, value = (token[:2], token[2:3], token[2:]) if short else token.partition("=")
        long, takes = self.find(flag) or ("", "")
        if not long:
            return False
        if short and equals not in ("", "=") and not takes:
            found.append(long)
            return self.read("-" + value, queue, found)
        if takes == "=" and not equals:
            if not queue or queue[0] == "--":
                raise usage_error(f"{token} needs a value.", f"See: {' '.join(self.commands[0])} --help")
            value = queue.pop(0)
        elif short and equals == "=":
            value = value[1:]
        found.append(f"{long}={value}" if equals or takes == "=" else long)
        return True


def read_engine_help(text: str) -> dict[str, tuple[str, str]]:
    """Return the options that a ``--help`` lists: each flag's long name and how it takes a value: not at all,
    ``=`` in the same argument or the next one (``-v, --volume list``), ``[`` in the same (``--x[=user]``)."""
    import re

    line = r"^ {2,6}(?:(-\w),? +)?(--[\w-]+)(\[=\S*|=\S*| \S+(?: \S+)*(?= {2}|$))?(?= |$)"
    found: dict[str, tuple[str, str]] = {}
    for short, long, value in re.findall(line, text, re.M):
        takes = "[" if value[:1] == "[" else "=" * bool(value)
        found.update({flag: (long, takes) for flag in (short, long) if flag})
    return found


def typed_value(tokens: Sequence[str], flag: str) -> str:
    """Return the value of an option where a command line gives it, before that is read; or empty."""
    pairs = [*(token.partition("=")[::2] for token in tokens), *zip(tokens, tokens[1:])]
    return next((value for name, value in pairs if name == flag and value), "")


def legacy_launch(tokens: Sequence[str], host: Host | None = None) -> Launch:
    """Return the launch of a kernelspec of 1.x: ``MODE run [options] TARGET -- COMMAND``, as it is typed."""
    mode, host, request = find_mode(tokens[0]), host or Host(), Request({}, [])
    own, command = split_chain(tokens[2:])
    step = parse_step(mode, own, host, request, launch_environ(host))
    if not command:
        raise usage_error("The kernel command is missing after --.", f"See: envkernel {mode.name} -h")
    file = request.common.get("connection-file")
    command = [CONNECTION_FILE if token == file else token for token in command]
    return Launch([step], command, request.common, legacy=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all modes and commands; it reads what `read_options` gives it."""
    import argparse
    import functools
    import shutil
    import textwrap

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise usage_error(message[:1].upper() + message[1:] + ".", f"See: {self.prog} -h")

    modes = {mode.name: mode for mode in MODES.values()}
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
    style: dict[str, Any] = {"formatter_class": layout, "add_help": False, "allow_abbrev": False}
    style["argument_default"] = argparse.SUPPRESS
    about = "Make a Jupyter kernel run somewhere else."
    examples = "\n  ".join(["examples:", *(mode.example for mode in modes.values())])
    usage = "envkernel MODE [--name=NAME] [options] TARGET [-- KERNEL COMMAND | -- MODE ...]\n"
    usage += "       envkernel COMMAND [options] [NAME]"
    top = Parser("envkernel", usage=usage, description=about, epilog=examples, **style)
    about = "modes, then commands for existing kernels (each has a help of its own)"
    verbs = top.add_subparsers(title=about, metavar="MODE ... | COMMAND ...", prog="envkernel")
    version = top.add_argument_group("options")
    version.add_argument("-V", "--version", action="version", version=__version__, help="Show the version.")
    version.add_argument("-h", "--help", action="help", help="Show this help.")

    rows: list[tuple[str, Mode | Command, list[Option], dict[str, Any]]] = []
    for name, mode in modes.items():
        more: dict[str, Any] = {"usage": usage_line(mode), "epilog": f"example:\n  {mode.example}"}
        rows.append((name, mode, [*mode.options, *COMMON_OPTIONS], {**more, "aliases": mode.aliases}))
    for name, command in COMMANDS.items():
        usage = f"envkernel {name} [options] {command.argument}{' | --all' * command.optional}".rstrip()
        rows.append((name, command, command.options, {"usage": usage}))
    for name, row, options, more in rows:
        about = textwrap.fill(row.summary, shutil.get_terminal_size().columns - 2)
        parser = verbs.add_parser(name, help=row.summary, description=about, **more, **style)
        titles = dict.fromkeys([option.group for option in options] or [""])
        groups = {title: parser.add_argument_group(title or f"options of {name}") for title in titles}
        for option in options:
            keywords: dict[str, Any] = {"action": "store_true"}
            if option.metavar:
                keywords = {"action": "append" if option.many else "store", "metavar": option.metavar}
            if option.choices:
                keywords.update(choices=option.choices, metavar=None)
            text = option.help.replace("%", "%%") if option.setup else argparse.SUPPRESS
            groups[option.group].add_argument(*option.flags, dest=option.name, help=text, **keywords)
        list(groups.values())[-1].add_argument("-h", "--help", action="help", help="Show this help.")
    return top


def usage_line(mode: Mode, first: bool = True) -> str:
    """Return the one-line usage of a mode.  first: of a chain."""
    start = f"envkernel {mode.name} [--name=NAME]" if first else f"envkernel ... -- {mode.name}"
    return f"{start} [options]{' ' * bool(mode.target)}{mode.target} [-- KERNEL COMMAND | -- MODE ...]"


def called_as() -> str:
    """Return how to call this program, for command lines to paste: by its name where that is on PATH."""
    import shutil

    own = [sys.executable, os.path.abspath(__file__)]
    return "envkernel" if shutil.which("envkernel") else " ".join(map(quoted, own))


def carry_out(argv: Sequence[str], host: Host) -> int:
    """Do what a user types: help, a management command or a setup.  Raises UserError."""
    name = argv[0] if argv else "-h"
    try:
        if name in COMMANDS:
            return COMMANDS[name].run(parse_command(name, argv[1:]), host)
        if name in MODES:
            return setup(argv, host)
        if name in ("-h", "--help", "help", "-V", "--version"):
            make_parser().parse_args(["-h" if name == "help" else name])
    except SystemExit as end:  # the parser has printed what was asked for
        return 0 if argv and not end.code else 2
    modes = [argument for argument in argv if argument in MODES]
    if name.startswith("-") and modes:
        rest = " ".join(quoted(argument) for argument in argv if argument != modes[0])
        raise usage_error(f"{name} comes before the mode.", f"Put it first: envkernel {modes[0]} {rest}")
    find_mode(name)
    return 2


# ---- environment modes --------------------------------------------------------------------------

IGNORED_BY_PYTHON = (13, 25)  # SIGPIPE and SIGXFSZ; a kernel must not inherit that
SHELL_OWN = frozenset(("_", "SHLVL", "PWD", "OLDPWD", "PS1", "OPTIND"))  # bash itself rewrites them


def path_entries(environ: Mapping[str, str]) -> list[str]:
    """Return the entries of PATH as conda sees them: normalised, an unset PATH being /usr/bin."""
    return [os.path.normpath(entry) for entry in environ.get("PATH", "/usr/bin").split(":")]


def conda_root(prefix: str, host: Host, environ: Mapping[str, str]) -> str:
    """Return the root prefix that belongs to a conda environment, empty where it can't be found."""
    candidates = [environ.get("CONDA_EXE", ""), prefix + "/bin/conda"]
    parent, directory = os.path.split(os.path.dirname(prefix))
    candidates += [parent + "/bin/conda"] if directory == "envs" else []
    for line in (host.read(prefix + "/conda-meta/history") or b"").splitlines():
        words = os.fsdecode(line).split()
        candidates += words[2:3] if words[:2] == ["#", "cmd:"] else []
    for candidate in candidates:
        root = os.path.dirname(os.path.dirname(candidate))
        if os.path.isabs(candidate) and host.isdir(root + "/conda-meta") and host.exists(candidate):
            return root
    return ""


def conda_state(prefix: str, host: Host) -> dict[str, str]:
    """Return the variables that a conda environment sets: ``env_vars.d``, then ``conda-meta/state``."""
    directory, state = prefix + "/etc/conda/env_vars.d/", prefix + "/conda-meta/state"
    variables: dict[str, Any] = {}
    for path in [*(directory + name for name in sorted(host.listdir(directory))), state]:
        text = host.read(path)
        try:
            values = {} if text is None else from_json(text)
            variables.update(values.get("env_vars", {}) if path == state else values.items())
        except (ValueError, AttributeError, TypeError, RecursionError):
            hint = "Repair it with `conda env config vars`, or remove it."
            raise UserError(f"The file {path} of the conda environment is broken.", hint) from None
    return {
        name: "" if value is None else str(value)
        for name, value in variables.items()
        if value != "***unset***" and name.upper() != "PATH" and name.isascii() and name.isidentifier()
    }


def plan_conda(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan what ``conda activate PREFIX`` does.  Raises UserError where there is no environment."""
    prefix = os.path.normpath(step.targets[0])  # envkernel 1.x wrote it as it was typed
    if not host.isdir(prefix + "/conda-meta"):
        hint = f"Create it (conda create --prefix {quoted(prefix)} ipykernel), or give another one."
        raise no_environment("conda environment", prefix, host, hint)
    environ, text = plan.environ, plan.environ.get("CONDA_SHLVL", "").strip()
    level = int(text) if text.isdecimal() else 0
    old = environ.get("CONDA_PREFIX", "") if level else ""
    root = step.options.get("root", "") or conda_root(prefix, host, environ)
    entries = path_entries(environ)
    if root and not level and not any(entry.endswith("condabin") for entry in entries):
        entries.insert(0, root + "/condabin")
    if old and old + "/bin" in entries:
        entries[entries.index(old + "/bin")] = prefix + "/bin"
    else:
        entries.insert(0, prefix + "/bin")
    is_named = os.path.basename(os.path.dirname(prefix)) == "envs"
    name = "base" if prefix == root else os.path.basename(prefix) if is_named else prefix
    name = environ.get("CONDA_DEFAULT_ENV", name) if old == prefix else name
    variables = {"PATH": ":".join(entries), "CONDA_PROMPT_MODIFIER": f"({name}) "}
    if old != prefix:  # else it is active already
        variables.update(CONDA_PREFIX=prefix, CONDA_SHLVL=str(level + 1), CONDA_DEFAULT_ENV=name)
        variables.update({f"CONDA_PREFIX_{level}": old} if old else {})
        if root:
            conda = root + "/bin/conda"
            variables.update(CONDA_EXE=conda, _CONDA_EXE=conda, _CONDA_ROOT=root, _CE_M="", _CE_CONDA="")
            variables["CONDA_PYTHON_EXE"] = root + "/bin/python"
        for key, value in conda_state(prefix, host).items():
            if key in environ:  # as it was written: conda makes it upper-case afterwards
                variables[f"__CONDA_SHLVL_{level}_{key.upper()}"] = environ[key]
            variables[key.upper()] = value
    leave = shell_scripts(old + "/etc/conda/deactivate.d", host) if old else []
    enter = shell_scripts(prefix + "/etc/conda/activate.d", host)
    actions = [("source", script, "") for script in reversed(leave)]
    actions += [("export", name, value) for name, value in variables.items()]
    actions += [("source", script, "") for script in enter]
    environ = host.source(actions, environ) if leave or enter else {**environ, **variables}
    install = f"conda install --prefix {quoted(prefix).replace('%', '%%')} %s"
    where = f"the conda environment {prefix}"
    return plan.replace(environ=environ, search=[prefix + "/bin"], where=where, install=install)


def shell_scripts(directory: str, host: Host) -> list[str]:
    """Return the ``*.sh`` files of a directory in their order, hidden ones too."""
    return [directory + "/" + name for name in sorted(host.listdir(directory)) if name.endswith(".sh")]


def setup_conda(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> Step:
    """Resolve the environment's name and find conda's root, so that run needs neither.  Raises UserError."""
    name = step.targets[0]
    prefixes = os.fsdecode(host.read(host.absolute("~/.conda/environments.txt")) or b"").split("\n")
    roots = [os.path.dirname(os.path.dirname(environ.get("CONDA_EXE", "")))]
    roots += [conda_root(prefix, host, environ) for prefix in [environ.get("CONDA_PREFIX", ""), *prefixes]]
    roots = [root for root in roots if root]
    homes = [home for home in environ.get("CONDA_ENVS_PATH", "").split(":") if home]
    homes += [root + "/envs" for root in roots] + [host.absolute("~/.conda/envs")]
    named = [f"{home}/{name}" for home in homes] + [path for path in prefixes if path.endswith("/" + name)]
    found = [prefix for prefix in named if host.isdir(prefix + "/conda-meta")]
    found = roots[:1] if name in ("base", "root") and roots else found
    if "/" in name or name in (".", "..") or name.startswith("~"):
        found = [os.path.expandvars(name)]
    if not found:
        known = {*map(os.path.basename, prefixes), *(entry for home in homes for entry in host.listdir(home))}
        known = known - {""} | ({"base"} if roots else set())
        hint = suggestion(name, sorted(known)) if known else "Give its path instead."
        hint = no_environment("conda environment", host.absolute(name), host, hint).hint
        raise UserError(f"There is no conda environment named {name}.", hint)
    prefix = host.absolute(found[0])
    root = conda_root(prefix, host, environ)
    return step.replace(targets=[prefix], options={**step.options, **({"root": root} if root else {})})


def plan_virtualenv(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan what ``source PATH/bin/activate`` does.  Raises UserError where there is no environment."""
    path = step.targets[0]
    script = path + "/bin/activate"
    text = host.read(script)
    if text is None or host.isdir(path + "/conda-meta"):
        hint = f"Create it (python3 -m venv {quoted(path)}, or envkernel virtualenv --create)."
        raise no_environment("virtualenv", path, host, hint)
    for spelled in (path, host.real_path(path)):  # older creators wrote it without quoting
        bare = text.replace(os.fsencode(quoted(spelled)), b"")
        in_double = any(c in spelled for c in '$`"') or spelled.endswith("\\")
        bare = bare if in_double else bare.replace(os.fsencode(f'"{spelled}"'), b"")
        bare = bare if "'" in spelled else bare.replace(os.fsencode(f"'{spelled}'"), b"")
        if (in_double or "'" in spelled) and os.fsencode(spelled) in bare:
            hint = "Create the virtualenv again in a directory without $ ` \" and ' in its name."
            raise UserError(f"{script} does not quote the name of its directory: bash would run that.", hint)
    environ = host.source([("source", script, "")], plan.environ)
    if not environ.get("VIRTUAL_ENV"):
        message = f"{script} does not activate the virtualenv {path}: it sets no VIRTUAL_ENV."
        raise UserError(message, "Repair what you have edited in it, or create the virtualenv again.")
    python = quoted(path + "/bin/python").replace("%", "%%")
    is_uvs = b"\nuv = " in (host.read(path + "/pyvenv.cfg") or b"")  # without pip
    install = f"uv pip install --python {python} %s" if is_uvs else python + " -m pip install %s"
    where = f"the virtualenv {path}"
    return plan.replace(environ=environ, search=[path + "/bin"], where=where, install=install)


def setup_virtualenv(step: Step, host: Host, environ: Mapping[str, str], common: dict[str, Any]) -> Step:
    """Make the path absolute; with ``--create`` make the environment and install ipykernel into it."""
    path = host.absolute(step.targets[0])
    if step.options.get("create"):
        if common.get("dry-run"):
            raise usage_error("--create makes a virtualenv and --dry-run writes nothing.", "Leave one out.")
        chosen = common.pop("python", "")  # it makes the environment; the kernel's is the one inside
        python = sys.executable if chosen in ("", "SELF") else chosen
        found = search_program(python, path_entries(environ), host)
        python = host.absolute(python) if "/" in python else found or python
        inside = path + "/bin/python"
        if chosen and host.is_executable(inside):
            ask = ["-c", "import sys; print(sys.version)"]
            has, wanted = (host.output([name, *ask], environ).out for name in (inside, python))
            if has != wanted:
                text = f"{path} is there already with Python {os.fsdecode(has).split(' ')[0]}, not {chosen}."
                raise UserError(text, "Give a directory that does not exist yet, or leave --python out.")
        create_virtualenv(path, python, host, environ)
    step = step.replace(targets=[path], options={})
    active = plan_virtualenv(step, Plan([], dict(environ)), host, Launch([], [])).environ["VIRTUAL_ENV"]
    if host.real_path(active) != host.real_path(path):
        text = f"{path} was made as {active} and moved: its activate script puts that on PATH.\n"
        host.warn(f"envkernel: {text}  Create it again where it is now.\n".encode(errors="surrogateescape"))
    return step


def module_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which Lmod and Environment Modules are found: what a login shell sets."""
    names = ("LMOD_", "MODULEPATH", "MODULES_", "MODULESHOME", "MODULERCFILE")
    return {name: environ[name] for name in sorted(environ) if name.startswith(names)}


def module_command(environ: Mapping[str, str], host: Host) -> list[str]:
    """Return the start of a module command line, empty where there is no module system."""
    lmod, tcl, home = (environ.get(name, "") for name in ("LMOD_CMD", "MODULES_CMD", "MODULESHOME"))
    usual = ("/usr/share/lmod/lmod", "/opt/apps/lmod/lmod", "/usr/local/lmod/lmod", "/opt/lmod/lmod")
    homes = () if tcl else (environ.get("LMOD_PKG", ""), home, *usual)
    for path in (lmod, *(directory + "/libexec/lmod" for directory in homes)):
        if host.is_executable(path):
            return [path]
    usual = ("/usr/share/Modules", "/usr/share/modules", "/usr/local/Modules", "/opt/modules")
    directories = (*(directory + "/libexec" for directory in (home, *usual)), "/usr/lib/x86_64-linux-gnu")
    for path in (tcl, *(directory + "/modulecmd.tcl" for directory in directories)):
        if host.exists(path):
            tclsh = search_program("tclsh", environ.get("PATH", os.defpath).split(":"), host)
            return [path] if host.is_executable(path) else [tclsh or "/usr/bin/tclsh", path]
    return []


def parse_modules(text: bytes) -> tuple[dict[str, str | None], list[bool]]:
    """Return what ``modulecmd python`` printed: changes (None: unset the variable) and status values."""
    changes: dict[str, str | None] = {}
    states: list[bool] = []
    at = 0
    while at < len(text):  # read, never executed: a modulefile may print anything
        if text.startswith(b"_mlstatus = ", at):
            states.append(text.startswith(b"True", at + 12))
        deletes = text.startswith(b"del os.environ[", at)
        if deletes or text.startswith(b"os.environ[", at):
            key, end = _read_quoted(text, at + (15 if deletes else 11))
            value = b""
            if end and not deletes:
                value, end = _read_quoted(text, end + 4) if text.startswith(b"] = ", end) else (b"", 0)
            if end:  # as bash does, without NUL
                changes[os.fsdecode(key)] = None if deletes else os.fsdecode(value.replace(b"\0", b""))
                at = end
        at = text.find(b"\n", at) + 1 or len(text)
    return changes, states


def _read_quoted(text: bytes, at: int) -> tuple[bytes, int]:
    r"""Read a quoted string; return its value and the place after it (0: there is none)."""
    quote, value = text[at : at + 1], b""
    at += 1
    statements = (b"\nos.environ[", b"\ndel os.environ[", b"\n_mlstatus", b"\nimport ", b"\npass", b"\n\n")
    if quote == b"'":  # Environment Modules escape the quote alone: it ends before the next statement
        end = text.find(quote, at)
        while end > at and text[end - 1 : end] == b"\\" and not text.startswith(statements, end + 1):
            end = text.find(quote, end + 1)
        return text[at:end].replace(b"\\'", b"'"), end + 1
    while quote == b'"':  # as Lua's %q
        end = text.find(quote, at)
        escape = text.find(b"\\", at, end)
        if escape < 0 or end < 0:
            return value + text[at:end], end + 1
        code = text[escape + 1 : escape + 4]
        digits = code[: len(code) - len(code.lstrip(b"0123456789"))]
        letter = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(code[:1], code[:1])
        value += text[at:escape] + (bytes([int(digits) & 255]) if digits else letter)
        at = escape + 1 + (len(digits) or 1)
    return b"", 0


def run_modules(words: list[str], command: list[str], environ: Environ, host: Host) -> dict[str, str]:
    """Return the environment after ``module WORDS``.  Raises UserError with what the module system said."""
    said = host.output([*command, "python", *words], environ)
    changes, states = parse_modules(said.out)
    is_tcl = command[-1].endswith(".tcl")
    if (said.status or not all(states)) and (is_tcl or not changes):  # Lmod's warnings are no failures
        hint = f"See `module avail` for what there is (MODULEPATH is {environ.get('MODULEPATH', 'not set')})."
        detail = os.fsdecode(said.err or said.out).strip()
        raise UserError(f"`module {' '.join(words)}` failed.", hint, detail=detail)
    host.warn(said.err)
    result = {name: value for name, value in {**environ, **changes}.items() if value is not None}
    # Lmod's `execute` prints commands for a shell only; bash runs them, as it does after `module load`
    before, after = (set(variables.get("_LMFILES_", "").split(":")) for variables in (environ, result))
    if is_tcl or host.quiet or not any(b"execute" in (host.read(path) or b"") for path in before ^ after):
        return result
    said = host.output([*command, "bash", *words], environ)
    return host.source([("eval", os.fsdecode(said.out), "")], environ)


def module_calls(step: Step, environ: Mapping[str, str]) -> list[list[str]]:
    """Return the ``module`` command lines of a step; a purge with nothing loaded is left out."""
    calls = [["purge"]] if step.options.get("purge") and environ.get("LOADEDMODULES", "") else []
    calls += [["use", directory] for directory in step.options.get("use", [])]
    calls += [["restore", step.options["restore"]]] if "restore" in step.options else []
    unload = [target[1:] for target in step.targets if target.startswith("-")]
    load = [target for target in step.targets if not target.startswith("-")]
    return calls + [call for call in (["unload", *unload], ["load", *load]) if len(call) > 1]


def with_modules(step: Step, environ: Mapping[str, str], host: Host) -> tuple[dict[str, str], list[str]]:
    """Return an environment in which the module system is found, and its command.  Raises UserError."""
    recorded = dict(entry.partition("=")[::2] for entry in step.options.get("recorded", []))
    found = {**environ, **{name: environ.get(name) or value for name, value in recorded.items()}}
    command = module_command(found, host)
    if not command or not found.get("MODULEPATH"):
        found = {**module_variables(host.login_environ(found)), **found}
        command = module_command(found, host)
    if not command:
        hint = "Install one, or set LMOD_CMD and MODULEPATH where Jupyter starts."
        raise UserError("There is no module system (Lmod, Environment Modules) on this machine.", hint, 127)
    return found, command


def plan_lmod(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan what ``module purge|use|restore|load`` make of the environment.  Raises UserError."""
    start, command = with_modules(step, plan.environ, host)
    environ = start
    for words in module_calls(step, environ):
        environ = run_modules(words, command, environ, host)
    entries = environ.get("PATH", "").split(":")
    program = plan.argv[0] if plan.argv else ""
    outside, kept = plan.environ.get("PATH", "").split(":"), plan.search or []
    search = [entry for entry in entries if entry not in outside or entry in kept]
    if start.get("LOADEDMODULES") and program and not search_program(program, search, host):
        outside = run_modules(["purge"], command, environ, host).get("PATH", "").split(":")
        search = [entry for entry in entries if entry not in outside or entry in kept]
    found = not program or search_program(program, search, host)
    if rest.legacy and not found and search_program(program, entries, host):
        host.warn(f"envkernel: none of the modules has {program}; taking the one on PATH.\n".encode())
        search = entries
    install = "load a module with %s, chain a mode (-- virtualenv PATH), or give --python=/usr/bin/python3"
    where = f"the modules {' '.join(step.targets)}".rstrip()
    return plan.replace(environ=environ, search=search, where=where, install=install)


def setup_lmod(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> Step:
    """Record by what variables the module system is found, for a Jupyter without a login shell."""
    if not module_calls(step, {"LOADEDMODULES": "any"}) or "-" in step.targets:
        raise usage_error("lmod has nothing to load.", f"Usage: {usage_line(MODES['lmod'])}")
    found, _ = with_modules(step, environ, host)
    options = {**step.options, "recorded": ["=".join(item) for item in module_variables(found).items()]}
    use = {"use": [host.absolute(directory) for directory in options["use"]]} if "use" in options else {}
    return step.replace(options={**options, **use})


def search_program(name: str, directories: Sequence[str], host: Host) -> str:
    """Return the first executable of that name in some directories, empty where there is none."""
    paths = (f"{directory}/{name}" for directory in directories if directory)
    return next((path for path in paths if host.is_executable(path)), "")


def resolve_program(plan: Plan, host: Host) -> Plan:
    """Make the kernel program absolute, never another environment's.  Raises UserError (status 127)."""
    program, search = plan.argv[0], plan.search or []
    if "/" in program and not host.is_executable(program):
        raise UserError(f"There is no program {program}.", "Install it, or give another command.", 127)
    found = program if "/" in program else search_program(program, search, host)
    if found:
        return plan.replace(argv=[found, *plan.argv[1:]])
    pythons = sorted({name for directory in search for name in host.listdir(directory) if is_python(name)})
    pythons = [name for name in pythons if search_program(name, search, host)]
    if is_python(program) and pythons:
        hint = f"It has {', '.join(pythons)}: choose one of them with --python."
    elif is_python(program) and search and host.exists(os.path.dirname(search[0]) + "/pyvenv.cfg"):
        was, path = host.real_path(f"{search[0]}/{program}"), quoted(os.path.dirname(search[0]))
        again = f"python3 -m venv --clear {path} && {plan.install % 'ipykernel'}"
        hint = f"Its Python is gone (it was {was}); create it again: `{again}`."
    elif is_python(program) or (program in PACKAGES and plan.install.startswith("conda ")):
        hint = f"Try: {plan.install % PACKAGES.get(program, 'ipykernel')}."
    else:
        hint = f"Install {program} there, or give its absolute path as the kernel command, after --."
    raise UserError(f"There is no {program} in {plan.where}.", hint, 127)


PACKAGES = {"R": "r-irkernel", "ipykernel_launcher": "ipykernel"}  # what to install where these are missing


def is_python(program: str) -> bool:
    return os.path.basename(program).rstrip("0123456789.") in ("python", "pypy")


def check_kernel_module(plan: Plan, host: Host) -> None:
    """Raise UserError unless the module of ``python -m MODULE`` is in its usual place or Python finds it."""
    python = plan.argv[0]
    if "-m" not in plan.argv[1:-1] or not is_python(python):
        return
    cut = plan.argv.index("-m", 1)
    top = plan.argv[cut + 1].partition(".")[0]
    library = os.path.dirname(os.path.dirname(python)) + "/lib/"
    version = os.path.basename(host.real_path(python))  # python3.11
    for packages in (version + "/site-packages/", "python3/dist-packages/"):
        if any(host.exists(library + packages + file) for file in (top + ".py", top + "/__init__.py")):
            return
    said = host.output([*plan.argv[:cut], "-c", FIND_MODULE, top], plan.environ)
    detail = os.fsdecode(said.err).strip()
    if said.status == MODULE_MISSING:
        is_ours = host.host is not host or os.path.dirname(python) in (plan.search or ())
        install = plan.install if is_ours else quoted(python).replace("%", "%%") + " -m pip install %s"
        message = f"There is no {top} in {plan.where}: {python} can't import it."
        raise UserError(message, f"Try: {install % PACKAGES.get(top, top)}.", 1, detail)
    if said.status:
        message = f"{python} does not work: it ended with status {said.status}."
        raise UserError(message, f"Repair {plan.where}, or create it again.", 1, detail)


MODULE_MISSING = 77
FIND_MODULE = (
    "import sys; sys.path = [entry for entry in sys.path if entry]; from importlib.util import find_spec; "
    f"sys.exit({MODULE_MISSING} if find_spec(sys.argv[1]) is None else 0)"
)
"""What a Python is asked for a module: not in the current directory, which is not the notebook's."""


register(
    Mode(
        "conda",
        "Activate a conda environment: PATH, variables and activate.d scripts, as `conda activate` does.",
        [recorded("--root", "Root prefix of conda.", "DIR")],
        setup_conda,
        plan_conda,
        target="PREFIX-OR-NAME",
        example="envkernel conda --user --name=science /opt/conda/envs/science",
    ),
    Mode(
        "virtualenv",
        "Activate a virtualenv, as `source PATH/bin/activate` does.",
        [Option("--create", "Create the virtualenv (with --python if given) and install ipykernel into it.")],
        setup_virtualenv,
        plan_virtualenv,
        aliases=("venv",),
        target="PATH",
        example="envkernel virtualenv --user --name=my-env ~/my-env",
    ),
    Mode(
        "lmod",
        "Load modules of Lmod or Environment Modules, as `module load` does; -MODULE unloads one.",
        [
            Option("--purge", "Unload all modules first.", run=True),
            Option("--use", "Add a directory of modulefiles; repeatable.", "DIR", many=True, run=True),
            Option("--restore", "Restore a saved collection.", "COLLECTION", run=True),
            recorded("--recorded", "A variable of the module system at setup.", "NAME=VALUE", many=True),
        ],
        setup_lmod,
        plan_lmod,
        target="MODULE...",
        targets=(0, 999),
        minus=True,
        example="envkernel lmod --user --name=anaconda3 --purge anaconda3",
    ),
)


# ---- container modes ----------------------------------------------------------------------------

INSIDE = "/run/envkernel"
"""Where a kernel's private directory appears inside of its container."""

APPTAINER_PROGRAMS = {"apptainer": ("apptainer", "singularity"), "singularity": ("singularity", "apptainer")}
"""Which programs run a mode's containers: its own, or else the other one of the same family."""

CONTAINER_OPTIONS = [
    Option("--bind", "Show a directory or file inside; repeatable.", "SRC[:DST[:ro]]", many=True, run=True),
    Option("--pwd", "Show the notebook's directory in the container and start the kernel there.", run=True),
    Option("--workdir", "Directory inside the container to start the kernel in.", "DIR", run=True),
    Option("--copy-workdir", "Like --pwd, with a copy that is removed with the kernel.", run=True),
    Option("--mount", "As the engine's; `,copy` mounts a copy; repeatable.", "SPEC", many=True, run=True),
    Option("--gpu", "Let the kernel use this machine's GPUs.", run=True),
    Option("--engine", "Program that runs the container (default: the mode's own).", "PROGRAM", run=True),
    Option("--build", "Build the image of this directory or FILE.def, and again at each update.", "PATH"),
    Option("--build-option", "One argument for the engine's build; repeatable.", "TOKEN", many=True),
    Option("--pull", "When to fetch IMAGE (default: ask).", "WHEN", choices=("missing", "always", "never")),
    Option("--shared", "Run all kernels of this kernelspec in one container.", run=True),
    Option("--keep", "With --shared: leave it running after the last kernel.", run=True),
    Option("--transport", "Sockets (default: ipc where it works).", "HOW", choices=("ipc", "tcp"), run=True),
    recorded("--program", "The engine's program.", "PATH"),
    recorded("--place", "Where private directories go.", "WHERE"),
    recorded("--reach", "How setup reached the kernel.", "HOW"),
    recorded("--identity", "Who the kernel is inside.", "WHO"),
    recorded("--guest", "Number of the other user on this machine.", "UID"),
    recorded("--no-host-network", "The engine does not share the host's network."),
    recorded("--no-selinux", "Switch SELinux labels off."),
    recorded("--init", "The engine has an init."),
    recorded("--runscript", "Run what the image runs by itself."),
]
"""Options of all container modes; what is recorded is known to some engines only."""


class Bind(Record):
    """A directory or file of the host, where it appears in a container, and the options (``ro``, empty)."""

    def __init__(self, source: str, target: str = "", options: str = "") -> None:
        self.source = source
        self.target = target or source
        self.options = options

    def __str__(self) -> str:
        import re

        paths = [re.sub(r"[\\:,]", r"\\\g<0>", path) for path in (self.source, self.target)]
        return ":".join([*paths, *filter(None, [self.options])])


def read_binds(texts: Sequence[str], commas: bool = False) -> list[Bind]:
    """Read ``SRC[:DST[:OPTIONS]]``, a backslash making ``:,\\`` literal; commas: several in one text."""
    import re

    binds = []
    for text in texts:
        found = [[""]]
        for piece in re.findall(r"\\[\\:,]|.", text, re.DOTALL):
            if piece == "," and commas:
                found.append([""])
            elif piece == ":":
                found[-1].append("")
            else:
                found[-1][-1] += piece if len(piece) == 1 else piece[1]
        for fields in found:
            if not fields[0] or len(fields) > 3 or not (fields[1:2] or ["/"])[0].startswith("/"):
                hint = "Write SRC, SRC:DST or SRC:DST:ro, DST being absolute, and \\: for a colon in a name."
                raise usage_error(f"--bind can't be {text!r}.", hint)
            binds.append(Bind(*fields))
    return binds


def setup_binds(texts: Sequence[str], host: Host) -> list[str]:
    """Return binds with absolute sources.  Raises UserError for a source that does not exist."""
    binds = []
    for bind in read_binds(texts):
        source = host.absolute(bind.source)
        if not host.exists(source):
            raise UserError(f"--bind: there is no {source}.", "Create it, or correct its path.")
        target = source if bind.target == bind.source else os.path.normpath(bind.target)
        binds.append(str(Bind(source, target, bind.options)))
    return binds


def engine_values(tokens: Sequence[str], *flags: str) -> list[str]:
    """Return the values that options have among canonical tokens, ``true`` for a flag."""
    pairs = [token.partition("=") for token in tokens]
    values = [value if equals else "true" for flag, equals, value in pairs if flag in flags]
    return [value for value in values if value != "false"]


def last_value(step: Step, *flags: str) -> str:
    """Return the last value that an engine option has in a step, empty for none."""
    return (engine_values(step.engine, *flags) or [""])[-1]


def find_engine(step: Step, environ: Mapping[str, str], host: Host) -> str:
    """Return the path of a step's engine.  Raises UserError (status 127)."""
    if "program" in step.options:
        return str(step.options["program"])
    names = APPTAINER_PROGRAMS.get(step.mode, (step.mode,))
    wanted = (step.options["engine"],) if "engine" in step.options else names
    for name in wanted:
        path = name if "/" in name else search_program(name, environ.get("PATH", os.defpath).split(":"), host)
        if path and host.is_executable(host.absolute(path)):
            return host.absolute(path)
    hint = f"Install it, load its module (envkernel lmod ... -- {step.mode} ...), or give --engine=PATH."
    raise UserError("There is no {} on this machine.".format(" and no ".join(wanted)), hint, 127)


def container_commands(
    mode: str, tokens: Sequence[str], environ: Mapping[str, str], host: Host
) -> list[list[str]]:
    """Return the engine's commands whose options may be given: run or exec, with --build also build."""
    given = typed_value(tokens, "--engine")
    program = find_engine(Step(mode, {"engine": given} if given else {}), environ, host)
    start = [program, "exec" if mode in APPTAINER_PROGRAMS else "run"]
    return [start, *([[program, "build"]] if typed_value(tokens, "--build") else [])]


class ContainerSpec(Record):
    """What each engine has to know about one kernel, independent of how the engine expresses it."""

    supervision: Supervision
    inside: str  # where its private directory appears in the container
    shared: str  # name of the container that all kernels of the kernelspec share, empty for one of its own
    binds: list[Bind]  # the private directory first
    workdir: str  # empty for the image's own
    environ: dict[str, str]
    command: list[str]
    publish: list[str] = []

    def path(self, name: str) -> str:
        """Return where a file of the private directory is on the host."""
        return f"{self.supervision.directory}/{name}"


def container_spec(
    step: Step, plan: Plan, host: Host, rest: Launch, host_network: bool, inside: str = INSIDE
) -> ContainerSpec:
    """Return what the engine has to know.  inside: empty for the private directory's path on the host."""
    path, _, connection = read_connection(rest, host)
    base = private_base(plan.environ, step.options.get("place", ""), host)
    key = kernel_key(path if connection else host.random())
    shared = shared_name(step, rest, host) if step.options.get("shared") else ""
    base = f"{base}/{shared}" if shared else base
    directory = f"{base}/{key}"
    inside = f"{INSIDE}/{key}" if shared else inside or directory
    binds = [Bind(base, INSIDE) if shared else Bind(directory, inside)]
    spec = ContainerSpec(
        Supervision(directory, connection=connection),
        inside=inside,
        shared=shared,
        binds=binds + read_binds(step.options.get("bind", [])),
        workdir=step.options.get("workdir", ""),
        environ={"ENVKERNEL_CONNECTION_FILE": f"{inside}/connection.json"},
        command=[token.replace(CONNECTION_FILE, f"{inside}/connection.json") for token in plan.argv],
    )
    if connection:
        transport = step.options.get("transport") or step.options.get("reach", "")
        own = kernel_connection(spec, host_network, transport, host)
        spec.supervision.files.append((spec.path("connection.json"), to_json(own)))
        if connection.get("transport") == "ipc":
            sockets = [f"{connection['ip']}-{connection[name + '_port']}" for name in STREAMS]
            spec.supervision.remove += sockets
    if step.options.get("pwd") or step.options.get("copy-workdir"):
        use_workdir(spec, step, plan, host)
    return spec


def shared_name(step: Step, launch: Launch, host: Host) -> str:
    """Return what names the container that all kernels of a kernelspec share: the same for the same spec."""
    parts = [str(host.ids()[0]), launch.options.get("name", ""), *step.targets, *step.engine]
    options = [item for item in sorted(step.options.items()) if item[0] != "transport"]  # planning may set it
    return "shared-" + kernel_key("\0".join([*parts, *(f"{name}={value}" for name, value in options)]))


def kernel_connection(spec: ContainerSpec, host_network: bool, transport: str, host: Host) -> dict[str, Any]:
    """Decide where the kernel listens (tcp: at a loopback address of its own); return its connection file."""
    jupyters = spec.supervision.connection
    if transport == "ipc" or not (transport or host_network):  # neither: a kernelspec of envkernel 1.x
        numbers = {name + "_port": number for number, name in enumerate(STREAMS, 1)}
        spec.supervision.relay = {**numbers, "transport": "ipc", "ip": spec.path("s")}
        return {**jupyters, **numbers, "transport": "ipc", "ip": f"{spec.inside}/s"}
    random = bytes.fromhex(host.random())
    address = "127.{}.{}.{}".format(*(byte % 254 + 1 for byte in random[:3]))
    ports = {name + "_port": int(jupyters[name + "_port"]) for name in STREAMS}
    if jupyters.get("transport") == "ipc" or jupyters["ip"] in ("0.0.0.0", "::", "*", ""):
        first = 61000 + 8 * random[3]  # Jupyter has none, or listens on them at all addresses
        ports = {name: first + number for number, name in enumerate(ports)}
    spec.supervision.relay = {**ports, "transport": "tcp", "ip": address}
    if not host_network:
        spec.publish = [f"{address}:{port}:{port}" for port in ports.values()]
    return {**jupyters, **spec.supervision.relay, "ip": address if host_network else "0.0.0.0"}


def use_workdir(spec: ContainerSpec, step: Step, plan: Plan, host: Host) -> None:
    """Let the kernel work in the notebook's directory: bind it, or find it in a shared container's binds."""
    directory = host.absolute(".")
    if spec.shared:
        volumes = [Bind(*value.split(":")[:2]) for value in engine_values(step.engine, "--volume")]
        for bind in sorted(spec.binds + volumes, key=lambda bind: len(bind.source), reverse=True):
            if not spec.workdir and f"{directory}/".startswith(bind.source.rstrip("/") + "/"):
                spec.workdir = os.path.normpath(f"{bind.target}/{os.path.relpath(directory, bind.source)}")
    elif directory != "/":
        source = add_copy(spec, directory, plan, host) if step.options.get("copy-workdir") else directory
        spec.binds.append(Bind(source, directory))
        spec.workdir = spec.workdir or directory
    if spec.supervision.connection and not spec.workdir:
        where = "seen in the shared container" if spec.shared else "bound into a container"
        hint = "Open the notebook in a directory that --bind shows there, or leave --pwd out."
        raise UserError(f"The notebook's directory {directory} can't be {where}.", hint)


def add_copy(spec: ContainerSpec, directory: str, plan: Plan, host: Host) -> str:
    """Have a directory copied before the start; return where the copy will be (on disk, not in memory)."""
    disk = private_base({**plan.environ, "XDG_RUNTIME_DIR": ""}, "", host)
    owner = spec.shared or os.path.basename(spec.supervision.directory)
    copy = f"{disk}/{owner}.{len(spec.supervision.copies)}"
    spec.supervision.copies.append((directory, copy))
    return copy


def mount_token(fields: Sequence[str]) -> str:
    """Return the engines' option for a mount: fields of a CSV line, so that a path can hold anything."""
    quoted = ['"' + one.replace('"', '""') + '"' if set(one) & set(',"\r\n') else one for one in fields]
    return "--mount=" + ",".join(quoted)


def bind_token(bind: Bind, mount: bool) -> str:
    """Return the engine's option for a bind: --mount where it has no other (mount), or the path needs it."""
    options = [bind.options] if bind.options else []
    if not mount and not set(bind.source + bind.target) & set('\\:,"\n'):
        return "--bind=" + ":".join([bind.source, bind.target, *options])
    readonly = ["readonly"] if "ro" in bind.options.split(",") else []
    return mount_token(["type=bind", "src=" + bind.source, "dst=" + bind.target, *readonly])


def mount_options(step: Step, spec: ContainerSpec, plan: Plan, host: Host) -> list[str]:
    """Return the mounts that a user wants from the engine; directories marked ``copy`` are copied first."""
    import csv

    tokens = []
    for fields in csv.reader(step.options.get("mount", [])):
        for index, field in enumerate(fields):
            key, _, value = field.partition("=")
            if "copy" in fields and key in ("src", "source"):
                fields[index] = f"{key}={add_copy(spec, host.absolute(value), plan, host)}"
        tokens.append(mount_token([field for field in fields if field != "copy"]))
    return tokens


def gpu_tokens(step: Step, host: Host) -> list[str]:
    """Return the options that give a container this machine's GPUs, where it is to have them."""
    if not step.options.get("gpu"):
        return []
    amd = host.exists("/dev/kfd") and not host.exists("/dev/nvidiactl")
    if step.mode in APPTAINER_PROGRAMS:
        return ["--rocm" if amd else "--nv"]
    if amd:
        return ["--device=/dev/kfd", "--device=/dev/dri"]
    return ["--device=nvidia.com/gpu=all" if step.mode == "podman" else "--gpus=all"]  # CDI for podman


# -- docker and podman --


def plan_engine(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan a kernel in a container of docker or podman.  Raises UserError for what can't be done."""
    program, image, podman = find_engine(step, plan.environ, host), step.targets[0], step.mode == "podman"
    if rest.legacy:
        step = step.replace(options={"identity": "user", **step.options})
    network, init = last_value(step, "--network", "--net"), bool(step.options.get("init"))
    on_host = network in ("", "host") and not step.options.get("no-host-network")
    spec = container_spec(step, plan, host, rest, on_host)
    supervision = spec.supervision
    name = "envkernel-{}-{}".format(rest.options.get("name", "kernel"), spec.shared or host.random())
    user = [*identity_tokens(step, spec, host), *gpu_tokens(step, host)]
    binds = [bind_token(bind, mount=True) for bind in read_binds(step.options.get("bind", []))]
    head = [program, "run", "--rm", "--pull=never", *(["--init"] if init else [])]
    run_once = [*head, *([] if network else ["--network=none"]), *user, *binds, *step.engine, image]
    uid = str(host.ids()[0])
    login = plan.environ.get("LOGNAME") or plan.environ.get("USER") or uid
    labels = {"": rest.options.get("name", "kernel"), ".user": login, ".uid": uid}
    head += [f"--name={name}", *(f"--label=envkernel{label}={value}" for label, value in labels.items())]
    head += ["--network=host"] if on_host and not network else []
    head += [*("--publish=" + port for port in spec.publish), *user]
    head += [bind_token(bind, mount=True) for bind in spec.binds]
    head += mount_options(step, spec, plan, host)
    environ, variables = variable_tokens(spec, plan, init)
    options = [*(["--workdir=" + spec.workdir] if spec.workdir else []), *variables]
    remove = [program, "rm", "-f", "-v", *(["-t", "0"] if podman else []), name]
    supervision.owner = int(step.options.get("guest", "-1"))
    supervision.litter = podman  # conmon marks an OOM kill by a file in its current directory
    supervision.explain = ContainerEnd(program, image, name, spec.path("oom"))
    if spec.shared:
        idle = [*head, *step.engine, "--detach", "--entrypoint=sleep", image, "2147483647"]
        alive = [program, "container", "inspect", "--format={{.State.Running}}", name]
        supervision.shared = Shared(alive, idle, remove, bool(step.options.get("keep")), supervision.copies)
        supervision.copies = []
        pid = spec.inside + "/pid"  # exec passes no signals on: a shell inside writes down the process group
        shell = [program, "exec", name, "sh", "-c"]
        supervision.signal = [*shell, 'kill -s "$0" -- "-$(cat "$1")"', "{signal}", pid]
        gone = 'test ! -e "$0" || kill -s KILL -- "-$(cat "$0")" || true'
        supervision.cleanup.append(["/bin/sh", "-c", '"$@" || true', "sh", *shell, gone, pid])
        note = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', pid]
        argv = [program, "exec", *options, name, *note, *spec.command]
    else:
        supervision.signal = [program, "kill", "--signal={signal}", name]
        supervision.container = name
        supervision.init = [program, "inspect", "--format={{.State.Pid}}", name] if podman and init else []
        supervision.cleanup.append(remove)
        argv = [*head, *options, *step.engine, image, *spec.command]
    install = "RUN pip install %s (a line for its Dockerfile)"
    plan = plan.replace(where=f"the image {image}", install=install, run_once=run_once, search=None)
    return plan.replace(argv=argv, environ=environ, supervision=supervision)


def identity_tokens(step: Step, spec: ContainerSpec, host: Host) -> list[str]:
    """Return the options that let files in bound directories belong to the user, and HOME be writable."""
    who = step.options.get("identity", "given")
    uid, gid, groups = host.ids()
    tokens = ["--security-opt=label=disable"] if step.options.get("no-selinux") else []
    if who.startswith("keep-id"):
        tokens.append("--userns=" + who)
    elif who == "root":
        tokens.append("--user=0:0")
    elif who == "user":
        tokens += [f"--user={uid}:{gid}", *(f"--group-add={group}" for group in groups if group != gid)]
    if who == "keep-id" or (who == "user" and uid):
        spec.environ["HOME"] = f"{spec.inside}/home"
        spec.supervision.files.append((spec.path("home/.envkernel"), b""))
    return tokens


def variable_tokens(spec: ContainerSpec, plan: Plan, init: bool) -> tuple[dict[str, str], list[str]]:
    """Return the environment of the engine's client and the options that set variables inside."""
    environ = {name: value for name, value in plan.environ.items() if name != "JPY_PARENT_PID"}
    tokens = [f"--env={name}={value}" for name, value in spec.environ.items()]
    # docker-init (tini) then interrupts what the kernel runs too, as the terminal's process group is
    tokens += ["--env=TINI_KILL_PROCESS_GROUP=1"] if init and not spec.shared else []
    lines = ""  # of a private file: in no argv, and no PATH or LD_LIBRARY_PATH that changes the client
    for name, value in plan.given.items():
        if value and value == value.strip() and not set(value) & set("\r\n\"'\\$#`"):
            lines += f"{name}={value}\n"
        else:
            environ[name] = value
            tokens.append("--env=" + name)
    if lines:
        spec.supervision.files.append((spec.path("env"), lines.encode(errors="surrogateescape")))
        tokens.append("--env-file=" + spec.path("env"))
    return environ, tokens


class ContainerEnd(Record):
    """Explains the end of a container of docker or podman: called with exit status, end of stderr, host."""

    program: str
    image: str
    name: str
    mark: str  # a file that exists after an OOM kill

    def __call__(self, status: int, said: str, host: Host) -> UserError | None:
        """Return the reason, by what the engine remembers of it, None where the exit status says all."""
        import time

        error = engine_error(self.program, self.image, status, said)
        if error or status not in (137, 143):
            return error
        asked = [self.program, "events", "--since=1h", f"--until={time.time():.9f}"]
        told = host.output([*asked, f"--filter=container={self.name}", "--format={{json .}}"], os.environ)
        if told.status:
            return engine_error(self.program, self.image, 125, "error waiting for container")
        events, engine = os.fsdecode(told.out).lower(), os.path.basename(self.program)
        events += '"action":"oom"' if host.exists(self.mark) else ""
        what = "was stopped (SIGTERM)" if status == 143 else "was killed (SIGKILL)"
        ends = {"kill": f"was killed ({engine} kill)", "stop": f"was stopped ({engine} stop)"}
        for event, reason in {**ends, "oom": "ran out of memory and was killed"}.items():
            what = reason if f'"action":"{event}"' in events or f'"status":"{event}"' in events else what
        hint = "Restart the kernel; if it ran out of memory, give it more (--memory), or use less."
        return UserError(f"The kernel's container {self.name} {what}.", hint, status)


def engine_refuses(status: int, said: str) -> bool:
    """Return whether docker or podman itself failed, not the program that it should have run."""
    own = any(line.startswith(("Error: ", "docker: ")) or "from daemon" in line for line in said.splitlines())
    program = ('exec: "', "exec /", "executable", "that was not found")
    return status == 125 or (status in (126, 127) and own and not any(sign in said for sign in program))


def engine_error(program: str, image: str, status: int, said: str) -> UserError | None:
    """Return the error for what an engine's client says it could not do, None for anything else."""
    engine, refuses = os.path.basename(program), engine_refuses(status, said)
    error = explain("engine", said, engine=engine, image=image) if refuses or status == 1 else None
    if error and image.startswith("sha256:") and error.message.startswith("There is no image"):
        error.message = "The image that was built for this kernel is gone."
        error.hint = "Build it again: envkernel update NAME"
    if refuses and not error:
        return UserError(f"{engine} can't start the container.", "Correct what it says.", 1, said.strip())
    if status in (126, 127) and not error:
        hint = "Add it to the image's Dockerfile, for example: RUN pip install ipykernel"
        return UserError(f"The image {image} can't run the kernel's program.", hint, 127, said.strip())
    return error


# -- singularity and apptainer --


def apptainer_step(step: Step, legacy: bool = False) -> Step:
    """Return a step with the binds of the engine's own options among envkernel's."""
    engine, options = list(step.engine), dict(step.options)
    if legacy and "workdir" in options:  # 1.x handed it to the engine, as where a contained /tmp is; now -W
        engine.append("--workdir=" + options.pop("workdir"))
    binds = [*options.pop("bind", []), *engine_values(engine, "--bind")]
    if binds:
        options["bind"] = [str(bind) for bind in read_binds(binds, commas=True)]
    engine = [token for token in engine if not token.startswith("--bind=") and token != "--network=host"]
    return step.replace(options=options, engine=engine)


def apptainer_shares_host(engine: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Return whether a container of Apptainer is on the host's network."""
    names = ("APPTAINER_NET", "APPTAINER_NETWORK", "SINGULARITY_NET", "SINGULARITY_NETWORK")
    return not (engine_values(engine, "--net", "--network", "--netns-path") or any(map(environ.get, names)))


def plan_apptainer(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan a kernel in a container of Apptainer or Singularity.  Raises UserError for what is missing."""
    program = find_engine(step, plan.environ, host)
    if "program" not in step.options:
        step = apptainer_step(step, rest.legacy)
    image, inside = step.targets[0], INSIDE
    if "://" not in image and not host.exists(image):
        hint = "Restore it; if it was fetched or built at setup: envkernel update NAME."
        raise UserError(f"There is no image {image}.", hint)
    if step.options.get("place") == "tmp":  # no mount points in a writable image; /tmp is the host's, or new
        inside = "/tmp/envkernel" * bool(engine_values(step.engine, "--contain", "--containall", "--compat"))
    on_host = apptainer_shares_host(step.engine, plan.environ)
    if not on_host:  # it publishes no ports
        step = step.replace(options={**step.options, "transport": "ipc"})
    spec = container_spec(step, plan, host, rest, on_host, inside)
    supervision = spec.supervision
    head = [*gpu_tokens(step, host), *step.engine]
    mounts = [bind_token(bind, mount=False) for bind in spec.binds] + mount_options(step, spec, plan, host)
    workdir = ["--pwd=" + spec.workdir] if spec.workdir else []
    supervision.leader = False  # it passes signals on to the kernel, which has them already
    supervision.explain = ApptainerEnd(image, oom_kills(host))
    argv = [program, "run" if step.options.get("runscript") else "exec"]
    if spec.shared:
        name = "envkernel-" + spec.shared
        stop = ["/bin/sh", "-c", '"$@" || true', "sh", program, "instance", "stop", name]
        alive = [program, "exec", "instance://" + name, "echo", "true"]
        start = [program, "instance", "start", *head, *mounts, image, name]
        supervision.shared = Shared(alive, start, stop, bool(step.options.get("keep")))
        argv += [*workdir, "instance://" + name, *spec.command]
    else:
        argv += [*head, *mounts, *workdir, image, *spec.command]
    binds = [bind_token(bind, mount=False) for bind in read_binds(step.options.get("bind", []))]
    install = "pip install %s (a line for %%post of its definition file)"
    plan = plan.replace(where=f"the image {image}", install=install, search=None)
    plan.run_once = [program, "exec", *head, *binds, image]
    harm = ("PYTHON", "IPYTHONDIR", "R_HOME", "R_LIBS", "CONDA_", "_CONDA", "_CE_", "VIRTUAL_ENV", "LD_")
    leaks = (*harm, "JPY_", "JUPYTER")  # what would change a kernel in an image, and what is Jupyter's own
    environ = {name: value for name, value in plan.environ.items() if not name.startswith(leaks)}
    for family in ("APPTAINER", "SINGULARITY"):
        environ.setdefault(f"{family}_NO_EVAL", "1")  # no shell evaluates the values
        given = {"PYTHONNOUSERSITE": "1", **spec.environ, **plan.given}
        environ.update({f"{family}ENV_{name}": value for name, value in given.items()})
    return plan.replace(argv=argv, environ=environ, supervision=supervision)


def oom_kills(host: Host) -> int:
    """Return how many processes Linux has killed on this machine because memory ran out (/proc/vmstat)."""
    lines = (host.read("/proc/vmstat") or b"").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")), 0)


class ApptainerEnd(Record):
    """Explains the end of a container of Apptainer: called with exit status, end of stderr and host."""

    image: str
    oom_kills: int = 0

    def __call__(self, status: int, said: str, host: Host) -> UserError | None:
        """Return the reason, None where the exit status says all."""
        if status in (137, -9):
            memory = ", most likely because memory ran out" * (oom_kills(host) > self.oom_kills)
            message = f"The kernel in a container of {self.image} was killed (SIGKILL){memory}."
            return UserError(message, "If it ran out of memory, ask for more, or use less.", status)
        lines = [line for line in said.splitlines() if line.startswith(("FATAL:", "\x1b[31mFATAL"))]
        if status != 255 or not lines:
            return None
        other = UserError(f"The container of {self.image} can't be started.", "Correct what the engine says.")
        error = explain("apptainer", "\n".join(lines), image=self.image) or other
        error.detail = said.strip()
        return error


# -- setup of all container modes --

_HOST_PATHS = ("volume", "overlay", "env-file", "apply-cgroups", "pem-path", "authfile")
"""Options of the engines whose value is a path on the host, up to a colon."""


def setup_container(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> Step:
    """Check engine, options and image, which is built or fetched; find out what each start has to know."""
    apptainer = step.mode in APPTAINER_PROGRAMS
    step = apptainer_step(step) if apptainer else step
    program = find_engine(step, environ, host)
    options = {**step.options, "program": program}
    if "engine" in options:
        options["engine"] = program
    if "bind" in options:
        options["bind"] = setup_binds(options["bind"], host)
    if common.get("kernel") == OWN_COMMAND and apptainer:
        options["runscript"] = True
    if not (step.targets or "build" in options or "uri" in options):
        raise usage_error(f"{step.mode} needs IMAGE.", "Give an image, or build one: --build PATH.")
    unwanted = ("--interactive", "--tty", "--rm", "--detach")  # from a command line for a terminal
    engine = [absolute_value(token, step.mode, host) for token in step.engine if token not in unwanted]
    step = step.replace(options=options, engine=engine)
    refuse_options(step)
    if "build" in options:
        for_build = image_tokens(step, host, environ)
        step.engine = [token for token in engine if token not in for_build]
        options["build"] = host.absolute(options["build"])
        options["build-option"] = [*options.get("build-option", []), *for_build]
    if apptainer:
        odd = [entry.partition("=")[0] for entry in common.get("env", []) if set(entry) & set('$`\\"')]
        about = host.output([program, "exec", "--help"], environ).out if odd else b""
        if odd and "--no-eval" not in read_engine_help(os.fsdecode(about)):
            hint = "Take $, `, \\ and quotes out of the value, or use a newer engine."
            raise UserError(f"This {program} is too old to set {odd[0]} as it is.", hint)
        return probe_image(need_sif(step, host, environ, common), host, environ)
    step = engine_info(step, host, environ)
    need = build_image if "build" in options else need_image
    step = probe_image(step.replace(targets=[need(step, host, environ, common)]), host, environ)
    chosen = {"pwd", "copy-workdir", "workdir"} & options.keys() or last_value(step, "--workdir")
    if not (chosen or common.get("dry-run")):
        print("What the kernel writes into its directory is lost with the container (keep it: --pwd).")
    return step


def absolute_value(token: str, mode: str, host: Host) -> str:
    """Return an engine option whose value begins with a path of the host with that path absolute."""
    flag, _, value = token.partition("=")
    path, colon, rest = value.partition(":")
    own = mode in APPTAINER_PROGRAMS and flag in ("--workdir", "--home")
    if not path or not (own or flag[2:] in _HOST_PATHS) or (flag == "--volume" and path[0] not in ".~"):
        return token  # a volume of docker's is a path only where it looks like one
    return f"{flag}={host.absolute(path)}{colon}{rest}"


def refuse_options(step: Step) -> None:
    """Raise UserError (status 2) for options that exclude each other."""
    options = step.options
    apart = ("copy-workdir", *(("pwd", "mount") if step.mode in APPTAINER_PROGRAMS else ()))
    for name in apart if options.get("shared") else ():
        if options.get(name):
            hint = "All kernels of a container have the same files: use --bind, with --workdir."
            raise usage_error(f"--{name} and --shared exclude each other.", hint)
    shown = options.get("bind") or engine_values(step.engine, "--volume")
    if options.get("shared") and options.get("pwd") and not shown:
        hint = "Show them with --bind, for example: --bind ~/notebooks."
        raise usage_error("--pwd with --shared needs the directories of the notebooks.", hint)
    if options.get("transport") == "tcp" and last_value(step, "--network", "--net") == "none":
        raise usage_error("--transport=tcp needs a network.", "Leave it or --network=none out.")


def image_tokens(step: Step, host: Host, environ: Mapping[str, str]) -> list[str]:
    """Return the engine's options that are for fetching or building the image."""
    if not step.engine:
        return []
    verb, program = "exec" if step.mode in APPTAINER_PROGRAMS else "run", step.options["program"]
    start, pull = (EngineOptions([[program, command]], host, environ) for command in (verb, "pull"))
    flags = {token: token.partition("=")[0] for token in step.engine}
    return [token for token, flag in flags.items() if flag in pull.known or not start.find(flag)]


def engine_info(step: Step, host: Host, environ: Mapping[str, str]) -> Step:
    """Return the step with what docker, or podman by whatever name, reports that each start has to know."""
    program = step.options["program"]
    said = host.output([program, "info", "--format={{json .}}"], environ)
    try:
        info = dict(from_json(said.out))
    except (ValueError, TypeError):
        info = {}
    if said.status or not info or info.get("ServerErrors"):
        errors = " ".join([os.fsdecode(said.err), *map(str, info.get("ServerErrors") or [])])
        raise engine_error(program, "", 125, errors) or UserError(f"{program} does not work.", "", 1, errors)
    machine = info.get("host") or {}  # only podman's says so
    security = machine.get("security", {})
    docker_security = " ".join(info.get("SecurityOptions") or [])
    rootless = security.get("rootless", "name=rootless" in docker_security)
    desktop = "Docker Desktop" in str(info.get("OperatingSystem")) or machine.get("serviceIsRemote", False)
    identity = ("keep-id" if machine else "root") if rootless else "user"
    recorded = {
        "identity": "given" if engine_values(step.engine, "--user", "--userns") else identity,
        "no-selinux": security.get("selinuxEnabled", "name=selinux" in docker_security),
        "no-host-network": desktop or (rootless and not machine),
        "reach": "tcp" * bool(desktop),
        "engine": program if machine and step.mode != "podman" else step.options.get("engine"),
    }
    options = {**step.options, **{name: value for name, value in recorded.items() if value}}
    return step.replace(options=options, mode="podman" if machine else step.mode)


def need_image(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> str:
    """Return the image of a step once it is here; a person at a terminal is asked before it is fetched."""
    program, image, when = step.options["program"], step.targets[0], step.options.get("pull")
    is_here = not host.output([program, "image", "inspect", image], environ).status
    if is_here and (when != "always" or common.get("dry-run")):
        return image
    fetch = f"{os.path.basename(program)} pull"
    missing = UserError(f"There is no image {image} here.", f"Fetch it: {fetch} {image}")
    if when == "never" or common.get("dry-run"):
        raise missing
    if not is_here:
        print(f"There is no image {image} here yet.", flush=True)
    if not when and not host.agrees(f"Fetch it now ({fetch} {image})?"):
        raise missing
    if host.show([program, "pull", *image_tokens(step, host, environ), image], environ):
        hint = "See above; correct its name, or build it: --build DIR."
        raise UserError(f"The image {image} can't be fetched: {fetch} failed.", hint)
    return image


def build_image(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> str:
    """Build the image of ``--build DIR``; return its id.  A tag keeps it from `image prune`."""
    import tempfile

    program, directory = step.options["program"], step.options["build"]
    if step.targets and not step.targets[0].startswith("sha256:"):
        step.options["build-option"].append("--tag=" + step.targets[0])  # update finds it there
    options = list(step.options["build-option"])
    if not any(token.split("=")[0] in ("-f", "--file") for token in options):
        names = [name for name in ("Dockerfile", "Containerfile") if host.exists(f"{directory}/{name}")]
        if not names:
            raise UserError(f"There is no Dockerfile or Containerfile in {directory}.", "Correct --build.")
        options += [f"--file={directory}/{names[0]}"] if names[0] != "Dockerfile" else []
    if common.get("dry-run"):
        show_build([program, "build", *options, directory])
    name = common.get("name", "kernel").lower()  # as Jupyter has it
    marks = [f"--tag={image_tag(name, host)}", f"--label=envkernel.image={name}"]
    with tempfile.TemporaryDirectory() as scratch:  # a build that fails removes the file
        words = [program, "build", f"--iidfile={scratch}/id", *marks, *options, directory]
        status = host.show(words, environ)
        image = os.fsdecode(host.read(scratch + "/id") or b"").strip()
    if status or not image:
        raise UserError(f"The image of {directory} can't be built.", "Correct what the build says above.")
    return image


def image_tag(name: str, host: Host) -> str:
    """Return the tag of the image that this user builds for a kernel, in the letters that tags may have."""
    plain = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    return f"envkernel/{plain or 'kernel'}:{host.ids()[0]}"


def remove_built_image(step: Step, name: str, host: Host) -> None:
    """Remove what ``--build`` has made for a kernel, unless a container or another tag still uses it."""
    program = step.options.get("program", "")
    built = step.mode in ("docker", "podman") and "".join(step.targets).startswith("sha256:")
    if built and host.is_executable(program):
        mine = f"--filter=label=envkernel.image={name.lower()}"
        for words in (["rmi", image_tag(name, host)], ["image", "prune", "--force", mine]):
            host.output([program, *words], launch_environ(host))


def show_build(argv: Sequence[str]) -> NoReturn:
    """Show what would be built, and end a dry run: the rest of the kernel.json is read from the image."""
    import shlex

    print("This would be built, and the kernel looked for in it:", shlex.join(argv), sep="\n")
    raise SystemExit(0)


def need_sif(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> Step:
    """Return the step with its image's absolute path, built or (again at an update) fetched if asked for."""
    options, image = dict(step.options), "".join(step.targets)
    if "://" in image:
        options["uri"], image = image, ""
    program, build, uri = options["program"], options.get("build", ""), options.get("uri", "")
    if not image:
        base = common.get("prefix") or (sys.prefix if common.get("sys-prefix") else "/usr/local")
        own = environ.get("XDG_DATA_HOME") or environ.get("HOME", host.home()) + "/.local/share"
        name = os.path.basename(build or uri)
        name = name[:-4] if name.endswith((".def", ".sif")) else name.replace(":", "_").replace("@", "_")
        data = own if common.get("user") else base + "/share"
        image = f"{data}/envkernel/images/{name}-{kernel_key(uri or build)[:8]}.sif"
    image = host.absolute(image)
    step = step.replace(options=options, targets=[image])
    when, dry, exists = options.get("pull", "missing"), common.get("dry-run"), host.exists(image)
    again = when == "always" or (common.get("update") and when != "never")
    if build and (host.isdir(build) or not host.exists(build)):
        raise UserError(f"There is no definition file {build}.", "Give one: --build FILE.def.")
    words = [program, "build", *options.get("build-option", []), image, build]
    if build and dry:
        show_build(words)
    if not build and exists and (not uri or dry or not again):
        return step
    if not build and (not uri or dry or when == "never"):
        hint = f"Fetch it: {step.mode} pull {image} {uri}" if uri else "Correct its path, or give a URI."
        raise UserError(f"There is no image {image}.", hint)
    if not build:
        print(f"Fetching {uri} to {image}", flush=True)
        words = [program, "pull", *image_tokens(step, host, environ), image, uri]
    if host.produce(words, image, environ, os.path.dirname(build) or None):
        failed = f"of {build} can't be built" if build else f"{uri} can't be fetched"
        raise UserError(f"The image {failed}.", "Correct what the engine says above.")
    return step


def probe_image(step: Step, host: Host, environ: Mapping[str, str]) -> Step:
    """Start the image with a program that does not exist; return the step with what the engine needs."""
    apptainer, image, program = step.mode in APPTAINER_PROGRAMS, step.targets[0], "/no/such/program"
    tries: list[dict[str, Any]] = [{"init": True}, {}, {"init": True, "place": "home"}, {"place": "home"}]
    if apptainer:
        tries = [{}, {"place": "tmp"}][: 1 if step.options.get("shared") else 2]
    untried = ("mount", "pwd", "copy-workdir", "workdir", "runscript", "shared")
    curable = ("exist in container",) if apptainer else ("init", "source path", "statfs", "mount")
    for extra in tries:
        options = {name: value for name, value in step.options.items() if name not in untried}
        tried, start = step.replace(options={**options, **extra}), Plan([program], dict(environ))
        said = host.try_plan(MODES[step.mode].plan(tried, start, host, Launch([], [])))
        text, status = os.fsdecode(said.err), said.status
        refused = status and program not in text if apptainer else engine_refuses(status, text)
        if not refused and "docker-init" not in text:
            step = step.replace(options={**step.options, **extra})
            return step if apptainer else container_user(step, host, environ)
        if not any(sign in text for sign in curable):
            break
    error = ApptainerEnd(image)(255, text, host) if apptainer else None
    error = error or engine_error(step.options["program"], image, status or 125, text)
    raise error or UserError(f"The image {image} can't be run.", "Correct what it says.", 1, text)


def container_user(step: Step, host: Host, environ: Mapping[str, str]) -> Step:
    """Return the step with what lets a user of the user's choice (``--user=X``) use the private directory."""
    if step.options["identity"] != "given":
        return step
    plan = plan_engine(step, Plan([], dict(environ)), host, Launch([], []))
    said = host.output([*plan.run_once, "sh", "-c", "id -u; id -g; cat /proc/self/uid_map"], plan.environ)
    try:
        uid, gid, *rows = [int(word) for word in said.out.split()]
    except ValueError:  # an image without these programs
        return step
    outside = [there + uid - here for here, there, n in zip(*[iter(rows)] * 3) if here <= uid < here + n]
    me, options = host.ids()[0], dict(step.options)
    offline = last_value(step, "--network", "--net") == "none"
    if not outside or outside[0] == me:
        return step
    if not me:
        options["guest"] = str(outside[0])
    elif uid and step.mode == "podman" and not last_value(step, "--userns"):
        options["identity"] = f"keep-id:uid={uid}" + (f",gid={gid}" if gid else "")  # gid=0 fails
    elif outside[0] or offline:  # root can read all; its sockets are closed to others, but not TCP
        message = f"The kernel would be another user than you (number {outside[0]}) and could not be reached."
        hint = "Leave --user and --userns out, or use podman; --user=root can be had with a network."
        raise UserError(message, hint)
    if options != step.options and options.get("shared"):
        raise usage_error("--shared is for kernels that run as you.", "Leave --user or --shared out.")
    return step.replace(options=options)


def look_inside(plan: Plan, host: Host, command: Sequence[str]) -> tuple[Plan, Host]:
    """Return the plan of a kernel command as it is seen inside of its container, if any, and host there."""
    if not plan.run_once:
        return plan, host
    world = host if isinstance(host, ImageHost) else ImageHost(host, plan.run_once, plan.environ)
    if not world.programs:
        hint = "If the image has an entrypoint, switch it off: --entrypoint=; or use --kernel=image."
        raise UserError(f"No shell can be run in {plan.where}.", hint, 1, os.fsdecode(world.said.err).strip())
    return plan.replace(argv=list(command), search=world.search), world


def find_transport(launch: Launch, host: Host, environ: Mapping[str, str]) -> Step:
    """Return the last step of a launch, for a container with how its kernel, started once, was reached."""
    step = launch.steps[-1]
    if not MODES[step.mode].container or {"transport", "reach"} & step.options.keys():
        return step
    untried = ("mount", "pwd", "copy-workdir", "shared", "keep")
    options = {name: value for name, value in step.options.items() if name not in untried}
    tried = step.replace(options={**options, "transport": "ipc"})
    apart = step.mode in APPTAINER_PROGRAMS and not apptainer_shares_host(step.engine, environ)
    if host.listens(launch.replace(steps=[*launch.steps[:-1], tried]), environ):
        reach = "ipc"
    elif not apart and last_value(step, "--network", "--net") != "none":
        reach = "tcp"
    else:
        text = "The kernel was not seen on unix sockets, and a container without network has no others."
        print(text, "Test it (envkernel check), or let it have a network.", file=sys.stderr)
        return step
    return step.replace(options={**step.options, "reach": reach})


_URI = Option("--uri", "Where to fetch IMAGE from, and again at each update.", "URI")
for _name in ("docker", "podman", "singularity", "apptainer"):
    _apptainer = _name in APPTAINER_PROGRAMS
    _verb = f"{_name} exec" if _apptainer else f"{_name} run"
    register(
        Mode(
            _name,
            f"Run the kernel in a container of {_name.title()}; takes the options of `{_verb}` too.",
            [*CONTAINER_OPTIONS, _URI] if _apptainer else CONTAINER_OPTIONS,
            setup_container,
            plan_apptainer if _apptainer else plan_engine,
            target="IMAGE",
            targets=(0, 1),
            container=True,
            engine=container_commands,
            example=f"envkernel {_name} --user --name=course --pwd --bind /data:/coursedata:ro IMAGE",
        )
    )


# ---- cluster modes ------------------------------------------------------------------------------

NODE_BOOT = (
    "import marshal,sys,zlib;from importlib.util import MAGIC_NUMBER as M;f=sys.stdin.buffer;"
    "g,*n=f.readline().split();c,s=(zlib.decompress(f.read(int(x))) for x in n);"
    "m=sys.modules['envkernel']=type(sys)('envkernel');"
    "exec(marshal.loads(c) if g==M.hex().encode() else compile(s,'envkernel.py','exec'),m.__dict__);"
    "c=s=0;sys.exit(m.agent_main(f))"
)
"""What a node's Python gets with ``-c``: read this file from stdin (see `own_code`) and be the agent."""

NODE_OPTIONS = [
    Option("--queue-timeout", "Give up when the job has not started by then.", "SECONDS", run=True),
    Option("--linger", "Keep the job so long for a restart of its kernel (default: 5).", "SECONDS", run=True),
    Option("--tunnel", "Encrypt the way to the node (with ssh).", "PROGRAM", choices=("ssh",), run=True),
    Option("--node-ports", "Ports on the nodes that can be reached (default: any).", "FIRST-LAST", run=True),
    Option("--node-transport", "Sockets on the node: ipc or tcp.", "HOW", choices=("ipc", "tcp"), run=True),
    recorded("--tunnel-program", "The program of the tunnel.", "PATH"),
]
"""Options that both cluster modes have."""

# what would break the one task and its stdin and stdout, on which the agent depends
SRUN_REFUSED = ("--multi-prog", "--ntasks", "--nodes", "--pty", "--input", "--output", "--label", "--quiet")


if TYPE_CHECKING:
    Ask = Callable[[Sequence[str]], Awaitable["Output"]]  # `Submission.ask`
    Job = Union["SlurmJob", "YarnJob"]


class ClusterJob(Record):
    """A kernel that another machine runs: the program that holds the job, and what travels to the node.

    launch: the rest of the chain.  queue_timeout, linger: seconds; no time-out if 0.  tunnel: path of ssh,
    empty for none.  spec: what Skein's client needs to know of the application.
    """

    detached = False  # whether the program may end once the agent is there
    patience = 10.0  # seconds that a command of the cluster's may take
    grace = 0.0  # seconds that the program has for taking its job back when stdin ends before the agent comes

    def __init__(
        self, argv: list[str], environ: dict[str, str], launch: Launch, options: Any, spec: Any = None
    ) -> None:
        self.argv, self.environ, self.spec = argv, environ, spec or {}
        self.launch = launch.replace(options={**launch.options})
        self.queue_timeout = read_seconds(options, "queue-timeout", 0)
        self.linger = read_seconds(options, "linger", 5)
        self.tunnel = options.get("tunnel-program", "")
        self.node_ports = options.get("node-ports", "")
        self.transport = options.get("node-transport", "ipc")


def read_seconds(options: Mapping[str, Any], name: str, default: float) -> float:
    """Return an option's value in seconds.  Raises UserError (status 2) for what is no number."""
    text = options.get(name, default)
    try:
        return max(float(text), 0)
    except ValueError:
        raise usage_error(f"--{name} takes seconds, not {text!r}.", f"For example: --{name}=60.") from None


def check_node_options(options: dict[str, Any], host: Host, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of both cluster modes with the path of the tunnel's program.  Raises UserError."""
    for name in ("queue-timeout", "linger"):
        read_seconds(options, name, 0)
    ports = options.get("node-ports", "1-1")
    first, _, last = ports.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        raise usage_error(f"--node-ports={ports} is no range of ports.", "Write --node-ports=5000-5100.")
    if "tunnel" not in options:
        return options
    program = search_program(options["tunnel"], path_entries(environ), host)
    if not program:
        raise UserError("There is no ssh on this machine.", "Install it, or leave --tunnel out.")
    return {**options, "tunnel-program": program}


def cluster_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what of Jupyter's environment may travel to the cluster: all but Jupyter's own secrets."""
    return {name: value for name, value in environ.items() if not name.startswith(("JPY_", "JUPYTERHUB_"))}


class SlurmJob(ClusterJob):
    """A job of Slurm, held by srun."""

    what = "Slurm job"

    def feed(self, orders: Mapping[str, Any]) -> bytes:
        """Return what the program gets on stdin."""
        return own_code() + to_json(orders) + b"\n"

    def directories(self, notebook: str) -> list[str]:
        """Return where the kernel may start on its node, the best first; where the agent does if empty."""
        given = any(token.startswith("--chdir") for token in self.argv)
        return [] if given or "SLURM_WORKING_DIR" in self.environ else [notebook, os.path.expanduser("~")]

    def read_state(self, said: str, known: str) -> tuple[str, bool, str]:
        """Return the job's id, whether `pending` knows more, and what it waits for, from stderr."""
        import re

        found = re.findall(r"^srun: job (\d+) (queued|has been allocated)", said, re.M)
        number, word = found[-1] if found else (known, "")
        return number, word == "queued", ""

    async def pending(self, number: str, ask: Ask) -> str:
        """Return what the job waits for; empty where that is not known."""
        import time

        said = await ask([self.tool("squeue"), "-h", "-j", number, "-t", "PENDING", "-o", "%r|%S"])
        reason, _, start = os.fsdecode(said.out).strip().partition("|")
        if said.status or not reason:
            return ""
        text = f"Slurm job {number} waits: {reason}"
        text += f" ({PENDING[reason]})" if reason in PENDING else ""
        day, _, clock = start.partition("T")
        day = "" if day == time.strftime("%Y-%m-%d") else day + " "
        return f"{text}; expected start {day}{clock[:5]}" if clock else text

    def cancel(self, session: int, number: str) -> list[str]:
        """Return the command that ends a job: by session and time while srun has not said its number."""
        import time

        if any(token.startswith("--jobid") for token in self.argv):
            return []  # srun starts a step in a job of the user's
        if number:
            return [self.tool("scancel"), "--quiet", number]
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 5))
        tools = [self.tool("squeue"), self.tool("scancel")]
        return ["/bin/sh", "-c", CANCEL_OF_SESSION, "sh", *tools, str(os.getuid()), str(session), since]

    async def explain(self, message: str, said: str, number: str, ask: Ask) -> UserError:
        """Return why the job is over.  message: what is seen of it here.  said: the end of stderr."""
        import asyncio

        error = slurm_error(said, number)
        for _ in range(5 if number and not error else 0):
            state = await ask([self.tool("squeue"), "-h", "-t", "all", "-j", number, "-o", "%T"])
            said += f"\nsrun: state of the job: {os.fsdecode(state.out).strip()}"
            error = slurm_error(said, number)
            if error or state.out.strip() not in (b"RUNNING", b"COMPLETING"):
                break
            await asyncio.sleep(0.4)
        hint = "Start the kernel again; `sacct` may know more."
        return error or UserError(message, hint, detail=srun_lines(said))

    def tool(self, name: str) -> str:
        """Return the path of another of Slurm's programs."""
        return os.path.join(os.path.dirname(self.argv[0]), name)


CANCEL_OF_SESSION = """
jobs=$("$1" -h -u "$3" -O JobID,AllocSID,SubmitTime) || exit 1
echo "$jobs" | while read -r job session time; do
    if [ "$session" = "$4" ] && expr "$time" '>' "$5" > /dev/null; then "$2" --quiet "$job"; fi
done
"""
"""Cancels what was submitted in a session since a time; the paths and numbers are its arguments."""

PENDING = {"Priority": "others are before it", "Resources": "no node has enough room"}


def srun_lines(said: str) -> str:
    """Return what Slurm said: its lines begin within one of the kernel's where that has not ended it."""
    import re

    return "\n".join(re.findall(r"(?:srun: |slurmstepd[:-]|allocation failure: ).*", said))


def slurm_error(said: str, number: str = "") -> UserError | None:
    """Return the error for what Slurm said of a job's end or refusal, None where that is not known."""
    import re

    reported = srun_lines(said)
    reason = re.search(r"(?:Unable to allocate resources|allocation failure): (.*)", reported)
    refused = reason[1].strip().rstrip(".") if reason else ""
    return explain("srun", reported, job=f"Slurm job {number}".strip(), reason=refused)


def srun_commands(
    mode: str, tokens: Sequence[str], environ: Mapping[str, str], host: Host
) -> list[list[str]]:
    """Return the command whose options may be given.  Raises UserError without srun."""
    srun = search_program("srun", path_entries(environ), host)
    if not srun:
        hint = "Set the kernel up where jobs can be submitted, or load the module that brings Slurm first."
        raise UserError("There is no srun on this machine.", hint)
    return [[srun]]


def setup_slurm(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> Step:
    """Check that Slurm would take such a job.  Raises UserError where it would not, or is not there."""
    options = check_node_options(step.options, host, environ)
    srun = srun_commands(step.mode, [], environ, host)[0][0]
    for flag in (token.partition("=")[0] for token in step.engine):
        if any(refused.startswith(flag) for refused in SRUN_REFUSED):
            message = f"{flag} can't be used: a kernel is one task with its own pipes."
            raise usage_error(message, "Leave it out.")
    ask_slurm(step, srun, host, environ)
    return step.replace(options={**options, "srun": srun})


def ask_slurm(step: Step, srun: str, host: Host, environ: Mapping[str, str]) -> None:
    """Raise UserError unless Slurm would take such a job now or later; none is submitted."""
    argv = [srun, "--test-only", "--nodes=1", "--ntasks=1", *step.engine, "true"]
    test = host.output(argv, job_environ(environ, step.engine))
    if test.status:
        said = os.fsdecode(test.err).strip()
        message = f"Slurm can't be asked whether it takes such a job (srun: exit status {test.status})."
        raise slurm_error(said) or UserError(message, "`sinfo` has to work here.", detail=said)


def job_environ(environ: Environ, engine: Sequence[str]) -> dict[str, str]:
    """Return the environment for srun: where Jupyter runs in a job itself, without that job's variables."""
    if "SLURM_JOB_ID" not in environ or any(token.startswith("--jobid") for token in engine):
        return dict(environ)
    inside = {name for name in environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_"))}
    return {name: environ[name] for name in environ if name not in inside - {"SLURM_CONF"}}


def plan_slurm(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan the job: srun with the rest of the chain for a node.  Raises UserError where srun is gone."""
    srun = step.options["srun"]
    if not host.is_executable(srun):
        hint = "Set the kernel up again: envkernel update NAME."
        raise UserError(f"There is no {srun} any more.", hint, 127)
    environ = job_environ(cluster_environ(plan.environ), step.engine)
    argv = [srun, "--nodes=1", "--ntasks=1"]
    if not any(token.startswith("--job-name") for token in step.engine):
        argv.append("--job-name=" + rest.options.get("name", "envkernel"))
    argv += [*step.engine, step.options.get("node-python", "python3"), "-I", "-S", "-c", NODE_BOOT]
    plan = plan.replace(argv=argv, environ=environ, search=None, install="install %s on the nodes")
    return plan.replace(where="the Slurm job", job=SlurmJob(argv, environ, rest, step.options))


class YarnJob(ClusterJob):
    """An application of YARN, submitted with Skein by a helper process that ends once the agent is there."""

    what = "YARN application"
    detached = True
    patience = 30.0
    grace = 8.0

    def feed(self, orders: Mapping[str, Any]) -> bytes:
        return to_json({"spec": self.spec, "orders": dict(orders)}) + b"\n"

    def directories(self, notebook: str) -> list[str]:
        # files are sent into the container's own directory
        return [notebook] if list(self.spec["files"]) == ["envkernel.py"] else []

    def read_state(self, said: str, known: str) -> tuple[str, bool, str]:
        import re

        known = (re.findall(f"^{YARN_SAYS} application (application_\\w+)", said, re.M) or [known])[-1]
        waits = re.findall(r"^envkernel: (YARN application \w+ waits: .*)", said, re.M)
        return known, False, waits[-1] if waits else ""

    async def pending(self, known: str, ask: Ask) -> str:
        return ""  # the helper says it

    def cancel(self, session: int, known: str) -> list[str]:
        return [*self.argv[:-1], "kill", known] if known else []

    async def explain(self, message: str, said: str, known: str, ask: Ask) -> UserError:
        if not known:
            return UserError(message, "What it said is below.", detail=said.strip())
        return client_error(await ask([*self.argv[:-1], "report", known]))


YARN_SAYS = "envkernel: YARN"  # how a line of the helper's about the application begins


def setup_yarn(step: Step, host: Host, environ: Mapping[str, str], common: Mapping[str, Any]) -> Step:
    """Raise UserError unless the packed environment, Skein, Java, ``yarn`` and the queue are there."""
    options = check_node_options(step.options, host, environ)
    for name in ("memory", "vcores"):
        if not options.get(name, "1").isdigit() or int(options.get(name, "1")) < 1:
            raise usage_error(f"--{name} takes a number, not {options[name]!r}.", f"For example: --{name}=2.")
    path = host.absolute(step.targets[0])
    names = archive_names(path)
    if names is None:
        hint = "Make it: conda pack -o environment.tar.gz, or venv-pack -o environment.tar.gz."
        raise UserError(f"There is no packed environment {path} (a .tar.gz).", hint)
    needs = {"bin/activate": "", "bin/python": "", "skein": "/__init__.py", "ipykernel": "_launcher.py"}
    for need in list(needs)[: 3 if "kernel-cmd" in common else 4]:
        end = f"/site-packages/{need}{needs[need]}" if needs[need] else f"/{need}"
        if not any(f"/{name}".endswith(end) for name in names):
            hint = "Pack an environment that has skein and ipykernel, with conda-pack or venv-pack."
            raise UserError(f"The packed environment {path} has no {need}.", hint)
    files = []
    for entry in options.get("file", []):
        name, _, source = entry.partition("=")
        if not name or "/" in name or name in ("environment", "envkernel.py") or not source:
            raise usage_error(f"--file {entry} names no file.", "Write it as --file NAME=PATH.")
        if not host.exists(host.absolute(source)):
            raise UserError(f"There is no {source} to send along.", "Check the path that --file has.")
        files.append(f"{name}={host.absolute(source)}")
    java = host.is_executable(environ.get("JAVA_HOME", "") + "/bin/java")
    for program in ("yarn",) if java else ("java", "yarn"):
        if not search_program(program, path_entries(environ), host):
            hint = "Set the kernel up on an edge node of the cluster, or load the module that brings it."
            raise UserError(f"There is no {program} on this machine.", hint)
    said = host.output([*yarn_client(), "check", options.get("queue", "default")], environ)
    if said.status:
        raise client_error(said)
    return step.replace(options={**options, **({"file": files} if files else {})}, targets=[path])


def yarn_client() -> list[str]:
    """Return how the helper is started that speaks with YARN."""
    return [*launcher(sys.executable, os.path.abspath(__file__)), "yarn", "client"]


def client_error(said: Output) -> UserError:
    """Return the error that the helper has reported."""
    for line in said.out.splitlines():
        if line.startswith(ANNOUNCES):
            return UserError(**from_json(line[len(ANNOUNCES) :])["error"])
    hint = "See below; `yarn application -list` has to work here."
    return UserError("Skein could not speak with YARN.", hint, detail=os.fsdecode(said.err).strip()[-TAIL:])


def plan_yarn(step: Step, plan: Plan, host: Host, rest: Launch) -> Plan:
    """Plan the application.  Raises UserError where the packed environment is gone."""
    path = step.targets[0]
    if not host.exists(path):
        hint = "Pack the environment again, or set the kernel up with another one."
        raise UserError(f"There is no {path} any more.", hint)
    files = dict(entry.partition("=")[::2] for entry in step.options.get("file", []))
    spec = {
        "name": rest.options.get("name", "envkernel"),
        "queue": step.options.get("queue", "default"),
        "memory": int(step.options.get("memory", 1024)),
        "vcores": int(step.options.get("vcores", 1)),
        "environment": path,
        "files": {**files, "envkernel.py": os.path.abspath(__file__)},
    }
    environ, argv = cluster_environ(plan.environ), [*yarn_client(), "submit"]
    install = f"install %s in the environment and pack {path.replace('%', '%%')} again"
    plan = plan.replace(argv=argv, environ=environ, search=None, where="the YARN container", install=install)
    return plan.replace(job=YarnJob(argv, environ, rest, step.options, spec))


register(
    Mode(
        "slurm",
        "Run the rest of the chain in a job of Slurm; options of `srun` may be given as they are.",
        [
            *NODE_OPTIONS,
            Option("--node-python", "Python >= 3.8 of the node (default: python3).", "PROGRAM", run=True),
            recorded("--srun", "The program srun.", "PATH"),
        ],
        setup_slurm,
        plan_slurm,
        targets=(0, 0),
        remote=True,
        engine=srun_commands,
        example="envkernel slurm --user --name=gpu --partition=gpu --gres=gpu:1 -- conda science",
    ),
    Mode(
        "yarn",
        "Run the kernel in a container of YARN, in a packed environment, through Skein.",
        [
            Option("--memory", "Memory of the container in MiB (default: 1024).", "MIB", run=True),
            Option("--vcores", "Virtual cores of the container (default: 1).", "N", run=True),
            Option("--queue", "Queue to submit to (default: default).", "NAME", run=True),
            Option("--file", "Send a file to the kernel; repeatable.", "NAME=PATH", many=True, run=True),
            *NODE_OPTIONS,
        ],
        setup_yarn,
        plan_yarn,
        target="ENVIRONMENT.tar.gz",
        remote=True,
        example="envkernel yarn --user --name=big --memory=4096 --vcores=2 environment.tar.gz",
    ),
)


# ---- kernelspec ---------------------------------------------------------------------------------


class Kernel(Record):
    """A kernel as a kernelspec describes it."""

    command: list[str]  # with `CONNECTION_FILE` in it
    language: str = "python"
    display_name: str = ""
    metadata: dict[str, Any] = {}
    interrupt_mode: str = ""
    protocol: str = ""
    files: dict[str, bytes] = {}  # logos, by name
    directory: str = ""  # the kernelspec it was read from, whose files come along
    env: dict[str, str] = {}  # as Jupyter reads it
    test: list[str] = []  # succeeds where the kernel is really installed; empty where no test is needed


KERNELS = {
    "ipykernel": Kernel(["python", "-m", "ipykernel_launcher", "-f", CONNECTION_FILE]),
    "ir": Kernel(
        ["R", "--slave", "-e", "IRkernel::main()", "--args", CONNECTION_FILE],
        "R",
        test=["R", "--slave", "-e", "quit(status = !requireNamespace('IRkernel', quietly = TRUE))"],
    ),
    "imatlab": Kernel(["python", "-m", "imatlab", "-f", CONNECTION_FILE], "matlab"),
}
"""The kernels that are known by name, wherever they run."""

OWN_COMMAND = "image"
"""Name of the kernel (``--kernel=image``) that is whatever the image itself starts."""

DESCRIBE_IPYKERNEL = (
    "import json, pathlib, ipykernel.kernelapp; from ipykernel.kernelspec import get_kernel_dict, RESOURCES; "
    "logos = {f.name: f.read_bytes().decode('latin-1') for f in pathlib.Path(RESOURCES).glob('logo*')}; "
    "print('\\nipykernel:' + json.dumps(dict(get_kernel_dict(), logos=logos)))"
)
"""What the environment's own Python is asked for the metadata and logos of its ipykernel, which it loads."""

_FIELDS: dict[str, type] = {"argv": list, "metadata": dict, "env": dict}
_FIELDS.update(dict.fromkeys(("language", "display_name", "interrupt_mode", "kernel_protocol_version"), str))
"""The fields of a kernel.json (jupyter_client, *Kernel specs*)."""


def known_fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a kernel.json, empty where they are missing or of another type."""
    known = {name: (spec.get(name), kind) for name, kind in _FIELDS.items()}
    return {name: value if isinstance(value, kind) else kind() for name, (value, kind) in known.items()}


def read_kernelspec(directory: str, host: Host) -> Kernel:
    """Return the kernel of a kernelspec's directory with its files.  Raises UserError where it is broken."""
    try:
        spec = known_fields(from_json(host.read(directory + "/kernel.json") or b""))
    except (ValueError, AttributeError, RecursionError):
        spec = {"argv": []}
    if not spec["argv"] or not all(isinstance(word, str) for word in spec["argv"]):
        message = f"The kernelspec {directory} is broken: its kernel.json can't be read."
        raise UserError(message, "Install that kernel again.")
    names = [name for name in host.listdir(directory) if name not in ("kernel.json", "__pycache__")]
    texts = {name: host.read(f"{directory}/{name}") for name in names}
    return Kernel(
        spec["argv"],
        spec["language"] or "python",
        display_name=spec["display_name"],
        metadata={key: value for key, value in spec["metadata"].items() if key != "envkernel"},
        interrupt_mode=spec["interrupt_mode"],
        protocol=spec["kernel_protocol_version"],
        files={name: text for name, text in texts.items() if text is not None},
        directory=directory if host.host is host else "",
        env={name: value for name, value in spec["env"].items() if isinstance(value, str)},
    )


def kernel_in_environment(name: str, plan: Plan, host: Host) -> Kernel:
    """Return a kernel by name: one whose kernelspec is inside the environment, or a known one."""
    inside: dict[str, str] = {}
    for directory in plan.search or ():
        kernels = os.path.dirname(directory) + "/share/jupyter/kernels"
        for one in host.listdir(kernels):
            if host.exists(f"{kernels}/{one}/kernel.json"):
                inside.setdefault(one, f"{kernels}/{one}")
    if name in inside and name != "ipykernel":
        return own_interpreter(read_kernelspec(inside[name], host), plan, host)
    if name in KERNELS:
        return KERNELS[name]
    hint = suggestion(name, sorted({*KERNELS, *inside}))
    raise UserError(f"There is no kernel named {name} in {plan.where}.", hint)


def own_interpreter(kernel: Kernel, plan: Plan, host: Host) -> Kernel:
    """Make a kernel that was set up elsewhere use the environment's own program, or any Python there."""
    program = os.path.basename(kernel.command[0])
    found = search_program(program, plan.search or (), host)
    if not (found or is_python(program)):
        return kernel
    return kernel.replace(command=[program if found else "python", *kernel.command[1:]])


def choose_kernel(request: Request, plan: Plan, host: Host) -> Kernel:
    """Return the kernel that a request asks for.  plan: of the environment it will run in."""
    import shlex

    common, command = request.common, request.command
    if "kernel-template" in common:
        name, found = common["kernel-template"], installed_kernels()
        if name not in found:
            message = f"There is no kernel named {name} to take as a template."
            raise UserError(message, suggestion(name, sorted(found)))
        kernel = read_kernelspec(found[name], host.host)
        tokens = run_tokens(kernel.command)  # it may be one of envkernel's own, around the kernel command
        kernel = kernel.replace(command=launch_from_argv(tokens).command) if tokens else kernel
        kernel = own_interpreter(kernel, plan, host)
    else:
        kernel = kernel_in_environment(common.get("kernel", "ipykernel"), plan, host)
    if "kernel-cmd" in common:
        try:
            command = shlex.split(common["kernel-cmd"])
        except ValueError:
            raise usage_error("The kernel command has an open quote.", "Close it.") from None
    if command is not None and not {"kernel", "kernel-template"} & common.keys():
        kernel = Kernel(command)
    command = kernel.command if command is None else command
    if not any(CONNECTION_FILE in token for token in command):
        message = "The kernel command has no {connection_file}, so Jupyter could not talk to the kernel."
        hint = "Put {connection_file} where the kernel expects the path of its connection file."
        raise usage_error(message, suggestion("".join(command[:1]), sorted(MODES), hint))
    if common.get("kernel-make-path-relative"):
        command = [os.path.basename(command[0]), *command[1:]]
    if "python" in common and is_python(command[0]) and request.command is None:
        command = [sys.executable if common["python"] == "SELF" else common["python"], *command[1:]]
    if "/" in command[0] and not command[0].startswith(RESOURCE_DIR):
        command = [host.absolute(command[0]), *command[1:]]
    return kernel.replace(command=command, language=common.get("language", kernel.language))


def describe_ipykernel(kernel: Kernel, plan: Plan, host: Host) -> Kernel:
    """Add to an ipykernel what the environment's own one says of itself: metadata, protocol, logos."""
    said = host.output([*plan.argv[: plan.argv.index("-m")], "-c", DESCRIBE_IPYKERNEL], plan.environ)
    if said.status:
        message = f"ipykernel is there but can't be loaded in {plan.where}."
        hint = f"Fix that, or install it again: {plan.install % 'ipykernel'}."
        raise UserError(message, hint, detail=os.fsdecode(said.err).strip().rpartition("\n")[2])
    spec = from_json(said.out.split(b"\nipykernel:")[1].splitlines()[0])
    own = known_fields(spec)
    named = ((name, text.encode("latin-1")) for name, text in spec["logos"].items())
    logos = {name: logo for name, logo in named if name in (*LOGO_PNGS, LOGO_SVG)}
    return kernel.replace(
        metadata={**own["metadata"], **kernel.metadata},
        interrupt_mode=kernel.interrupt_mode or own["interrupt_mode"],
        protocol=own["kernel_protocol_version"],
        files={**logos, **kernel.files},
    )


def setup_command(request: Request, steps: Sequence[Step]) -> list[str]:
    """Return the command line of a request, with absolute paths: what `update` runs again."""
    words: list[str] = []
    for index, step in enumerate(steps):
        words += ["--", step.mode] if index else [step.mode]
        given = [] if index else [(COMMON_OPTIONS, request.common)]
        for options, values in [*given, (MODES[step.mode].options, step.options)]:
            once = ("replace", "dry-run", "check")
            words += option_tokens([one for one in options if one.setup and one.name not in once], values)
        own = {flag for one in [*COMMON_OPTIONS, *MODES[step.mode].options] for flag in one.flags}
        words += ["--pass=" * (word.partition("=")[0] in own) + word for word in step.engine] + step.targets
    return words + (["--", *request.command] if request.command is not None else [])


def launcher(python: str, script: str) -> list[str]:
    """Return the start of a command line that runs this file (-S saves the time of ``site``)."""
    return [python, "-I", "-S", "-c", LOADER, script]


def is_booted(argv: Sequence[str]) -> bool:
    """Return whether an argv begins as `launcher` begins it, in this version or an earlier one."""
    return list(argv[1:4]) == ["-I", "-S", "-c"] and "envkernel" in "".join(argv[4:5]) and len(argv) > 5


def run_tokens(argv: Sequence[str]) -> list[str]:
    """Return the part of a kernelspec's argv that the run phase reads; empty: it is not envkernel's."""
    if is_booted(argv):
        return list(argv[6:])
    for program, mode, phase, index in zip(argv, argv[1:3], argv[2:4], (1, 2)):
        if "envkernel" in os.path.basename(program) and mode in MODES and phase == "run":
            return list(argv[index:])
    return []


def encoded_variables(request: Request) -> dict[str, str]:
    """Return the variables of ``--env`` as they are in kernel.json, where jupyter_client expands ``$``."""
    entries = [entry.partition("=")[::2] for entry in request.common.get("env", [])]
    return {name: encode_token(value, unsafe="$") for name, value in entries}


def kernelspec_json(request: Request, launch: Launch, kernel: Kernel, argv: Sequence[str]) -> dict[str, Any]:
    """Return the content of kernel.json."""
    common, modes = request.common, "+".join(step.mode for step in launch.steps)
    command = [encode_token(word, unsafe="") for word in setup_command(request, launch.steps)]
    about = {"version": __version__, "mode": modes, "command": command}
    template_name = kernel.display_name if "kernel-template" in common else ""
    spec: dict[str, Any] = {
        "argv": list(argv),
        "display_name": common.get("display-name") or template_name or f"{common['name']} ({modes})",
        "language": kernel.language,
        "metadata": {**kernel.metadata, "envkernel": about},
    }
    optional = {
        "env": {**kernel.env, **encoded_variables(request)},
        "interrupt_mode": kernel.interrupt_mode,
        "kernel_protocol_version": kernel.protocol,
    }
    return {**spec, **{name: value for name, value in optional.items() if value}}


def launch_of(
    request: Request, steps: Sequence[Step], command: Sequence[str], env: Sequence[str] = ()
) -> Launch:
    """Return the launch of a request.  env: names of variables that the kernel brings."""
    names = [*env, *(entry.partition("=")[0] for entry in request.common.get("env", []))]
    given = {**request.common, "env": list(dict.fromkeys(names)) or None}
    options = {option.name: given.get(option.name) for option in COMMON_OPTIONS if option.run}
    options = {name: value for name, value in options.items() if value is not None}
    return Launch(list(steps), list(command), options)


def check_request(request: Request) -> None:
    """Raise UserError (status 2) for common options that are missing, wrong or at odds."""
    common, name = request.common, request.common.get("name", "")
    if not name:
        raise usage_error("The kernel has no name.", "Add --name=NAME.")
    if not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name[0] in ".-":
        hint = "Use ASCII letters, digits, '.', '_' and '-' only, and begin with a letter, a digit or '_'."
        raise usage_error(f"{name!r} can't be the name of a kernel.", hint)
    after = ["a kernel command after --"] if request.command is not None else []
    making = any(step.options.get("create") for step in request.steps)  # --python makes the virtualenv
    given = {"--" + option for option in common}
    apart = [("--user", "--sys-prefix"), ("--user", "--prefix"), ("--sys-prefix", "--prefix")]
    apart += [("--kernel", "--kernel-template"), *(("--kernel-cmd", other) for other in after)]
    apart += [("--python", other) for other in after if not making]
    for one, other in apart:
        if one in given and other in [*given, *after]:
            raise usage_error(f"{one} and {other} exclude each other.", "Give one of them.")
    for entry in common.get("env", []):
        if not entry.partition("=")[0]:
            raise usage_error(f"--env {entry} names no variable.", "Write it as --env NAME=VALUE.")


def setup(
    tokens: Sequence[str], host: Host, directory: str = "", recorded: Mapping[str, str] | None = None
) -> int:
    """Check what was asked for, then write the kernelspec, or nothing.  directory: of one that is updated."""
    request = parse_setup(tokens, host)
    common = request.common
    common.setdefault("name", derive_name(request, host))
    check_request(request)
    for name in {"prefix", "logo", "python"} & common.keys():
        if name != "python" or "/" in common[name]:
            common[name] = host.absolute(common[name])
    if request.command and "/" in request.command[0] and request.command[0][0] != "{":
        request.command[0] = host.absolute(request.command[0])
    need_jupyter("jupyter_client.kernelspec")
    from jupyter_core.paths import SYSTEM_JUPYTER_PATH, jupyter_data_dir

    prefix = common.get("prefix") or ("sys-prefix" in common and sys.prefix)
    base = os.path.join(prefix, "share", "jupyter") if prefix else SYSTEM_JUPYTER_PATH[0]
    base = jupyter_data_dir() if "user" in common else base
    destination = directory or os.path.join(base, "kernels", common["name"].lower())
    if directory:
        common["update"] = True
    elif os.path.exists(destination) and not common.get("replace"):
        raise name_taken(destination)
    try:
        write_kernel(request, destination, host, {**(recorded or {}), **launch_environ(host)})
    except BaseException:
        for path in host.made:
            remove_tree(path)
        raise
    if not common.get("check") or common.get("dry-run"):
        return 0
    if installed_kernels().get(common["name"].lower()) != destination:  # Jupyter does not look there first
        base = os.path.dirname(os.path.dirname(destination))
        os.environ["JUPYTER_PATH"] = base + os.pathsep + os.environ.get("JUPYTER_PATH", "")
    return check_command({"NAME": common["name"]}, host)


def name_taken(directory: str) -> UserError:
    """Return the error for a kernelspec's directory that is there already."""
    message = f"There is a kernel named {os.path.basename(directory)} already, in {directory}."
    return UserError(message, "Add --replace to replace it, or give another name: --name=NAME.")


def write_kernel(request: Request, destination: str, host: Host, environ: Mapping[str, str]) -> None:
    """Prepare the modes and the kernel of a request, then write the kernelspec, or print it (--dry-run)."""
    import importlib.util

    common, script, python = request.common, os.path.abspath(__file__), os.path.normpath(sys.executable)
    steps, _ = setup_steps(request, host, environ)
    kernel, launch = prepare_kernel(request, steps, host, environ)
    if not os.path.isfile(script):
        hint = "Save it first: kernels need it at each start."
        raise UserError("envkernel.py is not read from a file.", hint)
    files = logo_files(kernel, steps[0].mode, common.get("logo", ""), host)
    if common.get("self-contained"):
        files["envkernel.py"] = host.read(script) or b""
        script, python = os.path.join(destination, "envkernel.py"), lasting_python(host)
    spec = kernelspec_json(request, launch, kernel, [*launcher(python, script), *launch_to_argv(launch)])
    if common.get("dry-run"):
        import json

        print(json.dumps(spec, indent=1))
        return
    replace = "replace" in common or "update" in common
    install_kernelspec(destination, spec, files, "user" not in common, kernel.directory, replace)
    write_bytecode(python, script, host)
    name, base = common["name"].lower(), os.path.dirname(destination)
    print("Updated" if "update" in common else "Installed", f"the kernel {name} in {destination}")
    clients = ("jupyter_server", "notebook", "nbclient", "jupyter_console", "qtconsole")
    lonely = sys.prefix != sys.base_prefix and not any(map(importlib.util.find_spec, clients))
    if lonely and destination.startswith(sys.prefix + "/share/"):
        print(f"There is no Jupyter in {sys.prefix}, and no other looks there: use --user.")
    elif base not in need_jupyter("jupyter_core.paths").jupyter_path("kernels"):
        path = quoted(os.path.dirname(base))
        print(f"Jupyter does not look there: start it with JUPYTER_PATH={path}, or use --user.")
    if "check" not in common:
        print(f"Test it: {called_as()} check {name}")


def logo_files(kernel: Kernel, mode: str, own: str, host: Host) -> dict[str, bytes]:
    """Return the kernel's files with the user's own logo (a path), or else its logo with a mode's badge."""
    if not own:
        return {**kernel.files, LOGO_SVG: badge_logo(kernel.files, mode, kernel.language)}
    others = {name: data for name, data in kernel.files.items() if not name.startswith("logo-")}
    data = host.read(own) or b""
    if b"<svg" in data[:4096]:
        return {**others, LOGO_SVG: data}
    if not data.startswith(_PNG_START):
        raise UserError(f"The logo {own} can't be read as PNG or SVG.", "Give the path of a PNG or SVG file.")
    return {**others, LOGO_SVG: logo_svg(data, "image/png"), **dict.fromkeys(LOGO_PNGS, data)}


def setup_steps(
    request: Request, host: Host, environ: Mapping[str, str]
) -> tuple[list[Step], Mapping[str, str]]:
    """Let each mode check and normalise its step; return the steps and the environment that they make."""
    steps: list[Step] = []
    for step in request.steps:
        mode = MODES[step.mode]
        try:
            steps.append(mode.setup(step, host, environ, request.common))
        except UserError as error:
            if error.status == 1 and any(MODES[earlier.mode].remote for earlier in steps):
                error.hint += " The nodes may have it, but setup can only look on this host."
            raise
        if not (mode.remote or mode.container):
            environ = mode.plan(steps[-1], Plan([], dict(environ)), host, Launch([], [])).environ
    return steps, environ


def prepare_kernel(
    request: Request, steps: Sequence[Step], host: Host, environ: Mapping[str, str]
) -> tuple[Kernel, Launch]:
    """Choose the kernel and test that it could start, with the variables that the user wants it to have."""
    environ = {**environ, **encoded_variables(request)}
    seen = seen_here(steps)
    trial = plan_launch(launch_of(request, seen, []), host, environ)
    if request.common.get("kernel") == OWN_COMMAND:
        if not trial.run_once:
            raise usage_error("--kernel=image is for containers.", "Name the kernel: --kernel=ipykernel.")
        if seen[-1].options.get("shared") and not request.command:
            hint = "Give the kernel command after --, or leave --shared out."
            raise usage_error("An image's own command can't be run in a shared container.", hint)
        kernel = Kernel(request.command or [], request.common.get("language", "python"))
        launch = launch_of(request, seen, kernel.command)
        return kernel, launch.replace(steps=[*steps[:-1], find_transport(launch, host, environ)])
    trial, world = look_inside(trial, host, [])
    kernel = choose_kernel(request, trial, world)
    launch = launch_of(request, seen, kernel.command, list(kernel.env))
    resources = {"resource-dir": kernel.directory} if kernel.directory else {}
    plan, world = look_inside(plan_launch(launch, host, environ), world, kernel.command)
    plan = finish_plan(plan, launch.replace(options=resources), world)
    if plan.search is not None and kernel.test[:1] == [os.path.basename(plan.argv[0])]:
        said = world.output([plan.argv[0], *kernel.test[1:]], plan.environ)
        if said.status:
            hint = f"Try: {plan.install % PACKAGES.get(kernel.test[0], kernel.test[0])}."
            detail = os.fsdecode(said.err).strip()
            raise UserError(f"The kernel is not installed in {plan.where}.", hint, detail=detail)
    if plan.search is not None and plan.argv[1:3] == ["-m", "ipykernel_launcher"]:
        kernel = describe_ipykernel(kernel, plan, world)
    return kernel, launch.replace(steps=[*steps[:-1], find_transport(launch, host, environ)])


def seen_here(steps: Sequence[Step]) -> list[Step]:
    """Return a chain as it can be looked at on this host: without the cluster, where anything follows it."""
    near = [step for step in steps if not MODES[step.mode].remote]
    return near if near and near[-1] is steps[-1] else list(steps)


def lasting_python(host: Host) -> str:
    """Return a Python >= 3.8 that stays when this one's environment goes, this one where there is none."""
    base, system = str(getattr(sys, "_base_executable", sys.executable)), "/usr/bin/python3"
    if sys.prefix != sys.base_prefix and base == sys.executable:  # Python < 3.11 does not say
        base = "{}/bin/python{}.{}".format(sys.base_prefix, *sys.version_info)
    in_conda = host.exists(os.path.dirname(os.path.dirname(base)) + "/conda-meta")
    question = ["-I", "-S", "-c", "import sys; sys.exit(sys.version_info < (3, 8))"]
    if in_conda and host.is_executable(system) and not host.output([system, *question], os.environ).status:
        return system
    return os.path.normpath(base)


ASK_BYTECODE = (
    "import sys,importlib.machinery as i;i.SourceFileLoader.source_to_code=lambda *a,**k:sys.exit(3);"
    "i.SourceFileLoader('envkernel',sys.argv[1]).get_code('envkernel')"
)
"""What a Python is asked with ``-c``: whether (3) it has to compile the file that the next argument names."""


def write_bytecode(python: str, script: str, host: Host) -> str:
    """Let a Python write its bytecode of envkernel.py, readable like the file; return what fails."""
    umask = os.umask(0o022)
    try:
        host.output([*launcher(python, script), "--version"], {})
    finally:
        os.umask(umask)
    if host.output([python, "-I", "-S", "-c", ASK_BYTECODE, script], {}).status != 3:
        return ""
    return f"Python can't keep the bytecode of {script} next to it: each start compiles it (0.3 s)"


def installed_kernels() -> dict[str, str]:
    """Return the directories of all kernelspecs, as `find_kernel_specs` (slow to import) does, by name."""
    found: dict[str, str] = {}
    ipython = os.environ.get("IPYTHONDIR") or os.path.expanduser("~/.ipython")
    for directory in [*need_jupyter("jupyter_core.paths").jupyter_path("kernels"), ipython + "/kernels"]:
        for name in Host().listdir(directory):
            valid = all((c.isascii() and c.isalnum()) or c in "._-" for c in name)
            if valid and os.path.isfile(f"{directory}/{name}/kernel.json"):
                found.setdefault(name.lower(), f"{directory}/{name}")
    return found


def need_jupyter(name: str) -> Any:
    """Return a module of Jupyter's.  Raises UserError where it is missing."""
    from importlib import import_module

    if os.path.expanduser("~") == "~":
        raise UserError("Your home directory is not known.", "Set HOME to a directory of yours.")
    try:
        return import_module(name)
    except ImportError:
        hint = "Install it with pip, or call envkernel with the Python that Jupyter runs on."
        raise UserError(f"This Python ({sys.executable}) has no jupyter_client.", hint) from None


def install_kernelspec(
    destination: str,
    spec: Mapping[str, Any],
    files: Mapping[str, bytes],
    readable: bool,
    directory: str = "",
    replace: bool = True,
) -> None:
    """Write a kernelspec, whole or not at all.  directory: another one, whose files are copied first."""
    import errno
    import json
    import shutil
    import tempfile

    base, stage, old = os.path.dirname(destination), "", ""
    made = first_missing(base)
    umask = os.umask(0o022)
    os.umask(0o022 if readable else umask)
    try:
        os.makedirs(base, exist_ok=True)
        stage = tempfile.mkdtemp(prefix=".envkernel-", dir=base)
        new = stage + "/new"
        if directory:
            shutil.copytree(directory, new, ignore=shutil.ignore_patterns("__pycache__", "kernel.json"))
            os.chmod(new, 0o755)
        else:
            os.mkdir(new)
        for name, content in {**files, "kernel.json": json.dumps(spec, indent=1).encode() + b"\n"}.items():
            with open(f"{new}/{name}", "wb") as file:
                file.write(content)
        if "env" in spec and not readable:
            os.chmod(new + "/kernel.json", 0o600)
        old = stage + "/old"
        if replace and os.path.lexists(destination):
            os.rename(destination, old)
        os.rename(new, destination)  # fails where another setup was faster
    except OSError as error:
        if made and not os.path.exists(destination):
            shutil.rmtree(made, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and os.path.isdir(destination):
            raise name_taken(destination) from None
        message = f"The kernelspec can't be written to {destination}: {os.strerror(error.errno or 0)}."
        raise UserError(message, "Choose a place where you may write: --user, or --prefix=DIR.") from None
    finally:
        os.umask(umask)
        if old and os.path.lexists(old) and not os.path.lexists(destination):
            os.rename(old, destination)
        shutil.rmtree(stage, ignore_errors=True)


def first_missing(directory: str) -> str:
    """Return the topmost directory of a path that does not exist yet, empty where all do."""
    missing = ""
    while directory and not os.path.isdir(directory):
        missing, directory = directory, os.path.dirname(directory)
    return missing


# ---- logos --------------------------------------------------------------------------------------

BADGES = {
    "conda": ("C", "#3e9840"),
    "virtualenv": ("V", "#306998"),
    "lmod": ("L", "#795548"),
    "docker": ("D", "#0d6efd"),
    "podman": ("P", "#892aa0"),
    "singularity": ("S", "#00798c"),
    "apptainer": ("A", "#d35400"),
    "slurm": ("S", "#b71c1c"),
    "yarn": ("Y", "#967800"),
}
"""By mode: letter and colour of the badge by which two kernels in a launcher differ."""

LOGO_SVG, LOGO_PNGS = "logo-svg.svg", ("logo-64x64.png", "logo-32x32.png")

_PNG_START = b"\x89PNG\r\n\x1a\n"


def svg_letter(letter: str, x: int, y: int, size: int, colour: str) -> str:
    """Return a letter centred at a point of an SVG."""
    return (
        f'<text x="{x}" y="{y}" dy=".36em" font-size="{size}" fill="{colour}" text-anchor="middle" '
        f'font-family="Helvetica,Arial,sans-serif" font-weight="bold">{letter}</text>'
    )


def logo_svg(image: bytes, kind: str, badge: str = "") -> bytes:
    """Return an SVG that shows an image, whose scripts do not run then, with a badge over it."""
    from base64 import b64encode

    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64" viewBox="0 0 64 64">'
        f'<image width="64" height="64" href="data:{kind};base64,{b64encode(image).decode()}"/>'
        f"{badge}</svg>\n"
    ).encode()


def badge_logo(files: Mapping[str, bytes], mode: str, language: str) -> bytes:
    """Return an SVG of the logo among a kernelspec's files, or the language's letter, with a mode's badge."""
    from html import escape

    letter, colour = BADGES[mode]
    badge = f'<circle cx="47" cy="47" r="16" fill="{colour}" stroke="#fff" stroke-width="2"/>'
    badge += svg_letter(letter, 47, 47, 22, "#fff")
    if badge.encode() in files.get(LOGO_SVG, b""):  # a kernel of ours was the template
        return files[LOGO_SVG]
    if LOGO_SVG in files:
        return logo_svg(files[LOGO_SVG], "image/svg+xml", badge)
    for name in (*LOGO_PNGS, *sorted(files)):
        if name.startswith("logo-") and files.get(name, b"").startswith(_PNG_START):
            return logo_svg(files[name], "image/png", badge)
    tile = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
        '<rect x="2" y="2" width="60" height="60" rx="10" fill="#e2e5ec"/>'
        f"{svg_letter(escape(language[:1].upper()), 32, 32, 40, '#5a6270')}</svg>"
    )
    return logo_svg(tile.encode(), "image/svg+xml", badge)


# ---- completion ---------------------------------------------------------------------------------

SHELLS = {
    "bash": """\
_envkernel() {
    local IFS=$'\\n'
    COMPREPLY=($(envkernel completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null))
    if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _envkernel envkernel
""",
    "zsh": """\
#compdef envkernel
_envkernel() {
    local -a found open closed
    found=(${(f)"$(envkernel completion zsh -- "${(@)words[2,CURRENT]}" 2> /dev/null)"})
    (($#found)) || { _files; return }
    open=(${(M)found:#*=:*}) closed=(${found:#*=:*})
    if (($#open)); then _describe option open -S ''; fi
    if (($#closed)); then _describe argument closed; fi
}
compdef _envkernel envkernel
""",
    "fish": """\
function __envkernel
    set -l arguments (commandline -opc) (commandline -ct)
    envkernel completion fish -- $arguments[2..-1] 2> /dev/null
    or __fish_complete_path (commandline -ct)
end
complete -c envkernel -f -a '(__envkernel)'
""",
}
"""The completion script of each shell: it asks this program, and completes files where that has no answer."""


def completion_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel completion SHELL``: print the script; ``-- ARGUMENT ...``: complete the last of them."""
    import contextlib

    shell, typed = options["SHELL"], options.get("rest")
    if shell not in SHELLS:
        raise usage_error(f"There is no completion for {shell!r}.", suggestion(shell, list(SHELLS)))
    if typed is None:
        sys.stdout.write(SHELLS[shell])
        return 0
    before = [word for word in typed[:-1] if word != "="]  # bash makes three arguments of --flag=value
    current = "".join(typed[-1:]).lstrip("=")
    chained = "--" in before
    while "--" in before:
        before = before[before.index("--") + 1 :]
    known: dict[str, Mode | Command] = {**MODES, **({} if chained else COMMANDS)}
    one = known.get(before[0]) if before else None
    options_of = list(one.options) if one else []
    if isinstance(one, Mode):
        options_of += [option for option in COMMON_OPTIONS if not chained or option.name == "env"]
    flags = {flag: option for option in options_of if option.setup for flag in option.flags}
    flag, equals, _ = current.partition("=")
    asked = flags.get(flag if equals else "".join(before[-1:]))
    found: dict[str, str] = {}
    if not before:
        found = {name: row.summary for name, row in known.items()}
    elif asked and asked.metavar:
        found = dict.fromkeys(((flag + equals) * bool(equals) + choice for choice in asked.choices), "")
    elif current.startswith("-"):
        environ = launch_environ(host)
        with contextlib.suppress(UserError):  # without an engine there are no options of it
            engine = one.engine(one.name, [], environ, host) if isinstance(one, Mode) and one.engine else []
            for long, takes in EngineOptions(engine, host, environ).known.values():
                found[long + "=" * (takes == "=")] = f"Option of {before[0]}."
        for flag, option in flags.items():
            found[flag + "=" * bool(option.metavar and flag[1] == "-")] = option.help
    elif isinstance(one, Command) and one.argument:
        names = SHELLS if one.argument == "SHELL" else [kernel.name for kernel in our_kernels(host)]
        found = dict.fromkeys(names, "")
    found = {name: help for name, help in found.items() if name.startswith(current)}
    for name, help in found.items():
        print(name + {"bash": "", "zsh": ":" + help, "fish": "\t" + help}[shell])
    return 0 if found else 1


# ---- managing -----------------------------------------------------------------------------------


class Installed(Record):
    """An installed kernelspec of ours, what its run phase reads, and what made it (unknown for 1.x)."""

    name: str
    directory: str
    spec: dict[str, Any]
    tokens: list[str]
    launch: Launch  # without modes where it is broken
    command: list[str] = []


def our_kernels(host: Host) -> list[Installed]:
    """Return the kernels that envkernel (of any version) has installed, by name."""
    import contextlib

    found: list[Installed] = []
    for name, directory in sorted(installed_kernels().items()):
        try:
            spec = from_json(host.read(directory + "/kernel.json") or b"")
            tokens, own = run_tokens(spec["argv"]), (spec.get("metadata") or {}).get("envkernel", {})
            if tokens or own:
                command = [decode_token(word) for word in own.get("command", ())]
                launch = Launch([], [])
                with contextlib.suppress(UserError):
                    launch = launch_from_argv(tokens)
                found.append(Installed(name, directory, spec, tokens, launch, command))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
            continue  # not ours, or so broken that nothing can be said of it
    return found


def our_kernel(name: str, host: Host) -> Installed:
    """Return an installed kernel of ours.  Raises UserError where there is none of that name."""
    kernels = {kernel.name: kernel for kernel in our_kernels(host)}
    if name.lower() in kernels:
        return kernels[name.lower()]
    if name.lower() in [*installed_kernels(), "python3"]:
        raise UserError(f"The kernel {name} was not made by envkernel.", "Use jupyter kernelspec for it.")
    hint = suggestion(name, list(kernels)) if kernels else "envkernel has made none yet."
    raise UserError(f"There is no kernel named {name}.", hint)


def examine(kernel: Installed, host: Host) -> tuple[list[Plan], UserError | None]:
    """Return what a kernel would do (here, then on a node), and what is broken, all without a start."""
    plans: list[Plan] = []
    try:
        argv = kernel.spec["argv"]
        for path in argv[:1] + (argv[5:6] if is_booted(argv) else []):
            if os.path.isabs(path) and not host.exists(path):
                raise UserError(f"{path} is gone.", "Write the kernel again: envkernel update NAME.")
        launch = launch_from_argv(kernel.tokens)
        own = known_fields(kernel.spec)["env"]
        if not all(isinstance(value, str) for value in own.values()):
            raise UserError("A variable in env is no text.", f"Correct {kernel.directory}/kernel.json.")
        environ = {**launch_environ(host), **own}
        near = launch.replace(steps=seen_here(launch.steps))
        launches = [launch] if near == launch else [launch, near]
        plans = [finish_plan(plan_launch(one, host, environ), one, host) for one in launches]
        program, environ = plans[0].argv[0], plans[0].environ
        for step in launch.steps:
            if step.mode == "slurm":
                ask_slurm(step, program, host, environ)
            if MODES[step.mode].remote:
                break
            if step.mode in ("docker", "podman"):
                image = step.targets[0]
                said = host.output([program, "image", "inspect", image], environ)
                refusal = engine_error(program, image, 125, os.fsdecode(said.err))
                if said.status and refusal:
                    raise refusal
    except UserError as error:
        error.name_kernel(kernel.name)
        return plans, error
    return plans, None


def launch_logs(name: str, host: Host) -> list[tuple[str, str, dict[str, str]]]:
    """Return path, text and lines (by how they begin) of a kernel's launch logs, the newest first."""
    logs = []
    directory, prefix = log_place(name, os.environ)
    for file in sorted(host.listdir(directory), reverse=True):
        text = os.fsdecode(host.read(f"{directory}/{file}") or b"") if file.startswith(prefix) else ""
        lines = dict(line.partition(": ")[::2] for line in text.splitlines())
        if text and not {"ended", "not started"} & lines.keys():  # its process may be the kernel now
            words = os.fsdecode(host.read(f"/proc/{lines.get('process')}/cmdline") or b"").split("\0")
            runs = any(word.endswith(".json") and word in text for word in words)
            lost = "no (what it said and its exit status are in the log of Jupyter)"
            lines["running"] = "yes" if runs else lost
        logs += [(f"{directory}/{file}", text, lines)] if text else []
    return logs


class Running(Record):
    """What runs, as `list` calls it (empty for a process next to a container), and how it is ended."""

    what: str
    stop: list[str] = []
    pid: int = 0
    job: str = ""


def listed(found: Sequence[Running]) -> list[str]:
    """Return what `list` calls the things that run."""
    return [one.what for one in found if one.what]


def run_processes(host: Host) -> dict[int, tuple[list[str], int]]:
    """Return the command lines and parents of this user's run processes and keepers."""
    found: dict[int, tuple[list[str], int]] = {}
    for pid in sorted(map(int, filter(str.isdigit, host.listdir("/proc")))):
        words = os.fsdecode(host.read(f"/proc/{pid}/cmdline") or b"").split("\0")[:-1]
        status = host.read(f"/proc/{pid}/status") or b""
        if run_tokens(words) and b"\nUid:\t%d\t" % host.ids()[0] in status:
            found[pid] = (words, int(status.partition(b"\nPPid:\t")[2].split()[0]))
    return found


def find_running(kernels: Sequence[Installed], host: Host) -> dict[str, list[Running]]:
    """Return what runs on this host, or is left, by kernel name: containers, instances, jobs, processes."""
    import re

    modes, paths = (*APPTAINER_PROGRAMS, "docker", "podman"), path_entries(os.environ)
    engines = {search_program(mode, paths, host) or "": mode for mode in modes}
    engines.pop("", None)
    if host.ids()[0] and not host.isdir(host.absolute("~/.local/share/containers")):
        engines = {path: mode for path, mode in engines.items() if mode != "podman"}  # it would set itself up
    instances: dict[str, str] = {}
    for kernel in kernels:
        launch = kernel.launch
        for step in launch.steps:
            if "program" in step.options:
                engines[step.options["program"]] = step.mode
            if step.options.get("shared"):
                instances["envkernel-" + shared_name(step, launch, host)] = kernel.name
    mine = f"--filter=label=envkernel.uid={host.ids()[0]}"
    runs: dict[str, list[Running]] = {}
    for program, mode in engines.items():
        apptainer = mode in APPTAINER_PROGRAMS
        ask = ["instance", "list"] if apptainer else ["ps", "--all", mine, "--format={{.Names}}"]
        end = ["instance", "stop"] if apptainer else ["rm", "-f", "-v"]
        try:
            said = host.output([program, *ask], launch_environ(host))
        except UserError:  # it is not there any more, or doesn't answer
            continue
        lines = os.fsdecode(said.out).splitlines()
        for name in [line.split()[0] for line in lines if line.startswith("envkernel-")]:
            owner = re.sub(r"^envkernel-|(-shared-\w{16}|-\w{8})$", "", name.lower())
            ones = runs.setdefault(instances.get(name, name) if apptainer else owner, [])
            one = Running("instance " * apptainer + name, [program, *end, name])
            ones += [] if one.what in listed(ones) else [one]  # podman and docker may be one program
    processes = run_processes(host)
    for kernel in kernels:
        argv = kernel.spec["argv"]
        same = []
        for pid, (words, _) in processes.items():
            if len(words) == len(argv) and all(CONNECTION_FILE in a or a == b for a, b in zip(argv, words)):
                same.append(pid)
        first = [pid for pid in same if processes[pid][1] not in same]  # a keeper is a copy of its parent
        jobs = {pid: "" for pid in first if host.read(f"/proc/{pid}/task/{pid}/children")}
        for _, _, log in launch_logs(kernel.name, host):
            jobs.update({int(log["process"]): log.get("job", "")} if log.get("running") == "yes" else {})
        contained = any(what.startswith("envkernel-") for what in listed(runs.get(kernel.name, ())))
        for pid, job in jobs.items():
            what = f"job {job}" if job else f"process {pid}" * (not contained)
            runs.setdefault(kernel.name, []).append(Running(what, [], pid, job))
    tokens = {token.lower() for words, _ in processes.values() for token in run_tokens(words)}
    ours = [kernel.name for kernel in kernels]  # what another Jupyter runs is neither ours nor a leftover
    return {name: ones for name, ones in runs.items() if name in ours or "--name=" + name not in tokens}


def one_line(text: str) -> str:
    r"""Return a text as it may be in a line on a terminal: a newline as ``\n``, ESC as ``\x1b``."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def list_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel list``: all kernels of ours and whether they could start, and what runs."""
    from concurrent.futures import ThreadPoolExecutor

    kernels = our_kernels(host)
    host = TimedHost()
    with ThreadPoolExecutor(32) as pool:
        future = pool.submit(find_running, kernels, host)
        errors = [error for _, error in pool.map(lambda kernel: examine(kernel, host), kernels)]
        running = future.result()
    rows = []
    for kernel, error in zip(kernels, errors):
        steps = kernel.launch.steps
        built = typed_value(kernel.command, "--build")
        targets = [[built] if built and MODES[step.mode].container else step.targets for step in steps]
        target = " -- ".join(" ".join(words) for words in targets if words)
        runs = ", ".join(listed(running.pop(kernel.name, ())))
        state = (error.message if error else "ok") + (f", running: {runs}" if runs else "")
        mode = "+".join(step.mode for step in steps) or "?"
        rows.append([kernel.name, mode, target, kernel.directory, state])
    state = "belongs to no kernel that Jupyter finds here; end it: envkernel stop "
    rows += [[name, "leftover", ", ".join(listed(ones)), "", state + name] for name, ones in running.items()]
    if options.get("json"):
        keys = ("name", "mode", "target", "directory", "state")
        print(to_json([dict(zip(keys, row)) for row in rows]).decode())
    elif rows:
        table = [["NAME", "MODE", "TARGET", "WHERE", "STATE"], *(list(map(one_line, row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        for line in table:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    else:
        print("envkernel has made no kernel that Jupyter finds here.")
    return 0


def show_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel show NAME``: the command that made a kernel and what it would do now."""
    import shlex

    kernel = our_kernel(options["NAME"], host)
    plans, error = examine(kernel, host)
    before: Mapping[str, str] = launch_environ(host)
    stages: list[dict[str, Any]] = []
    for plan in plans:
        after = plan.environ
        names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        argv = ["..." if word in (LOADER, NODE_BOOT) else word for word in plan.argv]
        stages.append({"argv": argv, "environment": {name: after.get(name) for name in names}})
        before = after
    shown: dict[str, Any] = {"name": kernel.name, "display_name": kernel.spec.get("display_name", "")}
    shown["directory"] = kernel.directory
    shown["command"] = ["envkernel", *kernel.command] if kernel.command else []
    shown["state"] = f"{error.message} {error.hint}" if error else "ok"
    shown["running"] = listed(find_running([kernel], TimedHost()).get(kernel.name, ()))
    shown.update(stages[0] if stages else {"argv": [], "environment": {}})
    shown.update({"node": stages[1]} if stages[1:] else {})
    if options.get("json"):
        print(to_json(shown).decode())
        return 0
    lines = [("kernel", f"{kernel.name} ({shown['display_name']})"), ("directory", kernel.directory)]
    lines += [("made by", shlex.join(shown["command"]) or "envkernel 1.x"), ("state", shown["state"])]
    lines += [("running", ", ".join(shown["running"]))] if shown["running"] else []
    for stage, where in zip(stages, ("executes", "on the node")):
        lines.append((where, shlex.join(stage["argv"])))
        for name, value in stage["environment"].items():
            lines.append(("environment", f"- {name}" if value is None else f"+ {name}={value}"))
    print(*(one_line(f"{label:12} {text}") for label, text in lines), sep="\n")
    return 0


def update_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel update NAME``: write a kernel again from the command that made it; or all of them."""
    every, failed = options.get("all"), []
    if every and options.get("NAME"):
        raise usage_error("--all updates every kernel.", f"Leave {options['NAME']} or --all out.")
    for kernel in our_kernels(host) if every else [our_kernel(options["NAME"], host)]:
        try:
            command = kernel.command or command_of_1x(kernel)
            own = command.index("--") if "--" in command else len(command)
            for index, word in enumerate(command[:own]):
                flag, _, value = word.partition("=")
                if (flag == "--name" and value.lower() != kernel.name) or (
                    flag == "--kernel-template" and value not in installed_kernels()
                ):
                    command[index] = f"{flag}={kernel.name}"  # was copied; or this is the template's clone
                elif flag == "--logo" and not host.exists(value):
                    command[index] = f"--logo={kernel.directory}/{LOGO_SVG}"
            entries = [entry for step in kernel.launch.steps for entry in step.options.get("recorded", [])]
            setup(command, host, kernel.directory, dict(entry.partition("=")[::2] for entry in entries))
        except UserError as error:
            if not every:
                raise
            failed.append(kernel.name)
            sys.stdout.flush()
            os.write(2, error_text(error))
    if failed:
        raise UserError(f"Not updated: {', '.join(failed)}.", "See above; the others are.")
    return 0


def command_of_1x(kernel: Installed) -> list[str]:
    """Return the command line of a kernelspec of envkernel 1.x, which has not recorded it."""
    from jupyter_core.paths import SYSTEM_JUPYTER_PATH, jupyter_data_dir

    launch, known = launch_from_argv(kernel.tokens), known_fields(kernel.spec)
    common = {**launch.options, "name": kernel.name, "display-name": known["display_name"] or kernel.name}
    common["language"] = known["language"] or "python"
    common.pop("connection-file", None)
    common["kernel-template"] = kernel.name  # whose variables, metadata and logos are kept
    base, end = os.path.dirname(os.path.dirname(kernel.directory)), "/share/jupyter"
    if base == jupyter_data_dir():
        common["user"] = True
    elif base.endswith(end) and base != SYSTEM_JUPYTER_PATH[0]:
        common["prefix"] = base[: -len(end)]
    return setup_command(Request(common, launch.steps, launch.command), launch.steps)


def log_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel log NAME``: print the last abnormal end of a kernel, then its newest launch."""
    name = options["NAME"]
    logs = launch_logs(name, host)
    if not logs:
        our_kernel(name, host)
        message = f"The kernel {name} has no launch log in {log_place(name, os.environ)[0]}."
        raise UserError(message, "Start it once, or set JUPYTER_DATA_DIR to the one that Jupyter runs with.")
    failed = next((log for log in logs if {"not started", "reason"} & log[2].keys()), logs[0])
    texts = []
    newest = [] if failed is logs[0] else [logs[0]]
    for log in logs if options.get("all") else [failed, *newest]:
        title = "The last abnormal end: " if log is failed and log is not logs[0] else ""
        state = f"running: {log[2]['running']}\n" if "running" in log[2] else ""
        texts.append(f"{title}{log[0]}\n{log[1]}{state}")
    sys.stdout.write("\n".join(texts))
    return 0


def stop_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel stop NAME``: end everything that runs for a kernel, or is left of one."""
    import contextlib
    import signal
    import time

    name, kernels = options["NAME"].lower(), our_kernels(host)
    found = find_running(kernels, TimedHost()).get(name, [])
    if not found:
        our_kernel(name, host)
    pids = [one.pid for one in found if one.pid]
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 0)):  # they clean up
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while pids and time.monotonic() < deadline:
            time.sleep(0.1)
            pids = [pid for pid in pids if process_stat(pid)]
    for job in filter(None, [one.job for one in found]):
        plans, _ = examine(our_kernel(name, host), host)
        if plans and plans[0].job and (argv := plans[0].job.cancel(0, job)):
            host.output(argv, plans[0].environ)
    end_containers(find_running(kernels, TimedHost()).get(name, ()), host)
    deadline = time.monotonic() + 10
    while (left := listed(find_running(kernels, TimedHost()).get(name, ()))) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        raise UserError(f"Still running: {', '.join(left)}.", "Try it once more, or end it by hand.")
    print(f"Ended: {', '.join(listed(found))}" if found else f"Nothing runs for the kernel {name}.")
    return 0


def end_containers(found: Sequence[Running], host: Host) -> None:
    """End containers and instances, and remove the locks of those that kernels shared."""
    for one in found:
        _, shared, key = one.what.rpartition("-shared-")
        if one.stop and not host.output(one.stop, launch_environ(host)).status and shared:
            for base in private_bases(os.environ, host):
                remove_tree(f"{base}/shared-{key}")
                remove_empty(base)


def remove_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel remove NAME``: remove a kernelspec that envkernel made, and what is kept for it alone."""
    kernel = our_kernel(options["NAME"], host)
    try:
        link = os.path.islink(kernel.directory)
        # first what makes Jupyter list it
        os.unlink(kernel.directory if link else kernel.directory + "/kernel.json")
        remove_tree(kernel.directory)
    except OSError as error:
        message = f"The kernelspec {kernel.directory} can't be removed: {os.strerror(error.errno or 0)}."
        raise UserError(message, "Ask the user who installed it.") from None
    print(f"Removed the kernel {kernel.name} from {kernel.directory}")
    found = find_running([kernel], TimedHost()).get(kernel.name, [])
    words = [word.lower() for words, _ in run_processes(host).values() for word in words]
    if "--name=" + kernel.name not in words:  # else a kernel may be in it, even one of another Jupyter
        end_containers([one for one in found if "-shared-" in one.what], host)
        found = find_running([kernel], TimedHost()).get(kernel.name, [])
    if found:
        print("Still running, until their notebooks are shut down: " + ", ".join(listed(found)))
    elif kernel.name not in installed_kernels():
        for path, _, _ in launch_logs(kernel.name, host):
            os.unlink(path)
        for step in kernel.launch.steps:
            remove_built_image(step, kernel.name, host)
        for base in private_bases(os.environ, host):
            for step in kernel.launch.steps:
                remove_tree(f"{base}/{shared_name(step, kernel.launch, host)}")
            remove_empty(base)
            for recipe, lock in stale_recipes(base):
                clean_up(recipe, os.environ, [lock])
    return 0


PROBES = {
    "python": ("import os; print(6 * 7); print(os.getcwd())", "import time; time.sleep(60)"),
    "R": ("cat(6 * 7, getwd(), sep = '\\n')", "Sys.sleep(60)"),
    "bash": ("echo $((6 * 7)); pwd -P", "sleep 60"),
    "julia": ("println(6 * 7); print(pwd())", "sleep(60)"),
}
"""By language: code that prints 42 and the working directory, and code that only an interrupt ends."""


class Check:
    """One run of a kernel through everything a client does; steps: name, seconds and error of each."""

    def __init__(self, kernel: Installed, plans: Sequence[Plan], host: Host) -> None:
        self.kernel, self.plan, self.inner, self.host = kernel, plans[0], plans[-1], host
        self.steps: list[dict[str, Any]] = []
        self.mark = os.urandom(8).hex()
        self.cell, self.sleep = PROBES.get(kernel.spec.get("language", "python"), ("", ""))

    def step(self, name: str, action: Callable[[], Any]) -> bool:
        """Do one step, record how long it took and what went wrong; return whether it worked."""
        import time

        start = time.perf_counter()
        try:
            error = action() or ""
        except Exception as failure:  # whatever a client library raises is the step's result
            error = str(failure) or f"no answer ({type(failure).__name__})"
        self.steps.append({"step": name, "seconds": round(time.perf_counter() - start, 3), "error": error})
        return not error

    def run(self, log: Any) -> None:
        """Start the kernel, use it, shut it down and look for what is left."""
        import time

        from jupyter_client.manager import KernelManager

        self.manager = manager = KernelManager(kernel_name=self.kernel.name)
        environ = {**os.environ, "ENVKERNEL_CHECK": self.mark}
        before = self.traces()
        try:
            if self.step("start", lambda: manager.start_kernel(env=environ, stdout=log, stderr=log)):
                self.client = manager.blocking_client()
                self.client.start_channels()
                if self.step("ready", self.wait) and self.step("execute", self.execute):
                    self.step("listening", self.listening)
                    if self.sleep:
                        self.step("interrupt", self.interrupt)
                    self.step("restart", self.restart)
                self.client.stop_channels()
        finally:
            self.step("shutdown", manager.shutdown_kernel)

        def leftovers() -> str:
            deadline = time.monotonic() + 10
            while (left := self.traces() - before) and time.monotonic() < deadline:
                time.sleep(0.2)
            return "still there: " + ", ".join(sorted(left)) if left else ""

        self.step("leftovers", leftovers)

    def wait(self) -> str:
        """Wait for the first answer, then until what the kernel publishes is received, as Jupyter does."""
        import contextlib
        import queue

        self.client.wait_for_ready(timeout=60)
        for _ in range(60):
            self.client.kernel_info(reply=True, timeout=30)
            with contextlib.suppress(queue.Empty):
                while self.client.get_iopub_msg(timeout=0.5)["content"].get("execution_state") != "idle":
                    pass
                return ""
        return "nothing is received on the kernel's iopub channel"

    def execute(self) -> str:
        """Let the kernel compute something and say where it works."""
        said: list[Any] = []
        reply = self.client.execute_interactive(self.cell, timeout=30, output_hook=said.append)["content"]
        if reply["status"] != "ok":
            return str(reply.get("evalue", "the kernel answered with an error"))
        text = "".join(str(message["content"].get("text", "")) for message in said)
        first, _, found = text.strip().partition("\n")
        if self.cell and first != "42":
            return "the kernel did not print 42"
        expected = self.directories()
        if not found or not expected or os.path.realpath(found) in map(os.path.realpath, expected):
            return ""
        return f"it works in {found} instead of {expected[0]}"

    def directories(self) -> list[str]:
        """Return the directories that the kernel may work in, none where that can't be known."""
        flags = ("--workdir=", "--pwd=", "--chdir=")
        chosen = [word.partition("=")[2] for word in self.inner.argv if word.startswith(flags)]
        job, step = self.plan.job, self.kernel.launch.steps[-1]
        if not self.inner.run_once:
            here = [os.getcwd(), *chosen]
            home = os.path.expanduser("~")  # where the node lacks the notebook's directory
            return here if not job else [*here, home] if isinstance(job, SlurmJob) else []
        if chosen or job or step.mode in APPTAINER_PROGRAMS:  # which decides by its site's configuration
            return chosen[-1:]
        question = "--format={{if not .Config.Entrypoint}}{{.Config.WorkingDir}}/{{end}}"  # that may leave it
        argv = [self.plan.argv[0], "image", "inspect", question, *step.targets]
        return os.fsdecode(self.host.output(argv, self.plan.environ).out).split()[:1]

    def interrupt(self) -> str:
        """Interrupt something that would run for a minute."""
        import time

        request = self.client.execute(self.sleep)
        time.sleep(0.5)
        self.manager.interrupt_kernel()
        while (reply := self.client.get_shell_msg(timeout=10))["parent_header"].get("msg_id") != request:
            pass
        return "" if reply["content"]["status"] != "ok" else "the code ran on"

    def restart(self) -> str:
        """Restart as Jupyter does with a kernel that hangs, then compute again."""
        self.manager.restart_kernel(now=True)
        return self.wait() or self.execute()

    def listening(self) -> str:
        """Look for addresses that others could reach, on Jupyter's ports and of the kernel's processes."""
        import socket

        connection: Mapping[str, Any] = self.manager.get_connection_info()
        ports = {connection[name + "_port"] for name in STREAMS}
        pids = () if self.plan.job else self.processes()  # srun's own ports are Slurm's affair
        links = [f"/proc/{pid}/fd/{name}" for pid in pids for name in self.host.listdir(f"/proc/{pid}/fd")]
        sockets = {os.path.basename(os.path.realpath(link)) for link in links}
        exposed = set()
        for path, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
            for line in (self.host.read(path) or b"").decode().splitlines()[1:]:
                fields = line.split()
                digits, port = fields[1].split(":")
                words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
                raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
                address, number = socket.inet_ntop(family, raw), int(port, 16)
                own = number in ports or f"socket:[{fields[9]}]" in sockets
                if own and fields[3] == "0A" and not address.startswith(("127.", "::1", "::ffff:127.")):
                    exposed.add(f"{address}, port {number}")
        return "others can reach it at " + "; ".join(sorted(exposed)) if exposed else ""

    def processes(self) -> dict[str, str]:
        """Return the processes that this check has started, with their command lines."""
        found: dict[str, str] = {}
        for pid in filter(str.isdigit, self.host.listdir("/proc")):
            environ = (self.host.read(f"/proc/{pid}/environ") or b"").split(b"\0")
            words = (self.host.read(f"/proc/{pid}/cmdline") or b"").split(b"\0")
            if words[0] and b"ENVKERNEL_CHECK=" + self.mark.encode() in environ:
                found[pid] = os.fsdecode(b" ".join(words[:4]).strip())
        return found

    def traces(self) -> set[str]:
        """Return what there is: this check's processes and directories, the kernelspec's containers, jobs."""
        found = {f"process {pid} ({command})" for pid, command in self.processes().items()}
        supervision, job = self.plan.supervision, self.plan.job
        key = kernel_key(self.manager.connection_file) if self.manager.connection_file else "none yet"
        for base in private_bases(self.plan.environ, self.host):
            names = [name for name in self.host.listdir(base) if key in name and not name.endswith(".lock")]
            found.update(f"directory {base}/{name}" for name in names)
        name = self.kernel.launch.options.get("name", self.kernel.name)  # as it was typed
        argv = [self.plan.argv[0], "ps", "--all", f"--filter=label=envkernel={name}", "--format={{.Names}}"]
        kept = supervision and supervision.shared and supervision.shared.keep
        if isinstance(job, SlurmJob):
            argv = [job.tool("squeue"), "-h", f"--user={os.getuid()}", f"--name={name}", "--format=%i"]
        elif kept or not (supervision and isinstance(supervision.explain, ContainerEnd)):
            return found
        kind, said = "job" if job else "container", self.host.output(argv, self.plan.environ)
        return found.union(f"{kind} {name}" for name in os.fsdecode(said.out).split())


def private_bases(environ: Mapping[str, str], host: Host) -> set[str]:
    """Return the directories in which private directories of a kernel may be, wherever it runs."""
    both = (environ, {**environ, "XDG_RUNTIME_DIR": ""})
    return {private_base(one, place, host) for one in both for place in ("", "home", "tmp")}


def check_command(options: Mapping[str, Any], host: Host) -> int:
    """``envkernel check NAME``: start the real kernel and use it as a client does."""
    import tempfile

    kernel = our_kernel(options["NAME"], host)
    plans, error = examine(kernel, host)
    steps: list[dict[str, Any]] = []
    said, argv = "", kernel.spec["argv"]
    if not error:
        slow = write_bytecode(argv[0], argv[5], host) if is_booted(argv) else ""
        host.warn(f"envkernel: {slow}.\n".encode(errors="surrogateescape") * bool(slow))
        with tempfile.TemporaryFile() as log:
            check = Check(kernel, plans, host)
            check.run(log)
            log.seek(0)
            steps, said = check.steps, log.read().decode(errors="replace").strip()
    failed = bool(error) or any(row["error"] for row in steps)
    if options.get("json"):
        problem = {"message": error.message, "hint": error.hint} if error else None
        shown = {"name": kernel.name, "ok": not failed, "steps": steps, "error": problem, "stderr": said}
        print(to_json(shown).decode())
        return int(failed)
    for row in steps:
        print(f"{row['step']:10} {row['seconds']:7.3f} s  {row['error'] or 'ok'}")
    if error:
        raise error
    if failed:
        print("The kernel said:\n" + said if said else "The kernel said nothing.", file=sys.stderr)
        print(f"  Look at what it would do: envkernel show {kernel.name}", file=sys.stderr)
    return int(failed)


class Command(Record):
    """A management command; argument: metavar of what it takes; optional: ``--all`` takes its place."""

    run: Callable[..., int]
    argument: str
    summary: str
    options: list[Option] = []
    optional: bool = False


_JSON = Option("--json", "Print JSON.")
_LOGS = Option("--all", "Print all logs that are kept, the newest first.")
_EVERY = Option("--all", "Update all kernels instead of one.")
COMMANDS: dict[str, Command] = {
    "list": Command(list_command, "", "List the kernels of envkernel, and what is broken.", [_JSON]),
    "show": Command(show_command, "NAME", "Show how a kernel was made and what it would do now.", [_JSON]),
    "check": Command(check_command, "NAME", "Start a kernel, use it, and say what fails.", [_JSON]),
    "log": Command(log_command, "NAME", "Print why a kernel last failed, and its newest launch.", [_LOGS]),
    "update": Command(update_command, "NAME", "Write a kernel again from its command.", [_EVERY], True),
    "stop": Command(stop_command, "NAME", "End all that runs for a kernel: containers, jobs, processes."),
    "remove": Command(remove_command, "NAME", "Remove a kernel."),
    "completion": Command(completion_command, "SHELL", "Print a completion script for bash, zsh or fish."),
}
"""The management commands by name."""


# ---- effects ------------------------------------------------------------------------------------


class Host:
    """The one access of planning and setup to the world.  Tests give one that reads dictionaries."""

    quiet = False  # no activation script is run, and what programs say on stderr is dropped (for `list`)
    made: tuple[str, ...] = ()  # what setup has made so far, to be removed where it fails

    @property
    def host(self) -> Host:
        """This machine, also where the queries are about the inside of an image."""
        return self

    def ids(self) -> tuple[int, int, list[int]]:
        """Return this user's number, group and all groups."""
        return os.getuid(), os.getgid(), sorted(os.getgroups())

    def home(self) -> str:
        """Return this user's home by the system's user database."""
        import pwd

        try:
            return pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return "/"

    def random(self) -> str:
        """Return eight hexadecimal digits that nobody can guess."""
        return os.urandom(4).hex()

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def isdir(self, path: str) -> bool:
        return os.path.isdir(path)

    def real_path(self, path: str) -> str:
        return os.path.realpath(path)

    def is_executable(self, path: str) -> bool:
        return os.path.isfile(path) and os.access(path, os.X_OK)

    def is_readable(self, path: str) -> bool:
        return os.access(path, os.X_OK if os.path.isdir(path) else os.R_OK)

    def absolute(self, path: str) -> str:
        """Return `path` absolute, ``~`` resolved, links kept."""
        try:
            return os.path.abspath(os.path.expanduser(path))
        except FileNotFoundError:
            raise UserError("The current directory is gone.", "Change to another one.") from None

    def read(self, path: str) -> bytes | None:
        """Return what a file holds, None where it can't be read."""
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError:
            return None

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory, none where it can't be read."""
        try:
            return os.listdir(path)
        except OSError:
            return []

    def output(self, argv: Sequence[str], environ: Environ) -> Output:
        """Run a program with no stdin; return what it said.  Raises UserError where it can't be started."""
        return run_program(argv, environ)

    def source(self, actions: Sequence[tuple[str, str, str]], environ: Environ) -> dict[str, str]:
        """Let bash do actions of `SOURCING`; return the environment that results.  Raises UserError.

        Only the difference is applied to `environ`, for bash rewrites some variables of its own.
        """
        scripts = [name for kind, name, _ in actions if kind == "source"]
        if self.quiet:
            known = {name: value for kind, name, value in actions if kind == "export"}
            for name in scripts:
                if name.endswith("/bin/activate"):
                    known["VIRTUAL_ENV"] = name[: -len("/bin/activate")]
            return {**environ, **known}
        names = {"BASH_ENV", "SHELLOPTS", "BASHOPTS", "POSIXLY_CORRECT"}
        clean = {name: value for name, value in environ.items() if name not in names}
        words = [word for action in actions for word in action]
        after = bash_environ(["--noprofile", "--norc", "-c", SOURCING, "bash", *words], clean, self.quiet)
        if not after:
            hint = "Take the `exit` out of it, or the `set -e` and the command that failed."
            raise UserError(f"An activation script ended the shell ({', '.join(scripts)}).", hint)
        changed = {name: value for name, value in after.items() if clean.get(name) != value}
        changed = {name: value for name, value in changed.items() if name not in SHELL_OWN}
        gone = clean.keys() - after.keys() - SHELL_OWN
        return {name: value for name, value in {**environ, **changed}.items() if name not in gone}

    def login_environ(self, environ: Environ) -> dict[str, str]:
        """Return a login shell's environment, empty without bash.  What its scripts print goes to stderr."""
        login = "exec 237>&1 >&2; exec /bin/bash -l -c 'exec /usr/bin/env -0 >&237'"
        return bash_environ(["-c", login], environ, self.quiet)

    def warn(self, text: bytes) -> None:
        """Pass on to stderr what a program said there."""
        if text and not self.quiet:
            write_patiently(2, text)

    def agrees(self, question: str) -> bool:
        """Ask the person at the terminal, whose Enter means yes; without a terminal nobody is asked."""
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            return True
        print(question + " [Y/n] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().lower() in ("\n", "y\n", "yes\n")

    def show(self, argv: Sequence[str], environ: Environ, directory: str | None = None) -> int:
        """Run a program (in a directory) with its output on the terminal; return its exit status."""
        import subprocess

        try:
            return subprocess.run(argv, env=environ, cwd=directory, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise cannot_start(argv[0], error) from None

    def produce(self, argv: Sequence[str], path: str, environ: Environ, directory: str | None = None) -> int:
        """Run a program that makes the file `path`, one of its words, beside its place; move it there."""
        part = f"{path}.{self.random()}.part"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            status = self.show([part if word == path else word for word in argv], environ, directory)
            if not status:
                os.replace(part, path)
            return status
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}.", "Give another path.") from None
        finally:
            remove_tree(part)

    def try_plan(self, plan: Plan) -> Output:
        """Run a plan's program to its end with its private directory there; nothing is left of either."""
        assert plan.supervision
        directory = plan.supervision.directory
        private_directory(os.path.dirname(directory))
        try:
            prepare(plan.supervision)
            return self.output(plan.argv, plan.environ)
        finally:
            remove_tree(directory)
            remove_empty(os.path.dirname(directory))

    def listens(self, launch: Launch, environ: Environ) -> bool:
        """Start a kernel as Jupyter does, and kill it; return whether all its unix sockets were there."""
        import subprocess
        import tempfile
        import time

        with tempfile.TemporaryDirectory(prefix="envkernel-") as scratch:
            path = scratch + "/connection.json"
            connection: dict[str, Any] = {"key": os.urandom(16).hex(), "signature_scheme": "hmac-sha256"}
            connection.update({name + "_port": number for number, name in enumerate(STREAMS, 1)})
            with open(path, "wb") as file:
                file.write(to_json({**connection, "transport": "ipc", "ip": scratch + "/j"}))
            own = {"name": "setup", "connection-file": path, "no-error-kernel": True}
            launch = launch.replace(options={"env": [], **launch.options, **own})
            supervision = plan_launch(launch, self, environ).supervision
            assert supervision
            words = [path if word == CONNECTION_FILE else word for word in launch_to_argv(launch)]
            argv = [*launcher(sys.executable, os.path.abspath(__file__)), *words]
            environ = {**environ, "JUPYTER_DATA_DIR": scratch, "JPY_PARENT_PID": str(os.getpid())}
            null = subprocess.DEVNULL
            process = subprocess.Popen(argv, 0, None, null, null, null, env=environ, start_new_session=True)
            missing = list(range(len(STREAMS)))
            end = time.monotonic() + 20
            while missing and process.poll() is None and time.monotonic() < end:
                try:
                    connect_ipc(supervision.relay["ip"], missing[0], {}).close()
                    del missing[0]
                except OSError:
                    time.sleep(0.02)
            process.kill()
            process.wait()
            end = time.monotonic() + 20
            while os.path.exists(supervision.directory + ".lock") and time.monotonic() < end:
                time.sleep(0.02)
            return not missing


def archive_names(path: str) -> list[str] | None:
    """Return the names of what is in a tar archive, None where there is none."""
    import tarfile

    try:
        with tarfile.open(path) as archive:
            return archive.getnames()
    except (OSError, tarfile.TarError):
        return None


def create_virtualenv(path: str, python: str, host: Host, environ: Environ) -> None:
    """Make a virtualenv, unless there is one, and install ipykernel if it is missing.  Raises UserError."""
    inside = path + "/bin/python"
    commands = [[inside, "-m", "pip", "install", "ipykernel"]]
    uv = search_program("uv", path_entries(environ), host)
    if uv and b"\nuv = " in (host.read(path + "/pyvenv.cfg") or b""):  # it has no pip
        commands = [[uv, "pip", "install", "--python", inside, "ipykernel"]]
    if os.path.exists(inside):
        if not host.output([inside, "-c", "import ipykernel_launcher"], environ).status:
            return
    elif os.path.lexists(path):
        hint = "Give a directory that does not exist yet, or leave --create out."
        raise UserError(f"{path} is there already and no virtualenv.", hint)
    else:
        host.made = (first_missing(path),)
        commands.insert(0, [python, "-m", "venv", path])
    for command in commands:
        if host.show(command, environ):
            lacking = host.output([command[0], "-c", "import ensurepip"], environ).status
            hint = "See above." + " On Debian, venv needs: apt install python3-venv." * bool(lacking)
            raise UserError(f"The virtualenv {path} could not be made: {' '.join(command)} failed.", hint)


class ImageHost(Host):
    """The inside of an image, by short runs of it; the first lists programs and kernelspecs on its PATH."""

    LISTING = (
        "IFS=:; set -f; printf '%s\\n' \"$PATH\"; set +f; for d in $PATH; do "
        'for f in "$d"/*; do [ -f "$f" ] && [ -x "$f" ] && printf "x%s\\n" "$f"; done; '
        'for f in "${d%/*}"/share/jupyter/kernels/*/*; do [ -f "$f" ] && printf "f%s\\n" "$f"; done; '
        "done; exit 0"
    )

    def __init__(self, host: Host, inside: Sequence[str], environ: Environ) -> None:
        self.inside = list(inside)
        self.environ = environ
        self._host = host
        self.said = host.output([*inside, "sh", "-c", self.LISTING], environ)
        path, *lines = os.fsdecode(self.said.out).split("\n")
        self.search = path.split(":")
        self.programs = {line[1:] for line in lines if line.startswith("x")}
        self.files = self.programs | {line[1:] for line in lines if line.startswith("f")}

    @property
    def host(self) -> Host:
        return self._host

    def exists(self, path: str) -> bool:
        return path in self.files or self.isdir(path)

    def isdir(self, path: str) -> bool:
        return any(file.startswith(path + "/") for file in self.files)

    def is_executable(self, path: str) -> bool:
        is_listed = os.path.dirname(path) in self.search
        return path in self.programs if is_listed else not self.output(["test", "-x", path], {}).status

    def listdir(self, path: str) -> list[str]:
        start = path + "/"
        return sorted({file[len(start) :].split("/")[0] for file in self.files if file.startswith(start)})

    def read(self, path: str) -> bytes | None:
        said = self.output(["cat", path], {})
        return None if said.status else said.out

    def output(self, argv: Sequence[str], environ: Environ) -> Output:
        return self._host.output([*self.inside, *argv], self.environ)


class TimedHost(Host):
    """Host for `list`: no activation script runs, and no program is waited for long."""

    PATIENCE = 5.0  # seconds that a program has for its answer

    quiet = True

    def output(self, argv: Sequence[str], environ: Environ) -> Output:
        """Run a program and return what it said.  Raises UserError where it does not start or answer."""
        import subprocess

        null = subprocess.DEVNULL
        try:
            done = subprocess.run(argv, env=environ, stdin=null, capture_output=True, timeout=self.PATIENCE)
        except subprocess.TimeoutExpired:
            raise UserError(f"{argv[0]} does not answer.", f"Try it: {' '.join(map(quoted, argv))}") from None
        except OSError as error:
            raise cannot_start(argv[0], error) from None
        return Output(done.returncode, done.stdout, done.stderr)


SOURCING = """
exec 237>&1 >&2
__envkernel=("$@"); set --
for ((__envkernel_at = 0; __envkernel_at < ${#__envkernel[@]}; __envkernel_at += 3)); do
    case ${__envkernel[__envkernel_at]} in
        source) . "${__envkernel[__envkernel_at + 1]}" ;;
        export) export "${__envkernel[__envkernel_at + 1]}=${__envkernel[__envkernel_at + 2]}" ;;
        eval) eval "${__envkernel[__envkernel_at + 1]}" ;;
    esac
    set +eu
done
exec /usr/bin/env -0 >&237
"""
"""The one shell program: it gets names and values as arguments, never as code; ``eval`` runs what a module
system printed for a shell."""


def bash_environ(words: Sequence[str], environ: Environ, quiet: bool) -> dict[str, str]:
    """Return the environment that bash writes to its stdout, empty where it wrote none."""
    said = run_program(["/bin/bash", *words], environ, -1 if quiet else 2)
    return dict(entry.partition("=")[::2] for entry in os.fsdecode(said.out).split("\0") if entry)


def run_program(argv: Sequence[str], environ: Environ, err: int | None = None) -> Output:
    """Run a program with no stdin; return what it said, on stderr too unless that goes to the file `err`."""
    with open(scratch_file(), "r+b") as out, open(scratch_file(), "r+b") as said:
        pid = spawn(argv, environ, -1, out.fileno(), said.fileno() if err is None else err, os.getpgrp())
        status = os.waitpid(pid, 0)[1]
        out.seek(0)
        said.seek(0)
        return Output(exit_status(status), out.read(), said.read())


def scratch_file() -> int:
    """Return the descriptor of a file that nobody else sees, in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("envkernel")
    import tempfile

    file, path = tempfile.mkstemp()
    os.unlink(path)
    return file


def from_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.  Raises ValueError where it is none."""
    import json

    return json.loads(text)


def to_json(value: Any) -> bytes:
    """Return plain data as JSON, in ASCII."""
    import json

    return json.dumps(value).encode()


def spawn(
    argv: Sequence[str], environ: Environ, stdin: int = -1, out: int = 1, err: int = 2, group: int = 0
) -> int:
    """Start a program with files (-1: none) in a group (0: its own); return its pid.  Raises UserError."""
    null: Any = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
    actions = [null] if stdin < 0 else [(os.POSIX_SPAWN_DUP2, stdin, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, max(file, 0), to) for file, to in ((err, 2), (out, 1))]
    more: dict[str, Any] = {"file_actions": actions, "setpgroup": group, "setsigmask": ()}
    try:
        return os.posix_spawn(argv[0], [*argv], environ, setsigdef=IGNORED_BY_PYTHON, **more)
    except OSError as error:
        raise cannot_start(argv[0], error) from None


def exit_status(status: int) -> int:
    """Return a wait status as an exit status, negative for a signal."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def cannot_start(program: str, error: OSError) -> UserError:
    """Return the error for a program that the system would not start."""
    hint = "Check that it is there, that it is executable, and that the interpreter it names exists."
    status = 127 if error.errno == 2 else 126
    return UserError(f"The program {program} can't be started: {error.strerror}.", hint, status)


# ---- launch log ---------------------------------------------------------------------------------


def quoted(word: str) -> str:
    """Return a word as a shell reads it back (``shlex.quote`` without the cost of ``re``)."""
    if word and all(c.isalnum() or c in "@%+=:,./-_" for c in word):
        return word
    return "'" + word.replace("'", "'\"'\"'") + "'"


def masked(assignment: str) -> str:
    """Return NAME=VALUE, where VALUE may be such a text again, without passwords and other secrets."""
    name, equals, value = assignment.partition("=")
    words = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH")
    secret = name != "--pass" and any(word in name.upper() for word in words)
    if equals and (secret or ("://" in value and "@" in value)):
        return f"{name}=***"
    return name + equals + (masked(value) if "=" in value else value)


def log_text(tokens: Sequence[str], plan: Plan | None, before: Environ, now: float, pid: int) -> str:
    """Return what the log of a launch says at its start.  before: the environment that Jupyter gave."""
    import time

    lines = [
        time.strftime("started: %Y-%m-%d %H:%M:%S +0000", time.gmtime(now)),
        f"process: {pid}",
        "command: envkernel " + " ".join(quoted(masked(token)) for token in tokens),
    ]
    if plan:
        lines.append("runs: " + " ".join(quoted(masked(word)) for word in plan.argv))
        own = {name: value for name, value in before.items() if name not in plan.given}  # --env: by Jupyter
        after = {**plan.environ, **plan.given}
        changes = [f"  - {name}" for name in own if name not in after]
        changes += [f"  + {masked(f'{name}={new}')}" for name, new in after.items() if own.get(name) != new]
        lines += ["environment:", *sorted(changes)]
    return "\n".join(lines) + "\n"


def data_dir(environ: Environ) -> str:
    """Return Jupyter's data directory, by the rules of jupyter_core."""
    data = environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return environ.get("JUPYTER_DATA_DIR") or data + "/jupyter"


def log_place(name: str, environ: Environ) -> tuple[str, str]:
    """Return the directory of the launch logs and how the file names of one kernel begin."""
    return data_dir(environ) + "/envkernel", name.lower().replace("/", "%2F")[:150] + "@"


def start_log(name: str, text: str, environ: Environ, file_name: str = "") -> tuple[str, str]:
    """Write a launch log for this user alone and forget all but the last ten; return its path (empty where it
    can't be written), and the last one's for the same connection file."""
    import time

    directory, prefix = log_place(name, environ)
    mark = "-{}.log".format(file_name.replace("kernel-", "").split(".")[0][:8])
    path = f"{directory}/{prefix}{time.time_ns()}{mark}"
    earlier = ""
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        olds = sorted(old for old in os.listdir(directory) if old.startswith(prefix))
        earlier = next((f"{directory}/{old}" for old in olds[::-1] if file_name and old.endswith(mark)), "")
        for old in olds[:-9]:
            remove_tree(f"{directory}/{old}")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode(errors="surrogateescape"))
    except OSError:
        return "", earlier
    return path, earlier


def printable(text: str, secret: str = "") -> str:
    """Return what a program said as it may be shown: no terminal codes, no `secret`."""
    import re

    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])", "", text)
    text = re.sub(r"[^\n]*\r(?=[^\n])", "", text)  # a progress bar: the last state of its line
    text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    return text.replace(secret, "***") if secret else text


def log_end(path: str, status: int, reason: UserError | None, said: bytes = b"", key: str = "") -> None:
    """Add to a launch log how the program ended, and what it said at last.  key: never shown."""
    lines = printable(said.decode("utf-8", "replace"), key).splitlines()
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    text = ["stderr:", *("  " + line for line in lines), "ended: " + ended]
    if reason:
        text += ["reason: " + " ".join(f"{reason.message} {reason.hint}".split())]
        text += ["  " + line for line in printable(reason.detail, key).splitlines()]
    append_log(path, "\n".join(text))


def append_log(path: str, text: str) -> None:
    """Add lines to a launch log; an empty path is none."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
            file.write(text.rstrip("\n").encode(errors="surrogateescape") + b"\n")
    except OSError:
        return


# ---- private directories, locks, processes ------------------------------------------------------


def kernel_key(text: str) -> str:
    """Return 16 hexadecimal digits that identify a text (a connection file's path)."""
    from binascii import crc32

    raw = os.fsencode(text)
    return f"{crc32(raw):08x}{crc32(raw[::-1], 1):08x}"


def private_base(environ: Environ, place: str, host: Host) -> str:
    """Return the directory that holds the private directories of this user's kernels.

    place: ``home`` where an engine sees no other (but a rootful daemon may not read that), ``tmp``: in /tmp.
    """
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if place == "home":
        return os.path.expanduser("~") + "/.cache/envkernel"
    if not place and runtime and host.isdir(runtime):
        return runtime + "/envkernel"
    temporary = "/tmp" if place == "tmp" else environ.get("TMPDIR") or "/tmp"
    return f"{temporary}/envkernel-{host.ids()[0]}"


def read_connection(launch: Launch, host: Host) -> tuple[str, bytes, dict[str, Any]]:
    """Return Jupyter's connection file: path, text and what it says; a placeholder and nothing if nothing
    is launched (`show`, setup).  Raises UserError."""
    path = launch.options.get("connection-file") or CONNECTION_FILE
    if path == CONNECTION_FILE:
        return path, b"", {}
    text = host.read(path) or b""
    try:
        said = from_json(text)
        ports = [said[name + "_port"] for name in STREAMS]
        texts = "".join([said["ip"], said.get("key", ""), said.get("transport", "tcp")])
        if "\0" in texts or not all(type(port) is int and 0 < port < 1 << 16 for port in ports):
            raise ValueError("no addresses")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        hint = "Let Jupyter start this kernel; by hand, give it a connection file."
        raise UserError(f"The connection file {path} can't be read.", hint) from None
    return path, text, said


class Supervision(Record):
    """What accompanies a program from before its start until nothing of it is left."""

    directory: str  # of this kernel alone (0700): made first, removed last; with ``.lock`` added, its lock
    files: list[tuple[str, bytes]] = []  # (path, content) to write, mode 0600
    copies: list[tuple[str, str]] = []  # (directory, its copy to make)
    signal: list[str] = []  # sends ``{signal}`` to the kernel; without, the program's process group gets it
    leader: bool = True  # the program itself, which leads its group, gets it too
    init: list[str] = []  # prints the pid of an init on this host; its one child leads the kernel's group
    cleanup: list[Sequence[str]] = []  # commands for the end; they succeed where nothing is left to do
    remove: list[str] = []  # further files and directories to remove
    litter: bool = False  # the program leaves files where it is started
    container: str = ""  # its name for docker or podman
    shared: Shared | None = None
    connection: dict[str, Any] = {}  # what Jupyter's connection file says
    relay: dict[str, Any] = {}  # where the kernel listens if not there; ipc: at `ip` with ``-1`` or ``:1``
    owner: int = -1  # user id that gets the private directory from root; -1 for this one
    explain: Callable[[int, str, Host], UserError | None] | None = None  # (status, said, host): why it ended


class Shared(Record):
    """A container that several kernels share."""

    alive: list[str]  # prints ``true`` where it runs
    start: list[str]  # when the first kernel comes
    stop: list[str]  # when the last is gone
    keep: bool = False  # do not stop it
    copies: list[tuple[str, str]] = []  # (directory, its copy), made and removed with it


class Membership:
    """This kernel's share in a shared container, held by locks: they end with who holds them.

    All keepers share ``users.lock``: the last one can lock it alone.  ``start.lock`` is to start and stop.
    """

    def __init__(self, shared: Shared, directory: str, locks: Sequence[int] = ()) -> None:
        """Join, or take over a membership with its locks.  directory: that of all the private directories."""
        import fcntl

        self.shared = shared
        self.directory = directory
        if not locks:
            start = take_lock(directory + "/start.lock")
            users = os.open(directory + "/users.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(users, fcntl.LOCK_SH)
            fcntl.flock(start, fcntl.LOCK_UN)
            locks = [start, users]
        self.start_lock, self.users_lock = self.locks = locks

    def have_container(self, environ: Environ, host: Host) -> Output:
        """Start the container unless it runs; return what the engine said.  Raises UserError."""
        import fcntl

        fcntl.flock(self.start_lock, fcntl.LOCK_EX)
        try:
            said = host.output(self.shared.alive, environ)
            if said.out.strip() != b"true":
                host.output(self.shared.stop, environ)
                make_copies(self.shared.copies)
                said = host.output(self.shared.start, environ)
        finally:
            fcntl.flock(self.start_lock, fcntl.LOCK_UN)
        return said

    def leave(self, environ: Environ, interrupted: bool) -> None:
        """Stop the container, unless others use it.  interrupted: the engine may be about to create it."""
        import fcntl
        import time
        from contextlib import suppress

        fcntl.flock(self.start_lock, fcntl.LOCK_EX)
        with suppress(BlockingIOError):
            fcntl.flock(self.users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.shared.keep:
                retry(self.shared.stop, environ)
                if interrupted:
                    time.sleep(2)
                    retry(self.shared.stop, environ)
                for path in [*(copy for _, copy in self.shared.copies), self.directory]:
                    remove_tree(path)
                    remove_empty(os.path.dirname(path))
        for lock in self.locks:  # the run process may have them open for long
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def take_lock(path: str) -> int:
    """Return an open lock file that this process holds alone, when nobody else does.  Raises UserError."""
    import fcntl

    while True:
        private_directory(os.path.dirname(path))
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # the last user of the directory has just removed it
            continue
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def private_directory(path: str) -> None:
    """Make a directory that only this user can enter.  Raises UserError where something else is there."""
    import stat

    mask = os.umask(0o077)
    try:
        os.makedirs(path, exist_ok=True)
        info = os.lstat(path)
    except OSError as error:
        hint = "Point XDG_RUNTIME_DIR or TMPDIR at a directory that you can write to."
        raise UserError(f"The directory {path} can't be made: {error.strerror}.", hint) from None
    finally:
        os.umask(mask)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        message = f"The directory {path} is not yours alone, so connection files are not safe there."
        raise UserError(message, f"Remove it, or make it yours: chmod 700 {path}.")


def remove_tree(path: str) -> None:
    """Remove a file or a directory with all that is in it, as far as that is allowed.  Follows no links."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError:
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def remove_empty(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError:
        return


def prepare(supervision: Supervision) -> None:
    """Make the private directory with its files, and the copies.  Raises UserError where that fails."""
    remove_tree(supervision.directory)
    try:
        os.mkdir(supervision.directory, 0o700)
        for path, text in supervision.files:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text)
                os.fchown(file.fileno(), supervision.owner, -1)
        os.chown(supervision.directory, supervision.owner, -1)
    except OSError as error:
        hint = "Free some space there, or point XDG_RUNTIME_DIR or TMPDIR elsewhere."
        raise UserError(f"{supervision.directory} can't be filled: {error.strerror}.", hint) from None
    make_copies(supervision.copies)


def make_copies(copies: Sequence[tuple[str, str]]) -> None:
    """Copy directories, each in the place of what may be left of an earlier copy.  Raises UserError."""
    import subprocess

    for source, copy in copies:
        private_directory(os.path.dirname(copy))
        remove_tree(copy)
        argv, null = ["env", "LC_ALL=C", "cp", "-a", source, copy], subprocess.DEVNULL
        done = subprocess.run(argv, stdin=null, capture_output=True)
        if done.returncode:
            remove_tree(copy)
            hint = "Free some space, point TMPDIR to a larger disk, or bind the directory without copying it."
            said, _, reason = os.fsdecode(done.stderr).partition("\n")[0].rpartition(": ")
            path = said.partition("'")[2].rpartition("'")[0].replace(copy, source, 1) or source
            raise UserError(f"{path} can't be copied to {copy}: {reason}.", hint)


def process_stat(pid: int) -> list[int]:
    """Return fields 4 to 52 of /proc/pid/stat, nothing where a process is gone or a zombie.

    0: parent, 1: process group, 2: session, 18: start time, which with the pid names a process for good.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return []
    return [] if state in b"ZX" else [*map(int, fields)]


def find_processes(is_wanted: Callable[[int], bool]) -> list[int]:
    """Return the processes of this machine that are wanted."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and is_wanted(int(name))]


def send_signals(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except OSError:
            continue


def group_members(group: int) -> list[int]:
    """Return the members of a process group except its leader and an init, which pass signals on."""
    pids = find_processes(lambda pid: pid != group and process_stat(pid)[1:2] == [group])
    texts = [(Host().read(f"/proc/{pid}/status") or b"").partition(b"\nNSpid:")[2] for pid in pids]
    return [pid for pid, text in zip(pids, texts) if text.partition(b"\n")[0].split()[1:][-1:] != [b"1"]]


def retry(command: Sequence[str], environ: Environ, seconds: float = 60) -> bool:
    """Run a command until it succeeds (a daemon may be restarting) or time is up; return which."""
    import time
    from contextlib import suppress
    from subprocess import DEVNULL, TimeoutExpired, run

    end = time.monotonic() + seconds
    pause = 1
    while True:
        with suppress(OSError, TimeoutExpired):
            limit = max(end - time.monotonic(), 10)  # then it hangs
            if not run(command, env=environ, stdin=DEVNULL, stdout=DEVNULL, timeout=limit).returncode:
                return True
        if time.monotonic() + pause > end:
            return False
        time.sleep(pause)
        pause *= 2


def tcp_socket(address: str) -> socket.socket:
    """Return a TCP socket of an address's family; with its protocol named asyncio sets TCP_NODELAY."""
    import socket

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)


def connect_ipc(address: str, number: int, files: dict[int, int]) -> socket.socket:
    """Return a socket connected to a kernel, which joins address and number with ``-`` or ``:``.

    files: of the sockets that were found, kept open: their directory may go while the kernel runs (logout).
    """
    import socket

    path = next(filter(os.path.exists, (f"{address}{sign}{number + 1}" for sign in "-:")), "")
    if path and number in files:
        os.close(files.pop(number))  # a kernel that was started again has others
    if number not in files:
        files[number] = os.open(path, os.O_PATH)
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(f"/proc/self/fd/{files[number]}")  # a unix socket's address has room for 107 bytes only
    except BaseException:
        sock.close()
        raise
    return sock


def was_connected(connection: Mapping[str, Any], host: Host) -> bool:
    """Return whether anybody is connected to a kernel's TCP ports, or was within a minute (proc(5))."""
    wanted = [b":%04X" % int(connection[name + "_port"]) for name in STREAMS if connection]
    tables = [host.read(path) or b"" for path in ("/proc/net/tcp", "/proc/net/tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return any(row[1][-5:] in wanted and row[3] != b"0A" for row in rows)  # 0A: it listens


def ended_error(status: int, where: str, said: str, install: str = "install %s") -> UserError:
    """Return the error for a kernel that ended before it answered.  said: the end of its stderr."""
    import re
    import signal

    number = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    names = {known.value: known.name for known in signal.Signals}
    words = f"signal {names.get(number, number)}" if number else f"exit status {status}"
    hint = "What it said is below; start its command by hand to see more."
    missing = re.search(r"No module named '?([\w.]+)", said)
    library = re.search(r"([\w./+-]+\.so[\w.]*): cannot open shared object file", said)
    if missing:
        package = missing[1].split(".")[0].replace("ipykernel_launcher", "ipykernel")
        hint = f"Install what it misses: `{install % package}`."
    elif library:
        hint = f"Its library {library[1]} is missing: install it, or load a module that brings it."
    elif status == 125:
        words += ": the engine itself failed"
        hint = "What the engine said is below; correct the image's name or the engine's options."
    elif status in (126, 127):
        words += ": the command was not found" if status == 127 else ": the command can't be executed"
        hint = "Check the kernel command and that its program is installed there."
    elif number == 9:
        words += ", killed: out of memory?"
        hint = "Give it more memory, or ask the administrator of this machine what ended it."
    return UserError(f"The kernel in {where} ended before it answered ({words}).", hint, max(status, 1), said)


def watched(plan: Plan, launch: Launch, host: Host) -> Plan:
    """Return the plan of a kernel that Jupyter starts again, with a keeper if the start before it failed.

    A kernel that ends before it answers is started again within seconds, with the same connection file.
    """
    import time

    log = os.fsdecode(host.read(launch.options["earlier"]) or b"")
    names = [line.partition(": ")[0] for line in log.splitlines()]
    try:
        path, _, connection = read_connection(launch, host)
    except UserError:  # the kernel itself will say so
        return plan
    failed = ("ended" in names) == ("not started" in names)
    if "ended" not in names:  # it had no keeper
        start = int(launch.options["earlier"].rpartition("@")[2].partition("-")[0])
        failed = failed and time.time_ns() - start < 120e9 and connection.get("transport") != "ipc"
        failed = failed and not was_connected(connection, host)
    if not failed or not connection:
        return plan
    directory = f"{private_base(plan.environ, '', host)}/{kernel_key(path)}"
    return plan.replace(supervision=Supervision(directory, connection=connection))


# ---- keeper -------------------------------------------------------------------------------------
#
#   Jupyter -- run process --(socketpair)-- keeper -- program: an engine's client, srun, the kernel
#
# The run process is Jupyter's child: it passes signals on, watches Jupyter and ends as the kernel did.
# The keeper is its child, in a session of its own, where no signal to Jupyter's process group reaches it.
# It holds the lock of the connection file, owns Jupyter's ports (`Front`) and starts the program.
#
#   The run process is gone: the keeper closes the ports, kills the program, cleans up and unlocks.
#   The keeper is gone: the run process has recipe and locks, and starts a process that only cleans up.
#   Both are killed at once: the recipe is in the lock file, and the next start follows it (`stale_recipes`).


class Recipe(Record):
    """What has to be done when a kernel is over, as plain data: it travels, and is kept in the lock file."""

    directory: str
    session: int = 0  # of everything the keeper starts, 0 for none
    boot: str = ""  # of the machine on which the session is
    started: float = 0.0  # when (time.monotonic), 0 where only files are to be removed
    cleanup: list[Sequence[str]] = []
    remove: list[str] = []
    shared: dict[str, Any] | None = None
    container: str = ""
    log: str = ""  # path of the launch log
    created: bool = False  # the kernel has listened, or its program has ended by itself: nothing more comes


def clean_up(recipe: Recipe, environ: Environ, locks: Sequence[int]) -> None:
    """End what a keeper has started, remove what it leaves, and unlock.  locks: as in `Keeper`."""
    import re
    import time

    end_session(recipe.session)
    commands = recipe.cleanup if recipe.started else []
    failed = [command for command in commands if not retry(command, environ, 2)]
    for path in [*recipe.remove, recipe.directory, recipe.directory + ".lock"]:
        remove_tree(path)
        remove_empty(os.path.dirname(path))
    os.close(locks[0])
    interrupted = not recipe.created and time.monotonic() - recipe.started < 10
    if recipe.shared:
        shared = Membership(Shared(**recipe.shared), os.path.dirname(recipe.directory), locks[1:])
        shared.leave(environ, interrupted or not recipe.started)
    elif interrupted:
        failed = commands  # the engine may have been about to create what had to be removed
        time.sleep(2 * bool(failed))
        if recipe.container:  # podman leaves a monitor where it is killed while it creates a container
            words = rb"[^\0]*/conmon\0(.*\0)?%s\0" % re.escape(os.fsencode(recipe.container))
            find, read = re.compile(words, re.DOTALL).match, Host().read
            pids = find_processes(lambda pid: find(read(f"/proc/{pid}/cmdline") or b"") is not None)
            send_signals(pids, 9)
    for command in failed:
        if not retry(command, environ):
            append_log(recipe.log, "not cleaned up: " + " ".join(map(quoted, command)))


def end_session(session: int) -> None:
    """Kill what is left in a keeper's session, but not this process."""
    for _ in range(3 if session else 0):  # what is killed may just be starting something; 0 is not ours
        pids = find_processes(lambda pid: pid != os.getpid() and process_stat(pid)[2:3] == [session])
        send_signals(pids, 9)


def start_cleaner(recipe: Recipe, environ: Environ, locks: Sequence[int]) -> None:
    """Start a process that only cleans up, and give it the locks."""

    def clean() -> int:
        if os.fork() == 0:
            become_daemon((0, 1, 2))
            for file, following in zip([2, *sorted(locks)], [*sorted(locks), 1024]):
                os.closerange(file + 1, following)
            clean_up(recipe, environ, locks)
        return 0

    os.waitpid(fork(clean), 0)


def become_daemon(files: Sequence[int]) -> None:
    """Leave Jupyter's session, its signals to the run process, and some of its files."""
    os.setsid()
    handle_signals()
    drop_stdio(files)


def handle_signals(wake: int = -1, ignore: bool = True) -> None:
    """Write the numbers of signals to the file `wake`; else ignore them, or let them have their effect."""
    import signal

    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    handler: Any = (lambda *_: None) if ignore else signal.SIG_DFL  # programs would inherit SIG_IGN
    for name in ("INT", "QUIT", "USR1", "USR2", "TERM", "HUP"):
        signal.signal(getattr(signal, "SIG" + name), handler)


def drop_stdio(files: Sequence[int]) -> None:
    """Let go of what Jupyter gave as stdin, stdout or stderr: who reads these waits for their end."""
    null = os.open(os.devnull, os.O_RDWR)
    for file in files:
        os.dup2(null, file)
    os.close(null)


def stale_recipes(base: str) -> Iterator[tuple[Recipe, int]]:
    """Yield what keepers left in `base` that were killed with their run processes, each with its lock."""
    import fcntl
    from contextlib import suppress

    for name in Host().listdir(base):
        path = f"{base}/{name}"
        with suppress(OSError), open(path if name.endswith(".lock") else "", "r+b", 0) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                yield read_recipe(file.fileno(), path), os.dup(file.fileno())


def read_recipe(lock: int, path: str) -> Recipe:
    """Return what the last holder of a lock file wrote into it; an empty one says what to remove."""
    try:
        known = dict(from_json(os.pread(lock, 1 << 20, 0)))
    except ValueError:  # empty, or the disk was full
        known = {"directory": path[: -len(".lock")]}
    # another version of envkernel may have further fields
    recipe = Recipe(**{name: known[name] for name in Recipe.__annotations__ if name in known})
    # while a session lives, its number is no new process's
    if process_stat(recipe.session) or recipe.boot != boot_id():
        recipe.session = 0
    return recipe


def boot_id() -> str:
    """Return the number of this machine's present boot (random(4))."""
    return (Host().read("/proc/sys/kernel/random/boot_id") or b"").decode()


class Channel:
    """Messages between run process and keeper: lines of JSON, and `files` (unix(7), SCM_RIGHTS)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.text = b""
        self.files: list[int] = []

    def send(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> bool:
        """Send a message; return whether anybody is there to receive it."""
        import array
        import socket

        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        try:
            return bool(self.sock.sendmsg([to_json(message) + b"\n"], rights))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the other side, and of its files."""
        self.sock.close()
        for file in self.files:
            os.close(file)
        self.files = []

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived, waiting for some; None where the other side is gone."""
        import array
        import socket

        try:
            text, rights, _, _ = self.sock.recvmsg(1 << 16, 256, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        for _, _, data in rights:
            self.files += array.array("i", data)
        *lines, self.text = (self.text + text).split(b"\n")
        return [from_json(line) for line in lines] if text else None


def write_patiently(file: int, text: bytes) -> None:
    """Write to stdout or stderr, which may be blocked for long and then be exchanged by dup2."""
    import select

    poller = select.poll()
    poller.register(file, select.POLLOUT)
    try:
        while text:
            if poller.poll(100):
                text = text[os.write(file, text[:4096]) :]  # PIPE_BUF: it does not block
    except OSError:  # nobody reads it
        return


class Program:
    """What a keeper holds: an engine's client with a kernel in its container, or a kernel on this host."""

    linger = 0.0  # seconds that it outlives its run process, so that a restart finds it
    digest = ""  # what the launches have in common that may use it
    over = False  # no further launch can use it
    what = "kernel"
    keeper: Keeper

    def __init__(self, plan: Plan, supervision: Supervision, host: Host) -> None:
        self.plan = plan
        self.supervision = supervision
        self.host = host
        self.has_front = bool(supervision.relay)  # else the kernel itself listens at Jupyter's ports
        self.sockets: dict[int, int] = {}  # see `connect_ipc`

    def start(self) -> None:
        """Start it with the keeper as its Jupyter, before asyncio is imported.  Raises UserError."""
        supervision, environ = self.supervision, dict(self.plan.environ)
        if self.keeper.membership:
            said = self.keeper.membership.have_container(environ, self.host)
            if said.status:
                text = os.fsdecode(said.err)
                reason = supervision.explain and supervision.explain(said.status, text, self.host)
                raise reason or ended_error(said.status, self.plan.where, text)
        if "JPY_PARENT_PID" in environ:
            environ["JPY_PARENT_PID"] = str(os.getpid())
        if supervision.litter:
            os.chdir(supervision.directory)
        self.stderr, end = os.pipe()
        self.pid = spawn(self.plan.argv, environ, err=end)
        os.close(end)

    async def ready(self) -> None:
        """Return when the kernel can be connected.  Raises UserError."""
        import asyncio
        from contextlib import suppress

        loop, is_ipc = asyncio.get_running_loop(), self.supervision.relay["transport"] == "ipc"
        for number in range(len(STREAMS)):
            is_there = False
            while not is_there:
                with suppress(OSError, asyncio.TimeoutError), await self.connect(number) as sock:
                    # what publishes a port may accept before the kernel
                    is_there = is_ipc or bool(await asyncio.wait_for(loop.sock_recv(sock, 1), 5))
                if not is_there:
                    await asyncio.sleep(0.01)

    async def connect(self, number: int) -> socket.socket:
        """Return a connected, non-blocking socket to one of the kernel's `STREAMS`.  Raises OSError."""
        import socket

        relay = self.supervision.relay
        if relay["transport"] == "ipc":
            return connect_ipc(relay["ip"], number, self.sockets)
        sock = socket.create_connection((relay["ip"], int(relay[STREAMS[number] + "_port"])), 5)  # loopback
        sock.setblocking(False)
        return sock

    def send_signal(self, number: int) -> None:
        """Pass a signal of Jupyter's on to the kernel, by the engine's command where there is one."""
        if self.supervision.signal or self.supervision.init:
            self.keeper.aside(self.signal_inside, number)
        else:
            send_signals([-self.pid] if self.supervision.leader else group_members(self.pid), number)

    def signal_inside(self, number: int) -> None:
        """Signal a kernel in a container, in a thread: by its init's one child, or by the engine."""
        import signal
        from contextlib import suppress

        with suppress(ValueError, IndexError, OSError, UserError):
            if self.supervision.init:
                init = int(self.host.output(self.supervision.init, self.plan.environ).out)
                child = (self.host.read(f"/proc/{init}/task/{init}/children") or b"").split()[0]
                os.killpg(int(child), number)
                return
        name = signal.Signals(number).name[3:]
        with suppress(UserError):  # the engine is gone
            argv = [word.replace("{signal}", name) for word in self.supervision.signal]
            self.host.output(argv, self.plan.environ)

    async def wait(self) -> tuple[int, UserError | None]:
        """Return the kernel's exit status, as in `Output`, and why it ended where the engine knows that."""
        import asyncio

        stderr = asyncio.ensure_future(self.keeper.copy(self.stderr, 2, self.keeper.on_stderr))
        status = await self.keeper.exited(self.pid)
        self.over = True
        self.keeper.recipe.created |= status >= 0
        await asyncio.wait({stderr}, timeout=1)
        if not status or not self.supervision.explain or self.keeper.end_requested:
            return status, None
        said = self.keeper.tail.decode("utf-8", "replace")
        return status, await self.keeper.aside(self.supervision.explain, status, said, self.host)

    async def attach(self) -> None:
        """Start the kernel again for the run process of a restart."""

    async def lost(self) -> None:
        """Return when no other launch can use it any more, while it waits for one."""
        await self.keeper.loop.create_future()

    async def end(self) -> None:
        """End it gracefully; after that the keeper kills what is left in its session."""


class Children:
    """The processes below this one: when they end, and what they say.  tail: the end of their stderr."""

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self.children: dict[int, asyncio.Future[int]] = {}
        self.tail = b""

    def aside(self, call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Call what may block in a thread."""
        return self.loop.run_in_executor(None, call, *arguments)

    async def copy(self, file: int, target: int, learn: Callable[[bytes], bytes]) -> None:
        """Pass on what `learn` returns for what a program says, to its end; a blocked target delays it."""
        import asyncio

        reader = asyncio.StreamReader(1 << 13)
        protocol = asyncio.StreamReaderProtocol(reader)
        await self.loop.connect_read_pipe(lambda: protocol, open(file, "rb", 0))
        text = await reader.read(1 << 13)
        while text:
            await self.aside(write_patiently, target, learn(text))
            text = await reader.read(1 << 13)

    def on_stderr(self, text: bytes) -> bytes:
        """Keep the end of what the program says on stderr."""
        self.tail = (self.tail + text)[-1 << 13 :]
        return text

    async def exited(self, pid: int) -> int:
        """Return the exit status of a child, as in `Output`, when it has ended."""
        import asyncio

        future = self.children.setdefault(pid, self.loop.create_future())
        self.collect()
        return await asyncio.shield(future)

    def collect(self) -> None:
        """Reap the children that have ended, and only those that somebody waits for."""
        for pid, future in list(self.children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.children[pid]
                future.set_result(exit_status(status))


class Service(Children):
    """Serves one run process: Jupyter's ports, until the kernel has ended or nobody wants it any more."""

    HOLD = 3.0  # seconds before clients that connect are answered by the front
    DRAIN = 1.0  # seconds that Jupyter has for taking the last that the kernel said
    GRACE = 3.0  # seconds that a kernel has for ending after it was asked to with a signal
    leaving: asyncio.Event  # the run process is gone, or shall be served no longer

    def __init__(self, program: Program, launch: Launch, channel: Channel) -> None:
        super().__init__()
        self.program, self.launch, self.channel = program, launch, channel
        self.environ = program.plan.environ
        supervision = self.supervision = program.supervision
        self.connection: Mapping[str, Any] = supervision.connection
        self.front: Front | None = None
        self.cleaning: asyncio.Future[None] | None = None
        self.end_requested = False
        self.membership: Membership | None = None
        self.locks: list[int] = []  # the private directory's, then those of the membership
        self.recipe = Recipe(supervision.directory, os.getpid(), boot_id(), 0.0, supervision.cleanup)
        self.recipe.remove = [*supervision.remove, *(copy for _, copy in supervision.copies)]
        self.recipe.shared = vars(supervision.shared) if supervision.shared else None
        self.recipe.container, self.recipe.log = supervision.container, launch.options.get("log", "")

    async def serve_launch(self) -> None:
        """Serve a run process until the kernel has ended or nobody wants it any more."""
        import asyncio

        self.front = None
        if self.program.has_front:
            kernel = kernel_profile(self.launch, self.environ)
            self.front = Front(self.connection, kernel, self.launch.options.get("notice", ""))
        asked_for = self.front.shutdown if self.front else asyncio.Event()
        waits: Any = self.program.wait(), self.serve_front(self.front), self.leaving.wait(), asked_for.wait()
        ended, failed, leaving, asked = tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
            elif ended.done() and not leaving.done():
                await self.conclude(*ended.result())
            elif self.front and asked.done():  # by the front, before the kernel was there
                self.program.over = self.program.over or not self.front.restart
                await self.front.drain(self.DRAIN)
                self.send_exit(0)
        except UserError as error:
            self.program.over = True
            await self.conclude(error.status, error)
        finally:
            for task in tasks:
                task.cancel()

    async def serve_front(self, front: Front | None) -> None:
        """Open Jupyter's ports and join them with the kernel.  Raises UserError; never returns."""
        import asyncio

        def answer() -> None:
            if front and front.state == "holding":  # it does not since there was something to show
                front.wait(f"The {self.program.what} is starting.")

        hold = self.loop.call_later(self.HOLD, answer)
        nested = bool(self.launch.options.get("nested"))  # an agent's run process has a front already
        try:
            if front and not nested:
                await front.listen()
            while front and front.state not in ("live", "failed"):
                await self.program.ready()
                if nested:
                    await front.listen()
                    nested = False
                try:
                    await front.go_live(self.program.connect)
                    self.recipe.created = True
                except OSError:  # the kernel went away meanwhile
                    await asyncio.sleep(0.1)
            await self.loop.create_future()
        finally:
            hold.cancel()

    async def conclude(self, status: int, reason: UserError | None) -> None:
        """Say why the kernel has ended, where that is remarkable, and let the run process end like it."""
        import asyncio

        plan, said = self.program.plan, self.tail.decode("utf-8", "replace").strip()
        if self.end_requested:
            reason = None
        elif not self.answered(status):
            reason = reason or ended_error(status, plan.where, said, plan.install)
            reason.detail = reason.detail or said
            await self.fail(status, reason)
            return
        elif reason:
            # before the run process ends, for its caller may look then; a blocked stderr delays that little
            await asyncio.wait({self.aside(write_patiently, 2, error_text(reason))}, timeout=1)
        elif status:
            reason = UserError("The kernel ended by itself.")
        if self.front:
            await self.front.drain(self.DRAIN)
        self.send_exit(status, reason)

    async def fail(self, status: int, error: UserError) -> None:
        """Show the error in the notebook until Jupyter shuts the kernel down; else the run process does."""
        import asyncio

        key, log = self.connection.get("key", ""), self.launch.options.get("log", "")
        was_shown = error.detail in self.tail.decode("utf-8", "replace")  # the program's own stderr is there
        error.name_kernel(self.launch.options.get("name", "NAME"))
        error.detail = printable(error.detail, key)
        log_end(log, status, None, self.tail, key)
        if not self.front or self.front.is_encrypted or not shows_failure(self.launch):
            if self.front:
                self.front.close()
            self.channel.send({"exit": error.status, "error": vars(error)})
            return
        self.front.fail(error)
        shown = UserError(error.message, error.hint) if was_shown else error
        self.aside(write_patiently, 2, error_text(shown))
        append_log(log, f"not started: {error.message}\n{error.hint}\n{error.detail}")
        self.program.over = True
        self.cleaning = asyncio.ensure_future(self.end())
        tasks = [asyncio.ensure_future(event.wait()) for event in (self.leaving, self.front.shutdown)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await self.front.drain(self.DRAIN)
        self.channel.send({"exit": error.status or 1, "error": None})

    def answered(self, status: int) -> bool:
        """Return whether the kernel ever answered, as far as that can be seen."""
        if not self.front:
            return was_connected(self.connection, self.program.host)
        return self.front.answered(status)

    def send_exit(self, status: int, reason: UserError | None = None) -> None:
        """Let the run process end with a status; the log gets the reason."""
        log_end(self.launch.options.get("log", ""), status, reason, self.tail, self.connection.get("key", ""))
        self.channel.send({"exit": status, "error": None})

    def report(self, text: str) -> None:
        """Say what the kernel waits for: in the cells that wait, on stderr and in the launch log."""
        if self.front:
            self.front.wait(text)
        self.aside(write_patiently, 2, f"envkernel: {text}\n".encode(errors="replace"))
        append_log(self.launch.options.get("log", ""), text)

    async def end(self) -> None:
        """End the program and clean up."""
        await self.program.end()
        locks, self.locks = self.locks, []
        await self.aside(clean_up, self.recipe, self.environ, locks)


class Keeper(Service):
    """Keeps a program: serves one run process, with `linger` one after the other, then cleans up."""

    def begin(self) -> None:
        """Take the lock, send the recipe and start the program, before asyncio.  Raises UserError."""
        import time

        supervision, base = self.supervision, os.path.dirname(self.supervision.directory)
        if supervision.shared:
            self.membership = Membership(supervision.shared, base)
        lock = take_lock(supervision.directory + ".lock")
        earlier = read_recipe(lock, supervision.directory + ".lock")
        self.locks = [lock, *(self.membership.locks if self.membership else ())]
        self.recipe.started = time.monotonic()
        if not self.send_recipe(self.locks):
            raise UserError("Jupyter ended the kernel before it was started.")
        if earlier.started:
            end_session(earlier.session)
            for command in earlier.cleanup:
                retry(command, self.environ, 0)
        try:
            prepare(supervision)
            self.program.start()
        except UserError:
            self.recipe.started = 0.0
            raise
        finally:
            os.chdir("/")
        for stale, lock in stale_recipes("" if supervision.shared else base):
            start_cleaner(stale, self.environ, [lock])
            os.close(lock)

    def send_recipe(self, locks: Sequence[int] = ()) -> bool:
        """Write the recipe where kernels can't, and send it; return whether anybody received it."""
        if not self.recipe.shared:
            os.ftruncate(self.locks[0], os.pwrite(self.locks[0], to_json(vars(self.recipe)), 0))
        return self.channel.send({"recipe": vars(self.recipe)}, locks)

    async def serve(self) -> None:
        """Serve one run process after the other until the program is over or no other comes."""
        import asyncio
        import signal
        import socket

        self.loop = asyncio.get_running_loop()
        self.leaving = asyncio.Event()
        self.visitors: asyncio.Queue[Any] = asyncio.Queue()
        self.loop.add_signal_handler(signal.SIGCHLD, self.collect)
        self.loop.add_signal_handler(signal.SIGTERM, self.stop)
        if self.program.linger:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.supervision.directory + "/keeper")
            listener.listen(8)
            self.loop.add_reader(listener, self.on_visitor, listener)
        self.loop.add_reader(self.channel.sock, self.receive)
        while True:
            await self.serve_launch()
            if self.front:
                self.front.close()  # first the ports, then what waits for the end of a pipe
            drop_stdio((1, 2))
            self.leave()
            self.channel.close()
            if not self.program.linger or self.program.over or not await self.next_launch():
                break
        await (self.cleaning or self.end())

    def receive(self) -> None:
        """Follow the run process: signals that it got from Jupyter or a user, and its end."""
        import signal

        messages = self.channel.receive()
        if messages is None:
            self.leave()
        for message in messages or ():
            number = message.get("signal", 0)
            ends = number in (signal.SIGTERM, signal.SIGHUP)
            if not number:  # Jupyter is gone
                self.stop()
            elif ends and (self.program.linger or self.program.over):
                self.leave(-number)
            elif number != signal.SIGINT or not (self.front and self.front.interrupt()):
                if ends and not self.end_requested:
                    self.end_requested = True
                    self.loop.call_later(self.GRACE, self.leave, -15)
                self.program.send_signal(number)

    def stop(self) -> None:
        """End without waiting for a restart: Jupyter is gone, or this process is asked to end."""
        self.program.over = True
        self.visitors.put_nowait(None)
        self.leave(-15)

    def leave(self, status: int | None = None) -> None:
        """Serve the present run process no longer; let it end with a status, if there is one."""
        if status is not None and not self.leaving.is_set():
            self.send_exit(status)
        if self.channel.sock.fileno() >= 0:
            self.loop.remove_reader(self.channel.sock)
        self.leaving.set()

    def on_visitor(self, listener: socket.socket) -> None:
        """Let another run process in; if it wants another launch than this one, this one has to end."""
        channel = Channel(listener.accept()[0])
        messages = channel.receive()
        if messages and messages[0]["attach"] == self.program.digest:
            self.visitors.put_nowait((channel, messages[0]))
            self.leave()
        else:
            channel.close()
            self.stop()

    async def next_launch(self) -> bool:
        """Wait for the run process of a restart and take over its stdio; return whether one came."""
        import asyncio

        arrival = asyncio.ensure_future(self.visitors.get())
        lost = asyncio.ensure_future(self.program.lost())
        await asyncio.wait({arrival, lost}, timeout=self.program.linger, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if self.program.over or not arrival.done():
            arrival.cancel()
            return False
        self.channel, message = arrival.result()
        self.tail, self.end_requested = b"", False
        self.leaving.clear()
        for file, own in zip(self.channel.files, (1, 2)):
            os.dup2(file, own)
        self.connection = message["connection"]
        self.launch.options.update(message["options"])
        self.send_recipe(self.locks)
        self.loop.add_reader(self.channel.sock, self.receive)
        await self.program.attach()
        return True


class RunProcess:
    """Jupyter's child: passes on signals, watches Jupyter, ends as the kernel does."""

    def __init__(self, program: Program, launch: Launch) -> None:
        self.program = program
        self.launch = launch
        self.recipe: Recipe | None = None
        named = os.environ.get("JPY_PARENT_PID", "")
        self.jupyter = int(named) if named.isdigit() else 0
        self.jupyter_start = process_stat(self.jupyter)[18:19] or [0]  # 0: it is gone already
        self.wake, end = os.pipe()
        os.set_blocking(end, False)
        handle_signals(end)
        self.channel = self.attach() or self.fork()

    def attach(self) -> Channel | None:
        """Return the way to the keeper that the kernel had before a restart, None where there is none."""
        import socket

        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(self.program.supervision.directory + "/keeper")
        except OSError:
            sock.close()
            return None
        channel = Channel(sock)
        options = {name: self.launch.options.get(name, "") for name in ("log", "notice")}
        message = {"attach": self.program.digest, "connection": self.program.supervision.connection}
        channel.send({**message, "options": options}, (1, 2))
        return channel

    def fork(self) -> Channel:
        """Start a keeper; return the way to it."""
        import gc
        import socket

        near, far = socket.socketpair()
        gc.freeze()  # so that the two go on sharing their memory
        if os.fork():
            far.close()
            return Channel(near)
        near.close()
        keeper = self.program.keeper = Keeper(self.program, self.launch, Channel(far))
        try:
            become_daemon([0])
            keeper.begin()
            import asyncio

            asyncio.run(keeper.serve())
        except UserError as error:
            keeper.channel.send({"exit": error.status, "error": vars(error)})
        except Exception as fault:
            import traceback

            problem = UserError(f"envkernel has failed: {fault!r}.", "Report it.", 1, traceback.format_exc())
            keeper.channel.send({"exit": 1, "error": vars(problem)})
        try:
            keeper.channel.close()
            drop_stdio((1, 2))
            if keeper.locks:
                clean_up(keeper.recipe, keeper.environ, keeper.locks)
        finally:
            os._exit(0)

    def serve(self) -> int:
        """Serve until the kernel has ended; return the exit status.  Raises UserError for the notebook."""
        import select

        asked = 0
        while asked < 3:  # seconds that the keeper has for ending, where Jupyter is gone
            files = [self.wake, self.channel.sock.fileno()]
            ready = select.select(files, [], [], 1 if self.jupyter else None)[0]
            if self.wake in ready:
                for number in os.read(self.wake, 64):
                    self.channel.send({"signal": number})
            end = self.receive() if files[1] in ready else None
            if end:
                if end["error"]:
                    raise UserError(**end["error"])
                status = int(end["exit"])
                return status if status >= 0 else 128 - status
            if self.jupyter and process_stat(self.jupyter)[18:19] != self.jupyter_start:
                self.channel.send({"signal": 0})
                asked += 1
        return 143

    def receive(self) -> dict[str, Any] | None:
        """Follow the keeper; return its last message, or one in its place where it was killed."""
        messages = self.channel.receive()
        for message in messages or ():
            if "recipe" in message:
                self.recipe = Recipe(**message["recipe"])
            if "exit" in message:
                return message
        if messages is None and not self.recipe:
            self.channel = self.fork()  # it was just about to end
        elif messages is None and self.recipe:
            text = f"The process that keeps the {self.program.what} was killed."
            start_cleaner(self.recipe, self.program.plan.environ, self.channel.files)
            write_patiently(2, error_text(UserError(text, "Start the kernel again.")))
            return {"exit": 1, "error": None}
        return None


def keep(program: Program, launch: Launch) -> int:
    """Run a program below a keeper; return the exit status for Jupyter.  Raises UserError."""
    earlier = os.fsdecode(program.host.read(launch.options.get("earlier", "")) or b"")
    launch.options["notice"] = earlier.partition("\nreason: ")[2].partition("\n")[0]
    run_process = RunProcess(program, launch)
    try:
        return run_process.serve()
    finally:  # the rest is the keeper's, and the signals are for what comes next in this process
        handle_signals(ignore=False)
        run_process.channel.close()


# ---- node agent ---------------------------------------------------------------------------------
#
#   keeper --(control connection, one connection per stream)-- agent -- starter -- kernel
#
# On a node this file is two processes.  The *starter* is what srun or YARN runs.  It forks the agent, and the
# kernel when the agent asks for one: nothing forks below a running event loop.  The *agent* listens on one
# port, where each connection proves that it knows the secret.  The keeper connects to it, not the other way
# round: login nodes reach compute nodes, as `ssh -L` and Skein do, and a login node listens on loopback only.

ANNOUNCES = b"envkernel-agent "  # how the line begins that says where an agent listens, or an error
PING, LOST = 5.0, 20.0  # seconds between two heartbeats, and without one until the other side counts as lost
NODE_GRACE = 2.5  # seconds for a kernel's end: a cluster that ends a job may kill after 3
PATIENCE, SLOW_PATIENCE = 8.0, 30.0  # seconds in which the keeper has to come; the latter behind ssh or Skein
ORDERS = len(STREAMS)  # number of the connection that carries orders, after those of the kernel's streams
TAIL = 4000  # bytes of what a program said that are kept for an explanation
HANDSHAKE = b"envkernel3"


def announce(file: int, **fields: Any) -> None:
    """Write where the agent listens, or an ``error``, for the keeper."""
    write_patiently(file, ANNOUNCES + to_json(fields) + b"\n")


async def shake_hands(sock: socket.socket, secret: bytes, number: int = -1) -> int:
    """Prove to each other that both sides know the secret; return the number of the stream, which the agent
    learns this way.  The nonces are new, so that a proof serves only once.  Raises OSError."""
    import asyncio
    import hmac

    loop, nonce = asyncio.get_running_loop(), os.urandom(32)

    async def receive(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await loop.sock_recv(sock, count - len(data))
            if not part:
                raise ConnectionResetError("The other side hung up.")
            data += part
        return data

    def proof(side: bytes) -> bytes:
        return hmac.new(secret, side + hello + nonce, "sha256").digest()

    if number < 0:
        hello = await receive(len(HANDSHAKE) + 33)
        number = hello[len(HANDSHAKE)]
        if not hello.startswith(HANDSHAKE) or number > ORDERS:
            raise ConnectionRefusedError("This is another protocol.")
        await loop.sock_sendall(sock, nonce + proof(b"agent"))
        is_proved = hmac.compare_digest(await receive(32), proof(b"keeper"))
    else:
        hello = HANDSHAKE + bytes((number,)) + nonce
        await loop.sock_sendall(sock, hello)
        nonce = await receive(32)
        is_proved = hmac.compare_digest(await receive(32), proof(b"agent"))
        if is_proved:
            await loop.sock_sendall(sock, proof(b"keeper"))
    if not is_proved:
        raise ConnectionRefusedError("The other side does not know the secret.")
    return number


def fork(steps: Callable[[], int]) -> int:
    """Return the pid of a new process, which ends with the status that `steps` returns there."""
    pid, status = os.fork(), 1
    if pid:
        return pid
    try:
        status = steps()
    except BaseException:
        import traceback

        write_patiently(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status if 0 <= status < 256 else 1)


def starter_signals() -> set[int]:
    """Return the signals that the starter waits for."""
    import signal

    return {signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP}


def agent_main(stdin: Any) -> int:
    """What `NODE_BOOT` runs: read the orders, announce where the agent listens, serve."""
    import signal
    import socket

    orders = from_json(stdin.readline())
    announce_to = orders.get("announce-to", 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, starter_signals())
    node, job = node_name(os.environ), os.environ.get("SLURM_JOB_ID", "")
    try:
        listener = listen_on_node(orders, os.environ)
    except UserError as error:
        announce(announce_to, error=vars(error))
        return error.status
    address, port = listener.getsockname()[:2]
    announce(announce_to, address=address, port=port, node=node, job=job)
    if announce_to != 1:
        os.close(announce_to)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # this file was there
    channel, agent_end = map(Channel, socket.socketpair())
    stderr, stderr_end = os.pipe()

    def serve() -> int:
        import asyncio

        channel.sock.close()
        os.close(stderr_end)
        agent = Agent(orders, listener, agent_end, stderr)
        # not asyncio.run, which would wait for a thread that writes to a blocked stderr
        return asyncio.new_event_loop().run_until_complete(agent.run())

    agent = fork(serve)
    for end in (listener, agent_end.sock):
        end.close()
    os.close(stderr)
    return Starter(orders, channel, agent, stderr_end).run()


class Starter:
    """Parent of the agent, which sends SIGUSR1 for its messages, and of the kernel, which the agent asks for.

    orders: see `JobProgram`.  file: the kernel's connection file, in memory only.  stderr: for the kernel.
    """

    def __init__(self, orders: Mapping[str, Any], channel: Channel, agent: int, stderr: int) -> None:
        channel.sock.setblocking(False)
        self.orders, self.channel, self.agent, self.stderr = orders, channel, agent, stderr
        self.directory, self.kernel, self.file, self.lock = "", 0, -1, -1

    def run(self) -> int:
        """Serve until the agent has ended; return its exit status."""
        import signal

        self.start(0)
        while True:
            number = signal.sigwait(starter_signals())
            if number == signal.SIGUSR1:
                for message in self.channel.receive() or ():
                    self.start(message["start"])
            elif number != signal.SIGCHLD:
                os.kill(self.agent, number)
            pid, status = os.waitpid(-1, os.WNOHANG)
            while pid and pid != self.agent:
                if pid == self.kernel:
                    self.end(is_reaped=True)
                    self.channel.send({"ended": exit_status(status)})
                pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                self.end()
                status = exit_status(status)
                return status if status >= 0 else 128 - status

    def start(self, launch: int) -> None:
        """Start a kernel; one that still runs is killed first."""
        self.end()
        transport = self.orders["transport"]
        if transport == "ipc":
            self.directory, self.lock = make_node_directory()
        own = node_connection(self.orders["connection"], transport, self.directory)
        self.file = scratch_file()
        os.fchmod(self.file, 0o600)
        os.write(self.file, to_json(own))
        self.kernel = fork(lambda: self.become_kernel(own, launch))

    def become_kernel(self, connection: Mapping[str, Any], number: int) -> int:
        """In the child: run the rest of the chain on the node.  An error goes to the agent."""
        import signal

        os.setsid()
        endpoint = {name: connection[name] for name in connection if name.endswith(("transport", "_port"))}
        endpoint.update(started=number, pid=os.getpid(), directory=self.directory)
        self.channel.send(endpoint)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, starter_signals())
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(self.stderr, 2)
        parent, environ, host = os.getppid(), dict(os.environ), Host()
        try:
            enter_directory(self.orders["directories"], node_name(environ))
            steps = [Step(**step) for step in self.orders["launch"]["steps"]]
            launch = Launch(**{**self.orders["launch"], "steps": steps})
            launch.options.update({"connection-file": f"/proc/{parent}/fd/{self.file}", "nested": True})
            # ipykernel ends itself when its parent is not the one that is named here
            environ.update(self.orders["environ"], JPY_PARENT_PID=str(parent))
            plan = plan_launch(launch, host, environ)
            if not launch.steps:
                plan = plan.replace(search=path_entries(environ), install="install %s on the nodes")
                plan = plan.replace(where=f"the PATH of node {node_name(environ)}")
            return execute(finish_plan(plan, launch, host), launch, host)
        except UserError as error:
            self.channel.send({"problem": vars(error)})
            return error.status

    def end(self, is_reaped: bool = False) -> None:
        """End the kernel at once, with its process group, and remove what it leaves."""
        if self.kernel:
            send_signals([-self.kernel], 9)
            if not is_reaped:
                send_signals([self.kernel], 9)  # it may not lead its group yet
                os.waitpid(self.kernel, 0)
        remove_node_directory(self.directory)
        for file in (self.file, self.lock):
            if file >= 0:
                os.close(file)
        self.directory, self.kernel, self.file, self.lock = "", 0, -1, -1


def node_connection(connection: Mapping[str, Any], transport: str, directory: str) -> dict[str, Any]:
    """Return what the node's connection file says: Jupyter's own keys, sockets of the node."""
    own = dict(connection)
    if transport == "ipc":
        own.update({name + "_port": number for number, name in enumerate(STREAMS, 1)})
        return {**own, "transport": "ipc", "ip": directory + "/kernel"}
    socks = [tcp_socket("127.0.0.1") for _ in STREAMS]
    for name, sock in zip(STREAMS, socks):
        sock.bind(("127.0.0.1", 0))
        own[name + "_port"] = sock.getsockname()[1]
    for sock in socks:
        sock.close()
    return {**own, "transport": "tcp", "ip": "127.0.0.1"}


def make_node_directory() -> tuple[str, int]:
    """Make the private directory of a kernel's sockets; return it and its lock.  Removes stale ones."""
    root = os.environ.get("TMPDIR", "/tmp")
    if len(root) > 60 or not os.access(root, os.W_OK):  # the path of a unix socket has 107 bytes
        root = "/tmp"
    base = f"{root}/envkernel-node-{os.getuid()}"
    path = f"{base}/{os.urandom(4).hex()}"
    lock = take_lock(path + ".lock")
    os.mkdir(path, 0o700)
    for recipe, stale_lock in stale_recipes(base):
        clean_up(recipe, os.environ, [stale_lock])
    return path, lock


def remove_node_directory(path: str) -> None:
    """Remove what `make_node_directory` has made; an empty path is none."""
    for one in (path, path + ".lock") if path else ():
        remove_tree(one)
        remove_empty(os.path.dirname(one))


def enter_directory(directories: Sequence[str], node: str) -> None:
    """Enter the first of some directories that can be; say so on stderr if that is not the first."""
    for path in directories:
        try:
            os.chdir(path)
        except OSError:
            continue
        if path != directories[0]:
            said = f"The node {node} has no directory {directories[0]}: the kernel starts in {path}."
            write_patiently(2, f"envkernel: {said}\n".encode(errors="surrogateescape"))
        return


class NodeKernel:
    """A kernel on a node.  endpoint: its addresses, pid and ``directory`` of sockets, unlinked once open."""

    def __init__(self, endpoint: Mapping[str, Any]) -> None:
        self.endpoint, self.launch = endpoint, endpoint["started"]
        self.sockets: dict[int, int] = {}  # see `connect_ipc`
        self.problem: dict[str, Any] | None = None
        self.killed = memory_kills(Host())

    def connect(self, number: int) -> socket.socket:
        """Return a connected socket to a stream.  Raises OSError while nobody listens."""
        import socket

        directory = self.endpoint["directory"]
        if self.endpoint["transport"] == "ipc":
            sock = connect_ipc(directory + "/kernel", number, self.sockets)
            if len(self.sockets) == len(STREAMS):
                remove_node_directory(directory)
            return sock
        return socket.create_connection(("127.0.0.1", self.endpoint[STREAMS[number] + "_port"]))

    def explain(self, status: int) -> dict[str, Any] | None:
        """Return the problem of a kernel that has ended, None where nothing is known but its exit status."""
        if status == -9 and memory_kills(Host()) > self.killed:
            hint = f"Ask for more: {'--mem=8G' if 'SLURM_JOB_ID' in os.environ else '--memory=8192'}."
            return vars(UserError("The kernel has used more memory than its job asked for.", hint))
        return self.problem

    def close(self) -> None:
        """Forget its sockets."""
        while self.sockets:
            os.close(self.sockets.popitem()[1])
        remove_node_directory(self.endpoint["directory"])


class Agent(Children):
    """Carries the kernel's streams over authenticated connections, and the keeper's orders to the starter,
    its parent, which it outlives to remove what that leaves.  stderr: a pipe with what kernels say there."""

    def __init__(
        self, orders: Mapping[str, Any], listener: socket.socket, starter: Channel, stderr: int
    ) -> None:
        super().__init__()
        self.orders, self.listener, self.starter, self.stderr = orders, listener, starter, stderr
        self.parent = os.getppid()
        self.tasks: set[asyncio.Future[None]] = set()
        self.control: asyncio.StreamWriter | None = None
        self.news: dict[str, Any] = {}
        self.kernel: NodeKernel | None = None
        self.outcome, self.ending = 0, False

    async def run(self) -> int:
        """Serve until the job is to end; return the exit status."""
        import asyncio
        import signal

        self.loop = asyncio.get_running_loop()
        self.over: asyncio.Future[int] = self.loop.create_future()
        for number in (signal.SIGTERM, signal.SIGHUP):
            self.loop.add_signal_handler(number, self.stop, int(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, starter_signals())
        self.listener.setblocking(False)
        self.loop.add_reader(self.starter.sock, self.on_starter)
        if "announce-to" not in self.orders:
            self.loop.add_reader(0, self.end)  # nothing comes on stdin but its end, when srun is gone
        slow = self.orders["tunnel"] or "announce-to" in self.orders
        self.patience = self.loop.call_later(SLOW_PATIENCE if slow else PATIENCE, self.end)
        self.start_task(self.copy(self.stderr, 2, self.on_stderr))
        self.start_task(self.serve())
        return await self.over

    def start_task(self, steps: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the others; without a reference it could be collected as garbage."""
        task = self.loop.create_task(steps)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self) -> None:
        """Accept connections, for ever."""
        import asyncio

        while True:
            try:
                sock, _ = await self.loop.sock_accept(self.listener)
                self.start_task(self.admit(sock))
            except OSError:  # no file is left, for example
                await asyncio.sleep(0.1)

    async def admit(self, sock: socket.socket) -> None:
        """Use a connection that proves itself within 10 s: follow the keeper, or join it with a stream."""
        import asyncio

        try:
            number = await asyncio.wait_for(shake_hands(sock, bytes.fromhex(self.orders["secret"])), 10)
            end = self.kernel.connect(number) if self.kernel and number < ORDERS else None
        except (OSError, asyncio.TimeoutError):
            number, end = -1, None
        if number == ORDERS:
            await self.follow(sock)
        elif end:
            await relay(sock, end)
        else:
            sock.close()

    def on_starter(self) -> None:
        """Follow what the starter and its kernel report."""
        messages = self.starter.receive()
        if messages is None:  # it was killed
            if self.kernel:
                send_signals([-self.kernel.endpoint["pid"]], 9)
            self.finish()
        for message in messages or ():
            kernel = self.kernel
            if "started" in message:
                self.kernel = NodeKernel(message)
                self.start_task(self.await_kernel(self.kernel))
            elif kernel and "problem" in message:
                kernel.problem = message["problem"]
            elif kernel:
                self.kernel = None
                self.start_task(self.report_end(kernel, message["ended"]))
            if kernel and self.kernel is not kernel:
                kernel.close()

    async def await_kernel(self, kernel: NodeKernel) -> None:
        """Report when a kernel can be connected."""
        import asyncio

        while kernel is self.kernel:
            try:
                for number in range(len(STREAMS)):
                    kernel.connect(number).close()
            except OSError:
                await asyncio.sleep(0.01)
            else:
                self.report(listening=kernel.launch)
                return

    async def report_end(self, kernel: NodeKernel, status: int) -> None:
        """Report how a kernel ended, unless the job ends as well or there is a new kernel already."""
        import asyncio

        if not self.ending:
            self.outcome = max(status, 0)
            # What is left of its stderr comes first.  And Slurm signals all processes of a job, one by
            # one: a kernel may be the first that is ended, and then the job is what is over.
            await asyncio.sleep(0.3 if status else 0)
        if self.ending:
            self.finish()
        elif not self.kernel:
            tail = self.tail[-TAIL:].decode(errors="replace")
            self.report(ended=status, launch=kernel.launch, tail=tail, problem=kernel.explain(status))

    async def follow(self, sock: socket.socket) -> None:
        """Follow the keeper's orders until it hangs up, or nothing was received of it for a while."""
        import asyncio
        import signal

        self.patience.cancel()
        reader, control = await asyncio.open_connection(sock=sock)
        self.control = control
        self.report(**self.news)
        try:
            while True:
                line = await asyncio.wait_for(reader.readline(), LOST)
                message = from_json(line or b'{"end": 1}')
                if "end" in message or self.ending:
                    break
                if "ping" in message:
                    control.write(b'{"pong": 1}\n')
                if "signal" in message and self.kernel:
                    send_signals([-self.kernel.endpoint["pid"]], message["signal"])
                if "start" in message:
                    self.tail = b""  # not when it has started: it may have said why it ends by then
                    self.starter.send(message)
                    send_signals([self.parent], signal.SIGUSR1)
        except (OSError, asyncio.TimeoutError, ValueError, TypeError):
            pass  # it is gone, or is no keeper
        if self.control is control:
            self.control = None
            self.end()

    def report(self, **news: Any) -> None:
        """Report to the keeper what has become of the kernel, now or as soon as it is there."""
        self.news = news
        if self.control and news:
            self.control.write(to_json(news) + b"\n")

    def stop(self, number: int) -> None:
        """The cluster ends the job: say why, if that is known."""
        self.report(stopped=number, problem=over_memory(os.environ, Host(), self.parent))
        self.outcome = 128 + number
        self.end()

    def end(self) -> None:
        """Nobody needs the job any more: let the kernel end, which may have a container to remove."""
        if not self.ending:
            self.ending = True
            self.loop.remove_reader(0)
            if self.kernel:
                send_signals([-self.kernel.endpoint["pid"]], 15)
            self.loop.call_later(NODE_GRACE if self.kernel else 0, self.finish)

    def finish(self) -> None:
        """End this process; its parent ends the kernel."""
        if self.kernel:
            self.kernel.close()
        if not self.over.done():
            self.over.set_result(self.outcome)


def memory_kills(host: Host) -> int:
    """Return how many processes of this control group were killed because memory ran out; see cgroups(7)."""
    for line in (host.read("/proc/self/cgroup") or b"").decode(errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        places = {"": f"{path}/memory.events", "memory": f"/memory{path}/memory.oom_control"}
        for field in (host.read("/sys/fs/cgroup" + places.get(controllers, "")) or b"").splitlines():
            if field.startswith(b"oom_kill "):
                return int(field.split()[1])
    return 0


def over_memory(environ: Mapping[str, str], host: Host, root: int) -> dict[str, Any] | None:
    """Return the problem of a YARN container, whose first process is `root`, with more memory than it asked
    for: the NodeManager adds up what all its processes have, and says only in its own log why it kills."""
    asked = int(environ.get("SKEIN_RESOURCE_MEMORY", 0))
    pids, used = [str(root)] if asked else [], 0
    for pid in pids:
        fields = (host.read(f"/proc/{pid}/statm") or b"0 0").split()
        used += int(fields[1]) * os.sysconf("SC_PAGESIZE")
        for thread in host.listdir(f"/proc/{pid}/task"):
            pids += os.fsdecode(host.read(f"/proc/{pid}/task/{thread}/children") or b"").split()
    if used <= asked << 20:
        return None
    message = f"The YARN container has used more memory than it asked for: {used >> 20} of {asked} MiB."
    return vars(UserError(message, f"Ask for more: --memory={max(used >> 19, 1024)}."))


def node_name(environ: Mapping[str, str]) -> str:
    """Return what the cluster calls this node."""
    return environ.get("SLURMD_NODENAME") or environ.get("NM_HOST") or os.uname().nodename


def listen_on_node(orders: Mapping[str, Any], environ: Mapping[str, str]) -> socket.socket:
    """Return a socket that listens on one address of this node, at a port of ``--node-ports`` if given.

    Slurm: that from which this node reaches the host srun runs on.  YARN: that of the NodeManager.
    Raises UserError where each port is taken.
    """
    import socket

    peer, ports = environ.get("SLURM_LAUNCH_NODE_IPADDR"), orders["node-ports"]
    try:
        if orders["tunnel"]:
            address = "127.0.0.1"
        elif not peer:
            address = socket.gethostbyname(node_name(environ))
        else:
            with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect((peer, 9))  # sends nothing: it asks the routing table
                address = sock.getsockname()[0]
    except OSError:
        address = socket.gethostbyname(socket.gethostname())
    first, _, last = ports.partition("-")
    for port in range(int(first or 0), int(last or first or 0) + 1):
        sock = tcp_socket(address)
        try:
            # what is left of earlier connections does not use up the range
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(256)
            return sock
        except OSError as error:
            sock.close()
            reason = os.strerror(error.errno or 0)
    among, node = f"of --node-ports={ports} " if ports else "", node_name(environ)
    message = f"No port {among}can be opened on {address}, an address of node {node}: {reason}."
    raise UserError(message, "Give a wider range (--node-ports=FIRST-LAST), or ask the administrators.")


# ---- jobs on a cluster --------------------------------------------------------------------------


class Submission:
    """The program that holds the job.  agent: its endpoint, once known.  state: what the job waits for."""

    def __init__(self, job: Job, orders: Mapping[str, Any], keeper: Keeper) -> None:
        self.job, self.keeper = job, keeper
        self.id, self.state, self.early, self.waits = "", "", b"", False
        stdin, self.stdin = os.pipe()
        self.out, out_end = os.pipe()
        self.err, err_end = os.pipe()
        self.cancel_later()
        self.pid = spawn(job.argv, job.environ, stdin, out_end, err_end)
        for file in (stdin, out_end, err_end):
            os.close(file)
        self.input = job.feed(orders)

    def follow(self) -> None:
        """Begin to feed the program, whose stdin stays open while the job is wanted, and to hear it."""
        import asyncio

        task = self.keeper.loop.create_task
        self.agent: asyncio.Future[dict[str, Any]] = self.keeper.loop.create_future()
        self.exit = task(self.keeper.exited(self.pid))
        stdin = open(self.stdin, "wb", 0)
        self.feeding = task(self.keeper.loop.connect_write_pipe(asyncio.BaseProtocol, stdin))
        out = task(self.keeper.copy(self.out, 1, self.on_stdout))
        self.copies = {out, task(self.keeper.copy(self.err, 2, self.on_stderr))}

    def on_stdout(self, text: bytes) -> bytes:
        """Return what to pass on: all but the line on which the agent says where it is."""
        if self.agent.done():
            return text
        self.early += text
        before, _, after = self.early.partition(ANNOUNCES)
        line, is_whole, after = after.partition(b"\n")
        if not is_whole:
            return b""
        endpoint = from_json(line)
        if "error" in endpoint:
            self.agent.set_exception(UserError(**endpoint["error"]))
        else:
            self.agent.set_result(endpoint)
            if endpoint["job"] and not self.id:
                self.note_id(endpoint["job"])
        return before + after

    def on_stderr(self, text: bytes) -> bytes:
        """Learn the state of the job from the program's stderr; return it, to be passed on."""
        self.keeper.on_stderr(text)
        if self.agent.done():  # from now on a kernel's words are among it
            return text
        number, waits, state = self.job.read_state(self.keeper.tail.decode(errors="replace"), self.id)
        if number != self.id:
            self.note_id(number)
        if waits and not self.waits:
            self.watching = self.keeper.loop.create_task(self.watch_queue())
        self.waits = waits
        if state not in ("", self.state) and self.keeper.front:
            self.state = state
            self.keeper.front.wait(state)
        return text

    def note_id(self, number: str) -> None:
        """Write the job's id into the launch log, and have the job cancelled by it."""
        append_log(self.keeper.launch.options.get("log", ""), f"job: {number}")
        self.id = number
        self.cancel_later()

    def cancel_later(self, wanted: bool = True) -> None:
        """Have the job cancelled when this process is gone, however it ends, or not any more."""
        command = self.job.cancel(os.getpid(), self.id) if wanted else []
        self.keeper.recipe.cleanup = [command] if command else []
        self.keeper.send_recipe()

    async def watch_queue(self) -> None:
        """Report what the job waits for, asking less and less often."""
        import asyncio

        pause = 1.0
        while self.waits and not self.agent.done():
            state = await self.job.pending(self.id, self.ask)
            if state not in ("", self.state) and not self.agent.done():
                self.state, pause = state, 1.0
                self.keeper.report(state)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 30)

    async def ended(self) -> UserError:
        """Return why the program has ended; never where the job needs it no longer, or the agent failed."""
        import asyncio

        status = await asyncio.shield(self.exit)
        await asyncio.wait(self.copies, timeout=1)
        if self.agent.done() and (self.job.detached or self.agent.exception()):
            await asyncio.Event().wait()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        name = f"{self.job.what} {self.id}".strip()
        message = f"The {name} has ended ({os.path.basename(self.job.argv[0])}: {how})."
        return await self.job.explain(message, self.keeper.tail.decode(errors="replace"), self.id, self.ask)

    async def end(self, link: AgentLink) -> None:
        """End the program: first by the end of stdin, then by a signal.  link: to an agent that is to end."""
        import asyncio

        stdin, _ = await self.feeding
        if not stdin.is_closing():
            stdin.abort()
        if link.is_lost:
            seconds = 0.0
        elif link.control:
            seconds = NODE_GRACE + 1
        else:  # while the job does not wait, the agent may be about to start, and to see the end of stdin
            seconds = max(self.job.grace, 0 if self.waits else 2)
        await asyncio.wait({self.exit}, timeout=seconds)
        if not self.exit.done():
            send_signals([self.pid], 15)
            await asyncio.wait({self.exit}, timeout=1 + seconds / 2)
        elif self.job.detached and self.exit.result() == NOTHING_LEFT:
            self.cancel_later(False)

    async def ask(self, argv: Sequence[str]) -> Output:
        """Run a command of the cluster's; return what it said, status 127 where it does not end."""
        import asyncio

        asking = self.keeper.aside(self.keeper.program.host.output, argv, self.job.environ)
        try:
            return await asyncio.wait_for(asking, self.job.patience)
        except (asyncio.TimeoutError, UserError):
            return Output(127)


class AgentLink:
    """The way to the agent: orders, the kernel's streams, and `tunnel`, the exit status of ssh."""

    def __init__(self, job: Job, secret: str, keeper: Keeper) -> None:
        self.job, self.secret, self.keeper = job, bytes.fromhex(secret), keeper
        self.endpoint: dict[str, Any] = {}
        self.control: asyncio.StreamWriter | None = None
        self.is_lost = False  # it was there and is gone
        self.tunnel: asyncio.Future[int] | None = None

    async def open(self, endpoint: dict[str, Any]) -> None:
        """Open the connection for orders, through a tunnel where one is wanted.  Raises UserError."""
        import asyncio

        self.endpoint = endpoint
        if self.job.tunnel:
            path = self.keeper.supervision.directory + "/tunnel"
            flags = ["-oBatchMode=yes", "-oExitOnForwardFailure=yes", "-oStreamLocalBindMask=0177"]
            way = f"{path}:127.0.0.1:{endpoint['port']}"
            err, err_end = os.pipe()
            argv = [self.job.tunnel, "-NT", *flags, "-oServerAliveInterval=5", "-L", way, endpoint["node"]]
            pid = spawn(argv, self.job.environ, out=err_end, err=err_end)
            os.close(err_end)
            self.copy = asyncio.ensure_future(self.keeper.copy(err, 2, self.keeper.on_stderr))
            self.tunnel = asyncio.ensure_future(self.keeper.exited(pid))
            while not os.path.exists(path):
                if self.tunnel.done():
                    await asyncio.wait({self.copy}, timeout=1)
                    raise self.tunnel_error()
                await asyncio.sleep(0.05)
            endpoint["path"] = path
        encrypted = any(name.startswith("curve") for name in self.keeper.connection)
        if not encrypted and not endpoint["address"].startswith(("127.", "::1")):
            text = f"What this kernel says is signed, but crosses the network to {endpoint['node']} readable."
            text += " Set it up with --tunnel=ssh to encrypt it."
            self.keeper.aside(write_patiently, 2, f"envkernel: {text}\n".encode())
            append_log(self.keeper.launch.options.get("log", ""), text)
        for pause in (1, 2, 3, 0):
            try:
                sock = await self.connect(ORDERS)
                self.news, self.control = await asyncio.open_connection(sock=sock)
                return
            except OSError:
                await asyncio.sleep(pause)
        hint = "Let the kernel come through ssh (--tunnel=ssh), or ask which ports are open between "
        hint += "this host and the nodes and give --node-ports=FIRST-LAST."
        message = "The node {node} can't be reached at {address}, port {port}."
        raise UserError(message.format(**endpoint), hint)

    async def connect(self, number: int) -> socket.socket:
        """Return a connection to the agent that has proved itself.  Raises OSError."""
        import asyncio
        import socket

        address: Any = self.endpoint.get("path") or (self.endpoint["address"], self.endpoint["port"])
        sock = socket.socket(socket.AF_UNIX) if isinstance(address, str) else tcp_socket(address[0])
        sock.setblocking(False)
        try:
            await asyncio.wait_for(self.keeper.loop.sock_connect(sock, address), 10)
            await asyncio.wait_for(shake_hands(sock, self.secret, number), 10)
        except (OSError, asyncio.TimeoutError) as error:  # the latter is no OSError before Python 3.11
            sock.close()
            raise ConnectionRefusedError("The agent does not answer.") from error
        return sock

    def tunnel_error(self) -> UserError:
        """Return the error for a tunnel that broke, or could not be opened."""
        message = "The ssh tunnel to the node could not be opened, or broke."
        hint = "Check that `ssh -o BatchMode=yes NODE true` works from here, or leave --tunnel out."
        return UserError(message, hint, detail=self.keeper.tail.decode(errors="replace").strip())

    def send(self, **message: Any) -> None:
        """Send the agent an order; one that can't be sent any more is dropped."""
        if self.control:
            self.control.write(to_json(message) + b"\n")


class JobProgram(Program):
    """A kernel in a job of a cluster, which outlives it for `linger` seconds, so that a restart gets it."""

    what = "job"

    def __init__(self, plan: Plan, job: Job, launch: Launch, host: Host) -> None:
        import hashlib

        path, _, connection = read_connection(launch, host)
        base = private_base(os.environ, "", host)
        if len(base) > 60:  # the path of a unix socket has 107 bytes
            base = private_base(os.environ, "tmp", host)
        super().__init__(plan, Supervision(f"{base}/job-{kernel_key(path)}", connection=connection), host)
        self.job, self.linger, self.has_front = job, job.linger, True
        # ports may change at a restart; the key does not, and crosses the network only with the job
        secrets = [connection.get(name) for name in ("key", "curve_publickey", "curve_secretkey")]
        same = repr((job.argv, vars(job.launch), secrets))
        self.digest = hashlib.sha256(same.encode(errors="surrogatepass")).hexdigest()
        names = launch.options.get("env", ())
        steps = [vars(step) for step in job.launch.steps]
        self.orders = {"tunnel": job.tunnel, "node-ports": job.node_ports, "transport": job.transport}
        self.orders.update(secret=os.urandom(32).hex(), directories=job.directories(os.getcwd()))
        self.orders.update(connection=connection, launch={**vars(job.launch), "steps": steps})
        self.orders["environ"] = {name: os.environ[name] for name in names if name in os.environ}
        self.launches = 0  # restarts of the kernel
        self.life: asyncio.Future[UserError] | None = None

    def start(self) -> None:
        self.submission = Submission(self.job, self.orders, self.keeper)
        self.link = AgentLink(self.job, self.orders["secret"], self.keeper)

    async def ready(self) -> None:
        self.follow_job()
        if self.launches and self.submission.state and not self.link.control:
            self.keeper.report(self.submission.state)  # the front of the launch before has said it already
        await self.listening.wait()

    async def connect(self, number: int) -> socket.socket:
        return await self.link.connect(number)

    def send_signal(self, number: int) -> None:
        self.link.send(signal=number)

    async def wait(self) -> tuple[int, UserError | None]:
        import asyncio

        life: asyncio.Future[Any] = self.follow_job()
        try:
            await asyncio.wait({life, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # nobody uses this kernel any more
            self.link.send(signal=9)
            raise
        if life.done():
            self.over = True
            return life.result().status or 1, life.result()
        message = self.ended.result()
        status, problem = message["ended"], message["problem"] and UserError(**message["problem"])
        if not problem and not self.keeper.answered(status):
            where = f"{self.plan.where} on {self.link.endpoint['node']}"
            problem = ended_error(status, where, message["tail"], self.plan.install)
        return status, problem

    async def attach(self) -> None:
        """Have the agent start another kernel, now or as soon as it is there."""
        self.launches += 1
        self.expect_kernel()
        self.link.send(start=self.launches)
        append_log(self.keeper.launch.options.get("log", ""), f"job: {self.submission.id}")

    async def lost(self) -> None:
        import asyncio

        await asyncio.shield(self.follow_job())

    async def end(self) -> None:
        self.link.send(end=True)
        if self.life:
            await self.submission.end(self.link)
            self.life.cancel()

    def expect_kernel(self) -> None:
        """Prepare for the news of another kernel."""
        import asyncio

        self.listening = asyncio.Event()
        self.ended: asyncio.Future[dict[str, Any]] = self.keeper.loop.create_future()

    def follow_job(self) -> asyncio.Future[UserError]:
        """Return the task that brings the job to its end, and why it ended; it lives through restarts."""
        if not self.life:
            self.expect_kernel()
            self.submission.follow()
            self.life = self.keeper.loop.create_task(self.run())
        return self.life

    async def run(self) -> UserError:
        """Follow program and agent until one of them is over; return why."""
        import asyncio

        submission = self.submission
        (await submission.feeding)[0].write(submission.input)
        program = asyncio.ensure_future(submission.ended())
        steps = asyncio.ensure_future(self.follow_agent())
        ends: set[asyncio.Future[Any]] = {program, steps}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if steps.done():
                reported = steps.result()
                if reported:
                    return reported
                if not self.job.detached:  # the agent is gone: the program will soon know why
                    await asyncio.wait({program}, timeout=3)
            if program.done():
                return program.result()
            message = f"The node {self.link.endpoint['node']} broke off the connection without a word."
            said = self.keeper.tail.decode(errors="replace")
            return await self.job.explain(message, said, submission.id, submission.ask)
        except UserError as error:
            return error
        finally:
            program.cancel()
            steps.cancel()

    async def follow_agent(self) -> UserError | None:
        """Follow the agent; return why the cluster stops it.  Raises UserError where it is lost."""
        import asyncio

        limit = self.job.queue_timeout or None
        try:
            endpoint = await asyncio.wait_for(self.submission.agent, limit)
        except asyncio.TimeoutError:
            text = f"The job did not start within {limit:g} s, the --queue-timeout."
            raise UserError(text, "Try again later, or ask for less.", detail=self.submission.state) from None
        link, silent = self.link, 0.0
        message: dict[str, Any] = {}
        await link.open(endpoint)
        if self.job.detached:  # the agent ends the job now, and well
            self.submission.cancel_later(False)
        if self.launches:  # restarted while the job waited
            link.send(start=self.launches)
        try:
            while "stopped" not in message and silent < LOST:
                try:
                    line = await asyncio.wait_for(link.news.readline(), PING)
                except asyncio.TimeoutError:  # an OSError since Python 3.11
                    link.send(ping=1)
                    silent += PING
                    continue
                silent, message = 0.0, from_json(line or b'{"stopped": 0}')
                if message.get("listening") == self.launches:
                    self.listening.set()
                if "ended" in message and message["launch"] == self.launches and not self.ended.done():
                    self.ended.set_result(message)
        except OSError:
            message = {}
        link.control, link.is_lost = None, True
        if silent < LOST and not (link.tunnel and link.tunnel.done()):
            return UserError(**message["problem"]) if message.get("problem") else None
        self.submission.cancel_later()
        if silent < LOST:
            raise link.tunnel_error()
        text = f"The node {endpoint['node']} has not answered for {LOST:g} s."
        raise UserError(text, "Start the kernel again; it will get another node if that one is down.")


def own_code() -> bytes:
    """Return this file as `NODE_BOOT` reads it: bytecode for the same Python, source for another one."""
    import marshal
    import zlib
    from importlib.machinery import SourceFileLoader
    from importlib.util import MAGIC_NUMBER

    loader = SourceFileLoader("envkernel", __file__)
    code = zlib.compress(marshal.dumps(loader.get_code("envkernel")), 1)
    source = zlib.compress(loader.get_data(__file__), 1)
    return b"%s %d %d\n" % (MAGIC_NUMBER.hex().encode(), len(code), len(source)) + code + source


# ---- yarn ---------------------------------------------------------------------------------------

YARN_SCRIPT = "source environment/bin/activate\nexport PATH\nexec python -I envkernel.py yarn agent\n"
"""What YARN's container runs, with nothing of the user's.  conda-pack's script exports no PATH, and a Python
that does not find itself there takes itself for the one that it was built as."""

NOTHING_LEFT = 3  # exit status of a helper whose application has ended, or was never submitted
YARN_ENDS = ("FINISHED", "FAILED", "KILLED")
# in the application's key-value store, which only who holds its certificate can read
ORDERS_KEY, AGENT_KEY = "envkernel.orders", "envkernel.agent"


def yarn_main(words: Sequence[str]) -> int:
    """The hidden commands ``envkernel yarn agent`` (on a node) and, on the edge node, ``yarn client``:
    ``check QUEUE``, ``submit``, ``report APPLICATION``, ``kill APPLICATION``."""
    if words[0] == "agent":
        yarn_agent()
    status = 1
    try:
        add_site_packages()
        skein, client = open_skein()
        if words[1] == "check":
            check_queue(client, words[2])
        elif words[1] == "submit":
            submit_application(skein, client)
        elif words[1] == "kill":
            kill_application(client, words[2])
        else:
            raise application_end(client, words[2], "")
        status = 0
    except UserError as error:
        announce(1, error=vars(error))
        status = NOTHING_LEFT
    finally:
        os._exit(status)  # without Skein's destructors, which print a traceback when its Java was killed


def open_skein() -> Any:
    """Return Skein and a client of it.  Raises UserError where that needs something."""
    import importlib
    import warnings

    warnings.simplefilter("ignore")  # that it makes its credentials the first time
    sys.unraisablehook = lambda args: None  # what its client prints when it could not be started
    try:
        skein = importlib.import_module("skein")
    except ImportError as error:
        hint = f"Install it: {sys.executable} -m pip install 'envkernel[yarn]'."
        raise UserError(f"Skein, which speaks with YARN, can't be loaded: {error}.", hint) from None
    try:
        return skein, skein.Client(log=False)
    except Exception as error:  # whatever stops its Java process
        hint = "Java and `yarn classpath --glob` have to work here, and the ResourceManager to answer."
        raise UserError("Skein's client could not be started.", hint, detail=str(error)) from None


def check_queue(client: Any, name: str) -> None:
    """Raise UserError unless there is a queue of that name that takes applications."""
    try:
        queue = client.get_queue(name)
    except Exception as error:
        hint = "Ask whether YARN is up: yarn node -list."
        if "queue" in str(error).lower():
            hint = f"There are: {', '.join(sorted(queue.name for queue in client.get_all_queues()))}."
        raise UserError(f"YARN has no queue {name} that can be used.", hint, detail=str(error)) from None
    if str(queue.state).upper() != "RUNNING":
        raise UserError(f"YARN's queue {name} is stopped.", "Choose another one: --queue=NAME.")


def submit_application(skein: Any, client: Any) -> None:
    """Submit the application that stdin describes and bring its agent the orders, then end this process; if
    stdin ends before that is done, the application is killed."""
    import threading
    import time

    asked = from_json(sys.stdin.buffer.readline())
    spec, number, submitting = asked["spec"], "", threading.Lock()

    def kill_when_nobody_waits() -> None:
        if not sys.stdin.buffer.read(1):
            with submitting:
                os._exit(NOTHING_LEFT if not number or kill_application(client, number) else 1)

    threading.Thread(target=kill_when_nobody_waits, daemon=True).start()
    files = {name: skein.File(source="file://" + path, type="file") for name, path in spec["files"].items()}
    files["environment"] = skein.File(source="file://" + spec["environment"], type="archive")
    resources = skein.Resources(memory=spec["memory"], vcores=spec["vcores"])
    service = skein.Service(resources=resources, files=files, script=YARN_SCRIPT)
    application = skein.ApplicationSpec(name=spec["name"], queue=spec["queue"], services={"kernel": service})
    try:
        with submitting:
            number = client.submit(application)
    except Exception as error:
        hint = "See what it said; --queue, --memory and --vcores may have to change."
        raise UserError("YARN did not take the application.", hint, detail=str(error)) from None
    say_yarn(f"application {number} was submitted.")
    said = state = ""
    while state != "RUNNING":
        report = client.application_report(number)
        state = str(report.state)
        if state in YARN_ENDS:
            raise application_end(client, number, "")
        words = (report.diagnostics or "").split("Details :")[0].strip().splitlines()
        now = f"application {number} waits: {state}" + (f" ({words[-1].strip()})" if words else "")
        if now != said and state == "ACCEPTED":
            say_yarn(now)
            said = now
        time.sleep(0.2)
    try:
        running = client.connect(number)
        running.kv[ORDERS_KEY] = to_json(asked["orders"])
        write_patiently(1, running.kv.wait(AGENT_KEY))
    except Exception as error:
        raise application_end(client, number, str(error)) from None
    os._exit(0)  # without waiting for the thread


def say_yarn(text: str) -> None:
    """Say something of the application on stderr, as the keeper reads it."""
    write_patiently(2, f"{YARN_SAYS} {text}\n".encode(errors="replace"))


def application_end(client: Any, number: str, said: str) -> UserError:
    """Return why an application ended, in YARN's words."""
    import time

    for _ in range(20):
        report = client.application_report(number)
        if str(report.state) in YARN_ENDS:
            message = f"The YARN application {number} has ended: {str(report.final_status).lower()}."
            hint = f"Its logs may tell more: yarn logs -applicationId {number}."
            return UserError(message, hint, detail=(report.diagnostics or said).strip()[-TAIL:])
        time.sleep(0.25)
    kill_application(client, number)  # its container is gone, but nobody has told the ResourceManager
    message = f"The YARN application {number} does not answer."
    return UserError(message, "Start the kernel again.", detail=said)


def kill_application(client: Any, number: str) -> bool:
    """Kill an application, if it has not ended and YARN answers; return whether it did."""
    try:
        client.kill_application(number)
        return True
    except Exception as error:
        say_yarn(f"application {number} could not be killed: {error}")
        return False


def yarn_agent() -> NoReturn:
    """What YARN's container runs: the agent, by an exec.  A child fetches the orders: Skein needs 50 MB."""
    orders, orders_end = os.pipe()
    announced, announce_to = os.pipe()

    def bring_orders() -> int:
        """Fetch the orders from the key-value store and leave there where the agent listens."""
        import importlib
        import signal

        os.close(announce_to)
        signal.alarm(120)  # nobody came
        store = importlib.import_module("skein").ApplicationClient.from_current().kv
        text = store.wait(ORDERS_KEY)
        store.pop(ORDERS_KEY)  # the secret has been delivered
        write_patiently(orders_end, text)
        os.close(orders_end)
        signal.alarm(0)
        store[AGENT_KEY] = b"".join(iter(lambda: os.read(announced, 1 << 16), b""))
        return 0

    fork(bring_orders)
    os.close(orders_end)
    os.close(announced)
    text = b"".join(iter(lambda: os.read(orders, 1 << 16), b""))
    if not text:
        sys.exit(1)
    file = scratch_file()
    write_patiently(file, own_code() + to_json({**from_json(text), "announce-to": announce_to}) + b"\n")
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.set_inheritable(announce_to, True)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", NODE_BOOT])


# ---- front --------------------------------------------------------------------------------------

SHELL, IOPUB, STDIN, CONTROL, HEARTBEAT = range(5)
SOCKET_TYPES = (b"ROUTER", b"XPUB", b"ROUTER", b"ROUTER", b"REP")

# How a peer of ZMTP 3.0 without encryption begins (https://rfc.zeromq.org/spec/23/)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
DELIMITER = b"<IDS|MSG>"
KEPT_LIMIT = 64 << 20  # bytes of Jupyter's messages that wait for a kernel at most
HELD_LIMIT = 1 << 16  # bytes that are read of a connection that nobody has answered yet: ZeroMQ sends 64
PROGRESS_INTERVAL = 5.0  # seconds after which waiting cells show again for how long they have waited
FAILURE_NAME = "KernelDidNotStart"  # the error that each cell of a notebook gets whose kernel could not start
RED, YELLOW = "#d32f2f", "#f9a825"

if TYPE_CHECKING:
    Json = Mapping[str, Any]
    # the reply's type (empty for none) and content, types and contents of what is published
    Answer = tuple[str, Json, list[tuple[str, Json]]]


class PeerError(Exception):
    """What a peer sent is neither ZMTP nor a message that Jupyter has signed."""


def zmtp_frame(body: bytes, flags: int = 0) -> bytes:
    """Return one frame as it is sent."""
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | LONG,)) + len(body).to_bytes(8, "big") + body


def zmtp_message(parts: Sequence[bytes]) -> bytes:
    """Return the frames of a message as they are sent."""
    return b"".join([*(zmtp_frame(part, MORE) for part in parts[:-1]), zmtp_frame(parts[-1])])


def ready_command(socket_type: bytes) -> bytes:
    """Return the command that ends a peer's handshake."""
    return b"\x05READY\x0bSocket-Type" + len(socket_type).to_bytes(4, "big") + socket_type


class ZmtpReader:
    """Cuts what a peer sends into commands and messages."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit  # bytes that a message may have; checked before any of it is awaited
        self.buffer = bytearray()  # what is not cut yet
        self.parts: list[bytes] = []  # the frames of a message whose last one has not come
        self.size = 0  # theirs
        self.is_greeted = False

    def next(self) -> tuple[bool, list[bytes]] | None:
        """Return whether the next event is a command, and its parts; None where it has not come."""
        buffer = self.buffer
        if not self.is_greeted:
            greeting = bytes(buffer[: len(GREETING)])
            if greeting[:1] not in (b"", b"\xff") or greeting[9:10] not in (b"", b"\x7f"):
                raise PeerError("not ZMTP")
            if len(greeting) < len(GREETING):
                return None
            if greeting[10] < 3 or greeting[12:32] != GREETING[12:32]:
                raise PeerError("another version or mechanism of ZMTP")
            del buffer[: len(GREETING)]
            self.is_greeted = True
        while len(buffer) >= 2:
            flags = buffer[0]
            if flags > 7 or (flags & COMMAND and flags & MORE):
                raise PeerError("no frame of ZMTP")
            start = 9 if flags & LONG else 2
            size = int.from_bytes(buffer[1:start], "big")
            if len(buffer) >= start and self.limit is not None and self.size + size > self.limit:
                raise PeerError(f"a frame of {size} bytes")
            if len(buffer) < start + size:
                return None
            body = bytes(buffer[start : start + size])
            del buffer[: start + size]
            if flags & COMMAND:
                return True, [body]
            self.parts.append(body)
            self.size += len(body) + 64
            if not flags & MORE:
                parts, self.parts, self.size = self.parts, [], 0
                return False, parts
        return None

    def rest(self) -> bytes:
        """Return what has come and was not returned by `next`, as it was sent, and forget it."""
        data = b"".join(zmtp_frame(part, MORE) for part in self.parts) + bytes(self.buffer)
        self.parts, self.size = [], 0
        self.buffer.clear()
        return data


class Message:
    """A message of Jupyter's.  idents: frames before the delimiter.  is_visible: it runs code in a cell."""

    def __init__(self, parts: list[bytes], header: Json, parent: Json, content: Json) -> None:
        self.parts = parts
        self.idents = parts[: parts.index(DELIMITER)]
        self.header = header
        self.parent = parent
        self.content = content
        self.kind = str(header["msg_type"])
        self.size = sum(map(len, parts)) + 1000
        self.is_visible = self.kind == "execute_request" and not content.get("silent")


class Session:
    """Signs messages with the key of a connection file and checks those of others."""

    def __init__(self, connection: Mapping[str, Any]) -> None:
        self.key = str(connection.get("key") or "").encode()
        self.digest = str(connection.get("signature_scheme") or "hmac-sha256").partition("-")[2]
        self.name = os.urandom(16).hex()

    def signature(self, parts: Sequence[bytes]) -> bytes:
        """Return the signature of header, parent, metadata and content."""
        import hmac

        return hmac.new(self.key, b"".join(parts), self.digest).hexdigest().encode() if self.key else b""

    def encode(self, kind: str, content: Json, parent: Json, idents: Sequence[bytes] = ()) -> list[bytes]:
        """Return the frames of a new message.  parent: header of the message that it answers."""
        from datetime import datetime, timezone

        header = {"msg_id": os.urandom(16).hex(), "session": self.name, "username": "", "version": "5.3"}
        header.update(msg_type=kind, date=datetime.now(timezone.utc).isoformat())
        parts = [to_json(part) for part in (header, parent, {}, content)]
        return [*idents, DELIMITER, self.signature(parts), *parts]

    def decode(self, parts: list[bytes]) -> Message:
        """Return a message whose signature is right.  Raises PeerError."""
        import hmac

        try:
            at = parts.index(DELIMITER)
            signature, *signed = parts[at + 1 : at + 6]
            if self.key and not hmac.compare_digest(signature, self.signature(signed)):
                raise PeerError("a wrong signature")
            header, parent, _, content = map(from_json, signed)
            if not isinstance(content, dict) or not isinstance(header["msg_id"], str):
                raise PeerError("no message of Jupyter's")
            return Message(parts, header, parent, content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PeerError(f"no message of Jupyter's: {error!r}") from None


class End:
    """One end of a connection, as a protocol of asyncio."""

    on_event: Callable[[bool, list[bytes]], None]  # gets what `ZmtpReader.next` returns

    def __init__(self, limit: int | None = None) -> None:
        import asyncio

        self.transport: Any = None
        self.reader = ZmtpReader(limit)
        self.on_data: Callable[[bytes], object] = self.hold  # gets the bytes that come
        self.lost = asyncio.get_running_loop().create_future()  # done when the connection is gone
        self.peer: End | None = None  # joined: each is read only as fast as the other can be written
        self.is_full = False

    async def open(self, sock: Any) -> None:
        """Make a connected socket the transport."""
        protocol: Any = self
        await self.lost.get_loop().create_connection(lambda: protocol, sock=sock)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.on_data(data)

    def eof_received(self) -> None:
        """Let asyncio close the connection, which calls `connection_lost`."""

    def pause_writing(self) -> None:
        self.is_full = True
        if self.peer:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        self.is_full = False
        if self.peer:
            self.peer.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self.peer:
            self.peer.transport.close()
        self.lost.set_result(None)

    def write(self, data: bytes) -> None:
        """Send bytes; nothing where the connection is gone."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def hold(self, data: bytes) -> None:
        """Collect what comes as it is."""
        self.reader.buffer += data
        if len(self.reader.buffer) > HELD_LIMIT:
            self.transport.pause_reading()

    def join(self, peer: End) -> None:
        """Pass all bytes on from now on, both ways and unread."""
        self.peer, peer.peer = peer, self
        for end, other in ((self, peer), (peer, self)):
            other.write(end.reader.rest())
            end.on_data = other.transport.write
            end.transport.pause_reading() if other.is_full else end.transport.resume_reading()
            if end.transport.is_closing():
                other.transport.close()

    def parse(self, data: bytes = b"") -> None:
        """Cut bytes into commands and messages, and hang up on a peer that sends anything else."""
        self.reader.buffer += data
        try:
            while self.on_data == self.parse and not self.transport.is_closing():
                event = self.reader.next()
                if event is None:
                    break
                self.on_event(*event)
        except PeerError:
            self.transport.abort()


async def relay(left: Any, right: Any) -> None:
    """Join two connected sockets byte by byte until both have ended."""
    ends = End(), End()
    for end, sock in zip(ends, (left, right)):
        await end.open(sock)
    ends[0].join(ends[1])
    for end in ends:
        await end.lost


class KernelProfile(Record):
    """What the front knows of the kernel that it answers for."""

    name: str
    language: str = ""
    debugger: bool = False  # whether it has one
    cache: str = ""  # file with its last kernel_info_reply
    log: str = ""  # of this launch
    state: str = ""  # what the launch waits for


def kernel_profile(launch: Launch, environ: Mapping[str, str]) -> KernelProfile:
    """Return what a launch and its kernel.json say of the kernel."""
    name, data = launch.options.get("name", ""), data_dir(environ)
    prefix = os.path.dirname(os.path.dirname(sys.executable))  # without site, sys.prefix is not a venv's
    roots = [*environ.get("JUPYTER_PATH", "").split(os.pathsep), data, prefix + "/share/jupyter"]
    spec: Any = {}
    for root in [*filter(None, roots), "/usr/local/share/jupyter", "/usr/share/jupyter"]:
        try:
            spec = from_json(Host().read(f"{root}/kernels/{name}/kernel.json") or b"")
            break
        except ValueError:
            continue
    language = spec.get("language") or ("python" if "ipykernel" in " ".join(launch.command) else "")
    debugger = bool((spec.get("metadata") or {}).get("debugger"))
    directory, prefix = log_place(name, environ)
    cache = f"{directory}/{prefix[:-1]}.info.json"
    return KernelProfile(name, language, debugger, cache, launch.options.get("log", ""))


def display(text: str, paragraphs: Sequence[str], colour: str) -> dict[str, Any]:
    """Return the content of a display: a text, and paragraphs of HTML in a box with a coloured edge."""
    body = "".join(f'<div style="margin: 0.3em 0">{paragraph}</div>' for paragraph in paragraphs)
    html = f'<div style="border-left: 4px solid {colour}; padding: 0.2em 1em">{body}</div>'
    return {"data": {"text/plain": text, "text/html": html}, "metadata": {}, "transient": {}}


def html_with_code(text: str) -> str:
    """Return a text as HTML; what is between backticks becomes code."""
    import re
    from html import escape

    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


class Failure:
    """Why a kernel did not start: as the error of a reply, and as a display.  count: executions so far."""

    def __init__(self, error: UserError, kernel: KernelProfile) -> None:
        from html import escape

        heading = f"The kernel {kernel.name} did not start." if kernel.name else "The kernel did not start."
        lines = [error.message, *filter(None, [error.hint])]
        html = [f"<b>{escape(heading)}</b>", *map(html_with_code, lines)]
        if error.detail:
            lines += ["", "It said:", *("  " + line for line in error.detail.splitlines())]
            html.append(f'<pre style="max-height: 20em; overflow: auto">{escape(error.detail)}</pre>')
        if kernel.log:
            lines += ["", f"Log of this launch: {kernel.log}"]
            html.append(f"<small>Log of this launch: <code>{escape(kernel.log)}</code></small>")
        traceback = [f"\x1b[0;31m{FAILURE_NAME}\x1b[0m: {error.message}", *lines[1:]]
        evalue = f"{error.message} {error.hint}".rstrip()
        self.error = {"ename": FAILURE_NAME, "evalue": evalue, "traceback": traceback}
        self.display = display("\n".join([heading, *lines]), html, RED)
        self.count = 0


def kernel_info(kernel: KernelProfile, failure: Failure | None) -> Json:
    """Return the content of a kernel_info_reply: the kernel's own of an earlier launch, or what is known."""
    try:
        if not failure:
            return dict(from_json(Host().read(kernel.cache) or b""))
    except (ValueError, TypeError):
        pass
    banner = f"The kernel {kernel.name} has not started yet. {kernel.state}"
    if failure:
        banner = failure.display["data"]["text/plain"]
    name = kernel.language or "text"  # JupyterLab writes the language into the notebook
    extension = {"python": ".py", "r": ".r", "bash": ".sh", "julia": ".jl"}.get(name.lower(), ".txt")
    mime = f"text/x-{name}".lower()
    language = {"name": name, "version": "", "mimetype": mime, "file_extension": extension}
    info: dict[str, Any] = {"status": "ok", "protocol_version": "5.3", "implementation": "envkernel"}
    info.update(implementation_version=__version__, language_info=language, banner=f"{banner}\n")
    debugger = kernel.debugger and not failure
    return {**info, "debugger": debugger, "supported_features": ["debugger"] * debugger, "help_links": []}


def answer(kind: str, request: Json, kernel: KernelProfile, failure: Failure | None) -> Answer | None:
    """Return what the front says to a message; None for what only a kernel can answer, if one may come."""
    cursor = request.get("cursor_pos", 0)
    replies: dict[str, Json] = {
        "complete_request": {"matches": [], "cursor_start": cursor, "cursor_end": cursor, "metadata": {}},
        "inspect_request": {"found": False, "data": {}, "metadata": {}},
        "is_complete_request": {"status": "complete" if failure else "unknown"},
        "history_request": {"history": []},
        "comm_info_request": {"comms": {}},
        "interrupt_request": {},
        "shutdown_request": {"restart": bool(request.get("restart"))},
    }
    reply = kind.replace("_request", "_reply")
    if kind == "kernel_info_request":
        return reply, kernel_info(kernel, failure), []
    if kind in replies:
        return reply, {"status": "ok", **replies[kind]}, []
    if not failure:
        return None
    if kind == "comm_open":  # the protocol's answer where nobody is at the other end
        return "", {}, [("comm_close", {"comm_id": request.get("comm_id", ""), "data": {}})]
    if kind == "debug_request":
        return reply, {}, []
    if kind != "execute_request":
        return ("", {}, []) if reply == kind else (reply, {"status": "error", **failure.error}, [])
    code, is_silent = request.get("code", ""), request.get("silent")
    failure.count += not is_silent and request.get("store_history", True)
    content = {"status": "error", "execution_count": failure.count, "payload": [], "user_expressions": {}}
    if str(code).strip() in ("exit", "exit()", "quit", "quit()", "q()"):  # the way out of jupyter console
        leave = {"source": "ask_exit", "keepkernel": False}
        return reply, {**content, "status": "ok", "payload": [leave]}, []
    published: list[tuple[str, Json]] = [
        ("execute_input", {"code": code, "execution_count": failure.count}),
        ("display_data", failure.display),
        ("error", {**failure.error, "traceback": [f"\x1b[0;31m{FAILURE_NAME}\x1b[0m"]}),
    ]
    return reply, {**content, **failure.error}, [] if is_silent else published


class Client(End):
    """A connection of Jupyter's to one of the five ports."""

    def __init__(self, front: Front, stream: int) -> None:
        super().__init__(KEPT_LIMIT)
        self.front = front
        self.stream = stream
        self.hello = b""  # the command that ended its handshake
        self.topics: list[bytes] = []  # of its subscriptions
        self.upstream: Upstream | None = None
        self.is_greeted = False
        self.connecting: Any = None  # a task

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.front.clients.add(self)
        self.update()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.front.clients.discard(self)
        if self.upstream:
            self.upstream.transport.close()

    def update(self) -> None:
        """Do what the front's state calls for: be Jupyter's peer, or join the client with the kernel."""
        front, is_live = self.front, self.front.state == "live"
        if front.state == "holding" or self.peer:
            return
        if not self.is_greeted and (not is_live or front.notice):
            self.is_greeted = True
            self.write(GREETING)
            self.read()
        elif is_live and not self.upstream:
            if (self.hello or not self.is_greeted) and not self.connecting and front.handover:
                self.on_data = self.hold
                self.connecting = front.loop.create_task(front.handover.connect_client(self))
        elif self.upstream and is_live:
            reads_on = front.notice and self.stream in (SHELL, IOPUB)
            self.read() if reads_on else self.join(self.upstream)

    def read(self) -> None:
        """Read messages, first those that have come already."""
        self.on_data = self.parse
        self.transport.resume_reading()
        self.parse()

    def on_event(self, is_command: bool, parts: list[bytes]) -> None:
        """Answer a handshake, ping or heartbeat, note a subscription, hand a request on."""
        body, front = parts[0], self.front
        if not self.hello:
            if not is_command or not body.startswith(b"\x05READY"):
                raise PeerError("no handshake")
            self.hello = body
            self.write(zmtp_frame(ready_command(SOCKET_TYPES[self.stream]), COMMAND))
            self.update()
        elif is_command:
            if body.startswith(b"\x04PING"):
                self.write(zmtp_frame(b"\x04PONG" + body[7:], COMMAND))
        elif self.stream == HEARTBEAT:
            self.write(zmtp_message(parts))
        elif self.stream == IOPUB:
            if body[:1] == b"\1":
                self.topics.append(body[1:])
                front.mailbox.on_subscriber(self, body[1:])
            elif body[1:] in self.topics:
                self.topics.remove(body[1:])
            if self.upstream:
                self.upstream.write(zmtp_message(parts))
        else:
            front.mailbox.take(self, front.session.decode(parts))

    def drop_upstream(self) -> None:
        """Part from the kernel; a client that was joined with it has to go as well."""
        upstream, self.upstream = self.upstream, None
        if self.peer:
            self.transport.abort()
        elif self.is_greeted:
            self.read()
        if upstream:
            upstream.transport.abort()


class Upstream(End):
    """A connection to the kernel, for a client of Jupyter's or the front itself.  take: gets its messages."""

    def __init__(self, front: Front, take: Callable[[list[bytes]], object]) -> None:
        import asyncio

        super().__init__()
        self.front = front
        self.take = take
        self.received = 0
        self.ready = asyncio.Event()
        self.lost.add_done_callback(lambda _: self.ready.set())

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.front.received = max(self.front.received, self.received)
        self.on_data(data)

    def on_event(self, is_command: bool, parts: list[bytes]) -> None:
        self.ready.set() if is_command else self.take(parts)

    async def shake_hands(self, hello: bytes) -> None:
        """Be a client of the kernel; ZeroMQ hangs up on one that sends more before it has answered."""
        self.on_data = self.parse
        self.write(GREETING + zmtp_frame(hello, COMMAND))
        self.parse()
        await self.ready.wait()
        if self.transport.is_closing():
            raise ConnectionError("The kernel has closed a connection.")


class Mailbox:
    """What Jupyter sends to a kernel that is not there: answered, kept for it, or refused."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.start = front.loop.time()
        self.kept: list[tuple[Client, Message]] = []
        self.size = 0  # of what is kept
        self.cells: list[Json] = []  # headers of executions that show what the launch waits for
        self.failure: Failure | None = None
        self.has_subscriber = False  # before (but at most 2 s), only control is answered: see `take`

    def take(self, client: Client, message: Message) -> None:
        """Answer a message, keep it or hand it to the kernel."""
        front, kind = self.front, message.kind
        if front.state == "live":
            self.forward(client, message)
            if not front.notice:
                front.update()
            return
        if not self.has_subscriber and client.stream != CONTROL:  # a client connects in any order
            if not self.kept:  # after a restart it subscribes again only when it reads
                front.loop.call_later(2, self.open, True)
            self.keep(client, message)
            return
        if kind == "interrupt_request":
            self.cancel()
        reply = answer(kind, message.content, front.kernel, self.failure)
        if reply:
            self.respond(client, message, reply)
        elif self.keep(client, message) and message.is_visible:
            self.publish("status", {"execution_state": "busy"}, message.header)
            self.cells.append(message.header)
            self.show_state("display_data", message.header)
        if kind == "shutdown_request":
            self.empty()
            front.restart = bool(message.content.get("restart"))
            front.shutdown.set()

    def respond(self, client: Client, message: Message, answer: Answer) -> None:
        """Answer a message as a kernel does."""
        reply, content, published = answer
        self.publish("status", {"execution_state": "busy"}, message.header)
        for kind, data in published:
            self.publish(kind, data, message.header)
        if reply:
            parts = self.front.session.encode(reply, content, message.header, message.idents)
            client.write(zmtp_message(parts))
        self.publish("status", {"execution_state": "idle"}, message.header)

    def refuse(self, client: Client, message: Message, name: str, value: str) -> None:
        """Answer a message with an error."""
        error = {"ename": name, "evalue": value, "traceback": [f"\x1b[0;31m{name}\x1b[0m: {value}"]}
        content = {"status": "error", "execution_count": 0, **error, "payload": [], "user_expressions": {}}
        published: list[tuple[str, Json]] = [("error", error)] if message.is_visible else []
        self.respond(client, message, (message.kind.replace("_request", "_reply"), content, published))

    def keep(self, client: Client, message: Message) -> bool:
        """Keep a message for the kernel; return whether there is room."""
        if self.size + message.size > KEPT_LIMIT:
            self.refuse(client, message, "MemoryError", "Too many messages wait for the kernel.")
            return False
        self.kept.append((client, message))
        self.size += message.size
        return True

    def empty(self) -> list[tuple[Client, Message]]:
        """Return all that is kept, in order, and forget it; clear the state, also of cells without output."""
        for header in self.cells:
            self.publish("clear_output", {"wait": False}, header)
        kept, self.kept, self.cells, self.size = self.kept, [], [], 0
        return kept

    def open(self, first: bool = False) -> None:
        """Answer, or keep for the kernel alone, what has waited for a subscriber or for the failure."""
        if first and self.has_subscriber:
            return
        self.has_subscriber = True
        for client, message in self.empty():
            self.take(client, message)

    def cancel(self) -> None:
        """End the executions that wait as an interrupted kernel would."""
        for client, message in self.empty():
            if message.kind == "execute_request":
                self.refuse(client, message, "KeyboardInterrupt", "It had not started.")
            else:
                self.keep(client, message)

    def on_subscriber(self, client: Client, topic: bytes) -> None:
        """Welcome a subscriber (JEP 65); cells that wait show it their state."""
        welcome = {"subscription": topic.decode("utf-8", "replace")}
        client.write(zmtp_message(self.front.session.encode("iopub_welcome", welcome, {}, [topic])))
        for header in self.cells:
            self.show_state("display_data", header, [client])
        self.open(first=True)

    def forward(self, client: Client, message: Message) -> None:
        """Hand a message to the kernel; the front's own connection takes those of clients that have left."""
        front = self.front
        if front.notice and message.is_visible:
            heading, notice = "The previous kernel ended; its variables are gone.", printable(front.notice)
            content = display(f"{heading}\n{notice}", [f"<b>{heading}</b>", html_with_code(notice)], YELLOW)
            self.publish("display_data", content, message.header)
            front.notice = ""
        target = client.upstream or (front.handover and client.stream == SHELL and front.handover.own)
        if target:
            target.write(zmtp_message(message.parts))

    def publish(self, kind: str, content: Json, parent: Json, clients: Any = None) -> None:
        """Send a message to all subscribers, or to some."""
        topic = f"kernel.{self.front.session.name}.{kind}".encode()
        data = zmtp_message(self.front.session.encode(kind, content, parent, [topic]))
        for client in self.front.clients if clients is None else clients:
            if any(topic.startswith(wanted) for wanted in client.topics):
                client.write(data)

    def show_state(self, kind: str, header: Json, clients: Any = None) -> None:
        """Show in a cell what the launch waits for."""
        minutes, seconds = divmod(int(self.front.loop.time() - self.start), 60)
        waited = f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
        text = f"{self.front.kernel.state} (waited {waited})"
        content = display(text, [html_with_code(text)], YELLOW)
        self.publish(kind, {**content, "transient": {"display_id": header["msg_id"]}}, header, clients)

    def count_time(self) -> None:
        """Show from time to time for how long the cells have waited."""
        for header in self.cells:
            self.show_state("update_display_data", header)
        if self.front.state == "waiting":
            self.front.loop.call_later(PROGRESS_INTERVAL, self.count_time)


class Handover:
    """Passes Jupyter's clients on to the kernel.  connect: (async) returns a socket, connected with a stream.

    It repeats their handshakes and subscriptions.  These are never acknowledged, so it
    sends kernel_info_requests of its own (probes) until the end of the last one has arrived on each iopub
    (behind: where it has not): then nothing is lost of what the kernel says of the messages that were kept.
    """

    def __init__(self, front: Front, connect: Callable[[int], Any]) -> None:
        self.front = front
        self.connect = connect
        self.probes: list[str] = []
        self.behind: set[Client] = set()
        self.replied: Any = None
        self.own = Upstream(front, self.on_reply)

    async def run(self) -> None:
        """Pass all on.  Raises OSError where the kernel goes away before; the clients wait as before then."""
        import asyncio

        front, own = self.front, self.own
        try:
            await own.open(await self.connect(SHELL))
            await own.shake_hands(ready_command(b"DEALER"))
            for attempt in range(100):
                late = [client for client in front.clients if client.hello and not client.upstream]
                await asyncio.gather(*map(self.connect_client, late))
                if attempt and not late and (attempt > 20 or not self.behind):
                    break
                parts = front.session.encode("kernel_info_request", {}, {})
                self.probes.append(front.session.decode(parts).header["msg_id"])
                self.behind = {client for client in front.clients if client.upstream and client.topics}
                self.replied = front.loop.create_future()
                own.write(zmtp_message(parts))
                await asyncio.wait({self.replied, own.lost}, return_when=asyncio.FIRST_COMPLETED)
                if own.lost.done():
                    raise ConnectionError("The kernel has closed a connection.")
                deadline = front.loop.time() + 0.2
                while self.behind and front.loop.time() < deadline:
                    await asyncio.sleep(0.002)
        except BaseException:
            for client in list(front.clients):
                client.drop_upstream()
            if own.transport:
                own.transport.abort()
            raise

    async def connect_client(self, client: Client) -> None:
        """Open a client's connection to the kernel; repeat there what the front has answered in its place."""
        import asyncio

        upstream = Upstream(self.front, lambda parts: self.on_message(client, parts))
        try:
            await upstream.open(await self.connect(client.stream))
            if client.hello:
                await upstream.shake_hands(client.hello)
                upstream.write(b"".join(zmtp_frame(b"\1" + topic) for topic in client.topics))
        except OSError:
            await asyncio.sleep(0.05)
            if self.front.state != "live" and self.own.transport.is_closing():
                raise  # the kernel is gone
            client.transport.abort()  # ZeroMQ tries again
        if not client.transport.is_closing():
            client.upstream = upstream
            client.update()
        elif upstream.transport:
            upstream.transport.abort()

    def on_reply(self, parts: list[bytes]) -> None:
        """Take a reply to a probe, and remember it; other messages are for clients that have left."""
        message, path = self.front.session.decode(parts), self.front.kernel.cache
        if message.parent.get("msg_id") not in self.probes or self.replied.done():
            return
        self.replied.set_result(None)
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(to_json(message.content))
        except OSError:  # a full disk is no reason not to go on
            return

    def on_message(self, client: Client, parts: list[bytes]) -> None:
        """Hand a message on to Jupyter unless a probe has caused it, or the front has sent it before."""
        if client.stream == IOPUB:
            message = self.front.session.decode(parts)
            request = message.parent.get("msg_id")
            if request in self.probes[-1:] and message.content.get("execution_state") == "idle":
                self.behind.discard(client)
            if request in self.probes or message.kind == "iopub_welcome":
                return
        client.write(zmtp_message(parts))


class Front:
    """Jupyter's five ports, in front of a kernel that is not there yet, is there, or will never be.

    state: *holding* (clients are accepted, nothing is answered), *waiting* (the front answers itself, keeps
    what only a kernel can answer and shows the launch's state in the cells), *live* (clients and kernel are
    joined byte by byte), *failed* (every execution shows why there is no kernel), *closed*.
    """

    def __init__(self, connection: Json, kernel: KernelProfile, notice: str = "") -> None:
        import asyncio

        self.connection = connection
        self.kernel = kernel
        self.state = "holding"
        self.is_encrypted = bool(connection.get("curve_secretkey"))  # then all that can be done is to join
        self.notice = "" if self.is_encrypted else notice  # why the kernel before ended, for the first cell
        self.shutdown = asyncio.Event()  # set when the front itself has answered a shutdown_request
        self.restart = False  # whether a start follows it
        self.loop = asyncio.get_running_loop()
        self.session = Session(connection)
        self.clients: set[Client] = set()
        self.mailbox = Mailbox(self)
        self.handover: Handover | None = None
        self.received = 0  # bytes that came from the kernel on the connection that brought most
        self.servers: list[tuple[Any, str]] = []
        self.lacks_files = False

    async def listen(self) -> None:
        """Open Jupyter's addresses.  Raises UserError where another program keeps them."""
        import asyncio
        from functools import partial

        self.loop.set_exception_handler(self.on_exception)
        ip = self.connection["ip"]
        for stream, name in enumerate(STREAMS):
            client: Any = partial(Client, self, stream)
            port = self.connection[name + "_port"]
            path = f"{ip}-{port}" if self.connection.get("transport") == "ipc" else ""
            create: Any = partial(self.loop.create_server, client, ip, int(port), reuse_address=True)
            if path:
                create = partial(self.loop.create_unix_server, client, path)
            for attempt in range(51):  # a kernel that has just ended may still hold them
                try:
                    self.servers.append((await create(), path))
                    break
                except OSError as error:
                    if attempt == 50:
                        self.close_ports()
                        what = f"The ports that Jupyter gave the kernel can't be opened: {error.strerror}."
                        hint = "Start the kernel again; if it stays, look who listens on them: ss -ltnp."
                        raise UserError(what, hint) from None
                    await asyncio.sleep(0.1)
        if self.notice:
            self.wait("")

    def close_ports(self) -> None:
        """Listen no longer, so that others can have the addresses."""
        for server, path in self.servers:
            server.close()
            remove_tree(path)
        self.servers = []

    def on_exception(self, loop: Any, context: Any) -> None:
        """Say once that there are too many open files; asyncio prints a traceback each time that it tries."""
        import errno
        import threading

        if getattr(context.get("exception"), "errno", 0) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif not self.lacks_files:
            self.lacks_files = True
            text = b"envkernel: Too many open files: Jupyter's new connections to the kernel have to wait.\n"
            threading.Thread(target=write_patiently, args=(2, text), daemon=True).start()

    def wait(self, text: str) -> None:
        """Answer clients from now on, and show the text in the cells that wait."""
        state = printable(text).rstrip(".") or "The kernel is starting"
        if state != self.kernel.state:
            self.kernel.state = state
            for header in self.mailbox.cells:  # a new display: jupyter console ignores updates of one
                self.mailbox.publish("clear_output", {"wait": True}, header)
                self.mailbox.show_state("display_data", header)
        if self.state == "holding" and not self.is_encrypted:
            self.state = "waiting"
            self.mailbox.count_time()
            self.update()

    async def go_live(self, connect: Callable[[int], Any]) -> None:
        """Join the clients with the kernel.  Raises OSError where it goes away before it has answered."""
        handover = Handover(self, connect)
        if self.state == "waiting":
            await handover.run()
        if self.state == "failed":  # its engine's client has ended; the kernel is about to be removed
            return
        self.handover, self.state = handover, "live"
        for client, message in self.mailbox.empty():
            self.mailbox.forward(client, message)
        self.update()

    def fail(self, error: UserError) -> None:
        """Be a kernel whose every answer is the error."""
        self.state = "failed"
        for client in list(self.clients):
            client.drop_upstream()
        self.update()
        texts = (error.message, error.hint, error.detail)
        message, hint, detail = (printable(text, self.connection.get("key", "")) for text in texts)
        self.mailbox.failure = Failure(UserError(message, hint, detail=detail), self.kernel)
        if self.mailbox.has_subscriber:
            self.mailbox.open()

    def interrupt(self) -> bool:
        """Do what an interrupt asks for; False where that is the kernel's business."""
        if self.state == "waiting":
            self.mailbox.cancel()
        return self.state in ("waiting", "failed")

    def answered(self, status: int) -> bool:
        """Return whether a kernel that has ended with a status had ever answered."""
        answer = 1024 if status else 1  # so many bytes are no greeting
        return bool(self.handover and self.handover.probes) or self.received >= answer

    def update(self) -> None:
        """Do with all clients what the state calls for."""
        for client in list(self.clients):
            client.update()

    async def drain(self, seconds: float) -> None:
        """Listen no longer, let clients have what was said to them for at most some seconds, and close."""
        import asyncio

        self.close_ports()
        for client in self.clients:
            if not client.peer:
                client.transport.close()
        if self.clients:
            await asyncio.wait([client.lost for client in self.clients], timeout=seconds)
        self.close()

    def close(self) -> None:
        """Close everything at once."""
        self.state = "closed"
        self.close_ports()
        self.mailbox.empty()
        for client in self.clients:
            client.transport.abort()
        if self.handover and self.handover.own.transport:
            self.handover.own.transport.abort()


def recover_launch(tokens: Sequence[str]) -> Launch:
    """Return what can be reported of a launch whose kernelspec is broken: connection file and name."""
    options: dict[str, Any] = {"no-error-kernel": True} if "--no-error-kernel" in tokens else {}
    for token, following in zip(tokens, [*tokens[1:], ""]):
        name, equals, value = token.partition("=")
        if name in ("--connection-file", "--name"):
            options[name[2:]] = value if equals else following
    return Launch([], [], options)


def shows_failure(launch: Launch) -> bool:
    """Return whether the notebook is to show why the kernel did not start."""
    # nbgrader would take the errors for the student's own and give no points.
    grading = os.environ.get("NBGRADER_EXECUTION") == "autograde"
    return not (launch.options.get("no-error-kernel") or launch.options.get("nested") or grading)


def add_site_packages() -> None:
    """Make importable what the launching Python has: the kernelspec starts it with -I and -S."""
    import site

    site.main()
    site.addsitedir(site.getusersitepackages())


async def listen_encrypted(front: Front) -> None:
    """Let pyzmq, which knows CurveZMQ, listen for clients and join them with a front.  Raises ImportError."""
    import tempfile
    import threading
    from functools import partial

    add_site_packages()
    import zmq

    front.mailbox.has_subscriber = True  # one that a keeper held subscribes again only when it is read
    context: Any = zmq.Context()
    with tempfile.TemporaryDirectory(prefix="envkernel-") as directory:
        for stream, name in enumerate(STREAMS):
            outer = context.socket(zmq.XPUB if stream == IOPUB else zmq.ROUTER)
            inner = context.socket(zmq.XSUB if stream == IOPUB else zmq.DEALER)
            outer.curve_publickey = front.connection["curve_publickey"].encode()
            outer.curve_secretkey = front.connection["curve_secretkey"].encode()
            outer.curve_server = True
            outer.bind("tcp://{}:{}".format(front.connection["ip"], front.connection[name + "_port"]))
            inner.bind(f"ipc://{directory}/{stream}")
            client: Any = partial(Client, front, stream)
            await front.loop.create_unix_connection(client, f"{directory}/{stream}")
            threading.Thread(target=zmq.proxy, args=(outer, inner), daemon=True).start()


def become_error_kernel(error: UserError, launch: Launch) -> int:
    """Say why the kernel did not start, in the notebook until Jupyter ends it; return the exit status."""
    write_patiently(2, error_text(error))
    append_log(launch.options.get("log", ""), f"not started: {error.message}\n{error.hint}\n{error.detail}")
    status = error.status or 1
    path = launch.options.get("connection-file")
    if not path or not shows_failure(launch):
        return status
    import asyncio
    import signal

    async def serve() -> None:
        parent, jupyter = os.getppid(), int(os.environ.get("JPY_PARENT_PID") or os.getpid())
        with open(path, "rb") as file:
            front = Front(from_json(file.read()), kernel_profile(launch, os.environ))
        await (listen_encrypted(front) if front.is_encrypted else front.listen())
        front.fail(error)
        shutdown = asyncio.ensure_future(front.shutdown.wait())
        while os.getppid() == parent and process_stat(jupyter) and not shutdown.done():
            await asyncio.wait([shutdown], timeout=1)
        await front.drain(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        asyncio.run(serve())
    except (ImportError, OSError, ValueError, KeyError, UserError) as problem:
        write_patiently(
            2, f"envkernel: The notebook can't show this: {problem!r}.\n".encode(errors="replace")
        )
    return status


# ---- main ---------------------------------------------------------------------------------------


def launch_environ(host: Host) -> dict[str, str]:
    """Return this process's environment without the LC_CTYPE that Python sets in a locale C (PEP 538)."""
    environ = dict(os.environ)
    if environ.get("LC_CTYPE", "") in ("C.UTF-8", "C.utf8", "UTF-8"):
        del environ["LC_CTYPE"]
        start = os.fsdecode(host.read("/proc/self/environ") or b"").split("\0")
        environ.update(entry.partition("=")[::2] for entry in start if entry.startswith("LC_CTYPE="))
    return environ


def plan_launch(launch: Launch, host: Host, environ: Mapping[str, str]) -> Plan:
    """Return the plan of a launch: each mode in its turn.  Raises UserError for what is missing.

    The variables that ``--env`` names are set in the environment and set again after the last mode.
    A container gets them alone: its engine needs its own PATH and HOME.
    """
    given = {name: decode_token(environ[name]) for name in launch.options.get("env", ()) if name in environ}
    here: Mapping[str, str] = given
    if any(MODES[step.mode].container for step in launch.steps):
        usual = {"PATH": os.defpath, "HOME": host.home()}
        kept = {name: value for name, value in environ.items() if name not in given}
        environ, here = {**kept, **{name: usual[name] for name in given if name in usual}}, {}
    plan = Plan(launch.command, {**environ, **here}, given=given)
    for index, step in enumerate(launch.steps):
        mode = MODES[step.mode]
        try:
            plan = mode.plan(step, plan, host, launch.replace(steps=launch.steps[index + 1 :]))
        except KeyError as lacking:  # an option that setup always writes
            raise broken_kernelspec(f"{step.mode} has no --{lacking.args[0]}") from None
        if mode.remote:
            break
    return plan.replace(environ={**plan.environ, **here})


def finish_plan(plan: Plan, launch: Launch, host: Host) -> Plan:
    """Return the plan with Jupyter's paths in their places and its program found.  Raises UserError."""
    for placeholder, name in _PLACEHOLDERS:
        if name in launch.options:
            plan = plan.replace(argv=[arg.replace(placeholder, launch.options[name]) for arg in plan.argv])
    if plan.search is not None:
        plan = resolve_program(plan, host)
        check_kernel_module(plan, host)
    return plan


def run(tokens: Sequence[str]) -> int:
    """The run phase: plan the launch and become the kernel, or one that says why it can't start."""
    while os.open(os.devnull, os.O_RDWR) < 2:  # stdio that a daemon has closed: nothing else gets its numbers
        pass
    host = Host()
    before: Mapping[str, str] = os.environ
    launch = plan = None
    try:
        launch = launch_from_argv(tokens)
        before = launch_environ(host)
        plan = finish_plan(plan_launch(launch, host, before), launch, host)
        if launch.options.get("verbose"):
            host.warn(f"envkernel: {plan.where}: {plan.argv}\n".encode(errors="surrogateescape"))
        log_launch(launch, tokens, plan, before)
        return execute(plan, launch, host)
    except UserError as error:
        launch = launch or recover_launch(tokens)
        if not launch.options:
            raise  # no kernelspec: somebody has typed this
        error.name_kernel(launch.options.get("name", "NAME"))
        if "log" not in launch.options:
            log_launch(launch, tokens, plan, before)
        return become_error_kernel(error, launch)


def log_launch(launch: Launch, tokens: Sequence[str], plan: Plan | None, environ: Mapping[str, str]) -> None:
    """Begin the log of a launch, its option ``log``; ``earlier`` is that of the start before, if any."""
    import time

    text = log_text(tokens, plan, environ, time.time(), os.getpid())
    name, path = (launch.options.get(option, "") for option in ("name", "connection-file"))
    launch.options["log"], launch.options["earlier"] = start_log(name, text, environ, os.path.basename(path))


def execute(plan: Plan, launch: Launch, host: Host) -> int:
    """Run a plan's program below a keeper, or become it; return the exit status.  Raises UserError."""
    if plan.job:
        return keep(JobProgram(plan, plan.job, launch, host), launch)
    if not plan.supervision and launch.options.get("earlier"):
        plan = watched(plan, launch, host)
    if plan.supervision:
        return keep(Program(plan, plan.supervision, host), launch)
    if not os.path.basename(plan.argv[0]).startswith("python"):  # Python ignores these signals anyway
        import signal  # takes half as long as all of the bare interpreter

        for number in IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(plan.argv[0], plan.argv, plan.environ)
    except OSError as error:
        raise cannot_start(plan.argv[0], error) from None


def setup_or_manage(argv: Sequence[str]) -> int:
    """Carry out what a user has typed.  Raises UserError."""
    import io
    import signal

    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the caller has closed it
    for stream in (sys.stdout, sys.stderr):  # a terminal shows any text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):  # these interrupt what is half done
        signal.signal(number, signal.default_int_handler)
    try:
        status = carry_out(argv, Host())
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.filename or isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gives up what still waits
        reason = os.strerror(error.errno or 0)
        raise UserError(f"The output can't be written: {reason}.", "Send it somewhere else.") from None


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` (without the program's name); return the exit status."""
    try:
        if len(argv) > 1 and argv[1] == "run" and argv[0] in MODES:
            return run(argv)
        if argv[:2] in (["yarn", "client"], ["yarn", "agent"]):
            return yarn_main(argv[1:])
        return setup_or_manage(argv)
    except UserError as error:
        os.write(2, error_text(error))
        return 1 if error.status in (126, 127) and argv[1:2] != ["run"] else error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def error_text(error: UserError) -> bytes:
    """Return an error as lines for stderr: what is wrong, what a program said, what to do."""
    lines = [f"envkernel: {error.message}", error.detail, f"  {error.hint}" if error.hint else ""]
    return "".join(line.rstrip("\n") + "\n" for line in lines if line).encode(errors="surrogateescape")


def command() -> int:
    """Entry point of the installed command ``envkernel``."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
