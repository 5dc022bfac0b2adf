"""Facts out of dictionaries, for the tests of planning."""

from __future__ import annotations

import os

import envkernel


class FakeFacts(envkernel.Facts):
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
        self.told = b""
        self.agreed = True

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

    def produce(self, argv, path, environ, folder=None):
        status = self.show(argv, environ)
        if not status:
            self.files[path] = b"made"
        return status

    def try_plan(self, plan):
        return self.output(plan.argv, plan.environ)

    def login_environ(self, environ):
        return self.login

    def tell(self, text):
        self.told += text
