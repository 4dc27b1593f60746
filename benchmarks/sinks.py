"""Records a second into each sink, against the obvious ways to store them, and what a record costs its producer.

Fingerprint records (one layer, as ``ATTNHOOK_CAPTURE_ALL=fingerprint`` captures them) and raw ones (one layer,
k = 32), written by batches of 1,024 as attnhook's delivery does, and the sink closed: what is timed ends when
every row is where its reader finds it. The alternatives write one record at a time. All modes run in turn in every
round; the slow ones on fewer records. Every mode's records are counted afterwards by another reader.

    python -m benchmarks.sinks --records 100000 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.delivery import Delivery
from attnhook.sinks.opening import open_sink
from attnhook.sinks.record_writers import BATCH

STEP = 64  # records that one engine step puts at once: a batch of 64 sequences


@dataclass(frozen=True)
class Mode:
    """One way to store records in a folder, and how to count what is there afterwards."""

    name: str
    write: Callable[[Path, Sequence[TokenRecord]], None]
    count: Callable[[Path], int]
    share: float = 1.0  # of the records: the slow ways get fewer


def make_records(kind: str, count: int) -> list[TokenRecord]:
    """Records of random attention, 200 tokens a request; fresh objects, which know nothing of their zones yet."""
    random = np.random.default_rng(0)
    k = 0 if kind == "fingerprint" else 32
    weights = random.dirichlet(np.full(fp.BINS, 0.3), size=(count, 1)).astype(np.float32)
    fingerprints = fp.assemble(weights, random.random((count, 1), np.float32))
    positions = random.integers(0, 2000, (count, 1, k)).astype(np.int32)
    scores = -np.sort(-random.random((count, 1, k), np.float32)) / max(k, 1)
    spans = np.zeros((count, 1, 0), np.float32)
    return [
        TokenRecord(
            request_id=f"chatcmpl-{i // 200:032x}",
            query_position=500 + i % 200,
            layers=(29,),
            token_positions=positions[i],
            attention_scores=scores[i],
            fingerprints=fingerprints[i],
            decode_step=i % 200,
            mode="fingerprint" if k == 0 else "raw",
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            span_mass=spans[i],
        )
        for i in range(count)
    ]


def through_sink(url: str) -> Callable[[Path, Sequence[TokenRecord]], None]:
    """Write by batches into the sink that ``url`` names inside the folder."""

    def write(folder: Path, records: Sequence[TokenRecord]) -> None:
        sink = open_sink(url.format(folder))
        for start in range(0, len(records), BATCH):
            sink.write(records[start : start + BATCH])
            sink.flush()
        sink.close()

    return write


def line_per_record(folder: Path, records: Sequence[TokenRecord]) -> None:
    """``open(..., "a")`` and one JSON line for each record."""
    for record in records:
        with open(folder / "records.jsonl", "a") as file:
            file.write(json.dumps({"request_id": record.request_id, **record.to_dict()}) + "\n")


def insert_per_record(pragmas: Sequence[str]) -> Callable[[Path, Sequence[TokenRecord]], None]:
    """One INSERT and commit for each record, with the same columns and key."""

    def write(folder: Path, records: Sequence[TokenRecord]) -> None:
        connection = sqlite3.connect(folder / "records.db")
        for pragma in pragmas:
            connection.execute(pragma)
        connection.execute(
            "CREATE TABLE records (request_id TEXT, choice INTEGER, query_position INTEGER, decode_step INTEGER, "
            "model TEXT, time REAL, zone TEXT, fingerprint BLOB, record BLOB, "
            "PRIMARY KEY (request_id, choice, query_position))"
        )
        for record in records:
            connection.execute(
                "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *record.key,
                    record.decode_step,
                    record.model,
                    time.time(),
                    record.zone,
                    record.fingerprint.tobytes(),
                    record.to_bytes(),
                ),
            )
            connection.commit()
        connection.close()

    return write


def count_lines(folder: Path) -> int:
    """Lines of the JSONL file."""
    with open(folder / "records.jsonl", "rb") as file:
        return sum(1 for _ in file)


def count_rows(folder: Path) -> int:
    """Rows of the SQLite file."""
    return int(sqlite3.connect(folder / "records.db").execute("SELECT count(*) FROM records").fetchone()[0])


def count_parquet(folder: Path) -> int:
    """Rows of the data set, by pyarrow alone."""
    return sum(pq.read_metadata(file).num_rows for file in (folder / "records").rglob("*.parquet"))


#: Other sinks join by a line here.
MODES: tuple[Mode, ...] = (
    Mode('open(..., "a"), a JSON line per record', line_per_record, count_lines, 0.05),
    Mode("INSERT and commit per record", insert_per_record(()), count_rows, 0.01),
    Mode(
        "the same with WAL",
        insert_per_record(["PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL"]),
        count_rows,
        0.05,
    ),
    Mode("jsonl:", through_sink("jsonl:{}/records.jsonl"), count_lines),
    Mode("sqlite:", through_sink("sqlite:{}/records.db"), count_rows),
    Mode("parquet:", through_sink("parquet:{}/records"), count_parquet),
)


@dataclass(frozen=True)
class Run:
    """Records a second of time and of this process's CPU time, and bytes of a record on disk."""

    wall: float
    cpu: float
    size: float


