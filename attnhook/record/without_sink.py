"""Zones of records as if the attention sink were not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attnhook.record import periodicity
from attnhook.record.token_record import TokenRecord, free_fingerprints
from attnhook.record.zones import ZONE_NAMES, Zone, classify_many


def sink_mass_of(record: TokenRecord, span: str | None = None) -> np.ndarray:
    """The attention of a record on position 0, float32 [L]; of one without `TokenRecord.sink_mass`, a span's mass.

    ``span`` names the captured span ``(0, 1)``. Raises KeyError if the record has neither.
    """
    if record.sink_mass is not None:
        return record.sink_mass
    if span is None or span not in record.span_names:
        raise KeyError(
            f"record {record.key} tells no attention on position 0 (attnhook before 0.2) and has no span {span!r}: "
            f"capture it anew, or with spans={{{span!r}: (0, 1)}}"
        )
    mass: np.ndarray = record.span_mass[:, record.span_names.index(span)]
    return mass


def without_sink(records: Sequence[TokenRecord], span: str | None = None) -> list[Zone]:
    """Zones of records as if the key at position 0 were not there.

    Each layer's fingerprint is freed of it (`sink_mass_of`), then averaged and classified, with the periodicity of the
    records' attended positions. Raises KeyError if a record tells its mass nowhere, RecordError if it does not fit.
    """
    if not records:
        return []
    whole = [replace(record, sink_mass=sink_mass_of(record, span)) for record in records]
    codes, confidence = classify_many(free_fingerprints(whole), periodicity=periodicity.measure(records))
    return [Zone(ZONE_NAMES[code], float(sure)) for code, sure in zip(codes, confidence, strict=True)]
