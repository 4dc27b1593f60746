"""Reading a Parquet data set of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from attnhook.errors import PluginError, RecordError
from attnhook.record.arrow import arrow_schema
from attnhook.record.token_record import TokenRecord
from attnhook.sinks import config
from attnhook.sinks.dataset import Dataset, safe_batch
from attnhook.sinks.parquet import S3_OPTIONS
from attnhook.store.base import Filters, Store


class ParquetStore(Store):
    """``parquet:dir`` or ``parquet:s3://bucket/prefix``: the files that are complete, oldest first.

    A record that was delivered twice may be there twice.
    """

    def __init__(self, location: str) -> None:
        path, options = config.split(location)
        self._dataset = Dataset.at(path, {name: options[name] for name in S3_OPTIONS if name in options})
        self._dataset.check()
        self.url = f"parquet:{self._dataset.url}"

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
            condition, found = _condition(filters), 0
            for path in self._dataset.files():
                with self._named(path):
                    found += int(self._fragment(path).count_rows(filter=condition))
            return found

    @contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """Arrow's errors about one file as RecordError, with the columns that are not what they should be."""
        try:
            yield
        except pa.ArrowException as error:
            there = self._dataset.metadata(path).schema.to_arrow_schema()
            odd = [
                f"{field.name} is {there.field(field.name).type} and must be {field.type}"
                for field in arrow_schema()
                if field.name in there.names and there.field(field.name).type != field.type
            ]
            why = "; ".join(odd) or " ".join(str(error).split())
            raise RecordError(f"{path} is damaged: {why[:300]}; move it out of the data set") from error

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
            metadata = self._dataset.metadata(path)
            rows = metadata.num_rows
            if not filters.any and offset >= rows:
                offset -= rows  # not even opened
                continue
            wanted = list(columns)
            if "fingerprint" in columns and "record" not in columns and _may_lack_fingerprints(metadata):
                wanted.append("record")
            with self._named(path):
                seen = 0
                for batch in self._scan(path, metadata, wanted, condition, batch_size):
                    skipped = min(offset, batch.num_rows)
                    offset -= skipped
                    batch = batch.slice(skipped, left)
                    if batch.num_rows:
                        left = None if left is None else left - batch.num_rows
                        batch = _whole(path, seen + skipped, batch)
                        yield pa.RecordBatch.from_arrays(batch.columns[: len(columns)], schema=schema)
                    seen += skipped + batch.num_rows
                    if left == 0:
                        return

    def _scan(
        self, path: str, metadata: pq.FileMetaData, columns: list[str], condition: pc.Expression | None, size: int
    ) -> Iterator[pa.RecordBatch]:
        safe = safe_batch(metadata, size) if "record" in columns else size
        if safe < size:
            yield from self._slowly(path, columns, condition, safe)
            return
        scanner = self._fragment(path).scanner(
            schema=arrow_schema(),
            columns=columns,
            filter=condition,
            batch_size=size,
            batch_readahead=2,
            use_threads=False,
        )
        yield from scanner.to_batches()

    def _slowly(
        self, path: str, columns: list[str], condition: pc.Expression | None, size: int
    ) -> Iterator[pa.RecordBatch]:
        """The same, a few rows at a time: a scanner unpacks whole row groups, however large their records are."""
        with self._dataset.filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source)
            fields = [arrow_schema().field(name) for name in dict.fromkeys([*columns, *_FILTERED])]
            there = [field.name for field in fields if field.name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=size, columns=there):
                arrays = [
                    batch.column(field.name).cast(field.type)
                    if field.name in there
                    else pa.nulls(len(batch), field.type)
                    for field in fields
                ]
                table = pa.table(arrays, names=[field.name for field in fields])
                chosen = table if condition is None else table.filter(condition)
                yield from chosen.select(columns).to_batches()


_FILTERED = ("model", "request_id", "zone", "time")  # what `_condition` asks for


def _may_lack_fingerprints(metadata: pq.FileMetaData) -> bool:
    """Whether the file's column of fingerprints may hold nulls, which ours cannot."""
    there = metadata.schema.to_arrow_schema()
    return "fingerprint" not in there.names or bool(there.field("fingerprint").nullable)


def _whole(path: str, first: int, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with fingerprints that are null taken from their records; ``first`` is its first row's number.

    Raises RecordError where another column that may not be null is.
    """
    for place, name in enumerate(batch.schema.names):
        column = batch.column(place)
        if column.null_count == 0 or arrow_schema().field(name).nullable:
            continue
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        if name != "fingerprint":
            raise RecordError(
                f"{path}, row {first + int(rows[0])} of those read: {name} is null; it must be "
                f"{arrow_schema().field(name).type}: move the file out of the data set"
            )
        values = column.to_pylist()
        for row in rows.tolist():
            record = batch.column("record")[row].as_py()
            if record is not None:  # else the row has none, and stays as it is
                values[row] = TokenRecord.from_bytes(record).fingerprint
        batch = batch.set_column(place, arrow_schema().field(name), pa.array(values, column.type))
    return batch


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
