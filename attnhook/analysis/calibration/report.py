"""The outcome of a calibration, and its report: Markdown, JSON and the confusion matrix as a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnhook.analysis.calibration.judge import ROUNDS, Control, Judgement
from attnhook.analysis.calibration.reference import NAMES
from attnhook.analysis.calibration.rows import Rows
from attnhook.errors import needs
from attnhook.record import zones
from attnhook.record.zones import Thresholds

MEAN = "mean"
SERVED = "mean, sink included"  # what a record's own zone is: no sink left out, no periodicity


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and how they do on the held-out half."""

    rows: Rows
    thresholds: Thresholds
    fitted: dict[str, Judgement]  # by view: each layer, MEAN, SERVED
    default: dict[str, Judgement]  # the same with the thresholds in use so far
    references: dict[str, Judgement]  # by name of `reference.NAMES`, in the view MEAN
    thin: dict[str, tuple[int, int]]  # zones with too few probes to judge: probes of each half
    controls: dict[str, Control]  # by zone, in the view MEAN
    natural: dict[str, float]  # zone shares of natural text in the held-out half, in the view MEAN

    @property
    def supported(self) -> dict[str, bool]:
        """Whether each zone is told apart on the held-out probes, and from the controls where it has some."""
        judged = zip(zones.ZONE_NAMES, self.fitted[MEAN].supported, strict=True)
        return {name: good and (name not in self.controls or self.controls[name].passed) for name, good in judged}

    def figures(self) -> dict[str, Any]:
        """The numbers of the report as plain Python, for JSON."""
        rows = self.rows
        halves = Counter((probe.behaviour, probe.half) for probe in rows.probes)
        return {
            "model": rows.model,
            "layers": list(rows.layers),
            "rows": len(rows.probe),
            "probes": {f"{behaviour}, {half}": count for (behaviour, half), count in sorted(halves.items())},
            "not_judged": {zone: list(count) for zone, count in self.thin.items()},
            "left_out_as_wrong": dict(rows.left_out),
            "fitted": {name: _plain(one) for name, one in self.fitted.items()},
            "before": {name: _plain(one) for name, one in self.default.items()},
            "references": {name: _plain(one) for name, one in self.references.items()},
            "controls": {name: {**asdict(one), "passed": one.passed} for name, one in self.controls.items()},
            "supported": self.supported,
            "natural_text": self.natural,
        }

    def markdown(self) -> str:
        """The report."""
        return "\n\n".join((*self._about(), *self._zones(), *self._views(), *self._thresholds())) + "\n"

    def _about(self) -> tuple[str, ...]:
        rows = self.rows
        halves = Counter((probe.behaviour, probe.half) for probe in rows.probes)
        lines = [f"# Zones of {rows.model}, calibrated"]
        lines.append(
            f"{len(rows.probe)} rows of {len(rows.probes)} probes, layers {', '.join(map(str, rows.layers))}. "
            "Thresholds are fitted on one half of each pack and judged on the other. Every probe has the same weight; "
            f"intervals are 95% over {ROUNDS} bootstraps of probes."
        )
        table = ["| behaviour | fit | held out |", "| --- | --- | --- |"]
        for behaviour in dict.fromkeys(probe.behaviour for probe in rows.probes):
            table.append(f"| {behaviour} | {halves[behaviour, 'fit']} | {halves[behaviour, 'held-out']} |")
        lines.append("\n".join(table))
        if rows.left_out:
            left = ", ".join(f"{count} of {pack}" for pack, count in rows.left_out.items())
            lines.append(f"Left out, since the model's answer was wrong: {left}.")
        return tuple(lines)

    def _zones(self) -> tuple[str, ...]:
        judged = self.fitted[MEAN]
        matrix = [
            "| should be | probes | " + " | ".join(zones.ZONE_NAMES) + " |",
            "| --- " * (len(zones.ZONE_NAMES) + 2) + "|",
        ]
        table = [
            "| zone | recall | precision | supported |",
            "| --- | --- | --- | --- |",
        ]
        compared = ["| zone | probes | recall | rate in controls | difference |", "| --- | --- | --- | --- | --- |"]
        for i, name in enumerate(zones.ZONE_NAMES):
            if name in self.thin:
                first, second = self.thin[name]
                matrix.append(f"| {name} | 0 | " + " | ".join("" for _ in zones.ZONE_NAMES) + " |")
                table.append(f"| {name} | not judged: {first} and {second} probes in the halves | | **no** |")
                continue
            cells = [f"{judged.rates[i, j]:.0%} ({judged.confusion[i, j]})" for j in range(len(zones.ZONE_NAMES))]
            matrix.append(f"| {name} | {judged.probes[i]} | " + " | ".join(cells) + " |")
            precision = (
                "never predicted"
                if np.isnan(judged.precision[i])
                else f"{judged.precision[i]:.0%} {_interval(judged.precision_interval[i])}"
            )
            table.append(
                f"| {name} | {judged.recall[i]:.0%} {_interval(judged.recall_interval[i])} | {precision} | "
                f"{'yes' if self.supported[name] else '**no**'} |"
            )
        unsupported = [name for name, good in self.supported.items() if not good]
        for name, one in self.controls.items():
            compared.append(
                f"| {name} | {one.probes} | {one.recall:.0%} | {one.rate:.0%} | {_interval(one.difference_interval)} |"
            )
        natural = ", ".join(f"{name} {share:.0%}" for name, share in self.natural.items())
        return (
            "## Held-out probes, mean over layers, sink left out",
            f"Balanced accuracy {judged.balanced:.3f} {_interval(judged.balanced_interval, 3)}; with the labels "
            f"permuted over probes {judged.chance:.3f} (97.5th percentile {judged.chance_bound:.3f}), "
            f"p = {judged.p_value:.3g}. Permuted among probes of about equal length only, which is what the length "
            f"of the context alone gives: {judged.chance_at_length:.3f} (97.5th percentile "
            f"{judged.chance_at_length_bound:.3f}).",
            "\n".join(matrix),
            "Shares of the rows that each kind of probe has in each zone, and the number of rows.",
            "\n".join(table),
            "Precision is as if the five kinds were equally frequent. A zone is supported where the lower end of its "
            f"interval is above chance ({judged.chance_precision:.0%}): its probes get it more often than others do.",
            "Controls: rows before the question of the same prompts. A zone they get as often tells prompts apart, "
            "not what the row does, and is not supported.",
            "\n".join(compared),
            (f"**Not supported by this run: {', '.join(unsupported)}.**" if unsupported else "All zones are supported.")
            + (f" Natural text (chat): {natural}." if self.natural else ""),
        )

    def _views(self) -> tuple[str, ...]:
        table = [
            "| view | thresholds before | fitted | " + " | ".join(f"recall {name}" for name in zones.ZONE_NAMES) + " |",
            "| --- " * (len(zones.ZONE_NAMES) + 3) + "|",
        ]
        for view, judged in self.fitted.items():
            cells = _recalls(judged)
            table.append(
                f"| {view} | {self.default[view].balanced:.3f} | {judged.balanced:.3f} "
                f"{_interval(judged.balanced_interval, 3)} | {cells} |"
            )
        for name, judged in self.references.items():
            cells = _recalls(judged)
            table.append(
                f"| {NAMES[name]} | | {judged.balanced:.3f} {_interval(judged.balanced_interval, 3)} | {cells} |"
            )
        return (
            "## Views and references",
            "\n".join(table),
            "Balanced accuracy on held-out probes. The regressions (fitted on the fit half, mean over layers) say what "
            "thresholds could reach. The last one knows the length of the context alone: what it reaches is a property "
            "of the packs, whose long probes are long, and no merit of any fingerprint.",
        )

    def _thresholds(self) -> tuple[str, ...]:
        before = asdict(zones.DEFAULTS)
        table = ["| threshold | before | fitted |", "| --- | --- | --- |"]
        table += [
            f"| {name} | {before[name]:g} | {value:g} |"
            for name, value in asdict(self.thresholds).items()
            if value != before[name]
        ]
        if len(table) == 2:
            return ("## Thresholds", "The fit keeps the thresholds as they were.")
        return ("## Thresholds", "\n".join(table))


