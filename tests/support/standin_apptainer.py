#!/usr/bin/env python3
"""A strict stand-in for Apptainer: the documented options, on bubblewrap.

It exists where the real one can't be installed.  What it is strict about is what a launcher can get
wrong: an option that Apptainer does not document ends it, a bind whose source is missing ends it, and the
command sees the image, Apptainer's default mounts and the given binds, nothing else of the host.

Modelled on Apptainer 1.4.5, by trying: default mounts and what ``--contain``, ``--no-home`` and
``--workdir`` make of them; ``APPTAINERENV_X`` and ``--env`` evaluated by a shell unless reported otherwise;
SIGINT and SIGTERM forwarded to the command alone, not by ``exec instance://``; the command dies
with the starter; a helper process in a group of its own, but in the same session, that survives a
SIGKILL of the starter (there: squashfuse); the words and statuses of the usual errors.

An image is a directory, or a file that says ``standin-sif`` and, in the second line, which directory.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

EXEC = """
      --add-caps string
      --allow-setuid
      --app string
      --apply-cgroups string
      --authfile string
  -B, --bind stringArray
  -e, --cleanenv
      --compat
  -c, --contain
  -C, --containall
      --cpus string
      --cwd string
      --disable-cache
      --dns string
      --drop-caps string
      --env stringToString
      --env-file strings
  -f, --fakeroot
      --fusemount strings
  -h, --help
  -H, --home string
      --hostname string
  -i, --ipc
      --keep-privs
      --memory string
      --mount stringArray
  -n, --net
      --network string
      --network-args strings
      --no-eval
      --no-home
      --no-https
      --no-init
      --no-mount strings
      --no-pid
      --no-privs
      --no-umask
      --nv
      --nvccli
      --oom-kill-disable
  -o, --overlay strings
      --passphrase
      --pem-path string
  -p, --pid
      --pids-limit int
      --rocm
  -S, --scratch strings
      --security strings
      --sharens
      --unsquash
  -u, --userns
      --uts
  -W, --workdir string
  -w, --writable
      --writable-tmpfs
"""
HIDDEN = "      --pwd string\n"
OPTIONS = {
    "exec": EXEC,
    "run": EXEC,
    "instance start": EXEC + "      --boot\n      --no-start\n      --pid-file string\n",
    "instance stop": "  -a, --all\n  -F, --force\n  -s, --signal string\n  -t, --timeout int\n  -h, --help\n",
    "instance list": "  -j, --json\n  -h, --help\n",
    "build": "  -f, --fakeroot\n  -F, --force\n  -h, --help\n  -s, --sandbox\n      --build-arg strings\n"
    "      --disable-cache\n      --no-https\n      --notest\n  -T, --nohttps\n",
    "pull": "      --arch string\n      --authfile string\n      --dir string\n      --disable-cache\n"
    "  -F, --force\n  -h, --help\n      --library string\n      --no-https\n      --sandbox\n",
}
IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEPT = ("HOME", "TERM", "http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy")
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def die(text: str, status: int = 255) -> NoReturn:
    """End as Apptainer does when it refuses."""
    sys.stderr.write(f"FATAL:   {text}\n")
    sys.exit(status)


def parse(command: str, tokens: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Read the options up to the first other word; unknown ones end the program."""
    takes: dict[str, bool] = {}
    names: dict[str, str] = {}
    for line in (OPTIONS[command] + HIDDEN).strip("\n").splitlines():
        short, long, kind = re.fullmatch(r"  (?:-(\w),|   ) --([\w-]+) ?(\w*)", line).groups()  # type: ignore[union-attr]
        takes[long] = bool(kind)
        names.update({long: long, **({short: long} if short else {})})
    found: dict[str, list[str]] = {}
    queue = list(tokens)
    while queue and queue[0].startswith("-") and queue[0] not in ("-", "--"):
        token = queue.pop(0)
        flag, equals, value = (
            token[2:].partition("=") if token.startswith("--") else (token[1], "", token[2:])
        )
        if flag not in names:
            text = (
                f"unknown flag: --{flag}"
                if token.startswith("--")
                else f"unknown shorthand flag: {flag!r} in {token}"
            )
            sys.stderr.write(f'Error for command "{command}": {text}\n')
            sys.exit(1)
        name = names[flag]
        if not takes[name]:
            if value and not equals:
                queue.insert(0, "-" + value)
            found[name] = [value if equals else "true"]
        else:
            if not equals and not value:
                if not queue:
                    sys.stderr.write(f'Error for command "{command}": flag needs an argument: {token}\n')
                    sys.exit(1)
                value = queue.pop(0)
            found.setdefault(name, []).append(value)
    if queue[:1] == ["--"]:
        queue.pop(0)
    return {name: values for name, values in found.items() if values != ["false"]}, queue


