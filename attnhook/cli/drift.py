"""``attnhook drift fit`` and ``attnhook drift check``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from attnhook.analysis.drift import baseline as baselines
from attnhook.analysis.drift.monitor import DriftMonitor
from attnhook.cli import options as cli_options
from attnhook.cli import stores as cli_stores
from attnhook.cli.compare import moment
from attnhook.cli.progress import progress
from attnhook.errors import OptionError, require
from attnhook.record import fingerprint as fp
from attnhook.record.arrow import show_layer_sets

_Since = Annotated[str | None, typer.Option(metavar="TIME", help="Only rows stored since, such as 2026-01-31T12:00.")]
_Until = Annotated[str | None, typer.Option(metavar="TIME", help="Only rows stored before.")]
_ALIKE = 0.1  # autocorrelation of neighbouring requests from which the rate does not hold


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    drift = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tells when attention is not as it was.")
    drift.command("fit")(fit)
    drift.command("check")(check)
    app.add_typer(drift, name="drift")


def fit(
    store: cli_options.Store,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the baseline to this new file.")],
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only this model's rows.")] = None,
    since: _Since = None,
    until: _Until = None,
    rows: Annotated[str, typer.Option(metavar="ROWS", help="Which rows: all, prompt or generated.")] = "generated",
    window: Annotated[int, typer.Option(metavar="N", help="Requests that are compared at a time.")] = 50,
    false_alarm_rate: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="Probability of an alarm or more in --horizon requests without drift."),
    ] = 0.01,
    horizon: Annotated[int, typer.Option(metavar="N", help="Requests that the rate is about.")] = 1000,
    block: Annotated[
        int, typer.Option(metavar="N", help="Neighbouring requests to resample together, where they are alike.")
    ] = 1,
    simulations: Annotated[int, typer.Option(metavar="N", help="Runs that the thresholds are found from.")] = 4000,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same thresholds.")] = 0,
    mixed: Annotated[bool, typer.Option("--mixed", help="Take several models, or sets of layers, together.")] = False,
    with_sink: Annotated[
        bool, typer.Option("--with-sink", help="Leave the attention sink, position 0, in the fingerprints.")
    ] = False,
) -> None:
    """Fit a baseline: what the attention of requests is like, and how far chance alone takes it."""
    from attnhook.analysis.drift import reading
    from attnhook.analysis.sink import SinkChoice

    settings = baselines.DriftSettings(window, false_alarm_rate, horizon, block, simulations, seed)
    baselines.check_new(out)
    require("attnhook drift", "analysis", "pyarrow")
    url, models, layers = cli_stores.readable(store), Counter[str](), Counter[tuple[int, ...]]()
    sink = SinkChoice(url, with_sink=with_sink)
    with progress("reading") as work:
        found = list(
            reading.means(
                url,
                model=model,
                since=moment("since", since),
                until=moment("until", until),
                rows=rows,
                models=models,
                layers=layers,
                choice=sink,
                progress=work.tell,
            )
        )
    if not mixed:
        _refuse_mixed(url, models, layers)
    with progress("calibrating") as work:
        baseline = baselines.fit(
            np.array(found).reshape(-1, fp.SIZE),
            model=next(iter(models)) if len(models) == 1 else "",
            rows=rows,
            layers=next(iter(layers)) if len(layers) == 1 else (),
            without_sink=bool(sink.out),
            settings=settings,
            progress=work.tell,
        )
    baselines.save(baseline, out)
    print(
        f"wrote {out}: {baseline.requests} requests, {len(baseline.whitening)} components, warning from "
        f"{baseline.warning:.1f}, alarm from {baseline.alarm:.1f}; {settings.false_alarm_rate:g} of runs of "
        f"{settings.horizon} requests without drift raise an alarm"
    )
    if not (sink.out or with_sink):
        cli_stores.tell_sink_is_in("baseline", url)
    if block == 1 and abs(baseline.autocorrelation) > max(_ALIKE, 4 / np.sqrt(baseline.requests)):
        Console(stderr=True).print(
            f"neighbouring requests are alike (correlation {baseline.autocorrelation:.2f}): the rate does not hold; "
            "fit with a --block of about as many requests as stay alike",
            style="yellow",
            soft_wrap=True,
        )


def _refuse_mixed(url: str, models: Counter[str], layers: Counter[tuple[int, ...]]) -> None:
    if len(models) > 1:
        found = ", ".join(f"{name!r} ({count} rows)" for name, count in models.most_common(5))
        raise OptionError(
            "model", f"{url} has rows of {len(models)} models: {found}; choose one with --model, or give --mixed"
        )
    if len(layers) > 1:
        raise OptionError(
            "mixed",
            f"{url} has rows of different layers, whose means cannot be compared: {show_layer_sets(layers)}; choose "
            "rows by time, or give --mixed",
        )


def _refuse_other_layers(url: str, found: Counter[tuple[int, ...]], known: baselines.Baseline) -> None:
    """Other layers are other numbers: an alarm would say that the capture changed, and not the attention."""
    if known.layers and any(layers and layers != known.layers for layers in found):
        raise OptionError(
            "baseline",
            f"{url} has rows of other layers than the baseline, which is of {list(known.layers)}: "
            f"{show_layer_sets(found)}; choose rows by time, or fit a baseline of these layers",
        )


def _refuse_other_sink(url: str, without_sink: bool | None, known: baselines.Baseline) -> None:
    if known.without_sink and without_sink is False:
        raise OptionError(
            "baseline",
            f"the baseline is without the attention sink, and {url} does not tell the rows' attention on position 0 "
            "(attnhook before 0.2): capture anew, or fit a baseline with --with-sink",
        )


def check(
    store: cli_options.Store,
    baseline: Annotated[Path, typer.Option(metavar="FILE", help="The file that drift fit made.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only this model's rows. Default: the baseline's model.")
    ] = None,
    since: _Since = None,
    until: _Until = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look through a store's requests in order; exit status 0 without an alarm, 1 with one."""
    from attnhook.analysis.drift import reading
    from attnhook.analysis.sink import SinkChoice

    require("attnhook drift", "analysis", "pyarrow")
    url = cli_stores.readable(store)
    known = baselines.load(baseline)
    monitor, first, layers = DriftMonitor(known), None, Counter[tuple[int, ...]]()
    sink = SinkChoice(url, with_sink=not known.without_sink)
    with progress("looking") as work:
        for mean in reading.means(
            url,
            model=model or known.model or None,
            since=moment("since", since),
            until=moment("until", until),
            rows=known.rows,
            layers=layers,
            choice=sink,
            progress=work.tell,
        ):
            _refuse_other_layers(url, layers, known)
            _refuse_other_sink(url, sink.out, known)
            if monitor.add_request(mean) == "alarm" and first is None:
                first = monitor.status()
    status = monitor.status()
    if status.statistic is None:
        raise OptionError(
            "store",
            f"{url} has {status.requests} requests of {model or known.model or 'any model'} ({known.rows} rows); the "
            f"baseline's window needs {known.settings.window}: store more, or fit with a smaller --window",
        )
    if as_json:
        print(json.dumps({**status.to_dict(), "first_alarm": None if first is None else first.to_dict()}))
    else:
        print(f"{status.requests} requests: {status.alarms} alarms, {status.warnings} warnings")
        limits = f"warning {status.warning:.1f}, alarm {status.alarm:.1f}"
        print(f"at the end: {status.state}, {status.statistic:.1f} ({limits})")
        if first is not None:
            print(f"first alarm: at request {first.requests}, {first.statistic:.1f}")
        for name, mean_value, spreads in (first or status).moved:
            print(f"  {name}: {mean_value:.4f}, {spreads:+.2f} standard deviations of requests from the baseline")
    if status.alarms:
        raise typer.Exit(1)
