"""One calibration, from rows to figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnhook.analysis import zones
from attnhook.analysis.calibration import reference
from attnhook.analysis.calibration.fit import fit, predictions
from attnhook.analysis.calibration.judge import Judgement, judge, shares
from attnhook.analysis.calibration.report import MEAN, SERVED, Calibration
from attnhook.analysis.calibration.rows import Rows
from attnhook.analysis.zones import Thresholds
from attnhook.errors import RecordError


def calibrate(
    rows: Rows,
    *,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    progress: Callable[[str], object] = lambda name: None,
) -> Calibration:
    """Fit thresholds on the fit half (or take the given ones), and judge them and the defaults on the other half.

    The same rows and seed give the same numbers. Raises RecordError where a half lacks probes of a zone.
    """
    first, held_out = rows.of_half("fit"), rows.of_half("held-out")
    labels = rows.labels
    for half, part in (("fit", first), ("held-out", held_out)):
        present = set(labels[np.unique(part.probe)].tolist())
        missing = [name for code, name in enumerate(zones.ZONE_NAMES) if code not in present]
        if missing:
            raise RecordError(
                f"the {half} half has no probe for {', '.join(missing)}: run more packs with attnhook probe, or count "
                "wrong answers too with --wrong-too"
            )
    if thresholds is None:
        thresholds = fit(first, progress=progress)

    def judged(table: Thresholds) -> dict[str, Judgement]:
        codes = predictions(held_out, table)
        views = {name: codes[:, unit] for unit, name in enumerate(rows.units)}
        views[SERVED] = zones.classify_many(held_out.whole, thresholds=table)[0]
        found = {}
        for name, view in views.items():
            progress(name)
            found[name] = judge(held_out, view, seed=seed)
        return found

    references = {}
    for name in reference.NAMES:
        progress(name)
        codes = reference.predict(name, first, held_out, rows.units.index(MEAN))
        references[name] = judge(held_out, codes, seed=seed)
    table, kinds = shares(held_out, predictions(held_out, thresholds)[:, rows.units.index(MEAN)])
    natural = table[kinds < 0]
    return Calibration(
        rows=rows,
        thresholds=thresholds,
        fitted=judged(thresholds),
        default=judged(zones.DEFAULTS),
        references=references,
        natural=dict(zip(zones.ZONE_NAMES, natural.mean(axis=0).tolist(), strict=True)) if len(natural) else {},
    )
