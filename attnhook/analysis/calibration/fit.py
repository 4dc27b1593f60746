"""Thresholds that give the best balanced accuracy on some rows, by a search that is the same every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from attnhook.analysis.calibration.judge import recalls
from attnhook.analysis.calibration.rows import Rows
from attnhook.record import zones
from attnhook.record.zones import Thresholds

#: Values that are tried for each fitted threshold; the others keep their defaults.
GRID: dict[str, tuple[float, ...]] = {
    "local_mass": (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8),
    "long_mass": (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8),
    "diffuse_entropy": (0.7, 0.74, 0.76, 0.78, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94),
    "diffuse_keys": (4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0),
    "ripple_periodicity": (0.06, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3),
}
_OF_ZONE = {  # thresholds that cannot be fitted without probes of the zone
    "local_mass": zones.SYNTAX_FLOOR,
    "long_mass": zones.LONG_RANGE,
    "diffuse_entropy": zones.DIFFUSE,
    "diffuse_keys": zones.DIFFUSE,
    "ripple_periodicity": zones.STRUCTURE_RIPPLE,
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

    What is made as large as possible is the balanced accuracy (mean recall of the zones, every probe with the same
    weight) of the last view, the mean over layers that a record's zone is told from. A threshold of a zone without
    probes stays as it is.
    """
    present = set(rows.labels[np.unique(rows.probe)].tolist())
    grid = {name: values for name, values in GRID.items() if _OF_ZONE[name] in present}
    last = replace(rows, fingerprints=rows.fingerprints[:, -1:], periodicity=rows.periodicity[:, -1:])

    def worth(thresholds: Thresholds) -> float:
        return float(recalls(last, predictions(last, thresholds)[:, 0]).mean())

    best, value = zones.DEFAULTS, worth(zones.DEFAULTS)
    for _ in range(_SWEEPS):
        before = best
        for name, values in grid.items():
            progress(name)
            tried = [replace(best, **{name: candidate}) for candidate in values]
            reached = [worth(one) for one in tried]
            top = int(np.argmax(reached))
            if reached[top] > value + _MARGIN:
                best, value = tried[top], reached[top]
        if best == before:
            break
    return best
