"""A collector under steady load: does its memory stay flat, and is every record accounted for?

A collector process with an SQLite store gets ``--fill`` records as fast as it takes them, so that SQLite's page cache
(64 MiB) and every queue have been full once, and then a steady stream: new request ids all the time, and a new
producer every ten seconds. Its resident memory is sampled once a second. Exits with status 1 where the memory of the
last quarter exceeds that of the first quarter (medians) by more than ``--allow`` percent, or a record is missing.

    python -m benchmarks.soak --minutes 10
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from attnhook.errors import DroppedError
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.zmq import ZmqSink
from benchmarks.collector import collector, make_records

BATCH = 500
_PRODUCER_SECONDS = 10.0


class Soaked(NamedTuple):
    """What one soak found; memory in MiB."""

    seconds: float
    sent: int
    received: int
    lost: int
    dropped: int  # by the store's full queue
    stored: int
    first: float  # median over the first quarter
    last: float  # median over the last quarter
    peak: float

    @property
    def growth(self) -> float:
        """From the first quarter to the last one, in percent."""
        return 100 * (self.last / self.first - 1)

    @property
    def exact(self) -> bool:
        """Whether every record that was sent is stored or counted."""
        return self.sent == self.received + self.lost and self.received == self.stored + self.dropped


class Feed:
    """Sends records, each under a key of its own, through one sink after another."""

    def __init__(self, address: str) -> None:
        self.sent = 0
        self._address = address
        self._block = make_records(BATCH, "soak")
        self._sink: ZmqSink | None = None
        self._since = 0.0

    def send(self, *, wait: bool = False) -> None:
        """One batch; dropped where the collector is busy, unless it is to ``wait``."""
        now = time.monotonic()
        if self._sink is None or now - self._since > _PRODUCER_SECONDS:
            self.close()
            self._sink, self._since = ZmqSink(), now
            self._sink.open(f"{self._address}?linger=60s")
        before = self._sink.sent
        batch = self._renamed()
        while True:
            try:
                self._sink.write(batch)
            except DroppedError:
                if wait:
                    time.sleep(0.001)
                    continue
            break
        self.sent += self._sink.sent - before

    def close(self) -> None:
        """Wait until what was sent is on its way."""
        if self._sink is not None:
            self._sink.close()

    def _renamed(self) -> list[TokenRecord]:
        renamed = []
        for i, record in enumerate(self._block):
            # the fields of a frozen dataclass; replace() takes ten times as long
            copy = object.__new__(TokenRecord)
            copy.__dict__.update(record.__dict__, request_id=f"soak-{(self.sent + i) // 100}")
            renamed.append(copy)
        return renamed


def soak(seconds: float, rate: float, fill: int) -> Soaked:
    """Run one soak of so many seconds after ``fill`` records, at ``rate`` records per second."""
    import psutil

    with tempfile.TemporaryDirectory() as folder, collector(Path(folder), "sqlite:x.db", "64MB") as (address, stats):
        process = psutil.Process(stats()["pid"])
        feed = Feed(address)
        while feed.sent < fill:
            feed.send(wait=True)
        _settle(stats, feed)
        samples: list[float] = []
        over = threading.Event()

        def sample() -> None:
            while not over.wait(1.0):
                samples.append(process.memory_info().rss / 2**20)

        watcher = threading.Thread(target=sample)
        watcher.start()
        began = time.monotonic()
        try:
            batches = 0
            while (now := time.monotonic() - began) < seconds:
                feed.send()
                batches += 1
                time.sleep(max(batches * BATCH / rate - now, 0.0))
        finally:
            over.set()
            watcher.join()
        taken = time.monotonic() - began
        feed.close()
        found = _settle(stats, feed)
    (store,) = found["stores"].values()
    quarter = max(len(samples) // 4, 1)
    return Soaked(
        taken,
        feed.sent,
        found["records"]["received"],
        found["records"]["lost"],
        sum(sum(reasons.values()) for reasons in found["records"]["dropped"].values()),
        store["written"] - store["duplicates"],
        statistics.median(samples[:quarter]),
        statistics.median(samples[-quarter:]),
        max(samples),
    )


def _settle(stats: Callable[[], dict[str, Any]], feed: Feed) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = stats()
        records = found["records"]
        (store,) = found["stores"].values()
        if records["received"] + records["lost"] >= feed.sent and store["queued"] == 0:
            return found
        time.sleep(0.2)
    raise RuntimeError(f"{feed.sent} records were sent; after five minutes the collector says {found}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=2000.0, help="records per second")
    parser.add_argument("--fill", type=int, default=250_000, help="records sent at once before")
    parser.add_argument("--allow", type=float, default=5.0, help="percent by which memory may grow")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    found = soak(options.minutes * 60, options.rate, options.fill)
    print(f"{found.seconds:.0f} s, {found.sent:,} records sent, {found.received:,} received, {found.lost} lost,")
    print(f"{found.dropped} dropped by the store's queue, {found.stored:,} stored: exact: {found.exact}")
    print(
        f"memory: {found.first:.1f} MiB in the first quarter, {found.last:.1f} in the last ({found.growth:+.1f}%), "
        f"peak {found.peak:.1f}"
    )
    sys.exit(0 if found.exact and found.growth <= options.allow else 1)


if __name__ == "__main__":
    main()
