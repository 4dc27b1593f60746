"""The map as a picture (PNG) and as a page (HTML) that needs no network."""

from __future__ import annotations

import base64
import html
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from attnhook.errors import needs
from attnhook.record.zones import COLOURS, MEANINGS, ZONE_NAMES
from attnhook.system.inline import policy_hash, script_json

NOISE_COLOUR = "#c3c3c3"
_SHOWN = 20_000  # points of a picture
#: Colours of the largest clusters, then they repeat with another lightness.
_CYCLE = (
    "#1d66d5", "#e37110", "#00a584", "#c2378a", "#8a6d00", "#6f5bd6", "#008fb3", "#b3402e", "#4f7a1c", "#8c4f9f",
    "#5aa2f2", "#f2a65a", "#4fd1b3", "#e58bbf", "#c9ab3f", "#aea1f0", "#62c7e0", "#e08a7c", "#93bd5e", "#c398d1",
)  # fmt: skip


def colours(clusters: int) -> list[str]:
    """A colour for each cluster."""
    return [_CYCLE[i % len(_CYCLE)] for i in range(clusters)]


def points_drawn(count: int, seed: int) -> np.ndarray:
    """Numbers of the points that are drawn, ascending."""
    rng = np.random.default_rng([seed, 3])
    return np.sort(rng.choice(count, min(_SHOWN, count), replace=False))


def png(path: Path, xy: np.ndarray, cluster: np.ndarray, zone: np.ndarray, clusters: int, title: str) -> None:
    """Two panels of the same points, float [n, 2]: by cluster int [n], and by zone int [n]."""
    with needs("discovery", "analysis"):
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.lines import Line2D

    figure = matplotlib.figure.Figure(figsize=(13, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    size = float(np.clip(20_000 / max(len(xy), 1), 1.5, 12))
    palette = [*colours(clusters), NOISE_COLOUR]  # -1 is the last
    order = np.argsort(cluster >= 0, kind="stable")  # noise lies underneath
    left.scatter(*xy[order].T, s=size, c=[palette[c] for c in cluster[order]], linewidths=0, rasterized=True)
    for number in range(clusters):
        own = xy[cluster == number]
        if len(own):
            middle = own[np.argmin(((own - np.median(own, axis=0)) ** 2).sum(axis=1))]
            left.annotate(
                str(number), middle, fontsize=9, weight="bold", ha="center", va="center",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
            )  # fmt: skip
    left.set_title(f"{clusters} clusters; grey: none", fontsize=10)
    right.scatter(*xy.T, s=size, c=[COLOURS[ZONE_NAMES[z]] for z in zone], linewidths=0, rasterized=True)
    marks = [Line2D([], [], marker="o", ls="", color=COLOURS[name], label=name) for name in ZONE_NAMES]
    right.legend(handles=marks, fontsize=8, loc="best", framealpha=0.8)
    right.set_title("zones", fontsize=10)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", "datalim")
    figure.savefig(path, format="png", metadata={"Software": "attnhook"})


def page(path: Path, points: dict[str, Any], clusters: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """The map as one HTML file.

    ``points`` has ``xy`` float [n, 2], ``cluster`` and ``zone`` int [n], ``pack`` and ``layer`` lists, ``key`` list of
    texts; ``clusters`` and ``about`` are JSON. Texts from the store are data to the page, never markup.
    """
    xy = np.asarray(points["xy"], np.float64)
    low, span = xy.min(axis=0), float(np.ptp(xy, axis=0).max()) or 1.0
    packs = sorted({pack for pack in points["pack"] if pack is not None})
    number = {pack: i for i, pack in enumerate(packs)}
    layers = sorted(set(points["layer"]))
    data = {
        "about": about,
        "clusters": clusters,
        "clusterColours": colours(len(clusters)),
        "zones": [{"name": name, "colour": COLOURS[name], "meaning": MEANINGS[name]} for name in ZONE_NAMES],
        "packs": [{"name": pack, "colour": colours(len(packs))[i]} for i, pack in enumerate(packs)],
        "layers": [{"name": str(layer), "colour": colours(len(layers))[i]} for i, layer in enumerate(layers)],
        "noise": NOISE_COLOUR,
        "keys": list(points["key"]),
        "xy": _packed(np.round((xy - low) / span * 65535), "<u2"),
        "cluster": _packed(np.asarray(points["cluster"]), "<i2"),
        "zone": _packed(np.asarray(points["zone"]), "<i2"),
        "pack": _packed(np.array([number.get(pack, -1) for pack in points["pack"]]), "<i2"),
        "layer": _packed(np.array([layers.index(layer) for layer in points["layer"]]), "<i2"),
    }
    script, style = _asset("map.js"), _asset("map.css")
    text = Template(_asset("map.html")).substitute(
        title=html.escape(str(about["title"])),
        script=script,
        style=style,
        script_hash=policy_hash(script),
        style_hash=policy_hash(style),
        data=script_json(data, sort_keys=True),
    )
    path.write_text(text, encoding="utf-8", errors="replace")


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(dtype)).tobytes()).decode("ascii")


def _asset(name: str) -> str:
    return (resources.files("attnhook.analysis.manifold") / "page" / name).read_text(encoding="utf-8")
