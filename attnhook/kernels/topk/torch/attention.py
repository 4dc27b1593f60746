"""The attention of rows as vectorised torch, block by block of rows.

Rows of one request at consecutive positions (a prompt, or one decode row) are computed together. The only
scratch is the logits of a block of rows, their probabilities and their mean, each at most
`_SCRATCH_ELEMENTS` floats unless one row needs more, so memory never grows with rows x keys.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from attnhook.kernels.topk.types import NO_HEADS, LayerRows, PagedKeys, PerHead, PerKey, Softmax, gather

_SCRATCH_ELEMENTS = 3 << 18  # logits per block of rows: 3 MiB, about a core's cache
_KEY_BLOCK = 4096  # keys converted to float32 at once when the cache holds another dtype


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}


_scratch = _Scratch()


def result_type(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Block(NamedTuple):
    """Rows of one request at consecutive positions, and their attention in scratch."""

    rows: slice
    request: int
    position: int  # of the first row
    first: int  # lowest key position
    firsts: list[int]  # lowest key position that each row sees
    attention: torch.Tensor  # [R, lead + keys]; hidden keys hold 0
    lead: int
    heads: torch.Tensor  # [Hq, R, keys]: each head's own
    lse: torch.Tensor | None  # [Hq, R], where it is wanted


def blocks(
    layer: LayerRows,
    row_request: torch.Tensor,
    head_mask: torch.Tensor | None = None,
    per_head: PerHead = NO_HEADS,
    per_key: PerKey | None = None,
) -> Iterator[Block]:
    """The attention of a layer's rows, averaged over the selected heads; each block is overwritten by the next."""
    q, keys, row_position, softmax, _ = layer
    rows, heads, head_dim = q.shape
    every = per_head != NO_HEADS or (per_key is not None and per_key.kv_heads)
    requests, positions = row_request.tolist(), row_position.tolist()
    window = softmax.window
    widths = window.tolist() if isinstance(window, torch.Tensor) else [window] * rows
    firsts = [0 if w < 0 else max(0, p - w + 1) for p, w in zip(positions, widths, strict=True)]
    masks = None if head_mask is None else head_mask.expand(keys.page_table.shape[0], heads)
    view = keys.pages(head_dim)
    scaled = queries(q, keys, softmax.scale, result_type(q))

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
            attention, p_h, lse = _attention(
                scaled[t:end].transpose(0, 1), k[first - low : positions[end - 1] + 1 - low],
                positions[t], first, firsts[t:end], softmax, mask=mask, suspect=suspect, every=every, lse=per_head.lse,
            )  # fmt: skip
            lead = end - t - 1
            yield Block(slice(t, end), request, positions[t], first, firsts[t:end], attention, lead, p_h, lse)


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
    softmax: Softmax,
    *,
    mask: torch.Tensor | None,
    suspect: bool,
    every: bool,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention ``[R, R - 1 + N]`` of rows at position.. over keys first.., each head's ``[Hq, R, N]``, log-sum-exp.

    Invisible keys hold 0. ``q`` is scaled, [Hq, R, D]. ``every``: something is told of each head too. The R - 1 leading
    zeros let `reduce_block` read the rows along equal distances.
    """
    heads, rows, _ = q.shape
    count, dtype = k.shape[0], q.dtype
    _, softcap, _, sinks, alibi_slopes, _ = softmax
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
    norm = torch.logsumexp(z, dim=-1) if lse else None
    lead = rows - 1
    attention = buffer("attention", rows * (lead + count), q, dtype).view(rows, lead + count)
    attention[:, :lead] = 0
    torch.mean(p_h if mask is None else p_h[mask], dim=0, out=attention[:, lead:])
    if suspect:
        # what is told of each head needs all of them
        broken = ~(finite if mask is None or every else finite[mask]).all(0)
        if bool(broken.any()):
            attention[broken, lead:] = math.nan
    return attention, p_h, norm


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
