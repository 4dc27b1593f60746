"""A serving engine in processes of its own, for tests of any backend."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.backends.forking import Process, Ready
from tests.helpers import ROOT


class Server:
    """A running OpenAI-compatible server."""

    def __init__(self, url: str, log: Path, process: Process) -> None:
        self.url, self.log, self.process = url, log, process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return json.loads(reply.read() or b"null")

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        """Status and JSON of a reply that need not be a success."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def raw(self, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
        """Status and bytes of a reply, whatever they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except http.client.IncompleteRead as error:  # the server has broken it off
            return 599, error.partial

    def events(self, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
        """The server-sent events of a streamed reply."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps({**body, "stream": True}).encode(),
            {"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            lines = [line.decode().strip() for line in reply]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        return [json.loads(event) for event in data[:-1]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _started(argv: Sequence[str], environ: dict[str, str], log: Path, ready: Ready | None) -> Process:
    if argv[0] == "-c":
        argv = ["-c", textwrap.dedent(argv[1]), *argv[2:]]
    if ready is not None:
        return ready.start(argv, environ, log)
    command = [sys.executable, *(() if argv[0] == "-c" else ("-m",)), *argv]
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True)


def run(argv: Sequence[str], environ: dict[str, str], log: Path, *, ready: Ready | None = None) -> tuple[int, str]:
    """Exit status and output of ``python -m ARGV`` (or ``-c CODE``), in a fork of ``ready``."""
    process = _started(argv, environ, log, ready)
    try:
        code = process.wait(570)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, log.read_text(errors="replace")


@contextlib.contextmanager
def running(
    argv: Sequence[str],
    port: int,
    log: Path,
    environ: dict[str, str],
    health: str = "/health",
    *,
    ready: Ready | None = None,
) -> Iterator[Server]:
    """A server of ``python -m ARGV`` (a fork of ``ready``) once it is healthy; it and all that it started is ended."""
    process = _started(argv, environ, log, ready)
    try:
        server = Server(f"http://127.0.0.1:{port}", log, process)
        until = time.monotonic() + 300
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}")
            with contextlib.suppress(OSError):
                server.get(health)
                break
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()  # it ends what it has started
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
