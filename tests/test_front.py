"""Jupyter's five ports in front of a kernel: what is answered there, as data."""

import asyncio
import contextlib
import os
import resource
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_kernel_test.msgspec_v5 import validate_message

import envkernel

ERROR = envkernel.UserError(
    "There is no conda environment at /opt/<x>.",
    "Create it: `conda create -p /opt/<x> ipykernel`.",
    detail="line one\nline <two>",
)
KERNEL = envkernel.KernelProfile("science", "python", log="/home/me/launch.log")
FAILURE = envkernel.Failure(ERROR, KERNEL)


def ask(kind, **content):
    FAILURE.count = 2
    return envkernel.answer(kind, content, KERNEL, FAILURE)


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
        ERROR.message,
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
    failure = envkernel.Failure(envkernel.UserError("`module load <x>` failed."), KERNEL)
    assert "<code>module load &lt;x&gt;</code> failed." in failure.display["data"]["text/html"]


def test_a_silent_execution_publishes_nothing():
    reply, content, published = ask("execute_request", code="", silent=True)
    assert (reply, content["status"], published) == ("execute_reply", "error", [])


def test_a_comm_is_closed_at_once():
    assert ask("comm_open", comm_id="c1") == ("", {}, [("comm_close", {"comm_id": "c1", "data": {}})])


@pytest.mark.parametrize("kind", ["comm_msg", "comm_close", "input_reply"])
def test_what_has_no_reply_gets_none(kind):
    assert ask(kind) == ("", {}, [])


def test_an_unknown_request_gets_an_error():
    reply, content, _ = ask("usage_request")
    assert (reply, content["status"], content["ename"]) == ("usage_reply", "error", "KernelDidNotStart")
    assert ask("debug_request")[:2] == ("debug_reply", {})  # as ipykernel without a debugger


def test_interrupt_and_shutdown():
    assert ask("interrupt_request") == ("interrupt_reply", {"status": "ok"}, [])
    assert ask("shutdown_request") == ("shutdown_reply", {"status": "ok", "restart": False}, [])


@pytest.mark.parametrize(
    ("language", "name", "mime", "extension"),
    [
        ("python", "python", "text/x-python", ".py"),
        ("R", "R", "text/x-r", ".r"),
        ("cobol", "cobol", "text/x-cobol", ".txt"),
        ("", "text", "text/x-text", ".txt"),
    ],
)
def test_the_notebook_keeps_its_language(language, name, mime, extension):
    info = envkernel.kernel_info(KERNEL.replace(language=language), FAILURE)["language_info"]
    assert (info["name"], info["mimetype"], info["file_extension"]) == (name, mime, extension)


def test_the_banner_says_it_all():
    banner = envkernel.kernel_info(KERNEL, FAILURE)["banner"]
    assert banner.splitlines()[:2] == ["The kernel science did not start.", ERROR.message]
    assert "line <two>" in banner


def test_without_hint_detail_or_log_there_is_only_the_message():
    failure = envkernel.Failure(envkernel.UserError("Broken."), envkernel.KernelProfile(""))
    assert failure.display["data"]["text/plain"] == "The kernel did not start.\nBroken."
    assert failure.error["evalue"] == "Broken."
    assert "<pre" not in failure.display["data"]["text/html"]


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
    assert envkernel.recover_launch(tokens).options == {"connection-file": "/run/k.json", "name": "x"}
    assert envkernel.recover_launch([*tokens, "--no-error-kernel"]).options["no-error-kernel"] is True
    assert envkernel.recover_launch([]).options == {}


# ---- the protocols ------------------------------------------------------------------------------

CONNECTION = {"key": "secret", "signature_scheme": "hmac-sha256"}
FRAMES = st.lists(st.binary(max_size=600), min_size=1, max_size=6)


def read_all(reader, data, step):
    """Feed a reader in pieces; return its events."""
    events = []
    for start in range(0, len(data), step):
        reader.buffer += data[start : start + step]
        event = reader.next()
        while event:
            events.append(event)
            event = reader.next()
    return events