def split(text: str, separator: str) -> list[str]:
    """Split at a separator that has no backslash before it."""
    return re.split(rf"(?<!\\){separator}", text)


def image_root(image: str) -> str:
    """Return the directory of an image."""
    if not os.path.lexists(image):
        die(f"While checking container encryption: could not open image {image}: failed to retrieve path")
    if os.path.isdir(image):
        return os.path.realpath(image)
    lines = Path(image).read_bytes().splitlines()
    if lines[:1] != [b"standin-sif"]:
        die(f"While checking container encryption: could not open image {image}: image format not recognized")
    return os.fsdecode(lines[1])


class Container:
    """What the options make of an image: mounts, namespaces, environment."""

    def __init__(self, options: dict[str, list[str]], image: str) -> None:
        self.options = options
        self.image = image
        self.root = image_root(image)
        for implied, by in (
            ("contain", "containall compat"),
            ("pid", "containall compat fusemount"),
            ("cleanenv", "containall compat"),
        ):
            if any(name in options for name in by.split()):
                options.setdefault(implied, ["true"])
        self.mounts: dict[str, list[str]] = {}
        self.asked: set[str] = set()
        self.home = pwd.getpwuid(os.getuid()).pw_dir  # Apptainer asks the user database, not $HOME
        self._default_mounts()
        for text in [os.environ.get("APPTAINER_BIND", ""), *options.get("bind", [])]:
            for spec in split(text, ","):
                if spec:
                    self._bind(*(re.sub(r"\\([,:])", r"\1", part) for part in split(spec, ":")))
        for text in options.get("mount", []):
            fields = dict(item.partition("=")[::2] for item in next(csv.reader([text])))
            source = fields.get("source") or fields.get("src") or die("mount needs a source")
            destination = fields.get("destination") or fields.get("dst") or fields.get("target") or source
            self._bind(source, destination, "ro" if "ro" in fields else "rw")
        if ("net" in options or "network" in options) and options.get("network") != ["none"]:
            die("container creation failed: network setup failed: no net configurations found")
        for flag, word in (("nv", "nv"), ("rocm", "rocm")):
            if flag in options:
                sys.stderr.write(f"INFO:    Could not find any {word} files on this host!\n")

    def _bind(self, source: str, destination: str = "", mode: str = "rw") -> None:
        if mode not in ("ro", "rw"):
            die(f"while parsing bind path: {mode} is not a valid bind option")
        if not os.path.exists(source):
            die(
                f"container creation failed: mount {source}->{destination or source} error: "
                f"mount source {source} doesn't exist"
            )
        if not (destination or source).startswith("/"):
            die(f"while parsing bind path: destination {destination!r} must be an absolute path")
        kind = "--ro-bind" if mode == "ro" else "--bind"
        self.asked.add(os.path.normpath(destination or source))
        self.mounts[os.path.normpath(destination or source)] = [kind, os.path.realpath(source)]

    def _default_mounts(self) -> None:
        options = self.options
        contain = "contain" in options
        without = {name for text in options.get("no-mount", []) for name in text.split(",")}
        self.mounts["/dev"] = ["--dev"] if contain else ["--dev-bind", "/dev"]
        self.mounts["/proc"] = ["--proc"] if "pid" in options else ["--bind", "/proc"]
        self.mounts["/sys"] = ["--ro-bind", "/sys"]
        for path in ("/etc/hosts", "/etc/resolv.conf", "/etc/passwd", "/etc/group"):
            if os.path.exists(path) and os.path.exists(self.root + path):
                self.mounts[path] = ["--ro-bind", path]
        cwd = os.getcwd()
        inside = "/" + cwd.split("/")[1]
        if (
            not contain
            and "cwd" not in without
            and inside not in ("/", "/etc", "/usr", "/bin", "/lib", "/dev", "/proc")
        ):
            self.mounts[cwd] = ["--bind", cwd]
        scratch = options.get("workdir", [""])[0]
        if scratch and not os.path.isdir(scratch):
            die(f"failed to access workdir: stat {scratch}: no such file or directory")
        places = [] if "tmp" in without else [("/tmp", "tmp"), ("/var/tmp", "var_tmp")]
        home = options.get("home", [self.home])[0]
        source, _, self.home = home.partition(":") if ":" in home else (home, "", home)
        if "no-home" not in options and "home" not in without:
            places.append((self.home, "home"))
        for path, name in places:
            if contain and "home" in options and name == "home":
                self.mounts[path] = ["--bind", source]
            elif contain and scratch:
                os.makedirs(os.path.join(scratch, name), exist_ok=True)
                self.mounts[path] = ["--bind", os.path.abspath(os.path.join(scratch, name))]
            elif contain:
                self.mounts[path] = ["--tmpfs"]
            else:
                self.mounts[path] = ["--bind", source if name == "home" else path]

    def arguments(self) -> list[str]:
        """Return bubblewrap's arguments: the image's tree, opened up where a mount point is missing."""
        words: list[str] = []
        base = "--bind" if "writable" in self.options else "--ro-bind"
        if "writable" in self.options:
            for path in list(self.mounts):
                above = any(path.startswith(other + "/") for other in self.mounts)
                if os.path.exists(self.root + path) or above:
                    continue
                if path in self.asked:
                    die(f"container creation failed: destination {path} doesn't exist in container")
                del self.mounts[path]  # a mount of its own: the real one warns
            words += [base, self.root, "/"]
        else:
            self._lay("/", base, words)
        for path in sorted(self.mounts, key=lambda path: path.count("/") if path != "/" else 0):
            kind, *source = self.mounts[path]
            words += [kind, *source, self._resolve(path)]
        return words

    def _resolve(self, path: str) -> str:
        """Follow the image's links in the leading directories of a mount point."""
        parts = path.strip("/").split("/")
        first = "/" + parts[0]
        if os.path.islink(self.root + first):
            first = os.path.normpath("/" + os.readlink(self.root + first))
        return "/".join([first, *parts[1:]])

    def _lay(self, path: str, base: str, words: list[str]) -> None:
        inside = path if path != "/" else ""
        for entry in sorted(os.scandir(self.root + inside), key=lambda entry: entry.name):
            place = f"{inside}/{entry.name}"
            if entry.is_symlink():
                words += ["--symlink", os.readlink(entry.path), place]
            elif not entry.is_dir():
                words += [base, entry.path, place]
            elif place in self.mounts:
                continue
            elif self._lacks_below(place):
                words += ["--dir", place]
                self._lay(place, base, words)
            else:
                words += [base, entry.path, place]

    def _lacks_below(self, place: str) -> bool:
        return any(
            path.startswith(place + "/") and not os.path.exists(self.root + path)
            for path in map(self._resolve, self.mounts)
        )

    def environ(self) -> dict[str, str]:
        """Return the command's environment, as the options have it."""
        host = dict(os.environ)
        given = {name[13:]: host[name] for name in host if name.startswith("APPTAINERENV_")}
        given.update(
            {k[15:]: v for k, v in host.items() if k.startswith("SINGULARITYENV_") and k[15:] not in given}
        )
        for name in self.options.get("env-file", []):
            for line in Path(name).read_text().splitlines():
                given.update([line.partition("=")[::2]])
        for text in self.options.get("env", []):
            given.update([item.partition("=")[::2] for item in text.split(",")])
        if "no-eval" not in self.options and host.get("APPTAINER_NO_EVAL", "0") in ("", "0", "false"):
            given = {name: evaluate(value) for name, value in given.items()}
        kept = {
            name: value
            for name, value in host.items()
            if ("cleanenv" not in self.options or name in KEPT)
            and not name.startswith(("APPTAINERENV_", "SINGULARITYENV_"))
        }
        if "cleanenv" in self.options:
            kept["LANG"] = "C"
        name = os.path.basename(self.image)
        kept.pop("LD_LIBRARY_PATH", None)
        own = {
            "PATH": IMAGE_PATH,
            "HOME": self.home,
            "APPTAINER_CONTAINER": self.image,
            "APPTAINER_NAME": name,
        }
        return {**kept, **own, **given}

    def start(self) -> tuple[int, subprocess.Popen[bytes]]:
        """Start what holds the namespaces; return the process to enter them by and the helper."""
        reading, writing = os.pipe()
        words = ["bwrap", "--info-fd", str(writing), *self.arguments()]
        words += ["--unshare-pid"] if "pid" in self.options else []
        words += ["--unshare-net"] if "net" in self.options or "network" in self.options else []
        words += ["--unshare-uts"] if "hostname" in self.options else []
        words += ["--", "sleep", "infinity"]
        helper = subprocess.Popen(
            words,
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: os.setpgid(0, 0),
            env={**os.environ, "PATH": os.environ.get("PATH", os.defpath) + ":" + IMAGE_PATH},
        )
        os.close(writing)
        text = b"".join(iter(lambda: os.read(reading, 4096), b""))
        if not text:
            assert helper.stderr
            die("container creation failed: " + helper.stderr.read().decode(errors="replace").strip())
        holder = int(json.loads(text)["child-pid"])
        for _ in range(500):  # bubblewrap says the pid before the mounts are made
            with contextlib.suppress(OSError):  # it has ended
                if b"sleep" in Path(f"/proc/{holder}/cmdline").read_bytes()[:9] or children(holder):
                    break
            if helper.poll() is not None:
                assert helper.stderr
                die("container creation failed: " + helper.stderr.read().decode(errors="replace").strip())
            time.sleep(0.004)
        return holder, helper


