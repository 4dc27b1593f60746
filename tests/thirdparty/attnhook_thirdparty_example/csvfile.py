"""The sink: ``csvfile:path`` appends one CSV line per record."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import IO

from attnhook.errors import PluginError
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord


class CsvSink(Sink):
    """Request id, query position, and the position and score that the last layer attends to most.

    Delivery guarantee: a record is with the operating system once `flush` returned.
    """

    _file: IO[str] | None = None

    def open(self, config: str) -> None:
        """Open ``config`` for append. Raises PluginError."""
        try:
            self._file = open(config, "a", encoding="utf-8", newline="")  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise PluginError(
                f"sink csvfile:{config} cannot be opened: {error}; name a file in a folder that exists"
            ) from error

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Append the records."""
        rows = csv.writer(self._file)
        for record in batch:
            rows.writerow([record.request_id, record.query_position, *record.top()[0]])

    def flush(self) -> None:
        """Hand buffered lines to the operating system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
