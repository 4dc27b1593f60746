"""Token records as columns: the one representation that the stores share.

A row is what analysis asks for (key, model, zone, time, fingerprint) and beside it ``record``, the binary row
that gives back the record exactly. Where the other columns alone can do that (one layer, fingerprint mode)
``record`` is null. Building columns needs numpy only; `attnhook.record.arrow` says what they are in Arrow.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import NAMES, arrow_schema, fingerprints_of, fixed_list
from attnhook.record.layout import RowLayout, Shape, layout_of
from attnhook.record.token_record import TokenRecord, fill_zones
from attnhook.system import moved

if TYPE_CHECKING:
    import pyarrow as pa

_HELD = {"layers", "fingerprints", "query_token", "sink_mass"}  # sections of a row of one layer that are columns
_NO_POSITIONS = np.zeros((1, 0), np.int32)
_NO_SCORES = np.zeros((1, 0), np.float32)


@dataclass
class Columns:
    """n rows, column by column; the lists are in the order of the rows."""

    request_id: list[str]
    choice: list[int]
    query_position: list[int]
    decode_step: list[int | None]  # None: a prompt row
    model: list[str]
    time: list[int]  # of storing, microseconds since 1970 in UTC
    zone: list[str]
    mode: list[str]
    think_phase: list[str]
    layer: list[int | None]  # of a row without ``record``; None where ``record`` tells, or nothing does
    fingerprint: np.ndarray  # float32 [n, 20]
    record: list[bytes | None]
    query_token: list[int | None]  # of a row with token ids, -1 where it is masked or not known; None: no ids
    sink_mass: list[float | None]  # attention on position 0, mean over the layers; None: not kept

    def __len__(self) -> int:
        return len(self.request_id)

    @classmethod
    def from_arrow(cls, batch: pa.RecordBatch) -> Columns:
        """The rows of an Arrow batch that has all columns."""
        import pyarrow as pa

        lists = {name: batch.column(name).to_pylist() for name in NAMES if name not in ("fingerprint", "time")}
        time = batch.column("time").cast(pa.int64()).to_pylist()
        return cls(**lists, time=time, fingerprint=fingerprints_of(batch))

    def to_arrow(self) -> pa.RecordBatch:
        """The rows as an Arrow batch of `arrow_schema`."""
        import pyarrow as pa

        schema = arrow_schema()
        arrays = [
            fixed_list(self.fingerprint)
            if name == "fingerprint"
            else pa.array(getattr(self, name), schema.field(name).type)
            for name in NAMES
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def now_us() -> int:
    """The wall clock in microseconds since 1970, UTC."""
    return clock.time_ns() // 1000


def mean_fingerprints(records: Sequence[TokenRecord]) -> np.ndarray:
    """`TokenRecord.fingerprint` of each record, float32 [n, 20], without a numpy call per record.

    Raises RecordError where a record's fingerprints are not [L, 20].
    """
    out = np.empty((len(records), fp.SIZE), np.float32)
    by_layers: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        by_layers.setdefault(len(record.layers), []).append(i)
    for layers, rows in by_layers.items():
        parts = [records[i].fingerprints for i in rows]
        try:
            stacked = np.concatenate(parts).reshape(len(rows), layers, fp.SIZE)
        except ValueError:
            wrong = next((i for i in rows if records[i].fingerprints.shape != (layers, fp.SIZE)), rows[0])
            shape = records[wrong].fingerprints.shape
            raise RecordError(
                f"record {records[wrong].key!r} has {layers} layers and fingerprints of shape {shape}; they must be "
                f"({layers}, {fp.SIZE})"
            ) from None
        out[rows] = stacked[:, 0] if layers == 1 else stacked.mean(axis=1, dtype=np.float64)
    return out


def from_records(records: Sequence[TokenRecord], time: int | None = None) -> Columns:
    """The records as columns, stored at ``time`` (microseconds since 1970, UTC; default: now).

    Raises RecordError where a record does not fit its binary row or has no valid fingerprint.
    """
    fingerprints = mean_fingerprints(records)
    fill_zones(records, fingerprints)
    lean = [is_lean(record) for record in records]
    return Columns(
        request_id=[record.request_id for record in records],
        choice=[record.choice for record in records],
        query_position=[record.query_position for record in records],
        decode_step=[record.decode_step for record in records],
        model=[record.model for record in records],
        time=[now_us() if time is None else time] * len(records),
        zone=[record.zone for record in records],
        mode=[record.mode for record in records],
        think_phase=[record.think_phase for record in records],
        layer=[record.layers[0] if bare else None for record, bare in zip(records, lean, strict=True)],
        fingerprint=fingerprints,
        record=[None if bare else record.to_bytes() for record, bare in zip(records, lean, strict=True)],
        query_token=[None if record.token_ids is None else record.query_token for record in records],
        sink_mass=[mean_sink_mass(record) for record in records],
    )


def mean_sink_mass(record: TokenRecord) -> float | None:
    """Attention on position 0, mean over the captured layers; None where it was not kept."""
    return None if record.sink_mass is None else float(record.sink_mass.mean(dtype=np.float64))


def from_entries(entries: Sequence[Mapping[str, Any]], time: int) -> Columns:
    """Lines of a jsonl sink as columns; raw ones keep their whole record, others their fingerprint.

    Raises RecordError where an entry is damaged.
    """
    records = [
        TokenRecord.from_dict(e, request_id=e["request_id"], choice=e["choice"], model=e["model"]).to_bytes()
        if e.get("mode") == "raw"
        else None
        for e in entries
    ]
    try:
        fingerprints = np.array([e["fingerprint"] for e in entries], np.float32).reshape(len(entries), fp.SIZE)
    except ValueError as error:
        raise RecordError(f"damaged entries: a fingerprint is not {fp.SIZE} numbers: {error}") from error
    return Columns(
        **{name: [e[name] for e in entries] for name in ("request_id", "choice", "query_position", "decode_step")},
        model=[e["model"] for e in entries],
        time=[time] * len(entries),
        zone=[e["manifold"] for e in entries],
        mode=[e["mode"] for e in entries],
        think_phase=[e["think_phase"] for e in entries],
        layer=[None] * len(entries),
        fingerprint=fingerprints,
        record=records,
        query_token=[e.get("query_token") for e in entries],
        sink_mass=[e.get("sink_mass") for e in entries],
    )


def to_records(batch: pa.RecordBatch) -> Iterator[TokenRecord]:
    """The records of an Arrow batch that has all columns, exactly as they were stored.

    Raises RecordError where a row is damaged, or came from a JSON entry that holds no more than a fingerprint.
    """
    fingerprints = fingerprints_of(batch)
    missing = batch.column("fingerprint").is_null().to_pylist()
    columns = {name: batch.column(name).to_pylist() for name in NAMES if name not in ("fingerprint", "time")}
    for i in range(batch.num_rows):
        row = {name: column[i] for name, column in columns.items()}
        if row["record"] is not None:
            yield TokenRecord.from_bytes(row["record"])
            continue
        if row["layer"] is None:
            raise RecordError(
                f"row {row['request_id']!r}, position {row['query_position']}: only its fingerprint is stored (it came "
                f"from a JSON entry of mode {row['mode']!r}); read it with fingerprints()"
            )
        if missing[i]:
            raise RecordError(
                f"row {row['request_id']!r}, position {row['query_position']}: neither its record nor its fingerprint "
                "is stored; remove it"
            )
        yield TokenRecord(
            request_id=row["request_id"],
            query_position=row["query_position"],
            layers=(row["layer"],),
            token_positions=_NO_POSITIONS,
            attention_scores=_NO_SCORES,
            fingerprints=fingerprints[i : i + 1],
            decode_step=row["decode_step"],
            choice=row["choice"],
            mode=row["mode"],
            think_phase=row["think_phase"],
            model=row["model"],
            span_mass=np.zeros((1, 0), np.float32),
            query_token=-1 if row["query_token"] is None else row["query_token"],
            token_ids=None if row["query_token"] is None else _NO_POSITIONS,
            sink_mass=None if row["sink_mass"] is None else np.array([row["sink_mass"]], np.float32),
        )


def is_lean(record: TokenRecord) -> bool:
    """Whether the columns alone hold all of the record: one layer's fingerprint, and no more than a query token."""
    return record.mode == "fingerprint" and len(record.layers) == 1 and fits_columns(layout_of(Shape.of(record)))


@lru_cache(maxsize=256)
def fits_columns(layout: RowLayout) -> bool:
    """Whether rows of that layout have nothing, besides their mode, for which there is no column."""
    return layout.shape.layers == 1 and not any(
        place.size for name, place in layout.places.items() if name not in _HELD
    )


if not TYPE_CHECKING:  # a type checker is to know each name
    _ARROW = ("LIGHT", "SCHEMA_VERSION", "VERSION_KEY", "check_version", "layer_sets", "show_layer_sets", "upgraded")
    # what `attnhook.sinks.columns` had
    __getattr__ = moved.names(__name__, dict.fromkeys(_ARROW, "record.arrow"))