@given(st.lists(FRAMES, max_size=4), st.integers(1, 700), st.integers(0, 50))
def test_messages_are_read_in_pieces_and_the_rest_is_returned_unchanged(messages, step, cut):
    data = envkernel.GREETING + envkernel.zmtp_frame(b"\x05READY", envkernel.COMMAND)
    data += b"".join(map(envkernel.zmtp_message, messages))
    reader = envkernel.ZmtpReader()
    events = read_all(reader, data, step)
    assert events == [(True, [b"\x05READY"]), *((False, parts) for parts in messages)]
    assert (reader.size, reader.rest()) == (0, b"")
    whole = envkernel.zmtp_message([b"first", b"second" * 60])
    reader.buffer += whole[:cut]
    assert reader.next() is None
    assert reader.rest() == whole[:cut]


@given(st.binary(max_size=300), st.integers(1, 80))
def test_garbage_is_refused_or_awaited_but_never_more_than_there_is_room_for(data, step):
    for start in (b"", envkernel.GREETING):
        reader = envkernel.ZmtpReader(1000)
        try:
            events = read_all(reader, start + data, step)
        except envkernel.PeerError:
            continue
        assert reader.size + len(reader.buffer) <= len(start + data) + 64 * len(data)
        assert all(len(part) <= 1000 for _, parts in events for part in parts)


@pytest.mark.parametrize("size", [1001, 1 << 40, (1 << 64) - 1])
def test_a_huge_size_is_refused_before_anything_is_awaited(size):
    reader = envkernel.ZmtpReader(1000)
    reader.is_greeted = True
    reader.buffer += bytes((envkernel.LONG,)) + size.to_bytes(8, "big")
    with pytest.raises(envkernel.PeerError, match="bytes"):
        reader.next()


@given(FRAMES, st.lists(st.binary(max_size=20), max_size=2))
def test_only_signed_messages_are_read(garbage, idents):
    session = envkernel.Session(CONNECTION)
    idents = [ident for ident in idents if ident != envkernel.DELIMITER]
    parts = session.encode("execute_request", {"code": "1"}, {"msg_id": "0"}, idents)
    message = session.decode([*parts, b"buffer"])
    assert (message.kind, message.content, message.idents) == ("execute_request", {"code": "1"}, idents)
    for wrong in (garbage, [*idents, envkernel.DELIMITER, *garbage], parts[:-1], [*parts[:-1], b"{}"]):
        with pytest.raises(envkernel.PeerError):
            session.decode(wrong)
    with pytest.raises(envkernel.PeerError):
        envkernel.Session({**CONNECTION, "key": "other"}).decode(parts)


@given(
    st.binary(max_size=50) | st.just(b"[" * 5000) | st.just(b'{"msg_id": 1}') | st.just(b'{"msg_id": "a"}')
)
def test_a_signed_message_may_be_anything(text):
    session = envkernel.Session(CONNECTION)
    for signed in ([text] * 4, [b'{"msg_id": "a", "msg_type": "x"}', b"{}", b"{}", text]):
        with contextlib.suppress(envkernel.PeerError):
            session.decode([envkernel.DELIMITER, session.signature(signed), *signed])


# ---- connections --------------------------------------------------------------------------------


@contextlib.contextmanager
def front_on_sockets(tmp_path, state="waiting"):
    """Serve a front on unix sockets in a thread; yields it and a function that connects with a stream."""
    ports = {name + "_port": number for number, name in enumerate(envkernel.STREAMS)}
    connection = {**CONNECTION, "transport": "ipc", "ip": str(tmp_path / "s"), **ports}
    started, loop = threading.Event(), asyncio.new_event_loop()
    made = []

    async def serve():
        made.append(envkernel.Front(connection, envkernel.KernelProfile("late", "python")))
        await made[0].listen()
        if state == "waiting":
            made[0].wait("It waits.")
        if state == "failed":
            made[0].fail(ERROR)
        started.set()

    def run():
        loop.create_task(serve())
        loop.run_forever()

    def connect(stream):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(f"{connection['ip']}-{stream}")
        return sock

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(5)
    try:
        yield made[0], connect
    finally:
        loop.call_soon_threadsafe(made[0].close)
        loop.call_soon_threadsafe(loop.call_later, 0.05, loop.stop)
        thread.join()
        loop.close()
    assert not list(tmp_path.iterdir())


