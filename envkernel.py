#!/usr/bin/env python3
"""Make a Jupyter kernel run somewhere else.

In a conda environment or virtualenv, under Lmod modules, in a Docker, Podman, Singularity or
Apptainer container, on a Slurm or YARN node.

Two phases.  *Setup* (``envkernel conda --name=x /path/to/env``) writes a kernelspec that re-invokes
this file.  *Run* (``... conda run ... -- python -m ipykernel_launcher -f FILE``, called by Jupyter)
builds the environment and executes the kernel.

The file reads top to bottom: constants, errors, records, kernelspec tokens, command line,
environment modes, container modes, cluster modes, registry, kernelspecs, managing, effects, main.
Planning is apart from effect: a mode is a function from options, facts and environment to a `Plan`;
only the last sections touch the world.

Imports are few on purpose.  Jupyter starts this file before each kernel, and every module costs:
``re`` 4 ms, ``json`` 5 ms, ``argparse`` 6 ms, ``subprocess`` 7 ms beside an interpreter that needs 5.
What only setup needs is imported where it is used.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Sequence

    from typing_extensions import Self

# ---- constants ----------------------------------------------------------------------------------

__version__ = "2.0.0"

FORMAT = "2"
"""Version of the form in which a launch is written into a kernelspec."""

CONNECTION_FILE = "{connection_file}"
"""Jupyter's placeholder, and ours: stands in a kernel command until the path is known."""

RESOURCE_DIR = "{resource_dir}"
"""Jupyter's placeholder for the folder of the kernelspec."""

BOOT = (
    "import sys;from _frozen_importlib_external import SourceFileLoader as L;p=sys.argv[1];"
    "m=type(sys)('envkernel');m.__file__=p;sys.modules['envkernel']=m;"
    "L('envkernel',p).exec_module(m);sys.exit(m.main(sys.argv[2:]))"
)
"""What the kernelspec gives to ``python -c``: load this file through its cached bytecode.

A script is compiled anew at each start (10 ms for 1,600 lines), an imported file is not.  The loader
is named outright because ``import`` wants a name that ends in ``.py`` and a search path."""

# ---- errors -------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can mend.

    message: one sentence that names the thing.  hint: one sentence that says what to do.
    status: exit status (1 mend it, 2 usage, 127 program not found).  detail: further lines, such as
    what a program said.  `main` alone catches it.
    """

    def __init__(self, message: str, hint: str = "", status: int = 1, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status
        self.detail = detail


def usage_error(message: str, hint: str = "") -> UserError:
    """Return the error for a command line that can't be understood (exit status 2)."""
    return UserError(message, hint, status=2)


# ---- records ------------------------------------------------------------------------------------


class Record:
    """Plain data, compared by value."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join("{}={!r}".format(*item) for item in vars(self).items())
        return f"{type(self).__name__}({fields})"

    def but(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(changes)
        return copy


class Option(Record):
    """One option of envkernel's own: the definition that setup, run, help and completion share.

    flags: ``"--bind -B"``, the long one first.  metavar: empty for a flag that takes no value.
    kind: ``text``, ``path`` (made absolute at setup) or ``env`` (NAME=VALUE or NAME VALUE).
    many: may be given more than once.  run: stands in the kernelspec's argv, for the run phase.
    setup: may be typed by a user.
    """

    def __init__(
        self,
        flags: str,
        help: str,
        *,
        metavar: str = "",
        kind: str = "text",
        many: bool = False,
        run: bool = False,
        setup: bool = True,
        choices: Sequence[str] = (),
        example: str = "",
    ) -> None:
        self.flags = flags.split()
        self.name = self.flags[0][2:]
        self.help = help
        self.metavar = metavar
        self.kind = kind
        self.many = many
        self.run = run
        self.setup = setup
        self.choices = choices
        self.example = example


class Step(Record):
    """One mode of a chain with what was said of it.

    options: by name; True for a flag, a list where the option may be repeated.
    engine: tokens that go to the engine (docker run, apptainer exec, srun) as they stand.
    """

    def __init__(
        self,
        mode: str,
        options: dict[str, Any] | None = None,
        targets: Sequence[str] = (),
        engine: Sequence[str] = (),
    ) -> None:
        self.mode = mode
        self.options: dict[str, Any] = dict(options or {})
        self.targets = list(targets)
        self.engine = list(engine)


class Launch(Record):
    """What a kernelspec says: the chain of modes, then the kernel command.

    command: tokens with `CONNECTION_FILE` and `RESOURCE_DIR` still in them.
    options: the run-phase options that belong to the kernel and not to a mode, by name:
    ``name``, ``connection-file``, ``resource-dir``, ``env`` (names of variables), ``verbose``, ...
    legacy: read from a kernelspec that envkernel 1.x wrote.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        command: Sequence[str],
        options: dict[str, Any] | None = None,
        legacy: bool = False,
    ) -> None:
        self.steps = list(steps)
        self.command = list(command)
        self.options: dict[str, Any] = dict(options or {})
        self.legacy = legacy


class Plan(Record):
    """What a launch will do: nothing has been done yet.

    argv, environ: the program that takes this process's place (or, where `supervised`, stands
    below it), with `CONNECTION_FILE` in argv until the end.
    search: the directories in which a bare program name has to be found; None where the program is
    not looked up on this host.  where: what those directories belong to, in words.
    install: how to install something there, in words, ``%s`` standing for the package.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        search: Sequence[str] | None = None,
        where: str = "this machine",
        install: str = "install %s",
    ) -> None:
        self.argv = list(argv)
        self.environ = dict(environ)
        self.search = None if search is None else list(search)
        self.where = where
        self.install = install


class Output(Record):
    """What a program said: exit status (negative: the signal), stdout and stderr as bytes."""

    def __init__(self, status: int, out: bytes = b"", err: bytes = b"") -> None:
        self.status = status
        self.out = out
        self.err = err


class Mode(Record):
    """A row of the registry.

    target: metavar of what stands after the options; empty for none.  targets: how many there may
    be, ``(least, most)``.  minus: a target may begin with a minus (``-gcc`` unloads a module).
    setup: ``(step, facts, environ) -> Step``: checks and normalises; the kernelspec holds the result.
    plan: ``(step, plan, facts, rest) -> Plan``: one fold of the launch; `rest` is the `Launch` of
    what comes after this step.  remote: it takes the rest of the chain along, so the fold ends here.
    engine: ``(step, facts) -> {option: takes a value}``: the options of the engine, None where
    there is no engine.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        options: Sequence[Option],
        setup: Callable[..., Step],
        plan: Callable[..., Plan],
        *,
        aliases: Sequence[str] = (),
        target: str = "",
        targets: tuple[int, int] = (1, 1),
        minus: bool = False,
        remote: bool = False,
        container: bool = False,
        engine: Callable[..., Mapping[str, bool]] | None = None,
        example: str = "",
    ) -> None:
        self.name = name
        self.summary = summary
        self.options = list(options)
        self.setup = setup
        self.plan = plan
        self.aliases = aliases
        self.target = target
        self.targets = targets
        self.minus = minus
        self.remote = remote
        self.container = container
        self.engine = engine
        self.example = example