def draw(judged: Judgement, path: Path) -> None:
    """Write the confusion matrix as a picture. Raises PluginError without matplotlib, OSError."""
    with needs("calibrate", "analysis"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(judged.rates, cmap="Blues", vmin=0, vmax=1)
    names = [name.replace("_", "\n") for name in zones.ZONE_NAMES]
    for i in range(len(names)):
        for j in range(len(names)):
            rate = judged.rates[i, j]
            if np.isnan(rate):
                continue
            label = f"{rate:.0%}\n{judged.confusion[i, j]} rows"
            axes.text(j, i, label, ha="center", va="center", color="white" if rate > 0.55 else "black", fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), [f"{name}\n({n} probes)" for name, n in zip(names, judged.probes, strict=True)])
    axes.set_xlabel("zone given")
    axes.set_ylabel("zone that the probe should show")
    axes.set_title(f"balanced accuracy on held-out probes {judged.balanced:.2f}, permuted {judged.chance:.2f}")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of a probe's rows")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _plain(judged: Judgement) -> dict[str, Any]:
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(judged).items()}
    return {**_without_nan(plain), "told_apart": dict(zip(zones.ZONE_NAMES, judged.supported, strict=True))}


def _without_nan(value: Any) -> Any:
    """NaN is no JSON: null in its place."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _recalls(judged: Judgement) -> str:
    return " | ".join("" if np.isnan(value) else f"{value:.0%}" for value in judged.recall)


def _interval(ends: Any, digits: int = 0) -> str:
    low, high = ends
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if digits else f"[{low:.0%}, {high:.0%}]"
