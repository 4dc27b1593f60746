"""A collector among hostile peers, beside an honest producer: is anything of the honest one lost, is memory bounded?

A real collector with an SQLite store gets records from one honest producer at a steady rate. All the while the peers of
`hostile_peers` do what they can: absurd counters and ever new reasons, 16 MiB of maps, empty rows and bad fingerprints,
frames cut short, random bytes, half-open connections, heartbeats and resets, producers that are killed, half-sent HTTP
requests. Memory is sampled twice a second, and ``/health`` is asked once a second. In the end the collector is stopped,
started again on the same store and journal, and stopped again. Exits with status 1 where a record of the honest
producer is not stored, memory exceeded ``--memory``, or a start or stop was not clean.

    python -m benchmarks.hostile_collector --minutes 5
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from attnhook.errors import DroppedError
from attnhook.sinks.zmq import ZmqSink
from benchmarks.collector import make_records

_BATCH = 100
_PATIENCE = 120.0  # seconds


class Found(NamedTuple):
    """What one run found; memory in MiB, times in seconds."""

    seconds: float
    sent: int  # by the honest producer
    dropped: int  # by it, since the collector was busy
    stored: int  # of its records
    before: float  # memory
    peak: float
    last: float  # median of the last quarter
    health_worst: float  # the longest answer of /health
    health_failed: int
    stop_status: int
    stop_seconds: float
    start_seconds: float  # of the second start
    unusable: int  # entries of the journal, at the second start
    again_status: int
    did: dict[str, int]
    stats: dict[str, Any]

    @property
    def clean(self) -> bool:
        """Whether the honest producer lost nothing, and stops and the second start went as they should."""
        return (
            self.sent == self.stored > 0
            and self.dropped == self.health_failed == self.unusable == 0
            and self.stop_status == self.again_status == 0
        )


class _Running(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    url: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=_PATIENCE) as reply:
            return json.load(reply)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=_PATIENCE)
        return self.process.returncode


def hostile(seconds: float, *, rate: float = 1000.0) -> Found:
    """Run it for so long, the honest producer sending ``rate`` records a second."""
    with tempfile.TemporaryDirectory() as folder:
        with _collector(Path(folder)) as running:
            samples, answers = _Samples(running), _Answers(running)
            time.sleep(2)
            before = samples.memory[-1]
            attack = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.hostile_peers", running.address, running.url, str(seconds)],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            began = time.monotonic()
            sink = _produce(running.address, seconds, rate)
            taken = time.monotonic() - began
            said, _ = attack.communicate(timeout=_PATIENCE)
            _wait_until_written(running)
            samples.stop()
            answers.stop()
            stats = running.get("/stats")
            began = time.monotonic()
            status = running.stop()
            stop_seconds = time.monotonic() - began
        began = time.monotonic()
        with _collector(Path(folder)) as again:
            start_seconds = time.monotonic() - began
            now = again.get("/stats")
            if now["records"]["received"] < stats["records"]["received"]:
                raise RuntimeError(f"counts went back: {now['records']} after {stats['records']}")
            again_status = again.stop()
        stored = _stored(Path(folder) / "x.db")
    quarter = sorted(samples.memory[-max(len(samples.memory) // 4, 1) :])
    return Found(
        taken, sink.sent, sum(sink.dropped.values()), stored, before, max(samples.memory), quarter[len(quarter) // 2],
        max(answers.seconds), answers.failed, status, stop_seconds, start_seconds, now["journal"]["unusable"],
        again_status, json.loads(said), stats,
    )  # fmt: skip


def _produce(address: str, seconds: float, rate: float) -> ZmqSink:
    """The honest producer, in this process: every record has a key of its own."""
    block = make_records(_BATCH, "honest")
    sink = ZmqSink()
    sink.open(f"{address}?linger=60s")
    began = time.monotonic()
    turn = 0
    while (now := time.monotonic() - began) < seconds:
        batch = [replace(record, request_id=f"honest-{turn}") for record in block]
        with suppress(DroppedError):  # it is counted in sink.dropped, and fails the run
            sink.write(batch)
        turn += 1
        time.sleep(max(turn * _BATCH / rate - now, 0.0))
    sink.close()
    return sink


def _wait_until_written(running: _Running) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        before = running.get("/stats")
        time.sleep(1)
        after = running.get("/stats")
        queued = sum(store["queued"] for store in after["stores"].values())
        if not queued and before["records"]["received"] == after["records"]["received"]:
            return
    raise RuntimeError(f"after {_PATIENCE:g} seconds the collector is not at rest: {after}")


def _stored(path: Path) -> int:
    """Records of the honest producer in the store."""
    with sqlite3.connect(path) as connection:
        query = "SELECT count(*) FROM records r JOIN sessions s ON s.id = r.session WHERE s.request_id LIKE 'honest-%'"
        return int(connection.execute(query).fetchone()[0])


class _Samples:
    """The collector's resident memory, twice a second."""

    def __init__(self, running: _Running) -> None:
        import psutil

        self._process = psutil.Process(running.process.pid)
        self.memory: list[float] = [self._process.memory_info().rss / 2**20]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.5):
            self.memory.append(self._process.memory_info().rss / 2**20)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


class _Answers:
    """How long /health takes, once a second, and how often it does not answer as it should."""

    def __init__(self, running: _Running) -> None:
        self._running = running
        self.seconds: list[float] = [0.0]
        self.failed = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            began = time.monotonic()
            try:
                good = self._running.get("/health") == {"status": "ok"}
            except (OSError, ValueError) as error:
                print(f"/health: {error!r}", file=sys.stderr, flush=True)
                good = False
            self.failed += not good
            self.seconds.append(time.monotonic() - began)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def _collector(folder: Path) -> Iterator[_Running]:
    process = subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks.collector", "--collect", "collect", "--queue", "64MB",
            "--store", f"sqlite:{folder / 'x.db'}", "--listen", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0",
        ],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("collecting on "):
            raise RuntimeError(f"the collector did not start: {line}")
        yield _Running(process, line.split()[2], line.split()[-1].removesuffix("/stats"))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=1000.0, help="records per second of the honest producer")
    parser.add_argument("--memory", type=float, default=1024.0, help="MiB that the collector may take")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    found = hostile(options.minutes * 60, rate=options.rate)
    stats = found.stats
    print(f"{found.seconds:.0f} s; honest: {found.sent:,} sent, {found.stored:,} stored, {found.dropped} dropped")
    print(f"memory: {found.before:.0f} MiB before, {found.peak:.0f} at most, {found.last:.0f} in the last quarter")
    print(f"/health: {found.health_worst:.2f} s at most, {found.health_failed} failed")
    print(
        f"stop: status {found.stop_status} after {found.stop_seconds:.1f} s; second start: {found.start_seconds:.1f} "
        f"s, {found.unusable} unusable entries, stop status {found.again_status}"
    )
    print("hostile peers did: " + ", ".join(f"{kind} {count:,}" for kind, count in sorted(found.did.items())))
    print(
        f"collector: {json.dumps({name: stats[name] for name in ('records', 'messages', 'connections', 'producers')})}"
    )
    sys.exit(0 if found.clean and found.peak <= options.memory else 1)


if __name__ == "__main__":
    main()
