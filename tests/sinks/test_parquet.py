"""parquet: whole files only, journals that outlive their process, and a data set that other engines read."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from attnhook.errors import PluginError, RecordError
from attnhook.record.arrow import VERSION_KEY
from attnhook.record.columns import from_records
from attnhook.sinks.dataset import MARKER, Dataset
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from tests.helpers import environment, python
from tests.record.samples import assert_same
from tests.sinks.samples import lean, record, small_disk, with_ids, write_around_a_fork
from tests.sinks.test_jsonl import unprivileged  # noqa: F401 - a fixture

DAY = 86_400_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records"


def positions(path: Path) -> list[int]:
    with open_store(f"parquet:{path}") as store:
        return [row.query_position for row in store.records()]


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*.parquet"))


def journals(path: Path) -> list[Path]:
    return list((path / "_journal").iterdir())


# -- files and their places


def test_one_file_per_model_and_day(path):
    sink = open_sink(f"parquet:{path}")
    noon = int(datetime(2026, 2, 28, 12, tzinfo=timezone.utc).timestamp()) * 10**6
    sink.write_columns(from_records([record(0), record(1, model="b=c é/..")], time=noon))
    sink.write_columns(from_records([record(2), record(3, model="")], time=noon + DAY))
    sink.write_columns(from_records([record(4, model="long" * 100), record(5, model="long" * 101)], time=noon + DAY))
    sink.close()
    folders = sorted(Path(file).parent.as_posix() for file in files(path))
    assert folders[:4] == [
        "model_dir=/date=2026-03-01",
        "model_dir=b%3Dc %C3%A9%2F../date=2026-02-28",
        folders[2],
        folders[3],
    ]
    assert "model_dir=org%2Fmodel/date=2026-02-28" in folders
    assert "model_dir=org%2Fmodel/date=2026-03-01" in folders
    assert len(folders) == len(set(folders)) == 6
    assert sorted(positions(path)) == [0, 1, 2, 3, 4, 5]
    with open_store(f"parquet:{path}") as store:
        assert store.count(model="long" * 101) == 1
    assert journals(path) == []


def test_rows_wait_in_the_journal_and_are_read_when_their_file_is_whole(path):
    sink = open_sink(f"parquet:{path}")
    sink.write([record(0)])
    sink.flush()
    assert positions(path) == []
    assert len(journals(path)) == 1
    sink.publish()
    assert positions(path) == [0]
    assert journals(path) == []
    sink.write([record(1)])
    sink.close()
    sink.close()
    assert positions(path) == [0, 1]
    with pytest.raises(ValueError, match="closed"):
        sink.write([record(2)])


def test_a_full_journal_becomes_a_file(path):
    sink = open_sink(f"parquet:{path}?rotate=20KB")
    for start in range(0, 500, 50):
        sink.write([record(start + i) for i in range(50)])
    assert len(files(path)) >= 3
    before = len(positions(path))
    assert 0 < before < 500 or before == 500
    sink.close()
    assert sorted(positions(path)) == list(range(500))


def test_files_appear_by_themselves_when_nobody_writes(path):
    sink = open_sink(f"parquet:{path}?every=1s")
    sink.write([record(0)])
    deadline = time.monotonic() + 60
    while positions(path) != [0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sink.write([record(1)])
    sink.close()
    assert positions(path) == [0, 1]


def test_a_repeated_key_is_written_once_per_file(path):
    sink = open_sink(f"parquet:{path}")
    sink.write([record(0), record(1), record(0, model="another")])
    sink.write([record(1), record(2), record(1, choice=1)])
    sink.close()
    assert positions(path) == [0, 1, 2, 1]


def test_a_file_names_its_schema(path):
    sink = open_sink(f"parquet:{path}")
    sink.write([record(0)])
    sink.close()
    metadata = pq.read_metadata(path / files(path)[0]).metadata
    assert metadata[b"attnhook.schema_version"] == b"1"


def test_a_data_set_gets_token_ids_later_and_then_says_so(path):
    """Files without ids are of version 1, as before there were any; a journal of then is taken over."""
    sink = open_sink(f"parquet:{path}")
    sink.write([with_ids(0)])
    sink.close()
    (plain,) = files(path)
    assert "query_token" not in pq.read_schema(path / plain).names
    assert json.loads((path / MARKER).read_text()) == {"schema_version": 1}
    old = from_records([record(1)], time=10**15).to_arrow().drop_columns(["query_token"])
    old = old.replace_schema_metadata({VERSION_KEY: b"1"})
    with pa.ipc.new_stream(path / "_journal" / "0-dead.arrows", old.schema) as stream:
        stream.write_batch(old)
    sink = open_sink(f"parquet:{path}?tokens=1")
    sink.write([with_ids(2), record(3)])
    sink.close()
    assert json.loads((path / MARKER).read_text()) == {"schema_version": 2}
    versions = {pq.read_metadata(path / file).metadata[VERSION_KEY] for file in files(path)}
    assert versions == {b"1", b"2"}
    with open_store(f"parquet:{path}") as store:
        found = sorted(store.records(), key=lambda one: one.query_position)
        tokens = [token for batch in store.fingerprints(columns=["query_token"]) for token in batch[0].to_pylist()]
    for one, whole in zip(found, [record(0), record(1), with_ids(2), record(3)], strict=True):
        assert_same(one, whole)
    assert sorted(tokens, key=str) == [102, None, None, None]
    sink = open_sink(f"parquet:{path}")
    assert sink.delete("r") == 4
    sink.close()


# -- other readers


@pytest.fixture
def filled(path):
    sink = open_sink(f"parquet:{path}")
    sink.write([lean(i, model=f"m{i % 2}", request_id=f"r{i // 10}") for i in range(100)])
    sink.publish()
    sink.write([record(i, model="7", decode_step=None) for i in range(50)])
    sink.close()
    return path


def test_duckdb(filled):
    source = f"read_parquet('{filled}/**/*.parquet', hive_partitioning = true)"
    rows = duckdb.sql(
        f"SELECT model, count(*), count(decode_step) FROM {source} GROUP BY model ORDER BY model"
    ).fetchall()
    assert rows == [("7", 50, 0), ("m0", 50, 50), ("m1", 50, 50)]
    day = datetime.now(timezone.utc).date()
    recent = f"SELECT count(*) FROM {source} WHERE date BETWEEN DATE '{day}' - 1 AND DATE '{day}'"
    assert duckdb.sql(recent).fetchall() == [(150,)]
    ((entropy,),) = duckdb.sql(f"SELECT avg(fingerprint[4]) FROM {source} WHERE model = 'm0'").fetchall()
    assert entropy == pytest.approx(0.25)


def test_polars(filled):
    frame = polars.scan_parquet(f"{filled}/**/*.parquet", hive_partitioning=True).collect()
    assert frame.height == 150
    assert frame.schema["fingerprint"] == polars.Array(polars.Float32, 20)
    chosen = frame.filter(polars.col("request_id") == "r3").sort("query_position")
    assert chosen["query_position"].to_list() == list(range(30, 40))
    np.testing.assert_array_equal(
        chosen["fingerprint"].to_numpy(), np.stack([lean(i).fingerprint for i in range(30, 40)])
    )


def test_plain_pyarrow(filled):
    assert pq.read_table(filled).num_rows == 150


# -- crashes


def test_the_journal_of_a_killed_process_is_taken_over(path):
    run = python(
        "-c",
        f"""
        import os, signal
        from attnhook.sinks import open_sink
        from tests.sinks.samples import lean
        sink = open_sink("parquet:{path}")
        for start in range(0, 300, 100):
            sink.write([lean(start + i) for i in range(100)])
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert run.returncode == -signal.SIGKILL
    assert positions(path) == []
    open_sink(f"parquet:{path}").close()
    assert positions(path) == list(range(300))
    assert journals(path) == []
    open_sink(f"parquet:{path}").close()
    assert positions(path) == list(range(300))


