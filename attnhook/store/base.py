"""What every store that can be read offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType
from typing import TYPE_CHECKING

from attnhook.errors import OptionError, RecordError
from attnhook.record.arrow import LIGHT, NAMES
from attnhook.record.columns import to_records
from attnhook.record.token_record import TokenRecord

if TYPE_CHECKING:
    import pyarrow as pa


BATCH = 8192


SCHEMES = ("jsonl", "parquet", "sqlite")


@dataclass(frozen=True)
class Filters:
    """Which rows to read; None is no condition. Times are microseconds since 1970, UTC."""

    model: str | None = None
    request_id: str | None = None
    zone: str | None = None
    since: int | None = None  # first time that counts
    until: int | None = None  # first time that does not

    @property
    def any(self) -> bool:
        """Whether there is a condition at all."""
        return self != Filters()


class Store(ABC):
    """One store, open for reading; what is written meanwhile may or may not be seen."""

    url = ""  #: its scheme and place, for messages

    @abstractmethod
    def _batches(
        self, filters: Filters, columns: Sequence[str], offset: int, limit: int | None, batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """The rows in the order of storing, as Arrow batches of at most ``batch_size`` rows and never none."""

    @abstractmethod
    def _count(self, filters: Filters) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; calling it twice is harmless."""

    def count(
        self,
        *,
        model: str | None = None,
        request_id: str | None = None,
        zone: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> int:
        """Number of rows that the filters let through."""
        return self._count(_filters(model, request_id, zone, since, until))

    def fingerprints(
        self,
        *,
        model: str | None = None,
        request_id: str | None = None,
        zone: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        columns: Sequence[str] = LIGHT,
        offset: int = 0,
        limit: int | None = None,
        batch_size: int = BATCH,
    ) -> Iterator[pa.RecordBatch]:
        """Rows as Arrow batches, in the order of storing.

        Parameters
        ----------
        model, request_id, zone
            Only rows with that value.
        since, until
            Only rows stored at or after, and before that time; one without a time zone is in UTC.
        columns
            Names out of `attnhook.record.arrow.NAMES`. ``fingerprint`` is fixed_size_list<float32>[20], ``time``
            the time of storing, timestamp[us, UTC].
        offset, limit
            Rows to skip, and at most to return, among those that the filters let through.
        batch_size
            At most so many rows a batch.

        Raises
        ------
        OptionError
            A parameter is out of range, or a column unknown.
        RecordError, PluginError
            The store is damaged.
        """
        unknown = [name for name in columns if name not in NAMES]
        if unknown or not columns:
            raise OptionError("columns", f"columns={list(columns)}: choose one or more of {', '.join(NAMES)}")
        for name, value, low in (("offset", offset, 0), ("limit", limit, 0), ("batch_size", batch_size, 1)):
            if value is not None and value < low:
                raise OptionError(name, f"{name}={value} must be {low} or more")
        filters = _filters(model, request_id, zone, since, until)
        return self._batches(filters, tuple(columns), offset, limit, batch_size)

    def records(
        self,
        *,
        model: str | None = None,
        request_id: str | None = None,
        zone: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        offset: int = 0,
        limit: int | None = None,
    ) -> Iterator[TokenRecord]:
        """Whole records, exactly as they were stored; filters as in `fingerprints`.

        Raises RecordError for a row that holds no more than a fingerprint (JSON entries that are not raw).
        """
        batches = self.fingerprints(
            model=model,
            request_id=request_id,
            zone=zone,
            since=since,
            until=until,
            columns=NAMES,
            offset=offset,
            limit=limit,
            batch_size=1024,
        )
        return self._records(batches, offset)

    def _records(self, batches: Iterator[pa.RecordBatch], row: int) -> Iterator[TokenRecord]:
        for batch in batches:
            try:
                for record in to_records(batch):
                    yield record
                    row += 1
            except RecordError as error:
                raise RecordError(f"{self.url}, row {row} of those asked for: {error}") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _filters(
    model: str | None, request_id: str | None, zone: str | None, since: datetime | None, until: datetime | None
) -> Filters:
    return Filters(model, request_id, zone, _microseconds("since", since), _microseconds("until", until))


def _microseconds(name: str, value: datetime | None) -> int | None:
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise OptionError(name, f"{name}={value!r} must be a datetime")
    aware = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
    delta = aware - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (delta.days * 86400 + delta.seconds) * 10**6 + delta.microseconds
