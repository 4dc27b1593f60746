"""Stores that somebody else has written or damaged: each reader refuses in one line, and takes little memory."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from attnhook.errors import AttnhookError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import arrow_schema, fingerprints_of
from attnhook.sinks import dataset
from attnhook.sinks.jsonl import read_jsonl
from attnhook.sinks.opening import open_sink
from attnhook.store import discoveries, open_store
from tests.helpers import ROOT
from tests.sinks.samples import lean, record


def filled(url: str, count: int = 4) -> None:
    sink = open_sink(url)
    sink.write([record(i) for i in range(count)])
    sink.close()


def refused(read: Callable[[], object]) -> str:
    """The message, which must be one line of an error that attnhook raises on purpose."""
    with pytest.raises(AttnhookError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def read_all(url: str) -> list[Any]:
    with open_store(url) as store:
        batches = list(store.fingerprints())
        return [len(batches), list(store.records())]


in_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


def peak(code: str, *arguments: str) -> int:
    """The most memory that a process had which ran the code, in MiB."""
    # not getrusage: its maximum is inherited from the process that started this one
    status = "[int(line.split()[1]) // 1024 for line in open('/proc/self/status') if 'VmHWM' in line]"
    program = f"import sys\n{code}\nprint(*{status})"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


# -- jsonl


@in_linux
def test_a_short_compressed_file_with_a_line_of_two_gigabytes(tmp_path):
    path = tmp_path / "records-20260101T000000.000000Z-1.jsonl.zst"
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    with open(path, "wb") as file:
        file.write(packer.compress(b'{"schema_version":1,"x":"'))
        for _ in range(2048):
            file.write(packer.compress(bytes([97]) * 2**20))
        file.write(packer.flush())
    assert path.stat().st_size < 300_000
    read = """
from attnhook.errors import RecordError
from attnhook.sinks.jsonl import read_jsonl
from attnhook.sinks.rotation import Rotation
try:
    list(read_jsonl(sys.argv[1]))
except RecordError as error:
    assert "line 1: it has more than 16,777,216 bytes" in str(error), error
else:
    raise SystemExit("it was read")