def test_a_journal_that_was_cut_short_gives_its_whole_batches(path, caplog):
    sink = open_sink(f"parquet:{path}")
    sizes = []
    for i in range(3):
        sink.write([record(2 * i), record(2 * i + 1)])
        sizes.append(journals(path)[0].stat().st_size)
    whole, name = journals(path)[0].read_bytes(), journals(path)[0].name
    sink.close()
    for size, rows in {
        sizes[2]: 6,
        sizes[2] - 1: 4,
        sizes[1] + 5: 4,
        sizes[1]: 4,
        sizes[0] - 300: 0,
        10: 0,
        0: 0,
    }.items():
        copy = path.parent / f"copy-{size}"
        (copy / "_journal").mkdir(parents=True)
        (copy / "_journal" / name).write_bytes(whole[:size])
        with caplog.at_level(logging.WARNING, "attnhook"):
            open_sink(f"parquet:{copy}").close()
        assert positions(copy) == list(range(rows)), size
        assert journals(copy) == []


def test_a_crash_between_file_and_journal_makes_no_second_copy(path):
    sink = open_sink(f"parquet:{path}")
    sink.write([record(0), record(1, model="b")])
    (journal,) = journals(path)
    kept = journal.read_bytes()
    sink.close()
    journal.write_bytes(kept)  # as if the process had died before it could remove it
    open_sink(f"parquet:{path}").close()
    assert sorted(positions(path)) == [0, 1]
    assert journals(path) == []


