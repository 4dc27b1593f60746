"""The answer of ``attnhook run`` in a terminal: coloured by zone, with the most-attended tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnhook.record import fingerprint, zones

if TYPE_CHECKING:
    from attnhook.record.answer import Answer
    from attnhook.record.key_mass import KeyMass
    from attnhook.record.token_record import TokenRecord

_POSITION, _ZONE, _NUMBER = 4, 16, 7  # columns of the table
_WIDE = 110  # columns from which the numbers fit too
_NARROW = 56  # columns below which the zone is told by colour alone
_LEAST = 8  # columns that the attended tokens get in any case
_TOKEN = 12  # columns of a token's text
_SHOWN = 4  # attended tokens per row of the table
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # escape sequences are not the model's to send
_BAR = 40  # columns of the zone bar
_KEYS = 10  # tokens that got most attention


def show(answer: Answer, console: Console) -> None:
    """Print the coloured answer, its legend, the table of attended tokens and the zone shares."""
    rows = [(r, z) for r, z in zip(answer.records, answer.zones, strict=True) if not r.is_prompt]
    console.print()
    console.print(_coloured(answer, rows))
    console.print()
    if rows:
        console.print(_table(answer, rows, console.width))
        _show_shares([zone.name for _, zone in rows], console)
    if answer.key_mass:
        _show_most_attended(answer, answer.key_mass, console)
    for reason, count in answer.dropped.items():
        console.print(f"[yellow]{count} rows dropped: {reason}[/yellow]")


def _show_most_attended(answer: Answer, mass: KeyMass, console: Console) -> None:
    """The tokens that got most attention from all captured rows, as a share of it, mean over the captured layers.

    Position 0, the usual attention sink, is told in the title: beside it no other bar would be seen.
    """
    whole = np.mean([own if own.ndim == 1 else own.mean(axis=0) for own in mass.values()], axis=0) / mass.rows
    whole = np.nan_to_num(whole)  # what lies below mask_prefix is not told
    layers = f"{len(mass)} layers" if len(mass) > 1 else "1 layer"
    title = f"\nwho got the attention of {mass.rows} rows, {layers} (position 0: {whole[0]:.3f})"
    console.print(title, style="italic", highlight=False)
    table = Table.grid(padding=(0, 2))
    width = console.width
    bar = max(min(_BAR, width - _POSITION - _TOKEN - _NUMBER - 6), 1)
    most = max(float(whole[1:].max(initial=0)), 1e-9)
    for position in (1 + np.argsort(-whole[1:], kind="stable")[:_KEYS]).tolist():
        share = float(whole[position])
        table.add_row(
            Text(str(position), style="dim"),
            Text(visible(answer.tokens[position])[:_TOKEN], style="bold"),
            f"{share:.3f}",
            "█" * round(bar * share / most),
        )
    console.print(table)


def visible(token: str) -> str:
    """A token's text with its white space made visible."""
    return _CONTROL.sub("�", token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")) or "∅"


def _coloured(answer: Answer, rows: list[tuple[TokenRecord, zones.Zone]]) -> Text:
    zone_of = {record.query_position + 1: zone.name for record, zone in rows}
    text = Text()
    for position in range(answer.prompt_length, len(answer.tokens)):
        name = zone_of.get(position)
        text.append(_CONTROL.sub("�", answer.tokens[position]), style=zones.COLOURS[name] if name else "dim")
    return text


def _table(answer: Answer, rows: list[tuple[TokenRecord, zones.Zone]], width: int) -> Table:
    layer = rows[0][0].layers[-1]
    wide, narrow = width >= _WIDE, width < _NARROW
    table = Table(title=f"where each token looked (layer {layer})", title_justify="left", box=None, pad_edge=False)
    table.add_column("pos", justify="right", style="dim", no_wrap=True, min_width=_POSITION)
    table.add_column("token", no_wrap=True, min_width=_TOKEN)
    if not narrow:
        table.add_column("zone", no_wrap=True, min_width=_ZONE)
    if wide:
        table.add_column("entropy", justify="right", no_wrap=True, min_width=_NUMBER)
        table.add_column("mass", justify="right", no_wrap=True, min_width=_NUMBER)
    taken = (_POSITION, _TOKEN, *(() if narrow else (_ZONE,)), *((_NUMBER, _NUMBER) if wide else ()))
    room = max(width - sum(columns + 2 for columns in taken), _LEAST)
    table.add_column("looked at (position, probability)"[:room], no_wrap=True, max_width=room)
    for record, zone in rows:
        position, row = record.query_position + 1, record.layers.index(layer)
        numbers = [f"{record.fingerprints[row][fingerprint.ENTROPY]:.2f}", f"{record.topk_mass[row]:.2f}"]
        table.add_row(
            str(position),
            Text(visible(answer.tokens[position])[:_TOKEN], style=zones.COLOURS[zone.name] if narrow else ""),
            *(() if narrow else (Text(zone.name, style=zones.COLOURS[zone.name]),)),
            *(numbers if wide else ()),
            _attended(answer, record, room),
        )
    return table


def _attended(answer: Answer, record: TokenRecord, room: int) -> Text:
    """The most-attended tokens, as many as ``room`` columns hold."""
    text = Text()
    # position 0 is the usual attention sink: true, but seldom what one looks for, so it comes last
    for target, score in sorted(record.top()[:_SHOWN], key=lambda pair: pair[0] == 0):
        token, numbers = visible(answer.tokens[target])[:_TOKEN], f" {target} {score:.3f}"
        if text and cell_len(text.plain) + cell_len(token) + len(numbers) + 2 > room:
            break
        text.append(("  " if text else "") + token, style="dim" if target == 0 else "bold")
        text.append(numbers, style="dim")
    return text


def _show_shares(names: list[str], console: Console) -> None:
    counts = {name: names.count(name) for name in zones.ZONE_NAMES}
    console.print("\nzones of the answer's tokens, attention sink left out", style="italic", highlight=False)
    width, narrow = console.width, console.width < _NARROW
    bar = Text()
    for name, count in counts.items():
        bar.append("█" * round(min(_BAR, width) * count / len(names)), style=zones.COLOURS[name])
    bar.truncate(width)
    console.print(bar)
    grid = Table.grid(padding=(0, 1))
    for name, count in counts.items():
        if count:
            label = Text(f"■ {name}", style=zones.COLOURS[name])
            share = f"{count / len(names):>4.0%}"
            grid.add_row(label, share, *(() if narrow else (zones.MEANINGS[name],)))
    console.print(grid)
