"""The front before real kernels that start late, and real clients that wait for them."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pexpect
import pytest
from nbclient import NotebookClient

from support import fronted, missing
from support.browser import Lab, Notebook
from support.jupyter import Kernel

pytestmark = pytest.mark.live

STATE = "Slurm job 12 waits: Priority"


@pytest.fixture
def late(jupyter):
    """A Jupyter with a kernel ``late`` behind a front, whose environment says what happens."""
    spec = {
        "argv": [sys.executable, fronted.__file__, "{connection_file}"],
        "display_name": "late",
        "language": "python",
        "metadata": {"debugger": True},
    }
    directory = jupyter.kernels / "late"
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(json.dumps(spec))
    jupyter.waits = False
    return jupyter


class Cell:
    """One execution, what is published for it and its reply; what is for other cells is put aside."""

    def __init__(self, client, code, **options):
        self.client = client
        self.aside = client.__dict__.setdefault("aside", [])
        self.request = client.execute(code, **options)
        self.messages = []

    def next(self, channel, timeout=60):
        """Return the next message of a channel for this cell."""
        deadline = time.monotonic() + timeout
        get = getattr(self.client, f"get_{channel}_msg")
        while True:
            for item in self.aside:
                if item[0] == channel and item[1]["parent_header"].get("msg_id") == self.request:
                    self.aside.remove(item)
                    return item[1]
            self.aside.append((channel, get(timeout=deadline - time.monotonic())))

    def wait(self, kind):
        """Return the content of the next message of a kind that is published for it."""
        while True:
            message = self.next("iopub")
            self.messages.append((message["msg_type"], message["content"]))
            if message["msg_type"] == kind:
                return message["content"]

    def end(self):
        """Return the kinds of what is published until the cell has ended."""
        while self.wait("status")["execution_state"] != "idle":
            pass
        return [kind for kind, _ in self.messages]

    def reply(self):
        return self.next("shell")["content"]


def ask(client, kind, **content):
    """Send a request on the shell channel; return the content of its reply."""
    message = client.session.msg(kind + "_request", content)
    client.shell_channel.send(message)
    while True:
        reply = client.get_shell_msg(timeout=10)
        if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
            return reply["content"]


def test_a_cell_that_waits_shows_the_state_and_then_only_its_own_output(late):
    with late.kernel("late", {"DELAY": "7"}) as kernel:
        first, second = Cell(kernel.client, "print(6 * 7)"), Cell(kernel.client, "x = 1")
        silent = Cell(kernel.client, "y = 2", silent=True)
        shown = first.wait("display_data")
        assert shown["data"]["text/plain"] == f"{STATE} (waited 0 s)"
        assert first.wait("update_display_data")["transient"] == shown["transient"]
        assert first.reply()["status"] == "ok"
        assert second.reply()["execution_count"] == 2
        own = ["status", "execute_input", "stream", "status"]
        assert first.end() == ["status", "display_data", "update_display_data", "clear_output", *own]
        assert first.messages[3][1] == {"wait": False}
        assert ("stream", {"name": "stdout", "text": "42\n"}) in first.messages
        assert second.end()[-4:] == ["clear_output", "status", "execute_input", "status"]
        assert set(silent.end()) == {"status"}
        assert kernel.execute("x + y") == ("3", None)
        assert kernel.answer("print(input('who? '))", "me") == ("who? ", "me\n")


def test_a_kernel_that_starts_in_time_answers_itself(late):
    with late.kernel("late", {"HOLD": "30"}) as kernel:
        assert ask(kernel.client, "kernel_info")["implementation"] == "ipython"
        assert kernel.execute("6 * 7") == ("42", None)
        assert kernel.stop_in("m = 3\nm += 1\n", 2) == ("<module>", 2, "3")


def test_what_only_a_kernel_can_say_is_empty_or_of_its_last_launch(late, tmp_path):
    environ = {"DELAY": "3", "CACHE": str(tmp_path / "data" / "info.json")}

    with late.kernel("late", environ) as kernel:
        client = kernel.client
        first = ask(client, "kernel_info")
        assert (first["implementation"], first["language_info"]["version"]) == ("envkernel", "")
        assert (first["language_info"]["name"], first["debugger"]) == ("python", True)
        expected = {"complete": "matches", "inspect": "data", "history": "history", "comm_info": "comms"}
        for kind, empty in expected.items():
            assert not ask(client, kind, code="pri", cursor_pos=3)[empty]
        assert ask(client, "is_complete", code="for x in y:")["status"] == "unknown"
        assert client.hb_channel.is_beating()
        assert kernel.execute("1") == ("1", None)
        real = ask(client, "kernel_info")
        assert real["implementation"] == "ipython"
    assert (tmp_path / "data" / "info.json").stat().st_mode & 0o777 == 0o600
    with late.kernel("late", environ) as kernel:
        cached = ask(kernel.client, "kernel_info")
        assert {**cached, "banner": ""} == {**real, "banner": ""}  # IPython's has another tip each time


def test_a_thousand_messages_of_five_clients_keep_their_order(late):
    with late.kernel("late", {"DELAY": "4"}) as kernel:
        kernel.client.execute("seen = {n: [] for n in range(5)}", store_history=False)
        clients = [kernel.manager.blocking_client() for _ in range(5)]
        received = {}

        def read(number, client):
            text, replies = "", []
            while text.count("\n") < 200:
                message = client.get_iopub_msg(timeout=60)
                if message["parent_header"].get("session") == client.session.session:
                    text += message["content"].get("text", "")
            while len(replies) < 200:
                message = client.get_shell_msg(timeout=60)
                replies += [message["content"]["status"]] * (message["msg_type"] == "execute_reply")
            received[number] = text.split(), set(replies)

        for client in clients:
            client.start_channels()
            client.wait_for_ready(timeout=20)
        for n in range(200):
            for number, client in enumerate(clients):
                client.execute(f"seen[{number}].append({n}); print({n})", store_history=False)
        threads = [threading.Thread(target=read, args=item) for item in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        expected = [str(n) for n in range(200)], {"ok"}
        assert received == dict.fromkeys(range(5), expected)
        reader = Kernel(kernel.manager, clients[0])  # too much was published for who has read nothing
        assert reader.value("all(seen[n] == list(range(200)) for n in range(5))") == "True"
        for client in clients:
            client.stop_channels()


def test_a_client_that_has_left_is_served_all_the_same(late):
    with late.kernel("late", {"DELAY": "4"}) as kernel:
        gone = kernel.manager.blocking_client()
        gone.start_channels()
        gone.wait_for_ready(timeout=20)
        gone.execute("left = 42")
        time.sleep(0.5)
        gone.stop_channels()
        assert kernel.execute("left") == ("42", None)


def test_interrupts_cancel_what_waits(late):
    with late.kernel("late", {"DELAY": "5"}) as kernel:
        cells = [Cell(kernel.client, "cancelled = 1") for _ in range(2)]
        cells[1].wait("display_data")
        kernel.manager.interrupt_kernel()
        for cell in cells:
            assert cell.reply()["ename"] == "KeyboardInterrupt"
        assert cells[0].end() == ["status", "display_data", "clear_output", "status", "error", "status"]
        assert kernel.execute("'cancelled' in dir()") == ("False", None)
        assert kernel.interrupt_in("import time; time.sleep(60)")[0] == "KeyboardInterrupt"


def test_a_comm_that_waits_is_opened_and_debugging_works_after_waiting(late):
    with late.kernel("late", {"DELAY": "4"}) as kernel:
        client = kernel.client
        content = {"comm_id": "c1", "target_name": "nobody", "data": {}}
        message = client.session.msg("comm_open", content)
        client.shell_channel.send(message)
        assert kernel.execute("1") == ("1", None)
        assert kernel.stop_in("m = 3\nm += 1\n", 2) == ("<module>", 2, "3")


def test_a_kernel_that_fails_after_waiting(late):
    with late.kernel("late", {"DELAY": "3", "FAIL": "The job was cancelled."}) as kernel:
        cells = [Cell(kernel.client, code) for code in ("1", "2")]
        for count, cell in enumerate(cells, 1):
            content = cell.reply()
            assert (content["ename"], content["evalue"]) == ("KernelDidNotStart", "The job was cancelled.")
            assert content["execution_count"] == count
        assert cells[0].end()[-6:] == [
            "clear_output",
            "status",
            "execute_input",
            "display_data",
            "error",
            "status",
        ]


def test_a_kernel_that_ends_before_it_answers_leaves_the_cells_waiting(late):
    """The keeper says then what becomes of them."""
    crash = f"{sys.executable} {Path(__file__).parent.parent}/support/crashing.py {{}}"
    environ = {"DELAY": "2", "KERNEL": crash, "FAIL_LATER": "It crashed."}
    with late.kernel("late", environ) as kernel:
        assert kernel.execute("1")[1] == "KernelDidNotStart: It crashed."


def test_the_end_of_the_previous_kernel_is_shown_once(late):
    with late.kernel("late", {"NOTICE": "It ran out of `memory`.", "DELAY": "1"}) as kernel:
        time.sleep(4)  # the kernel is there, nothing was run yet
        kernel.client.execute("", silent=True)
        cell = Cell(kernel.client, "print(1)")
        assert cell.reply()["status"] == "ok"
        assert cell.end() == ["display_data", "status", "execute_input", "stream", "status"]
        assert "<code>memory</code>" in cell.messages[0][1]["data"]["text/html"]
        assert kernel.execute("2") == ("2", None)


@pytest.mark.parametrize("restart", [True, False])
def test_restart_and_shutdown_while_waiting(late, restart):
    with late.kernel("late", {"DELAY": "20"}) as kernel:
        kernel.client.execute("1")
        if restart:
            kernel.manager._launch_args["env"]["DELAY"] = "0"
            assert kernel.restart() < 15
            assert kernel.execute("'In' in dir() and len(In)") == ("2", None), "the cell was dropped"
        else:
            assert kernel.shutdown() < 3


def notebook(*codes):
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    return nbformat.v4.new_notebook(cells=cells)


def test_nbclient_waits_longer_than_its_startup_limit(late):
    book = notebook("print(6 * 7)", "x = 1", "x")
    NotebookClient(book, kernel_name="late", startup_timeout=3).execute(env={**late.environ, "DELAY": "8"})
    shown = [
        [output.get("text") or output.data["text/plain"] for output in cell.outputs] for cell in book.cells
    ]
    assert shown == [["42\n"], [], ["1"]]


@pytest.mark.parametrize("client", ["nbconvert", "papermill"])
def test_batch_clients_save_only_the_real_output(late, tmp_path, client):
    book = notebook("print(6 * 7)", "x = 1")
    book.metadata.kernelspec = {"name": "late", "display_name": "late", "language": "python"}
    nbformat.write(book, tmp_path / "x.ipynb")
    words = {
        "nbconvert": ["nbconvert", "--to=notebook", "--execute", "--ExecutePreprocessor.startup_timeout=3"],
        "papermill": ["papermill", "--start-timeout", "3", "--no-progress-bar"],
    }[client]
    argv = [
        sys.executable,
        "-m",
        *words,
        "x.ipynb",
        *(["--output"] if client == "nbconvert" else []),
        "y.ipynb",
    ]
    done = subprocess.run(
        argv, cwd=tmp_path, env={**late.environ, "DELAY": "8"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(tmp_path / "y.ipynb", 4).cells
    assert ["".join(output.text for output in cell.outputs) for cell in cells if "6" in cell.source] == [
        "42\n"
    ]
    assert STATE not in (tmp_path / "y.ipynb").read_text()


def test_jupyter_console(late):
    environ = {**late.environ, "TERM": "dumb", "DELAY": "8"}
    argv = ["-m", "jupyter_console", "--kernel", "late", "--simple-prompt", "--no-confirm-exit"]
    child = pexpect.spawn(
        sys.executable, argv, env=environ, encoding="utf-8", timeout=30, dimensions=(50, 200)
    )
    child.expect(r"In \[1\]: ")
    child.sendline("6 * 7")
    child.expect_exact(STATE)
    child.expect(r"Out\[1\]: 42")
    child.sendline("exit")
    child.expect(pexpect.EOF)
    child.close()


def test_jupyterlab_shows_the_state_in_the_cells(late, chromium, screenshots):
    spec = json.loads((late.kernels / "late" / "kernel.json").read_text())
    environ = {"DELAY": "12", "TEXT": "Slurm job 12 waits: Priority; expected start 12:49"}
    (late.kernels / "science").mkdir()  # a name that `Lab` shows
    (late.kernels / "science" / "kernel.json").write_text(json.dumps({**spec, "env": environ}))
    lab = Lab(late)
    context = chromium.new_context(viewport={"width": 1000, "height": 420})
    try:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(lab.url.replace("/lab?", "/lab?reset&"))
        page.locator(".jp-LauncherCard").first.wait_for()
        page.keyboard.press("Control+b")
        notebook = Notebook(page, lab, lab.notebook("x.ipynb", "science", "print(6 * 7)", "x = 1", "x + 1"))
        notebook.ready()
        for number in range(3):
            notebook.run(number)
        for number in range(3):
            notebook.wait_for(number, environ["TEXT"])
        page.screenshot(path=screenshots / "waiting.png")
        notebook.wait_for(0, "42")
        notebook.output(2).filter(has_text="waits").wait_for(state="detached")
        notebook.wait_for(2, "2")
        assert [notebook.output(number).all_inner_texts() for number in range(3)] == [["42\n"], [], ["2"]]
    finally:
        context.close()
        lab.stop()
    (late.root / "runtime" / "jupyter_cookie_secret").unlink()


def test_r(late):
    if not Path("/usr/lib/R/site-library/IRkernel").exists():
        missing("R's kernel")
    environ = {"DELAY": "4", "KERNEL": "R --slave -e IRkernel::main() --args {}"}
    with late.kernel("late", environ) as kernel:
        assert kernel.execute("cat(6 * 7)") == ("42", None)
