"""``attnhook compare``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnhook.errors import OptionError, needs

_WIDTH = 130  # columns that the widest table needs


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("compare")(compare)


def compare(
    a: Annotated[str, typer.Argument(help="Store of side A, such as sqlite:records.db, or its path.")],
    b: Annotated[str, typer.Argument(help="Store of side B; may be the same, with filters.")],
    out: Annotated[Path | None, typer.Option(help="Write the report into this new folder.")] = None,
    a_model: Annotated[str | None, typer.Option(help="Only this model's rows of A.")] = None,
    b_model: Annotated[str | None, typer.Option(help="Only this model's rows of B.")] = None,
    a_since: Annotated[str | None, typer.Option(help="Only rows of A stored since, such as 2026-01-31T12:00.")] = None,
    b_since: Annotated[str | None, typer.Option(help="Only rows of B stored since.")] = None,
    a_until: Annotated[str | None, typer.Option(help="Only rows of A stored before.")] = None,
    b_until: Annotated[str | None, typer.Option(help="Only rows of B stored before.")] = None,
    a_label: Annotated[str, typer.Option(help="Name of A in the report. Default: its model.")] = "",
    b_label: Annotated[str, typer.Option(help="Name of B in the report. Default: its model.")] = "",
    rows: Annotated[str, typer.Option(help="Which rows: all, prompt or generated.")] = "all",
    design: Annotated[
        str, typer.Option(help="paired (by request id), independent, or auto: paired where both ran the same probes.")
    ] = "auto",
    mixed: Annotated[bool, typer.Option("--mixed", help="Take models, or layers, of one side together.")] = False,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples for the intervals.")] = 2000,
    permutations: Annotated[int, typer.Option(help="Permutations for the p-values.")] = 9999,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same report.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the tables.")] = False,
) -> None:
    """Compare two sets of stored records: zone shares, layers and distances, with intervals and p-values."""
    with needs("attnhook compare", "analysis"):
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
    from attnhook.analysis.compare import report, sides, statistics

    settings = statistics.Settings(cast(Any, design), resamples, permutations, confidence, seed)
    if rows not in sides.ROWS:
        raise OptionError("rows", f"--rows {rows!r} must be one of {', '.join(sides.ROWS)}")
    if out is not None:
        report.check_new(out)
    sources = [
        sides.Source(store_url(url), label, model, moment(f"{name}_since", since), moment(f"{name}_until", until))
        for name, url, label, model, since, until in (
            ("a", a, a_label, a_model, a_since, a_until),
            ("b", b, b_label, b_model, b_since, b_until),
        )
    ]
    if sources[0] == sources[1]:
        raise OptionError("b", f"both sides are the same rows of {a}: give filters such as --a-model and --b-model")
    console = Console(stderr=True)
    found = []
    for name, source in zip("AB", sources, strict=True):
        with progress(console, f"reading {name}") as advance:
            found.append(sides.read(source, name=name, rows=cast(Any, rows), mixed=mixed, seed=seed, progress=advance))
    with progress(console, "comparing") as advance:
        comparison = statistics.compare(
            found[0], found[1], settings, progress=lambda step, done, total: advance(done, total, step)
        )
    command = shlex.join(["attnhook", "compare", *sys.argv[2:]])
    if out is not None:
        with console.status("writing the report"):
            report.write(comparison, out, command=command)
    if as_json:
        print(json.dumps(report.to_json(comparison, command)))
        return
    screen = Console()
    _show(comparison, Console(width=max(screen.width, _WIDTH)))  # a wrapped table cannot be read
    if out is not None:
        print(f"wrote {out / 'comparison.html'}, comparison.md and comparison.json")


def store_url(text: str) -> str:
    """A store's URL from a URL or a path: a folder is parquet:, .jsonl jsonl:, any other file sqlite:."""
    from attnhook.store import SCHEMES

    if text.partition(":")[0] in SCHEMES and ":" in text:
        return text
    path = Path(text).expanduser()
    if path.is_dir():
        return f"parquet:{text}"
    if not path.exists():
        raise OptionError(
            "store",
            f"{text!r} is no store: there is no such file or folder, and it does not begin with "
            f"{', '.join(f'{name}:' for name in SCHEMES)}",
        )
    return f"jsonl:{text}" if path.suffix in (".jsonl", ".zst", ".gz") else f"sqlite:{text}"


def moment(name: str, text: str | None) -> datetime | None:
    """An ISO 8601 time; one without a zone is in UTC."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        option = name.replace("_", "-")
        raise OptionError(name, f"--{option} {text!r} must be a time such as 2026-01-31T12:00:00Z") from error


@contextmanager
def progress(console: Console, text: str) -> Iterator[Callable[..., None]]:
    """A bar with the time that is left; call what it yields with what is done, of how much, and a description."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total, step="": bar.update(
            task, completed=done, total=total, description=f"{text}: {step}" if step else text
        )


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