# ---- kernelspec tokens --------------------------------------------------------------------------

_ESCAPE = "%:"
_PLACEHOLDERS = ((CONNECTION_FILE, "%(connection_file)"), (RESOURCE_DIR, "%(resource_dir)"))


def encode_token(text: str, force: bool = False, unsafe: str = "{") -> str:
    """Return `text` as one token of a kernelspec's argv: any bytes, and nothing that Jupyter reads.

    Printable ASCII stands as it is.  Anything else, a brace (Jupyter would substitute ``{prefix}``)
    and, with `force`, what could be taken for something else, becomes ``%:`` and percent-encoding.
    """
    raw = os.fsencode(text)
    plain = not force and not text.startswith(_ESCAPE) and not any(c in text for c in unsafe)
    if plain and all(31 < byte < 127 for byte in raw):
        return text
    special = b"%{}$"
    return _ESCAPE + "".join(
        chr(byte) if 31 < byte < 127 and byte not in special else f"%{byte:02X}" for byte in raw
    )


def decode_token(token: str) -> str:
    """Return the text that `encode_token` made `token` of."""
    if not token.startswith(_ESCAPE):
        return token
    first, *parts = token[len(_ESCAPE) :].split("%")
    raw = [os.fsencode(first)]
    for part in parts:
        raw.append(bytes((int(part[:2], 16),)) + os.fsencode(part[2:]))
    return os.fsdecode(b"".join(raw))


def encode_command_token(text: str, force: bool = False) -> str:
    """Return a token of the kernel command: like `encode_token`, with Jupyter's placeholders kept.

    A placeholder that is a whole token stays one, for the clients that look for it; inside of a
    longer token it is written so that the path that Jupyter puts in can hold any character.
    """
    if text in (CONNECTION_FILE, RESOURCE_DIR):
        return text
    for placeholder, escape in _PLACEHOLDERS:
        if placeholder in text:
            parts = [encode_command_token(part, True) for part in text.split(placeholder)]
            return _ESCAPE + escape.join(part[len(_ESCAPE) :] for part in parts)
    return encode_token(text, force)


def decode_command_token(token: str, known: Sequence[tuple[str, str]]) -> str:
    """Return the text of a token of the kernel command.

    known: pairs (placeholder, what Jupyter put in its place), to find whole-token placeholders.
    """
    for placeholder, value in known:
        if token == value:
            return placeholder
    for placeholder, escape in _PLACEHOLDERS:
        if token.startswith(_ESCAPE) and escape in token:
            parts = token[len(_ESCAPE) :].split(escape)
            return placeholder.join(decode_command_token(_ESCAPE + part, ()) for part in parts)
    return decode_token(token)


def launch_to_argv(launch: Launch) -> list[str]:
    """Return the tokens of the run phase, from the mode's name on: the canonical form of a launch."""
    tokens: list[str] = []
    for index, step in enumerate(launch.steps):
        mode = MODES[step.mode]
        tokens += ["--"] if index else []
        tokens += [mode.name]
        if index == 0:
            tokens += ["run", "--format=" + FORMAT, "--connection-file", CONNECTION_FILE]
            if any(RESOURCE_DIR in token for token in launch.command):
                tokens += ["--resource-dir", RESOURCE_DIR]
            tokens += _option_tokens(COMMON_OPTIONS, launch.options)
        tokens += _option_tokens(mode.options, step.options)
        tokens += ["--pass=" + encode_token(token) for token in step.engine]
        tokens += [encode_token(target, target.startswith("-")) for target in step.targets]
    tokens += ["--"]
    for index, text in enumerate(launch.command):
        tokens += [encode_command_token(text, force=index == 0 and text in MODES)]
    return tokens


def _option_tokens(options: Sequence[Option], values: Mapping[str, Any]) -> list[str]:
    tokens: list[str] = []
    for option in options:
        if not option.run or option.name in ("format", "connection-file", "resource-dir"):
            continue
        value = values.get(option.name)
        if value is True:
            tokens.append("--" + option.name)
        elif value is not None:
            for one in value if option.many else [value]:
                tokens.append(f"--{option.name}={encode_token(one)}")
    return tokens


def launch_from_argv(tokens: Sequence[str]) -> Launch:
    """Return the launch that the tokens of a kernelspec stand for (the inverse of `launch_to_argv`).

    Raises UserError for tokens that envkernel did not write, or a newer one did.
    """
    if not any(token.startswith("--format=") for token in tokens[2:3]):
        return legacy_launch(tokens)
    if tokens[2] != "--format=" + FORMAT:
        raise UserError(
            f"This kernelspec was written by another version of envkernel ({tokens[2]}).",
            "Make it again with this one: envkernel update NAME.",
        )
    mode = find_mode(tokens[0])
    common: dict[str, Any] = {}
    steps: list[Step] = []
    rest = [mode.name, *tokens[2:]]
    while rest and rest[0] in MODES:
        mode = MODES[rest[0]]
        own = rest[1:]
        rest = []
        if "--" in own:
            cut = own.index("--")
            own, rest = own[:cut], own[cut + 1 :]
        steps.append(_read_step(mode, own, common))
    known = [
        (placeholder, common[name])
        for placeholder, name in ((CONNECTION_FILE, "connection-file"), (RESOURCE_DIR, "resource-dir"))
        if name in common
    ]
    return Launch(steps, [decode_command_token(token, known) for token in rest], common)


def _read_step(mode: Mode, tokens: Sequence[str], common: dict[str, Any]) -> Step:
    """Read one canonical step; what belongs to the kernel goes into `common`."""
    step = Step(mode.name)
    own = {option.name: option for option in mode.options}
    shared = {option.name: option for option in COMMON_OPTIONS}
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        if not token.startswith("--"):
            step.targets.append(decode_token(token))
            continue
        name, equals, text = token[2:].partition("=")
        value: Any = decode_token(text) if equals else True
        if name == "pass":
            step.engine.append(value)
            continue
        option = own.get(name) or shared.get(name)
        if option is None:
            raise UserError(
                f"The kernelspec has an option that this envkernel does not know: --{name}.",
                "Make it again with this version: envkernel update NAME.",
            )
        if option.metavar and not equals:
            value = queue.pop(0) if queue else ""
        values = step.options if name in own else common
        if option.many:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return step


