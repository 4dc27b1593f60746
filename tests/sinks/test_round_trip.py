"""Every sink gives back every kind of record exactly, and says so where it cannot."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnhook.errors import RecordError
from attnhook.record import columns
from attnhook.record.arrow import LIGHT
from attnhook.record.layout import ROW_VERSIONS
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.jsonl import read_jsonl
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from tests.helpers import python
from tests.record.samples import assert_same
from tests.sinks.samples import assert_rows, batches, lean, record

MAKE = {
    "sqlite": "sqlite:{}/records.db?tokens=1",
    "parquet": "parquet:{}/records?tokens=1",
    "jsonl": "jsonl:{}/records.jsonl?tokens=1",
}
few = settings(max_examples=20, deadline=None)


@contextmanager
def _url(scheme: str) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="attnhook-")
    try:
        yield MAKE[scheme].format(folder)
    finally:
        shutil.rmtree(folder)


def write(url: str, *groups: list[TokenRecord]) -> None:
    sink = open_sink(url)
    for group in groups:
        sink.write(group)
    sink.close()


def by_key(records: list[TokenRecord]) -> list[TokenRecord]:
    return sorted(records, key=lambda record: record.key)


def test_a_binary_row_of_a_newer_schema_is_refused(tmp_path):
    newer = columns.from_records([record()])
    newer.record = [bytes([*record().to_bytes()[:2], ROW_VERSIONS[-1] + 1]) + record().to_bytes()[3:]]
    for url in (f"sqlite:{tmp_path}/records.db", f"parquet:{tmp_path}/records"):
        sink = open_sink(url)
        sink.write_columns(newer)
        sink.close()
        with open_store(url) as store:
            assert store.count() == 1  # its columns can still be read
            with pytest.raises(RecordError, match=f"schema version {ROW_VERSIONS[-1] + 1}.*upgrade"):
                list(store.records())


@few
@given(batches(), batches())
def test_sqlite(first, second):
    with _url("sqlite") as url:
        write(url, first, second, first)
        expected = list({record.key: record for record in reversed([*first, *second])}.values())
        with open_store(url) as store:
            found = list(store.records())
            rows = [row for batch in store.fingerprints(batch_size=3) for row in batch.to_pylist()]
            assert store.count() == len(expected)
        assert [record.key for record in found] == list(dict.fromkeys(record.key for record in [*first, *second]))
        for one, other in zip(by_key(found), by_key(expected), strict=True):
            assert_same(one, other)
        assert_rows(rows, found)


@few
@given(batches(), batches())
def test_parquet(first, second):
    with _url("parquet") as url:
        write(url, first, second)
        expected = list({record.key: record for record in reversed([*first, *second])}.values())
        with open_store(url) as store:
            found = list(store.records())
            rows = [row for batch in store.fingerprints(batch_size=3) for row in batch.to_pylist()]
            assert store.count() == len(expected)
        for one, other in zip(by_key(found), by_key(expected), strict=True):
            assert_same(one, other)
        assert_rows(rows, found)


@few
@given(batches(), st.booleans())
def test_jsonl(records, rotated):
    with _url("jsonl") as url:
        write(url + "&rotate=4096&zstd=1" * rotated, *([record] for record in records))
        with open_store(url) as store:
            rows = [row for batch in store.fingerprints() for row in batch.to_pylist()] if _json_can(records) else []
        path = Path(url.partition(":")[2].partition("?")[0])
        files = [*sorted(path.parent.glob("records-*")), *([path] if path.exists() else [])]
        lines = [entry for file in files for entry in read_jsonl(file)]
        assert lines == [
            {"request_id": r.request_id, "choice": r.choice, "model": r.model, **json.loads(json.dumps(r.to_dict()))}
            for r in records
        ]
        for row, whole in zip(rows, records, strict=True) if rows else ():
            assert (row["request_id"], row["choice"], row["query_position"]) == whole.key
            np.testing.assert_allclose(row["fingerprint"], whole.fingerprint, atol=1e-7)


def _json_can(records: list[TokenRecord]) -> bool:
    """Whether raw records are such as captures make: positions first, then -1."""
    return all(
        positions is None or (positions >= 0).all()
        for record in records
        if record.mode == "raw"
        for positions in (record.token_positions, record.head_positions)
    )


@settings(deadline=None)
@given(batches())
def test_memory(records):
    sink = open_sink("memory:?tokens=1")
    sink.write(records)
    assert all(one is other for one, other in zip(sink.records, records, strict=True))


def test_raw_lines_give_whole_records_and_others_their_fingerprint(tmp_path):
    url = f"jsonl:{tmp_path}/records.jsonl"
    write(url, [record(4), lean(5)])
    with open_store(url) as store:
        found = store.records()
        again = next(found)
        np.testing.assert_array_equal(again.token_positions, record(4).token_positions)
        np.testing.assert_allclose(again.fingerprints, record(4).fingerprints, atol=1e-7)
        assert again.key == ("r", 0, 4)
        with pytest.raises(RecordError, match=r"only its fingerprint is stored.*mode 'fingerprint'"):
            next(found)


def test_a_batch_that_holds_one_invalid_record_is_refused_whole(tmp_path):
    wrong = record(1, fingerprints=np.full((2, 20), np.nan, np.float32))
    for url in (f"sqlite:{tmp_path}/records.db", f"parquet:{tmp_path}/records"):
        sink = open_sink(url)
        with pytest.raises(RecordError, match="nan"):
            sink.write([record(0), wrong])
        with pytest.raises(RecordError, match="does not fit"):
            sink.write([record(0), record(2, choice=2**16)])
        sink.write([record(3)])
        sink.close()
        with open_store(url) as store:
            assert [row.query_position for row in store.records()] == [3]


def test_arrow_types_are_those_that_are_promised(tmp_path):
    for scheme, make in MAKE.items():
        write(make.format(tmp_path), [record()])
        with open_store(make.format(tmp_path)) as store:
            (batch,) = store.fingerprints()
        assert batch.schema.field("fingerprint").type == pa.list_(pa.float32(), 20), scheme
        assert batch.schema.field("time").type == pa.timestamp("us", "UTC"), scheme
        assert batch.schema.names == list(LIGHT), scheme


def test_replacing_nothing_but_the_request_keeps_both(tmp_path):
    url = f"sqlite:{tmp_path}/records.db"
    write(url, [record(1), replace(record(1), request_id="s"), replace(record(1), choice=1)])
    with open_store(url) as store:
        assert store.count() == 3
        assert store.count(request_id="r") == 2


def test_lines_of_something_else_are_named(tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps(record().to_dict()) + "\n")  # an entry of a reply
    with open_store(f"jsonl:{tmp_path}/records.jsonl") as store:
        with pytest.raises(RecordError, match=r"records\.jsonl: a line has no request_id, choice, model"):
            list(store.fingerprints())
        with pytest.raises(RecordError, match="has no request_id"):
            store.count()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", MAKE)
def test_what_is_queued_is_stored_when_a_process_ends(scheme, tmp_path):
    url = MAKE[scheme].format(tmp_path)
    run = python(
        "-c",
        f"""
        from attnhook.sinks.delivery import Delivery
        from tests.sinks.samples import lean
        delivery = Delivery.from_urls(["{url}"], observe=False)
        delivery.put([lean(i) for i in range(5000)])
        raise SystemExit(3)
        """,
    )
    assert (run.returncode, run.stderr) == (3, "")
    with open_store(url) as store:
        rows = [p for batch in store.fingerprints() for p in batch["query_position"].to_pylist()]
    assert rows == list(range(5000))
