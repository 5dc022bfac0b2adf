"""The environment modes: whole plans, from options, host and environment."""

import pytest

import envkernel
from envkernel import Launch, Output, Plan, Step, UserError
from support.host import FakeHost

COMMAND = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
START = {"PATH": "/usr/bin:/bin", "HOME": "/home/me"}
HERE = {"/opt/c/envs/e/conda-meta/history": b"", "/opt/c/conda-meta/history": b"", "/opt/c/bin/conda": b""}


def plan(step, host, environ=START, command=COMMAND, legacy=False):
    launch = Launch([step], command, legacy=legacy)
    return envkernel.plan_launch(launch, host, environ)


# conda


def conda_plan(environ, prefix, root=""):
    return Plan(
        COMMAND,
        environ,
        [f"{prefix}/bin"],
        f"the conda environment {prefix}",
        f"conda install --prefix {prefix} %s",
    )


def test_conda_with_nothing_active():
    made = plan(Step("conda", {"root": "/opt/c"}, ["/opt/c/envs/e"]), FakeHost(HERE))
    variables = {
        "PATH": "/opt/c/envs/e/bin:/opt/c/condabin:/usr/bin:/bin",
        "CONDA_PREFIX": "/opt/c/envs/e",
        "CONDA_SHLVL": "1",
        "CONDA_DEFAULT_ENV": "e",
        "CONDA_PROMPT_MODIFIER": "(e) ",
        "CONDA_EXE": "/opt/c/bin/conda",
        "_CONDA_EXE": "/opt/c/bin/conda",
        "CONDA_PYTHON_EXE": "/opt/c/bin/python",
        "_CONDA_ROOT": "/opt/c",
        "_CE_M": "",
        "_CE_CONDA": "",
    }
    assert made == conda_plan({**START, **variables}, "/opt/c/envs/e")


def test_conda_switches_from_an_active_environment_in_place():
    active = {**START, "PATH": "/x:/old/bin:/usr/bin", "CONDA_PREFIX": "/old", "CONDA_SHLVL": "2"}
    host = FakeHost({"/new/conda-meta/history": b""})
    variables = {
        "PATH": "/x:/new/bin:/usr/bin",
        "CONDA_PREFIX": "/new",
        "CONDA_PREFIX_2": "/old",
        "CONDA_SHLVL": "3",
        "CONDA_DEFAULT_ENV": "/new",
        "CONDA_PROMPT_MODIFIER": "(/new) ",
    }
    assert plan(Step("conda", {}, ["/new"]), host, active) == conda_plan({**active, **variables}, "/new")


def test_conda_activating_what_is_active_keeps_name_and_level():
    active = {
        **START,
        "PATH": "/x:/e/bin",
        "CONDA_PREFIX": "/e",
        "CONDA_SHLVL": "1",
        "CONDA_DEFAULT_ENV": "own",
    }
    host = FakeHost({"/e/conda-meta/state": b'{"env_vars": {"A": "1"}}'})
    expected = {**active, "CONDA_PROMPT_MODIFIER": "(own) "}
    assert plan(Step("conda", {}, ["/e"]), host, active) == conda_plan(expected, "/e")


def test_conda_state_sets_variables_and_keeps_what_they_replace():
    host = FakeHost(
        {
            "/e/conda-meta/state": b'{"env_vars": {"B": 2, "low": 1, "c": "***unset***", '
            b'"Path": 3, "n": null}}',
            "/e/etc/conda/env_vars.d/1.json": b'{"A": "a$HOME", "B": "1"}',
        }
    )
    start = {**START, "B": "old", "LOW": "0", "CONDA_SHLVL": "0", "CONDA_PREFIX": "/z"}
    made = plan(Step("conda", {}, ["/e"]), host, start)
    names = ("A", "B", "LOW", "N", "C", "__CONDA_SHLVL_0_B", "__CONDA_SHLVL_0_LOW")
    assert {name: made.environ.get(name) for name in names} == {
        "A": "a$HOME",
        "B": "2",
        "LOW": "1",
        "N": "",
        "C": None,
        "__CONDA_SHLVL_0_B": "old",
        "__CONDA_SHLVL_0_LOW": None,
    }
    assert made.environ["PATH"] == "/e/bin:/usr/bin:/bin"