# ---- command line -------------------------------------------------------------------------------

COMMON_OPTIONS = [
    Option("--format", "Form of this command line.", metavar="N", run=True, setup=False),
    Option("--connection-file", "Jupyter's connection file.", metavar="FILE", run=True, setup=False),
    Option("--resource-dir", "Folder of the kernelspec.", metavar="DIR", run=True, setup=False),
    Option(
        "--name",
        "Name of the kernel, as in `jupyter kernelspec list` (required).",
        metavar="NAME",
        run=True,
        example="--name=my-env",
    ),
    Option(
        "--display-name", "Name that is shown in menus.", metavar="TEXT", example="--display-name='R 4.3'"
    ),
    Option("--user", "Install for this user only (Jupyter's data directory in your home)."),
    Option("--sys-prefix", "Install into the Python that runs envkernel."),
    Option(
        "--prefix",
        "Install below this folder, in share/jupyter/kernels.",
        metavar="DIR",
        kind="path",
        example="--prefix=/opt/jupyter",
    ),
    Option("--replace", "Replace the kernel that has this name."),
    Option("--language", "Language that the kernel is tagged with.", metavar="LANG", example="--language=R"),
    Option(
        "--python",
        "Python to use inside the environment (default: python); SELF: the one that runs envkernel.",
        metavar="PROGRAM",
        example="--python=python3.11",
    ),
    Option(
        "--kernel",
        "Kernel to run: ipykernel (default), ir, imatlab or the name of a kernelspec inside the environment.",
        metavar="NAME",
        example="--kernel=ir",
    ),
    Option(
        "--kernel-cmd",
        "Kernel command in one string, quoted as in a shell (no shell runs it).",
        metavar="COMMAND",
        example="--kernel-cmd='R --slave -e IRkernel::main() --args {connection_file}'",
    ),
    Option(
        "--kernel-template",
        "Take command, names, metadata and logos from this installed kernel.",
        metavar="NAME",
        example="--kernel-template=ir",
    ),
    Option(
        "--kernel-make-path-relative",
        "Shorten an absolute program in the kernel command to its name, to be found in the environment.",
    ),
    Option(
        "--env",
        "Set a variable for the kernel (after the environment has been activated).",
        metavar="NAME=VALUE",
        kind="env",
        many=True,
        run=True,
        example="--env OMP_NUM_THREADS=4",
    ),
    Option(
        "--self-contained",
        "Copy envkernel.py into the kernelspec's folder, so that it works without this installation.",
    ),
    Option(
        "--no-error-kernel",
        "When the kernel can't start, end at once instead of showing the reason in the notebook.",
        run=True,
    ),
    Option("--verbose -v", "Say more, at setup and (on stderr) at each start.", run=True),
    Option("--dry-run", "Print the kernel.json and write nothing."),
]
"""Options of every mode; they stand before the first ``--``."""


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return a hint that names the known words nearest to `word`, or lists them all."""
    import difflib

    near = difflib.get_close_matches(word, known, 3, 0.6)
    if near:
        return "Did you mean {}?".format(" or ".join(near))
    return "Known are: {}.".format(", ".join(known))


def find_mode(name: str) -> Mode:
    """Return the mode of that name or alias.  Raises UserError (status 2) with a suggestion."""
    if name in MODES:
        return MODES[name]
    known = sorted(MODES) + sorted(COMMANDS)
    raise usage_error(f"There is no mode or command named {name!r}.", suggestion(name, known))


class Request(Record):
    """What a user asked setup for.

    common: options by name.  env: variables for the kernel.  steps: the chain as typed.
    command: the kernel command after the last ``--``, None where there is none.
    """

    def __init__(
        self,
        common: dict[str, Any],
        steps: Sequence[Step],
        command: Sequence[str] | None = None,
    ) -> None:
        self.common = common
        self.steps = list(steps)
        self.command = None if command is None else list(command)


def parse_setup(tokens: Sequence[str], facts: Facts) -> Request:
    """Read ``MODE [options] TARGET [-- MODE ... ] [-- KERNEL COMMAND]`` as a user types it.

    Raises UserError (status 2) for what neither envkernel nor the engine knows.
    """
    common: dict[str, Any] = {}
    steps: list[Step] = []
    rest: Sequence[str] | None = tokens
    while rest and (not steps or rest[0] in MODES):
        mode = find_mode(rest[0])
        step, rest = parse_step(mode, rest[1:], facts, None if steps else common)
        check_targets(mode, step)
        steps.append(step)
    if rest is not None and not rest:
        raise usage_error(
            "Nothing stands after the --.",
            "Give the kernel command or another mode there, or leave the -- out.",
        )
    return Request(common, steps, rest)


def check_targets(mode: Mode, step: Step) -> None:
    """Raise UserError (status 2) unless `step` has as many targets as `mode` takes."""
    least, most = mode.targets
    usage = "Usage: " + usage_line(mode)
    if len(step.targets) < least:
        raise usage_error(f"{mode.name} needs {mode.target}.", usage)
    if len(step.targets) > most:
        surplus = " ".join(step.targets[most:])
        raise usage_error(
            "{} takes {} and nothing more: {} is too much.".format(
                mode.name, mode.target or "no argument", surplus
            ),
            usage + ". A kernel command stands after --.",
        )


def parse_step(
    mode: Mode, tokens: Sequence[str], facts: Facts, common: dict[str, Any] | None
) -> tuple[Step, list[str] | None]:
    """Read one mode's part of a command line, up to ``--``.

    common: where options of the kernel go; None after the first mode, where they have no place.
    Returns the step and what follows the ``--`` (None where there was none).
    """
    engine = mode.engine(tokens, facts) if mode.engine else {}
    shared = COMMON_OPTIONS if common is not None else []
    flags = {flag: option for option in [*shared, *mode.options] for flag in option.flags}
    own = {option.name for option in mode.options}
    step = Step(mode.name)
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        if token == "--":
            return step, queue
        flag, equals, _ = token.partition("=")
        option = flags.get(flag)
        if not token.startswith("-") or token == "-":
            step.targets.append(token)
        elif option and not _is_for_engine(option, flag, equals, engine):
            values = step.options if option.name in own or common is None else common
            store_value(values, option, read_value(option, token, queue))
        elif engine_takes(token, engine) is not None:
            step.engine.append(token)
            if engine_takes(token, engine) and queue:
                step.engine.append(queue.pop(0))
        elif mode.minus and not token.startswith("--"):
            step.targets.append(token)
        else:
            raise unknown_option(mode, flag, flags, engine, common is not None)
    return step, None


def _is_for_engine(option: Option, flag: str, equals: str, engine: Mapping[str, bool]) -> bool:
    """Tell whether an option that envkernel knows means the engine's of the same name here.

    ``--user`` is envkernel's and ``--user=X`` docker's; the engine's short options come first.
    """
    if flag not in engine:
        return False
    return not flag.startswith("--") or bool(equals and not option.metavar)


def engine_takes(token: str, engine: Mapping[str, bool]) -> bool | None:
    """Tell whether an engine option takes the next token as its value; None: the engine has no such.

    token: ``--long``, ``--long=value``, ``-x``, ``-xvalue`` or a cluster such as ``-it``.
    """
    if token.startswith("--"):
        flag, equals, _ = token.partition("=")
        return (engine[flag] and not equals) if flag in engine else None
    if token.split("=")[0] in engine:
        return engine[token.split("=")[0]] and "=" not in token
    for index, letter in enumerate(token[1:], 1):
        takes = engine.get("-" + letter)
        if takes is None:
            return None
        if takes:
            return index == len(token) - 1
    return False


def read_value(option: Option, token: str, queue: list[str]) -> Any:
    """Return the value of an option, taking it from `queue` where it is not in `token`.

    Raises UserError (status 2) where a value is missing, or stands where none belongs.
    """
    _, equals, text = token.partition("=")
    if not option.metavar:
        if equals:
            raise usage_error(f"--{option.name} takes no value.", "Leave %r out." % ("=" + text))
        return True
    if not equals:
        if not queue or queue[0] == "--":
            raise usage_error(
                f"--{option.name} needs a value.", f"For example: --{option.name} {option.metavar}."
            )
        text = queue.pop(0)
    if option.kind == "env" and "=" not in text:
        if not queue or queue[0] == "--":
            raise usage_error(f"--env {text} has no value.", f"Write it as --env {text}=VALUE.")
        text += "=" + queue.pop(0)
    if option.choices and text not in option.choices:
        raise usage_error(f"--{option.name} does not know {text!r}.", suggestion(text, option.choices))
    return text


def store_value(values: dict[str, Any], option: Option, value: Any) -> None:
    """Put an option's value where it belongs: the last one counts unless there may be many."""
    if option.many:
        values.setdefault(option.name, []).append(value)
    else:
        values[option.name] = value