assert Rotation(sys.argv[1].split("-2026")[0] + ".jsonl").prune(2**62) == 1  # counts its lines
"""
    assert peak(read, str(path)) < 300
    assert not path.exists()


def test_deep_json_is_no_torn_line(tmp_path):
    path = tmp_path / "records.jsonl"
    filled(f"jsonl:{path}", 2)
    with path.open("a") as file:
        file.write('{"schema_version":1,"x":' + "[" * 200_000 + "]" * 200_000 + "}\n")
    for tolerate in (False, True):
        assert "line 3 is not a record: it is nested too deeply" in refused(
            lambda tolerate=tolerate: list(read_jsonl(path, tolerate_torn_tail=tolerate))
        )
    assert "line 3" in refused(lambda: read_all(f"jsonl:{path}"))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("request_id", 7, "request_id is '7'; it must be text"),
        ("request_id", "\ud800", "it must be text"),
        ("request_id", "x" * 70_000, "it must be text of at most 65535"),
        ("choice", -1, "choice is '-1'; it must be a number from 0 to 65535"),
        ("choice", 2**16, "choice is '65536'"),
        ("choice", True, "choice is 'True'"),
        ("model", None, "model is 'None'; it must be text"),
        ("query_position", 2**40, "query_position is '1099511627776'"),
        ("query_position", 1.5, "query_position is '1.5'"),
        ("decode_step", "1", "decode_step is '1'; it must be a number from 0 up or null"),
        ("mode", "rare", "mode is 'rare'; it must be one of raw"),
        ("think_phase", [], "think_phase is"),
        ("fingerprint", [0.0] * 19, "it must be 20 numbers"),
        ("fingerprint", ["a"] * 20, "it must be 20 numbers"),
        ("fingerprint", [float("nan")] * 20, "it must be 20 numbers"),
        ("fingerprint", [10**400] * 20, "it must be 20 numbers"),
        ("fingerprint", {"a": 1}, "it must be 20 numbers"),
        ("fingerprint", None, "fingerprint is 'None'; it must be 20 numbers"),
        ("manifold", 3, "manifold is '3'; it must be the name of a zone"),
        ("query_token", "a", "query_token is 'a'"),
        ("layers", [], "damaged"),
        ("layers", {"x": {}}, "damaged"),
        ("layers", {"99999": 5}, "damaged"),
        ("spans", [1], "damaged"),
    ],
)  # fmt: skip
def test_jsonl_of_wrong_types_names_file_line_and_value(tmp_path, name, value, wanted):
    path = tmp_path / "records.jsonl"
    filled(f"jsonl:{path}")
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), name: value})
    path.write_text("\n".join(lines) + "\n")
    message = refused(lambda: read_all(f"jsonl:{path}"))
    assert f"{path}, line 3" in message and wanted in message, message


def test_one_long_layer_among_many_takes_no_memory(tmp_path):
    path = tmp_path / "records.jsonl"
    filled(f"jsonl:{path}", 1)
    entry = json.loads(path.read_text())
    layer = entry["layers"]["3"]
    short = {**layer, "token_positions": [], "attention_scores": []}
    long = {**layer, "token_positions": [0] * 200_000, "attention_scores": [0] * 200_000}
    entry["layers"] = {**{str(i): short for i in range(2000)}, "2000": long}
    path.write_text(json.dumps(entry) + "\n")
    assert "2001 layers of up to 200000 positions" in refused(lambda: read_all(f"jsonl:{path}"))


# -- sqlite


def change(path: Path, *statements: str) -> None:
    with sqlite3.connect(path, isolation_level=None) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("table", "name", "value", "wanted"),
    [
        ("records", "fingerprint", "'text'", "fingerprint is str of 4 bytes 'text'; it must be 80 bytes"),
        ("records", "fingerprint", "x'00'", "fingerprint is bytes of 1 bytes"),
        ("records", "record", "12", "record is int '12'; it must be null or of type binary"),
        ("records", "decode_step", "'one'", "decode_step is str of 3 bytes 'one'; it must be null or of type int32"),
        ("records", "query_position", "1 << 40", "query_position is int '1099511627776'; it must be of type int32"),
        ("records", "time", "1.5", "time is float '1.5'"),
        ("records", "zone", "x'ff'", "zone is bytes of 1 bytes"),
        ("records", "layer", "40000", "layer is int '40000'; it must be null or of type int16"),
        ("records", "query_token", "2.5", "query_token is float '2.5'"),
        ("sessions", "choice", "-1", "choice is int '-1'; it must be of type uint16"),
        ("sessions", "request_id", "x'00'", "request_id is bytes of 1 bytes"),
        ("models", "name", "x'01'", "model is bytes of 1 bytes"),
    ],
)
def test_sqlite_of_wrong_types_names_file_row_and_value(tmp_path, table, name, value, wanted):
    path = tmp_path / "records.db"
    filled(f"sqlite:{path}")
    change(path, f"UPDATE {table} SET {name} = {value} WHERE id = (SELECT max(id) FROM {table})")
    message = refused(lambda: read_all(f"sqlite:{path}"))
    row = {"records": "row 4", "sessions": "row 1", "models": "row 1"}[table]
    assert message.startswith(f"sqlite:{path}, {row} of records: ") and wanted in message, message


@in_linux
def test_a_text_that_is_not_utf_8_and_a_value_of_a_gigabyte(tmp_path):
    path = tmp_path / "records.db"
    filled(f"sqlite:{path}")
    change(path, "UPDATE records SET zone = CAST(x'ff' AS TEXT) WHERE id = 2")
    assert str(path) in refused(lambda: read_all(f"sqlite:{path}"))
    change(path, "UPDATE records SET zone = 'local', record = zeroblob(200000000) WHERE id = 2")
    read = """
