"""Records per second from producer processes through ZeroMQ to the collector, and from there into a store.

Real processes on this machine: producers make binary rows of ready records and send them with the ``zmq:`` sink, a
collector (`attnhook collect`) receives, checks, counts and journals them, and writes a store. A producer that finds
the high-water mark reached waits a millisecond and tries again, so that the figure is what the collector takes. The
store may lag behind; what its queue does not hold is dropped and counted, and shown here.

    python -m benchmarks.collector
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord

BATCH = 1024  # what a delivery hands to a sink at most


class Figures(NamedTuple):
    """One run; rates in records per second."""

    records: int
    received: float  # from the first record sent to the last one received
    stored: float  # from the first record sent until the store has all that was not dropped
    dropped: int  # by the store's full queue
    lost: int
    producer_us: float  # of processor time per record in the producers, waiting not counted
    collector_us: float  # of processor time per record in the collector, all threads, the store's writer too


def make_records(count: int, name: str, *, top_k: int = 32) -> list[TokenRecord]:
    """Records of one layer, a hundred to a request."""
    random = np.random.default_rng(0)
    histogram = random.dirichlet(np.ones(fp.BINS), count).astype(np.float32)
    fingerprints = fp.assemble(histogram, random.random(count).astype(np.float32))
    positions = np.arange(top_k, dtype=np.int32)[None]
    scores = np.sort(random.dirichlet(np.ones(top_k), count).astype(np.float32))[:, None, ::-1]
    return [
        TokenRecord(
            request_id=f"{name}-{i // 100}",
            query_position=100 + i % 100,
            layers=(29,),
            token_positions=positions,
            attention_scores=scores[i],
            fingerprints=fingerprints[i : i + 1],
            decode_step=i % 100,
            model="benchmark",
            span_mass=np.zeros((1, 0), np.float32),
        )
        for i in range(count)
    ]


def produce(address: str, name: str, count: int, top_k: int) -> None:
    """A producer process: says that it is ready, waits for a line, sends, and prints what it took."""
    from dataclasses import replace

    from attnhook.errors import DroppedError
    from attnhook.sinks.zmq import ZmqSink

    block = make_records(min(count, 100 * BATCH), name, top_k=top_k)
    sink = ZmqSink()
    sink.open(f"{address}?linger=60s")
    print("ready", flush=True)
    sys.stdin.readline()
    began, turn, made, spare = time.process_time(), 0, 0, 0.0
    while made < count:
        at = made % len(block)
        batch = block[at : at + min(BATCH, count - made)]
        if made and at == 0:
            turn += 1
        if turn:  # the same numbers under other request ids; made outside of the clock
            mark = time.process_time()
            batch = [replace(record, request_id=f"{record.request_id}+{turn}") for record in batch]
            spare += time.process_time() - mark
        while True:
            try:
                sink.write(batch)
                break
            except DroppedError:
                time.sleep(0.001)
        made += len(batch)
    taken = time.process_time() - began - spare
    sink.close()
    print(json.dumps({"sent": sink.sent, "seconds": taken}), flush=True)


def measure(records: int, producers: int, store: str, *, top_k: int = 32, queue: str = "256MB") -> Figures:
    """One run with a collector of its own."""
    import psutil

    each = records // producers
    with tempfile.TemporaryDirectory() as folder, collector(Path(folder), store, queue) as (address, stats):
        workers = [
            _start("--produce", address, f"p{i}", str(each), str(top_k), stdin=subprocess.PIPE)
            for i in range(producers)
        ]
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        process = psutil.Process(stats()["pid"])
        before = sum(process.cpu_times()[:2])
        began = time.monotonic()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        total, received_at = each * producers, 0.0
        while True:
            now = stats()
            counted = now["records"]
            if not received_at and counted["received"] + counted["lost"] >= total:
                received_at = time.monotonic()
            (kept,) = now["stores"].values()
            dropped = sum(sum(reasons.values()) for reasons in counted["dropped"].values())
            if received_at and kept["written"] + dropped >= counted["received"]:
                break
            time.sleep(0.1)  # each look costs the collector a millisecond or two
        ended = time.monotonic()
        spent = sum(process.cpu_times()[:2]) - before
        said = [json.loads(worker.communicate()[0]) for worker in workers]
        if sum(one["sent"] for one in said) != total or counted["received"] + counted["lost"] != total:
            raise RuntimeError(f"{total} records were to be sent; producers say {said}, the collector {counted}")
        return Figures(
            total,
            counted["received"] / (received_at - began),
            kept["written"] / (ended - began),
            dropped,
            counted["lost"],
            1e6 * sum(one["seconds"] for one in said) / total,
            1e6 * spent / total,
        )


@contextmanager
def collector(folder: Path, store: str, queue: str) -> Iterator[tuple[str, Any]]:
    """A collector process: the address for producers, and a function that gets its stats."""
    scheme, _, name = store.partition(":")
    process = _start(
        "--collect", "collect", "--store", f"{scheme}:{folder / (name or 'store')}",
        "--listen", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0", "--queue", queue,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("collecting on "):
        raise RuntimeError(f"the collector did not start: {line}")
    address, url = line.split()[2], line.split()[-1]

    def stats() -> dict[str, Any]:
        with urllib.request.urlopen(url, timeout=30) as reply:
            found: dict[str, Any] = json.load(reply)
            return found

    try:
        yield address, stats
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _start(*arguments: str, stdin: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.collector", *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True, env=environ)


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["--produce"]:
        address, name, count, top_k = sys.argv[2:6]
        produce(address, name, int(count), int(top_k))
        return
    if sys.argv[1:2] == ["--collect"]:
        from attnhook.cli.app import main as attnhook

        sys.argv[1:2] = []
        attnhook()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=400_000)
    parser.add_argument("--producers", type=int, default=1)
    parser.add_argument("--stores", nargs="+", default=["sqlite:x.db"], help="schemes and names: sqlite:x.db parquet:x")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queue", default="256MB", help="the collector's --queue")
    options = parser.parse_args()

    print(
        f"{options.records:,} records of top-k {options.top_k}, {options.producers} producer(s), queue {options.queue}"
    )
    print(f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| store | received / s | stored / s | dropped by the store's queue | lost | producer µs / record "
        "| collector µs / record |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for _ in range(options.rounds):
        for store in options.stores:
            found = measure(options.records, options.producers, store, top_k=options.top_k, queue=options.queue)
            print(
                f"| {store.partition(':')[0]} | {found.received:,.0f} | {found.stored:,.0f} | {found.dropped:,} "
                f"| {found.lost:,} | {found.producer_us:.1f} | {found.collector_us:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
