"""Top-k attention as vectorised torch: the path for devices without Triton, and for CPUs without numba.

Rows of one request at consecutive positions (a prompt, or one decode row) are computed together. The only
scratch is the logits of a block of rows, their probabilities and their mean, each at most
`_SCRATCH_ELEMENTS` floats unless one row needs more, so memory never grows with rows x keys.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from attnhook.kernels.topk.types import PagedKeys, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS

_SCRATCH_ELEMENTS = 3 << 18  # logits per block of rows: 3 MiB, about a core's cache
_KEY_BLOCK = 4096  # keys converted to float32 at once when the cache holds another dtype


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}


_scratch = _Scratch()


def topk_attention(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    top_k: int,
    scale: float,
    softcap: float = 0.0,
    window: int | torch.Tensor = -1,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    first_reported: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`."""
    out = empty_result(q.shape[0], top_k, 0 if spans is None else spans.shape[1], q.device, _result_type(q))
    span_list = None if spans is None else spans.tolist()
    report_from = None if first_reported is None else first_reported.tolist()
    for block in _blocks(
        q, keys, row_request, row_position, scale=scale, softcap=softcap, window=window, sinks=sinks,
        alibi_slopes=alibi_slopes, head_mask=head_mask,
    ):  # fmt: skip
        _reduce(
            block.attention, block.lead, block.first, block.position, block.firsts, TopK(*(x[block.rows] for x in out)),
            normalise=sinks is not None,
            spans=() if span_list is None else span_list[block.request],
            report_from=0 if report_from is None else report_from[block.request],
        )  # fmt: skip
    return out


