"""The SQLite file of a store: its schema, migrations, and how it is opened and refused."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import quote

from attnhook.errors import PluginError

APPLICATION_ID = 0x41484B31  # "AHK1": tells a store from other SQLite files
BUSY_SECONDS = 30.0
_VALUE_BYTES = 64 * 2**20  # of one value; a record has at most a few MiB

# A session is one answer of one request. Rows name it by number: the key of a record is two integers, and a
# request id is stored once. Times are microseconds since 1970, UTC.
_RECORDS = """
CREATE TABLE models (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL,
    choice INTEGER NOT NULL,
    started INTEGER NOT NULL,
    UNIQUE (request_id, choice)
);
CREATE TABLE records (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions (id),
    query_position INTEGER NOT NULL,
    decode_step INTEGER,
    model INTEGER NOT NULL REFERENCES models (id),
    time INTEGER NOT NULL,
    zone TEXT NOT NULL,
    mode TEXT NOT NULL,
    think_phase TEXT NOT NULL,
    layer INTEGER,
    fingerprint BLOB NOT NULL,
    record BLOB,
    UNIQUE (session, query_position)
);
CREATE INDEX records_time ON records (time);
CREATE VIEW token_records AS
    SELECT r.id, s.request_id, s.choice, r.query_position, r.decode_step, m.name AS model, r.time, r.zone, r.mode,
           r.think_phase, r.layer, r.fingerprint, r.record
    FROM records r JOIN sessions s ON s.id = r.session JOIN models m ON m.id = r.model;
"""
_DISCOVERY = """
CREATE TABLE discovery_runs (
    id INTEGER PRIMARY KEY,
    created INTEGER NOT NULL,
    parameters TEXT NOT NULL,
    records INTEGER NOT NULL
);
CREATE TABLE clusters (
    run INTEGER NOT NULL REFERENCES discovery_runs (id) ON DELETE CASCADE,
    label INTEGER NOT NULL,
    size INTEGER NOT NULL,
    zone TEXT NOT NULL,
    centroid BLOB NOT NULL,
    PRIMARY KEY (run, label)
) WITHOUT ROWID;
"""
# id of the token at query_position, where the record has token ids
_TOKENS = """
ALTER TABLE records ADD COLUMN query_token INTEGER;
DROP VIEW token_records;
CREATE VIEW token_records AS
    SELECT r.id, s.request_id, s.choice, r.query_position, r.decode_step, m.name AS model, r.time, r.zone, r.mode,
           r.think_phase, r.layer, r.fingerprint, r.record, r.query_token
    FROM records r JOIN sessions s ON s.id = r.session JOIN models m ON m.id = r.model;
"""
# attention on position 0, mean over the layers
_SINK_MASS = """
ALTER TABLE records ADD COLUMN sink_mass REAL;
DROP VIEW token_records;
CREATE VIEW token_records AS
    SELECT r.id, s.request_id, s.choice, r.query_position, r.decode_step, m.name AS model, r.time, r.zone, r.mode,
           r.think_phase, r.layer, r.fingerprint, r.record, r.query_token, r.sink_mass
    FROM records r JOIN sessions s ON s.id = r.session JOIN models m ON m.id = r.model;
