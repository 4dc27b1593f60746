"""``attnhook session``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnhook.analysis.session import Session, measure
from attnhook.cli import options as cli_options
from attnhook.cli import stores as cli_stores
from attnhook.errors import OptionError
from attnhook.record import zones
from attnhook.record.token_record import TokenRecord
from attnhook.store import open_store
from attnhook.store.base import Store

_SPARKS = "▁▂▃▄▅▆▇█"
_HUBS_SHOWN = 5
_IDS_SHOWN, _LOOKED_AT = 4, 100_000  # request ids that an error names, and rows in which they are looked for


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("session")(session)


def session(
    store: cli_options.Store,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST", help="The request, as the records name it.")],
    choice: Annotated[int, typer.Option(metavar="N", help="Which of the request's answers.")] = 0,
    prompt: Annotated[bool, typer.Option("--prompt", help="The prompt's rows too, where the store has them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Hubs, agreement of the layers, and entropy and zone of each token of one request."""
    store = cli_stores.readable(store)
    with open_store(store) as opened:
        records = list(opened.records(request_id=request_id))
        if not records:
            raise OptionError("request_id", _no_records(opened, store, request_id))
    records = _chosen(records, request_id, choice, prompt)
    found = measure(records)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    show(found, Console())


def show(found: Session, console: Console) -> None:
    """Print the metrics, the zones' shares and the timeline of a session."""
    grid = Table.grid(padding=(0, 2))
    grid.title, grid.title_justify = escape(f"{found.request_id}, choice {found.choice}"), "left"
    hubs = "  ".join(f"{position} ({share:.0%})" for position, share in found.hubs[:_HUBS_SHOWN])
    for name, value, meaning in (
        ("model", escape(found.model or "-"), f"layers {', '.join(map(str, found.layers))}"),
        ("rows", str(len(found.moments)), f"over {found.visible} key positions"),
        ("top-k mass", _number(found.coverage), "of a row's attention is in the stored positions"),
        ("hubness", _number(found.hubness), "Gini of the attended positions: 0 even, 1 one hub"),
        ("  without sink", _number(found.hubness_without_sink), "the same without position 0"),
        ("hubs", hubs, "position (share of the stored attention)"),
        ("consensus", _number(found.consensus), "weighted Jaccard of the layers: 0 disjoint, 1 equal"),
        ("  without sink", _number(found.consensus_without_sink), "the same without position 0"),
    ):
        grid.add_row(name, value, Text(meaning, style="dim"))
    console.print(grid)
    console.print(_timeline(found, console.width))


def _no_records(opened: Store, store: str, request_id: str) -> str:
    """Why there is nothing to show, with some of the requests that there are."""
    ids: dict[str, None] = {}
    for batch in opened.fingerprints(columns=("request_id",), limit=_LOOKED_AT):
        ids.update(dict.fromkeys(batch.column("request_id").to_pylist()))
        if len(ids) > _IDS_SHOWN:
            break
    if not ids:
        return f"{store} is empty: nothing has been written to it yet"
    some = ", ".join(map(repr, list(ids)[:_IDS_SHOWN])) + (" and others" if len(ids) > _IDS_SHOWN else "")
    return f"{store} has no records of request {request_id!r}, but of {some}: name one exactly (hash_ids=1 hashes them)"


def _chosen(records: list[TokenRecord], request_id: str, choice: int, prompt: bool) -> list[TokenRecord]:
    choices = sorted({record.choice for record in records})
    if choice not in choices:
        raise OptionError("choice", f"request {request_id!r} has no choice {choice}; it has {choices}")
    chosen = [record for record in records if record.choice == choice and (prompt or not record.is_prompt)]
    if not chosen:
        raise OptionError("prompt", f"choice {choice} of {request_id!r} has prompt rows only: add --prompt")
    # sinks that cannot drop repeats may hold a row twice; equal keys are the same row
    return list({record.key: record for record in chosen}.values())


def _timeline(found: Session, width: int) -> Text:
    where = "attention sink left out" if found.sink_left_out else "attention sink included: capture the span sink=(0,1)"
    text = Text(f"\nzone and entropy of each row ({where})\n")
    for start in range(0, len(found.moments), max(20, width - 8)):
        part = found.moments[start : start + max(20, width - 8)]
        text.append(f"{part[0].query_position:>6}  ", style="dim")
        for moment in part:
            level = min(int(moment.entropy * len(_SPARKS)), len(_SPARKS) - 1)
            text.append(_SPARKS[level], style=zones.COLOURS[moment.zone])
        text.append("\n")
    for name, share in found.zone_shares.items():
        if share:
            text.append(f"■ {name:<17}", style=zones.COLOURS[name])
            text.append(f"{share:>4.0%}  {zones.MEANINGS[name]}\n")
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