from attnhook.errors import AttnhookError
from attnhook.store import open_store
try:
    with open_store(sys.argv[1]) as store:
        list(store.records())
except AttnhookError as error:
    assert "too big" in str(error), error
else:
    raise SystemExit("it was read")
"""
    if sys.version_info >= (3, 11):
        assert peak(read, f"sqlite:{path}") < 300


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.mark.parametrize("table", ["records", "models", "sessions"])
def test_a_view_in_the_place_of_a_table_is_refused(tmp_path, table):
    path = tmp_path / "records.db"
    filled(f"sqlite:{path}")
    change(path, "DROP VIEW token_records", f"ALTER TABLE {table} RENAME TO old",
           f"CREATE VIEW {table} AS SELECT * FROM old, ({ENDLESS})")  # fmt: skip
    for use in (
        lambda: read_all(f"sqlite:{path}"),
        lambda: open_sink(f"sqlite:{path}"),
        lambda: discoveries.load(str(path)),
    ):
        assert f"{table} must be a table, and is a view (CREATE VIEW)" in refused(use)


def test_a_virtual_table_and_generated_columns_are_refused(tmp_path):
    path = tmp_path / "records.db"
    filled(f"sqlite:{path}")
    change(path, "DROP VIEW token_records", "DROP TABLE records",
           "CREATE TABLE records (id INTEGER PRIMARY KEY, session, query_position, decode_step, model, time, zone, "
           "mode, think_phase, layer, fingerprint AS (zeroblob(80)), record, query_token, sink_mass)")  # fmt: skip
    assert "fingerprint must be plain columns of it" in refused(lambda: read_all(f"sqlite:{path}"))
    change(path, "DROP TABLE records", "CREATE VIRTUAL TABLE records USING fts5(session)")
    assert "records must be a table, and is a table (CREATE VIRTUAL)" in refused(lambda: read_all(f"sqlite:{path}"))
    change(path, "DROP TABLE records")
    assert "records must be a table, and is not there" in refused(lambda: read_all(f"sqlite:{path}"))


def test_triggers_are_refused_by_writers_and_never_run_for_readers(tmp_path):
    path = tmp_path / "records.db"
    filled(f"sqlite:{path}")
    change(path, "CREATE TRIGGER gone AFTER INSERT ON records BEGIN DELETE FROM records; END")
    assert "has a trigger, 'gone' on 'records'" in refused(lambda: open_sink(f"sqlite:{path}"))
    assert "has a trigger, 'gone' on 'records'" in refused(lambda: discoveries.save(str(path), {}, 1, []))
    assert len(read_all(f"sqlite:{path}")[1]) == 4


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        (f"UPDATE discovery_runs SET parameters = '{'[' * 100_000}'", "nested too deeply"),
        ("UPDATE discovery_runs SET parameters = '[1]'", "no JSON object"),
        ("UPDATE discovery_runs SET parameters = x'00'", "parameters is"),
        ("UPDATE discovery_runs SET created = 'then'", "created is 'then' of type str, not int"),
        ("UPDATE clusters SET centroid = 'text'", "the centroid of cluster 0 is 'text', not 80 bytes"),
        ("UPDATE clusters SET centroid = zeroblob(84)", "not 80 bytes"),
        ("UPDATE clusters SET size = 'many'", "size is 'many' of type str, not int"),
        ("UPDATE clusters SET zone = x'00'", "zone is"),
    ],
)
def test_discoveries_of_wrong_types(tmp_path, statement, wanted):
    path = str(tmp_path / "records.db")
    discoveries.save(path, {"a": 1}, 4, [discoveries.Cluster(0, 4, "local", np.zeros(20, np.float32))])
    assert discoveries.load(path)[0].clusters[0].size == 4
    change(Path(path), statement)
    message = refused(lambda: discoveries.load(path))
    assert "a discovery run is damaged: run 1: " in message and wanted in message, message


# -- parquet


def rewrite(folder: Path, name: str, change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Path:
    """Replace a column of the only file; the file's metadata stay attnhook's."""
    (path,) = folder.glob("**/*.parquet")
    with pq.ParquetFile(path) as file:
        table = file.read()
    place = table.schema.get_field_index(name)
    column = pa.array(change(table[name].to_pylist()), kind or table.schema.field(name).type)
    pq.write_table(table.set_column(place, pa.field(name, column.type), column), path)
    return path


def test_null_fingerprints_are_read_from_the_records(tmp_path):
    url = f"parquet:{tmp_path / 'records'}"
    filled(url, 6)
    with open_store(url) as store:
        before = [row for batch in store.fingerprints() for row in batch["fingerprint"].to_pylist()]
    rewrite(tmp_path, "fingerprint", lambda rows: [None if i in (1, 4) else row for i, row in enumerate(rows)])
    with open_store(url) as store:
        batches = list(store.fingerprints())
        after = [row for batch in batches for row in batch["fingerprint"].to_pylist()]
        assert after == before
        assert batches[0].schema.names == ["request_id", "choice", "query_position", "decode_step", "model", "time",
                                           "zone", "fingerprint"]  # fmt: skip
        assert [r.query_position for r in store.records()] == list(range(6))
        assert [r.fingerprint.tolist() for r in store.records()] == before
        assert store.count() == 6


def test_a_null_fingerprint_without_a_record_shifts_no_other_row(tmp_path):
    """Lean rows are their fingerprint: those of the others stay theirs, and the one without is named."""
    url = f"parquet:{tmp_path / 'records'}"
    sink = open_sink(url)
    sink.write([lean(i) for i in range(4)])
    sink.close()
    with open_store(url) as store:
        before = [r.fingerprint.tolist() for r in store.records()]
    rewrite(tmp_path, "fingerprint", lambda rows: [rows[0], None, *rows[2:]])
    with open_store(url) as store:
        (batch,) = store.fingerprints()
        assert batch["fingerprint"].to_pylist() == [before[0], None, *before[2:]]
        numbers = fingerprints_of(batch)
        assert numbers.shape == (4, fp.SIZE) and np.isnan(numbers[1]).all() and numbers[3].tolist() == before[3]
        records = store.records()
        assert next(records).fingerprint.tolist() == before[0]
        assert "position 1: neither its record nor its fingerprint is stored" in refused(lambda: next(records))


def test_large_records_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """The same rows, filters and pages as otherwise."""
    url = f"parquet:{tmp_path / 'records'}"
    sink = open_sink(url)
    sink.write([record(i, request_id=f"r{i % 2}") for i in range(20)])
    sink.close()

    def found() -> list[object]:
        with open_store(url) as store:
            return [
                [r.to_bytes() for r in store.records()],
                [r.key for r in store.records(request_id="r1", offset=2, limit=5)],
                [batch.to_pydict() for batch in store.fingerprints(columns=["record", "query_token", "time"])],
                store.count(request_id="r0"),
            ]

    before = found()
    monkeypatch.setattr(dataset, "_CHUNK_BYTES", 300)
    with open_store(url) as store:
        sizes = [batch.num_rows for batch in store.fingerprints(columns=["record"])]
    assert max(sizes) < 20 and sum(sizes) == 20
    after = found()
    assert after[:2] == before[:2] and after[3] == before[3]
    rows = {name: [value for batch in after[2] for value in batch[name]] for name in before[2][0]}
    assert rows == before[2][0]


@pytest.mark.parametrize(
    ("name", "change", "kind", "wanted"),
    [
        ("request_id", lambda rows: [None, *rows[1:]], None, "row 0 of those read: request_id is null"),
        ("zone", lambda rows: [*rows[:3], None], None, "row 3 of those read: zone is null"),
        ("time", lambda rows: ["then"] * 4, pa.string(), "time is string and must be timestamp"),
        ("choice", lambda rows: [2**40] * 4, pa.int64(), "choice is int64 and must be uint16"),
        ("query_position", lambda rows: [{"a": 1}] * 4, pa.struct({"a": pa.int8()}), "must be int32"),
        ("fingerprint", lambda rows: [1.5] * 4, pa.float32(), "fingerprint is float and must be fixed_size_list"),
        ("fingerprint", lambda rows: [[0.5] * 19] * 4, pa.list_(pa.float32(), 19), "[19] and must be"),
        ("record", lambda rows: [1] * 4, pa.int8(), "record is int8 and must be binary"),
        ("record", lambda rows: [b"AH"] * 4, None, "row 0 of those asked for: not an attnhook record"),
    ],
)
def test_parquet_of_wrong_types_names_file_and_value(tmp_path, name, change, kind, wanted):
    url = f"parquet:{tmp_path / 'records'}"
    filled(url)
    path = rewrite(tmp_path, name, change, kind)
    message = refused(lambda: read_all(url))
    assert (str(path) in message or url in message) and wanted in message, message


@in_linux
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "dictionary"), [(1, False), (1500, False), (1500, True)])
def test_a_small_parquet_file_takes_little_memory(tmp_path, rows, dictionary):
    """One record of half a gigabyte, and one of a megabyte in 1500 rows; both pack to next to nothing."""
    folder = tmp_path / "records"
    filled(f"parquet:{folder}", 1)
    make = """