def test_conda_scripts_run_around_the_variables():
    host = FakeHost(
        {
            "/new/conda-meta/history": b"",
            "/new/etc/conda/activate.d/b.sh": b"",
            "/new/etc/conda/activate.d/.a.sh": b"",
            "/new/etc/conda/activate.d/c.csh": b"",
            "/old/etc/conda/deactivate.d/1.sh": b"",
            "/old/etc/conda/deactivate.d/2.sh": b"",
        },
        sourced={"FROM": "script"},
    )
    active = {"PATH": "/old/bin", "CONDA_PREFIX": "/old", "CONDA_SHLVL": "1"}
    made = plan(Step("conda", {}, ["/new"]), host, active)
    (actions,) = host.asked
    assert [name for kind, name, _ in actions if kind == "source"] == [
        "/old/etc/conda/deactivate.d/2.sh",
        "/old/etc/conda/deactivate.d/1.sh",
        "/new/etc/conda/activate.d/.a.sh",
        "/new/etc/conda/activate.d/b.sh",
    ]
    assert [kind for kind, _, _ in actions] == ["source"] * 2 + ["export"] * (len(actions) - 4) + [
        "source"
    ] * 2
    assert ("export", "PATH", "/new/bin") in actions
    assert made.environ["FROM"] == "script"


def test_a_conda_prefix_of_envkernel_1x_is_normalised_as_conda_does():
    made = plan(Step("conda", {}, ["/opt/c/envs//e/"]), FakeHost(HERE))
    assert made.environ["CONDA_PREFIX"] == "/opt/c/envs/e"
    assert made.environ["PATH"].startswith("/opt/c/envs/e/bin:")


def test_conda_that_is_gone():
    with pytest.raises(UserError, match="no conda environment at /gone") as caught:
        plan(Step("conda", {}, ["/gone"]), FakeHost())
    assert "conda create --prefix /gone" in caught.value.hint


@pytest.mark.parametrize(
    ("typed", "files", "environ", "prefix"),
    [
        ("./e", {}, {}, "/cwd/e"),
        ("$X/e", {}, {}, "/cwd/$X/e"),
        ("e", {"/h/e/conda-meta/x": b""}, {"CONDA_ENVS_PATH": "/g:/h"}, "/h/e"),
        ("e", HERE, {"CONDA_EXE": "/opt/c/bin/conda"}, "/opt/c/envs/e"),
        ("base", HERE, {"CONDA_EXE": "/opt/c/bin/conda"}, "/opt/c"),
        ("e", {"/home/me/.conda/envs/e/conda-meta/x": b""}, {}, "/home/me/.conda/envs/e"),
        (
            "e",
            {"/home/me/.conda/environments.txt": b"/a/d\n/a/e\n", "/a/e/conda-meta/x": b""},
            {},
            "/a/e",
        ),
    ],
)
def test_a_conda_name_is_looked_up_at_setup(typed, files, environ, prefix):
    assert envkernel.setup_conda(Step("conda", {}, [typed]), FakeHost(files), environ, {}).targets == [prefix]


def test_an_unknown_conda_name_gets_a_suggestion():
    host = FakeHost({"/h/science/conda-meta/x": b""})
    with pytest.raises(UserError, match="no conda environment named scince") as caught:
        envkernel.setup_conda(Step("conda", {}, ["scince"]), host, {"CONDA_ENVS_PATH": "/h"}, {})
    assert caught.value.hint == "Did you mean science?"


# virtualenv


def test_an_edited_activate_script_is_sourced():
    host = FakeHost({"/v/bin/activate": b"export A=1\n"}, sourced={"VIRTUAL_ENV": "/v"})
    assert plan(Step("virtualenv", {}, ["/v"]), host) == Plan(
        COMMAND,
        {**START, "VIRTUAL_ENV": "/v"},
        ["/v/bin"],
        "the virtualenv /v",
        "/v/bin/python -m pip install %s",
    )
    assert host.asked == [[("source", "/v/bin/activate", "")]]


def test_an_activate_script_that_does_not_activate():
    with pytest.raises(UserError, match="/v/bin/activate does not activate"):
        plan(Step("virtualenv", {}, ["/v"]), FakeHost({"/v/bin/activate": b"syntax error ("}))


QUOTED = b"VIRTUAL_ENV='/%s'\n"
BARE = b'VIRTUAL_ENV="/%s"\n'


