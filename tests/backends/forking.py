"""Engine processes that are forked from one that has imported the engine.

An import of vLLM takes ten seconds of a core, and a server's start takes two or more of them. Most tests are about what
an engine computes and not about how its process begins, so `Ready` imports once for each worker of a run.
What an interpreter does at its start (``attnhook.pth``, sitecustomize) is shown by the tests that ask for ``fresh``
processes: those of each engine's main server, of the process room, and all where FRESH_ENGINES=1 (``make test-all``).

    python -m tests.backends.forking MODULE [MODULE ...]

imports the modules, says "ready", and forks for each line of JSON on its standard input: ``argv`` (a module to run as
``python -m`` does, or ``-c`` and code, and arguments), ``environ`` (all of it), ``folder``, ``log``, ``status`` (the
file that gets the exit status) and ``again`` (functions, as ``module:name``, of what was settled by the environment
when the modules were imported). It answers with the process id, and ends with its standard input.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.helpers import ROOT

#: With 1, every engine of a run starts an interpreter of its own.
FRESH = "FRESH_ENGINES"


class Process(Protocol):
    """What tests use of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...


class Forked:
    """A process that `Ready` has forked; it leads a session of its own."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit status (minus the signal, where one ended it), or None."""
        if self._code is None:
            with contextlib.suppress(FileNotFoundError):
                self._code = os.waitstatus_to_exitcode(int(self._status.read_text(encoding="ascii")))
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class Ready:
    """The process that has imported ``modules``; it starts with the first `start`, in the environment of ``environ()``.

    ``later`` begins the names of variables in which a fork may differ from ``environ()``, as nothing reads them at an
    import, or ``again`` reads them again. What libraries set in this process as it goes on is in both.
    """

    def __init__(
        self,
        modules: Sequence[str],
        environ: Callable[[], dict[str, str]],
        later: Sequence[str],
        again: Sequence[str] = (),
    ) -> None:
        self._modules, self._environ, self._again = modules, environ, again
        self._later = ("ATTNHOOK", "OMP_NUM_THREADS", *later)
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._count = 0

    def takes(self, environ: dict[str, str]) -> bool:
        """Whether a fork can have this environment."""
        different = {name for name, _ in environ.items() ^ self._environ().items()}
        return all(name.startswith(self._later) for name in different)

    def unless(self, fresh: bool, environ: dict[str, str]) -> Ready | None:
        """Itself where a process with this environment may be a fork; None where it is to start an interpreter."""
        return None if fresh or os.environ.get(FRESH) == "1" or not self.takes(environ) else self

    def start(self, argv: Sequence[str], environ: dict[str, str], log: Path) -> Forked:
        """Run ``python -m ARGV`` (or ``-c CODE``) in a fork with this environment; its outputs go to ``log``."""
        assert self.takes(environ), "a fork cannot have this environment"
        process = self._process or self._begin()
        self._count += 1
        status = self._folder / f"status-{self._count}"
        job = {
            "argv": list(argv), "environ": environ, "folder": str(ROOT), "log": str(log), "status": str(status),
            "again": list(self._again),
        }  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return Forked(int(self._line(process)), status)

    def _begin(self) -> subprocess.Popen[str]:
        holder = tempfile.TemporaryDirectory(prefix="attnhook-ready-")
        atexit.register(holder.cleanup)
        self._folder = Path(holder.name)
        command = [sys.executable, "-m", "tests.backends.forking", *self._modules]
        # attnhook begins in each fork, with the fork's own variables
        environ = {name: value for name, value in self._environ().items() if not name.startswith("ATTNHOOK")}
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environ, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        atexit.register(self._end)
        while (line := self._line(self._process)) != "ready":  # what imports print comes before
            print(line)
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            log = (self._folder / "log").read_text(errors="replace")[-6000:]
            raise RuntimeError(f"the process with {', '.join(self._modules)} does not answer:\n{log}")
        return line.strip()

    def _end(self) -> None:
        if self._process is not None and self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.wait(30)
            self._process.stdout.close()


def main(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what was imported is no garbage, and an engine that begins or ends looks several times
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(job)
            return
        threading.Thread(target=_report, args=(pid, Path(job["status"])), daemon=True).start()
        print(pid, flush=True)


def _report(pid: int, status: Path) -> None:
    _, code = os.waitpid(pid, 0)
    part = status.with_suffix(".part")
    part.write_text(str(code), encoding="ascii")
    part.rename(status)


def _become(job: dict[str, Any]) -> None:
    """The process that the job describes, as far as a fork can be it."""
    os.setsid()
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environ"])
    random.seed()
    _customize()
    sys.stdin = open(0)  # noqa: SIM115  it lives as long as the process
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for place in job["again"]:
        module, _, name = place.partition(":")
        getattr(sys.modules[module], name)()
    if os.environ.get("ATTNHOOK", "") not in ("", "0"):  # as attnhook.pth does when an engine is imported
        from attnhook.process.startup import watch

        watch.complete()
    module, *arguments = job["argv"]
    code = arguments.pop(0) if module == "-c" else None
    sys.argv = [module, *arguments]
    if code is not None:
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _customize() -> None:
    """Run the sitecustomize of a folder that the fork has on PYTHONPATH and its parent has not."""
    own = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    sys.path[1:1] = own
    for folder in own:
        if (file := Path(folder) / "sitecustomize.py").exists():
            runpy.run_path(str(file))
            return


if __name__ == "__main__":
    main(sys.argv[1:])
