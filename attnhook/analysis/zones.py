"""Zones: named kinds of attention pattern. One place for what `attnhook.record` knows of them."""

from __future__ import annotations

from attnhook.record.without_sink import without_sink
from attnhook.record.zones import (
    COLOURS,
    DEFAULTS,
    MEANINGS,
    ZONE_NAMES,
    Thresholds,
    Zone,
    are_fingerprints,
    classify,
    classify_many,
    shares,
    without_key,
)

__all__ = [
    "COLOURS",
    "DEFAULTS",
    "MEANINGS",
    "ZONE_NAMES",
    "Thresholds",
    "Zone",
    "are_fingerprints",
    "classify",
    "classify_many",
    "shares",
    "without_key",
    "without_sink",
]