@pytest.mark.parametrize(
    ("name", "form", "runs"),
    [
        (b"$(date)", BARE, True),
        (b"$(date)", QUOTED, False),
        (b"`date`", BARE, True),
        (b'";date;"', BARE, True),
        (b"it's", BARE, False),
        (b"it's", QUOTED, True),
        (b"a b", BARE, False),
        (b"back\\slash", BARE, False),
        (b"date;\\", BARE, True),
        (b"a b & c", QUOTED, False),
    ],
)
def test_no_name_of_a_directory_is_run_by_a_shell(name, form, runs):
    path = "/" + name.decode()
    host = FakeHost({f"{path}/bin/activate": form % name}, sourced={"VIRTUAL_ENV": path})
    if not runs:
        assert plan(Step("virtualenv", {}, [path]), host).environ["VIRTUAL_ENV"] == path
        return
    with pytest.raises(UserError, match="does not quote the name of its directory"):
        plan(Step("virtualenv", {}, [path]), host)
    assert host.asked == []


def test_a_virtualenv_that_is_gone():
    with pytest.raises(UserError, match="no virtualenv at /v"):
        plan(Step("virtualenv", {}, ["/v"]), FakeHost())


# lmod


LMOD = "/lmod/libexec/lmod"
MODULES = {**START, "LMOD_CMD": LMOD, "MODULEPATH": "/m"}


def lmod(answers, **options):
    return FakeHost(
        programs=[LMOD, "/tools/bin/python", "/usr/bin/python"],
        answers={(LMOD, "python", *words): output for words, output in answers.items()},
        **options,
    )


def test_lmod_loads_modules():
    said = b'os.environ["PATH"] = "/tools/bin:/usr/bin:/bin";\nos.environ["X"] = "1";\n_mlstatus = True\n'
    host = lmod({("load", "tools", "cuda/12"): Output(0, said)})
    made = plan(Step("lmod", {}, ["tools", "cuda/12"]), host, MODULES)
    assert made.environ == {**MODULES, "PATH": "/tools/bin:/usr/bin:/bin", "X": "1"}
    assert made.search == ["/tools/bin"]
    assert made.where == "the modules tools cuda/12"
    assert envkernel.resolve_program(made, host).argv[0] == "/tools/bin/python"


def test_what_a_module_executes_in_the_shell_is_evaluated_by_bash():
    said = b'os.environ["_LMFILES_"] = "/m/old:/m/new";\n_mlstatus = True\n'
    host = lmod({("load", "new"): Output(0, said)}, sourced={"X": "1"})
    host.answers[(LMOD, "bash", "load", "new")] = Output(0, b"export X=1;\n")
    host.files.update({"/m/old": b"execute{}", "/m/new": b"setenv()"})
    environ = {**MODULES, "_LMFILES_": "/m/old"}
    assert "X" not in plan(Step("lmod", {}, ["new"]), host, environ).environ
    host.files["/m/new"] = b'execute{cmd="export X=1"}'
    assert plan(Step("lmod", {}, ["new"]), host, environ).environ["X"] == "1"
    assert host.asked[-1] == [("eval", "export X=1;\n", "")]


def test_lmod_purges_uses_restores_unloads_then_loads():
    step = Step("lmod", {"purge": True, "use": ["/d"], "restore": "c"}, ["a", "-b", "d"])
    assert envkernel.module_calls(step, {"LOADEDMODULES": "z"}) == [
        ["purge"],
        ["use", "/d"],
        ["restore", "c"],
        ["unload", "b"],
        ["load", "a", "d"],
    ]
    assert envkernel.module_calls(Step("lmod", {"purge": True}, ["a"]), {}) == [["load", "a"]]


def test_a_python_that_no_module_brought_is_not_taken():
    host = lmod({("load", "cuda"): Output(0, b'os.environ["CUDA"] = "1";\n_mlstatus = True\n')})
    with pytest.raises(UserError, match="There is no python in the modules cuda") as caught:
        envkernel.resolve_program(plan(Step("lmod", {}, ["cuda"]), host, MODULES), host)
    assert "--python=/usr/bin/python3" in caught.value.hint
    assert caught.value.status == 127


def test_a_python_of_a_module_that_was_loaded_already_is_found():
    environ = {**MODULES, "PATH": "/tools/bin:/usr/bin", "LOADEDMODULES": "tools"}
    host = lmod(
        {
            ("load", "tools"): Output(0, b"_mlstatus = True\n"),
            ("purge",): Output(0, b'os.environ["PATH"] = "/usr/bin";\n_mlstatus = True\n'),
        }
    )
    assert plan(Step("lmod", {}, ["tools"]), host, environ).search == ["/tools/bin"]


