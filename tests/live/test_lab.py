"""JupyterLab in a real browser: kernels of envkernel's, whole and broken."""

import shutil
import time
from pathlib import Path

import pytest

from support import done
from support.browser import KERNEL, Notebook
from support.venvs import BASE_PYTHON, ENVIRON, UV, install

pytestmark = pytest.mark.live

PLOT = """%matplotlib inline
import matplotlib.pyplot as plt
plt.plot([1, 4, 9, 16]);"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtualenv with ipykernel and matplotlib."""
    path = tmp_path_factory.mktemp("science") / "venv"
    done(UV, "venv", "-q", "--python", BASE_PYTHON, path, env=ENVIRON)
    install(path, "ipykernel", "matplotlib")
    return path


@pytest.fixture(scope="module")
def kernels(lab, environment, docker_engine, tmp_path_factory):
    """Kernels in the launcher, one of them broken since it was set up."""
    words = ["--display-name=Contained (docker)", "--python=python3", "python"]
    lab.jupyter.setup("docker", "contained", *words)
    lab.jupyter.setup("virtualenv", "science", "--display-name=Science (venv)", environment)
    gone = tmp_path_factory.mktemp("gone") / "venv"
    shutil.copytree(environment, gone, symlinks=True)
    (gone / "conda-meta").mkdir()
    lab.jupyter.setup("conda", "vanished", "--display-name=Vanished (conda)", gone)
    shutil.rmtree(gone)
    return {"gone": gone, "environment": environment}


def test_the_launcher_shows_logo_and_name(lab, kernels, page, screenshots):
    page.goto(lab.url.replace("/lab?", "/lab?reset&"))
    card = page.locator(".jp-LauncherCard[data-category=Notebook]", has_text="Science (venv)")
    card.wait_for()
    logo = card.locator("img")
    assert "logo-svg.svg" in logo.get_attribute("src")
    assert logo.evaluate("image => image.complete && image.naturalWidth > 0")
    other = page.locator(".jp-LauncherCard[data-category=Notebook]", has_text="Vanished (conda)")
    contained = page.locator(".jp-LauncherCard[data-category=Notebook]", has_text="Contained (docker)")
    pictures = {card.locator("img").screenshot() for card in (card, other, contained)}
    assert len(pictures) == 3, "kernels look the same"
    image_logo = (lab.jupyter.kernels / "contained" / "logo-svg.svg").read_bytes()
    assert b"data:image/svg+xml" in image_logo, "not the logo that the image holds"
    page.locator(".jp-Launcher-section").first.screenshot(path=screenshots / "launcher.png")


def test_a_kernel_in_docker_and_one_that_ends_there(lab, kernels, docker_engine, page, screenshots):
    code = "import os, time; os.path.exists('/.dockerenv'), 6 * 7"
    book = Notebook(page, lab, lab.notebook("docker.ipynb", "contained", code, "time.sleep(100)"))
    book.ready()
    book.run(0)
    book.wait_for(0, "(True, 42)")
    book.run(1)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="busy"]').wait_for(state="attached")
    book.menu("Kernel", "Interrupt Kernel")
    book.wait_for(1, "KeyboardInterrupt")
    docker_engine.call("tag", "python", "kept")
    docker_engine.call("rmi", "python")
    try:
        book.restart()
        book.run(0)
        assert "There is no image python here." in book.wait_for(0, "KernelDidNotStart")
        page.screenshot(path=screenshots / "no-image.png")
    finally:
        docker_engine.call("tag", "kept", "python")
        docker_engine.call("rmi", "kept")
    book.restart()
    book.run(0)
    book.wait_for(0, "(True, 42)")


def test_a_notebook_runs_interrupts_restarts_and_plots(lab, kernels, environment, page, screenshots):
    cells = ["import sys, time; x = 6 * 7; sys.prefix, x", PLOT, "time.sleep(100)", "x"]
    book = Notebook(page, lab, lab.notebook("science.ipynb", "science", *cells))
    book.ready()
    book.run(0)
    assert book.wait_for(0, "42").strip().endswith(f"('{environment}', 42)")
    book.run(1)
    book.output(1).locator("img").wait_for()
    assert book.output(1).locator("img").evaluate("image => image.naturalWidth") > 200
    page.screenshot(path=screenshots / "notebook.png")
    book.run(2)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="busy"]').wait_for(state="attached")
    start = time.monotonic()
    book.menu("Kernel", "Interrupt Kernel")
    book.wait_for(2, "KeyboardInterrupt")
    assert time.monotonic() - start < 10
    book.restart()
    book.run(3)
    book.wait_for(3, "NameError")
    page.screenshot(path=screenshots / "restarted.png")


def test_a_breakpoint_stops_the_kernel(lab, kernels, page, screenshots):
    code = "def twice(n):\n    m = 2 * n\n    return m\n\ntwice(21)"
    book = Notebook(page, lab, lab.notebook("debug.ipynb", "science", code))
    book.ready()
    book.debug("initialize", {"clientID": "test", "adapterID": "", "pathFormat": "path"})
    book.debug("attach", {})
    source = {"path": book.debug("dumpCell", {"code": code})["sourcePath"]}
    points = book.debug("setBreakpoints", {"source": source, "breakpoints": [{"line": 3}], "lines": [3]})
    assert [point["verified"] for point in points["breakpoints"]] == [True]
    book.debug("configurationDone", {})
    page.evaluate(
        f"""() => {{ window.stopped = new Promise(resolve => {KERNEL}.iopubMessage.connect(
            (_, message) => message.content.event === "stopped" && resolve(message.content.body))) }}"""
    )
    book.run(0)
    stopped = page.evaluate("() => window.stopped")
    assert stopped["reason"] == "breakpoint"
    frames = book.debug("stackTrace", {"threadId": stopped["threadId"]})["stackFrames"]
    assert (frames[0]["name"], frames[0]["line"]) == ("twice", 3)
    scopes = book.debug("scopes", {"frameId": frames[0]["id"]})["scopes"]
    variables = book.debug("variables", {"variablesReference": scopes[0]["variablesReference"]})["variables"]
    assert {row["name"]: row["value"] for row in variables}["m"] == "42"
    page.screenshot(path=screenshots / "breakpoint.png")
    book.debug("continue", {"threadId": stopped["threadId"]})
    book.wait_for(0, "42")
    Path(source["path"]).unlink()  # ipykernel leaves the cells that it debugs, natively too


def test_a_broken_kernel_says_why_in_the_cell(lab, kernels, page, screenshots):
    book = Notebook(page, lab, lab.notebook("broken.ipynb", "vanished", "1 + 1", "2 + 2"))
    book.ready()
    for index in (0, 1):
        book.run(index)
        text = book.wait_for(index, "KernelDidNotStart")
        assert f"There is no conda environment at {kernels['gone']}." in text
        assert "conda create" in text
        assert "Traceback" not in text
    page.screenshot(path=screenshots / "broken.png")
    book.menu("Kernel", "Interrupt Kernel")
    shutil.copytree(kernels["environment"], kernels["gone"], symlinks=True)
    (kernels["gone"] / "conda-meta").mkdir()
    book.restart()
    book.run(0)
    assert book.wait_for(0, "2").strip() == "2"
    page.screenshot(path=screenshots / "mended.png")