def unknown_option(
    mode: Mode, flag: str, flags: Mapping[str, Option], engine: Mapping[str, bool], head: bool
) -> UserError:
    """Return the error for an option that neither envkernel nor the engine knows."""
    known = [name for name, option in flags.items() if option.setup and name.startswith("--")]
    known += [name for name in engine if name.startswith("--")]
    if not head and any(flag in option.flags for option in COMMON_OPTIONS):
        return usage_error(
            f"{flag} belongs to the kernel and not to {mode.name}.", "Put it before the first --."
        )
    program = f" nor {mode.name}" if mode.engine else ""
    return usage_error(
        f"Neither envkernel{program} knows the option {flag}."
        if program
        else f"envkernel {mode.name} has no option {flag}.",
        suggestion(flag, known) if len(flag) > 2 else f"See: envkernel {mode.name} -h",
    )


def legacy_launch(tokens: Sequence[str], facts: Facts | None = None) -> Launch:
    """Return the launch of a kernelspec that envkernel 1.x wrote: ``MODE run [options] TARGET -- COMMAND``.

    There the kernel command is literal and the rest is as a user would have typed it.
    """
    mode = find_mode(tokens[0])
    common: dict[str, Any] = {}
    step, command = parse_step(mode, tokens[2:], facts or Facts(), common)
    check_targets(mode, step)
    if not command:
        raise usage_error(
            "The kernel command is missing after --.", f"Make the kernel again: envkernel {mode.name} -h."
        )
    if "connection-file" in common:
        known = [(CONNECTION_FILE, common["connection-file"])]
        command = [decode_command_token(token, known) if token == known[0][1] else token for token in command]
    return Launch([step], command, common, legacy=True)


def usage_line(mode: Mode) -> str:
    """Return the one-line usage of a mode."""
    target = " " + mode.target if mode.target else ""
    engine = f" [options of {mode.name}]" if mode.engine else ""
    return f"envkernel {mode.name} --name=NAME [options]{engine}{target} [-- KERNEL COMMAND | -- MODE ...]"