import glob, pyarrow as pa, pyarrow.parquet as pq
(path,) = glob.glob(sys.argv[1] + "/**/*.parquet", recursive=True)
with pq.ParquetFile(path) as file:
    table = file.read()
rows, dictionary = int(sys.argv[2]), sys.argv[3] == "True"
place = table.schema.get_field_index("record")
record = pa.array([bytes(2**29 if rows == 1 else 10**6)] * rows, pa.binary())
table = table.take([0] * rows).set_column(place, table.schema.field(place), record)
pq.write_table(table, path, compression="zstd", use_dictionary=dictionary, dictionary_pagesize_limit=2**30,
               write_batch_size=8)
"""
    peak(make, str(folder), str(rows), str(dictionary))
    (path,) = folder.glob("**/*.parquet")
    assert path.stat().st_size < 300_000
    read = """
from attnhook.errors import RecordError
from attnhook.store import open_store
try:
    with open_store(sys.argv[1]) as store:
        list(store.records())
except RecordError as error:
    assert sys.argv[2] in str(error), error
else:
    raise SystemExit("it was read")
"""
    wanted = "record of 1 rows unpacks to 536,8" if rows == 1 else "not an attnhook record"
    assert peak(read, f"parquet:{folder}", wanted) < 900


def test_a_marker_and_a_name_that_are_not_ours(tmp_path):
    folder = tmp_path / "records"
    filled(f"parquet:{folder}")
    (path,) = folder.glob("**/*.parquet")
    path.rename(path.with_name("theirs.parquet"))
    open_sink(f"parquet:{folder}?keep_days=1").close()  # looks for the newest file
    for marker in ("[" * 2000, "[1]", "{"):
        (folder / "_attnhook.json").write_text(marker)
        assert f"parquet:{folder} cannot be used" in refused(lambda: read_all(f"parquet:{folder}"))


def test_a_journal_of_other_columns_keeps_no_new_records_out(tmp_path, caplog):
    folder = tmp_path / "records"
    filled(f"parquet:{folder}", 2)
    schema = arrow_schema()
    changed = schema.set(0, pa.field("request_id", pa.int64()))
    for number, kind in enumerate((changed, schema.remove(3), pa.schema([], metadata=schema.metadata))):
        path = str(folder / "_journal" / f"{number}.arrows")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, kind) as stream:
            if len(kind):
                stream.write_batch(pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in kind], schema=kind))
    filled(f"parquet:{folder}", 3)
    assert caplog.text.count("was left as it is") == 2  # the third has no rows, and goes
    with open_store(f"parquet:{folder}") as store:
        assert store.count() == 5
