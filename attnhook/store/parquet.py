"""Reading a Parquet data set of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from attnhook.errors import PluginError, RecordError
from attnhook.sinks import config
from attnhook.sinks.columns import arrow_schema
from attnhook.sinks.dataset import Dataset
from attnhook.sinks.parquet import S3_OPTIONS
from attnhook.store import Filters, Store


class ParquetStore(Store):
    """``parquet:dir`` or ``parquet:s3://bucket/prefix``: the files that are complete, oldest first.

    A record that was delivered twice may be there twice.
    """

    def __init__(self, location: str) -> None:
        path, options = config.split(location)
        self._dataset = Dataset.at(path, {name: options[name] for name in S3_OPTIONS if name in options})
        self._dataset.check()

    def close(self) -> None:
        """Nothing stays open."""

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = str(error).rstrip(".")
            raise PluginError(
                f"parquet:{self._dataset.url} cannot be read: {text}. {self._dataset.remedy(error)}"
            ) from error

    def _count(self, filters: Filters) -> int:
        with self._readable():
            if not filters.any:
                return sum(self._dataset.metadata(path).num_rows for path in self._dataset.files())
            condition = _condition(filters)
            return sum(int(self._fragment(path).count_rows(filter=condition)) for path in self._dataset.files())

    def _fragment(self, path: str) -> ds.ParquetFileFragment:
        self._dataset.metadata(path)  # refuses what is damaged or newer
        return ds.ParquetFileFormat().make_fragment(path, self._dataset.filesystem)

    def _batches(
        self, filters: Filters, columns: Sequence[str], offset: int, limit: int | None, batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        with self._readable():
            yield from self._rows(filters, columns, offset, limit, batch_size)

    def _rows(
        self, filters: Filters, columns: Sequence[str], offset: int, limit: int | None, batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        condition = _condition(filters)
        schema = pa.schema([arrow_schema().field(name) for name in columns], metadata=arrow_schema().metadata)
        left = limit
        for path in self._dataset.files():
            if left == 0:
                return
            rows = self._dataset.metadata(path).num_rows
            if not filters.any and offset >= rows:
                offset -= rows  # not even opened
                continue
            scanner = self._fragment(path).scanner(
                schema=arrow_schema(),
                columns=list(columns),
                filter=condition,
                batch_size=batch_size,
                batch_readahead=2,
                use_threads=False,
            )
            try:
                for batch in scanner.to_batches():
                    skipped = min(offset, batch.num_rows)
                    offset -= skipped
                    batch = batch.slice(skipped, left)
                    if batch.num_rows:
                        left = None if left is None else left - batch.num_rows
                        yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)
                    if left == 0:
                        return
            except pa.ArrowInvalid as error:
                raise RecordError(f"{path} is damaged: {error}; move it out of the data set") from error


def _condition(filters: Filters) -> pc.Expression | None:
    conditions = [
        pc.field(name) == value
        for name, value in (
            ("model", filters.model),
            ("request_id", filters.request_id),
            ("zone", filters.zone),
        )
        if value is not None
    ]
    if filters.since is not None:
        conditions.append(pc.field("time") >= _timestamp(filters.since))
    if filters.until is not None:
        conditions.append(pc.field("time") < _timestamp(filters.until))
    whole = None
    for condition in conditions:
        whole = condition if whole is None else whole & condition
    return whole


def _timestamp(microseconds: int) -> pa.Scalar:
    return pa.scalar(microseconds, pa.int64()).cast(pa.timestamp("us", "UTC"))