def option_help(options: Sequence[Option]) -> str:
    """Return the help lines of some options, each with its example."""
    import textwrap

    lines: list[str] = []
    for option in options:
        if not option.setup:
            continue
        value = "=" + option.metavar if option.metavar else ""
        lines.append("  " + ", ".join(flag + value * flag.startswith("--") for flag in option.flags))
        text = option.help + (f" Example: {option.example}" if option.example else "")
        lines += textwrap.wrap(text, 88, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def mode_help(mode: Mode) -> str:
    """Return the help page of a mode."""
    parts = ["usage: " + usage_line(mode), mode.summary]
    if mode.aliases:
        parts.append("Also called: {}.".format(", ".join(mode.aliases)))
    if mode.options:
        parts.append(f"Options of {mode.name}:\n{option_help(mode.options)}")
    parts.append("Options of every mode:\n" + option_help(COMMON_OPTIONS))
    parts.append("Example:\n  " + mode.example)
    return "\n\n".join(parts)


# ---- environment modes --------------------------------------------------------------------------

SHELL_OWN = frozenset(("_", "SHLVL", "PWD", "OLDPWD", "PS1", "OPTIND"))
"""Variables that bash itself rewrites, no script of an environment (ACTIVATION.md, *When bash is needed*)."""

_MODULE_VARIABLES = ("MODULESHOME", "MODULERCFILE")
_MODULE_PREFIXES = ("LMOD_", "MODULEPATH", "MODULES_")


def path_entries(environ: Mapping[str, str]) -> list[str]:
    """Return the entries of PATH as conda sees them: normalised, an unset PATH being /usr/bin."""
    return [os.path.normpath(entry) for entry in environ.get("PATH", "/usr/bin").split(":")]


def is_variable_name(name: str) -> bool:
    """Tell whether bash can export a variable of that name."""
    return name.isascii() and name.isidentifier()


def conda_root(prefix: str, facts: Facts, environ: Mapping[str, str]) -> str:
    """Return the root prefix that belongs to a conda environment, empty where it can't be told.

    By CONDA_EXE, the parent of ``envs/`` or the commands in ``conda-meta/history``.
    """
    candidates = [environ.get("CONDA_EXE", ""), prefix + "/bin/conda"]
    parent, folder = os.path.split(os.path.dirname(prefix))
    if folder == "envs":
        candidates.append(parent + "/bin/conda")
    for line in (facts.read(prefix + "/conda-meta/history") or b"").splitlines():
        words = line.split()
        if line.startswith(b"# cmd:") and len(words) > 2:
            candidates.append(os.fsdecode(words[2]))
    for candidate in candidates:
        root = os.path.dirname(os.path.dirname(candidate))
        if os.path.isabs(candidate) and facts.isdir(root + "/conda-meta") and facts.exists(candidate):
            return root
    return ""


def conda_state(prefix: str, facts: Facts) -> dict[str, str]:
    """Return the variables that a conda environment sets: ``env_vars.d``, then ``conda-meta/state``.

    Names are upper-cased; PATH and what is marked as unset are left out.
    Raises UserError for a file that is not JSON.
    """
    folder = prefix + "/etc/conda/env_vars.d/"
    files = [folder + name for name in sorted(facts.listdir(folder))]
    state = prefix + "/conda-meta/state"
    texts = [(path, facts.read(path)) for path in [*files, state]]
    variables: dict[str, str] = {}
    for path, text in texts:
        if text is None:
            continue
        import json

        try:
            values = json.loads(text)
            if path == state:
                values = values.get("env_vars", {})
            for name, value in values.items():
                variables[name.upper()] = "" if value is None else str(value)
        except (ValueError, AttributeError):
            raise UserError(
                f"The file {path} of the conda environment is broken.",
                "Mend it with `conda env config vars`, or remove it.",
            ) from None
    return {
        name: value
        for name, value in variables.items()
        if value != "***unset***" and name != "PATH" and is_variable_name(name)
    }


def conda_variables(
    prefix: str, root: str, state: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, str]:
    """Return what ``conda activate PREFIX`` sets, scripts aside (ACTIVATION.md, *conda*).

    root: the root prefix, empty where unknown.  state: what `conda_state` found.
    """
    level = conda_level(environ)
    old = environ.get("CONDA_PREFIX", "") if level else ""
    entries = path_entries(environ)
    new = prefix + "/bin"
    if not old:
        if root and not level and not any(entry.endswith("condabin") for entry in entries):
            entries.insert(0, root + "/condabin")
        entries.insert(0, new)
    elif old + "/bin" in entries:
        entries[entries.index(old + "/bin")] = new
    else:
        entries.insert(0, new)
    parent = os.path.basename(os.path.dirname(prefix))
    name = "base" if prefix == root else os.path.basename(prefix) if parent == "envs" else prefix
    if old == prefix:
        name = environ.get("CONDA_DEFAULT_ENV", name)
        return {"PATH": ":".join(entries), "CONDA_SHLVL": str(level), "CONDA_PROMPT_MODIFIER": f"({name}) "}
    variables = {
        "PATH": ":".join(entries),
        "CONDA_PREFIX": prefix,
        "CONDA_SHLVL": str(level + 1),
        "CONDA_DEFAULT_ENV": name,
        "CONDA_PROMPT_MODIFIER": f"({name}) ",
    }
    if old:
        variables[f"CONDA_PREFIX_{level}"] = old
    if root:
        conda = root + "/bin/conda"
        variables.update({"CONDA_EXE": conda, "_CONDA_EXE": conda, "_CONDA_ROOT": root})
        variables.update({"CONDA_PYTHON_EXE": root + "/bin/python", "_CE_M": "", "_CE_CONDA": ""})
    for key in state:
        if key in environ:
            variables[f"__CONDA_SHLVL_{level}_{key}"] = environ[key]
    variables.update(state)
    return variables


def conda_level(environ: Mapping[str, str]) -> int:
    """Return how many conda environments are active on top of each other."""
    try:
        return int(environ.get("CONDA_SHLVL", "").strip() or 0)
    except ValueError:
        return 0


def plan_conda(step: Step, plan: Plan, facts: Facts, rest: Launch) -> Plan:
    """Plan what ``conda activate PREFIX`` does.  Raises UserError where there is no environment."""
    prefix = step.targets[0]
    if not facts.isdir(prefix + "/conda-meta"):
        raise UserError(
            f"There is no conda environment at {prefix}.",
            f"Create it (conda create --prefix {prefix} ipykernel), or set the kernel up with another one.",
        )
    environ = plan.environ
    root = step.options.get("root", "") or conda_root(prefix, facts, environ)
    old = environ.get("CONDA_PREFIX", "") if conda_level(environ) else ""
    leave = shell_scripts(old + "/etc/conda/deactivate.d", facts) if old else []
    enter = shell_scripts(prefix + "/etc/conda/activate.d", facts)
    state = {} if old == prefix else conda_state(prefix, facts)
    variables = conda_variables(prefix, root, state, environ)
    if leave or enter:
        actions = [("source", script, "") for script in reversed(leave)]
        actions += [("export", name, value) for name, value in variables.items()]
        actions += [("source", script, "") for script in enter]
        environ = facts.source(actions, environ)
    else:
        environ = {**environ, **variables}
    return plan.but(
        environ=environ,
        search=[prefix + "/bin"],
        where=f"the conda environment {prefix}",
        install="conda install --prefix {} %s".format(prefix.replace("%", "%%")),
    )


def shell_scripts(folder: str, facts: Facts) -> list[str]:
    """Return the ``*.sh`` files of a folder in their order, hidden ones too."""
    return [folder + "/" + name for name in sorted(facts.listdir(folder)) if name.endswith(".sh")]


def plan_virtualenv(step: Step, plan: Plan, facts: Facts, rest: Launch) -> Plan:
    """Plan what ``source PATH/bin/activate`` does.  Raises UserError where there is no environment."""
    path = step.targets[0]
    script = path + "/bin/activate"
    text = facts.read(script)
    if text is None and not facts.exists(path + "/bin/python"):
        raise UserError(
            f"There is no virtualenv at {path}.",
            f"Create it (python3 -m venv {path}, or envkernel virtualenv --create ...), or give its path.",
        )
    environ = None if text is None else venv_environ(text, plan.environ)
    if environ is None:
        environ = facts.source([("source", script, "")], plan.environ)
    return plan.but(
        environ=environ,
        search=[path + "/bin"],
        where=f"the virtualenv {path}",
        install="{}/bin/python -m pip install %s".format(path.replace("%", "%%")),
    )


def venv_environ(script: bytes, environ: Mapping[str, str]) -> dict[str, str] | None:
    """Return what an untouched ``bin/activate`` makes of an environment.

    None where the script is not known to be untouched: then bash has to source it.
    """
    return None


# ---- container modes ----------------------------------------------------------------------------

# ---- cluster modes ------------------------------------------------------------------------------

# ---- registry -----------------------------------------------------------------------------------


def setup_path_target(step: Step, facts: Facts, environ: Mapping[str, str]) -> Step:
    """Make the target of a step an absolute path."""
    return step.but(targets=[facts.absolute(step.targets[0])])


MODES: dict[str, Mode] = {}
"""Each mode by its name and its aliases."""

for _mode in (
    Mode(
        "conda",
        "Activate a conda environment: PATH, variables and activate.d scripts, as `conda activate` does.",
        [Option("--root", "Root prefix of conda.", metavar="DIR", kind="path", run=True, setup=False)],
        setup_path_target,
        plan_conda,
        target="PREFIX-OR-NAME",
        example="envkernel conda --user --name=science /opt/conda/envs/science",
    ),
    Mode(
        "virtualenv",
        "Activate a virtualenv, as `source PATH/bin/activate` does.",
        [],
        setup_path_target,
        plan_virtualenv,
        aliases=("venv",),
        target="PATH",
        example="envkernel virtualenv --user --name=my-env ~/my-env",
    ),
):
    MODES.update(dict.fromkeys((_mode.name, *_mode.aliases), _mode))

# ---- kernelspec ---------------------------------------------------------------------------------

# ---- managing -----------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[..., int]] = {}
"""The management commands by name."""

# ---- effects ------------------------------------------------------------------------------------


class Facts:
    """The one edge through which planning reads the world.  Tests give one that reads dictionaries."""

    def exists(self, path: str) -> bool:
        """Tell whether something stands at `path`."""
        return os.path.exists(path)

    def isdir(self, path: str) -> bool:
        """Tell whether `path` is a folder."""
        return os.path.isdir(path)

    def is_executable(self, path: str) -> bool:
        """Tell whether `path` is a file that this user may execute."""
        return os.path.isfile(path) and os.access(path, os.X_OK)

    def absolute(self, path: str) -> str:
        """Return `path` absolute, ``~`` resolved, links kept."""
        return os.path.abspath(os.path.expanduser(path))

    def read(self, path: str) -> bytes | None:
        """Return what a file holds, None where it can't be read."""
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError:
            return None

    def listdir(self, path: str) -> list[str]:
        """Return the names in a folder, none where it can't be read."""
        try:
            return os.listdir(path)
        except OSError:
            return []

    def output(self, argv: Sequence[str], environ: Mapping[str, str]) -> Output:
        """Run a program with no stdin, wait for it (no zombie is left) and return what it said.

        Raises UserError (status 127) where it can't be started.
        """
        files = [os.memfd_create("envkernel"), os.memfd_create("envkernel")]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, files[0], 1),
            (os.POSIX_SPAWN_DUP2, files[1], 2),
        ]
        try:
            pid = os.posix_spawn(argv[0], list(argv), environ, file_actions=actions)
            _, status = os.waitpid(pid, 0)
            texts = [_read_all(file) for file in files]
        except OSError as error:
            raise cannot_start(argv[0], error) from None
        finally:
            for file in files:
                os.close(file)
        return Output(exit_status(status), *texts)

    def source(self, actions: Sequence[tuple[str, str, str]], environ: Mapping[str, str]) -> dict[str, str]:
        """Let bash source scripts and set variables, in order; return the environment that results.

        actions: ``("source", script, "")`` or ``("export", name, value)``.
        Only the difference is applied to `environ`, for bash rewrites some variables of its own.
        Raises UserError where a script ended the shell.
        """
        raise NotImplementedError


