"""TokenRecord: what attnhook keeps for one query row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from attnhook.record.entry import read_entry, write_entry
from attnhook.record.layout import SECTIONS
from attnhook.record.numbers import FORMATS
from attnhook.record.packing import pack, unpack
from attnhook.record.row import UNKNOWN, RowData
from attnhook.record.sink_mass import free_means
from attnhook.record.zones import ZONE_NAMES, classify, classify_many
from attnhook.system import moved


@dataclass(frozen=True, eq=False)
class TokenRecord(RowData):
    """Attention of one query row over the captured layers.

    L >= 1 captured layers, k entries, n spans. Rows with fewer than k reportable keys end in position -1 and
    score 0. `to_dict` and `from_dict` are the JSON of the HTTP interface, `to_bytes` and `from_bytes` a compact
    binary row.

    Token ids are there only while a sink with ``tokens=1`` is open (see `attnhook.record.tokens`).
    """

    @cached_property
    def zone(self) -> str:
        """Name of the zone that the record's attention without the sink falls into; see `fill_zones` for many records.

        Of a record that has no `sink_mass` it is that of its whole attention. Raises RecordError where the fingerprint
        is none (NaN, or out of range).
        """
        return classify(self.free_fingerprint).name

    def to_dict(self, encoding_format: str = "float") -> dict[str, Any]:
        """The JSON of one entry of ``choices[i].attention_tokens``, with plain Python numbers.

        With ``encoding_format`` "base64" an array is an object: ``base64`` of its little-endian numbers in full,
        their ``dtype`` (float32 or int32) and ``shape``.
        """
        return write_entry(self, self.zone, FORMATS[encoding_format])

    @classmethod
    def from_dict(
        cls, entry: Mapping[str, Any], *, request_id: str = "", choice: int = 0, model: str = ""
    ) -> TokenRecord:
        """Read one raw-mode entry of ``choices[i].attention_tokens``, or one line of a JSONL sink.

        In lists the JSON has 7 decimals, so numbers come back within 1e-7; in base64 they are the same. Raises
        RecordError if ``entry`` is not such an entry.
        """
        return cls(request_id=request_id, choice=choice, model=model, **read_entry(entry))

    def to_bytes(self) -> bytes:
        """A self-contained binary row, about ``64 + L * (8 k + 4 n + 86)`` bytes, little-endian.

        Token ids, where there are any, make it ``4 + 4 L k`` bytes longer.

        Raises RecordError where a name or a number does not fit its field, arrays disagree, or no layer was captured.
        """
        return pack(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenRecord:
        """Read one binary row; its arrays are read-only views of ``data``.

        Raises RecordError if ``data`` is not one whole row of a known version.
        """
        return cls(**unpack(data))


def join_layers(parts: Sequence[TokenRecord]) -> TokenRecord:
    """The record of one row from parts that have different layers of it; without token ids where a part has none."""
    layers = [layer for part in parts for layer in part.layers]
    order = np.argsort(layers)
    joined: dict[str, Any] = {}
    for section in SECTIONS:
        if "layers" in section.axes and section.name != "layers":
            arrays = [getattr(part, section.name) for part in parts]
            there = all(array is not None for array in arrays)  # what a part does not have, the whole has not either
            joined[section.name] = np.concatenate(arrays)[order] if there else None
    first = parts[0] if joined["token_ids"] is not None else without_tokens(parts[0])
    return replace(first, layers=tuple(layers[i] for i in order), **joined)


def without_tokens(record: TokenRecord) -> TokenRecord:
    """The record without token ids: itself, where it has none."""
    return record if record.token_ids is None else replace(record, query_token=UNKNOWN, token_ids=None)


def fill_zones(records: Sequence[TokenRecord], fingerprints: np.ndarray | None = None) -> None:
    """Find the zones of many records at once, a hundred times faster than `TokenRecord.zone` one by one.

    Call it before `TokenRecord.to_dict` on each. ``fingerprints``, float32 [n, 20], are the records' own where the
    caller has them. Where every record knows its zone already, nothing is done. Raises RecordError where one has
    no valid fingerprint.
    """
    if not all("zone" in record.__dict__ for record in records):
        codes, _ = classify_many(free_fingerprints(records, fingerprints))
        for record, code in zip(records, codes.tolist(), strict=True):
            record.__dict__["zone"] = ZONE_NAMES[code]  # where cached_property keeps it


def free_fingerprints(records: Sequence[TokenRecord], fingerprints: np.ndarray | None = None) -> np.ndarray:
    """`TokenRecord.free_fingerprint` of many records, float32 [n, 20]; ``fingerprints`` as for `fill_zones`.

    Raises RecordError where a sink's mass does not fit its record's fingerprints.
    """
    if fingerprints is None:
        fingerprints = np.stack([record.fingerprint for record in records])
    by_layers: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        if record.sink_mass is not None:
            by_layers.setdefault(len(record.layers), []).append(i)
    if not by_layers:
        return fingerprints
    found = np.array(fingerprints, np.float32)
    for rows in by_layers.values():
        try:
            own = np.stack([records[i].fingerprints for i in rows])
            sink = np.stack([records[i].sink_mass for i in rows])  # type: ignore[misc]
            means, sound = free_means(own, sink, np.array([records[i].query_position for i in rows]))
        except (ValueError, IndexError):  # arrays that disagree: one of them tells which
            sound = np.zeros(len(rows), bool)
        if not sound.all():
            means = np.stack([records[i].free_fingerprint for i in rows])  # raises, with the record's name
        found[rows] = means
    return found


if not TYPE_CHECKING:  # a type checker is to know each name
    _ROW = ("MODES", "Mode", "PHASES", "RowName", "SCHEMA_VERSION", "TOKENS_VERSION", "ThinkPhase", "VERSIONS")
    _LAYOUT = ("HEADER_FIELDS", "MAGIC", "NAME_SEPARATOR", "row_size")
    _PACKING = ("has_tokens", "layers_of", "pack_rows", "row_without_tokens", "with_phase")
    _HOMES = {"record.row": _ROW, "record.layout": _LAYOUT, "record.packing": _PACKING}
    # what `attnhook.records` had
    __getattr__ = moved.names(__name__, {name: home for home, names in _HOMES.items() for name in names})
