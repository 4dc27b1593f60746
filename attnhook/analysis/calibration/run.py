"""One calibration, from rows to figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnhook.analysis.calibration import reference
from attnhook.analysis.calibration.fit import fit, predictions
from attnhook.analysis.calibration.judge import Judgement, against_controls, judge, shares
from attnhook.analysis.calibration.report import MEAN, SERVED, Calibration
from attnhook.analysis.calibration.rows import Rows
from attnhook.errors import RecordError
from attnhook.record import zones
from attnhook.record.zones import Thresholds

MIN_PROBES = 3  # of a zone in each half: of fewer nothing can be said


def calibrate(
    rows: Rows,
    *,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    progress: Callable[[str], object] = lambda name: None,
) -> Calibration:
    """Fit thresholds on the fit half (or take the given ones), and judge them and the defaults on the other half.

    The same rows and seed give the same numbers. A zone with fewer than `MIN_PROBES` probes in a half is neither
    fitted nor judged. Raises RecordError where fewer than two zones are left.
    """
    counts = {zone: _probes(rows, code) for code, zone in enumerate(zones.ZONE_NAMES)}
    thin = {zone: count for zone, count in counts.items() if min(count) < MIN_PROBES}
    if len(zones.ZONE_NAMES) - len(thin) < 2:
        wrong = rows.left_out.total()  # none where they are counted already
        raise RecordError(
            f"fewer than two zones have {MIN_PROBES} probes in each half ({counts}): run more packs with attnhook probe"
            + (f", or count the {wrong} that were answered wrongly too, with --wrong-too" if wrong else "")
        )
    codes_of_thin = [zones.ZONE_NAMES.index(zone) for zone in thin]
    rows = rows.where(~np.isin(rows.labels, codes_of_thin)[rows.probe])
    controls = rows.where(rows.control).of_half("held-out")
    rows = rows.where(~rows.control)
    first, held_out = rows.of_half("fit"), rows.of_half("held-out")
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
    mean = rows.units.index(MEAN)
    codes = predictions(held_out, thresholds)[:, mean]
    table, kinds = shares(held_out, codes)
    other = predictions(controls, thresholds)[:, mean] if len(controls.probe) else np.zeros(0, np.int8)
    compared = {
        name: against_controls(held_out, codes, controls, other, code, seed=seed)
        for code, name in enumerate(zones.ZONE_NAMES)
    }
    natural = table[kinds < 0]
    return Calibration(
        rows=rows,
        thresholds=thresholds,
        fitted=judged(thresholds),
        default=judged(zones.DEFAULTS),
        references=references,
        thin=thin,
        controls={name: one for name, one in compared.items() if one is not None},
        natural=dict(zip(zones.ZONE_NAMES, natural.mean(axis=0).tolist(), strict=True)) if len(natural) else {},
    )


def _probes(rows: Rows, code: int) -> tuple[int, int]:
    """Probes of a zone in the fit and in the held-out half."""
    there = [rows.probes[i] for i in np.unique(rows.probe[~rows.control]) if rows.labels[i] == code]
    return sum(one.half == "fit" for one in there), sum(one.half != "fit" for one in there)
