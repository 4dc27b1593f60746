"""sqlite: no duplicates, nothing half-stored, and files that are not ours or are damaged are left alone."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from attnhook.errors import PluginError
from attnhook.record.columns import from_records
from attnhook.sinks import database
from attnhook.sinks.opening import open_sink
from attnhook.sinks.sqlite import SqliteSink
from attnhook.store import open_store
from tests.helpers import environment, python
from tests.record.samples import assert_same
from tests.sinks.samples import lean, record, small_disk, with_ids, write_around_a_fork
from tests.sinks.test_jsonl import unprivileged  # noqa: F401 - a fixture


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.db"


def positions(path: Path) -> list[int]:
    with open_store(f"sqlite:{path}") as store:
        return [row.query_position for row in store.records()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what is kept


def test_a_redelivered_record_is_stored_once(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write([record(0), record(1), record(1)])
    sink.write([record(1), record(2), record(1, choice=1), record(1, request_id="s")])
    assert (sink.written, sink.duplicates) == (5, 2)
    sink.close()
    sink.close()
    again = open_sink(f"sqlite:{path}")
    again.write([record(0, model="another"), record(3)])
    assert (again.written, again.duplicates) == (1, 1)
    assert positions(path) == [0, 1, 2, 1, 1, 3]
    with open_store(f"sqlite:{path}") as store:
        assert store.count(model="another") == 0  # the first one stays


def test_a_batch_is_committed_when_write_returns(path):
    run = python(
        "-c",
        f"""
        import os, signal
        from attnhook.sinks import open_sink
        from tests.sinks.samples import lean
        sink = open_sink("sqlite:{path}")
        for start in range(0, 300, 100):
            sink.write([lean(start + i) for i in range(100)])
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert run.returncode == -signal.SIGKILL
    assert positions(path) == list(range(300))
    sink = open_sink(f"sqlite:{path}")
    sink.write([lean(i) for i in range(301)])
    assert (sink.written, sink.duplicates) == (1, 300)


