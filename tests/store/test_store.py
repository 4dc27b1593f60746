"""Stores read back the same way whatever they are kept in: filters, pages, columns, refusals."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from attnhook.errors import OptionError, PluginError
from attnhook.record.arrow import LIGHT, NAMES
from attnhook.record.columns import from_records
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from attnhook.store.base import Store
from tests.helpers import python
from tests.sinks.samples import lean, record

START = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
MAKE = {"sqlite": "sqlite:{}/records.db", "parquet": "parquet:{}/records"}
ROWS = 90  # three batches of thirty, a minute apart


def at(minute: int) -> int:
    return int((START + timedelta(minutes=minute)).timestamp() * 1e6)


@pytest.fixture(scope="module", params=MAKE)
def store(request, tmp_path_factory):
    url = MAKE[request.param].format(tmp_path_factory.mktemp("store"))
    sink = open_sink(url)
    for minute in range(3):
        positions = range(30 * minute, 30 * minute + 30)
        make = record if minute == 1 else lean
        rows = [make(p, request_id=f"r{p % 3}", model="m1" if p >= 80 else "m0") for p in positions]
        sink.write_columns(from_records(rows, time=at(minute)))
        if request.param == "parquet":
            sink.publish()
    sink.close()
    with open_store(url) as opened:
        yield opened


def read(store: Store, **arguments) -> list[int]:
    return [p for batch in store.fingerprints(**arguments) for p in batch["query_position"].to_pylist()]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, lambda p: True),
        ({"model": "m1"}, lambda p: p >= 80),
        ({"model": "none"}, lambda p: False),
        ({"request_id": "r2"}, lambda p: p % 3 == 2),
        ({"request_id": "r2", "model": "m1"}, lambda p: p % 3 == 2 and p >= 80),
        ({"since": START + timedelta(minutes=1)}, lambda p: p >= 30),
        ({"until": START + timedelta(minutes=1)}, lambda p: p < 30),
        ({"since": (START + timedelta(minutes=1)).replace(tzinfo=None)}, lambda p: p >= 30),
        (
            {"since": START + timedelta(seconds=1), "until": START + timedelta(minutes=1, microseconds=1)},
            lambda p: 30 <= p < 60,
        ),
        ({"since": START.astimezone(timezone(timedelta(hours=9))) + timedelta(minutes=2)}, lambda p: p >= 60),
        ({"zone": "diffuse", "since": START}, lambda p: lean(p).zone == "diffuse"),
        ({"zone": lean(0).zone}, lambda p: (record(p) if 30 <= p < 60 else lean(p)).zone == lean(0).zone),
    ],
)
def test_filters(store, filters, expected):
    chosen = [p for p in range(ROWS) if expected(p)]
    assert sorted(read(store, **filters)) == chosen
    assert store.count(**filters) == len(chosen)
    assert sorted(r.query_position for r in store.records(**filters)) == chosen


def test_filters_can_tell_rows_apart(store):
    assert 0 < store.count(zone=lean(0).zone) < ROWS


@pytest.mark.parametrize("filters", [{}, {"request_id": "r1"}], ids=["all", "some"])
def test_pages_join_to_the_whole(store, filters):
    whole = read(store, **filters)
    for size in (1, 7, 29, 30, 31, 1000):
        pages = []
        while page := read(store, offset=len(pages), limit=size, **filters):
            assert len(page) <= size
            pages += page
        assert pages == whole
    assert read(store, limit=0) == []
    assert read(store, offset=ROWS, **filters) == []
    assert [r.query_position for r in store.records(offset=2, limit=3, **filters)] == whole[2:5]


def test_batches_are_no_larger_than_asked(store):
    sizes = [batch.num_rows for batch in store.fingerprints(batch_size=13)]
    assert max(sizes) <= 13
    assert min(sizes) >= 1
    assert sum(sizes) == ROWS


def test_columns_are_those_that_were_asked_for(store):
    assert next(store.fingerprints()).schema.names == list(LIGHT)
    assert next(store.fingerprints(columns=NAMES)).schema.names == list(NAMES)
    batch = next(store.fingerprints(columns=["zone", "time"], limit=1, request_id="r1"))
    assert batch.to_pylist() == [{"zone": lean(1).zone, "time": START}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["zone", "prompt"]}, r"columns=\['zone', 'prompt'\]: choose one or more of request_id"),
        ({"columns": []}, "choose one or more"),
        ({"offset": -1}, "offset=-1 must be 0 or more"),
        ({"limit": -1}, "limit=-1 must be 0 or more"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"since": "2026-03-01"}, "since='2026-03-01' must be a datetime"),
    ],
)
def test_bad_arguments(store, arguments, message):
    with pytest.raises(OptionError, match=message):
        store.fingerprints(**arguments)


@pytest.mark.parametrize("url", ["memory:", "zmq:tcp://127.0.0.1:1", "records.db", "sqlite"])
def test_what_is_no_store(url):
    with pytest.raises(PluginError, match="known: jsonl:, parquet:, sqlite:"):
        open_store(url)


def test_options_of_the_sink_do_not_disturb_reading(tmp_path):
    for scheme, make in MAKE.items():
        url = make.format(tmp_path) + "?keep_days=5&fingerprints=1"
        sink = open_sink(url)
        sink.write([lean(0)])
        sink.close()
        with open_store(url) as opened:
            assert opened.count() == 1, scheme


def test_importing_attnhook_and_listing_sinks_imports_no_library():
    code = """
        import sys
        import attnhook
        from attnhook.plugins import manager as plugins
        plugins.sink_classes()
        heavy = {"pyarrow", "zstandard", "duckdb", "torch"} & set(sys.modules)
        print(sorted(heavy))
        """
    assert python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("pyarrow", "open_sink('parquet:x')"),
        ("pyarrow", "open_store('sqlite:x')"),
        ("zstandard", "open_sink('jsonl:x?rotate=1MB&zstd=1')"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_remedy(library, call, tmp_path):
    code = f"""
        import os, sys
        os.chdir("{tmp_path}")
        sys.modules["{library}"] = None  # as if it were not installed
        from attnhook.sinks import open_sink
        from attnhook.store import open_store
        {call}
        """
    run = python("-c", code)
    assert run.returncode == 1
    assert f"needs {library}: pip install 'attnhook[sinks]'" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_sqlite_writes_without_pyarrow(tmp_path):
    code = f"""
        import sys
        sys.modules["pyarrow"] = None
        from attnhook.sinks import open_sink
        from tests.record.samples import a_record
        sink = open_sink("sqlite:{tmp_path}/records.db")
        sink.write([a_record()])
        sink.close()
        """
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    with open_store(f"sqlite:{tmp_path}/records.db") as opened:
        assert opened.count() == 1
