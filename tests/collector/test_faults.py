"""The collector's processes are killed, starved of disk, crowded and sent nonsense; every record is accounted for."""

from __future__ import annotations

import os
import pickle
import socket
import sqlite3
import subprocess
import time
from collections import Counter

import msgpack
import pytest
import zmq

from attnhook.sinks import frames
from attnhook.store import open_store
from tests.collector.processes import PATIENCE, Collect, collect, outcome, producer, wait_for
from tests.sinks.samples import record, small_disk

pytestmark = pytest.mark.timeout(600)


def keys(url: str) -> Counter[tuple[str, int, int]]:
    """How often each key is in a store."""
    found: Counter[tuple[str, int, int]] = Counter()
    with open_store(url) as store:
        for batch in store.fingerprints(columns=("request_id", "choice", "query_position")):
            found.update(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    return found


def sent_keys(name: str, sent: int) -> set[tuple[str, int, int]]:
    return {(f"{name}-{i // 50}", 0, i % 50) for i in range(sent)}


def received(collector: Collect, count: int) -> dict | None:
    """The stats if so many records have come."""
    now = collector.stats()
    return now if now["records"]["received"] == count else None


def settled(collector: Collect, sent: int) -> dict:
    """The stats once everything that was sent has come or is known to be lost, and is written."""

    def stats() -> dict | None:
        now = collector.stats()
        counted = now["records"]["received"] + now["records"]["lost"]
        return now if counted == sent and not any(s["queued"] for s in now["stores"].values()) else None

    return wait_for(stats, f"{sent} records accounted for")


def go(*processes: subprocess.Popen[str], say: str = "go") -> None:
    """Let producers begin that are all connected."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(say + "\n")
        process.stdin.flush()


@pytest.mark.slow
def test_killed_under_load_and_started_again_every_record_is_stored_or_counted_as_lost(tmp_path):
    """Two stores, two producers that live through it; what was received before the kill -9 is stored after it."""
    stores = ["--store", "sqlite:x.db", "--store", "parquet:data?every=1s"]
    with collect(tmp_path, *stores) as first:
        workers = {name: producer(first.address, name, 100, 250, 0.02) for name in ("a", "b")}
        go(*workers.values(), say="wait")
        before = wait_for(lambda: (now := first.stats())["records"]["received"] > 5000 and now, "5000 records")
        first.kill()
    # ZeroMQ's port; producers find the new process by themselves
    with collect(tmp_path, *stores, listen=first.address) as second:
        for worker in workers.values():
            assert worker.stdout.readline() == "sent\n"
            worker.stdin.write("end\n")
        said = {name: outcome(worker) for name, worker in workers.items()}
        total = sum(one["sent"] for one in said.values())
        stats = settled(second, total)
        assert (
            second.stop()
            == f"stopped: {stats['records']['received']} records received, {stats['records']['lost']} lost\n"
        )
    assert stats["records"]["dropped"] == {} and stats["records"]["bad"] == {} and stats["records"]["repeated"] == 0
    assert sum(stats["producers"]["dropped"].values()) == sum(
        one["dropped"].get("collector_busy", 0) for one in said.values()
    )
    everything = set().union(*(sent_keys(name, one["sent"]) for name, one in said.items()))
    for url in ("sqlite:x.db", "parquet:data"):
        scheme, _, path = url.partition(":")
        stored = keys(f"{scheme}:{tmp_path / path}")
        assert max(stored.values()) == 1, "a record is there twice"
        assert set(stored) <= everything
        assert len(stored) + stats["records"]["lost"] == total
        assert len(stored) >= before["records"]["received"]
    with sqlite3.connect(tmp_path / "x.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_sigterm_writes_what_was_sent_and_what_is_queued(tmp_path):
    with collect(tmp_path, "--store", "sqlite:x.db") as collector:
        worker = producer(collector.address, "a", 40, 500)
        go(worker)
        said = outcome(worker)  # it ended, so the system has all it sent
        out = collector.stop()
        assert collector.process.returncode == 0
    assert out == f"stopped: {said['sent']} records received, 0 lost\n"
    assert set(keys(f"sqlite:{tmp_path / 'x.db'}")) == sent_keys("a", said["sent"])


@pytest.mark.slow
def test_sigterm_under_load_what_comes_too_late_is_counted_by_the_next_run(tmp_path):
    with collect(tmp_path, "--store", "sqlite:x.db", "--drain-seconds", "0.2") as first:
        worker = producer(first.address, "a", 150, 200, 0.02)
        go(worker, say="wait")
        wait_for(lambda: first.stats()["records"]["received"] > 2000, "2000 records")
        first.stop()
        assert "producers were still sending" in first.log.read_text()
    with collect(tmp_path, "--store", "sqlite:x.db", listen=first.address) as second:
        assert worker.stdout.readline() == "sent\n"
        worker.stdin.write("end\n")
        said = outcome(worker)
        stats = settled(second, said["sent"])
        second.stop()
    assert len(keys(f"sqlite:{tmp_path / 'x.db'}")) + stats["records"]["lost"] == said["sent"]


@pytest.mark.slow
def test_eight_producers_at_once(tmp_path):
    with collect(tmp_path, "--store", "sqlite:x.db") as collector:
        workers = {f"w{i}": producer(collector.address, f"w{i}", 10, 250) for i in range(8)}
        go(*workers.values())
        said = {name: outcome(worker) for name, worker in workers.items()}
        stats = settled(collector, sum(one["sent"] for one in said.values()))
        assert stats["records"]["lost"] == 0 and stats["producers"]["seen"] == 8
        collector.stop()
    stored = keys(f"sqlite:{tmp_path / 'x.db'}")
    assert set(stored) == set().union(*(sent_keys(name, one["sent"]) for name, one in said.items()))


def fill(disk):
    """A file that takes all the room that is left; its path."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    return ballast


@pytest.mark.slow
def test_a_full_disk_is_reported_and_nothing_is_lost_when_there_is_room_again(tmp_path):
    with small_disk(tmp_path / "disk", 12_000) as disk, collect(tmp_path, "--store", "sqlite:disk/x.db") as collector:
        worker = producer(collector.address, "a", 20, 250)
        ballast = fill(disk)
        go(worker)
        said = outcome(worker)
        stats = wait_for(
            lambda: (now := collector.stats())["problems"] and now["records"]["received"] == said["sent"] and now,
            "a problem",
        )
        assert any("disk" in problem for problem in stats["problems"]), stats["problems"]
        assert stats["journal"]["failed"] > 0  # that disk is full as well
        assert collector.get("/health") == (503, b'{"status":"failing"}')
        written = stats["stores"]["sqlite:disk/x.db"]["written"]
        assert written < said["sent"]
        ballast.unlink()
        wait_for(
            lambda: collector.stats()["stores"]["sqlite:disk/x.db"]["written"] == said["sent"], "all records written"
        )
        # the journal is used again as soon as there is something to put there
        second = producer(collector.address, "b", 1, 50)
        go(second)
        outcome(second)
        stats = settled(collector, said["sent"] + 50)
        assert stats["problems"] == [] and stats["records"]["lost"] == 0
        assert stats["records"]["dropped"] == {}
        collector.stop()
        assert set(keys(f"sqlite:{disk / 'x.db'}")) == sent_keys("a", said["sent"]) | sent_keys("b", 50)
        assert "does not take records, trying again" in collector.log.read_text()


@pytest.mark.slow
def test_a_store_that_stays_full_drops_by_count_and_the_journal_keeps_the_rest(tmp_path):
    """The journal lies on a good disk: the queue's bound is what drops, and the next run writes what was queued."""
    with small_disk(tmp_path / "disk", 3_000) as disk:
        url = f"sqlite:{disk / 'x.db'}"
        arguments = ["--store", url, "--journal", str(tmp_path / "journal"), "--stop-seconds", "1"]
        with collect(tmp_path, *arguments, "--queue", "1MB") as first:
            worker = producer(first.address, "a", 40, 250)
            fill(disk)
            go(worker)
            said = outcome(worker)
            stats = wait_for(
                lambda: (now := first.stats())["records"]["received"] == said["sent"] and now, "all received"
            )
            dropped = stats["records"]["dropped"][url]["queue_full"]
            assert 0 < dropped < said["sent"]
            first.stop()
            assert first.process.returncode == 1
            assert "waits in" in first.log.read_text()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        with collect(tmp_path, *arguments) as second:
            stats = settled(second, said["sent"])
            assert stats["journal"]["replayed"] > 0
            second.stop()
        assert stats["records"]["dropped"][url] == {"queue_full": dropped}
        assert len(keys(url)) + dropped == said["sent"]


@pytest.mark.slow
def test_nonsense_is_counted_by_kind_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    row = record().to_bytes()
    name = bytes(16)
    messages = {
        "pickle": [pickle.dumps(Bomb(), protocol=protocol) for protocol in range(2, 6)],
        "not_msgpack": [
            b"",
            b"\xc1",
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(64) + b"\xc1",
            pickle.dumps(Bomb(), protocol=0),
        ],
        "not_a_frame": [msgpack.packb(7), msgpack.packb({"a": 1}), msgpack.packb(["other", 1, 2])],
        "frame_version": [msgpack.packb([frames.FORMAT, 99, "records", name, 0, {}, [row]])],
        "damaged_frame": [
            msgpack.packb([frames.FORMAT, 1, "records", name, 0, {}]),
            msgpack.packb([frames.FORMAT, 1, "records", b"short", 0, {}, [row]]),
            msgpack.packb([frames.FORMAT, 1, "records", name, -1, {}, [row]]),
            msgpack.packb([frames.FORMAT, 1, "records", name, 2**60, {}, [row]]),
            msgpack.packb([frames.FORMAT, 1, "records", name, 0, {"x": "y"}, [row]]),
            msgpack.packb([frames.FORMAT, 1, "records", name, 0, {}, ["text"]]),
            msgpack.packb([frames.FORMAT, 1, "end", name, 0, {}, [row]]),
        ],
    }
    other_version = bytearray(row)
    other_version[2] = 9
    nan = bytearray(row)
    nan[-4 * 2 - 4 : -4 * 2] = b"\xff\xff\xff\x7f"  # the last number of a fingerprint, before two span masses
    rows = [row, row[:-1], b"", bytes(other_version), bytes(nan), record(1).to_bytes()]
    with collect(tmp_path, "--store", "sqlite:x.db") as collector, zmq.Context() as context:
        host, port = collector.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
            # an old form of ZeroMQ's protocol has no greeting: such bytes can pass for messages
            counted = wait_for(
                lambda: (now := collector.stats()["messages"]) and (now["strangers"] or now["rejected"]) and now,
                "a count",
            )
        push = context.socket(zmq.PUSH)
        push.linger = 60_000
        push.connect(collector.address)
        for some in messages.values():
            for message in some:
                push.send(message)
        push.send(frames.encode(name, 0, {}, rows))
        push.send_multipart([frames.encode(name, len(rows), {}, [record(2).to_bytes()])[:50], b"rest"])
        push.send(frames.encode(name, len(rows), {}, [record(2).to_bytes()]))
        stats = wait_for(
            lambda: (now := collector.stats())["records"]["received"] == len(rows) + 1 and now, "the good ones"
        )
        push.close()
        expected = Counter({kind: len(some) for kind, some in messages.items()}) + Counter(counted["rejected"])
        expected["not_msgpack"] += 1  # the frame that was cut
        assert stats["messages"]["rejected"] == expected
        assert stats["records"]["bad"] == {"damaged_record": 3, "record_version": 1}
        assert stats["messages"]["failed"] == 0 and stats["problems"] == []
        # a message longer than any frame ends its connection, not the collector
        giant = context.socket(zmq.PUSH)
        giant.linger = 0
        giant.connect(collector.address)
        giant.send(bytes(frames.MAX_BYTES + 1))
        last = producer(collector.address, "z", 1, 50)
        go(last)
        outcome(last)
        wait_for(lambda: collector.stats()["records"]["received"] == len(rows) + 1 + 50, "records after it")
        giant.close()
        collector.stop()
    assert len(keys(f"sqlite:{tmp_path / 'x.db'}")) == 3 + 50
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_a_second_collector_on_a_store_and_ports_in_use_are_refused_by_name(tmp_path):
    other = ["--store", "sqlite:y.db"]
    with collect(tmp_path, "--store", "sqlite:x.db") as collector:

        def refused(*arguments: str, listen: str = "tcp://127.0.0.1:*") -> str:
            with pytest.raises(RuntimeError) as error:
                Collect(tmp_path, *arguments, listen=listen)
            text = str(error.value)
            assert text.splitlines()[-1].startswith("error: ") and "Traceback" not in text
            return text

        text = refused("--store", f"sqlite:{tmp_path}/./x.db")
        assert f"another collector already (process {collector.process.pid})" in text
        assert "another process has that port" in refused(*other, listen=collector.address)
        taken = collector.url.removeprefix("http://")
        assert "another process has that port" in refused(*other, "--http", taken)
        assert "give a token" in refused(*other, "--http", "0.0.0.0:0")
        # all the while the first one works
        worker = producer(collector.address, "a", 1, 50)
        go(worker)
        outcome(worker)
        settled(collector, 50)


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
/* The wall clock is ten days off while the file named by JUMP exists. */
int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, t);
    if (clock == CLOCK_REALTIME && access(getenv("JUMP"), F_OK) == 0) t->tv_sec -= 864000;
    return result;
}
"""


@pytest.mark.slow
def test_a_clock_that_jumps_back_ten_days_changes_no_rate_and_loses_nothing(tmp_path):
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler to make a clock with: {error}")
    jump = tmp_path / "jump"
    with collect(tmp_path, "--store", "sqlite:x.db", LD_PRELOAD=str(library), JUMP=str(jump)) as collector:
        for name in ("a", "b"):
            worker = producer(collector.address, name, 2, 250)
            go(worker)
            outcome(worker)
            stats = settled(collector, 500 if name == "a" else 1000)
            jump.touch()
        assert stats["records"]["lost"] == 0 and stats["problems"] == []
        assert 0 <= stats["uptime_seconds"] < PATIENCE * 3
        assert 0 < stats["seen"]["recent"]["rate"] <= 1000 and stats["seen"]["recent"]["seconds"] <= 61
        collector.stop()
    with open_store(f"sqlite:{tmp_path / 'x.db'}") as store:
        times = {row["request_id"][0]: row["time"] for batch in store.fingerprints() for row in batch.to_pylist()}
        assert store.count() == 1000
    assert (times["a"] - times["b"]).days >= 9, "the clock did not jump"
    assert abs(times["a"].timestamp() - time.time()) < 3600
