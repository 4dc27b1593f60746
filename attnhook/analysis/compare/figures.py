"""The drawings of a comparison, as SVG text; the same comparison gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnhook.analysis.compare.comparison import MEASURES, Comparison, Depth
from attnhook.analysis.compare.resampling import Estimate
from attnhook.record import fingerprint as fp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 3:1 or better on white, apart under the colour vision deficiencies, and by marker where colour is missing
COLOURS = ("#1D66D5", "#D55E00")
_MARKERS = ("o", "s")


def zones(comparison: Comparison) -> Figure:
    """Zone shares of both sides and their differences, with intervals."""
    rows = comparison.zones
    figure, (shares, differences) = _panels(1, 2, 10, 3.4)
    place = np.arange(len(rows))[::-1]
    for side, (offset, label) in enumerate(((0.18, comparison.a.label), (-0.18, comparison.b.label))):
        found = [row.a if side == 0 else row.b for row in rows]
        values, errors = _percent(found)
        shares.barh(place + offset, values, 0.34, color=COLOURS[side], label=_short(label))
        shares.errorbar(values, place + offset, xerr=errors, fmt="none", ecolor="#222", elinewidth=1, capsize=2)
    shares.set_yticks(place, [row.zone for row in rows])
    shares.set_xlim(left=0)
    shares.set_xlabel("share of rows, %")
    figure.legend(loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 1.06))
    values, errors = _percent([row.difference for row in rows])
    differences.axvline(0, color="#888", linewidth=1)
    differences.errorbar(values, place, xerr=errors, fmt="o", color="#222", capsize=3)
    differences.set_yticks(place, ["" for _ in rows])
    differences.set_ylim(shares.get_ylim())
    differences.set_xlabel("difference A - B, points")
    return figure


def layers(comparison: Comparison) -> Figure:
    """Profiles over the captured layers of both sides."""
    known = all("sink" in depth.measures for side in comparison.depths for depth in side)
    names = [*MEASURES, *(["sink"] if known else [])]
    same = comparison.a.layers == comparison.b.layers
    figure, axes = _panels(1, len(names), 2.5 * len(names), 2.8)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for side, depths in enumerate(comparison.depths):
            where = np.array([depth.layer for depth in depths], float)
            if not same:
                where /= max(where.max(), 1)
            found = [depth.measures[name] for depth in depths]
            axis.fill_between(where, [x.low for x in found], [x.high for x in found], color=COLOURS[side], alpha=0.25)
            label = _short((comparison.a, comparison.b)[side].label) if axis is axes[0] else None
            axis.plot(
                where, [x.value for x in found], color=COLOURS[side], marker=_MARKERS[side], markersize=3.5, label=label
            )
        axis.set_title(
            "mass on position 0" if name == "sink" else name if name == "entropy" else f"{name} mass", fontsize=10
        )
        axis.set_xlabel("layer" if same else "layer / highest captured")
    figure.legend(loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 1.14))
    return figure


def distances(comparison: Comparison) -> Figure:
    """Mean attention by distance, on both sides."""
    figure, axis = _panels(1, 1, 8, 3)
    place = np.arange(fp.BINS)
    for side, (offset, histogram) in enumerate(zip((-0.2, 0.2), comparison.histograms, strict=True)):
        label = _short((comparison.a, comparison.b)[side].label)
        axis.bar(place + offset, 100 * np.array(histogram), 0.4, color=COLOURS[side], label=label)
    axis.set_xticks(place, [fp.bin_label(i) for i in range(fp.BINS)], rotation=45, ha="right", fontsize=8)
    axis.set_xlabel("distance in tokens")
    axis.set_ylabel("mean attention, %")
    axis.legend(frameon=False)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure's SVG, without a date or random names."""
    import matplotlib

    buffer = io.StringIO()
    # text as outlines: the page looks the same everywhere
    with matplotlib.rc_context({"svg.hashsalt": "attnhook", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def _percent(found: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] and distances to the ends of the intervals [2, n], in percent."""
    table = 100 * np.array([(x.value, x.low, x.high) for x in found])
    # a percentile interval need not hold the value itself
    errors = np.clip(np.stack([table[:, 0] - table[:, 1], table[:, 2] - table[:, 0]]), 0, None)
    return table[:, 0], np.nan_to_num(errors)


def _short(label: str) -> str:
    text = label if len(label) <= 44 else f"{label[:20]}...{label[-20:]}"
    return text.replace("$", r"\$")  # or matplotlib takes it for mathematics


def drawable(depths: Sequence[Depth]) -> bool:
    """Whether a profile over these layers shows anything."""
    return len(depths) >= 2