def _read_all(file: int) -> bytes:
    """Return what a seekable file descriptor holds."""
    os.lseek(file, 0, os.SEEK_SET)
    return b"".join(iter(lambda: os.read(file, 1 << 16), b""))


def exit_status(status: int) -> int:
    """Return a wait status as an exit status, negative for a signal."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def cannot_start(program: str, error: OSError) -> UserError:
    """Return the error for a program that the system would not start."""
    reason = os.strerror(error.errno or 0)
    return UserError(
        f"The program {program} can't be started: {reason}.",
        "Check that it is there, that it is executable, and that the interpreter it names exists.",
        127 if error.errno == 2 else 126,
    )


# ---- error kernel -------------------------------------------------------------------------------

FAILURE_NAME = "KernelDidNotStart"
"""Name of the error that each cell of a notebook gets whose kernel could not start."""

_LANGUAGES = {
    "python": ("text/x-python", ".py", "ipython3", {"name": "ipython", "version": 3}),
    "r": ("text/x-r-source", ".r", "r", "r"),
    "bash": ("text/x-sh", ".sh", "bash", "shell"),
    "julia": ("text/x-julia", ".jl", "julia", "julia"),
}


class Failure(Record):
    """Why a kernel did not start, as the notebook shows it.

    kernel: its name.  message, hint: as in `UserError`.  detail: the last lines that were heard of it.
    log: path of the launch log.  language: the kernelspec's.  Empty where there is none.
    """

    def __init__(
        self, kernel: str, message: str, hint: str = "", detail: str = "", log: str = "", language: str = ""
    ) -> None:
        self.kernel = kernel
        self.message = message
        self.hint = hint
        self.detail = detail
        self.log = log
        self.language = language

    @property
    def heading(self) -> str:
        """The failure in one line."""
        return f"The kernel {self.kernel} did not start." if self.kernel else "The kernel did not start."


def printable(text: str, secret: str = "") -> str:
    """Return what a program said as it may be shown: no terminal codes, no `secret`."""
    import re

    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])", "", text)
    text = re.sub(r"[^\n]*\r(?=[^\n])", "", text)  # a progress bar: the last state of its line
    text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    return text.replace(secret, "***") if secret else text


def failure_lines(failure: Failure) -> list[str]:
    """Return a failure as lines of text, the message first."""
    lines = [failure.message]
    if failure.hint:
        lines.append(failure.hint)
    if failure.detail:
        lines += ["", "It said:", *("  " + line for line in failure.detail.splitlines())]
    if failure.log:
        lines += ["", f"Log of this launch: {failure.log}"]
    return lines


def failure_html(failure: Failure) -> str:
    """Return a failure as HTML; what stands between backticks in the hint becomes code."""
    import re
    from html import escape

    parts = [f"<b>{escape(failure.heading)}</b>", escape(failure.message)]
    if failure.hint:
        parts.append(re.sub("`([^`]+)`", r"<code>\1</code>", escape(failure.hint)))
    if failure.detail:
        parts.append(f'<pre style="max-height: 20em; overflow: auto">{escape(failure.detail)}</pre>')
    if failure.log:
        parts.append(f"<small>Log of this launch: <code>{escape(failure.log)}</code></small>")
    body = "".join(f'<div style="margin: 0.3em 0">{part}</div>' for part in parts)
    return f'<div style="border-left: 4px solid #d32f2f; padding: 0.2em 1em">{body}</div>'


def error_content(failure: Failure) -> dict[str, Any]:
    """Return the name, value and traceback that stand for the failure in a message."""
    first, *others = failure_lines(failure)
    value = f"{failure.message} {failure.hint}".rstrip()
    return {
        "ename": FAILURE_NAME,
        "evalue": value,
        "traceback": [f"\x1b[0;31m{FAILURE_NAME}\x1b[0m: {first}", *others],
    }


def kernel_info_content(failure: Failure) -> dict[str, Any]:
    """Return the content of a kernel_info_reply.

    The language is the real kernel's: JupyterLab writes it into the notebook.
    """
    known = _LANGUAGES.get(failure.language.lower())
    mime, extension, lexer, editor = known or ("text/plain", ".txt", "text", "null")
    language = {
        "name": failure.language or "text",
        "version": "",
        "mimetype": mime,
        "file_extension": extension,
        "pygments_lexer": lexer,
        "codemirror_mode": editor,
    }
    return {
        "status": "ok",
        "protocol_version": "5.3",
        "implementation": "envkernel",
        "implementation_version": __version__,
        "language_info": language,
        "banner": "\n".join([failure.heading, *failure_lines(failure), ""]),
        "debugger": False,
        "supported_features": [],
        "help_links": [],
    }


def execute_answer(
    request: Mapping[str, Any], failure: Failure, count: int
) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Return the execute_reply's content and what goes to all clients: the failure in text and HTML."""
    error = error_content(failure)
    reply = {**error, "status": "error", "execution_count": count, "payload": [], "user_expressions": {}}
    if request.get("silent"):
        return reply, []
    shown = {"text/plain": failure.heading, "text/html": failure_html(failure)}
    return reply, [
        ("execute_input", {"code": request.get("code", ""), "execution_count": count}),
        ("display_data", {"data": shown, "metadata": {}, "transient": {}}),
        ("error", error),
    ]


