"""Places on a fitted map: the one function that the batch run and the classifier share, over plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attnhook.analysis.manifold.fit import Components
from attnhook.errors import RecordError, needs
from attnhook.record import fingerprint as fp

NEAREST = 5  # sampled fingerprints that a place is made of
_CHUNK = 16384  # rows at a time: temporaries stay in the processor's cache
# a neighbour may be so much further off than the true one, and is by 0.03% on average; 1.7 times as fast as without.
# A sampled fingerprint still finds itself: nothing at a distance above 0 is within any factor of 0
_SLACK = 0.5
_NEW = 0.01  # difference, in a column that was constant, that makes a fingerprint unlike all others
_TINY = 1e-12  # squared distance within which a fingerprint is the sampled one
_ARRAYS = ("center", "scale", "directions", "variance", "share", "points", "embedding", "labels", "memberships")


@dataclass(frozen=True, eq=False)
class Places:
    """Where N fingerprints lie: ``xy`` float32 [N, 2], ``cluster`` int32 [N] (-1: none), ``probability`` float32 [N]
    that it belongs there (0 for none), ``far`` bool [N]: unlike everything that the map was fitted on."""

    xy: np.ndarray
    cluster: np.ndarray
    probability: np.ndarray
    far: np.ndarray


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted map.

    ``points`` float64 [n, d] are the sample along the components, ``embedding`` float32 [n, 2] its places, ``labels``
    int32 [n] and ``memberships`` float32 [n] its clusters.
    """

    components: Components
    points: np.ndarray
    embedding: np.ndarray
    labels: np.ndarray
    memberships: np.ndarray

    def __post_init__(self) -> None:
        n, d = len(self.points), len(self.components.directions)
        shapes = {
            "center": (self.components.center, (fp.SIZE,)),
            "scale": (self.components.scale, (fp.SIZE,)),
            "directions": (self.components.directions, (d, fp.SIZE)),
            "variance": (self.components.variance, (d,)),
            "share": (self.components.share, (d,)),
            "points": (self.points, (n, d)),
            "embedding": (self.embedding, (n, 2)),
            "labels": (self.labels, (n,)),
            "memberships": (self.memberships, (n,)),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape or not np.isfinite(array).all():
                raise RecordError(f"the map's array {name} has shape {array.shape} or is not finite; wanted {shape}")
        if n <= NEAREST:
            raise RecordError(f"the map has {n} points; it needs more than {NEAREST}")

    @cached_property
    def _tree(self) -> Any:
        with needs("discovery", "analysis"):
            from scipy.spatial import cKDTree  # type: ignore[import-untyped]
        return cKDTree(self.points, leafsize=32)

    @cached_property
    def reach(self) -> float:
        """The largest distance of a sampled point to its `NEAREST`-th neighbour: what is further off is far."""
        return float(self._tree.query(self.points, [NEAREST + 1])[0].max())

    def ready(self) -> Model:
        """Build what is built on first use, so that the first caller does not wait and threads share it."""
        _ = self.reach
        return self

    def place(self, fingerprints: np.ndarray, *, workers: int = 1) -> Places:
        """Places of fingerprints float [N, 20]; ``workers`` threads search neighbours, -1: one per core.

        A fingerprint gets the mean place of its `NEAREST` sampled neighbours, weighted by 1/distance², and the
        cluster with the largest weight among them; so a sampled one keeps its own. What is further from its nearest
        neighbour than any sampled one from its fifth, or has more than 0.01 where all that the map was fitted on have
        the same, is far and gets no cluster. Each row's result is its own: the same to the
        bit whatever the other rows are.
        """
        n = len(fingerprints)
        places = Places(np.empty((n, 2), np.float32), np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, bool))
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._place(fingerprints[part], workers, places, part)
        return places

    def _place(self, fingerprints: np.ndarray, workers: int, places: Places, part: slice) -> None:
        distances, nearest = self._tree.query(
            self.components.project(fingerprints), NEAREST, eps=_SLACK, workers=workers
        )
        weights = 1 / (distances**2 + _TINY)
        weights /= weights.sum(axis=1, keepdims=True)
        labels = self.labels[nearest]
        votes, sure = np.zeros_like(weights), np.zeros_like(weights)
        xy = np.zeros((len(weights), 2))
        belief = weights * self.memberships[nearest]
        for j in range(NEAREST):
            xy += weights[:, j, None] * self.embedding[nearest[:, j]]
            same = labels == labels[:, j, None]
            votes += same * weights[:, j, None]
            sure += same * belief[:, j, None]
        rows, best = np.arange(len(votes)), votes.argmax(axis=1)
        cluster, probability = labels[rows, best], sure[rows, best]
        # a column that was constant has no component; what is new there must not look like the rest
        constant = self.components.scale == 0
        new = np.abs(fingerprints[:, constant] - self.components.center[constant]) > _NEW
        far = (distances[:, 0] > self.reach) | new.any(axis=1)
        cluster[far] = -1
        probability[cluster < 0] = 0
        places.xy[part], places.cluster[part] = xy, cluster
        places.probability[part], places.far[part] = probability, far

    def arrays(self) -> dict[str, np.ndarray]:
        """All state as plain arrays, by name."""
        return {name: getattr(self.components if hasattr(self.components, name) else self, name) for name in _ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Model:
        """The map of `arrays`; RecordError where one is missing or does not fit."""
        if missing := [name for name in _ARRAYS if name not in arrays]:
            raise RecordError(f"the map lacks the arrays {', '.join(missing)}")
        own = {name: arrays[name] for name in _ARRAYS}
        return cls(Components(*(own[name] for name in _ARRAYS[:5])), *(own[name] for name in _ARRAYS[5:]))
