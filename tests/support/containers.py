"""What tests of docker and podman share: an engine with its images, and a plain user beside root."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

from support import ROOT, cache_dir, missing


class Engine:
    """A container engine that runs in private directories.

    program: its client.  environ: what client and Jupyter need to find it.
    """

    def __init__(self, name: str, program: str, environ: dict[str, str]) -> None:
        self.name = name
        self.program = program
        self.environ = environ

    def call(self, *arguments: str, **options: Any) -> str:
        """Return what a call of the engine printed; a failure fails the test."""
        result = subprocess.run(
            [self.program, *arguments],
            env={**os.environ, **self.environ},
            capture_output=True,
            check=False,
            **options,
        )
        assert result.returncode == 0, f"{self.name} {arguments}: {os.fsdecode(result.stderr)}"
        return os.fsdecode(result.stdout).strip()

    def ids(self) -> list[str]:
        """Return what containers there are, running or not."""
        return self.call("ps", "-a", "-q").split()

    def containers(self) -> list[dict[str, Any]]:
        """Return what the engine's `inspect` says of each container."""
        ids = self.ids()
        return json.loads(self.call("inspect", *ids)) if ids else []

    def add_image(self, rootfs: Path, name: str) -> str:
        """Make an image of a root file system; return its name."""
        with subprocess.Popen(["tar", "-C", str(rootfs), "-c", "."], stdout=subprocess.PIPE) as tar:
            self.call("import", "--change", "ENV LANG=C.UTF-8", "-", name, stdin=tar.stdout)
        return name

    @contextlib.contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Fail the test that leaves a container behind for more than ten seconds, and remove it."""
        yield
        deadline = time.monotonic() + 10
        while self.ids() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.containers()
        for container in left:
            subprocess.run(
                [self.program, "rm", "-f", container["Id"]], env={**os.environ, **self.environ}, check=False
            )
        assert not left, f"left behind: {[container['Name'] for container in left]}"


USER = 4321
"""Number of the plain user that tests run things as; it exists only inside of their own namespace."""

_AS_USER = f"""
set -e
keep=$(mktemp -d); hold=$1; shift
mount -t tmpfs tmpfs "$keep"
n=0
for path in $ENVKERNEL_TEST_PATHS; do n=$((n+1)); mkdir "$keep/$n"; mount --bind "$path" "$keep/$n"; done
mount -t tmpfs -o mode=755 tmpfs /root
n=0
for path in $ENVKERNEL_TEST_PATHS; do n=$((n+1)); mkdir -p "$path"; mount --move "$keep/$n" "$path"; done
umount "$keep"; rmdir "$keep"
if [ -e /dev/net/tun ]; then # where it has its default mode only root may open it
    mount -t tmpfs -o mode=755 tmpfs /dev/net
    mknod -m 666 /dev/net/tun c 10 200
fi
for name in passwd group subuid subgid; do mount --bind "$hold/$name" "/etc/$name"; done
unset ENVKERNEL_TEST_PATHS
exec setpriv --reuid={USER} --regid={USER} --clear-groups "$@"
"""


class PlainUser:
    """Runs Python code as a user who is not root, in a mount namespace that knows this user.

    home: a directory of the user's; environ: what the code runs with.
    """

    def __init__(self, directory: Path, environ: dict[str, str]) -> None:
        if os.getuid():
            missing("root, to be somebody else")
        self.hold = directory / "etc"
        self.hold.mkdir(parents=True)
        self.home = directory / "home"
        self.home.mkdir()
        os.chown(self.home, USER, USER)
        for path in (directory, self.hold):
            path.chmod(0o755)
        for name, line in (
            ("passwd", f"plain:x:{USER}:{USER}::{self.home}:/bin/sh\n"),
            ("group", f"plain:x:{USER}:\n"),
        ):
            (self.hold / name).write_text(Path("/etc", name).read_text() + line)
        for name in ("subuid", "subgid"):
            (self.hold / name).write_text("plain:200000:65536\n")
            Path("/etc", name).touch()
        self.environ = {
            "HOME": str(self.home),
            "USER": "plain",
            "LOGNAME": "plain",
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "tests"),
            **environ,
        }

    def run(self, code: str, *arguments: str, timeout: float = 120) -> Any:
        """Run Python code that prints one line of JSON at its end; return that."""
        hidden = ["/root"] if Path("/root").stat().st_mode & 0o001 == 0 else []
        needed = {sys.prefix, sys.base_prefix, str(ROOT), str(cache_dir())}
        paths = [path for path in sorted(needed) if hidden and path.startswith("/root/")]
        paths = [path for path in paths if not any(path.startswith(other + "/") for other in paths)]
        prefix = ["unshare", "--mount", "--propagation=slave", "bash", "-c", _AS_USER, "bash", str(self.hold)]
        result = subprocess.run(
            [*prefix, sys.executable, "-c", code, *arguments],
            env={**self.environ, "ENVKERNEL_TEST_PATHS": " ".join(paths)},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd="/",
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])


@contextlib.contextmanager
def short_directory(name: str) -> Iterator[Path]:
    """Yield a temporary directory with a short path: unix sockets need that.  Removed with all in it."""
    path = Path(tempfile.mkdtemp(prefix=f"envkernel-{name}-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)
