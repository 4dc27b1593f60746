"""The drift statistic's directions, and what it does where there is no drift: resampled from the baseline."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_CELLS = 2_000_000  # numbers at a time: 16 MB
_TINY = 1e-12


def whiten(covariance: np.ndarray, components: int) -> np.ndarray:
    """Directions [..., d, n] of the largest variance of correlations, scaled to variance 1; of covariances [..., n, n].

    A number without variance has no part in any direction.
    """
    variance = np.diagonal(covariance, axis1=-2, axis2=-1)
    spread = np.sqrt(np.where(variance > _TINY, variance, np.inf))
    values, axes = np.linalg.eigh(covariance / spread[..., :, None] / spread[..., None, :])
    values, axes = values[..., ::-1][..., :components], axes[..., ::-1][..., :components]
    scale = np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-9)), 0)
    directions: np.ndarray = np.swapaxes(axes * scale[..., None, :], -1, -2) / spread[..., None, :]
    return directions


def null_maxima(
    means: np.ndarray,
    *,
    components: int,
    window: int,
    horizon: int,
    block: int = 1,
    runs: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The largest statistic of each of ``runs`` runs without drift, float64 [runs].

    A run draws a baseline of R requests and then ``window + horizon - 1`` requests, blocks of ``block`` neighbours at
    a time, both with replacement from ``means`` [R, n]; it finds mean and directions from the one, as `fit` does, and
    takes the statistic of every full window of the other. So thresholds from it cover the error of a baseline of R
    requests, and however many windows overlap.
    """
    requests, n = means.shape
    length = window + horizon - 1
    means = means - means.mean(axis=0)
    rng = np.random.default_rng([seed, 71])
    # second moments, so that the covariance of a drawn baseline is a product with its counts
    outer = (means[:, :, None] * means[:, None, :]).reshape(requests, n * n)
    step = max(1, _CELLS // max(length * n, requests))
    maxima = np.empty(runs)
    for start in range(0, runs, step):
        count = min(step, runs - start)
        drawn = _blocks(rng, count, requests, requests, block)
        drawn += np.arange(count)[:, None] * requests
        counts = np.bincount(drawn.ravel(), minlength=count * requests).reshape(count, requests) / requests
        centre = counts @ means
        covariance = (counts @ outer).reshape(count, n, n) - centre[:, :, None] * centre[:, None, :]
        directions = whiten(covariance * (requests / (requests - 1)), components)
        run = means[_blocks(rng, count, length, requests, block)] - centre[:, None]
        projected = run @ np.swapaxes(directions, -1, -2)
        summed = np.cumsum(projected, axis=1)
        sums = summed[:, window - 1 :].copy()
        sums[:, 1:] -= summed[:, : horizon - 1]
        maxima[start : start + count] = (sums**2).sum(axis=2).max(axis=1) / window
        progress(start + count, runs)
    return maxima


def _blocks(rng: np.random.Generator, runs: int, length: int, requests: int, block: int) -> np.ndarray:
    """Places of requests, int64 [runs, length]: blocks of neighbours (the last ones go on with the first)."""
    if block == 1:
        return rng.integers(0, requests, (runs, length))
    starts = rng.integers(0, requests, (runs, -(-length // block)))
    places: np.ndarray = ((starts[:, :, None] + np.arange(block)) % requests).reshape(runs, -1)[:, :length]
    return places
