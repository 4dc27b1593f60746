"""What the rules take out is in no sink: the same for all, looked for in the raw bytes."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import attnhook
from attnhook.errors import PluginError
from attnhook.options import CaptureOptions
from attnhook.record.columns import from_records, to_records
from attnhook.record.token_record import TokenRecord, without_tokens
from attnhook.sinks import privacy
from attnhook.sinks.delivery import Delivery
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from tests.helpers import python, tiny_model
from tests.record.samples import assert_same
from tests.sinks.samples import batches, lean, record, with_ids

URLS = {
    "jsonl": "jsonl:{}/records.jsonl?rotate=4096&",
    "sqlite": "sqlite:{}/records.db?",
    "parquet": "parquet:{}/records?",
}
KEY = "a key of sixteen or more"


def everything(folder: Path) -> bytes:
    """All bytes below a folder, Parquet decompressed."""
    import pyarrow.parquet as pq

    return b"".join(
        repr(pq.read_table(file).to_pylist()).encode() if file.suffix == ".parquet" else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    )


@pytest.mark.parametrize("scheme", URLS)
def test_hashed_ids_are_stable_in_a_store_and_nowhere_else(scheme, tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    ids = []
    for folder in folders:
        folder.mkdir()
        url = URLS[scheme].format(folder) + "hash_ids=1"
        for _ in range(2):
            sink = open_sink(url)
            sink.write([record(1, request_id="user-4711"), record(2, request_id="user-4711"), record(1)])
            sink.close()
        assert b"user-4711" not in everything(folder)
        with open_store(url) as store:
            found = store.fingerprints(columns=["request_id", "query_position"])
            rows = [tuple(row.values()) for batch in found for row in batch.to_pylist()]
        assert len({name for name, _ in rows}) == 2
        assert len(rows) == (3 if scheme == "sqlite" else 6)
        assert all(len(name) == 32 for name, _ in rows)
        ids.append({name for name, _ in rows})
        keys = [file for file in folder.iterdir() if file.suffix == ".key"]
        assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600]
    assert not ids[0] & ids[1]  # each store has its own key


def test_one_key_for_many_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNHOOK_HASH_KEY", KEY)
    memory, file = open_sink("memory:10?hash_ids=1"), open_sink(f"sqlite:{tmp_path}/records.db?hash_ids=1")
    for sink in (memory, file):
        sink.write([record(0)])
        sink.close()
    with open_store(f"sqlite:{tmp_path}/records.db") as store:
        (stored,) = store.records()
    assert stored.request_id == memory.records[0].request_id != "r"
    assert os.listdir(tmp_path) == ["records.db"]
    assert CaptureOptions.resolve() is not None  # the variable is known


def test_the_given_records_stay_as_they_are():
    rules = privacy.Rules(fingerprints=True, key=b"k")
    given_record = record(0)
    (kept,) = rules.apply([given_record])
    assert_same(given_record, record(0))
    assert kept.request_id != "r"
    assert kept.token_positions.shape == (2, 0)


@settings(deadline=None, max_examples=50)
@given(batches())
def test_fingerprints_only_keeps_every_fingerprint_and_nothing_else(records):
    kept = privacy.Rules(fingerprints=True).apply(records)
    for after, before in zip(kept, records, strict=True):
        np.testing.assert_array_equal(after.fingerprints, before.fingerprints)
        assert after.key == before.key
        assert (after.mode, after.span_names) == ("fingerprint", ())
        assert after.token_positions.size == after.attention_scores.size == after.span_mass.size == 0
        assert TokenRecord.from_bytes(after.to_bytes()).layers == before.layers


@settings(deadline=None, max_examples=50)
@given(batches())
def test_columns_are_filtered_as_records_are(records):
    for rules in (
        privacy.Rules(fingerprints=True),
        privacy.Rules(key=b"k"),
        privacy.Rules(fingerprints=True, key=b"k"),
    ):
        filtered = rules.apply_columns(from_records(records, time=7))
        expected = from_records(rules.apply(records), time=7)
        assert filtered.to_arrow().equals(expected.to_arrow())
        for one, other in zip(to_records(filtered.to_arrow()), rules.apply(records), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("scheme", URLS)
def test_fingerprints_only_in_every_store(scheme, tmp_path):
    url = URLS[scheme].format(tmp_path) + "fingerprints=1"
    sink = open_sink(url)
    sink.write([record(4), lean(5)])
    sink.close()
    assert b"document" not in everything(tmp_path)
    with open_store(url) as store:
        rows = [row for batch in store.fingerprints() for row in batch.to_pylist()]
    np.testing.assert_allclose(rows[0]["fingerprint"], record(4).fingerprint, atol=1e-7)
    assert [row["query_position"] for row in rows] == [4, 5]


@settings(deadline=None, max_examples=50)
@given(batches())
def test_token_ids_pass_only_where_they_are_asked_for(records):
    bare = [without_tokens(r) for r in records]
    for rules, expected in (
        (privacy.Rules(), bare),
        (privacy.Rules(tokens=True), records),
        (privacy.Rules(key=b"k"), privacy.Rules(key=b"k").apply(bare)),
        (
            privacy.Rules(key=b"k", tokens=True),
            [replace(r, request_id=privacy.hashed(r.request_id, b"k")) for r in records],
        ),
        (privacy.Rules(fingerprints=True), privacy.Rules(fingerprints=True).apply(bare)),
    ):
        for one, other in zip(rules.apply(records), expected, strict=True):
            assert_same(one, other)
        columns = rules.apply_columns(from_records(records, time=7))
        assert columns.to_arrow().equals(from_records(expected, time=7).to_arrow())


def test_records_without_ids_are_not_copied():
    records = [record(0), lean(1)]
    assert privacy.Rules().apply(records) is records


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory:?tokens=1&fingerprints=1", "fingerprints=1 keeps fingerprints only, tokens=1 token ids too: drop one"),
        ("memory:?tokens=maybe", "tokens='maybe' must be 0 or 1"),
        ("prometheus:127.0.0.1:0?tokens=1", "tokens=1 has nothing to add: prometheus: keeps no token ids; drop it"),
        ("otlp:http://127.0.0.1:9?tokens=true", "otlp: keeps no token ids"),
    ],
)
def test_tokens_that_cannot_be_kept(url, message):
    with pytest.raises(PluginError, match=message):
        open_sink(url)


def test_two_sinks_get_each_its_own():
    """One that asks and one that does not, behind one delivery, and an observer."""
    seen: list[TokenRecord] = []
    sinks = {url: open_sink(url) for url in ("memory:?tokens=1", "memory:")}
    given_records = [with_ids(i) for i in range(3)]
    with Delivery(sinks, observers=seen.append) as delivery:
        assert delivery.tokens
        delivery.put(given_records)
    asking, other = (sink.records for sink in sinks.values())
    for one, whole in zip(asking, given_records, strict=True):
        assert_same(one, whole)
    for found in (other, seen):
        for one, whole in zip(found, given_records, strict=True):
            assert_same(one, without_tokens(whole))
    with Delivery({"memory:": open_sink("memory:")}) as plain:
        assert not plain.tokens


@pytest.mark.parametrize("scheme", URLS)
@pytest.mark.parametrize("option", ["", "fingerprints=1", "hash_ids=1"])
def test_ids_are_in_no_bytes_of_a_sink_that_did_not_ask(scheme, option, tmp_path):
    token = 0x5A5B5C5D  # no other number here looks like it
    ids = np.full((2, 2), token, np.int32)
    url = URLS[scheme].format(tmp_path) + (option or "tokens=0")
    for way in ("write", "write_columns"):
        records = [with_ids(i, token_ids=ids, query_token=token, request_id=way) for i in range(3)]
        sink = open_sink(url)
        if way == "write":
            sink.write(records)
        elif scheme != "jsonl":
            sink.write_columns(from_records(records))
        assert sink.tokens_left_out == (0 if way == "write_columns" and scheme == "jsonl" else 3)
        sink.close()
    data = everything(tmp_path)
    assert repr(token.to_bytes(4, "little"))[2:-1].encode() not in data
    assert token.to_bytes(4, "little") not in data
    assert str(token).encode() not in data
    with open_store(url) as store:
        columns = [batch for batch in store.fingerprints(columns=["query_token"])]
        assert all(batch.column(0).null_count == batch.num_rows for batch in columns)


@pytest.mark.parametrize("scheme", URLS)
def test_masked_positions_reach_no_sink(scheme, tmp_path):
    torch.manual_seed(0)
    model, url = tiny_model(), URLS[scheme].format(tmp_path)[:-1]
    ids = torch.arange(2, 14)[None]
    with torch.no_grad(), attnhook.capture(sinks=url, top_k=8, prompt=True, mask_prefix=5, layers="all") as masked:
        model(input_ids=ids)
    with torch.no_grad(), attnhook.capture(top_k=8, prompt=True, layers="all") as plain:
        model(input_ids=ids)
    assert any(0 <= p < 5 for r in plain for layer in r.layers for p, _ in r.top(layer))
    with open_store(url) as store:
        stored = list(store.records())
    assert len(stored) == len(masked) == 12
    reported = {position for r in stored for layer in r.layers for position, _ in r.top(layer)}
    assert reported == set(range(5, 12))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory:?hash_ids=1", "set ATTNHOOK_HASH_KEY to 16 characters or more"),
        ("jsonl:-?hash_ids=1", "has no place here"),
        ("parquet:s3://bucket/x?hash_ids=1", "has no place here"),
        ("sqlite:{}/a.db?hash_ids=yes", "hash_ids='yes' must be 0 or 1"),
        ("sqlite:{}/no/such/a.db?hash_ids=1", "make its folder writable"),
    ],
)
def test_bad_options(url, message, tmp_path):
    with pytest.raises(PluginError, match=message):
        open_sink(url.format(tmp_path))
    assert os.listdir(tmp_path) == []


def test_keys_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "a.db.key").write_bytes(b"short")
    with pytest.raises(PluginError, match=r"a\.db\.key is no key: 5 bytes"):
        open_sink(f"sqlite:{tmp_path}/a.db?hash_ids=1")
    monkeypatch.setenv("ATTNHOOK_HASH_KEY", "short")
    with pytest.raises(PluginError, match="ATTNHOOK_HASH_KEY has 5 characters"):
        open_sink("memory:?hash_ids=1")


def test_two_processes_make_one_key(tmp_path):
    code = f"""
        import os
        from pathlib import Path
        from attnhook.sinks import privacy
        readers = []
        for _ in range(4):
            read, write = os.pipe()
            if os.fork() == 0:
                os.write(write, privacy._key("sqlite", "{tmp_path}/a.db"))
                os._exit(0)
            readers.append(read)
        keys = {{os.read(read, 100) for read in readers}}
        assert len(keys) == 1 and len(keys.pop()) == 32
        """
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert os.listdir(tmp_path) == ["a.db.key"]


def test_the_sink_behind_the_rules_can_be_asked(tmp_path):
    sink = open_sink(f"sqlite:{tmp_path}/a.db?fingerprints=1")
    sink.write([record(0), record(0)])
    assert (sink.written, sink.duplicates) == (1, 1)
    sink.flush()
    sink.close()
