"""Distances between two sets of fingerprints: Jensen-Shannon of mean histograms, energy distance of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnhook.analysis.compare.resampling import labels, p_value
from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp

_TINY = 1e-300


@dataclass(frozen=True)
class Distance:
    """A distance, and what dealing the requests to the sides at random gives."""

    value: float
    null_median: float
    null_high: float  # 95% of the dealings are below
    p: float


def against_null(observed: float, null: np.ndarray) -> Distance:
    """The observed distance beside those of random dealings, ``null`` [n]."""
    median, high = np.quantile(null, [0.5, 0.95]).tolist()
    return Distance(observed, median, high, p_value(observed, null))


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits, [...] in [0, 1], of histograms [..., n] that need not sum to 1.

    0 where one of them is empty.
    """
    sums = a.sum(axis=-1, keepdims=True), b.sum(axis=-1, keepdims=True)
    p, q = a / np.maximum(sums[0], _TINY), b / np.maximum(sums[1], _TINY)
    middle = (p + q) / 2
    bits = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1])
    for part in (p, q):
        bits = bits + 0.5 * np.where(
            part > 0, part * np.log2(np.maximum(part, _TINY) / np.maximum(middle, _TINY)), 0
        ).sum(axis=-1)
    return np.where((sums[0][..., 0] > 0) & (sums[1][..., 0] > 0), np.clip(bits, 0, 1), 0)


@dataclass(frozen=True)
class Energy:
    """Energy distance of two samples of fingerprints, each number divided by its standard deviation."""

    distance: Distance  # of the energy coefficient, in [0, 1]
    energy: float  # the distance itself, in standard deviations
    rows: tuple[int, int]  # fingerprints of each side that were used
    requests: tuple[int, int]
    constant: tuple[str, ...]  # numbers that are the same in all rows, left out


def energy_distance(
    rng: np.random.Generator,
    samples: tuple[np.ndarray, np.ndarray],
    owners: tuple[np.ndarray, np.ndarray],
    *,
    permutations: int,
    paired: bool,
) -> Energy:
    """Energy distance (Szekely and Rizzo 2013) between samples, with a p-value that deals whole requests.

    E = 2 mean|x - y| - mean|x - x'| - mean|y - y'| over all pairs; the coefficient is E / (2 mean|x - y|).

    Parameters
    ----------
    samples : [n, 20] and [m, 20] float32
    owners : [n] and [m] int64
        The request of each row, counted from 0 on each side without gaps. In a ``paired`` design request i of A is
        the partner of request i of B.

    Raises RecordError where all fingerprints are the same.
    """
    rows = np.concatenate(samples).astype(np.float64)
    spread = rows.std(axis=0)
    varying = spread > 1e-9
    if not varying.any():
        raise RecordError(
            f"all {len(rows)} fingerprints are the same: there is nothing to compare; check what was stored"
        )
    rows = rows[:, varying] / spread[varying]
    requests = [int(owner.max()) + 1 for owner in owners]
    own = np.concatenate([owners[0], owners[1] + requests[0]])
    blocks = _block_sums(rows, own, sum(requests))
    counts = np.bincount(own, minlength=sum(requests)).astype(np.float64)

    def statistic(in_a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficient and energy, [n] each, where sides are dealt as ``in_a`` [n, requests]."""
        near = in_a @ blocks
        number_a = in_a @ counts
        number_b = counts.sum() - number_a
        within_a = (near * in_a).sum(axis=1)
        across = near.sum(axis=1) - within_a
        within_b = blocks.sum() - 2 * across - within_a
        mean = across / (number_a * number_b)
        energy = 2 * mean - within_a / number_a**2 - within_b / number_b**2
        return energy / np.maximum(2 * mean, _TINY), energy

    observed, energy = (float(x[0]) for x in statistic(np.repeat([1.0, 0.0], requests)[None]))
    null = np.concatenate(
        [statistic(dealt)[0] for dealt in labels(rng, *requests, permutations=permutations, paired=paired)]
    )
    return Energy(
        distance=against_null(max(observed, 0), null),
        energy=max(energy, 0),
        rows=(len(samples[0]), len(samples[1])),
        requests=(requests[0], requests[1]),
        constant=tuple(name for name, varies in zip(fp.NAMES, varying.tolist(), strict=True) if not varies),
    )


def _block_sums(rows: np.ndarray, own: np.ndarray, requests: int) -> np.ndarray:
    """Sum of the distances between each two requests' rows, float64 [requests, requests]."""
    by_request = np.zeros((requests, len(rows)))
    squares = (rows**2).sum(axis=1)
    for start in range(0, len(rows), 512):
        part = rows[start : start + 512]
        apart = squares[start : start + 512, None] + squares - 2 * part @ rows.T
        apart = np.sqrt(np.where(apart > 1e-10, apart, 0))  # below that it is rounding, not distance
        np.add.at(by_request, own[start : start + 512], apart)
    blocks = np.zeros((requests, requests))
    np.add.at(blocks.T, own, by_request.T)
    return blocks