def test_the_journal_of_a_living_process_is_left_to_it(path):
    first = open_sink(f"parquet:{path}")
    first.write([record(0)])
    second = open_sink(f"parquet:{path}")
    second.write([record(1)])
    second.close()
    assert positions(path) == [1]
    first.write([record(2)])
    first.close()
    assert sorted(positions(path)) == [0, 1, 2]


@pytest.mark.slow
def test_processes_share_a_data_set(path):
    code = f"""
import sys
from attnhook.sinks import open_sink
from tests.sinks.samples import lean
sink = open_sink("parquet:{path}?rotate=20KB")
for start in range(0, 1000, 100):
    sink.write([lean(start + i, request_id=sys.argv[1]) for i in range(100)])
sink.close()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, f"r{i}"], env=environment()) for i in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    with open_store(f"parquet:{path}") as store:
        assert store.count() == 3000
        assert sorted(r.query_position for r in store.records(request_id="r1")) == list(range(1000))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_a_journal_of_its_own(path):
    write_around_a_fork(f"parquet:{path}")
    assert sorted(positions(path)) == [0, 1, 2]


# -- disks


def test_a_full_disk_loses_nothing_that_was_taken(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 1024) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 400_000)
        path = disk / "records"
        sink = open_sink(f"parquet:{path}")
        stored = 0
        with pytest.raises(OSError, match="No space left"):
            while True:
                sink.write([record(stored + i) for i in range(50)])
                stored += 50
        assert sink.written == stored > 0
        with ballast.open("ab", buffering=0) as rest, pytest.raises(OSError, match="No space left"):
            while True:
                rest.write(b"x" * 512)
        with pytest.raises(OSError, match=r"No space left"):
            sink.publish()
        assert files(path) == []
        assert not list(path.rglob("*.tmp"))
        ballast.unlink()
        sink.write([record(stored)])
        sink.close()
        assert positions(path) == list(range(stored + 1))


def test_files_that_cannot_be_written_now_are_written_later(path, caplog):
    sink = open_sink(f"parquet:{path}?rotate=4096")
    (path / "model_dir=org%2Fmodel").write_text("in the way")
    with caplog.at_level(logging.WARNING, "attnhook"):
        sink.write([record(i) for i in range(49)])
        sink.write([record(49)])  # does not try again at once
    assert sink.failed == 1
    assert "the rows wait in the journal" in caplog.text
    with pytest.raises(OSError, match="model_dir"):
        sink.close()
    (path / "model_dir=org%2Fmodel").unlink()
    open_sink(f"parquet:{path}").close()
    assert positions(path) == list(range(50))


# -- retention


def test_pruning_removes_files_whose_newest_row_is_too_old(path):
    sink = open_sink(f"parquet:{path}")
    now = time.time_ns() // 1000
    for age in (0, 1, 2, 3):
        sink.write_columns(from_records([record(10 * age), record(10 * age + 1)], time=now - age * DAY))
        sink.publish()
    assert sink.prune(now - 2 * DAY - 1) == 2
    sink.close()
    assert sorted(positions(path)) == [0, 1, 10, 11, 20, 21]


def test_deleting_a_request_rewrites_only_its_files(path):
    sink = open_sink(f"parquet:{path}")
    for group in ([record(0)], [record(1), record(2, request_id="gone")], [record(3, request_id="gone")]):
        sink.write(group)
        sink.publish()
    before = {file: (path / file).stat().st_mtime_ns for file in files(path)}
    assert sink.delete("gone") == 2
    assert sink.delete("gone") == 0
    assert positions(path) == [0, 1]
    kept = files(path)
    assert len(kept) == 2
    assert sum((path / file).stat().st_mtime_ns == before[file] for file in kept) == 1


# -- what cannot be used


def test_a_data_set_of_a_newer_schema_is_refused_and_left_alone(path):
    open_sink(f"parquet:{path}").close()
    (path / MARKER).write_text('{"schema_version": 4}')
    for opens in (open_sink, open_store):
        with pytest.raises(PluginError, match=r"schema version 4; this attnhook knows 3: upgrade"):
            opens(f"parquet:{path}")
    assert sorted(os.listdir(path)) == [MARKER, "_journal"]
    (path / MARKER).write_text("[]")
    with pytest.raises(PluginError, match="cannot be used"):
        open_sink(f"parquet:{path}")


def test_a_damaged_file_is_named(filled):
    file = filled / files(filled)[0]
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1" * 10):
        file.write_bytes(damaged)
        with open_store(f"parquet:{filled}") as store, pytest.raises(RecordError, match=rf"{file.name}.*damaged"):
            list(store.fingerprints())
    file.write_bytes(whole)
    pq.write_table(pa.table({"a": [1]}), file)
    with open_store(f"parquet:{filled}") as store, pytest.raises(RecordError, match="not written by attnhook"):
        store.count()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "has no folder; write parquet:records"),
        ("/no/such/folder", "does not exist: create it first"),
        ("x?rotate=1", "rotate='1' must be a size"),
        ("x?region=here", "unknown option 'region'"),
        ("nosuch://bucket/x", "from_uri takes"),
        ("file", "cannot be used"),
    ],
)
def test_bad_urls(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match=message):
        open_sink(f"parquet:{config}")
    assert os.listdir(tmp_path) == ["file"]


def test_reading_makes_no_data_set(path):
    with pytest.raises(PluginError, match="holds no records"):
        open_store(f"parquet:{path}")
    assert not path.exists()


def test_a_read_only_folder(unprivileged):  # noqa: F811
    path = unprivileged / "records"
    sink = open_sink(f"parquet:{path}")
    sink.write([record(0)])
    sink.close()
    for folder in (path, path / "_journal"):
        folder.chmod(0o555)
    with pytest.raises(PluginError, match=r"Permission denied.*\?spool=dir"):
        open_sink(f"parquet:{path}")
    assert positions(path) == [0]
    unprivileged.chmod(0o555)
    with pytest.raises(PluginError, match="change its permissions"):
        open_sink(f"parquet:{unprivileged}/new")


# -- other file systems


def test_a_uri_goes_through_pyarrows_file_systems(tmp_path):
    url = f"parquet:file://{tmp_path}/records?spool={tmp_path}/spool"
    sink = open_sink(url)
    sink.write([record(0), record(1, model="b")])
    other = open_sink(f"parquet:{tmp_path}/others?spool={tmp_path}/spool")  # its journals are not the first one's
    assert len(list((tmp_path / "spool").glob("*/*.arrows"))) == 1
    sink.close()
    assert list((tmp_path / "spool").glob("*/*.arrows")) == []
    other.close()
    with open_store(url) as store:
        assert sorted(row.query_position for row in store.records()) == [0, 1]
    assert len(files(tmp_path / "records")) == 2


def test_a_file_system_without_renames():
    """What an object store sees, without its network: files are complete when they are closed."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    dataset = Dataset("memory", fs.PyFileSystem(fs.FSSpecHandler(memory)), "bucket/records")
    assert not dataset.is_local
    dataset.check(create=True)
    dataset.check()
    rows = from_records([record(0), record(1, model="b"), record(2, request_id="gone")], time=DAY).to_arrow()
    try:
        assert dataset.write(pa.Table.from_batches([rows]), "0000000000000001-a") == 3
        assert [file.rsplit("/", 1)[1] for file in dataset.files()] == ["0000000000000001-a.parquet"] * 2
        assert dataset.newest() == 1
        assert dataset.delete("gone") == 1
        assert sum(dataset.metadata(file).num_rows for file in dataset.files()) == 2
        assert dataset.prune(DAY) == 0
        assert dataset.prune(DAY + 1) == 2
        assert dataset.files() == []
    finally:
        memory.rm("bucket", recursive=True)
