"""README: its example commands are ones that envkernel understands, and its tables agree with the code."""

import os
import re
import shlex
import shutil

import pytest

import envkernel
from support import ROOT
from support.host import HELP, FakeHost

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```(?:shell|console)\n(.*?)^```", README, re.M | re.S))
ENGINES = ("docker", "podman", "apptainer", "singularity", "srun", "yarn")
OPTIONS = """
      --build-arg list         Set variables
      --cap-add list           Add capabilities
      --entrypoint string      The program
      --gres list              Generic resources
      --group-add list         Add groups
      --ipc string             IPC mode
      --mem string             Memory
      --network string         Network
      --no-home                No home
  -p, --partition string       Partition
      --security-opt list      Security options
  -t, --time string            Time limit
      --userns string          User namespace
"""
"""What the examples give to an engine, beside the options in `HELP`."""

FOREIGN = {
    "--ExecutePreprocessor.kernel_name",
    "--ExecutePreprocessor.timeout",
    "--execution-timeout",
    "--execute",
    "--force",
    "--reinstall",
    "--test-only",
    "--to",
    "--upgrade",
}
"""Options of other programs that README names."""


def examples():
    """Return the arguments of each ``envkernel ...`` in README."""
    lines = BLOCKS.replace("\\\n", " ").splitlines()
    found = [part for line in lines for part in line.split("&&")]
    found += re.findall(r"`([^`\n]*)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
    commands = [re.match(r"\s*(?:\$ )?(?:source <\()?(?:\S*/)?envkernel ([^|)]+)", text) for text in found]
    words = [shlex.split(match[1], comments=True) for match in commands if match]
    return [one for one in words if one[0] not in ("MODE", "...")]


@pytest.fixture
def host(monkeypatch):
    """A host with all engines, docker and podman the real ones if installed; modules change nothing."""
    real = {name: shutil.which(name) for name in ("docker", "podman")}
    for name in ("run", "exec"):
        monkeypatch.setitem(HELP, name, HELP[name] + OPTIONS.encode())
    changes = {"setup": lambda step, *_: step, "plan": lambda step, plan, *_: plan}
    monkeypatch.setitem(envkernel.MODES, "lmod", envkernel.MODES["lmod"].replace(**changes))

    class Engines(FakeHost):
        def output(self, argv, environ):
            program = real.get(os.path.basename(argv[0]))
            if program:
                return envkernel.Host().output([program, *argv[1:]], os.environ)
            if argv[0].endswith("/srun"):
                return envkernel.Output(0, OPTIONS.encode())
            return super().output(argv, environ)

    monkeypatch.setenv("PATH", "/bin")
    return Engines(programs=[f"/bin/{name}" for name in ENGINES])


@pytest.mark.parametrize("words", [one for one in examples() if one[0] in envkernel.MODES], ids=" ".join)
def test_an_example_of_a_mode_is_understood(words, host):
    request = envkernel.parse_setup(words, host)
    request.common.setdefault("name", envkernel.derive_name(request, host))
    envkernel.check_request(request)


@pytest.mark.parametrize("words", [one for one in examples() if one[0] not in envkernel.MODES], ids=" ".join)
def test_an_example_of_a_command_is_understood(words):
    command = envkernel.COMMANDS[words[0]]
    known = {flag for option in command.options for flag in option.flags}
    assert known.issuperset(word for word in words[1:] if word.startswith("-"))
    if command.argument in words or words[0] == "completion":
        envkernel.parse_command(words[0], words[1:])


def test_there_are_examples_of_each_mode_and_command():
    names = {word for words in examples() for word in words}
    assert names >= {mode.name for mode in envkernel.MODES.values()} | envkernel.COMMANDS.keys()


def table(title):
    """Return the cells of the rows of README's table whose first column has a title."""
    rows = README.partition(f"\n| {title} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_modes_has_them_all():
    said = [re.findall(r"`([\w]+)(?: ([^`]+))?`", cells[0]) for cells in table("mode")]
    found = {name: target for row in said for name, target in row}
    targets = {name: mode.target for name, mode in envkernel.MODES.items()}
    assert found.keys() == targets.keys()
    assert {name for name, target in found.items() if bool(target) != bool(targets[name])} <= {"venv"}


def test_each_option_in_readme_is_known():
    ours = [option for mode in envkernel.MODES.values() for option in mode.options]
    ours += [option for command in envkernel.COMMANDS.values() for option in command.options]
    known = {flag for option in [*ours, *envkernel.COMMON_OPTIONS] for flag in option.flags} | FOREIGN
    engine = envkernel.read_engine_help(OPTIONS + "".join(text.decode() for text in HELP.values()))
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", README)) - known - engine.keys() == set()


def test_the_symptoms_are_messages_of_envkernel():
    code = (ROOT / "envkernel.py").read_text()
    symptoms = [quoted for cells in table("symptom") for quoted in re.findall(r"`([^`]+)`", cells[0])]
    assert len(symptoms) > 5
    for part in (part.strip() for symptom in symptoms for part in symptom.split("...")):
        general = part.replace("the image", "{plan.where}").replace("no python ", "no {program} ")
        assert part in code or general in code, part
