"""What is fitted: standardisation and principal components on all rows, the map and its clusters on the sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from attnhook.analysis.manifold.settings import MINIMUM, Settings
from attnhook.errors import OptionError, needs
from attnhook.record import fingerprint as fp

#: Standard deviation from which on a column counts: captured probabilities are exact to 1e-5 (docs/numerics.md), so
#: what varies less is rounding, and standardising would blow it up.
NOISE = 1e-5

#: What UMAP compiles anew in every process, for five seconds.
_COMPILED = ("smooth_knn_dist", "compute_membership_strengths", "_nb_optimize_layout_euclidean_single_epoch")


@dataclass(frozen=True, eq=False)
class Components:
    """Standardisation and principal components; d of the 20 columns' directions are kept.

    ``center`` and ``scale`` are float64 [20], ``scale`` 0 where a column is constant. ``directions`` is float64
    [d, 20], rows of length 1, and ``variance`` float64 [d] the variance of the standardised rows along each;
    ``share`` is that as a share of the whole variance.
    """

    center: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    variance: np.ndarray
    share: np.ndarray

    def standardise(self, fingerprints: np.ndarray) -> np.ndarray:
        """Rows float64 [N, 20] in standard deviations from the mean; 0 in constant columns."""
        varying = self.scale > 0
        return np.where(varying, (fingerprints - self.center) / np.where(varying, self.scale, 1), 0.0)

    def project(self, fingerprints: np.ndarray) -> np.ndarray:
        """Coordinates float64 [N, d] along the components.

        Added up column by column: a product of matrices may round a row differently when other rows are with it,
        and a fingerprint must get the same place alone as among a million.
        """
        rows = self.standardise(fingerprints)
        out = np.zeros((len(rows), len(self.directions)))
        for column in np.flatnonzero(self.scale > 0):
            out += rows[:, column, None] * self.directions[:, column]
        return out


def components(batches: Iterable[np.ndarray], variance: float) -> Components:
    """Fit on float32 [n, 20] batches, in one pass: what is in memory is one batch.

    Raises OptionError where fewer than two columns vary.
    """
    count, mean, products = 0, np.zeros(fp.SIZE), np.zeros((fp.SIZE, fp.SIZE))
    for batch in batches:
        rows = batch.astype(np.float64)
        own = rows.mean(axis=0)
        apart = rows - own
        both = count + len(rows)
        shift = own - mean
        products += apart.T @ apart + np.outer(shift, shift) * (count * len(rows) / both)
        mean += shift * (len(rows) / both)
        count = both
    covariance = products / count
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale = np.where(deviation > NOISE, deviation, 0.0)
    varying = scale > 0
    if varying.sum() < 2:
        names = ", ".join(np.array(fp.NAMES)[varying]) or "none"
        raise OptionError(
            "store",
            f"the fingerprints hardly differ: of {fp.SIZE} columns {names} vary by more than {NOISE:g}; a map needs "
            "two or more: store records of more prompts",
        )
    divide = np.where(varying, scale, 1)
    correlation = covariance / np.outer(divide, divide) * np.outer(varying, varying)
    values, vectors = np.linalg.eigh(correlation)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    share = values / values.sum()
    kept = min(max(2, int((np.cumsum(share) < variance - 1e-12).sum()) + 1), int(varying.sum()))
    directions = vectors[:, :kept].T
    # an eigenvector's sign is arbitrary: the largest entry is made positive
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(kept), largest])[:, None]
    return Components(mean, scale, np.ascontiguousarray(directions), values[:kept], share[:kept])


def check_distinct(points: np.ndarray) -> None:
    """Raise OptionError where points [n, d] are too few different ones for a map."""
    distinct = len(np.unique(points, axis=0))
    if distinct < MINIMUM:
        raise OptionError(
            "store", f"the sample has {distinct} distinct fingerprints; a map needs {MINIMUM}: store more records"
        )


def embed(points: np.ndarray, settings: Settings, seed: int) -> np.ndarray:
    """UMAP of points float [n, d] in the plane, float32 [n, 2]; the same for the same seed.

    Neighbours are exact, from a k-d tree, and the map starts from the first two components: both need no random
    numbers, and save UMAP its approximate search and its eigenvectors.
    """
    with needs("discovery", "analysis"):
        from scipy.spatial import cKDTree  # type: ignore[import-untyped]

        UMAP = _umap()
    neighbours = min(settings.neighbours, len(points) - 1)
    distances, indices = cKDTree(points).query(points, neighbours)
    start = points[:, :2] / points[:, 0].std()
    mapper = UMAP(
        n_neighbors=neighbours,
        min_dist=settings.min_distance,
        n_epochs=settings.epochs,
        random_state=seed,
        n_jobs=1,
        init=start.astype(np.float32),
        precomputed_knn=(indices.astype(np.int32), distances.astype(np.float32)),
        force_approximation_algorithm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot transform new points: `model.Model` does
        found: np.ndarray = mapper.fit_transform(points.astype(np.float32))
    return found.astype(np.float32)


@cache
def _umap() -> Any:
    """The class UMAP, with its compiled functions kept on disk from process to process, as those of ours are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no TensorFlow, which nobody asked for
        from umap import UMAP, layouts, umap_  # type: ignore[import-untyped]
    for name in _COMPILED:
        function: Any = getattr(umap_, name, None) or getattr(layouts, name, None)
        if hasattr(function, "enable_caching"):  # numba's, for what was decorated without cache=True
            function.enable_caching()
    return UMAP


def cluster(embedding: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray, float | None]:
    """HDBSCAN of the map: labels int32 [n] (-1: none), memberships float32 [n] in [0, 1], and DBCV.

    Labels run by size, 0 the largest. DBCV is hdbscan's ``relative_validity_``, in [-1, 1]; None with fewer than two
    clusters.
    """
    with needs("discovery", "analysis"):
        import hdbscan  # type: ignore[import-untyped]
    found: Any = hdbscan.HDBSCAN(
        min_cluster_size=settings.min_cluster(len(embedding)), gen_min_span_tree=True, core_dist_n_jobs=1
    ).fit(embedding.astype(np.float64))
    labels: np.ndarray = found.labels_
    sizes = np.bincount(labels[labels >= 0])
    ranks = np.empty(len(sizes) + 1, np.int32)
    ranks[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    ranks[-1] = -1
    validity = float(found.relative_validity_) if len(sizes) > 1 else None
    return ranks[labels], found.probabilities_.astype(np.float32), validity
