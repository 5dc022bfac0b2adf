"""JupyterLab and a browser that uses it: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from support import missing
from support.docker import Docker
from support.jupyter import Jupyter
from support.modules import Modules

CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 30_000
"""Milliseconds that a page may take for one step."""


KERNEL = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
"""JupyterLab's connection to the kernel of the notebook in front."""


SHOWN = ["python3", "science", "genes", "layered", "contained", "vanished", "crashing"]
"""Kernels that a launcher shows, whatever else the tests have installed."""

CLOSE_ALL = """async () => {
    for (const widget of [...window.jupyterapp.shell.widgets("main")]) if (widget.context) widget.dispose();
    await window.jupyterapp.serviceManager.sessions.shutdownAll();
}"""
"""Closes all notebooks and ends their kernels."""

PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
"""The notebook in front."""


class Lab:
    """A JupyterLab server in a private Jupyter.  url: with the token in it."""

    def __init__(self, jupyter: Jupyter) -> None:
        self.jupyter = jupyter
        self.directory = jupyter.root / "notebooks"
        self.directory.mkdir()
        self.log = jupyter.root / "lab.log"
        self._configure()
        options = ["--no-browser", "--allow-root", "--expose-app-in-browser"]
        options += [
            "--ServerApp.port=0",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.root_dir={self.directory}",
        ]
        options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options],
                env={**jupyter.environ, "HOME": str(jupyter.root / "home")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.url = self._wait()

    def _configure(self) -> None:
        """Leave out what asks the network for news, and what other packages add to the window."""
        config = self.jupyter.root / "config"
        settings = (
            config / "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        )
        disabled = {"disabledExtensions": {"@jupyter/nbgrader": True}}
        for path, content in (
            (settings, {"fetchNews": "false"}),
            (config / "labconfig/page_config.json", disabled),
            (config / "jupyter_server_config.json", {"KernelSpecManager": {"allowed_kernelspecs": SHOWN}}),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))

    def _wait(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for path in (self.jupyter.root / "runtime").glob("jpserver-*.json"):
                with contextlib.suppress(ValueError):
                    server = json.loads(path.read_text())
                    return f"{server['url']}lab?token={server['token']}"
            time.sleep(0.1)
        raise AssertionError(f"JupyterLab did not start:\n{self.log.read_text()}")

    def notebook(self, name: str, kernel: str, *cells: str) -> str:
        """Write a notebook for a kernel; return its name."""
        import nbformat

        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(code) for code in cells],
            metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}},
        )
        nbformat.write(book, self.directory / name)
        return name

    def stop(self) -> None:
        """End the server as a user does with Ctrl-C twice; its kernels end with it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Notebook:
    """A notebook that is open in a browser's page."""

    def __init__(self, page: Any, lab: Lab, name: str) -> None:
        self.page = page
        opening = "async path => { await window.jupyterapp.commands.execute('docmanager:open', {path}); }"
        page.evaluate(opening, name)
        page.locator(f"{PANEL} .jp-Cell").first.wait_for()

    def cell(self, index: int) -> Any:
        """Return a cell, counted from 0."""
        return self.page.locator(f"{PANEL} .jp-CodeCell").nth(index)

    def output(self, index: int) -> Any:
        """Return the output below a cell."""
        return self.cell(index).locator(".jp-OutputArea-output")

    def ready(self) -> None:
        """Wait until the kernel can do something."""
        self.page.wait_for_function(f"() => {KERNEL}?.status === 'idle'")

    def run(self, index: int) -> None:
        """Run a cell, as Ctrl-Enter does."""
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def interrupt(self) -> float:
        """Interrupt the kernel by the menu once it is busy; return when that was."""
        self.page.wait_for_function(f"() => {KERNEL}?.status === 'busy'")
        self.menu("Kernel", "Interrupt Kernel")
        return time.monotonic()

    def wait_for(self, index: int, text: str) -> str:
        """Wait until a text is in the output below a cell; return all of it."""
        self.output(index).filter(has_text=text).first.wait_for()
        return "\n".join(self.output(index).all_inner_texts())

    def restart(self) -> None:
        """Restart the kernel by the menu, and wait until it is there again."""
        self.menu("Kernel", "Restart Kernel…")
        self.accept()
        self.page.locator(".jp-Dialog").wait_for(state="detached")
        self.ready()

    def debug(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send a message of the Debug Adapter Protocol through JupyterLab's own connection to the kernel."""
        request = {"type": "request", "seq": 0, "command": command, "arguments": arguments}
        reply = self.page.evaluate(
            f"request => {KERNEL}.requestDebug(request, true).done.then(reply => reply.content)", request
        )
        assert reply["success"], reply
        return dict(reply.get("body") or {})

    def menu(self, *names: str) -> None:
        """Choose from the menu bar."""
        self.page.locator(".lm-MenuBar-item", has_text=names[0]).first.click()
        for name in names[1:]:
            self.page.locator(".lm-Menu-itemLabel", has_text=name).first.click()

    def accept(self) -> None:
        """Press the button that a dialog proposes."""
        self.page.locator(".jp-Dialog .jp-mod-accept").click()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, not for the session: Playwright keeps an event loop running in this thread."""
    program = shutil.which("chromium")
    if not program:
        missing("Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, docker_engine: Docker, lmod: Modules) -> Iterator[Lab]:
    """A JupyterLab of its own; nothing may be left of it and its kernels."""
    jupyter = Jupyter(tmp_path_factory.mktemp("lab") / "jupyter")
    jupyter.environ.update(docker_engine.environ)
    jupyter.environ.update(lmod.environ)
    server = Lab(jupyter)
    yield server
    server.stop()
    (server.jupyter.root / "runtime" / "jupyter_cookie_secret").unlink()  # the server's own, not a kernel's
    left = server.jupyter.leftovers()
    assert not left, f"left behind by JupyterLab:\n{left}\n{server.log.read_text()}"
    assert not docker_engine.ids()


@pytest.fixture(scope="module")
def window(chromium: Any, lab: Lab) -> Iterator[Any]:
    """JupyterLab in a page, in a profile of its own: to load it takes seconds, so all tests use this one."""
    context = chromium.new_context(viewport={"width": 1000, "height": 640})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    context.close()


@pytest.fixture
def page(window: Any, lab: Lab) -> Iterator[Any]:
    """JupyterLab with a launcher and no kernel; loaded again after a test that failed."""
    if window.locator(".jp-Dialog").count() or not window.locator(".jp-Launcher").count():
        window.goto(lab.url.replace("/lab?", "/lab?reset&"))
        window.locator(".jp-LauncherCard").first.wait_for()
        window.keyboard.press("Control+b")  # hides the file browser
    yield window
    window.evaluate(CLOSE_ALL)


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for screenshots: ENVKERNEL_SCREENSHOTS where it is set, to look at them or keep them."""
    chosen = os.environ.get("ENVKERNEL_SCREENSHOTS")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
