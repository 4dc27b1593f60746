"""Zones of records as if the attention sink were not there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnhook.record import periodicity
from attnhook.record.token_record import TokenRecord
from attnhook.record.zones import ZONE_NAMES, Zone, classify_many, without_key


def without_sink(records: Sequence[TokenRecord], span: str) -> list[Zone]:
    """Zones of records as if the key at position 0 were not there.

    ``span`` names the captured span ``(0, 1)``, whose mass is that key's score in each layer. Each layer's
    fingerprint is freed of it, then averaged and classified, with the periodicity of the records' attended
    positions. Raises KeyError if a record lacks the span.
    """
    if not records:
        return []
    means = []
    for record in records:
        column = record.span_names.index(span) if span in record.span_names else None
        if column is None:
            raise KeyError(f"record {record.key} has no span {span!r}: capture with spans={{{span!r}: (0, 1)}}")
        p, layers = record.query_position, len(record.layers)
        freed, scores = record.fingerprints, record.span_mass[:, column]
        if p > 0:  # a layer whose window hides position 0 gives it 0 and stays as it is
            without = without_key(freed, scores, np.full(layers, p), np.full(layers, p + 1))
            freed = np.where((scores > 0)[:, None], without, freed)
        means.append(freed.mean(axis=0, dtype=np.float64))
    codes, confidence = classify_many(np.stack(means), periodicity=periodicity.measure(records))
    return [Zone(ZONE_NAMES[code], float(sure)) for code, sure in zip(codes, confidence, strict=True)]