def children(pid: int) -> list[str]:
    """Return the child processes of a process."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def evaluate(value: str) -> str:
    """Let a shell evaluate a value between double quotes: what Apptainer does by default."""
    quoted = value.replace('"', '\\"')
    return subprocess.run(
        ["sh", "-c", f'printf %s "{quoted}"'], capture_output=True, text=True, check=False
    ).stdout


def enter(
    holder: int, pid_namespace: bool, argv: list[str], environ: dict[str, str], cwd: str, need: bool
) -> int:
    """Start `argv` as a child process in the namespaces of `holder`; it dies with this process."""
    kinds = [("user", CLONE_NEWUSER)] if os.getuid() else []
    files = {
        kind: os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net", "mnt", "pid")
    }
    if pid_namespace and not kinds:
        _set_namespace(files["pid"], CLONE_NEWPID)
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    LIBC.prctl(1, signal.SIGKILL)
    if os.getppid() not in (parent, 0):
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for kind, flag in [*kinds, ("net", CLONE_NEWNET), ("mnt", CLONE_NEWNS)]:
        _set_namespace(files[kind], flag)
    try:
        os.chdir(cwd)
    except OSError as error:
        if need:
            sys.stderr.write(
                f"FATAL:   failed to set working directory: chdir {cwd}: {os.strerror(error.errno)}\n"
            )
            os._exit(255)
        try:
            os.chdir(environ["HOME"])
        except OSError:
            os.chdir("/")
    environ["PWD"] = os.getcwd()
    try:
        os.execvpe(argv[0], argv, environ)
    except OSError:
        sys.stderr.write(f'FATAL:   "{argv[0]}": executable file not found in $PATH\n')
        os._exit(255)


def _set_namespace(file: int, flag: int) -> None:
    if LIBC.setns(file, flag):
        raise OSError(ctypes.get_errno(), "setns")


def wait_for(child: int, forward: bool) -> int:
    """Wait for the command, forwarding signals; return the status as Apptainer's exit code."""
    if forward:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGQUIT,
        ):
            signal.signal(number, lambda number, frame: os.kill(child, number))
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = os.waitpid(child, 0)[1]
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run_exec(verb: str, options: dict[str, list[str]], rest: list[str]) -> int:
    """``apptainer exec [options] IMAGE COMMAND``, or ``run`` for the image's own command."""
    if rest[:1] and verb == "run":
        rest.insert(1, "/.singularity.d/runscript")
    if len(rest) < 2:
        sys.stderr.write(f'Error for command "exec": requires at least 2 arg(s), only received {len(rest)}\n')
        return 1
    image, *argv = rest
    cwd = (options.get("pwd") or options.get("cwd") or [""])[0]
    if image.startswith("instance://"):
        record = read_instance(image[11:])
        container = Container(options, record["image"])
        child = enter(record["pid"], True, argv, container.environ(), cwd or os.getcwd(), bool(cwd))
        return wait_for(child, forward=False)
    if "://" in image:
        die(f"Unable to handle {image} uri: the stand-in pulls nothing by itself")
    container = Container(options, os.path.abspath(image))
    holder, helper = container.start()
    start = cwd or (container.home if "contain" in options else os.getcwd())
    child = enter(holder, "pid" in options, argv, container.environ(), start, bool(cwd))
    status = wait_for(child, forward=True)
    end_helper(holder, helper.pid)
    return status


