"""Thresholds that give the best balanced accuracy on some rows, by a search that is the same every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from attnhook.analysis import zones
from attnhook.analysis.calibration.judge import recalls
from attnhook.analysis.calibration.rows import Rows
from attnhook.analysis.zones import Thresholds
from attnhook.errors import RecordError

#: Values that are tried for each fitted threshold; the others keep their defaults.
GRID: dict[str, tuple[float, ...]] = {
    "local_mass": (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8),
    "long_mass": (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8),
    "diffuse_entropy": (0.7, 0.74, 0.76, 0.78, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94),
    "diffuse_keys": (4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0),
    "ripple_periodicity": (0.06, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3),
}
_SWEEPS = 6
_MARGIN = 0.002  # balanced accuracy that a value must win to replace one that is there: noise wins less


def predictions(rows: Rows, thresholds: Thresholds) -> np.ndarray:
    """Zone codes of every view of every row, int8 [N, U]."""
    count, units, size = rows.fingerprints.shape
    codes, _ = zones.classify_many(
        rows.fingerprints.reshape(count * units, size),
        periodicity=rows.periodicity.reshape(count * units),
        thresholds=thresholds,
    )
    return codes.reshape(count, units)


def fit(rows: Rows, *, progress: Callable[[str], object] = lambda name: None) -> Thresholds:
    """Thresholds for these rows: coordinate search from the defaults over `GRID`.

    What is made as large as possible is the balanced accuracy (mean recall of the five zones, every probe with the
    same weight), averaged over the views: each layer, and the mean over layers. Raises RecordError where a zone has
    no probe.
    """
    labels = rows.labels
    present = set(labels[np.unique(rows.probe)].tolist())
    missing = [name for code, name in enumerate(zones.ZONE_NAMES) if code not in present]
    if missing:
        raise RecordError(
            f"no probe left in the fit half for {', '.join(missing)}: run more packs with attnhook probe, or take "
            "wrong answers too with --wrong-too"
        )

    def worth(thresholds: Thresholds) -> float:
        codes = predictions(rows, thresholds)
        return float(np.mean([recalls(rows, codes[:, unit]).mean() for unit in range(codes.shape[1])]))

    best, value = zones.DEFAULTS, worth(zones.DEFAULTS)
    for _ in range(_SWEEPS):
        before = best
        for name, values in GRID.items():
            progress(name)
            tried = [replace(best, **{name: candidate}) for candidate in values]
            reached = [worth(one) for one in tried]
            top = int(np.argmax(reached))
            if reached[top] > value + _MARGIN:
                best, value = tried[top], reached[top]
        if best == before:
            break
    return best
