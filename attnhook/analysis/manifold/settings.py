"""What a discovery is asked to do, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from attnhook.errors import OptionError

MINIMUM = 100  # fingerprints; a map of fewer shows nothing but chance
_CLUMP = 30


@dataclass(frozen=True)
class Settings:
    """Options of one discovery; what is left at its default is what docs/measurements/discovery.md has figures for."""

    sample: int = 20_000  # fingerprints that the map is fitted on, at most
    seed: int = 0
    model: str | None = None  # only this model's records
    layers: tuple[int, ...] | str | None = None  # None: a record's mean over its layers; "all", or these layers
    with_sink: bool = False  # leave the attention sink, position 0, in every fingerprint
    without_sink: str | None = None  # of a store before 0.2: name of the span (0, 1) that tells the sink's mass
    allow_mixed: bool = False  # records of several models, or means over different layers, on one map
    variance: float = 0.95  # share of the variance that the kept components explain
    neighbours: int = 15  # of a point on the map
    min_distance: float = 0.0  # between points on the map, in UMAP's units
    epochs: int = 200  # of UMAP
    min_cluster_share: float = 0.01  # smallest cluster, share of the sample
    repeats: int = 2  # runs over seeds, and as many over bootstraps, that stability is measured with; 0: none

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "sample": (MINIMUM, 1_000_000),
            "seed": (0, 2**32 - 1),
            "variance": (0.5, 1.0),
            "neighbours": (2, 200),
            "min_distance": (0.0, 1.0),
            "epochs": (10, 10_000),
            "min_cluster_share": (0.0001, 0.5),
            "repeats": (0, 20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(name, f"{name}={value!r} must be from {low:g} to {high:g}")
        if self.with_sink and self.without_sink is not None:
            raise OptionError(
                "with_sink", f"with_sink and without_sink={self.without_sink!r} contradict each other: give one of them"
            )
        if isinstance(self.layers, tuple) and (not self.layers or min(self.layers) < 0):
            raise OptionError("layers", f"layers={list(self.layers)}: name stored layers, such as 0,14,29, or all")

    def min_cluster(self, points: int) -> int:
        """Points in the smallest cluster of a fit on so many: below some 30, UMAP's own clumps count as clusters."""
        return max(5, min(_CLUMP, points // 10), round(self.min_cluster_share * points))
