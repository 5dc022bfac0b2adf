"""JupyterLab in a real browser: kernels of envkernel's, whole and broken."""

import os
import shutil
import time
from pathlib import Path

import pytest

from support import done
from support.browser import KERNEL, Notebook
from support.conda import make_conda
from support.venvs import BASE_PYTHON, ENVIRON, UV, install

pytestmark = pytest.mark.live

PLOT = """%matplotlib inline
import matplotlib.pyplot as plt
plt.plot([1, 4, 9, 16]);"""

TWICE = "def twice(n):\n    m = 2 * n\n    return m\n\ntwice(21)"

WHOLE = {
    "science": ("Science (venv)", "os.environ['VIRTUAL_ENV']"),
    "genes": ("Genes (conda)", "sys.prefix, os.environ['ACTIVATED']"),
    "layered": ("Layers (lmod)", "os.environ['CC'] + ' ' + os.environ['VIRTUAL_ENV']"),
    "contained": ("Contained (docker)", "os.path.exists('/.dockerenv')"),
}
"""By kernel: its display name, and what shows where it runs."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtualenv with ipykernel and matplotlib."""
    path = tmp_path_factory.mktemp("science") / "venv"
    done(UV, "venv", "-q", "--python", BASE_PYTHON, path, env=ENVIRON)
    install(path, "ipykernel", "matplotlib")
    return path


@pytest.fixture(scope="module")
def conda_environment(environment, tmp_path_factory):
    """A conda environment with ipykernel and matplotlib, and a script to source."""
    path = tmp_path_factory.mktemp("conda") / "envs" / "genes"
    shutil.copytree(environment, path, symlinks=True, copy_function=os.link)
    return make_conda(path, activate={"one.sh": "export ACTIVATED=$CONDA_DEFAULT_ENV\n"})


@pytest.fixture(scope="module")
def plots(tmp_path_factory, python_rootfs):
    """A directory with matplotlib for the Python of the image, to be shown to its containers."""
    version = os.readlink(python_rootfs / "usr/bin/python3").removeprefix("python")
    path = tmp_path_factory.mktemp("plots") / "packages"
    words = ["--target", path, "--python-version", version, "--only-binary=:all:"]
    done(UV, "pip", "install", "-q", "--python", BASE_PYTHON, *words, "matplotlib", env=ENVIRON)
    return path


@pytest.fixture(scope="module")
def kernels(lab, environment, conda_environment, plots, tmp_path_factory):
    """Kernels in the launcher, one of them broken since it was set up.  Returns where each one runs."""
    gone = tmp_path_factory.mktemp("gone") / "venv"
    shutil.copytree(environment, gone, symlinks=True, copy_function=os.link)
    make_conda(gone)
    shown = {name: f"--display-name={title}" for name, (title, _) in WHOLE.items()}
    inside = ["-v", f"{plots}:/plots:ro", "--env=PYTHONPATH=/plots", "--python=python3", "python"]
    lab.jupyter.setup("docker", "contained", shown["contained"], *inside)
    lab.jupyter.setup("virtualenv", "science", shown["science"], environment)
    lab.jupyter.setup("conda", "genes", shown["genes"], conda_environment)
    lab.jupyter.setup("lmod", "layered", shown["layered"], "gcc/12", "--", "virtualenv", environment)
    crash = ["--", "python", "-c", "import sys; print('no licence', file=sys.stderr); sys.exit(9)"]
    lab.jupyter.setup("virtualenv", "crashing", environment, *crash, "{connection_file}")
    lab.jupyter.setup("conda", "vanished", "--display-name=Vanished (conda)", gone)
    shutil.rmtree(gone)
    return {
        "science": str(environment),
        "genes": f"{conda_environment} genes",
        "layered": f"gcc-12 {environment}",
        "contained": "True",
        "gone": gone,
    }


def card(page, title):
    """Return a kernel's card in the launcher."""
    return page.locator(".jp-LauncherCard[data-category=Notebook]", has_text=title)


def test_the_launcher_shows_logo_and_name(lab, kernels, page, screenshots):
    titles = [title for title, _ in WHOLE.values()]
    pictures = set()
    for title in titles:
        logo = card(page, title).locator("img")
        logo.wait_for()
        assert "logo-svg.svg" in logo.get_attribute("src")
        page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=logo.element_handle())
        pictures.add(logo.screenshot())
    assert len(pictures) == len(WHOLE), "kernels look the same"
    image_logo = (lab.jupyter.kernels / "contained" / "logo-svg.svg").read_bytes()
    assert b"data:image/svg+xml" in image_logo, "not the logo that the image holds"
    page.locator(".jp-Launcher-section").first.screenshot(path=screenshots / "launcher.png")


