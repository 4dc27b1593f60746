"""``attnhook calibrate``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnhook import __version__
from attnhook.analysis import probes
from attnhook.analysis.calibration.report import MEAN, Calibration, draw
from attnhook.analysis.calibration.rows import collect
from attnhook.analysis.calibration.run import calibrate
from attnhook.cli import options as cli_options
from attnhook.cli import stores as cli_stores
from attnhook.cli.progress import progress
from attnhook.errors import AttnhookError, OptionError, require
from attnhook.probing import journal as journals
from attnhook.record import zones
from attnhook.record.zones import Thresholds
from attnhook.store import open_store

_REPORT, _THRESHOLDS, _FIGURES, _PICTURE = "report.md", "thresholds.json", "figures.json", "confusion.png"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("calibrate")(command)


def command(
    store: cli_options.Store,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for the report, the thresholds, all figures and the picture.")
    ],
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the probe run is recorded. Default: beside the store, as probe does."),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Judge the thresholds of this file in place of fitting new ones."),
    ] = None,
    wrong_too: Annotated[
        bool, typer.Option("--wrong-too", help="Count probes that the model answered wrongly too.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of bootstraps and permutations.")] = 0,
) -> None:
    """Fit the zones' thresholds to one half of the probe packs and judge them on the other half.

    STORE holds the records of attnhook probe.
    """
    require("attnhook calibrate", "analysis", "pyarrow", "sklearn", "matplotlib")
    store = cli_stores.readable(store)
    table = None if thresholds is None else Thresholds.load(thresholds)
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OptionError("out", f"--out {out} cannot be made, since {place} is no folder that you may write to")
    for name in (_REPORT, _THRESHOLDS, _FIGURES, _PICTURE):
        if (out / name).exists():
            raise OptionError("out", f"{out / name} is there already: name another folder with --out")
    if seed < 0:
        raise OptionError("seed", f"--seed {seed} must be 0 or more")
    open_store(store).close()  # what is no store is told as that
    record = journals.place(store, state)
    if state is None and not record.exists():
        raise OptionError(
            "store",
            f"{store} is no output of attnhook probe, since {record} is not beside it: make one with attnhook probe "
            "--out STORE, or name the run's record with --state",
        )
    manifest, done = journals.read(record)
    if manifest.get("probes") != probes.digest():
        raise OptionError(
            "store",
            f"the run has probes {manifest.get('probes')!r}, this attnhook {probes.digest()!r}: calibrate with the "
            "attnhook that made the run, or run the probes anew",
        )
    with progress("reading the records", measured=False) as work:
        with open_store(store) as opened:
            rows = collect(
                opened.records(), {name: entry["right"] for name, entry in done.items()}, wrong_too=wrong_too
            )
        found = calibrate(rows, thresholds=table, seed=seed, progress=lambda name: work.tell(text=f"judging: {name}"))
    _write(found, out, {"store": store, "attnhook": __version__, "probes": probes.digest(), "seed": seed})
    _show(found, Console())
    print(f"wrote {out}")


def _write(found: Calibration, out: Path, source: dict[str, object]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        judged = found.fitted[MEAN]
        found.thresholds.save(
            out / _THRESHOLDS,
            **source,
            model=found.rows.model,
            balanced_accuracy=judged.balanced,
            supported=found.supported,
        )
        (out / _FIGURES).write_text(json.dumps({**source, **found.figures()}, indent=1) + "\n", encoding="utf-8")
        draw(judged, out / _PICTURE)
        (out / _REPORT).write_text(found.markdown(), encoding="utf-8")
    except OSError as error:
        raise AttnhookError(f"cannot write {out}: {error.strerror}; choose another folder with --out") from error


def _show(found: Calibration, console: Console) -> None:
    judged = found.fitted[MEAN]
    table = Table(title="held-out probes, mean over layers", title_justify="left", box=None, pad_edge=False)
    for name in ("zone", "probes", "recall", "precision", "supported"):
        table.add_column(name, justify="left" if name == "zone" else "right", no_wrap=True)
    for i, name in enumerate(zones.ZONE_NAMES):
        table.add_row(
            name,
            str(judged.probes[i]),
            "-" if judged.recall[i] != judged.recall[i] else f"{judged.recall[i]:.0%}",
            "-" if judged.precision[i] != judged.precision[i] else f"{judged.precision[i]:.0%}",
            "yes" if found.supported[name] else "no",
        )
    console.print(table)
    console.print(
        f"balanced accuracy {judged.balanced:.3f}, labels permuted {judged.chance:.3f} (97.5th percentile "
        f"{judged.chance_bound:.3f}); thresholds before {found.default[MEAN].balanced:.3f}",
        soft_wrap=True,
    )
    for name, one in found.references.items():
        console.print(f"logistic regression of {name}: {one.balanced:.3f}", soft_wrap=True)
