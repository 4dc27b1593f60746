"""One request's attention as one HTML file: no server, no network, nothing to install to read it.

The page is `report/template.html` with its style sheet, its scripts and the data inlined. The data are
a JSON block (tokens, zones, names) and, per captured layer, base64 of little-endian unsigned integers:

- ``positions-i``: uint16 ``[rows, k]`` (uint32 where a position would not fit), all ones where a row has
  fewer than k entries; i counts the captured layers;
- ``scores-i``: uint16 ``[rows, k]``;
- ``fingerprints-i``: uint16 ``[rows, 20]``;
- ``spans-i``: uint16 ``[rows, spans]``, only where the records have named spans.

A number v in [0, 1] is stored as ``round(65535 * sqrt(v))``: within 1.6e-5 of v everywhere, and within
0.16% of v down to 1e-4, where a linear scale would already be 8% off.
"""

from __future__ import annotations

import base64
import html
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from attnhook.errors import AttnhookError, OptionError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord
from attnhook.system.inline import policy_hash, script_json

_SCALE = 65535
_SCRIPTS = ("data.js", "words.js", "panel.js", "map.js", "report.js")  # each uses those before it


@dataclass(frozen=True)
class Report:
    """What one page shows: the tokens of one request and choice, and the records captured for it.

    A record at query position p belongs to the token at p + 1, which was chosen from that row.
    """

    title: str  # for example "SmolLM2-135M-Instruct"
    subtitle: str  # engine, versions, date, command
    tokens: Sequence[str]  # decoded text of every position, prompt and answer together
    prompt_length: int  # positions below are prompt
    records: Sequence[TokenRecord]  # prompt rows optional; all with the same layers
    zones: Sequence[str]  # zone name of each record, in the same order
    zone_confidence: Sequence[float]  # in [0, 1], in the same order
    zone_legend: Mapping[str, tuple[str, str]]  # zone -> (CSS colour, one-sentence meaning)


