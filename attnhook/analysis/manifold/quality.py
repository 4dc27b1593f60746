"""How far a map can be believed: measured on the run's own data, for the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnhook.analysis.manifold.fit import cluster, embed
from attnhook.analysis.manifold.settings import Settings
from attnhook.errors import needs

_EVALUATED = 3000  # rows for figures whose cost grows with the square
_REFITTED = 4000  # points of the runs for stability
_NEAREST = 15  # neighbours of trustworthiness, at most a third of the points


def trustworthiness(high: np.ndarray, low: np.ndarray) -> float:
    """How many neighbours on the map are neighbours in ``high`` too, weighted by rank, in [0, 1] (Venna & Kaski)."""
    with needs("discovery", "analysis"):
        from sklearn.manifold import trustworthiness as measure  # type: ignore[import-untyped]
    return float(measure(high, low, n_neighbors=min(_NEAREST, len(high) // 3)))


def silhouette(points: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean silhouette of what has a cluster, in [-1, 1]; None with fewer than two clusters."""
    with needs("discovery", "analysis"):
        from sklearn.metrics import silhouette_score  # type: ignore[import-untyped]
    inside = labels >= 0
    if len(np.unique(labels[inside])) < 2 or inside.sum() <= len(np.unique(labels[inside])):
        return None
    return float(silhouette_score(points[inside], labels[inside]))


def agreement(first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray) -> float:
    """Adjusted Rand index: 1 for the same partition, about 0 for chance. Noise counts as one group."""
    with needs("discovery", "analysis"):
        from sklearn.metrics import adjusted_rand_score
    return float(adjusted_rand_score(first, second))


def stability(
    points: np.ndarray, labels: np.ndarray, settings: Settings, progress: Callable[[int, int], object]
) -> dict[str, Any] | None:
    """Agreement of refits with each other over seeds, and with the map itself over bootstraps.

    Refits are smaller than the map, so that they cost seconds; a bootstrap is its distinct points. None with
    ``repeats`` 0.
    """
    repeats = settings.repeats
    if not repeats:
        return None
    rng = np.random.default_rng([settings.seed, 1])
    size = min(_REFITTED, len(points))
    subset = np.sort(rng.choice(len(points), size, replace=False))
    done, total = 0, 2 * repeats + 1

    def refit(rows: np.ndarray, seed: int) -> np.ndarray:
        nonlocal done
        found = cluster(embed(points[rows], settings, seed), settings)[0]
        done += 1
        progress(done, total)
        return found

    runs = [refit(subset, (settings.seed + 1 + i) % 2**32) for i in range(repeats + 1)]
    seeds = [agreement(runs[i], runs[j]) for i in range(len(runs)) for j in range(i)]
    bootstraps = []
    for i in range(repeats):
        # as many draws as leave ``size`` distinct points on average, at most as many as there are points
        rows = np.unique(rng.choice(len(points), len(points), replace=True))
        rows = np.sort(rng.choice(rows, min(size, len(rows)), replace=False))
        bootstraps.append(agreement(refit(rows, (settings.seed + 101 + i) % 2**32), labels[rows]))
    return {
        "points": size,
        "seeds": [round(value, 6) for value in seeds],
        "bootstraps": [round(value, 6) for value in bootstraps],
        "seeds_mean": round(float(np.mean(seeds)), 6),
        "bootstraps_mean": round(float(np.mean(bootstraps)), 6),
    }


def evaluation_rows(count: int, seed: int) -> np.ndarray:
    """Numbers of the rows, out of ``count``, that trustworthiness and silhouette look at; ascending."""
    rng = np.random.default_rng([seed, 2])
    return np.sort(rng.choice(count, min(_EVALUATED, count), replace=False))
