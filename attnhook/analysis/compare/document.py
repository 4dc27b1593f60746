"""A report as blocks, written as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
tr.strong td { font-weight: 600; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
li { margin: 0.3rem 0; } code { background: #f2f2f2; padding: 0.1rem 0.25rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 or 2."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of plain texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of plain texts; those in ``strong`` (their numbers) stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A drawing: ``name`` is its file's beside the Markdown, ``svg`` the text of the image."""

    name: str
    caption: str
    svg: str


Block = Heading | Paragraph | Items | Table | Figure


def to_markdown(blocks: Sequence[Block]) -> str:
    """The report in GitHub's Markdown; figures are links to files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The report as a page without scripts, links or outside parts."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        # a figure's SVG has style attributes of its own
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(text)}" for text in block.texts)
    if isinstance(block, Figure):
        return f"![{_plain(block.caption)}]({block.name})"
    rule = ["---", *["---:"] * (len(block.header) - 1)]
    lines = [block.header, rule]
    for number, row in enumerate(block.rows):
        cells = [_plain(cell).replace("|", "\\|") for cell in row]
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if number in block.strong else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_escaped(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_escaped(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_escaped(text)}</li>" for text in block.texts) + "</ul>"
    if isinstance(block, Figure):
        drawing = block.svg[block.svg.index("<svg") :]  # without the XML declaration
        return f"<figure role='img' aria-label='{_escaped(block.caption)}'>{drawing}</figure>"
    head = "".join(f"<th>{_escaped(cell)}</th>" for cell in block.header)
    rows = [
        f"<tr{' class=strong' if number in block.strong else ''}>"
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(block.rows)
    ]
    return f"<div class=table><table><tr>{head}</tr>\n" + "\n".join(rows) + "</table></div>"


def _plain(text: str) -> str:
    """Text in which Markdown finds neither HTML nor a line break; names of models and stores are not ours."""
    return html.escape(" ".join(text.split()), quote=False)


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())
