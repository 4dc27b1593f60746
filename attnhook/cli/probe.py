"""``attnhook probe``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnhook import __version__
from attnhook.analysis import probes
from attnhook.cli import options as cli_options
from attnhook.cli import stores as cli_stores
from attnhook.cli.progress import progress
from attnhook.errors import AttnhookError, OptionError, PluginError
from attnhook.options import CaptureOptions, RequestOptions, parse_layers
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.probing import journal as journals
from attnhook.probing import repeats
from attnhook.probing.run import Tally, run
from attnhook.probing.targets import LocalTarget, ServerTarget, Target, check_concurrency
from attnhook.sinks import config
from attnhook.sinks.opening import open_sink

_SKIPS_SHOWN = 3


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("probe")(probe)


def probe(
    model: cli_options.Model = None,
    url: cli_options.Url = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Where the records go: x.jsonl, x.db, a Parquet folder, or sqlite:x."),
    ] = None,
    packs: Annotated[
        str | None, typer.Option(metavar="PACKS", help="Packs to run, such as brackets,chat. Default: all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="At most so many probes of each pack.")] = None,
    layers: cli_options.Layers = "auto",
    top_k: cli_options.TopK = 8,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", help="Most tokens to generate for each probe.")
    ] = 16,
    prompt_rows: Annotated[bool, typer.Option("--prompt-rows", help="Capture the prompts' tokens too.")] = False,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Requests at once, with --url. Default: 4.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was ended early.")] = False,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the run is recorded. Default: beside the output, with .probes added."),
    ] = None,
    dtype: cli_options.Dtype = "auto",
    device: cli_options.Device = None,
    api_key: cli_options.ApiKey = None,
    attention_key: cli_options.AttentionKey = None,
    list_: Annotated[bool, typer.Option("--list", help="Print a table of the packs and end.")] = False,
) -> None:
    """Run prompts that excite known kinds of attention, and store the records of each.

    A record's request id is probe/<pack>/<id>. Nothing is run twice: --resume goes on where a run ended.
    """
    chosen = probes.select(None if packs is None else _names(packs), limit)
    if list_:
        Console().print(_table())
        return
    if out is None:
        raise OptionError("out", "--out is missing: name a store for the records, such as --out probes.db")
    options: dict[str, Any] = {"layers": parse_layers("--layers", layers), "top_k": top_k, "prompt": prompt_rows}
    wanted = CaptureOptions.resolve(options, plugins=plugins.variables).request  # before anything heavy is loaded
    if new_tokens < 1:
        raise OptionError("new_tokens", f"--new-tokens {new_tokens} must be at least 1")
    cli_options.check_place(
        url,
        here={"dtype": dtype, "device": device},
        there={"api-key": api_key, "attention-key": attention_key, "concurrency": concurrency},
    )
    if concurrency is not None:
        check_concurrency(concurrency)
    out = _store(out)
    path = journals.place(out, state)
    going_on = resume and path.exists()
    if not going_on:
        journals.check_new(out, path)

    if url is None:
        target = _model(model, dtype, device, wanted, new_tokens)
    else:
        target = ServerTarget(url, model, concurrency=concurrency or 4, api_key=api_key, attention_key=attention_key)
    identity = {
        "attnhook": __version__,
        "probes": probes.digest(),
        **target.identity,
        "options": {**options, "mode": "raw", "new_tokens": new_tokens},
    }
    with closing((journals.Journal.resume if going_on else journals.Journal.begin)(path, out, identity)) as journal:
        before = len(journal.done)
        tally = _into_store(out, chosen, target, journal, going_on, new_tokens, {**options, "mode": "raw"})
    console = Console()
    console.print(_summary(tally))
    if before:
        console.print(f"{before} probes were there already")
    _tell_skips(tally, console)
    console.print(f"wrote {out}, recorded in {path}", soft_wrap=True)


def _store(out: str) -> str:
    """The URL of ``--out``. Raises AttnhookError where it cannot take probes."""
    out = cli_stores.kept(out)
    if config.split(out)[1].get("tokens", "0").lower() in ("1", "true"):
        raise PluginError(f"--out {out}: tokens=1 has nothing to add: probes have no token ids; drop it")
    cli_stores.try_options(out)
    return out


def _model(model: str | None, dtype: str, device: str | None, wanted: RequestOptions, new_tokens: int) -> Target:
    """A model on this machine, looked at before it is loaded."""
    from attnhook.backends.transformers import model_files, runner

    runner.check_dtype(dtype)
    with progress(model_files.work(model), measured=False):
        model_files.limits(model).check(wanted.layers, wanted.heads, new_tokens)
        return LocalTarget(model, dtype, device)


def _into_store(
    out: str,
    chosen: list[probes.Probe],
    target: Target,
    journal: journals.Journal,
    going_on: bool,
    new_tokens: int,
    options: dict[str, Any],
) -> Tally:
    """Run what is left; a run that ends early says how far it is."""
    console = Console(stderr=True)
    with closing(_open(out, journal, going_on)) as sink:
        try:
            known = repeats.find(out, sink, journal.done) if going_on and journal.may_repeat else None
            if going_on and journal.may_repeat and known is None:
                console.print(
                    f"{out} cannot tell what it has: the records of one probe may be there twice, with the same keys",
                    soft_wrap=True,
                )
            return _run(chosen, target, sink, journal, known, new_tokens, options)
        except AttnhookError as error:
            raise AttnhookError(f"{error}; {_finished(chosen, journal)}") from error
        except KeyboardInterrupt:
            console.print(_finished(chosen, journal), soft_wrap=True)
            raise


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _run(
    chosen: list[probes.Probe],
    target: Target,
    sink: Sink,
    journal: journals.Journal,
    known: repeats.Repeats | None,
    new_tokens: int,
    options: dict[str, Any],
) -> Tally:
    left = [one for one in chosen if one.request_id not in journal.done]
    todo = {one.request_id for one in left}
    with progress("probing", sum(map(_work, left))) as bar:
        bar.tell(count=f"{len(chosen) - len(left)}/{len(chosen)} probes")

        def tell(one: probes.Probe, tally: Tally) -> None:
            if one.request_id in todo:  # what an earlier run did would spoil the estimate of the time left
                done = sum(tally.probes.values()) + len(tally.skipped)
                bar.tell(bar.done + _work(one), text=one.pack, count=f"{done}/{len(chosen)} probes")

        return run(chosen, target, sink, journal, new_tokens=new_tokens, options=options, repeats=known, progress=tell)


def _work(one: probes.Probe) -> int:
    """About how long a probe takes, in tokens: so that short and long ones give one estimate of the time left."""
    return 200 + (one.distance or 0)


def _open(out: str, journal: journals.Journal, going_on: bool) -> Sink:
    """The sink, ready to take up where the journal ends."""
    try:
        if going_on:
            journal.settle()
        sink = open_sink(out)
    except AttnhookError:
        if not going_on:
            journal.path.unlink(missing_ok=True)  # no run has begun
        raise
    return sink


def _finished(chosen: list[probes.Probe], journal: journals.Journal) -> str:
    done = sum(one.request_id in journal.done for one in chosen)
    return f"{done} of {len(chosen)} probes are finished, go on with --resume"


def _table() -> Table:
    table = Table(title="probe packs", title_justify="left", box=None, pad_edge=False)
    for name in ("pack", "behaviour", "zone"):
        table.add_column(name, no_wrap=True)
    table.add_column("probes", justify="right", no_wrap=True)
    table.add_column("purpose")
    for pack in probes.packs().values():
        table.add_row(pack.name, pack.behaviour, pack.zone or "-", str(len(pack.probes)), pack.purpose)
    table.add_row("all", "", "", str(len(probes.select())), "")
    return table


def _summary(tally: Tally) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("pack", no_wrap=True)
    for name in ("probes", "records", "right answers"):
        table.add_column(name, justify="right", no_wrap=True)
    for pack, count in tally.probes.items():
        asked = tally.asked[pack]
        table.add_row(pack, str(count), str(tally.records[pack]), f"{tally.right[pack]} of {asked}" if asked else "-")
    table.add_row("all", str(tally.probes.total()), str(tally.records.total()), "")
    return table


def _tell_skips(tally: Tally, console: Console) -> None:
    for number, (name, why) in enumerate(tally.skipped.items()):
        if number == _SKIPS_SHOWN:
            console.print(f"... and {len(tally.skipped) - _SKIPS_SHOWN} more skipped", style="yellow")
            break
        console.print(f"skipped {name}: {why}", style="yellow", soft_wrap=True, markup=False)
    for reason, count in tally.dropped.items():
        console.print(f"{count} rows dropped: {reason}", style="yellow", markup=False)
