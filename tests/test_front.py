"""Jupyter's five ports in front of a kernel: what is answered there, as data."""

import pytest
from jupyter_kernel_test.msgspec_v5 import validate_message

import envkernel

FAILURE = envkernel.Failure(
    "science",
    "There is no conda environment at /opt/<x>.",
    "Create it: `conda create -p /opt/<x> ipykernel`.",
    "line one\nline <two>",
    "/home/me/launch.log",
    "python",
)
PORTS = {"shell_port": 1, "iopub_port": 2}


def ask(kind, **content):
    return envkernel.answer(kind, content, FAILURE, 3, PORTS)


REQUESTS = {
    "kernel_info_request": {},
    "execute_request": {"code": "1+1"},
    "complete_request": {"code": "pri", "cursor_pos": 3},
    "inspect_request": {"code": "print", "cursor_pos": 2},
    "is_complete_request": {"code": "for x in y:"},
    "history_request": {"hist_access_type": "tail"},
    "comm_info_request": {},
    "shutdown_request": {"restart": True},
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_each_reply_follows_the_protocol(kind):
    reply, content, published = ask(kind, **REQUESTS[kind])
    assert reply == kind.replace("_request", "_reply")
    for name, body in [(reply, content), *published]:
        header = {
            "msg_id": "1",
            "msg_type": name,
            "username": "",
            "session": "",
            "version": "5.3",
            "date": "",
        }
        parent = {**header, "msg_id": "0"}
        message = {"header": header, "msg_id": "1", "msg_type": name, "parent_header": parent}
        validate_message({**message, "content": body, "metadata": {}}, name, "0")


def test_an_execution_shows_the_failure_in_text_and_html():
    reply, content, published = ask("execute_request", code="1+1")
    assert reply == "execute_reply"
    assert [kind for kind, _ in published] == ["execute_input", "display_data", "error"]
    assert published[0][1] == {"code": "1+1", "execution_count": 3}
    error = {name: content[name] for name in ("ename", "evalue", "traceback")}
    assert error == {
        "ename": "KernelDidNotStart",
        "evalue": "There is no conda environment at /opt/<x>. "
        "Create it: `conda create -p /opt/<x> ipykernel`.",
        "traceback": [
            "\x1b[0;31mKernelDidNotStart\x1b[0m: There is no conda environment at /opt/<x>.",
            "Create it: `conda create -p /opt/<x> ipykernel`.",
            "",
            "It said:",
            "  line one",
            "  line <two>",
            "",
            "Log of this launch: /home/me/launch.log",
        ],
    }
    assert published[2][1] == {**error, "traceback": ["\x1b[0;31mKernelDidNotStart\x1b[0m"]}
    assert (content["status"], content["execution_count"]) == ("error", 3)
    text = published[1][1]["data"]["text/plain"]
    assert text.splitlines() == [
        "The kernel science did not start.",
        FAILURE.message,
        *error["traceback"][1:],
    ]
    html = published[1][1]["data"]["text/html"]
    assert "The kernel science did not start." in html
    assert "<code>conda create -p /opt/&lt;x&gt; ipykernel</code>" in html
    assert "line &lt;two&gt;" in html
    assert "<two>" not in html


@pytest.mark.parametrize("code", ["exit", " quit() ", "q()"])
def test_there_is_a_way_out_of_jupyter_console(code):
    reply, content, published = ask("execute_request", code=code)
    assert (reply, content["status"], published) == ("execute_reply", "ok", [])
    assert content["payload"] == [{"source": "ask_exit", "keepkernel": False}]


def test_backticks_become_code_in_the_message_too():
    html = envkernel.failure_html(FAILURE.but(message="`module load <x>` failed."))
    assert "<code>module load &lt;x&gt;</code> failed." in html


def test_a_silent_execution_publishes_nothing():
    reply, content, published = ask("execute_request", code="", silent=True)
    assert (reply, content["status"], published) == ("execute_reply", "error", [])


def test_a_comm_is_closed_at_once():
    assert ask("comm_open", comm_id="c1") == ("", {}, [("comm_close", {"comm_id": "c1", "data": {}})])


@pytest.mark.parametrize("kind", ["comm_msg", "comm_close", "input_reply"])
def test_what_has_no_reply_gets_none(kind):
    assert ask(kind) == ("", {}, [])


def test_the_debugger_is_refused_in_its_own_protocol():
    reply, content, published = ask("debug_request", type="request", seq=7, command="attach")
    assert (reply, published) == ("debug_reply", [])
    assert content == {
        "type": "response",
        "seq": 0,
        "request_seq": 7,
        "success": False,
        "command": "attach",
        "message": FAILURE.message,
    }


def test_an_unknown_request_gets_an_error():
    reply, content, _ = ask("usage_request")
    assert (reply, content["status"], content["ename"]) == ("usage_reply", "error", "KernelDidNotStart")


def test_connect_interrupt_and_shutdown():
    assert ask("connect_request") == ("connect_reply", {"status": "ok", **PORTS}, [])
    assert ask("interrupt_request") == ("interrupt_reply", {"status": "ok"}, [])
    assert ask("shutdown_request") == ("shutdown_reply", {"status": "ok", "restart": False}, [])


@pytest.mark.parametrize(
    ("language", "name", "mime", "extension"),
    [
        ("python", "python", "text/x-python", ".py"),
        ("R", "R", "text/x-r-source", ".r"),
        ("cobol", "cobol", "text/plain", ".txt"),
        ("", "text", "text/plain", ".txt"),
    ],
)
def test_the_notebook_keeps_its_language(language, name, mime, extension):
    info = envkernel.kernel_info_content(FAILURE.but(language=language))["language_info"]
    assert (info["name"], info["mimetype"], info["file_extension"]) == (name, mime, extension)


def test_the_banner_says_it_all():
    banner = envkernel.kernel_info_content(FAILURE)["banner"]
    assert banner.splitlines()[:2] == ["The kernel science did not start.", FAILURE.message]
    assert "line <two>" in banner


def test_without_hint_detail_or_log_there_is_only_the_message():
    failure = envkernel.Failure("", "Broken.")
    assert envkernel.failure_lines(failure) == ["Broken."]
    assert failure.heading == "The kernel did not start."
    assert "<pre" not in envkernel.failure_html(failure)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("10 %\r50 %\r100 %\nnext", "100 %\nnext"),
        ("crlf\r\nline", "crlf\nline"),
        ("bell\x07 null\x00\ttab", "bell null\ttab"),
        ("the key is abc-123", "the key is ***"),
    ],
)
def test_what_a_program_said_is_shown_without_codes_and_keys(text, shown):
    assert envkernel.printable(text, "abc-123") == shown