def answer(
    kind: str, request: Mapping[str, Any], failure: Failure, count: int, ports: Mapping[str, Any]
) -> tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Return what the error kernel says to one message: the reply's type, its content, what it publishes.

    kind: type of the message; request: its content; count: the execution's number; ports: by channel.
    The type is empty where the protocol knows no reply.
    """
    if kind == "execute_request":
        return ("execute_reply", *execute_answer(request, failure, count))
    if kind == "comm_open":  # the protocol's answer where nobody is at the other end
        return "", {}, [("comm_close", {"comm_id": request.get("comm_id", ""), "data": {}})]
    if not kind.endswith("_request"):
        return "", {}, []
    cursor = request.get("cursor_pos", 0)
    no_debugger = {
        "type": "response",
        "seq": 0,
        "request_seq": request.get("seq", 0),
        "success": False,
        "command": request.get("command", ""),
        "message": failure.message,
    }
    replies: dict[str, dict[str, Any]] = {
        "kernel_info": kernel_info_content(failure),
        "complete": {"matches": [], "cursor_start": cursor, "cursor_end": cursor, "metadata": {}},
        "inspect": {"found": False, "data": {}, "metadata": {}},
        "is_complete": {"status": "complete"},
        "history": {"history": []},
        "comm_info": {"comms": {}},
        "connect": dict(ports),
        "interrupt": {},
        "shutdown": {"restart": bool(request.get("restart"))},
        "debug": no_debugger,
    }
    name = kind[: -len("_request")]
    content = replies.get(name, {"status": "error", **error_content(failure)})
    return name + "_reply", content if name == "debug" else {"status": "ok", **content}, []


class ErrorKernel:
    """A kernel on the sockets that a connection file names, whose every answer is the failure."""

    def __init__(self, connection: Mapping[str, Any], failure: Failure) -> None:
        """Bind the five channels.  Raises ImportError without pyzmq or jupyter_client."""
        import zmq
        from jupyter_client.session import Session

        self.zmq: Any = zmq
        self.failure = failure
        self.connection = connection
        self.count = 0
        self.has_subscriber = False
        self.session: Any = Session(
            key=connection.get("key", "").encode(),
            signature_scheme=connection.get("signature_scheme") or "hmac-sha256",
        )
        self.context = zmq.Context()
        self.shell = self.bind("shell", zmq.ROUTER)
        self.control = self.bind("control", zmq.ROUTER)
        self.stdin = self.bind("stdin", zmq.ROUTER)
        self.heartbeat = self.bind("hb", zmq.ROUTER)
        self.iopub = self.bind("iopub", zmq.XPUB)

    def bind(self, channel: str, kind: int) -> Any:
        """Return a socket that listens where the connection file says, encrypted if it says so."""
        import time

        socket = self.context.socket(kind)
        socket.linger = 1000
        if kind == self.zmq.XPUB:
            socket.setsockopt(self.zmq.XPUB_VERBOSE, 1)
        if self.connection.get("curve_secretkey"):
            socket.curve_secretkey = self.connection["curve_secretkey"].encode()
            socket.curve_publickey = self.connection["curve_publickey"].encode()
            socket.curve_server = True
        transport = self.connection.get("transport") or "tcp"
        colon = ":" if transport == "tcp" else "-"
        address = "{}://{}{}{}".format(
            transport, self.connection["ip"], colon, self.connection[channel + "_port"]
        )
        for attempt in range(50):  # a kernel that has just ended may still hold its ports
            try:
                socket.bind(address)
                break
            except self.zmq.ZMQError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
        return socket

    def serve(self) -> None:
        """Answer until a shutdown, or until the parent (Jupyter) is gone."""
        parent = os.getppid()
        poller = self.zmq.Poller()
        for socket in (self.control, self.shell, self.heartbeat, self.iopub):
            poller.register(socket, self.zmq.POLLIN)
        while os.getppid() == parent:
            ready = dict(poller.poll(1000))
            if self.heartbeat in ready:
                self.heartbeat.send_multipart(self.heartbeat.recv_multipart())
            if self.iopub in ready:
                self.greet_subscribers()
            if any(self.handle(socket) for socket in (self.control, self.shell) if socket in ready):
                break
        self.context.destroy(linger=1000)

    def handle(self, socket: Any) -> bool:
        """Answer one message; tell whether it was a shutdown."""
        try:
            idents, message = self.session.recv(socket, self.zmq.NOBLOCK)
            kind, request = message["msg_type"], message["content"]
        except Exception:  # a wrong signature or no message at all: whatever a stranger sends ends nothing
            return False
        if kind == "execute_request" and request.get("store_history", True) and not request.get("silent"):
            self.count += 1
        ports = {name: port for name, port in self.connection.items() if name.endswith("_port")}
        reply, content, published = answer(kind, request, self.failure, self.count, ports)
        self.await_subscriber()
        self.publish("status", {"execution_state": "busy"}, message)
        for name, data in published:
            self.publish(name, data, message)
        if reply:
            self.session.send(socket, reply, content, parent=message, ident=idents)
        self.publish("status", {"execution_state": "idle"}, message)
        return bool(kind == "shutdown_request")

    def publish(self, kind: str, content: Mapping[str, Any], parent: Any) -> None:
        """Send a message to all clients."""
        topic = f"kernel.{self.session.session}.{kind}".encode()
        self.session.send(self.iopub, kind, content, parent=parent, ident=topic)

    def greet_subscribers(self) -> None:
        """Tell each new subscriber that it is one (JEP 65)."""
        while self.iopub.poll(0):
            event = self.iopub.recv()
            if event[:1] == b"\x01":
                self.has_subscriber = True
                content = {"subscription": event[1:].decode("utf-8", "replace")}
                self.session.send(self.iopub, "iopub_welcome", content, ident=event[1:])

    def await_subscriber(self) -> None:
        """Wait for the first subscriber, once, for two seconds.

        A client connects its channels in any order, and what is published before is lost to it.
        """
        for _ in range(20):
            if self.has_subscriber:
                break
            self.iopub.poll(100)
            self.greet_subscribers()
        self.has_subscriber = True


def import_from_here() -> None:
    """Make importable what the launching interpreter has: the kernelspec starts it with -I and -S."""
    import site

    site.main()
    folder = site.getusersitepackages()
    if os.path.isdir(folder):
        site.addsitedir(folder)


def ended_error(status: int, where: str, said: str, install: str = "install %s") -> UserError:
    """Return the error for a kernel that ended before it ever answered, the exit status in words.

    status: as in `Output`.  where: what it ran in, in words.  said: the end of its stderr.
    install: as in `Plan`.
    """
    import re
    import signal

    number = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    words = f"exit status {status}"
    hint = "What it said is below; start its command by hand to see more."
    if number:
        try:
            words = f"signal {signal.Signals(number).name}"
        except ValueError:
            words = f"signal {number}"
    missing = re.search(r"No module named '?([\w.]+)", said)
    if missing:
        package = missing[1].split(".")[0].replace("ipykernel_launcher", "ipykernel")
        hint = f"Install what it misses: `{install % package}`."
    elif status == 125:
        words = "exit status 125: the engine itself failed"
        hint = "What the engine said is below; mend the image's name or the engine's options."
    elif status in (126, 127):
        words += ": the command was not found" if status == 127 else ": the command can't be executed"
        hint = "Check the kernel command and that its program is installed there."
    elif number == 9:
        words += ", killed: out of memory?"
        hint = "Give it more memory, or ask whoever runs this machine what ended it."
    return UserError(f"The kernel in {where} ended before it answered ({words}).", hint, max(status, 1), said)


def salvage_launch(tokens: Sequence[str]) -> Launch:
    """Return what can be told of a launch whose kernelspec is broken: connection file and name."""
    options: dict[str, Any] = {}
    for token, following in zip(tokens, [*tokens[1:], ""]):
        name, equals, value = token.partition("=")
        if name in ("--connection-file", "--name"):
            options[name[2:]] = value if equals else following
        elif token == "--no-error-kernel":
            options["no-error-kernel"] = True
    return Launch([], [], options)


def kernel_language(name: str, command: Sequence[str]) -> str:
    """Return the language of an installed kernel; by its command where Jupyter does not find it."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        return str(KernelSpecManager().get_kernel_spec(name).language)
    except NoSuchKernel:
        return "python" if any("ipykernel" in token for token in command) else ""


