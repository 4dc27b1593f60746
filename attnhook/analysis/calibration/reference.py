"""What other ways of telling the zones reach on the same rows: how good thresholds could be, and what is no merit."""

from __future__ import annotations

import warnings

import numpy as np

from attnhook.analysis.calibration.rows import Rows
from attnhook.errors import needs

#: Names of the references, in the order of the report.
NAMES: dict[str, str] = {
    "fingerprint": "logistic regression of the 20 numbers",
    "fingerprint and periodicity": "logistic regression of the 20 numbers and the periodicity",
    "visible keys": "logistic regression of nothing but the number of visible keys",
}


def features(name: str, rows: Rows, unit: int) -> np.ndarray:
    """What the reference ``name`` knows of each row in one view, float64 [N, m]."""
    if name == "visible keys":
        keys = np.log(rows.keys.astype(np.float64))
        return np.stack([keys, keys**2], axis=1)
    fingerprints = rows.fingerprints[:, unit].astype(np.float64)
    if name == "fingerprint":
        return fingerprints
    return np.concatenate([fingerprints, np.nan_to_num(rows.periodicity[:, [unit]])], axis=1)


def predict(name: str, fit: Rows, held_out: Rows, unit: int) -> np.ndarray:
    """Zone codes int [N] of the held-out rows by a multinomial logistic regression of the fit half.

    Features are standardised, every probe has the same weight and every zone the same sum of weights.
    """
    with needs("calibrate", "analysis"):
        from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
        from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
        from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    labels = fit.labels[fit.probe]
    known = labels >= 0
    weights = fit.weights()[known]
    totals = np.bincount(labels[known], weights)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps are far past what changes a prediction
        model.fit(
            features(name, fit, unit)[known],
            labels[known],
            logisticregression__sample_weight=weights / totals[labels[known]] * len(labels),
        )
    codes: np.ndarray = model.predict(features(name, held_out, unit)).astype(np.int8)
    return codes
