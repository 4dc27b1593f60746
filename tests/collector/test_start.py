"""A collector starts whatever its journal holds, keeps what can be kept, and says what it left out."""

from __future__ import annotations

import logging
import struct
from zlib import crc32

import msgpack
import pytest

from attnhook.collector.journal import Journal
from attnhook.collector.ledger import MAX_COUNT
from attnhook.collector.service import Collector
from attnhook.sinks import frames
from attnhook.store import open_store
from tests.collector.test_writer import abandon
from tests.sinks.samples import record


def url(folder) -> str:
    return f"sqlite:{folder / 'x.db'}"


def started(folder) -> Collector:
    return Collector("tcp://127.0.0.1:*", [url(folder)], journal=folder / "j")


def run_and_stop(folder) -> dict:
    """Start a collector, let it write what waits, stop it; its stats."""
    collector = started(folder)
    collector.start()
    assert collector.stop(drain=0)
    return collector.stats()


def stored(folder) -> int:
    with open_store(url(folder)) as store:
        return store.count()


def entry(meta: object, body: bytes = b"", *, packed: bytes | None = None) -> bytes:
    packed = msgpack.packb(meta) if packed is None else packed
    return struct.pack("<III", len(packed), len(body), crc32(body, crc32(packed))) + packed + body


def good_frame(first: int, producer: bytes = bytes(16)) -> bytes:
    return frames.encode(producer, first, {}, [record(first).to_bytes()])


@pytest.mark.slow
def test_absurd_counters_stop_at_a_bound_and_the_collector_starts_again_and_again(tmp_path):
    row = record().to_bytes()
    collector = started(tmp_path)
    for i in range(2100):
        collector._handle(frames.encode(i.to_bytes(16, "big"), 2**53 - 1, {"nan": 2**53 - 1}, [row]))
    assert collector.stats()["messages"]["rejected"] == {"damaged_frame": 2100}
    for i in range(9000):  # as much as may be claimed
        most = frames.MAX_NUMBER
        collector._handle(frames.encode_end(i.to_bytes(16, "big"), most, {"nan": most, "made up": most}))
    abandon(collector)
    for _ in range(2):
        stats = run_and_stop(tmp_path)
        assert stats["records"]["lost"] == MAX_COUNT
        assert stats["producers"]["dropped"] == {"nan": MAX_COUNT, "other": MAX_COUNT}
        assert stats["journal"]["unusable"] == 0


@pytest.mark.slow
def test_a_journal_of_the_first_release_with_absurd_counters_is_read(tmp_path):
    """Its frames were taken; so their records are kept, and the counters stop at the bound."""
    journal = Journal(tmp_path / "j", [url(tmp_path)])
    list(journal.read())
    journal.begin({})
    for i in range(2100):
        body = frames.encode(i.to_bytes(16, "big"), 2**53 - 1, {f"reason {i}": 2**53 - 1}, [record(i).to_bytes()])
        journal.append("frame", [], body=body)
    journal.close()
    stats = run_and_stop(tmp_path)
    assert stats["records"]["received"] == stored(tmp_path) == 2100
    assert stats["records"]["lost"] == MAX_COUNT and stats["producers"]["dropped"] == {"other": MAX_COUNT}
    assert stats["journal"]["unusable"] == 1, "its first state was empty"
    assert run_and_stop(tmp_path)["journal"]["unusable"] == 0


