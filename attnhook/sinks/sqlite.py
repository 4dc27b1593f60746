"""The sink that keeps records in one SQLite file, without duplicates."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from itertools import chain

from attnhook.plugins.contracts import Sink
from attnhook.record.columns import Columns, from_records
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import config, database
from attnhook.sinks.retention import Retention

_CACHED_BYTES = 16 * 2**20  # of the names of sessions and models that are remembered with their numbers
_ENTRY_BYTES = 200  # of a name that is remembered, beside its characters
_COLUMNS = (
    "session", "query_position", "decode_step", "model", "time", "zone", "mode", "think_phase", "layer", "fingerprint",
    "record", "query_token", "sink_mass",
)  # fmt: skip
_ROW = f"({', '.join('?' * len(_COLUMNS))})"
#: Rows of one statement: a step of SQLite for each row costs a third more, and lets go of the interpreter each time.
#: Every SQLite takes 999 parameters.
_ROWS = 64


def _insertion(rows: int) -> str:
    values = ", ".join([_ROW] * rows)
    return (
        f"INSERT INTO records ({', '.join(_COLUMNS)}) VALUES {values} ON CONFLICT (session, query_position) DO NOTHING"
    )


_INSERT_ONE, _INSERT_MANY = _insertion(1), _insertion(_ROWS)
_inherited: list[sqlite3.Connection] = []  # of a parent process: closing one here could harm its locks


class SqliteSink(Sink):
    """``sqlite:path``: a store in one file, without duplicates, for one machine.

    Options: ``busy=30s`` (how long to wait for another writer), ``keep_days=30``.

    Delivery guarantee: when `write` returned, the batch is committed: a killed process loses none of it, a power
    cut perhaps the last seconds, and the file stays whole. A batch is stored whole or not at all. A record whose
    (request id, choice, query position) is there already is not stored again and counts as `duplicates`, so a
    batch may be delivered any number of times. Several processes may write to one file; they take turns, and one
    that waits longer than ``busy`` raises.
    """

    def __init__(self) -> None:
        self.written = 0  #: rows stored since `open`
        self.duplicates = 0  #: records that were there already
        self._path = ""
        self._busy = database.BUSY_SECONDS
        self._retention = Retention(None)
        self._connection: sqlite3.Connection | None = None
        self._pid = 0

    def open(self, config_text: str) -> None:
        """Open or make the store, bring its schema up to date, and remove what is past its days.

        Raises PluginError for a file that is damaged, of another program, of a newer schema or not writable.
        """
        known = {"busy": config.seconds, "keep_days": config.days}
        self._path, options = config.parse("sqlite", config_text, known)
        self._busy = options.get("busy", database.BUSY_SECONDS)
        self._retention = Retention(options.get("keep_days"))
        self.written = self.duplicates = 0
        self._connect()
        self._retain()

    def _connect(self) -> None:
        self._connection = database.connect(self._path, busy=self._busy)
        self._connection.execute("PRAGMA secure_delete = ON")  # what is removed is overwritten
        self._pid = os.getpid()
        self._sessions: dict[tuple[str, int], int] = {}
        self._models: dict[str, int] = {}
        self._remembered = 0  # bytes of both
        self._seen = -1  # what SQLite says changes when another connection writes

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Store the records that are not there yet, in one transaction.

        Raises sqlite3.Error where the file does not take them, RecordError where a record is invalid; none of
        the batch is then stored.
        """
        if batch:
            self.write_columns(from_records(batch))

    def write_columns(self, columns: Columns) -> None:
        """`write` for rows that are columns already; their times are kept."""
        connection = self._ready()
        try:
            with database.transaction(connection):
                stored = self._insert(connection, columns)
        except BaseException:
            self._forget()  # numbers that were handed out in the transaction are taken back with it
            raise
        self.written += stored
        self.duplicates += len(columns) - stored
        self._retain()

    def prune(self, before: int) -> int:
        """Remove records stored before that time (microseconds since 1970, UTC); returns how many."""
        connection = self._ready()
        removed = 0
        while True:  # in steps, so that another writer gets its turn
            with database.transaction(connection):
                cursor = connection.execute(
                    "DELETE FROM records WHERE id IN (SELECT id FROM records WHERE time < ? LIMIT 20000)", (before,)
                )
                if cursor.rowcount == 0:
                    connection.execute(
                        "DELETE FROM sessions WHERE NOT EXISTS (SELECT 1 FROM records r WHERE r.session = sessions.id)"
                    )
                    break
                removed += cursor.rowcount
        self._forget()
        return removed

    def delete(self, request_id: str) -> int:
        """Remove every record of a request; returns how many."""
        connection = self._ready()
        with database.transaction(connection):
            of_request = "(SELECT id FROM sessions WHERE request_id = ?)"
            removed = connection.execute(f"DELETE FROM records WHERE session IN {of_request}", (request_id,)).rowcount
            connection.execute("DELETE FROM sessions WHERE request_id = ?", (request_id,))
        self._forget()
        return removed

    def close(self) -> None:
        """Close the file; what was written stays."""
        connection, self._connection = self._connection, None
        if connection is not None:
            _inherited.append(connection) if self._pid != os.getpid() else connection.close()

    def _ready(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ValueError(f"sink sqlite:{self._path} is closed")
        if self._pid != os.getpid():  # forked: SQLite forbids using the parent's connection
            _inherited.append(self._connection)
            self._connect()
        return self._connection

    def _forget(self) -> None:
        self._sessions.clear()
        self._models.clear()
        self._remembered = 0

    def _insert(self, connection: sqlite3.Connection, columns: Columns) -> int:
        """Insert inside a transaction; returns how many rows were new."""
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._seen or self._remembered > _CACHED_BYTES:
            self._forget()  # another process wrote, and may have removed what we remember
            self._seen = version
        sessions = self._session_numbers(connection, columns)
        models = self._model_numbers(connection, columns.model)
        data = columns.fingerprint.astype("<f4", copy=False).tobytes()
        size = len(data) // max(len(columns), 1)
        parts = (
            sessions,
            columns.query_position,
            columns.decode_step,
            models,
            columns.time,
            columns.zone,
            columns.mode,
            columns.think_phase,
            columns.layer,
            [data[at : at + size] for at in range(0, len(data), size or 1)],
            columns.record,
            columns.query_token,
            columns.sink_mass,
        )
        rows = list(zip(*parts, strict=True))
        before = connection.total_changes
        whole = len(columns) - len(columns) % _ROWS
        for start in range(0, whole, _ROWS):
            connection.execute(_INSERT_MANY, list(chain.from_iterable(rows[start : start + _ROWS])))
        connection.executemany(_INSERT_ONE, rows[whole:])
        return connection.total_changes - before

    def _session_numbers(self, connection: sqlite3.Connection, columns: Columns) -> list[int]:
        keys = list(zip(columns.request_id, columns.choice, strict=True))
        known = self._sessions
        # the first time of each key, in the order of arrival
        unknown = {
            key: time for key, time in zip(reversed(keys), reversed(columns.time), strict=True) if key not in known
        }
        connection.executemany(
            "INSERT INTO sessions (request_id, choice, started) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(*key, time) for key, time in reversed(unknown.items())],
        )
        for key in unknown:
            known[key] = connection.execute(
                "SELECT id FROM sessions WHERE request_id = ? AND choice = ?", key
            ).fetchone()[0]
            self._remembered += len(key[0]) + _ENTRY_BYTES
        return [known[key] for key in keys]

    def _model_numbers(self, connection: sqlite3.Connection, names: list[str]) -> list[int]:
        for name in set(names).difference(self._models):
            connection.execute("INSERT INTO models (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
            self._models[name] = connection.execute("SELECT id FROM models WHERE name = ?", (name,)).fetchone()[0]
            self._remembered += len(name) + _ENTRY_BYTES
        return [self._models[name] for name in names]

    def _retain(self) -> None:
        connection = self._ready()
        self._retention.keep(lambda: connection.execute("SELECT max(time) FROM records").fetchone()[0], self.prune)