def test_a_container_whose_image_is_gone(lab, kernels, docker_engine, page, screenshots):
    book = Notebook(page, lab, lab.notebook("docker.ipynb", "contained", "6 * 7"))
    docker_engine.call("tag", "python", "kept")
    docker_engine.call("rmi", "python")
    try:
        book.ready()
        book.restart()
        book.run(0)
        assert "There is no image python here." in book.wait_for(0, "KernelDidNotStart")
        page.screenshot(path=screenshots / "no-image.png")
    finally:
        docker_engine.call("tag", "kept", "python")
        docker_engine.call("rmi", "kept")
    book.restart()
    book.run(0)
    book.wait_for(0, "42")


def test_a_kernel_that_crashes_says_why_once_it_was_started_again(lab, kernels, page, screenshots):
    """What ends after the exec is not received; JupyterLab starts the kernel again, and then it is."""
    book = Notebook(page, lab, lab.notebook("crash.ipynb", "crashing", "1 + 1"))
    book.ready()
    book.run(0)
    text = book.wait_for(0, "KernelDidNotStart")
    assert "ended before it answered (exit status 9)" in text
    assert "no licence" in text
    page.screenshot(path=screenshots / "crashed.png")


def test_a_broken_kernel_says_why_in_the_cell(lab, kernels, environment, page, screenshots):
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
    shutil.copytree(environment, kernels["gone"], symlinks=True, copy_function=os.link)
    make_conda(kernels["gone"])
    book.restart()
    book.run(0)
    assert book.wait_for(0, "2").strip() == "2"
    page.screenshot(path=screenshots / "mended.png")


def stop_at_a_breakpoint(book, index):
    """Debug a cell that holds `TWICE` as JupyterLab's debugger does; return the path of its source."""
    book.debug("initialize", {"clientID": "test", "adapterID": "", "pathFormat": "path"})
    book.debug("attach", {})
    source = {"path": book.debug("dumpCell", {"code": TWICE})["sourcePath"]}
    points = book.debug("setBreakpoints", {"source": source, "breakpoints": [{"line": 3}], "lines": [3]})
    assert [point["verified"] for point in points["breakpoints"]] == [True]
    book.debug("configurationDone", {})
    book.page.evaluate(
        f"""() => {{ window.stopped = new Promise(resolve => {KERNEL}.iopubMessage.connect(
            (_, message) => message.content.event === "stopped" && resolve(message.content.body))) }}"""
    )
    book.run(index)
    stopped = book.page.evaluate("() => window.stopped")
    assert stopped["reason"] == "breakpoint"
    frames = book.debug("stackTrace", {"threadId": stopped["threadId"]})["stackFrames"]
    assert (frames[0]["name"], frames[0]["line"]) == ("twice", 3)
    scopes = book.debug("scopes", {"frameId": frames[0]["id"]})["scopes"]
    variables = book.debug("variables", {"variablesReference": scopes[0]["variablesReference"]})["variables"]
    assert {row["name"]: row["value"] for row in variables}["m"] == "42"
    return stopped["threadId"], source["path"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_kernel_runs_plots_interrupts_debugs_and_restarts(name, lab, kernels, page, screenshots):
    where = f"import os, sys; x = 6 * 7; print('runs in', {WHOLE[name][1]}, x)"
    cells = [where, PLOT, "import time; time.sleep(100)", TWICE, "x"]
    book = Notebook(page, lab, lab.notebook(f"{name}.ipynb", name, *cells))
    book.ready()
    book.run(0)
    assert book.wait_for(0, "runs in").strip() == f"runs in {kernels[name]} 42"
    book.run(1)
    book.output(1).locator("img").wait_for()
    assert book.output(1).locator("img").evaluate("image => image.naturalWidth") > 200
    book.run(2)
    start = book.interrupt()
    book.wait_for(2, "KeyboardInterrupt")
    assert time.monotonic() - start < 10
    page.screenshot(path=screenshots / f"{name}.png")
    thread, source = stop_at_a_breakpoint(book, 3)
    page.screenshot(path=screenshots / f"breakpoint-{name}.png")
    book.debug("continue", {"threadId": thread})
    book.wait_for(3, "42")
    Path(source).unlink(missing_ok=name == "contained")  # ipykernel leaves what it debugs, natively too
    book.restart()
    book.run(4)
    book.wait_for(4, "NameError")
    page.screenshot(path=screenshots / f"restarted-{name}.png")
