"""The report of a comparison: tables and drawings in Markdown and HTML, numbers in JSON, in a folder of its own."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from attnhook import __version__
from attnhook.analysis.compare import figures
from attnhook.analysis.compare.comparison import MEASURES, Comparison, Depth, ZoneRow
from attnhook.analysis.compare.document import Block, Figure, Heading, Items, Paragraph, Table, to_html, to_markdown
from attnhook.analysis.compare.resampling import Estimate
from attnhook.analysis.compare.sides import Side
from attnhook.errors import AttnhookError, OptionError

FORMAT_VERSION: Final = 2  # of comparison.json; 1 had its zones with the attention sink, and zones_without_sink


def check_new(folder: Path) -> None:
    """Raise OptionError unless ``folder`` can be made: nothing is overwritten."""
    if folder.exists():
        raise OptionError("out", f"--out {folder} is there already and nothing is overwritten: name a new folder")
    if not folder.parent.is_dir():
        raise OptionError("out", f"--out {folder}: the folder {folder.parent} does not exist: create it first")


def write(comparison: Comparison, folder: Path, *, command: str) -> list[Path]:
    """Write comparison.md, .html, .json and the drawings into a new folder; the whole folder or none.

    ``command`` is what made the report, shown in it. Raises OptionError where the folder is there, and AttnhookError
    where the file system refuses.
    """
    check_new(folder)
    blocks = to_blocks(comparison, command)
    files = {
        "comparison.md": to_markdown(blocks),
        "comparison.html": to_html(blocks, _title(comparison)),
        "comparison.json": json.dumps(to_json(comparison, command), indent=1, allow_nan=False) + "\n",
        **{block.name: block.svg for block in blocks if isinstance(block, Figure)},
    }
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            scratch.mkdir()
            for name, text in files.items():
                with open(scratch / name, "x", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(scratch, folder)  # fails where a folder with files came in between
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        size = sum(len(text.encode()) for text in files.values())
        raise AttnhookError(
            f"the report cannot be written to {folder}: {error.strerror or error}; name a folder on a disk with "
            f"{size:,} free bytes that you may write to"
        ) from error
    return [folder / name for name in files]


def to_blocks(comparison: Comparison, command: str) -> list[Block]:
    """The whole report."""
    return _blocks(comparison, f"Command: {command}", drawn=True)


def to_tables(comparison: Comparison) -> list[Block]:
    """The report without its drawings, for a terminal."""
    return _blocks(comparison, "", drawn=False)


def _blocks(comparison: Comparison, command: str, *, drawn: bool) -> list[Block]:
    c, settings = comparison, comparison.settings
    level = f"{settings.confidence:.0%}"
    blocks: list[Block] = [
        Heading(_title(c), 1),
        Paragraph(f"attnhook {__version__}, seed {settings.seed}. {command}"),
        Table(
            ("side", "model", "requests", "rows", "layers", "store"),
            [_side_row("A", c.a), _side_row("B", c.b)],
        ),
        Paragraph(_method(c, level)),
    ]
    if c.notes:
        blocks += [Heading("Read this first"), Items(c.notes)]
    blocks += [
        Heading("Zone shares"),
        Paragraph(
            "From fingerprints alone, which never are structure_ripple: that zone is seen in attended positions only."
        ),
        _zone_table(c.zones, level),
    ]
    if drawn:
        blocks.append(_figure(c, "zones.svg", "Zone shares of both sides and their differences", figures.zones(c)))
    blocks += [Heading("Attention by distance"), _means_table(c, level)]
    if drawn:
        blocks.append(_figure(c, "distances.svg", "Mean attention by distance", figures.distances(c)))
    blocks += [Heading("Distances between the sides"), _distance_table(c), Paragraph(_distance_text(c))]
    if all(c.depths):
        blocks += [Heading("Layers"), *_layer_blocks(c, level, drawn=drawn)]
    if c.packs:
        blocks += [
            Heading("Packs of probes"),
            Paragraph(f"Differences A - B of means over rows, with {level} intervals; p by Holm over the packs."),
            _pack_table(c),
        ]
    return blocks


def to_json(comparison: Comparison, command: str) -> dict[str, Any]:
    """The numbers, as JSON values; what is not a number is null."""
    c = comparison
    return {
        "format_version": FORMAT_VERSION,
        "attnhook": __version__,
        "command": command,
        "settings": asdict(c.settings),
        "design": "paired" if c.paired else "independent",
        "sides": {name: _side_json(side) for name, side in (("a", c.a), ("b", c.b))},
        "without_partner": list(c.without_partner),
        "without_sink": c.without_sink,
        "notes": list(c.notes),
        **{
            name: _plain(value)
            for name, value in (
                ("zones", [asdict(row) for row in c.zones]),
                ("sink_mass", None if c.sink is None else _three(c.sink)),
                ("means", {name: _three(found) for name, found in c.means.items()}),
                ("histograms", dict(zip("ab", c.histograms, strict=True))),
                ("jensen_shannon", asdict(c.jensen_shannon)),
                ("energy", asdict(c.energy)),
                ("layers", {name: [asdict(x) for x in found] for name, found in zip("ab", c.depths, strict=True)}),
                ("layer_differences", [asdict(row) for row in c.layer_differences]),
                ("packs", [asdict(row) for row in c.packs]),
            )
        },
    }


def points(found: Estimate, *, sign: bool = False) -> str:
    """A share in percent (a difference in points) with its interval."""
    style = "+.1f" if sign else ".1f"
    value, low, high = (format(100 * x, style) for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def small(value: float) -> str:
    """A distance: four decimals, or two digits where those would be zeros."""
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def probability(p: float) -> str:
    """A p-value as people write it."""
    return f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def _title(c: Comparison) -> str:
    return f"{c.a.label} (A) against {c.b.label} (B)"


def _side_row(name: str, side: Side) -> tuple[str, ...]:
    models = ", ".join(f"{model} ({count})" for model, count in side.models.items()) if len(side.models) > 1 else ""
    model = models or next(iter(side.models))
    layers = ", ".join(map(str, side.layers)) or "not told"
    return name, model, f"{len(side.requests):,}", f"{side.total:,}", layers, side.source.url


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "label": side.label,
        "store": side.source.url,
        "models": side.models,
        "requests": len(side.requests),
        "rows": side.total,
        "left_out": side.left_out,
        "layers": list(side.layers),
    }


def _method(c: Comparison, level: str) -> str:
    s = c.settings
    left = sum(c.without_partner)
    design = (
        "Paired: both sides ran the same requests; pairs are resampled, and p-values come from exchanging the two "
        f"sides of a pair at random.{f' {left} requests without a partner are left out.' if left else ''}"
        if c.paired
        else "Independent: each side's requests are resampled, and p-values come from dealing all requests to the two "
        "sides anew."
    )
    sink = (
        "All is of the attention without the sink, position 0, which is taken out of every row and layer exactly."
        if c.without_sink
        else "The attention sink, position 0, is part of all numbers."
    )
    return (
        f"{design} {sink} Rows of one request depend on each other, so whole requests are resampled throughout: "
        f"{s.resamples:,} bootstrap resamples for {level} percentile intervals, {s.permutations:,} permutations for "
        f"p-values (none is below {1 / (s.permutations + 1):.4g}). p (Holm) is corrected for the rows of its table. "
        "Differences are A - B."
    )


def _zone_table(rows: Sequence[ZoneRow], level: str) -> Table:
    return Table(
        ("zone", f"A % [{level}]", f"B % [{level}]", f"difference, points [{level}]", "p", "p (Holm)"),
        [
            (
                row.zone,
                points(row.a),
                points(row.b),
                points(row.difference, sign=True),
                probability(row.p),
                probability(row.p_holm),
            )
            for row in rows
        ],
        frozenset(i for i, row in enumerate(rows) if row.p_holm < 0.05),
    )


def _means_table(c: Comparison, level: str) -> Table:
    found = {f"{name} mass" if name != "entropy" else name: three for name, three in c.means.items()}
    if c.sink is not None:
        found["mass on position 0"] = c.sink
    return Table(
        ("mean over rows, %", f"A [{level}]", f"B [{level}]", f"difference, points [{level}]"),
        [(name, points(a), points(b), points(difference, sign=True)) for name, (a, b, difference) in found.items()],
    )


def _distance_table(c: Comparison) -> Table:
    named = (
        ("Jensen-Shannon, mean histograms (bits)", c.jensen_shannon),
        ("energy coefficient, fingerprints", c.energy.distance),
    )
    return Table(
        ("distance", "value", "dealt at random: median", "95% below", "p"),
        [(name, *map(small, (d.value, d.null_median, d.null_high)), probability(d.p)) for name, d in named],
    )


def _distance_text(c: Comparison) -> str:
    e = c.energy
    return (
        "Both lie in [0, 1] and are 0 for equal sides; the columns in the middle are what chance alone gives. Energy "
        f"distance: {small(e.energy)} standard deviations, over {e.rows[0]:,} and {e.rows[1]:,} fingerprints of "
        f"{e.requests[0]:,} and {e.requests[1]:,} requests, each number divided by its standard deviation."
    )


def _layer_blocks(c: Comparison, level: str, *, drawn: bool) -> list[Block]:
    blocks: list[Block] = []
    if drawn and any(figures.drawable(depths) for depths in c.depths):
        blocks.append(_figure(c, "layers.svg", "Profiles over the captured layers", figures.layers(c)))
    if c.layer_differences:
        names = list(c.layer_differences[0].measures)
        shown = [_measure(name) for name in names]
        rows = [
            (
                str(row.layer),
                *(points(row.measures[name], sign=True) for name in names if name in row.measures),
                small(row.jensen_shannon),
            )
            for row in c.layer_differences
        ]
        blocks += [
            Paragraph(f"Differences A - B by layer, in points, with {level} intervals:"),
            Table(("layer", *shown, "Jensen-Shannon (bits)"), rows),
        ]
        return blocks
    for name, depths in zip("AB", c.depths, strict=True):
        blocks += [Paragraph(f"Side {name}, means in %, with {level} intervals:"), _depth_table(depths)]
    return blocks


def _depth_table(depths: Sequence[Depth]) -> Table:
    names = [name for name in (*MEASURES, "sink") if all(name in depth.measures for depth in depths)]
    return Table(
        ("layer", "rows", *map(_measure, names)),
        [(str(d.layer), f"{d.rows:,}", *(points(d.measures[name]) for name in names)) for d in depths],
    )


def _measure(name: str) -> str:
    return {"sink": "position 0", "entropy": "entropy"}.get(name, f"{name} mass")


def _pack_table(c: Comparison) -> Table:
    return Table(
        ("pack", "requests", *map(_measure, MEASURES), "Jensen-Shannon (bits)", "p (Holm)"),
        [
            (
                row.pack,
                str(row.requests[0]) if row.requests[0] == row.requests[1] else "{} / {}".format(*row.requests),
                *(points(row.differences[name], sign=True) for name in MEASURES),
                small(row.jensen_shannon.value),
                probability(row.p_holm),
            )
            for row in c.packs
        ],
        frozenset(i for i, row in enumerate(c.packs) if row.p_holm < 0.05),
    )


def _figure(c: Comparison, name: str, caption: str, drawn: Any) -> Figure:
    return Figure(name, f"{caption}: {c.a.label} and {c.b.label}", figures.to_svg(drawn))


def _three(found: tuple[Estimate, Estimate, Estimate]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in zip(("a", "b", "difference"), found, strict=True)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