def attention_rows(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    width: int,
    lse: torch.Tensor | None = None,
    **softmax: Any,
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`."""
    dense = torch.zeros((q.shape[0], width), dtype=_result_type(q), device=q.device)
    for block in _blocks(q, keys, row_request, row_position, **softmax):
        seen = block.attention[:, block.lead :]
        dense[block.rows, block.first : block.first + seen.shape[1]] = seen
    return dense


def _result_type(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Block(NamedTuple):
    """Rows of one request at consecutive positions, and their attention in scratch."""

    rows: slice
    request: int
    position: int  # of the first row
    first: int  # lowest key position
    firsts: list[int]  # lowest key position that each row sees
    attention: torch.Tensor  # [R, lead + keys]; hidden keys hold 0
    lead: int


def _blocks(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int | torch.Tensor = -1,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
) -> Iterator[_Block]:
    rows, heads, head_dim = q.shape
    requests, positions = row_request.tolist(), row_position.tolist()
    widths = window.tolist() if isinstance(window, torch.Tensor) else [window] * rows
    firsts = [0 if w < 0 else max(0, p - w + 1) for p, w in zip(positions, widths, strict=True)]
    masks = None if head_mask is None else head_mask.expand(keys.page_table.shape[0], heads)
    view = keys.pages(head_dim)
    scaled = queries(q, keys, scale, _result_type(q))

    for start, stop in runs(requests, positions):
        request = requests[start]
        low, high = min(firsts[start:stop]), positions[stop - 1]
        k = gather(view, keys, request, low, high + 1)
        mask = None if masks is None else masks[request].bool()
        suspect = _may_hold_infinity(q[start:stop], k)
        end = start
        while end < stop:
            t, end = end, min(end + block_rows(positions[end] + 1 - firsts[end], heads, _SCRATCH_ELEMENTS), stop)
            first = min(firsts[t:end])
            attention, lead = _attention(
                scaled[t:end].transpose(0, 1), k[first - low : positions[end - 1] + 1 - low],
                positions[t], first, firsts[t:end],
                softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, mask=mask, suspect=suspect,
            )  # fmt: skip
            yield _Block(slice(t, end), request, positions[t], first, firsts[t:end], attention, lead)


def empty_result(rows: int, top_k: int, spans: int, device: torch.device, dtype: torch.dtype = torch.float32) -> TopK:
    """Results of rows before anything is computed: no positions, masses of 0."""
    return TopK(
        torch.full((rows, top_k), -1, dtype=torch.int32, device=device),
        torch.zeros((rows, top_k), dtype=dtype, device=device),
        torch.zeros((rows, BINS), dtype=dtype, device=device),
        torch.zeros((rows,), dtype=dtype, device=device),
        torch.zeros((rows, spans), dtype=dtype, device=device),
    )


def queries(q: torch.Tensor, keys: PagedKeys, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """q ``[T, Hq, D]`` times the scale and the keys' own scales."""
    scaled = q.to(dtype) * scale
    if keys.k_scale is None:
        return scaled
    factor = torch.as_tensor(keys.k_scale, dtype=dtype, device=q.device)
    per_head = factor.expand(keys.num_kv_heads).repeat_interleave(q.shape[1] // keys.num_kv_heads)
    return scaled * per_head[:, None]


def _product_type(dtype: torch.dtype) -> torch.dtype:
    """The type to multiply matrices in: a process that allows TF32 or bfloat16 products means its own, not ours."""
    return dtype if torch.get_float32_matmul_precision() == "highest" else torch.float64


def block_rows(keys: int, heads: int, elements: int) -> int:
    """Rows R to compute together, the first of which sees ``keys``: heads * R * (R + keys) <= elements."""
    return max(1, int((math.sqrt(keys * keys + 4 * elements / heads) - keys) / 2))


def _may_hold_infinity(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the logits need a look of their own: where they are few, or q or k is not finite somewhere.

    NaN and +inf show in the probabilities; -inf and what a soft-cap flattens do not.
    """
    if q.shape[0] * q.shape[1] <= k.shape[1] * k.shape[2]:
        return True
    total = q.sum(dtype=torch.float32) + k.to(torch.float32).sum()
    return not bool(torch.isfinite(total))


def runs(requests: list[int], positions: list[int]) -> Iterator[tuple[int, int]]:
    """Slices of rows that belong to one request and stand at consecutive positions."""
    start = 0
    for t in range(1, len(requests) + 1):
        if t == len(requests) or requests[t] != requests[start] or positions[t] != positions[t - 1] + 1:
            yield start, t
            start = t


def gather(view: torch.Tensor, keys: PagedKeys, request: int, low: int, high: int) -> torch.Tensor:
    """Stored keys ``[high - low, Hkv, D]`` of positions low..high-1: a view where one page holds them."""
    first, last = low // keys.page_size, (high - 1) // keys.page_size
    offset = low - first * keys.page_size
    if first == last:
        return view[int(keys.page_table[request, first])][offset : offset + high - low]
    pages = keys.page_table[request, first : last + 1].long()
    return view[pages].flatten(0, 1)[offset : offset + high - low]


def buffer(name: str, size: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A flat scratch tensor, kept per thread so that a step faults no fresh memory in."""
    if size > _SCRATCH_ELEMENTS:
        return torch.empty(size, dtype=dtype, device=like.device)
    key = (name, like.device, dtype)
    cached = _scratch.buffers.get(key)
    if cached is None or cached.numel() < size:
        # a decode step needs a little more than the last one: not a new buffer each time
        room = min(1 << (size - 1).bit_length(), _SCRATCH_ELEMENTS) if size else 0
        cached = _scratch.buffers[key] = torch.empty(room, dtype=dtype, device=like.device)
    return cached[:size]


def logits(q: torch.Tensor, k: torch.Tensor, spare: int = 0) -> torch.Tensor:
    """Products ``[Hq, R, N + spare]`` of scaled queries ``[Hq, R, D]`` and keys ``[N, Hkv, D]``.

    Heads outermost, in scratch that the next call on this thread overwrites; ``spare`` columns are left
    unset behind each row.
    """
    heads, rows, head_dim = q.shape
    count, kv_heads, _ = k.shape
    dtype, product = q.dtype, _product_type(q.dtype)
    # [Hkv, G * R, D]: a kv head's queries of all rows meet its keys in one product
    lhs = q.reshape(kv_heads, -1, head_dim).to(product)
    z = buffer("logits", heads * rows * (count + spare), q, dtype).view(kv_heads, -1, count + spare)
    step = count if k.dtype == product else _KEY_BLOCK
    for c in range(0, count, step):
        part = z[:, :, c : min(c + step, count)]
        keys = k[c : c + step].to(product).permute(1, 2, 0)
        if product == dtype:
            torch.bmm(lhs, keys, out=part)
        else:
            part.copy_(torch.bmm(lhs, keys))
    return z.view(heads, rows, count + spare)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    position: int,
    first: int,
    firsts: list[int],
    *,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    mask: torch.Tensor | None,
    suspect: bool,
) -> tuple[torch.Tensor, int]:
    """Attention ``[R, R - 1 + N]`` of rows at position.. over keys first..; invisible keys hold 0.

    ``q`` is scaled, [Hq, R, D]. The R - 1 leading zeros let `_reduce` read the rows along equal distances.
    """
    heads, rows, _ = q.shape
    count, dtype = k.shape[0], q.dtype
    z = logits(q, k, spare=0 if sinks is None else 1)
    seen = z[..., :count]
    if alibi_slopes is not None:
        s = torch.arange(first, first + count, device=q.device, dtype=dtype)
        p = torch.arange(position, position + rows, device=q.device, dtype=dtype)
        seen += alibi_slopes.to(dtype).view(heads, 1, 1) * (s - p[:, None])
    hidden_keys = list(_hidden(rows, count, position, first, firsts, q.device))
    if suspect:
        for columns, hidden in hidden_keys:
            seen[..., columns].masked_fill_(hidden, 0.0)  # poison behind the row's position is not the row's
        # before the soft-cap and softmax, which would make an infinity look like a number
        finite = torch.isfinite(seen.sum(-1))  # [Hq, R]
    if softcap:
        seen.div_(softcap).tanh_().mul_(softcap)
    if sinks is not None:
        z[..., count] = sinks.to(dtype).view(heads, 1)
    for columns, hidden in hidden_keys:
        seen[..., columns].masked_fill_(hidden, -math.inf)

    p_h = buffer("probabilities", z.numel(), q, dtype).view(z.shape)
    torch.softmax(z, dim=-1, out=p_h)
    p_h = p_h[..., :count]
    lead = rows - 1
    attention = buffer("attention", rows * (lead + count), q, dtype).view(rows, lead + count)
    attention[:, :lead] = 0
    torch.mean(p_h if mask is None else p_h[mask], dim=0, out=attention[:, lead:])
    if suspect:
        broken = ~(finite if mask is None else finite[mask]).all(0)
        if bool(broken.any()):
            attention[broken, lead:] = math.nan
    return attention, lead


def _hidden(
    rows: int, count: int, position: int, first: int, firsts: list[int], device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Column slices with a mask ``[R, columns]`` of the keys that a row does not see; few columns each."""
    if rows > 1:  # the causal edge: row r sees column position + r - first and none behind it
        edge = position - first + 1
        columns = torch.arange(edge, count, device=device)
        yield slice(edge, count), columns[None, :] > torch.arange(edge - 1, edge - 1 + rows, device=device)[:, None]
    last = max(firsts) - first
    if last > 0:  # the window's edge
        starts = torch.tensor(firsts, device=device) - first
        yield slice(0, last), torch.arange(last, device=device)[None, :] < starts[:, None]


def _reduce(
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