def render(report: Report) -> str:
    """The report as one self-contained HTML page.

    Raises OptionError, with the field's name, where the parts of ``report`` do not fit together.
    """
    _check(report)
    order = np.argsort([record.query_position for record in report.records], kind="stable").tolist()
    records = [report.records[i] for i in order]
    layers = records[0].layers if records else ()
    spans = records[0].span_names if records else ()
    positions, scores = _entries(records, len(layers))
    legend = list(report.zone_legend)
    local, mid, _ = fp.masses(np.eye(fp.BINS))

    meta = {
        "tokens": list(report.tokens),
        "promptLength": report.prompt_length,
        "layers": layers,
        "k": positions.shape[2],
        "positionBytes": positions.itemsize,
        "rows": [record.query_position for record in records],
        "prompt": [int(record.is_prompt) for record in records],
        "steps": [record.decode_step for record in records],
        "think": [int(record.think_phase == "think") for record in records],
        "zones": [legend.index(report.zones[i]) for i in order],
        "confidence": [round(float(report.zone_confidence[i]), 4) for i in order],
        "legend": [
            {"name": name, "colour": colour, "meaning": meaning}
            for name, (colour, meaning) in report.zone_legend.items()
        ],
        "spans": spans,
        "fingerprint": {"size": fp.SIZE, "entropy": fp.ENTROPY, "histogram": fp.HISTOGRAM.start},
        "masses": {"local": fp.LOCAL, "mid": fp.MID, "long": fp.LONG},
        "bins": [
            {"label": fp.bin_label(i), "mass": "local" if local[i] else "mid" if mid[i] else "long"}
            for i in range(fp.BINS)
        ],
    }
    blocks = []
    for i in range(len(layers)):
        blocks += [_block(f"positions-{i}", positions[i]), _block(f"scores-{i}", _quantise(scores[i]))]
        blocks += [_block(f"fingerprints-{i}", _quantise(np.stack([r.fingerprints[i] for r in records])))]
        if spans:
            blocks += [_block(f"spans-{i}", _quantise(np.stack([r.span_mass[i] for r in records])))]

    style, script = _asset("report.css"), "".join(map(_asset, _SCRIPTS))
    return Template(_asset("template.html")).substitute(
        title=_text(report.title),
        subtitle=_text(report.subtitle),
        style=style,
        style_hash=policy_hash(style),
        script=script,
        script_hash=policy_hash(script),
        meta=script_json(meta),
        blocks="\n".join(blocks),
    )


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page to ``path``, whole or not at all; a file that is there is replaced.

    Raises AttnhookError where the file system refuses.
    """
    page = render(report).encode()
    target = Path(path)
    try:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a file name
        raise AttnhookError(
            f"the report cannot be written to {str(target)!r}: {getattr(error, 'strerror', None) or error}. "
            f"Name a file in an existing folder that you may write to, on a disk with {len(page):,} free bytes."
        ) from error


def _check(report: Report) -> None:
    count = len(report.records)
    for field in ("zones", "zone_confidence"):
        given = len(getattr(report, field))
        if given != count:
            raise OptionError(field, f"{field} has {given} entries for {count} records; give one for each record")
    unsure = [value for value in report.zone_confidence if not 0.0 <= value <= 1.0]
    if unsure:
        raise OptionError("zone_confidence", f"zone_confidence holds {unsure[0]}; give numbers in 0..1")
    if not 0 <= report.prompt_length <= len(report.tokens):
        raise OptionError(
            "prompt_length", f"prompt_length is {report.prompt_length}; it must lie in 0..{len(report.tokens)} (tokens)"
        )
    missing = sorted(set(report.zones) - set(report.zone_legend))
    if missing:
        raise OptionError("zone_legend", f"zone_legend lacks {missing}; it has {sorted(report.zone_legend)}: add them")
    seen: set[int] = set()
    for record in report.records:
        first, at = report.records[0], record.query_position
        if not 0 <= at < len(report.tokens):
            raise OptionError(
                "records", f"a record has query position {at}, but there are {len(report.tokens)} tokens; give them all"
            )
        if at in seen:
            raise OptionError("records", f"two records have query position {at}; give one request and one choice")
        seen.add(at)
        if (record.layers, record.span_names) != (first.layers, first.span_names):
            raise OptionError(
                "records",
                f"the record at query position {at} has layers {list(record.layers)} and spans "
                f"{list(record.span_names)}, the first one {list(first.layers)} and {list(first.span_names)}; "
                "give the records of one request",
            )


def _entries(records: Sequence[TokenRecord], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, uint16 or uint32 ``[L, rows, k]``, all ones where there is none, and scores, float32."""
    k = max((record.token_positions.shape[1] for record in records), default=0)
    top = max((int(record.token_positions.max(initial=0)) for record in records), default=0)
    dtype = np.dtype("<u2" if top < _SCALE else "<u4")
    positions = np.full((layers, len(records), k), np.iinfo(dtype).max, dtype)
    scores = np.zeros((layers, len(records), k), np.float32)
    for row, record in enumerate(records):
        width = record.token_positions.shape[1]
        # -1, a missing entry, wraps to all ones
        positions[:, row, :width] = record.token_positions.astype(dtype)
        scores[:, row, :width] = record.attention_scores
    return positions, scores


def _quantise(values: np.ndarray) -> np.ndarray:
    stored: np.ndarray = np.rint(np.sqrt(np.clip(values, 0.0, 1.0)) * _SCALE).astype("<u2")
    return stored


def _block(name: str, array: np.ndarray) -> str:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return f'<script type="application/octet-stream" id="{name}">{data}</script>'


def _text(value: str) -> str:
    return html.escape(value.encode("utf-8", "replace").decode())


def _asset(name: str) -> str:
    return (resources.files("attnhook.explorer") / "report" / name).read_text(encoding="utf-8")
