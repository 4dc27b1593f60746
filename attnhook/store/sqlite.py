"""Reading an SQLite store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import SINCE, arrow_schema, fixed_list
from attnhook.sinks import database
from attnhook.store.base import Filters, Store

_PLACES = {"request_id": "s.request_id", "choice": "s.choice", "model": "m.name"}
_FROM = "FROM records r JOIN sessions s ON s.id = r.session JOIN models m ON m.id = r.model"


class SqliteStore(Store):
    """``sqlite:path``, through a connection of its own that cannot write."""

    def __init__(self, path: str) -> None:
        self._path, self.url = path, f"sqlite:{path}"
        self._connection = database.connect(path, read_only=True)
        with database.refusals(path):
            present = {name for _, name, *_ in self._connection.execute("PRAGMA table_info(records)")}
        # no writer of this release has opened it yet
        self._places = {**_PLACES, **{name: "NULL" for name in SINCE if name not in present}}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _count(self, filters: Filters) -> int:
        where, values = _where(filters)
        source = _FROM if filters.any else "FROM records r"
        with database.refusals(self._path):
            return int(self._connection.execute(f"SELECT count(*) {source} {where}", values).fetchone()[0])

    def _batches(
        self, filters: Filters, columns: Sequence[str], offset: int, limit: int | None, batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        where, values = _where(filters)
        places = ", ".join(self._places.get(name, f"r.{name}") for name in columns)
        query = f"SELECT {places}, r.id {_FROM} {where} ORDER BY r.id LIMIT ? OFFSET ?"
        with database.refusals(self._path):
            cursor = self._connection.execute(query, (*values, -1 if limit is None else limit, offset))
            while rows := cursor.fetchmany(batch_size):
                yield self._to_arrow(columns, rows)

    def _to_arrow(self, columns: Sequence[str], rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
        schema = arrow_schema()
        fields = [schema.field(name) for name in columns]
        arrays = []
        *lists, numbers = zip(*rows, strict=True)
        for field, values in zip(fields, lists, strict=True):
            for value, number in zip(values, numbers, strict=True):  # SQLite keeps any type in any column
                if not _CHECKS[field.name](value):
                    raise RecordError(
                        f"sqlite:{self._path}, row {number} of records: {field.name} is {_shown(value)}; it must be "
                        f"{_wanted(field)}: remove the row, or name a file that the sink wrote"
                    )
            if field.name == "fingerprint":
                arrays.append(fixed_list(np.frombuffer(b"".join(values), "<f4").reshape(-1, fp.SIZE)))
            else:
                arrays.append(pa.array(values, field.type))
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, metadata=schema.metadata))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(low: int, high: int, *, optional: bool = False) -> Callable[[object], bool]:
    return lambda value: (value is None and optional) or (isinstance(value, int) and low <= value < high)


_CHECKS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("request_id", "model", "zone", "mode", "think_phase"), _is_text),
    "choice": _is_number(0, 2**16),
    "query_position": _is_number(-(2**31), 2**31),
    "decode_step": _is_number(-(2**31), 2**31, optional=True),
    "time": _is_number(-(2**63), 2**63),
    "layer": _is_number(-(2**15), 2**15, optional=True),
    "query_token": _is_number(-(2**31), 2**31, optional=True),
    "sink_mass": lambda value: value is None or isinstance(value, float),
    "record": lambda value: value is None or isinstance(value, bytes),
    "fingerprint": lambda value: isinstance(value, bytes) and len(value) == 4 * fp.SIZE,
}


def _wanted(field: pa.Field) -> str:
    if field.name == "fingerprint":
        return f"{4 * fp.SIZE} bytes"
    return f"{'null or ' if field.nullable else ''}of type {field.type}"


def _shown(value: object) -> str:
    size = f" of {len(value)} bytes" if isinstance(value, (bytes, str)) else ""
    return f"{type(value).__name__}{size} {str(value)[:60]!r}"


def _where(filters: Filters) -> tuple[str, list[Any]]:
    conditions = {
        "m.name = ?": filters.model,
        "s.request_id = ?": filters.request_id,
        "r.zone = ?": filters.zone,
        "r.time >= ?": filters.since,
        "r.time < ?": filters.until,
    }
    given = {text: value for text, value in conditions.items() if value is not None}
    return ("WHERE " + " AND ".join(given) if given else ""), list(given.values())