"""
#: Script i takes a store from schema i to schema i + 1. Scripts of released versions never change.
MIGRATIONS: tuple[str, ...] = (_RECORDS, _DISCOVERY, _TOKENS, _SINK_MASS)
SCHEMA_VERSION = len(MIGRATIONS)


def connect(path: str, *, read_only: bool = False, busy: float = BUSY_SECONDS) -> sqlite3.Connection:
    """Open a store; a writer makes the file and brings its schema up to date.

    ``busy`` seconds are waited for another writer. The connection is in autocommit mode.
    Raises PluginError where the file is no store, is damaged, was written by a newer attnhook or cannot be
    opened; it is then left as it was.
    """
    name = os.path.expanduser(path)  # no shell expands the ~ behind "sqlite:"
    if not path:
        raise PluginError("sqlite: has no path; write sqlite:records.db")
    if path == ":memory:":
        raise PluginError("sqlite::memory: would be gone with this process; use memory: for that, or name a file")
    with refusals(path):
        fresh = _check_header(name)
        if read_only and fresh:
            raise PluginError(f"sqlite:{path} is not there, or empty: name a file that the sink wrote")
        mode = _reading_mode(Path(name)) if read_only else "rwc"
        connection = sqlite3.connect(
            f"file:{quote(os.path.abspath(name))}?mode={mode}",
            uri=True,
            timeout=busy,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")
            connection.execute("PRAGMA trusted_schema = OFF")  # what the file defines may call harmless functions only
            if hasattr(connection, "setlimit"):  # Python 3.11
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA cache_size = -65536")  # KiB
            _check_schema(connection, path)
            if not read_only:
                _check_triggers(connection, path)
                _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turn SQLite's and the system's errors into PluginError with the remedy."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise PluginError(f"sqlite:{path} cannot be used: {error}. {_remedy(path, error)}") from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction: all of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")  # waits for another writer now, not half-way
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _reading_mode(path: Path) -> str:
    """How to open a store that is only read.

    A reader of a write-ahead log keeps an index file beside it, and only one that may write can clear it away.
    """
    effective = os.access in os.supports_effective_ids
    if all(os.access(place, os.W_OK, effective_ids=effective) for place in (path, path.parent)):
        return "rw"
    logged = path.with_name(path.name + "-wal").exists()
    return "ro" if logged or os.access(path.parent, os.W_OK, effective_ids=effective) else "ro&immutable=1"


def _check_header(name: str) -> bool:
    """Whether the file is new or empty; raises where it is something else than SQLite."""
    try:
        with open(name, "rb") as file:
            header = file.read(16)
    except FileNotFoundError:
        return True
    if header and header != b"SQLite format 3\0":
        raise sqlite3.DatabaseError(f"it begins with {header!r}, so it is no SQLite file")
    return not header


def _check_schema(connection: sqlite3.Connection, path: str) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise PluginError(
            f"sqlite:{path} is a database of another program ({tables} tables and indexes); name a new file"
        )
    if version > SCHEMA_VERSION:
        raise PluginError(
            f"sqlite:{path} has schema version {version}; this attnhook knows {SCHEMA_VERSION}: upgrade attnhook, or "
            "name another file. Nothing in it was changed"
        )
    if version >= 1:
        _check_objects(connection, path, version)


def _check_triggers(connection: sqlite3.Connection, path: str) -> None:
    """Refuse triggers, which run when records are written; readers cannot write, so that none runs."""
    found = connection.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger'").fetchone()
    if found:
        raise PluginError(
            f"sqlite:{path} has a trigger, {found[0][:80]!r} on {found[1][:80]!r}: attnhook makes none, and it would "
            "run when records are written; look at it and remove it with DROP TRIGGER, or name another file"
        )


def _check_objects(connection: sqlite3.Connection, path: str, version: int) -> None:
    """Refuse what would run when the store is read: views, virtual tables, generated columns in our tables' place."""
    objects = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    found = {name: (kind, " ".join(str(sql).split()[:2]).upper()) for kind, name, sql in objects}
    for name, columns in _columns_of(version).items():
        if found.get(name) != ("table", "CREATE TABLE"):
            what = f"a {found[name][0]} ({found[name][1]})" if name in found else "not there"
            raise PluginError(
                f"sqlite:{path}: {name} must be a table, and is {what}: the file was changed, or is of another "
                "program; name a file that the sink wrote"
            )
        # the last number: 2 and 3 are generated columns, which are computed when they are read
        rows = connection.execute(f"PRAGMA table_xinfo({name})").fetchall()
        there = {row[1]: row[6] for row in rows}
        odd = [column for column in columns if there.get(column) != 0]
        if odd:
            raise PluginError(
                f"sqlite:{path}: the table {name} has {', '.join(map(repr, there))[:200]}; {', '.join(odd)} must be "
                "plain columns of it: the file was changed; name a file that the sink wrote"
            )


@cache
def _columns_of(version: int) -> dict[str, list[str]]:
    """Tables of that schema version and their columns."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for script in MIGRATIONS[:version]:
            connection.executescript(script)
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")] for (name,) in tables}


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    journal = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if journal != "wal":
        raise PluginError(
            f"sqlite:{path}: this place cannot hold a write-ahead log (journal mode {journal}); name a local disk"
        )
    # a killed process loses nothing, a power cut at most the last commits, and never the file
    connection.execute("PRAGMA synchronous = NORMAL")
    if connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
        return
    with transaction(connection):
        _check_schema(connection, path)  # another process may have been faster
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for script in MIGRATIONS[version:]:
            for statement in script.split(";\n"):  # executescript would commit in between
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _remedy(path: str, error: Exception) -> str:
    text = str(error).lower()
    if "malformed" in text or "not a database" in text or "no sqlite file" in text or "disk i/o" in text:
        return (
            "It was left alone: name another file, or save what can be read with: "
            f"sqlite3 {path} .recover | sqlite3 new.db"
        )
    if "locked" in text or "busy" in text:
        return "Another process has been writing for too long: stop it, or wait longer with ?busy=120s."
    if "readonly" in text or "read-only" in text or "permission" in text:
        return "This process may not write it: change its permissions, or name another file."
    if "full" in text or "no space" in text:
        return "The disk is full: make room, or name a file on another disk."
    if "unable to open" in text or "no such file" in text:
        folder = os.path.dirname(os.path.expanduser(path)) or "."
        if not os.path.isdir(folder):
            return f"Its folder does not exist: mkdir -p {folder}"
        return "Name a file that exists and that this process may read and write, in a folder that it may write to."
    return "Name a file on a local disk that this process can read and write."
