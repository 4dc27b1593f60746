"""Nothing that a peer chooses makes a map of the collector grow."""

from __future__ import annotations

import json
import os

import pytest
from prometheus_client import generate_latest

from attnhook.collector.exposition import families
from attnhook.collector.service import Collector
from attnhook.record.block import read_rows
from attnhook.record.tally import Tally, short
from attnhook.sinks import frames
from attnhook.sinks.metrics import registry
from attnhook.sinks.sqlite import SqliteSink
from tests.collector.test_writer import abandon
from tests.sinks.samples import lean, record


@pytest.fixture
def collector(tmp_path):
    found = Collector("tcp://127.0.0.1:*", [f"sqlite:{tmp_path}/x.db"], journal=tmp_path / "j")
    yield found
    abandon(found)


def metrics(collector: Collector) -> bytes:
    return generate_latest(registry(lambda: families(collector)))


def test_reasons_that_a_peer_makes_up_are_one_reason(collector):
    """Each once became a label: 34 MB of metrics after ten seconds."""
    before = len(metrics(collector))
    for _ in range(2000):
        reasons = {os.urandom(15).hex(): 1 for _ in range(19)} | {"nan": 1}
        assert collector._handle(frames.encode_end(os.urandom(16), 0, reasons))
    assert collector.stats()["producers"]["dropped"] == {"nan": 2000, "other": 38_000}
    assert b'attnhook_collector_producer_dropped_records_total{reason="other"} 38000.0' in metrics(collector)
    assert len(metrics(collector)) < before + 300
    assert len(json.dumps(collector.stats())) < 10_000


def test_metrics_name_no_request_model_or_producer(collector):
    name = b"p" * 16
    rows = [record(i, request_id=f"secret-{i}", model=f"model-{i}").to_bytes() for i in range(200)]
    before = metrics(collector)
    assert collector._handle(frames.encode(name, 0, {}, rows))
    text = metrics(collector)
    assert b"secret" not in text and b"model-" not in text and b"pppp" not in text
    assert text.count(b"\n") == before.count(b"\n")


def test_long_request_ids_are_remembered_by_their_beginning_and_a_digest():
    assert short("x" * 200) == "x" * 200
    long, other = short("x" * 60_000 + "1"), short("x" * 60_000 + "2")
    assert long != other and len(long) == len(other) == 200 and long.startswith("x" * 100)
    tally = Tally()
    for i in range(300):
        rows = [lean(j, request_id=f"{i}-{j}-".ljust(60_000, "x")).to_bytes() for j in range(16)]
        block, _ = read_rows(rows)
        tally.add(block.fingerprints, block.zones, block.ids, block.steps)
    assert len(tally._requests) == 4096 and sum(map(len, tally._requests)) == 4096 * 200


def test_sqlite_remembers_no_more_names_than_fit(tmp_path):
    sink = SqliteSink()
    sink.open(str(tmp_path / "x.db"))
    for i in range(60):
        sink.write([lean(j, request_id=f"{i}-{j}", model=f"{i}-{j}".ljust(60_000, "x")) for j in range(10)])
    assert sink._remembered == sum(len(name) + 200 for name in sink._models) + sum(
        len(name) + 200 for name, _ in sink._sessions
    )
    assert sink._remembered < 16 * 2**20 + 10 * 61_000
    assert len(sink._models) < 600
    sink.close()