def measure(mode: Mode, kind: str, count: int) -> Run:
    """One run of one mode."""
    records = make_records(kind, max(int(count * mode.share), 100))
    folder = Path(tempfile.mkdtemp(prefix="attnhook-bench-"))
    try:
        started, cpu = time.perf_counter(), time.process_time()
        mode.write(folder, records)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        stored = mode.count(folder)
        assert stored == len(records), f"{mode.name}: {stored} of {len(records)} records are there"
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    finally:
        shutil.rmtree(folder)
    return Run(len(records) / seconds, len(records) / cpu, size / len(records))


@dataclass(frozen=True)
class Put:
    """What a call costs the thread that makes it, microseconds a record: its CPU time, its time, and the slowest 1%."""

    cpu: float
    wall: float
    worst: float
    dropped: int = 0


def clock(
    call: Callable[[Sequence[TokenRecord]], object], records: Sequence[TokenRecord], step: int, pause: float
) -> Put:
    """Call with ``step`` records at a time, ``pause`` seconds apart, as an engine puts those of its steps."""
    walls, cpu = [], 0.0
    for start in range(0, len(records), step):
        batch = records[start : start + step]
        wall, own = time.perf_counter(), time.thread_time()
        call(batch)
        cpu += time.thread_time() - own
        walls.append((time.perf_counter() - wall) / len(batch))
        if pause:
            time.sleep(pause)
    walls.sort()
    return Put(cpu / len(records) * 1e6, statistics.fmean(walls) * 1e6, walls[int(len(walls) * 0.99)] * 1e6)


def measure_put(url: str, step: int, pause: float) -> Put:
    """`Delivery.put` of 2,000 steps while the sink's thread writes; no url: an empty function in its place."""
    records = make_records("fingerprint", 2000 * step)
    if not url:
        return clock(len, records, step, pause)
    folder = Path(tempfile.mkdtemp(prefix="attnhook-bench-"))
    try:
        with Delivery.from_urls([url.format(folder)], queue_size=len(records), observe=False) as delivery:
            found = clock(delivery.put, records, step, pause)
            delivery.flush()
            (stats,) = delivery.stats().values()
        assert stats["written"] + sum(stats["dropped"].values()) == len(records)
    finally:
        shutil.rmtree(folder)
    return replace(found, dropped=sum(stats["dropped"].values()))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("attnhook", "pyarrow"))
    load = os.getloadavg()[0]

    print(
        f"{versions}, SQLite {sqlite3.sqlite_version}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load before the run {load:.1f}, {options.records} records, medians of {options.rounds} rounds\n"
    )
    for kind in ("fingerprint", "raw"):
        found: dict[str, list[Run]] = {mode.name: [] for mode in MODES}
        for turn in range(options.rounds):
            for mode in (*MODES[turn % len(MODES) :], *MODES[: turn % len(MODES)]):
                found[mode.name].append(measure(mode, kind, options.records))
        base = statistics.median(run.wall for run in found[MODES[0].name])
        print(
            f"| {kind} records | records/s | range over rounds | per CPU second | against a JSON line per record "
            "| bytes a record |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for name, runs in found.items():
            rates = [run.wall for run in runs]
            middle = statistics.median(rates)
            print(
                f"| {name} | {middle:,.0f} | {min(rates):,.0f} to {max(rates):,.0f} "
                f"| {statistics.median(run.cpu for run in runs):,.0f} | {middle / base:.1f} | {runs[0].size:,.0f} |"
            )
        print()
    print("| records a put | between puts | into | CPU µs/record | wall µs/record | 99th percentile | dropped |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    urls = {"nothing (the clock)": "", "sqlite:": "sqlite:{}/records.db", "parquet:": "parquet:{}/records"}
    for step, pause in ((1, 0.0), (1, 0.001), (8, 0.001), (STEP, 0.001)):
        for name, url in urls.items():
            rounds = sorted((measure_put(url, step, pause) for _ in range(options.rounds)), key=lambda put: put.cpu)
            put = rounds[len(rounds) // 2]
            print(
                f"| {step} | {pause * 1000:g} ms | {name} | {put.cpu:.2f} | {put.wall:.2f} | {put.worst:.2f} "
                f"| {put.dropped} |"
            )


if __name__ == "__main__":
    main()