BAD = {
    "a state of garbage": entry(["state", 1], b"\xc1"),
    "a state that is no map": entry(["state", 1], msgpack.packb([1])),
    "a state with a number beyond 2^64": entry(["state", 1], b"\x81\xa4lost\xc4\x09" + b"\xff" * 9),
    "a state without a version": entry(["state"], b"\x80"),
    "a frame of garbage": entry(["frame", []], b"garbage"),
    "a frame without its stores": entry(["frame"], good_frame(1)),
    "a frame of a number of stores": entry(["frame", 7], good_frame(1)),
    "a frame that is nested deeply": entry(["frame", []], b"\x91" * 100_000),
    "a passed frame of too few fields": entry(["passed", [b"p"], [], 0, {}]),
    "a passed frame of text": entry(["passed", [b"p" * 16, "0", 1, {}, False], [], 1, {}]),
    "a passed frame of more records than fit any": entry(["passed", [b"p" * 16, 0, 2**60, {}, False], [], 1, {}]),
    "a passed frame of a negative number": entry(["passed", [b"p" * 16, 0, -1, {}, False], [], 1, {}]),
    "a passed frame with text for counts": entry(["passed", [b"p" * 16, 0, 1, {"nan": "x"}, False], [], 1, {}]),
    "a frame with text for its damaged records": entry(["frame", [], {"damaged_record": "x"}], good_frame(1)),
    "a kind that nobody knows": entry(["frobnicate", 1]),
    "meta that is no list": entry({"a": 1}),
    "an empty list": entry([]),
    "meta that is no msgpack": entry(None, packed=b"\xc1"),
    "meta that is nested deeply": entry(None, packed=b"\x91" * 100_000),
    "a checksum that is wrong": entry(["frame", []], good_frame(1))[:-1] + b"\x00",
}


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_one_entry_that_cannot_be_used_stops_no_start_and_loses_no_other(tmp_path, bad, caplog):
    folder = tmp_path / "j"
    journal = Journal(folder, [url(tmp_path)])
    list(journal.read())
    collector = started(tmp_path)
    collector._handle(good_frame(0))
    abandon(collector)
    (segment,) = folder.glob("*.journal")
    with open(segment, "ab") as file:
        file.write(bad)
        file.write(entry(["frame", [], {}], good_frame(1)) + entry(["frame", [], {}], good_frame(2)))
    (folder / "²³.journal").write_bytes(b"not one of ours")
    with caplog.at_level(logging.ERROR, "attnhook"):
        stats = run_and_stop(tmp_path)
    assert (stats["records"]["received"], stats["records"]["lost"], stored(tmp_path)) == (3, 0, 3)
    assert stats["journal"]["unusable"] == 1
    (aside,) = folder.glob("*.unusable")
    assert aside.name in caplog.text and "is left out" in caplog.text
    assert aside.read_bytes()[-20:] == bad[12:][-20:], "its bytes are kept"
    assert run_and_stop(tmp_path)["records"]["received"] == 3


def test_an_ack_of_nonsense_is_no_ack(tmp_path):
    collector = started(tmp_path)
    collector._handle(good_frame(0))
    abandon(collector)
    (segment,) = (tmp_path / "j").glob("*.journal")
    with open(segment, "ab") as file:
        for meta in (
            ["ack", url(tmp_path), "x"],
            ["ack", url(tmp_path)],
            ["ack", [1], 5],
            ["ack", url(tmp_path), True],
        ):
            file.write(entry(meta))
    stats = run_and_stop(tmp_path)
    assert stats["records"]["received"] == stored(tmp_path) == 1 and stats["journal"]["unusable"] == 4


def test_damaged_records_take_no_room_in_the_journal_and_are_counted_after_a_kill(tmp_path):
    junk = bytes(2**20)
    collector = started(tmp_path)
    rows = [record(0).to_bytes(), *[junk] * 10, record(1).to_bytes()[:2] + b"\x09" + record(1).to_bytes()[3:]]
    collector._handle(frames.encode(bytes(16), 0, {}, rows))
    abandon(collector)
    assert sum(path.stat().st_size for path in (tmp_path / "j").iterdir()) < 10_000
    stats = run_and_stop(tmp_path)
    assert stats["records"]["bad"] == {"damaged_record": 10, "record_version": 1}
    assert (stats["records"]["received"], stats["records"]["lost"], stored(tmp_path)) == (12, 0, 1)


def test_numbers_up_to_the_last_that_msgpack_has_stop_at_the_bound_at_every_start(tmp_path):
    abandon(started(tmp_path))
    (segment,) = (tmp_path / "j").glob("*.journal")
    most = 2**64 - 1
    with open(segment, "ab") as file:
        said = dict.fromkeys((*frames.DROP_REASONS, "one", "two"), most)
        file.write(
            entry(["passed", [b"p" * 16, most, 1, said, False], [url(tmp_path)], most, {"damaged_record": most}])
        )
        file.write(entry(["passed", [b"q" * 16, most - 1, 5, said, True], [], 0, {}]))
    for _ in range(3):
        stats = run_and_stop(tmp_path)
        assert stats["journal"]["unusable"] == 0
        assert stats["records"]["lost"] == stats["records"]["bad"]["damaged_record"] == MAX_COUNT
        assert set(stats["producers"]["dropped"].values()) == {MAX_COUNT}
        assert stats["records"]["dropped"] == {url(tmp_path): {"queue_full": MAX_COUNT}}
