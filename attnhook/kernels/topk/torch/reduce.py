"""From the attention of some rows to what a record keeps of them, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from attnhook.kernels.topk.types import Selection, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS


def empty_result(
    shape: tuple[int, int], selection: Selection, device: torch.device, dtype: torch.dtype = torch.float32
) -> TopK:
    """Results of ``shape``, (rows, query heads), before anything is computed: no positions, masses of 0."""
    out = selection.results(*shape, torch.zeros, dtype=dtype, device=device)
    out.positions.fill_(-1)
    out.head_positions.fill_(-1)
    return out


def of_head(out: TopK, head: int) -> TopK:
    """Where `reduce_block` puts one head's results; what is not wanted of it goes to memory that nobody reads."""
    rows = len(out.entropy)
    top, prints, spans = (x.shape[1] > 0 for x in (out.head_positions, out.head_histogram, out.head_span_mass))
    return out._replace(
        positions=out.head_positions[:, head] if top else out.positions[:, :0],
        scores=out.head_scores[:, head] if top else out.scores[:, :0],
        histogram=out.head_histogram[:, head] if prints else out.histogram.new_zeros(rows, BINS),
        entropy=out.head_entropy[:, head] if prints else torch.empty_like(out.entropy),
        span_mass=out.head_span_mass[:, head] if spans else torch.empty_like(out.span_mass),
    )


def reduce_block(
    attention: torch.Tensor,
    lead: int,
    first: int,
    position: int,
    firsts: list[int],
    out: TopK,
    *,
    normalise: bool,
    spans: list[list[int]] | tuple[()],
    report_from: int,
) -> None:
    """Fill ``out`` for one block of rows from their attention ``[R, lead + N]``."""
    rows, width = attention.shape
    count = width - lead
    a = attention[:, lead:]
    # Row r holds distance d at column position + r - first - d, so rows shifted by one column each line
    # the distances up: by_distance[r, u] is the key at distance count - 1 - u.
    by_distance = attention.as_strided((rows, count), (width + 1, 1), attention.storage_offset())
    for i, start in enumerate(BIN_STARTS):
        if start >= count:
            break
        end = min(BIN_STARTS[i + 1], count) if i + 1 < BINS else count
        torch.sum(by_distance[:, count - end : count - start], dim=-1, out=out.histogram[:, i])
    for n, (start, end) in enumerate(spans):
        low, high = max(start - first, 0), min(end - first, count)
        if low < high:
            torch.sum(a[:, low:high], dim=-1, out=out.span_mass[:, n])

    logs = torch.clamp(a, min=torch.finfo(a.dtype).tiny).log_()
    entropy = -torch.linalg.vecdot(a, logs)
    if normalise:  # H(a / S) = H(a) / S + ln S
        total = out.histogram.sum(-1)
        # a sink that takes everything leaves no distribution to speak of: entropy 0
        entropy = torch.where(total == 0, 0.0, entropy / total + total.log())
    visible = [position + r + 1 - f for r, f in enumerate(firsts)]
    most = [math.log(n) if n > 1 else 1.0 for n in visible]
    torch.div(entropy, torch.tensor(most, dtype=a.dtype, device=a.device), out=out.entropy)
    if 1 in visible:  # 0 by definition; NaN and infinity stay
        single = torch.tensor([n == 1 for n in visible], device=a.device)
        out.entropy.masked_fill_(single & torch.isfinite(out.entropy), 0.0)
    if out.scores.shape[1]:
        _select(a, first, position, firsts, report_from, out)


def _select(a: torch.Tensor, first: int, position: int, firsts: list[int], report_from: int, out: TopK) -> None:
    """Exact top k of each row of ``a``, ties to the lower position."""
    count = a.shape[1]
    if report_from > first:
        a[:, : report_from - first] = -1.0

    def hidden(rows: torch.Tensor) -> torch.Tensor:
        s = torch.arange(first, first + count, device=a.device)
        return (s > (position + rows)[:, None]) | (s < torch.tensor(firsts, device=a.device)[rows][:, None])

    select(a, hidden, first, out)


def select(a: torch.Tensor, hidden: Callable[[torch.Tensor], torch.Tensor], first: int, out: TopK) -> None:
    """Exact top k of each row of ``a`` [R, N] with keys from position ``first``, ties to the lower position.

    Keys that are not reported hold -1; hidden ones 0, and ``hidden`` [rows, N] tells them for some rows.
    """
    top_k = out.scores.shape[1]
    k = min(top_k + 1, a.shape[1])  # one more than asked shows a tie across the cut
    values, columns = torch.topk(a, k, dim=-1)
    # hidden keys hold 0, so they matter only where a row's best k reach down to 0
    doubtful = (values[:, 1:] == values[:, :-1]).any(-1) | (values[:, -1] <= 0)
    if bool(doubtful.any()):
        rows = torch.nonzero(doubtful)[:, 0]
        ordered = torch.sort(a[rows].masked_fill_(hidden(rows), -1.0), dim=-1, descending=True, stable=True)
        values[rows], columns[rows] = ordered.values[:, :k], ordered.indices[:, :k]
    k = min(k, top_k)
    values, columns = values[:, :k], columns[:, :k]
    reported = values >= 0
    out.scores[:, :k] = torch.where(reported, values, 0.0)
    out.positions[:, :k] = torch.where(reported, columns + first, -1)
