"""``attnhook compare``."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnhook.cli import stores as cli_stores
from attnhook.cli.progress import progress
from attnhook.errors import OptionError, require

_WIDTH = 130  # columns that the widest table needs


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("compare")(compare)


def compare(
    a: Annotated[str, typer.Argument(metavar="STORE_A", help="Side A: x.jsonl, x.db, a Parquet folder, or sqlite:x.")],
    b: Annotated[str, typer.Argument(metavar="STORE_B", help="Side B; may be the same store, with filters.")],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the report into this new folder.")] = None,
    a_model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only this model's rows of A.")] = None,
    b_model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only this model's rows of B.")] = None,
    a_since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only rows of A stored since, such as 2026-01-31T12:00.")
    ] = None,
    b_since: Annotated[str | None, typer.Option(metavar="TIME", help="Only rows of B stored since.")] = None,
    a_until: Annotated[str | None, typer.Option(metavar="TIME", help="Only rows of A stored before.")] = None,
    b_until: Annotated[str | None, typer.Option(metavar="TIME", help="Only rows of B stored before.")] = None,
    a_label: Annotated[str, typer.Option(metavar="LABEL", help="Name of A in the report. Default: its model.")] = "",
    b_label: Annotated[str, typer.Option(metavar="LABEL", help="Name of B in the report. Default: its model.")] = "",
    rows: Annotated[str, typer.Option(metavar="ROWS", help="Which rows: all, prompt or generated.")] = "all",
    design: Annotated[
        str,
        typer.Option(
            metavar="DESIGN",
            help="paired (by request id), independent, or auto: paired where both ran the same probes.",
        ),
    ] = "auto",
    mixed: Annotated[bool, typer.Option("--mixed", help="Take models, or layers, of one side together.")] = False,
    with_sink: Annotated[
        bool, typer.Option("--with-sink", help="Leave the attention sink, position 0, in all numbers.")
    ] = False,
    resamples: Annotated[int, typer.Option(metavar="N", help="Bootstrap resamples for the intervals.")] = 2000,
    permutations: Annotated[int, typer.Option(metavar="N", help="Permutations for the p-values.")] = 9999,
    confidence: Annotated[float, typer.Option(metavar="NUMBER", help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same report.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the tables.")] = False,
) -> None:
    """Compare two sets of stored records: zone shares, layers and distances, with intervals and p-values."""
    require("attnhook compare", "analysis", "pyarrow", "matplotlib")
    from attnhook.analysis.compare import comparison as comparisons
    from attnhook.analysis.compare import report, sides, statistics

    settings = comparisons.Settings(cast(Any, design), resamples, permutations, confidence, seed)
    if rows not in sides.ROWS:
        raise OptionError("rows", f"--rows {rows!r} must be one of {', '.join(sides.ROWS)}")
    if out is not None:
        report.check_new(out)
    sources = [
        sides.Source(
            cli_stores.readable(url, f"STORE_{name.upper()}"),
            label,
            model,
            moment(f"{name}_since", since),
            moment(f"{name}_until", until),
        )
        for name, url, label, model, since, until in (
            ("a", a, a_label, a_model, a_since, a_until),
            ("b", b, b_label, b_model, b_since, b_until),
        )
    ]
    if sources[0] == sources[1]:
        filtered = any(value is not None for value in (a_model, b_model, a_since, b_since, a_until, b_until))
        how = "give the sides different filters" if filtered else "give filters such as --a-model and --b-model"
        raise OptionError("b", f"both sides are the same rows of {a}: {how}")
    found = []
    for name, source in zip("AB", sources, strict=True):
        with progress(f"reading {name}") as work:
            found.append(
                sides.read(
                    source,
                    name=name,
                    rows=cast(Any, rows),
                    mixed=mixed,
                    seed=seed,
                    with_sink=with_sink,
                    progress=work.tell,
                )
            )
    with progress("comparing") as work:
        comparison = statistics.compare(
            found[0],
            found[1],
            settings,
            progress=lambda step, done, total: work.tell(done, total, f"comparing: {step}" if step else None),
        )
    command = shlex.join(["attnhook", "compare", *sys.argv[2:]])
    if out is not None:
        with progress("writing the report", measured=False):
            report.write(comparison, out, command=command)
    if as_json:
        print(json.dumps(report.to_json(comparison, command)))
        return
    screen = Console()
    _show(comparison, Console(width=max(screen.width, _WIDTH)))  # a wrapped table cannot be read
    if out is not None:
        print(f"wrote {out / 'comparison.html'}, comparison.md and comparison.json")


def moment(name: str, text: str | None) -> datetime | None:
    """An ISO 8601 time; one without a zone is in UTC."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        option = name.replace("_", "-")
        raise OptionError(name, f"--{option} {text!r} must be a time such as 2026-01-31T12:00:00Z") from error


def _show(comparison: Any, console: Console) -> None:
    from attnhook.analysis.compare import document, report

    for block in report.to_tables(comparison):
        if isinstance(block, document.Table):
            table = Table(box=None, pad_edge=False)
            for number, name in enumerate(block.header):
                table.add_column(name, justify="right" if number else "left")
            for number, row in enumerate(block.rows):
                table.add_row(*map(Text, row), style="bold" if number in block.strong else None)
            console.print(table)
        elif isinstance(block, document.Heading):
            console.print(f"\n{block.text}", style="bold", markup=False, soft_wrap=True)
        elif isinstance(block, document.Items):
            for text in block.texts:
                console.print(f"- {text}", markup=False, soft_wrap=True)
        elif isinstance(block, document.Paragraph):
            console.print(block.text, markup=False, soft_wrap=True)
