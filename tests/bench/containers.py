#!/usr/bin/env python3
"""How kernels in containers compare with the best hand-written kernel.json, and with the native kernel.

    tests/bench/containers.py [--rounds=N] [docker] [podman]

Starts engines of its own (as root).  Every round measures every kernelspec once, in turn, so that what else
the machine does hits all alike; a ratio is the median of the ratios of each round.  The native kernel is the
image's own ipykernel, run by Debian's Python on this machine.
Ends with 1 where a goal of the contract was missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import psutil  # noqa: E402
from jupyter_client import KernelManager  # noqa: E402

from support.containers import Engine, short_directory  # noqa: E402
from support.docker import Daemon, Docker  # noqa: E402
from support.images import make_rootfs  # noqa: E402
from support.jupyter import Jupyter  # noqa: E402
from support.podman import need_podman, podman_environ  # noqa: E402

KERNEL = ["python3", "-m", "ipykernel_launcher", "-f"]
OUTPUT = "import sys\nfor _ in range(100): sys.stdout.write('x' * (1 << 20)); sys.stdout.flush()"
MEASURES = ("start", "round trip", "100 MB", "shutdown", "ten at once")
GOALS = (
    *((name, "start", "by-hand", 1.05) for name in ("host", "none")),
    ("shared", "start", "native", 1.3),
    *((name, "ten at once", "by-hand", 1.1) for name in ("host", "none", "shared")),
    *(("none", what, "by-hand", 1 / 0.9) for what in ("round trip", "100 MB")),
)
"""The figures of the contract: kernelspec, what is measured, against which, and the most it may be."""
MOST_MB = 30
PORTS = itertools.count(15001)
"""Ports for kernels: Jupyter picks them where connections get theirs, and one of ten may lose its own."""


class Kernel:
    """A kernel that is started, timed and ended."""

    def __init__(self, name: str, environ: dict[str, str]) -> None:
        self.manager = KernelManager(kernel_name=name, cache_ports=False)
        for stream in ("shell", "iopub", "stdin", "hb", "control"):
            setattr(self.manager, f"{stream}_port", next(PORTS))
        self.manager.start_kernel(env=environ, stdout=-3, stderr=-3)
        self.client = self.manager.blocking_client()
        self.client.start_channels()

    def execute(self, code: str) -> None:
        reply = self.client.execute_interactive(code, timeout=120, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]

    def ready(self) -> None:
        self.client.wait_for_ready(timeout=120)

    def end(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()
        self.manager.cleanup_resources()


def measure(name: str, environ: dict[str, str], ten: bool) -> dict[str, float]:
    """Return seconds by measure, and what envkernel runs next to the kernel in MB."""
    begin = time.perf_counter()
    kernel = Kernel(name, environ)
    kernel.ready()
    kernel.execute("1")
    took = {"start": time.perf_counter() - begin}
    begin = time.perf_counter()
    for _ in range(100):
        kernel.execute("1")
    took["round trip"] = (time.perf_counter() - begin) / 100
    begin = time.perf_counter()
    kernel.execute(OUTPUT)
    took["100 MB"] = time.perf_counter() - begin
    took["MB beside"] = beside(kernel.manager.connection_file)
    begin = time.perf_counter()
    kernel.end()
    took["shutdown"] = time.perf_counter() - begin
    if ten:
        begin = time.perf_counter()
        kernels = [Kernel(name, environ) for _ in range(10)]
        for kernel in kernels:
            kernel.ready()
        took["ten at once"] = time.perf_counter() - begin
        for kernel in kernels:
            kernel.end()
    return took


def beside(connection_file: str) -> float:
    """Return the proportional memory (PSS) of envkernel's processes for one kernel, in MB."""
    found = 0.0
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if connection_file in command and "--format=2" in command:
                found += process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return found


def write_spec(place: Jupyter, name: str, argv: list[str], environ: dict[str, str]) -> None:
    """Install a hand-written kernel.json."""
    directory = place.kernels / name
    directory.mkdir(parents=True)
    spec = {"argv": argv, "display_name": name, "language": "python", "env": environ}
    (directory / "kernel.json").write_text(json.dumps(spec))


def compare(place: Jupyter, engine: Engine, image: str, rootfs: Path, rounds: int) -> bool:
    """Measure an engine's kernels, the hand-written and the native one; return whether all goals were met."""
    by_hand = [engine.program, "run", "--rm", "--network=host", "-v", "{connection_file}:/connection_file"]
    write_spec(place, "by-hand", [*by_hand, image, *KERNEL, "/connection_file"], {})
    packages = {"PYTHONPATH": f"{rootfs}/usr/lib/python3/dist-packages"}
    write_spec(place, "native", ["/usr/bin/python3", *KERNEL[1:], "{connection_file}"], packages)
    ours = {"host": ["--network=host"], "none": ["--network=none"], "shared": ["--shared", "--keep"]}
    for name, options in ours.items():
        place.setup(engine.name, name, "--python=python3", *options, image)
    os.environ.update(place.environ)
    measure("shared", place.environ, False)  # from now on its container is there: each kernel is a second one
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("native", "by-hand", *ours)}
    for number in range(rounds):
        for name, rows in results.items():
            rows.append(measure(name, place.environ, number < 3))  # ten at once take their time
    for name, rows in results.items():
        cells = [
            f"{what} {statistics.median(row[what] for row in rows if what in row):.4f} s" for what in MEASURES
        ]
        print(f"{engine.name} {name}: {', '.join(cells)}")
    met = True
    for name, what, other, most in GOALS:
        pairs = zip(results[name], results[other])
        ratio = statistics.median(one[what] / two[what] for one, two in pairs if what in one)
        met &= report(f"{engine.name} {name}, {what}", f"{ratio:.2f} x {other}", ratio, most)
    for name in ours:
        beside_it = statistics.median(row["MB beside"] for row in results[name])
        met &= report(f"{engine.name} {name}, beside the kernel", f"{beside_it:.1f} MB", beside_it, MOST_MB)
    for container in engine.ids():
        engine.call("rm", "-f", container)
    return met


def report(what: str, figure: str, value: float, most: float) -> bool:
    """Print a figure with its goal; return whether it was met."""
    print(f"  {what}: {figure} (goal <= {most:.3g}){'' if value <= most else '  MISSED'}", flush=True)
    return value <= most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("engines", nargs="*", default=["docker", "podman"])
    options = parser.parse_args()
    rootfs = make_rootfs("python", "python3-ipykernel")
    met = True
    for name in options.engines:
        with short_directory("bench") as directory, tempfile.TemporaryDirectory() as private:
            place = Jupyter(Path(private) / name)
            if name == "docker":
                with Daemon(directory, "ekbench").running() as daemon:
                    met &= run(place, Docker(daemon), rootfs, "python", options.rounds)
            else:
                engine = Engine("podman", need_podman(), podman_environ(directory))
                met &= run(place, engine, rootfs, "localhost/python", options.rounds)
                engine.call("rmi", "-f", "-a")
    return 0 if met else 1


def run(place: Jupyter, engine: Engine, rootfs: Path, image: str, rounds: int) -> bool:
    """Compare the kernels of an engine that runs; return whether all goals were met."""
    engine.add_image(rootfs, image)
    place.environ.update(engine.environ)
    return compare(place, engine, image, rootfs, rounds)


if __name__ == "__main__":
    sys.exit(main())
