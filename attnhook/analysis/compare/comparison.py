"""What a comparison is asked for and what it states, as plain values; `statistics` computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from attnhook.analysis.compare.distances import Distance, Energy
from attnhook.analysis.compare.resampling import Estimate
from attnhook.analysis.compare.sides import Side
from attnhook.errors import OptionError
from attnhook.record import fingerprint as fp

Design = Literal["auto", "paired", "independent"]
DESIGNS: tuple[Design, ...] = get_args(Design)
#: Numbers of a fingerprint that profiles show.
MEASURES: Final[dict[str, int]] = {"local": fp.LOCAL, "mid": fp.MID, "long": fp.LONG, "entropy": fp.ENTROPY}


@dataclass(frozen=True)
class Settings:
    """How a comparison is computed."""

    design: Design = "auto"
    resamples: int = 2000
    permutations: int = 9999
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("resamples", 100, 10**6), ("permutations", 99, 10**6), ("seed", 0, 2**32 - 1)):
            if not low <= getattr(self, name) <= high:
                raise OptionError(name, f"{name}={getattr(self, name)} must be from {low} to {high}")
        if not 0.5 <= self.confidence < 1:
            raise OptionError("confidence", f"confidence={self.confidence:g} must be at least 0.5 and below 1")
        if self.design not in DESIGNS:
            raise OptionError("design", f"design={self.design!r} must be one of {', '.join(DESIGNS)}")


@dataclass(frozen=True)
class ZoneRow:
    """Shares of rows in one zone, in [0, 1]; the difference is A minus B."""

    zone: str
    a: Estimate
    b: Estimate
    difference: Estimate
    p: float
    p_holm: float  # over the zones of the table


@dataclass(frozen=True)
class Depth:
    """Means over the rows of one captured layer; ``sink``, the mass on position 0, where all rows tell it."""

    layer: int
    rows: int
    measures: dict[str, Estimate]
    histogram: tuple[float, ...]  # mean mass in each of the 16 bins


@dataclass(frozen=True)
class LayerDifference:
    """One layer that both sides captured: A minus B."""

    layer: int
    measures: dict[str, Estimate]
    jensen_shannon: float  # bits, between the mean histograms


@dataclass(frozen=True)
class PackRow:
    """One pack of probes by itself; differences are A minus B."""

    pack: str
    requests: tuple[int, int]
    differences: dict[str, Estimate]
    jensen_shannon: Distance
    p_holm: float  # over the packs


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows."""

    a: Side  # as compared: in a paired design the requests that have a partner
    b: Side
    settings: Settings
    paired: bool
    without_partner: tuple[int, int]  # requests left out
    without_sink: bool  # all that follows, but for the sink's own mass, is of the attention without position 0
    zones: list[ZoneRow]
    sink: tuple[Estimate, Estimate, Estimate] | None  # mean mass on position 0: A, B, A minus B; None if not known
    means: dict[str, tuple[Estimate, Estimate, Estimate]]  # of `MEASURES`: A, B, A minus B
    histograms: tuple[tuple[float, ...], tuple[float, ...]]
    jensen_shannon: Distance
    energy: Energy
    depths: tuple[list[Depth], list[Depth]]
    layer_differences: list[LayerDifference]  # none where the sides captured different layers
    packs: list[PackRow]
    notes: list[str]