def test_an_old_lmod_kernelspec_takes_python_from_path_and_says_so():
    host = lmod({("load", "cuda"): Output(0, b"_mlstatus = True\n")})
    made = plan(Step("lmod", {}, ["cuda"]), host, MODULES, legacy=True)
    assert envkernel.resolve_program(made, host).argv[0] == "/usr/bin/python"
    assert b"none of the modules has python" in host.reported


@pytest.mark.parametrize(
    ("said", "fails"),
    [
        (Output(1, b"_mlstatus = False\n", b"unknown module"), True),
        (Output(1, b'os.environ["A"] = "1";\n_mlstatus = True\n_mlstatus = False\n', b"a warning"), False),
        (Output(1, b"", b"old Lmod"), True),
        (Output(0, b"", b""), False),
    ],
)
def test_lmod_fails_only_where_it_assigns_nothing(said, fails):
    host = lmod({("load", "m"): said})
    if not fails:
        assert (
            plan(Step("lmod", {}, ["m"]), host, {**MODULES, "LOADEDMODULES": ""}).environ["LMOD_CMD"] == LMOD
        )
        assert host.reported == said.err
        return
    with pytest.raises(UserError, match="`module load m` failed") as caught:
        plan(Step("lmod", {}, ["m"]), host, MODULES)
    assert caught.value.detail == said.err.decode()


def test_environment_modules_fail_by_their_status_line():
    command = ["/m/modulecmd.tcl"]
    partly = Output(0, b"os.environ['A'] = '1'\n_mlstatus = False\n", b"ERROR: no b")
    host = FakeHost(answers={("/m/modulecmd.tcl", "python", "load", "a", "b"): partly})
    with pytest.raises(UserError) as caught:
        envkernel.run_modules(["load", "a", "b"], command, START, host)
    assert caught.value.detail == "ERROR: no b"


def test_without_a_login_shell_lmod_is_found_by_what_setup_recorded():
    host = lmod({("load", "m"): Output(0, b"_mlstatus = True\n")})
    recorded = [f"LMOD_CMD={LMOD}", "MODULEPATH=/m=1"]
    made = plan(Step("lmod", {"recorded": recorded}, ["m"]), host)
    assert made.environ == {**START, "LMOD_CMD": LMOD, "MODULEPATH": "/m=1"}


def test_a_login_shell_is_asked_last():
    host = lmod({("load", "m"): Output(0, b"_mlstatus = True\n")}, login={**MODULES, "OTHER": "1"})
    assert plan(Step("lmod", {}, ["m"]), host).environ == MODULES
    with pytest.raises(UserError, match="There is no module system"):
        plan(Step("lmod", {}, ["m"]), FakeHost())


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (b'os.environ["A"] = "x\\"y\\\\z";\n', {"A": 'x"y\\z'}),
        (b'os.environ["A"] = "1\\\n2\\13\\0093";\n', {"A": "1\n2\r\t3"}),
        (b'os.environ["A"] = "\\0";\n', {"A": ""}),
        (b"os.environ['A'] = 'it\\'s; $x \\n'\n", {"A": "it's; $x \\n"}),
        (b"os.environ['A'] = 'one\ntwo'\nos.environ['B'] = '2'\n", {"A": "one\ntwo", "B": "2"}),
        (b"os.environ['A'] = 'ends in \\'\nos.environ['B'] = '2'\n", {"A": "ends in \\", "B": "2"}),
        (b'hello\nos.environ["A"] = "1";\nprint("os.environ")\n', {"A": "1"}),
        (b'del os.environ["A"]\n', {"A": None}),
        (b'os.environ["A"] = "\xe9\xff";\n', {"A": "\udce9\udcff"}),
        (b'os.environ["A"] = "open\n', {}),
        (b"import os; os.system('x')\n", {}),
    ],
)
def test_what_module_systems_print_is_parsed_as_bytes(text, changes):
    assert envkernel.parse_modules(text)[0] == changes


def test_the_status_lines_are_read():
    assert envkernel.parse_modules(b"_mlstatus = True\n_mlstatus = False\n")[1] == [True, False]


# chains and the kernel program