def test_killed_in_the_middle_nothing_is_half_stored(path):
    code = f"""
from attnhook.sinks import open_sink
from tests.sinks.samples import lean
sink = open_sink("sqlite:{path}")
for start in range(0, 10**9, 50):
    sink.write([lean(start + i) for i in range(50)])
    print(start + 50, flush=True)
"""
    run = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    acknowledged = 0
    while acknowledged < 500:
        acknowledged = int(run.stdout.readline())
    run.kill()
    rest = run.stdout.read().split("\n")
    run.stdout.close()
    run.wait(30)
    acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
    found = positions(path)
    assert found == list(range(len(found)))
    assert len(found) in (acknowledged, acknowledged + 50)  # the print may be missing, the rows may not
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_view_for_people_has_every_column(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write([record(5)])
    sink.close()
    rows = sqlite3.connect(path).execute(
        "SELECT request_id, choice, query_position, decode_step, model, zone, mode, length(fingerprint) "
        "FROM token_records"
    )
    assert rows.fetchall() == [("r", 0, 5, 0, "org/model", record(5).zone, "raw", 80)]


def test_removing_leaves_no_trace(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write([record(0, request_id="secret-id"), record(0), record(1, request_id="secret-id", choice=3)])
    assert sink.delete("secret-id") == 2
    sink.write([record(1, request_id="secret-id")])
    assert sink.delete("secret-id") == 1
    sink.close()
    assert b"secret-id" not in path.read_bytes()
    assert positions(path) == [0]


def test_pruned_records_and_their_sessions_go(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write_columns(from_records([record(0, request_id="old"), record(1)], time=1000))
    sink.write_columns(from_records([record(2)], time=3000))
    assert sink.prune(2000) == 2
    sink.write_columns(from_records([record(0, request_id="old"), record(3)], time=3000))
    sink.close()
    assert positions(path) == [2, 0, 3]
    assert sqlite3.connect(path).execute("SELECT count(*) FROM sessions").fetchone() == (2,)


# -- several writers


@pytest.mark.slow
def test_two_processes_share_one_file(path):
    code = f"""
import sys
from attnhook.sinks import open_sink
from tests.sinks.samples import lean
sink = open_sink("sqlite:{path}")
for start in range(0, 2000, 50):
    sink.write([lean(start + i, request_id="r%d" % (i % 3)) for i in range(50)])
print(sink.written, sink.duplicates)
sink.close()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE) for _ in range(3)]
    counts = [run.communicate(timeout=120)[0].split() for run in runs]
    assert sum(int(written) for written, _ in counts) == 2000
    assert all(int(written) + int(duplicates) == 2000 for written, duplicates in counts)
    assert len(positions(path)) == 2000


def test_a_writer_that_waits_too_long_says_so_and_loses_nothing_later(path):
    first, second = open_sink(f"sqlite:{path}"), open_sink(f"sqlite:{path}?busy=1s")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        second.write([record(0)])
    holder.execute("ROLLBACK")
    first.write([record(0)])
    second.write([record(0), record(1)])
    assert (second.written, second.duplicates) == (1, 1)
    assert positions(path) == [0, 1]


def test_what_another_process_removed_is_not_remembered(path):
    one, other = open_sink(f"sqlite:{path}"), open_sink(f"sqlite:{path}")
    one.write([record(0)])
    assert other.delete("r") == 1
    other.write([record(5, request_id="another", model="m2")])
    one.write([record(0), record(1)])
    with open_store(f"sqlite:{path}") as store:
        assert [(r.request_id, r.model) for r in store.records()] == [
            ("another", "m2"),
            ("r", "org/model"),
            ("r", "org/model"),
        ]


def test_a_failed_batch_leaves_no_session_behind_that_is_remembered(path):
    sink = open_sink(f"sqlite:{path}")
    blocker = sqlite3.connect(path)
    blocker.execute("CREATE TRIGGER stop BEFORE INSERT ON records WHEN NEW.query_position = 7 "
                    "BEGIN SELECT RAISE(ABORT, 'stop'); END")  # fmt: skip
    with pytest.raises(sqlite3.IntegrityError, match="stop"):
        sink.write([record(0, request_id="a"), record(7, request_id="b")])
    sink.write([record(1, request_id="c")])
    sink.write([record(2, request_id="a")])
    with open_store(f"sqlite:{path}") as store:
        assert [row.key for row in store.records()] == [("c", 0, 1), ("a", 0, 2)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_writes_through_its_own_connection(path):
    write_around_a_fork(f"sqlite:{path}")
    assert positions(path) == [0, 1, 2]


def test_reading_while_another_thread_writes(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write([lean(0)])
    stop = threading.Event()

    def write() -> None:
        for start in range(1, 10**6, 20):
            if stop.is_set():
                return
            sink.write([lean(start + i) for i in range(20)])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with open_store(f"sqlite:{path}") as store:
            counts = []
            while len(set(counts)) < 4:
                found = [r.query_position for r in store.records()]
                assert found == list(range(len(found)))
                counts.append(len(found))
    finally:
        stop.set()
        writer.join()


# -- schemas


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_older_schema_is_brought_up_to_date(path, monkeypatch, version):
    with monkeypatch.context() as older:
        older.setattr(database, "MIGRATIONS", database.MIGRATIONS[:version])
        older.setattr(database, "SCHEMA_VERSION", version)
        open_sink(f"sqlite:{path}").close()
    _write_as_then(path, [record(0), record(1)])
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (version,)
    with open_store(f"sqlite:{path}") as store:
        assert store.count() == 2  # reading needs no change
        for found, whole in zip(store.records(), [record(0), record(1)], strict=True):
            assert_same(found, whole)
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (version,)
    sink = open_sink(f"sqlite:{path}?tokens=1")
    sink.write([with_ids(1), with_ids(2)])
    sink.close()
    assert positions(path) == [0, 1, 2]
    query = "SELECT query_position, query_token FROM token_records ORDER BY query_position"
    assert sqlite3.connect(path).execute(query).fetchall() == [(0, None), (1, None), (2, 102)]
    with open_store(f"sqlite:{path}") as store:
        for found, whole in zip(store.records(), [record(0), record(1), with_ids(2)], strict=True):
            assert_same(found, whole)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (database.SCHEMA_VERSION,)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"models", "sessions", "records", "discovery_runs", "clusters"}


def _write_as_then(path, records):
    """What the sink of schemas 1 and 2 did."""
    rows = from_records(records, time=7)
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO models (id, name) VALUES (1, 'org/model')")
        connection.execute("INSERT INTO sessions (id, request_id, choice, started) VALUES (1, 'r', 0, 7)")
        for i in range(len(rows)):
            row = (
                1, rows.query_position[i], rows.decode_step[i], 1, 7, rows.zone[i], rows.mode[i], rows.think_phase[i],
                rows.layer[i], rows.fingerprint[i].tobytes(), rows.record[i],
            )  # fmt: skip
            names = (
                "session, query_position, decode_step, model, time, zone, mode, think_phase, layer, fingerprint, record"
            )
            connection.execute(f"INSERT INTO records ({names}) VALUES ({', '.join('?' * 11)})", row)
    connection.close()


def test_a_migration_that_fails_changes_nothing(path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(database, "MIGRATIONS", database.MIGRATIONS[:1])
        older.setattr(database, "SCHEMA_VERSION", 1)
        open_sink(f"sqlite:{path}").close()
    monkeypatch.setattr(
        database, "MIGRATIONS", (database.MIGRATIONS[0], "CREATE TABLE a (b);\nCREATE TABLE records (b)")
    )
    with pytest.raises(PluginError, match=r"records already exists"):
        open_sink(f"sqlite:{path}")
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'a'").fetchone() == (0,)


@pytest.mark.parametrize("opens", [open_sink, open_store])
def test_a_store_of_a_newer_schema_is_refused(path, opens):
    open_sink(f"sqlite:{path}").close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {database.SCHEMA_VERSION + 1}")
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    before = digest(path)
    with pytest.raises(
        PluginError, match=rf"schema version {database.SCHEMA_VERSION + 1}; .* knows .*: upgrade attnhook"
    ):
        opens(f"sqlite:{path}")
    assert digest(path) == before


# -- what cannot be used


@pytest.mark.parametrize("opens", [open_sink, open_store])
@pytest.mark.parametrize("content", [b"hello, I am a text file", b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 4096])
def test_what_is_no_database_is_left_alone(path, opens, content):
    path.write_bytes(content)
    with pytest.raises(PluginError, match=r"(?s)records\.db cannot be used.*left alone: name another file"):
        opens(f"sqlite:{path}")
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_a_damaged_store_is_named_and_left_alone(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write([record(i) for i in range(200)])
    sink.close()
    whole = path.read_bytes()
    page = int.from_bytes(whole[16:18], "big")
    for name, damaged in {
        "cut": whole[: len(whole) // 2],
        "schema page": whole[:100] + b"\xaa" * (page - 100) + whole[page:],
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(PluginError, match=r"malformed.*left alone.*\.recover"):
            open_sink(f"sqlite:{path}")
        assert path.read_bytes() == damaged, name


def test_damage_in_the_rows_is_an_error_when_they_are_read_and_not_a_wrong_record(path):
    sink = open_sink(f"sqlite:{path}")
    sink.write([record(i) for i in range(400)])
    sink.close()
    whole = bytearray(path.read_bytes())
    page = int.from_bytes(whole[16:18], "big")
    for start in range(12 * page, 20 * page, page):
        whole[start : start + 100] = b"\xaa" * 100
    path.write_bytes(whole)
    with pytest.raises(PluginError, match=r"malformed.*\.recover"), open_store(f"sqlite:{path}") as store:
        list(store.records())


def test_the_database_of_another_program_is_refused(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE records (a)")
    connection.commit()
    connection.close()
    before = digest(path)
    for opens in (open_sink, open_store):
        with pytest.raises(PluginError, match=r"database of another program .*; name a new file"):
            opens(f"sqlite:{path}")
    assert digest(path) == before


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    open_sink(f"sqlite:{path}").close()
    assert positions(path) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "has no path; write sqlite:"),
        (":memory:", "gone with this process"),
        ("/no/such/folder/a.db", "mkdir -p /no/such/folder"),
        ("a.db?busy=0s", "busy='0s' must be a time"),
        ("a.db?bussy=1s", "unknown option 'bussy'; did you mean 'busy'"),
    ],
)
def test_bad_urls(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=message):
        open_sink(f"sqlite:{config}")
    assert os.listdir(tmp_path) == []


def test_reading_makes_no_store(path):
    with pytest.raises(PluginError, match="is not there, or empty"):
        open_store(f"sqlite:{path}")
    assert not path.exists()


def test_paths_are_taken_literally(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b%20#c?.db", "~/home.db"):
        sink = SqliteSink()
        sink.open(name if name[0] == "~" else f"{tmp_path}/{name}")
        sink.close()
    assert sorted(os.listdir(tmp_path)) == ["a b%20#c?.db", "home.db"]


def test_a_read_only_file_and_folder(unprivileged):  # noqa: F811
    path = unprivileged / "records.db"
    sink = open_sink(f"sqlite:{path}")
    sink.write([record(0)])
    sink.close()
    path.chmod(0o444)
    unprivileged.chmod(0o555)
    with pytest.raises(PluginError, match=r"readonly.*change its permissions"):
        open_sink(f"sqlite:{path}")
    assert positions(path) == [0]  # it can still be read
    with pytest.raises(PluginError, match=r"unable to open.*folder that it may write to"):
        open_sink(f"sqlite:{unprivileged}/new.db")


def test_a_full_disk_keeps_what_was_stored_and_goes_on_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", 1024) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 300_000)
        path = disk / "records.db"
        sink = open_sink(f"sqlite:{path}")
        stored = 0
        with pytest.raises(sqlite3.OperationalError, match=r"full|disk I/O"):
            while True:
                sink.write([record(stored + i) for i in range(50)])
                stored += 50
        assert stored > 0
        assert sink.written == stored
        assert positions(path) == list(range(stored))
        ballast.unlink()
        sink.write([record(stored)])
        sink.close()
        assert positions(path) == list(range(stored + 1))
