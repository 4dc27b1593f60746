"""The answer of ``attnhook run`` in a terminal: coloured by zone, with the most-attended tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnhook import fingerprint
from attnhook.analysis import zones

if TYPE_CHECKING:
    from attnhook.backends.transformers.runner import Answer
    from attnhook.records import TokenRecord

_SHOWN = 4  # attended tokens per row of the table
_BAR = 40  # columns of the zone bar


def show(answer: Answer, console: Console) -> None:
    """Print the coloured answer, its legend, the table of attended tokens and the zone shares."""
    records = [record for record in answer.records if not record.is_prompt]
    names = [zones.classify(record.fingerprint) for record in records]
    console.print()
    console.print(_coloured(answer, records, [zone.name for zone in names]))
    console.print()
    if records:
        console.print(_table(answer, records, names, console.width))
        console.print(_shares([zone.name for zone in names]))
    for reason, count in answer.dropped.items():
        console.print(f"[yellow]{count} rows dropped: {reason}[/yellow]")


def visible(token: str) -> str:
    """A token's text with its white space made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def _coloured(answer: Answer, records: list[TokenRecord], names: list[str]) -> Text:
    zone_of = {record.query_position + 1: name for record, name in zip(records, names, strict=True)}
    text = Text()
    for position in range(answer.prompt_length, len(answer.tokens)):
        name = zone_of.get(position)
        text.append(answer.tokens[position], style=zones.COLOURS[name] if name else "dim")
    return text


def _table(answer: Answer, records: list[TokenRecord], names: list[zones.Zone], width: int) -> Table:
    layer = records[0].layers[-1]
    table = Table(title=f"where each token looked, layer {layer}", title_justify="left", box=None, pad_edge=False)
    table.add_column("pos", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    table.add_column("zone", no_wrap=True)
    table.add_column("entropy", justify="right")
    table.add_column("mass", justify="right")
    table.add_column("attends to (position, probability)", no_wrap=True, overflow="ellipsis")
    for record, zone in zip(records, names, strict=True):
        position = record.query_position + 1
        attended = Text()
        for target, score in record.top()[:_SHOWN]:
            # position 0 is the usual attention sink: true, but seldom what one looks for
            style = "dim" if target == 0 else ""
            attended.append(f"{visible(answer.tokens[target])}", style=style or "bold")
            attended.append(f" {target} {score:.3f}   ", style="dim")
        row = record.layers.index(layer)
        table.add_row(
            str(position),
            visible(answer.tokens[position]) if position < len(answer.tokens) else "",
            Text(f"{zone.name} {zone.confidence:.0%}", style=zones.COLOURS[zone.name]),
            f"{record.fingerprints[row][fingerprint.ENTROPY]:.2f}",
            f"{record.topk_mass[row]:.2f}",
            attended,
        )
    return table


def _shares(names: list[str]) -> Text:
    text = Text("\nzones  ")
    counts = {name: names.count(name) for name in zones.ZONE_NAMES}
    for name, count in counts.items():
        text.append("█" * round(_BAR * count / len(names)), style=zones.COLOURS[name])
    for name, count in counts.items():
        if count:
            text.append(f"\n  ■ {name:<17}", style=zones.COLOURS[name])
            text.append(f"{count / len(names):>4.0%}  {zones.MEANINGS[name]}")
    return text
