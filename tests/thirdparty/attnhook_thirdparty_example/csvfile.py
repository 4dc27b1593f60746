"""The sink: ``csvfile:path`` appends one CSV line per record."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from typing import IO

from attnhook import OptionError, PluginError, TokenRecord
from attnhook.plugins import Sink

DELIMITER = "ATTNHOOK_THIRDPARTY_EXAMPLE_DELIMITER"


class CsvSink(Sink):
    """Request id, query position, and the position and score that the last layer attends to most.

    ``ATTNHOOK_THIRDPARTY_EXAMPLE_DELIMITER`` is the sign between them, a comma by default.

    Delivery guarantee: a record is with the operating system once `flush` returned.
    """

    contract = 1
    _file: IO[str] | None = None
    _delimiter = ","

    def open(self, config: str) -> None:
        """Open ``config`` for append. Raises PluginError, and OptionError for a delimiter of other than one sign."""
        self._delimiter = os.environ.get(DELIMITER, ",")
        if len(self._delimiter) != 1:
            raise OptionError(DELIMITER, f"{DELIMITER}={self._delimiter!r} must be one sign, such as ;")
        try:
            self._file = open(config, "a", encoding="utf-8", newline="")  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise PluginError(
                f"sink csvfile:{config} cannot be opened: {error}; name a file in a folder that exists"
            ) from error

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Append the records."""
        rows = csv.writer(self._file, delimiter=self._delimiter)
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
