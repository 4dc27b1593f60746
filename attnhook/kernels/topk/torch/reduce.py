"""From the attention of some rows to what a record keeps of them, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from attnhook.kernels.topk.types import Selection, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS


def empty_result(rows: int, selection: Selection, device: torch.device, dtype: torch.dtype = torch.float32) -> TopK:
    """Results of rows before anything is computed: no positions, masses of 0."""
    top_k = selection.top_k
    return TopK(
        torch.full((rows, top_k), -1, dtype=torch.int32, device=device),
        torch.zeros((rows, top_k), dtype=dtype, device=device),
        torch.zeros((rows, BINS), dtype=dtype, device=device),
        torch.zeros((rows,), dtype=dtype, device=device),
        torch.zeros((rows, selection.span_count), dtype=dtype, device=device),
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
