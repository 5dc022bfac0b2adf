"""Host out of dictionaries, for the tests of planning."""

from __future__ import annotations

import os

import envkernel

RUN = b"""
      --cpus decimal           Number of CPUs
  -d, --detach                 Run container in background
      --device list            Add a host device to the container
  -e, --env list               Set environment variables
      --gpus gpu-request       GPU devices to add to the container
  -h, --hostname string        Container host name
  -i, --interactive            Keep STDIN open even if not attached
  -m, --memory bytes           Memory limit
      --mount mount            Attach a filesystem mount to the container
      --network network        Connect a container to a network
      --platform string        Set platform
      --rm                     Automatically remove the container when it exits
  -t, --tty                    Allocate a pseudo-TTY
  -u, --user string            Username or UID
  -v, --volume list            Bind mount a volume
  -w, --workdir string         Working directory inside the container
"""
EXEC = b"""
      --authfile string        path of the authentication file
  -B, --bind strings           a user-bind path specification
  -e, --cleanenv               clean environment before running container
  -c, --contain                use minimal /dev and empty other directories
  -n, --net                    run container in a new network namespace
      --no-eval                do not shell evaluate env vars
      --no-https               use http instead of https
      --nv                     enable Nvidia support
  -W, --workdir string         working directory to be used for /tmp
"""
HELP = {
    "run": RUN,
    "build": b"      --build-arg list   Set variables\n  -f, --file string   Name\n      --no-cache   None\n",
    "pull": b"      --authfile string\n      --no-https\n      --platform string   Set platform\n",
    "exec": EXEC,
}
"""What the commands of the engines answer to ``--help``, in part."""


def unknown_flag(flag):
    """Return what an engine says of an option that it does not know."""
    return envkernel.Output(125, b"", f"unknown flag: {flag}".encode())


class FakeHost(envkernel.Host):
    """A world of given files, programs and answers; whatever is not given is not there.

    files: content by path.  programs: paths that can be executed.  answers: `Output` by argv.
    sourced: what the environment becomes when bash sources something.
    """

    def __init__(self, files=(), programs=(), answers=(), sourced=None, login=None, cwd="/cwd"):
        self.files = dict(files)
        self.programs = set(programs)
        self.answers = {tuple(argv): output for argv, output in dict(answers).items()}
        self.sourced = sourced
        self.login = login or {}
        self.cwd = cwd
        self.asked = []
        self.reported = b""
        self.agreed = True
        self.listening = True

    def _paths(self):
        return [*self.files, *self.programs]

    def exists(self, path):
        return path in self._paths() or self.isdir(path)

    def isdir(self, path):
        return any(known.startswith(path.rstrip("/") + "/") for known in self._paths())

    def real_path(self, path):
        return path

    def is_executable(self, path):
        return path in self.programs

    def is_readable(self, path):
        return True

    def absolute(self, path):
        return os.path.normpath(os.path.join(self.cwd, path.replace("~", "/home/me", 1)))

    def read(self, path):
        return self.files.get(path)

    def listdir(self, path):
        start = path.rstrip("/") + "/"
        return sorted(
            {known[len(start) :].split("/")[0] for known in self._paths() if known.startswith(start)}
        )

    def output(self, argv, environ):
        if argv[-1] == "--help" and argv[1] in HELP:
            return envkernel.Output(0, HELP[argv[1]]) if len(argv) == 3 else unknown_flag(argv[2])
        self.asked.append(list(argv))
        return self.answers[tuple(argv)]

    def source(self, actions, environ):
        self.asked.append(list(actions))
        return {**environ, **(self.sourced or {})}

    def ids(self):
        return 1000, 100, [100, 27]

    def home(self):
        return "/home/me"

    def random(self):
        return "cafe0123"

    def show(self, argv, environ):
        self.asked.append(list(argv))
        return self.answers[tuple(argv)].status

    def agrees(self, question):
        self.asked.append(question)
        return self.agreed

    def produce(self, argv, path, environ, directory=None):
        status = self.show(argv, environ)
        if not status:
            self.files[path] = b"made"
        return status

    def try_plan(self, plan):
        return self.output(plan.argv, plan.environ)

    def listens(self, launch, environ):
        return self.listening

    def login_environ(self, environ):
        return self.login

    def warn(self, text):
        self.reported += text
