"""Resampling of whole requests: bootstrap intervals, permutation p-values, Holm's correction.

A table holds sums per request. Every statistic of a comparison is a function of the sums over requests, so both
methods come down to products of weights with tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CELLS = 4_000_000  # weights at a time: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap percentile interval."""

    value: float
    low: float
    high: float


def bootstrap_sums(
    rng: np.random.Generator, a: np.ndarray, b: np.ndarray, *, resamples: int, paired: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums over requests drawn with replacement, from tables [R_a, k] and [R_b, k]: chunks of [n, k] and [n, k].

    ``paired``: row i of both tables is one pair, and pairs are drawn.
    """
    widest = max(len(a), len(b))
    for count in _chunks(resamples, widest):
        drawn = _drawn(rng, count, len(a))
        yield drawn @ a, (drawn if paired else _drawn(rng, count, len(b))) @ b


def labels(rng: np.random.Generator, a: int, b: int, *, permutations: int, paired: bool) -> Iterator[np.ndarray]:
    """Which requests are in A when sides are dealt anew: float64 [n, a + b] of 0 and 1, first A's, then B's.

    ``paired``: a pair's two requests change places or not; else ``a`` of all requests are drawn.
    """
    for count in _chunks(permutations, a + b):
        if paired:
            stays = rng.integers(0, 2, (count, a)).astype(np.float64)
            yield np.concatenate([stays, 1 - stays], axis=1)
        else:
            order = rng.random((count, a + b)).argpartition(a - 1, axis=1)[:, :a]
            dealt = np.zeros((count, a + b))
            np.put_along_axis(dealt, order, 1.0, axis=1)
            yield dealt


def estimate(value: float, resampled: np.ndarray, confidence: float) -> Estimate:
    """The percentile interval of ``resampled`` [n] around ``value``; NaN (an empty resample) is left out."""
    kept = resampled[np.isfinite(resampled)]
    if not len(kept):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def p_value(observed: float, permuted: np.ndarray) -> float:
    """Share of dealings, the observed one included, whose statistic is at least the observed one."""
    # sums in another order differ in the last digits: that is a tie, not a difference
    at_least = permuted >= observed - 1e-12 - 1e-9 * abs(observed)
    return float((1 + at_least.sum()) / (1 + len(permuted)))


def holm(p: np.ndarray) -> np.ndarray:
    """P-values [n] corrected by Holm's step-down method for n tests, float64 [n]."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def _drawn(rng: np.random.Generator, count: int, requests: int) -> np.ndarray:
    picks = rng.integers(0, requests, (count, requests))
    picks += np.arange(count)[:, None] * requests
    return np.bincount(picks.ravel(), minlength=count * requests).reshape(count, requests).astype(np.float64)


def _chunks(total: int, width: int) -> Iterator[int]:
    step = max(1, _CELLS // max(width, 1))
    for start in range(0, total, step):
        yield min(step, total - start)