def end_helper(*pids: int) -> None:
    """Kill the processes that hold a container's namespaces."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def instance_file(name: str) -> Path:
    """Return where an instance is recorded."""
    directory = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".apptainer/instances/standin"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory / (name + ".json")


def read_instance(name: str) -> dict[str, object]:  # type: ignore[type-arg]
    """Return the record of a running instance; none ends the program."""
    file = instance_file(name)
    if file.exists():
        record = json.loads(file.read_text())
        if os.path.exists(f"/proc/{record['pid']}"):
            return record
        file.unlink()
    die(f"While setting image/instance: no instance found with name {name}")


def run_instance(verb: str, options: dict[str, list[str]], rest: list[str]) -> int:
    """``apptainer instance start|stop|list``."""
    if verb == "list":
        names = [file.stem for file in sorted(instance_file("x").parent.glob("*.json"))]
        rows = [{"instance": name, **json.loads(instance_file(name).read_text())} for name in names]
        print(json.dumps({"instances": rows}) if "json" in options else "\n".join(names))
    elif verb == "start":
        image, name = rest[0], rest[1]
        if not re.fullmatch(r"[\w.-]+", name):
            die(f"invalid instance name {name!r}")
        if instance_file(name).exists() and os.path.exists(
            f"/proc/{json.loads(instance_file(name).read_text())['pid']}"
        ):
            die(f"instance {name} already exists")
        container = Container({**options, "pid": ["true"]}, os.path.abspath(image))
        if os.fork():
            os.wait()
            return 0 if instance_file(name).exists() else 255
        os.setsid()
        holder, helper = container.start()
        instance_file(name).write_text(
            json.dumps({"pid": holder, "helper": helper.pid, "image": container.image})
        )
        os._exit(0)
    else:
        record = read_instance(rest[0])
        end_helper(record["pid"], record["helper"])
        instance_file(rest[0]).unlink()
        sys.stderr.write(f"INFO:    Stopping {rest[0]} instance of {record['image']}\n")
    return 0


def run_build(options: dict[str, list[str]], rest: list[str]) -> int:
    """``apptainer build OUT FILE.def|IMAGE``: ``Bootstrap: localimage``, ``%files`` and ``%post``."""
    out, source = rest
    if os.path.lexists(out) and "force" not in options:
        die(f"While performing build: build target {out!r} already exists. Use --force to overwrite")
    if os.path.isdir(source):
        Path(out).write_text(f"standin-sif\n{os.path.realpath(source)}\n")
        return 0
    sections = re.split(r"^%(\w+).*\n", Path(source).read_text(), flags=re.M)
    header = dict(re.findall(r"^(\w+): *(.*)$", sections[0], flags=re.M))
    if header.get("Bootstrap") != "localimage":
        die(f"Unable to build from {source}: bootstrap agent {header.get('Bootstrap')} is not to be had")
    root = os.path.abspath(out) + ".rootfs"
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["cp", "-a", image_root(header["From"]), root], check=True)
    parts = dict(zip(sections[1::2], sections[2::2]))
    scripts = Path(root, ".singularity.d")
    scripts.mkdir(exist_ok=True)
    (scripts / "runscript").write_text("#!/bin/sh\n" + parts.get("runscript", ""))
    (scripts / "runscript").chmod(0o755)
    for line in parts.get("files", "").split("\n"):
        if line.split():
            shutil.copy(line.split()[0], root + line.split()[-1])
    sys.stderr.write("INFO:    Running post scriptlet\n")
    words = [
        "bwrap",
        "--bind",
        root,
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "sh",
        "-ec",
        parts.get("post", "true"),
    ]
    if subprocess.run(words, check=False).returncode:
        shutil.rmtree(root)
        die("While performing build: while running engine: exit status 1")
    Path(out).write_text(f"standin-sif\n{root}\n")
    sys.stderr.write(f"INFO:    Build complete: {out}\n")
    return 0


def run_pull(options: dict[str, list[str]], rest: list[str]) -> int:
    """``apptainer pull [OUT] URI``: from the directory $STANDIN_REGISTRY, where NAME is any
    ``x://NAME``."""
    uri = rest[-1]
    name = uri.partition("://")[2]
    out = rest[0] if len(rest) > 1 else re.sub(r"[:/]", "_", name.rpartition("/")[2]) + ".sif"
    found = Path(os.environ.get("STANDIN_REGISTRY", "/nonexistent")) / name.replace("/", "_")
    if os.path.exists(out) and "force" not in options:
        die(f"While pulling: image file already exists: {out!r} - will not overwrite")
    if not found.exists():
        die(f"While making image from oci registry: error fetching image: {uri}: manifest unknown")
    sys.stderr.write("INFO:    Downloading image\n")
    shutil.copyfile(found, out)
    return 0


def main(tokens: list[str]) -> int:
    """Run one command line."""
    while tokens[:1] and tokens[0] in ("--debug", "--quiet", "--silent", "--verbose", "-d", "-q", "-s", "-v"):
        tokens = tokens[1:]
    if tokens == ["--version"]:
        print("apptainer version 1.4.5-standin")
        return 0
    command = " ".join(tokens[: 2 if tokens[:1] == ["instance"] else 1])
    if command not in OPTIONS:
        sys.stderr.write(f'Error: unknown command "{command}" for "apptainer"\n')
        return 1
    options, rest = parse(command, tokens[len(command.split()) :])
    if "help" in options:
        print(f"Usage:\n  apptainer {command}\n\nOptions:\n" + OPTIONS[command].strip("\n"))
        return 0
    if command.startswith("instance"):
        return run_instance(command.split()[1], options, rest)
    if command in ("exec", "run"):
        return run_exec(command, options, rest)
    return {"build": run_build, "pull": run_pull}[command](options, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
