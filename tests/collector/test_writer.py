"""A store's writer with stores that misbehave, and what a new collector makes of a journal that was left behind."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import Counter
from typing import ClassVar

import pytest

from attnhook import hookimpl
from attnhook.collector.service import Collector
from attnhook.collector.writer import StoreWriter
from attnhook.errors import PluginError
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.record.block import read_rows
from attnhook.sinks import frames
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from tests.collector.processes import wait_for
from tests.sinks.samples import record, with_ids


class Difficult(Sink):
    """``difficult:`` refuses positions that end in 3 for good, and everything while `broken`."""

    broken = 0
    stored: ClassVar[list[int]] = []
    opened = 0

    def open(self, config: str) -> None:
        type(self).opened += 1

    def write(self, batch) -> None:
        if self.broken:
            type(self).broken -= 1
            raise OSError(28, "No space left on device")
        if any(one.query_position % 10 == 3 for one in batch):
            raise ValueError("a three")
        self.stored.extend(one.query_position for one in batch)


class Plugin:
    @hookimpl
    def attnhook_register_sinks(self, register) -> None:
        register("difficult", Difficult)


@pytest.fixture
def difficult():
    plugin = Plugin()
    plugins.manager().register(plugin)
    Difficult.broken, Difficult.stored, Difficult.opened = 0, [], 0
    yield Difficult
    plugins.manager().unregister(plugin)


def block(*positions: int):
    return read_rows([record(i).to_bytes() for i in positions])[0]


def writer(told: list, refused: Counter, **options) -> StoreWriter:
    return StoreWriter(
        "difficult:",
        max_bytes=options.pop("max_bytes", 10**6),
        written=lambda url, number: told.append(number),
        refused=lambda url, count: refused.update({url: count}),
    )


def test_what_a_store_refuses_is_found_and_the_rest_is_written_in_order(difficult):
    told, refused = [], Counter()
    found = writer(told, refused)
    for number in range(5):
        found.put(block(*range(10 * number, 10 * number + 10)), number)
    found.start()
    assert found.stop(60)
    assert difficult.stored == [i for i in range(50) if i % 10 != 3]
    assert refused == {"difficult:": 5} and told[-1] == 4
    assert found.stats()["written"] == 45


@pytest.mark.slow
def test_a_write_that_fails_is_tried_again_and_the_store_opened_anew(difficult):
    difficult.broken = 5
    told: list[int] = []
    found = writer(told, Counter())
    found.start()
    found.put(block(1, 2), 7)
    wait_for(lambda: found.stats()["error"], "an error")
    assert "No space left" in found.stats()["error"] and told == []
    assert found.stop(60)
    assert difficult.stored == [1, 2] and told == [7] and difficult.opened == 2
    assert found.stats() == {
        "written": 2, "duplicates": None, "queued": 0, "queued_bytes": 0, "retries": 5, "error": None,
    }  # fmt: skip


def test_a_store_that_never_comes_back_does_not_hold_up_the_end(difficult):
    difficult.broken = 10**6
    told: list[int] = []
    found = writer(told, Counter())
    found.start()
    found.put(block(1), 0)
    assert not found.stop(0.5)
    assert told == [] and difficult.stored == []


def test_the_wait_before_another_try_does_not_hold_up_the_end(difficult, monkeypatch):
    monkeypatch.setattr("attnhook.collector.writer.RETRY_SECONDS", (600.0,))
    difficult.broken = 10**6
    found = writer([], Counter())
    found.start()
    found.put(block(1), 0)
    wait_for(lambda: found.stats()["error"], "an error")
    began = time.monotonic()
    assert not found.stop(0.1)
    assert time.monotonic() - began < 60
    assert found.stats()["queued"] == 1 and not found.alive


def test_what_waits_is_counted_without_a_lock(difficult):
    told: list[int] = []
    found = writer(told, Counter())
    seen = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            stats = found.stats()
            seen.append((stats["queued"], stats["queued_bytes"]))

    threads = [threading.Thread(target=watch) for _ in range(2)]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        found.start()
        for thread in threads:
            thread.start()
        one = block(1, 2)
        for number in range(2000):
            found.put(one, number)
        assert found.stop(60)
    finally:
        sys.setswitchinterval(interval)
        watching.set()
        for thread in threads:
            thread.join()
    assert found.stats()["queued"] == found.stats()["queued_bytes"] == 0
    assert found.stats()["written"] == 4000 and told[-1] == 1999
    assert min(seen) >= (0, 0) and all(bytes_ == rows // 2 * one.nbytes for rows, bytes_ in seen)


def test_the_queue_is_bounded_in_bytes_and_takes_one_block_of_any_size(difficult):
    size = block(1).nbytes
    found = writer([], Counter(), max_bytes=2 * size)
    assert found.has_room(100 * size)
    found.put(block(1), None)
    assert found.has_room(size) and not found.has_room(size + 1)
    found.put(block(2), None)
    assert not found.has_room(1)
    found.start()
    assert found.stop(60)


@pytest.mark.parametrize("store", ["parquet:data", "parquet:data?hash_ids=1", "sqlite:x.db", "sqlite:x.db?hash_ids=1"])
def test_what_was_written_and_not_acknowledged_is_not_written_twice(tmp_path, store):
    """The journal says that the store has nothing, the store has half: a kill between the two leaves that."""
    scheme, _, rest = store.partition(":")
    url = f"{scheme}:{tmp_path}/{rest}"
    records = [record(i, request_id=f"r{i % 50}") for i in range(200)]
    first = Collector("tcp://127.0.0.1:*", [url], journal=tmp_path / "j")
    for start in range(0, 200, 20):  # its writers never start: it is killed before they could
        first._handle(frames.encode(bytes(16), start, {}, [one.to_bytes() for one in records[start : start + 20]]))
    abandon(first)
    before = open_sink(url)
    before.write(records[:100])
    before.close()

    second = Collector("tcp://127.0.0.1:*", [url], journal=tmp_path / "j")
    second.start()
    assert second.stop(drain=0)
    assert second.stats()["records"]["received"] == 200
    keys: Counter = Counter()
    with open_store(url) as opened:
        for batch in opened.fingerprints(columns=("request_id", "query_position")):
            keys.update(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    assert sorted(position for _, position in keys) == list(range(200)) and set(keys.values()) == {1}

    third = Collector("tcp://127.0.0.1:*", [url], journal=tmp_path / "j")
    assert third.replayed == 0 and third.stats()["records"]["received"] == 200
    third.start()
    third.stop(drain=0)


@pytest.mark.parametrize("option", ["", "?tokens=1", "?hash_ids=1"])
def test_token_ids_reach_a_store_that_asks_and_no_journal_of_one_that_does_not(tmp_path, option):
    token = 0x5A5B5C5D  # no other number here looks like it
    url = f"sqlite:{tmp_path}/x.db{option}"
    rows = [with_ids(i, query_token=token).to_bytes() for i in range(20)] + [
        record(20 + i).to_bytes() for i in range(20)
    ]
    first = Collector("tcp://127.0.0.1:*", [url], journal=tmp_path / "j")
    first._handle(frames.encode(bytes(16), 0, {}, rows))  # its writers never start: it is killed before they could
    journal = b"".join(file.read_bytes() for file in (tmp_path / "j").iterdir())
    assert (token.to_bytes(4, "little") in journal) == (option == "?tokens=1")
    abandon(first)

    second = Collector("tcp://127.0.0.1:*", [url], journal=tmp_path / "j")
    second.start()
    assert second.stop(drain=0)
    assert second.stats()["records"]["received"] == 40 and not second.stats()["records"]["bad"]
    with open_store(url) as opened:
        found = list(opened.records())
    assert len(found) == 40
    ids = [one.query_token for one in found if one.token_ids is not None]
    assert ids == ([token] * 20 if option == "?tokens=1" else [])


def test_a_damaged_store_or_none_at_all_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(PluginError, match=r"x\.db"):
        Collector("tcp://127.0.0.1:*", [f"sqlite:{path}"])
    assert path.read_bytes() == b"no database" * 1000
    for stores, said in (
        ([], "no store"),
        (["memory:"], "--journal"),
        ([f"sqlite:{tmp_path}/a.db"] * 2, "named twice"),
        ([f"sqlite:{tmp_path}/none/a.db"], "make its folder"),
        (["nonsense:x"], "nonsense:x"),
    ):
        with pytest.raises(PluginError, match=said):
            Collector("tcp://127.0.0.1:*", stores)
    for listen in ("127.0.0.1:9001", "udp://127.0.0.1:9001", "tcp://127.0.0.1", "tcp://192.0.2.1:9001"):
        with pytest.raises(PluginError):
            Collector(listen, [f"sqlite:{tmp_path}/b.db"])
    shutil.rmtree(tmp_path / "b.db.journal")
    Collector("tcp://127.0.0.1:*", [f"sqlite:{tmp_path}/b.db"]).receiver.close()  # nothing was left locked


def abandon(collector: Collector) -> None:
    """Leave what a collector that is killed before its writers start leaves."""
    collector.receiver.close()
    collector.journal.close()
    for lock in collector._locks:
        lock.close()
    for writer in collector._writers:
        writer.abandon()
