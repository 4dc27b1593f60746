"""The sink that keeps records in this process, for notebooks, tests and short captures."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from attnhook.errors import PluginError
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord


class MemorySink(Sink):
    """``memory:`` keeps every record, ``memory:1000`` the newest 1000.

    Delivery guarantee: a record is there once `write` returned, and gone when the process ends.
    """

    def __init__(self) -> None:
        self._records: deque[TokenRecord] = deque()

    @property
    def records(self) -> list[TokenRecord]:
        """The records kept so far, oldest first; a copy, still readable after `close`."""
        return list(self._records)

    def open(self, config: str) -> None:
        """Start empty. Raises PluginError unless ``config`` is empty or a whole number of records >= 1."""
        if config and not (config.isdecimal() and int(config) >= 1):
            raise PluginError(
                f"sink memory:{config}: {config!r} is not a number of records to keep; "
                "write memory:1000 for the newest 1000, or memory: for all"
            )
        self._records = deque(maxlen=int(config) if config else None)

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Append the records; the oldest ones beyond the limit go."""
        self._records.extend(batch)
