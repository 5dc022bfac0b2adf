"""Kernelspec tokens: what setup writes is what run reads."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import envkernel
from envkernel import CONNECTION_FILE, RESOURCE_DIR, Launch, Step

arguments = st.binary().filter(lambda raw: b"\0" not in raw).map(os.fsdecode)
tricky = st.sampled_from(
    [
        "--",
        "-x",
        "%:",
        "%:41",
        "{connection_file}",
        "{prefix}",
        "conda",
        "docker",
        "run",
        "--pass=x",
        "",
        "a=b",
        "%",
    ]
)
anything = st.one_of(arguments, tricky)
paths = st.binary(min_size=1).filter(lambda raw: b"\0" not in raw).map(lambda raw: "/" + os.fsdecode(raw))


def as_jupyter_does(argv, connection_file, resource_dir):
    """Put the paths in as jupyter_client's KernelManager.format_kernel_cmd does."""
    known = {"connection_file": connection_file, "resource_dir": resource_dir, "prefix": "/usr"}
    pattern = re.compile(r"\{([A-Za-z0-9_]+)\}")
    return [pattern.sub(lambda match: known.get(match[1], match[0]), token) for token in argv]


def values_of(option):
    if not option.metavar:
        return st.just(True)
    return st.lists(anything, min_size=1) if option.many else anything


@st.composite
def steps(draw):
    mode = envkernel.MODES[draw(st.sampled_from(sorted(envkernel.MODES)))]
    own = [option for option in mode.options if option.run and option.setup]
    chosen = draw(st.lists(st.sampled_from(own), unique_by=lambda option: option.name)) if own else []
    options = {option.name: draw(values_of(option)) for option in chosen}
    least, most = mode.targets
    targets = draw(st.lists(anything.filter(bool), min_size=least, max_size=min(most, 3)))
    return Step(mode.name, options, targets, draw(st.lists(anything, max_size=3)))


@st.composite
def launches(draw):
    shared = [option for option in envkernel.COMMON_OPTIONS if option.run and option.setup]
    options = {
        option.name: draw(values_of(option))
        for option in draw(st.sets(st.sampled_from(range(len(shared)))))
        for option in [shared[option]]
    }
    command = draw(
        st.lists(
            st.one_of(
                anything,
                st.just(CONNECTION_FILE),
                arguments.map(lambda text: text + CONNECTION_FILE + "x"),
                st.just(RESOURCE_DIR + "/start.sh"),
            ),
            min_size=1,
        )
    )
    chain = draw(st.lists(steps(), min_size=1, max_size=3))
    ends = [index for index, step in enumerate(chain) if envkernel.MODES[step.mode].container]
    return Launch(chain[: ends[0] + 1] if ends else chain, command, options)  # no mode follows a container's


@given(arguments, st.booleans())
def test_any_bytes_pass_through_a_token(text, force):
    token = envkernel.encode_token(text, force)
    assert token.isascii()
    assert "{" not in token
    assert envkernel.decode_token(token) == text


@given(launches(), paths, paths)
def test_run_reads_what_setup_wrote(launch, connection_file, resource_dir):
    argv = as_jupyter_does(envkernel.launch_to_argv(launch), connection_file, resource_dir)
    read = envkernel.launch_from_argv(argv)
    options = {**launch.options, "connection-file": connection_file, "format": envkernel.FORMAT}
    if any(RESOURCE_DIR in token for token in launch.command):
        options["resource-dir"] = resource_dir
    assert read.steps == launch.steps
    assert read.options == options
    if connection_file != resource_dir:
        assert read.command == launch.command


def test_a_plain_token_stays_readable():
    assert envkernel.encode_token("/opt/my env/it's") == "/opt/my env/it's"


def test_the_placeholder_stays_a_token_of_its_own_for_the_clients_that_look_for_it():
    launch = Launch([Step("conda", {}, ["/e"])], ["python", "-f", CONNECTION_FILE], {"name": "x"})
    assert envkernel.launch_to_argv(launch) == [
        *("conda", "run", "--format=2", "--connection-file", "{connection_file}", "--name=x", "/e"),
        *("--", "python", "-f", "{connection_file}"),
    ]


def test_a_placeholder_inside_of_a_token_survives_percent_signs_in_the_path():
    launch = Launch([Step("conda", {}, ["/e"])], ["xpython", "--file={connection_file}%"])
    argv = as_jupyter_does(envkernel.launch_to_argv(launch), "/run/%41/k.json", "")
    assert envkernel.launch_from_argv(argv).command == launch.command


def test_a_kernelspec_of_another_format_is_refused():
    argv = ["conda", "run", "--format=9", "/e", "--", "python"]
    with pytest.raises(envkernel.UserError, match="--format=9") as caught:
        envkernel.launch_from_argv(argv)
    assert "envkernel update" in caught.value.hint