def test_a_chain_is_applied_in_order():
    said = b'os.environ["PATH"] = "/tools/bin:/usr/bin";\n_mlstatus = True\n'
    host = lmod({("load", "tools"): Output(0, said)})
    host.files.update({"/e/conda-meta/history": b""})
    launch = Launch([Step("lmod", {}, ["tools"]), Step("conda", {}, ["/e"])], COMMAND)
    made = envkernel.plan_launch(launch, host, MODULES)
    assert made.environ["PATH"] == "/e/bin:/tools/bin:/usr/bin"
    assert made.search == ["/e/bin"]


def test_env_comes_last_and_is_seen_by_the_activation_too():
    host = FakeHost({"/e/conda-meta/history": b""})
    launch = Launch([Step("conda", {}, ["/e"])], COMMAND, {"env": ["PATH", "A", "NOT_GIVEN"]})
    made = envkernel.plan_launch(launch, host, {"PATH": "/mine", "A": "%:a%24b"})
    assert made.environ["PATH"] == "/mine"
    assert made.environ["A"] == "a$b"
    assert "NOT_GIVEN" not in made.environ


def finished(command, host, **options):
    start = Plan(command, START, ["/e/bin"], "the environment /e", "install %s")
    return envkernel.finish_plan(start, Launch([], command, options), host)


def test_the_kernel_program_is_the_environments_own():
    host = FakeHost({"/e/lib/python3.11/site-packages/ipykernel_launcher.py": b""}, ["/e/bin/python"])
    host.real_path = {"/e/bin/python": "/usr/bin/python3.11"}.get
    made = finished(COMMAND, host, **{"connection-file": "/run/k.json"})
    assert made.argv == ["/e/bin/python", "-m", "ipykernel_launcher", "-f", "/run/k.json"]
    assert host.asked == []


def test_never_the_next_python_on_path():
    with pytest.raises(UserError, match="There is no python in the environment /e") as caught:
        finished(COMMAND, FakeHost(programs=["/usr/bin/python"]))
    assert caught.value.hint == "Try: install ipykernel."


def test_an_absolute_kernel_program_is_the_users_choice():
    host = FakeHost(programs=["/usr/bin/R"])
    assert finished(["/usr/bin/R", "-e", "1"], host).argv == ["/usr/bin/R", "-e", "1"]
    with pytest.raises(UserError, match="There is no program /gone/R"):
        finished(["/gone/R"], host)


@pytest.mark.parametrize("where", ["python3.9/site-packages", "python3.11/elsewhere"])
def test_a_missing_module_is_looked_for_with_the_python_itself(where):
    ask = ("/e/bin/python3.11", "-c", envkernel.FIND_MODULE, "ipykernel_launcher")
    files = {f"/e/lib/{where}/ipykernel_launcher.py": b""}
    host = FakeHost(files, ["/e/bin/python3.11"], {ask: Output(0)})
    command = ["python3.11", *COMMAND[1:]]
    assert finished(command, host).argv[0] == "/e/bin/python3.11"
    host.answers[ask] = Output(envkernel.MODULE_MISSING)
    with pytest.raises(UserError, match="There is no ipykernel_launcher in the environment /e") as caught:
        finished(command, host)
    assert caught.value.hint == "Try: install ipykernel."
    host.answers[ask] = Output(-11)
    with pytest.raises(UserError, match="does not work: it ended with status -11"):
        finished(command, host)


@pytest.mark.parametrize(("reported", "refused"), [(b"3.8.18 (x)\n", True), (b"3.11.7 (x)\n", False)])
def test_a_virtualenv_that_is_there_keeps_its_python_or_is_refused(reported, refused, monkeypatch):
    ask = ("-c", "import sys; print(sys.version)")
    answers = {
        ("/v/bin/python", *ask): Output(0, b"3.11.7 (x)\n", b""),
        ("/o/python", *ask): Output(0, reported, b""),
    }
    host = FakeHost({"/v/bin/activate": b""}, ["/v/bin/python"], answers, sourced={"VIRTUAL_ENV": "/v"})
    monkeypatch.setattr(envkernel, "create_virtualenv", lambda path, python, host, environ: None)
    step, common = Step("virtualenv", {"create": True}, ["/v"]), {"python": "/o/python"}
    if refused:
        with pytest.raises(UserError, match="/v is there already with Python 3"):
            envkernel.setup_virtualenv(step, host, {}, common)
    else:
        assert envkernel.setup_virtualenv(step, host, {}, common) == Step("virtualenv", {}, ["/v"])
