"""Reading a jsonl store: the live file and those that were rotated away from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from attnhook.errors import PluginError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.columns import Columns, from_entries
from attnhook.record.row import MODES, PHASES
from attnhook.sinks.jsonl import numbered
from attnhook.sinks.rotation import rotated_files
from attnhook.store.base import Filters, Store


class JsonlStore(Store):
    """``jsonl:path`` with its rotated files, oldest first; lines that a crash cut short are skipped with a warning.

    A line has no time: its file's time of last change stands for it. Numbers have 7 decimals. Only raw lines hold
    whole records.
    """

    def __init__(self, path: str) -> None:
        self._path, self.url = Path(os.path.expanduser(path)), f"jsonl:{path}"
        if not self._files():
            raise PluginError(f"jsonl:{path} does not exist: name a file that the sink wrote")

    def close(self) -> None:
        """Nothing stays open."""

    def _files(self) -> list[Path]:
        return [*rotated_files(self._path), *([self._path] if self._path.is_file() else [])]

    def _count(self, filters: Filters) -> int:
        return sum(1 for _ in self._entries(filters))

    def _entries(self, filters: Filters) -> Iterator[_Line]:
        for path in self._files():
            try:
                changed = path.stat().st_mtime_ns // 1000
                if (filters.since is not None and changed < filters.since) or (
                    filters.until is not None and changed >= filters.until
                ):
                    continue
                for number, entry in numbered(path, tolerate_torn_tail=True):
                    _check(path, number, entry)
                    if (
                        filters.model in (None, entry["model"])
                        and filters.request_id in (None, entry["request_id"])
                        and filters.zone in (None, entry["manifold"])
                    ):
                        yield _Line(path, number, entry, changed)
            except OSError as error:
                raise PluginError(
                    f"jsonl:{path} cannot be read: {error}; check its permissions and its disk"
                ) from error

    def _batches(
        self, filters: Filters, columns: Sequence[str], offset: int, limit: int | None, batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        entries = islice(self._entries(filters), offset, None if limit is None else offset + limit)
        while rows := list(islice(entries, batch_size)):
            yield _columns(rows).to_arrow().select(list(columns))


class _Line(NamedTuple):
    path: Path
    number: int
    entry: dict[str, Any]
    changed: int  # when its file was, microseconds since 1970


def _columns(rows: Sequence[_Line]) -> Columns:
    try:
        whole = from_entries([row.entry for row in rows], 0)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        if len(rows) > 1:
            for row in rows:  # which one it is
                _columns([row])
        path, number, *_ = rows[0]
        raise RecordError(f"{path}, line {number} is damaged: {str(error)[:300]}; {_REMEDY}") from error
    whole.time = [row.changed for row in rows]
    return whole


def _check(path: Path, number: int, entry: Mapping[str, Any]) -> None:
    """Raise RecordError for a line that has not what every line of the sink has, of the right types."""
    if missing := [name for name in _WANTED if name not in entry]:
        raise RecordError(f"{path}: a line has no {', '.join(missing)}: line {number}, {str(entry)[:80]}; {_REMEDY}")
    for name, (is_right, wanted) in _WANTED.items():
        if not is_right(entry[name]):
            raise RecordError(
                f"{path}, line {number}: {name} is {str(entry[name])[:80]!r}; it must be {wanted}; {_REMEDY}"
            )
    if not _is_token(entry.get("query_token")):
        raise RecordError(
            f"{path}, line {number}: query_token is {str(entry['query_token'])[:80]!r}; it must be a token id, -1 or "
            f"null; {_REMEDY}"
        )

    mass = entry.get("sink_mass")
    if mass is not None and not (isinstance(mass, float | int) and not isinstance(mass, bool) and 0 <= mass <= 1.01):
        raise RecordError(
            f"{path}, line {number}: sink_mass is {str(mass)[:80]!r}; it must be a mass from 0 to 1, or null; {_REMEDY}"
        )


def _is_text(value: object) -> bool:
    # JSON may have halves of a surrogate pair, which are no text
    return isinstance(value, str) and len(value) < 2**16 and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_count(value: object, end: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_token(value: object) -> bool:
    return value is None or value == -1 or _is_count(value)


def _is_fingerprint(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == fp.SIZE
        and all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value)
        and all(abs(number) < 1e9 for number in value)  # neither NaN nor infinite, nor a number of a thousand digits
    )


_REMEDY = "remove it, or name a file that the jsonl sink wrote"
_WANTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "request_id": (_is_text, "text of at most 65535 characters"),
    "choice": (lambda value: _is_count(value, 2**16), "a number from 0 to 65535"),
    "model": (_is_text, "text of at most 65535 characters"),
    "query_position": (_is_count, "a number from 0 up"),
    "decode_step": (lambda value: value is None or _is_count(value), "a number from 0 up or null"),
    "mode": (lambda value: value in MODES, f"one of {', '.join(MODES)}"),
    "think_phase": (lambda value: value in PHASES, f"one of {', '.join(PHASES)}"),
    "fingerprint": (_is_fingerprint, f"{fp.SIZE} numbers"),
    "manifold": (_is_text, "the name of a zone"),
}