def test_an_empty_key_hides_nothing():
    assert envkernel.printable("abc", "") == "abc"


@pytest.mark.parametrize(
    ("status", "said", "words", "hint"),
    [
        (
            1,
            "x\nModuleNotFoundError: No module named 'ipykernel.x'",
            "exit status 1",
            "pip install ipykernel",
        ),
        (
            1,
            "python: No module named ipykernel_launcher",
            "exit status 1",
            "`pip install ipykernel`",
        ),
        (
            127,
            "error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file: No",
            "exit status 127",
            "library libpython3.11.so.1.0 is missing",
        ),
        (125, "no such image", "exit status 125: the engine itself failed", "the image"),
        (126, "", "exit status 126: the command can't be executed", "kernel command"),
        (127, "", "exit status 127: the command was not found", "kernel command"),
        (137, "", "signal SIGKILL, killed: out of memory?", "more memory"),
        (-9, "", "signal SIGKILL, killed: out of memory?", "more memory"),
        (139, "", "signal SIGSEGV", "by hand"),
        (-15, "", "signal SIGTERM", "by hand"),
        (3, "bye", "exit status 3", "by hand"),
        (0, "", "exit status 0", "by hand"),
    ],
)
def test_the_exit_status_in_words(status, said, words, hint):
    error = envkernel.ended_error(status, "the image x", said, "pip install %s")
    assert error.message == f"The kernel in the image x ended before it answered ({words})."
    assert hint in error.hint
    assert error.detail == said
    assert error.status > 0


@pytest.mark.parametrize(
    "tokens",
    [
        ["conda", "run", "--format=99", "--connection-file", "/run/k.json", "--name=x"],
        ["nonsense", "run", "--name", "x", "--connection-file=/run/k.json"],
    ],
)
def test_a_broken_kernelspec_still_tells_where_jupyter_is(tokens):
    assert envkernel.salvage_launch(tokens).options == {"connection-file": "/run/k.json", "name": "x"}
    assert envkernel.salvage_launch([*tokens, "--no-error-kernel"]).options["no-error-kernel"] is True
    assert envkernel.salvage_launch([]).options == {}