HELLO = envkernel.GREETING + envkernel.zmtp_frame(envkernel.ready_command(b"DEALER"), envkernel.COMMAND)


def closed(sock):
    """Return whether the other side hangs up."""
    try:
        while sock.recv(1000):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("state", ["waiting", "failed"])
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        HELLO[:64] + b"\x00\x05hello",  # a message before the handshake
        HELLO + b"\xff\xff",
        HELLO + b"\x02" + b"\xff" * 8,
        HELLO + b"\x02" + (65 << 20).to_bytes(8, "big"),
        HELLO + envkernel.zmtp_message([b"no", b"message"]),
        HELLO + envkernel.zmtp_message([envkernel.DELIMITER, b"0" * 64, b"{}", b"{}", b"{}", b"{}"]),
        HELLO[:64].replace(b"NULL", b"PLAI"),
        HELLO[:10] + b"\1" + HELLO[11:],
    ],
)
def test_a_stranger_is_not_heard(tmp_path, state, data):
    with front_on_sockets(tmp_path, state) as (front, connect):
        for stream in (0, 3):
            sock = connect(stream)
            sock.sendall(data)
            assert closed(sock)
            sock.close()
        assert (front.mailbox.kept, front.shutdown.is_set()) == ([], False)
        beat = connect(4)  # others are served all the same
        ping = envkernel.zmtp_frame(b"\x04PING\0\1context", envkernel.COMMAND)
        beat.sendall(HELLO + ping + envkernel.zmtp_message([b"", b"beat"]))
        expected = envkernel.zmtp_frame(b"\x04PONGcontext", envkernel.COMMAND) + b"\x01\x00\x00\x04beat"
        received = b""
        while not received.endswith(expected):
            received += beat.recv(1000)
        beat.close()


def test_what_is_kept_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(envkernel, "KEPT_LIMIT", 50_000)
    with front_on_sockets(tmp_path) as (front, connect):
        iopub, shell = connect(1), connect(0)
        iopub.sendall(HELLO + envkernel.zmtp_message([b"\1"]))
        shell.sendall(HELLO)
        for size in (40_000, 20_000, 20_000):
            parts = front.session.encode("execute_request", {"code": "#" * size}, {})
            data = envkernel.zmtp_message(parts)
            for start in range(0, len(data), 5_000):
                shell.sendall(data[start : start + 5_000])
                time.sleep(0.01)
        received = b""
        while received.count(b"Too many messages wait") < 4:  # in the error's value and in its traceback
            received += shell.recv(10_000)
        assert len(front.mailbox.kept) == 1
        iopub.close()
        shell.close()


def test_too_many_open_files_are_reported_once_and_without_a_traceback(tmp_path, capfd):
    socks = [socket.socket(socket.AF_UNIX) for _ in range(8)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with front_on_sockets(tmp_path) as (_, _):
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            for number, sock in enumerate(socks):
                sock.connect(f"{tmp_path / 's'}-{number % 5}")
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for sock in socks:
        sock.close()
    said = "envkernel: Too many open files: Jupyter's new connections to the kernel have to wait.\n"
    assert capfd.readouterr().err == said


def test_a_front_that_failed_is_joined_with_no_kernel(tmp_path):
    """The kernel may listen at last when the client of its engine was killed, and is removed then."""
    with front_on_sockets(tmp_path, "failed") as (front, _):
        asyncio.run_coroutine_threadsafe(front.go_live(None), front.loop).result(5)
        assert front.state == "failed"
