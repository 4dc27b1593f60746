"""Real collector and producer processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, environment

PATIENCE = 120.0  # seconds; a loaded machine takes long to start a process


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Poll until ``condition`` gives something true; return it."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} seconds"
        time.sleep(0.05)


class Collect:
    """An ``attnhook collect`` process on ports of its own; the ZeroMQ one may be kept over restarts."""

    def __init__(self, folder: Path, *arguments: str, listen: str = "tcp://127.0.0.1:*", **environ: str) -> None:
        self.log = folder / f"collect-{time.monotonic_ns()}.log"
        command = [
            sys.executable,
            "-c",
            "from attnhook.cli.app import main; main()",
            "collect",
            "--listen",
            listen,
            "--http",
            "127.0.0.1:0",
        ]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=folder,
                env=environment(**environ),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("collecting on "):
            self.process.communicate(timeout=PATIENCE)
            raise RuntimeError(self.log.read_text())
        self.address, self.url = line.split()[2], line.split()[-1].removesuffix("/stats")

    def get(
        self, path: str, *, token: str | None = None, data: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Status and body of a request."""
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def stats(self) -> dict[str, Any]:
        """What /stats says."""
        status, body = self.get("/stats")
        assert status == 200, body
        return json.loads(body)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> str:
        """SIGTERM; what it printed after its first line."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=PATIENCE)
        return out


@contextmanager
def collect(folder: Path, *arguments: str, **options: str) -> Iterator[Collect]:
    """A collector that is gone after the block."""
    with ended_at_last(Collect(folder, *arguments, **options)) as found:
        yield found


@contextmanager
def ended_at_last(found: Collect) -> Iterator[Collect]:
    """A collector that runs, and is gone after the block."""
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.kill()
        if found.process.stdout is not None:
            found.process.stdout.close()


def producer(address: str, name: str, frames: int, size: int, pause: float = 0.0) -> subprocess.Popen[str]:
    """A process that sends ``frames`` batches of ``size`` records; see producer.py."""
    command = [
        sys.executable,
        str(ROOT / "tests/collector/producer.py"),
        address,
        name,
        str(frames),
        str(size),
        str(pause),
    ]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a producer says at its end: ``sent`` and ``dropped``."""
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def is_root() -> bool:
    """Whether this process may do as it likes."""
    return hasattr(os, "geteuid") and os.geteuid() == 0
