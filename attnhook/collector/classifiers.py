"""What ``POST /classify`` can ask: named classifiers of fingerprints. Fitted ones register beside the zones."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from attnhook.record.zones import ZONE_NAMES, classify_many


class Classifier(Protocol):
    """Names fingerprints float32 [N, 20]: one JSON object each, with at least ``label`` and ``confidence``.

    Raises RecordError for fingerprints that are none.
    """

    def classify(self, fingerprints: np.ndarray) -> list[dict[str, Any]]:
        """The objects, in order."""


class Zones:
    """The rule-based zones of `attnhook.record.zones`."""

    def classify(self, fingerprints: np.ndarray) -> list[dict[str, Any]]:
        """Zone and confidence of each."""
        codes, confidence = classify_many(fingerprints)
        return [
            {"label": ZONE_NAMES[code], "confidence": round(sure, 6)}
            for code, sure in zip(codes.tolist(), confidence.tolist(), strict=True)
        ]