def become_error_kernel(error: UserError, launch: Launch, log: str = "") -> int:
    """Say on stderr and in the notebook why the kernel did not start; return the exit status.

    Serves Jupyter's connection file until Jupyter shuts this kernel down or is gone.  Where the
    launching Python has no jupyter_client, or with ``--no-error-kernel``, only stderr gets to know.
    log: path of the launch log, empty for none.
    """
    tell_error(error)
    status = error.status or 1
    path = launch.options.get("connection-file")
    if launch.options.get("no-error-kernel") or not path:
        return status
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        import_from_here()
        import json

        with open(path, encoding="utf-8") as file:
            connection = json.load(file)
        name = launch.options.get("name", "")
        message, hint, detail = (
            printable(text, connection.get("key", "")) for text in (error.message, error.hint, error.detail)
        )
        failure = Failure(name, message, hint, detail, log, kernel_language(name, launch.command))
        kernel = ErrorKernel(connection, failure)
    except (ImportError, OSError, ValueError, KeyError) as problem:
        sys.stderr.write(f"envkernel: The notebook can't show this: {problem!r}.\n")
        return status
    kernel.serve()
    return status


# ---- main ---------------------------------------------------------------------------------------


def plan_launch(launch: Launch, facts: Facts, environ: Mapping[str, str]) -> Plan:
    """Return the plan of a launch: each mode in its turn, then the kernel program.

    environ: the environment the launch starts from.  Raises UserError for what is missing.
    """
    plan = Plan(launch.command, environ)
    for index, step in enumerate(launch.steps):
        mode = MODES[step.mode]
        plan = mode.plan(step, plan, facts, launch.but(steps=launch.steps[index + 1 :]))
        if mode.remote:
            break
    return plan


def run(tokens: Sequence[str]) -> int:
    """The run phase: plan the launch and become the kernel."""
    facts = Facts()
    launch = None
    try:
        launch = launch_from_argv(tokens)
        plan = plan_launch(launch, facts, os.environ)
        os.execve(plan.argv[0], plan.argv, plan.environ)
    except UserError as error:
        return become_error_kernel(error, launch or salvage_launch(tokens))


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` (without the program's name); return the exit status."""
    try:
        if len(argv) > 1 and argv[1] == "run" and argv[0] in MODES:
            return run(argv)
        raise usage_error("Nothing to do.", "See: envkernel -h")
    except UserError as error:
        tell_error(error)
        return error.status


def tell_error(error: UserError) -> None:
    """Say on stderr what is wrong and what to do."""
    sys.stderr.write(f"envkernel: {error.message}\n")
    if error.detail:
        sys.stderr.write(error.detail.rstrip("\n") + "\n")
    if error.hint:
        sys.stderr.write(f"  {error.hint}\n")


def command() -> int:
    """Entry point of the installed command ``envkernel``."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
