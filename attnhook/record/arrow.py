"""The stores' columns in Arrow: their names and types, the version of both, and what is read off a batch at once.

pyarrow is imported where Arrow is asked for, and nowhere before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.packing import layers_of

if TYPE_CHECKING:
    import pyarrow as pa

#: Version of the columns, in the metadata of every Parquet file and Arrow journal.
SCHEMA_VERSION = 3
VERSION_KEY = b"attnhook.schema_version"

#: Names of the columns, in order.
NAMES: tuple[str, ...] = (
    "request_id",
    "choice",
    "query_position",
    "decode_step",
    "model",
    "time",
    "zone",
    "mode",
    "think_phase",
    "layer",
    "fingerprint",
    "record",
    "query_token",
    "sink_mass",
)
#: Columns that came later than the first version, and with which. They are left out where they hold nothing.
SINCE: Mapping[str, int] = {"query_token": 2, "sink_mass": 3}
#: What `Store.fingerprints` gives unless asked for others.
LIGHT: tuple[str, ...] = (
    "request_id",
    "choice",
    "query_position",
    "decode_step",
    "model",
    "time",
    "zone",
    "fingerprint",
)


@cache
def arrow_schema() -> pa.Schema:
    """The Arrow schema of the columns, with the schema version in its metadata."""
    import pyarrow as pa

    types = {
        "request_id": pa.string(),
        "choice": pa.uint16(),
        "query_position": pa.int32(),
        "decode_step": pa.int32(),
        "model": pa.string(),
        "time": pa.timestamp("us", "UTC"),
        "zone": pa.string(),
        "mode": pa.string(),
        "think_phase": pa.string(),
        "layer": pa.int16(),
        "fingerprint": pa.list_(pa.float32(), fp.SIZE),
        "record": pa.binary(),
        "query_token": pa.int32(),
        "sink_mass": pa.float32(),
    }
    nullable = {"decode_step", "layer", "record", *SINCE}
    fields = [pa.field(name, types[name], nullable=name in nullable) for name in NAMES]
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})


def check_version(metadata: Mapping[bytes, bytes] | None, where: str) -> None:
    """Raise RecordError unless Arrow or Parquet ``metadata`` names a version that this release reads."""
    version = (metadata or {}).get(VERSION_KEY)
    if version is None:
        raise RecordError(f"{where} was not written by attnhook: its metadata has no {VERSION_KEY.decode()}")
    if not version.isdigit() or not 1 <= int(version) <= SCHEMA_VERSION:
        raise RecordError(
            f"{where} has schema version {version.decode(errors='replace')}; this attnhook reads {SCHEMA_VERSION}: "
            "upgrade attnhook"
        )


def upgraded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of any version that this release reads, as one of `arrow_schema`."""
    import pyarrow as pa

    schema = arrow_schema()
    if batch.schema.names == schema.names:
        return batch
    arrays = [
        batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def fixed_list(fingerprints: np.ndarray) -> pa.FixedSizeListArray:
    """Fingerprints float32 [n, 20] as an Arrow array; no copy."""
    import pyarrow as pa

    flat = np.ascontiguousarray(fingerprints, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), fp.SIZE)


def fingerprints_of(batch: pa.RecordBatch) -> np.ndarray:
    """The column ``fingerprint`` as float32 [n, 20]; NaN in rows where it is null."""
    column = batch.column("fingerprint")
    flat = np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, fp.SIZE)
    if column.null_count == 0:
        return flat
    out = np.full((len(column), fp.SIZE), np.nan, np.float32)
    out[column.is_valid().to_numpy(zero_copy_only=False)] = flat  # flatten leaves the others out
    return out


def layer_sets(batch: pa.RecordBatch) -> Counter[tuple[int, ...]]:
    """Rows of each set of captured layers, () where a row does not tell; from the columns ``layer`` and ``record``.

    Raises RecordError where a record is damaged.
    """
    found: Counter[tuple[int, ...]] = Counter()
    for data, layer in zip(batch.column("record").to_pylist(), batch.column("layer").to_pylist(), strict=True):
        found[layers_of(data) if data is not None else () if layer is None else (layer,)] += 1
    return found


def show_layer_sets(found: Mapping[tuple[int, ...], int]) -> str:
    """Some of such sets with their rows, for a message."""
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:4]
    return ", ".join(f"{list(layers) or 'not told'} ({count} rows)" for layers, count in most)
