"""Reading a jsonl store: the live file and those that were rotated away from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from attnhook.errors import PluginError, RecordError
from attnhook.sinks.columns import Columns, from_entries
from attnhook.sinks.jsonl import read_jsonl
from attnhook.sinks.rotation import rotated_files
from attnhook.store import Filters, Store

_NEEDED = ("request_id", "choice", "model", "query_position", "decode_step", "mode", "think_phase", "fingerprint",
           "manifold")  # fmt: skip


class JsonlStore(Store):
    """``jsonl:path`` with its rotated files, oldest first; lines that a crash cut short are skipped with a warning.

    A line has no time: its file's time of last change stands for it. Numbers have 7 decimals. Only raw lines hold
    whole records.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(os.path.expanduser(path))
        if not self._files():
            raise PluginError(f"jsonl:{path} does not exist: name a file that the sink wrote")

    def close(self) -> None:
        """Nothing stays open."""

    def _files(self) -> list[Path]:
        return [*rotated_files(self._path), *([self._path] if self._path.is_file() else [])]

    def _count(self, filters: Filters) -> int:
        return sum(1 for _ in self._entries(filters))

    def _entries(self, filters: Filters) -> Iterator[tuple[dict[str, Any], int]]:
        for path in self._files():
            try:
                changed = path.stat().st_mtime_ns // 1000
                if (filters.since is not None and changed < filters.since) or (
                    filters.until is not None and changed >= filters.until
                ):
                    continue
                for entry in read_jsonl(path, tolerate_torn_tail=True):
                    if missing := [name for name in _NEEDED if name not in entry]:
                        raise RecordError(
                            f"{path}: a line has no {', '.join(missing)}; it is no line of the sink jsonl: "
                            f"{str(entry)[:80]}"
                        )
                    if (
                        filters.model in (None, entry["model"])
                        and filters.request_id in (None, entry["request_id"])
                        and filters.zone in (None, entry["manifold"])
                    ):
                        yield entry, changed
            except OSError as error:
                raise PluginError(
                    f"jsonl:{path} cannot be read: {error}; check its permissions and its disk"
                ) from error

    def _batches(
        self, filters: Filters, columns: Sequence[str], offset: int, limit: int | None, batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        entries = islice(self._entries(filters), offset, None if limit is None else offset + limit)
        while rows := list(islice(entries, batch_size)):
            whole = from_entries([entry for entry, _ in rows], 0)
            whole.time = [changed for _, changed in rows]
            yield _select(whole, columns)


def _select(columns: Columns, names: Sequence[str]) -> pa.RecordBatch:
    return columns.to_arrow().select(list(names))
