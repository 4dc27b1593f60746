"""Top-k attention as Triton kernels: the path for GPUs. Compiled with Triton 3.7.

First the attention of each row, averaged over the heads, float32 in scratch with the sums and the best key of every
tile of keys; `make_plan` chooses one of two ways by the shapes:

- *One pass*, for decoding. Over (row, kv head, key split): the query heads of a kv head share one load of each of
  its key blocks, so a row reads every visible key once and never again. Logits go to scratch as float32, with the
  running maximum and sum of exponentials of the split; over (row, key split) they are then normalised with all
  splits' maxima and sums (and the sink) and averaged. Some kv heads at a time, where that keeps the scratch small.
- *Recompute*, for prompts, for kv heads with very many query heads, and where the caller brings the normaliser
  (``lse``): no logits are kept. Over (tile of rows, kv head, key split): maxima and sums; over (tile of rows, key
  split): the logits again, normalised and averaged over all heads as they come. Consecutive rows of one request
  share their keys. With ``lse`` the first half falls away and keys are read once.

Then *masses* and *select* answer from the tiles, one program a row.

Memory: `make_plan` bounds it by shapes. Decoding takes at most 1/16 of the key bytes that the page table
addresses, or the logits of one row and one kv head; recompute takes 4.5 bytes a row and key, and prompt rows
together 64 MiB or one tile of rows. Sizes and grids follow from shapes alone and nothing waits for the device, so a
call can be captured in a CUDA graph. Give page tables only as many columns as the batch needs: they set the size of
the scratch.

Rows at a negative position are padding: no keys, position -1, zeros. Rows that the page table cannot
hold (position or request out of range) read nothing and get a NaN entropy. float64 is refused.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnhook.kernels.topk import split
from attnhook.kernels.topk.triton.by_key import BLOCK as BY_KEY_BLOCK
from attnhook.kernels.topk.triton.by_key import by_key_kernel
from attnhook.kernels.topk.triton.logits import average_kernel, direct_kernel, logits_kernel, merge_kernel, norms_kernel
from attnhook.kernels.topk.triton.plan import (
    MASS_BLOCK,
    TILE,
    UNIT,
    Plan,
    launch_shape,
    make_plan,
    padded,
    select_shape,
    split_block,
)
from attnhook.kernels.topk.triton.select import masses_kernel, select_kernel, tiles_kernel
from attnhook.kernels.topk.types import NO_HEADS, LayerRows, PagedKeys, PerKey, Selection, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS

_MAX_TOP_K = 1024  # the running top k lives in registers
_WHOLE = 1 << 30  # a unit that makes every row's scores begin at position 0
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INTERPRETED = not isinstance(logits_kernel, triton.JITFunction)


class Scratch(NamedTuple):
    """The attention of some rows and its tiles; keys count from the row's base."""

    attention: torch.Tensor  # float32 [rows, keys]
    tile_mass: torch.Tensor  # float32 [rows, tiles]
    tile_entropy: torch.Tensor  # float32 [rows, tiles]; -sum a ln a
    tile_best: torch.Tensor  # int64 [rows, tiles]


def topk_attention(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`; every result is float32."""
    q, top_k, first_reported = layer.q, selection.top_k, selection.first_reported
    rows, heads, _ = q.shape
    if top_k > _MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is above the Triton kernel's {_MAX_TOP_K}: use ATTNHOOK_KERNEL=torch")
    out = selection.results(rows, heads, torch.empty, device=q.device)
    if first_reported is not None:
        selection = selection._replace(first_reported=first_reported.contiguous())
    sums = None if selection.per_key is None or layer.key_mass is None else _ByKey(selection.per_key, layer.key_mass)
    by_kv_head = sums is not None and sums.kv_heads
    own = None
    if selection.per_head != NO_HEADS or by_kv_head:
        own = _Heads(selection, out, sums if by_kv_head else None, normalise=layer.softmax.sinks is not None)
    for chunk in _averages(layer, row_request, selection.head_mask, selection.first_reported, own):
        if sums is not None and not by_kv_head:
            sums.add(chunk.rows, chunk.extent, chunk.scratch.attention[:, None], 1)
        _reduce(
            chunk.extent, chunk.scratch, selection, TopK(*(x[chunk.rows] for x in out)), UNIT,
            normalise=layer.softmax.sinks is not None,
        )  # fmt: skip
    return out


class _ByKey:
    """Adds probabilities up by key, on the device."""

    def __init__(self, per_key: PerKey, key_mass: torch.Tensor) -> None:
        self.kv_heads = per_key.kv_heads
        self._slot, self._mass = per_key.slot.contiguous(), key_mass

    def add(self, part: slice, extent: tuple[Any, ...], p: torch.Tensor, group: int, first_group: int = 0) -> None:
        """Add the mean over each ``group`` of heads of rows ``part``, p [rows, heads, width]."""
        slots, groups, keys = self._mass.shape
        rows, (_, heads, width) = part.stop - part.start, p.shape
        by_key_kernel[(slots, heads // group, math.ceil(keys / BY_KEY_BLOCK))](
            *extent, p, self._slot[part], self._mass, rows, heads, group, first_group, groups, keys, width,
            UNIT=UNIT, BLOCK=BY_KEY_BLOCK,
        )  # fmt: skip


class _Heads:
    """Reduces each head's probabilities by itself: for `_reduce`, a head of a row is a row."""

    def __init__(self, selection: Selection, out: TopK, sums: _ByKey | None, *, normalise: bool) -> None:
        self.asked = selection.per_head
        self._sums = sums  # of each kv head
        self.every = self.asked.scores or sums is not None  # whether probabilities are wanted
        spans = selection.spans if self.asked.spans else None
        # the selection finds the entropy too
        self._selection = Selection(max(self.asked.top_k, 1), None, spans, selection.first_reported)
        self._out, self._normalise = out, normalise
        self.lse = out.head_lse.zero_() if self.asked.lse else None

    def reduce(self, part: slice, extent: tuple[Any, ...], p: torch.Tensor, first_head: int, group: int) -> None:
        """Write the results of rows ``part`` and heads ``first_head``... from p [rows, heads, width]."""
        count, heads, width = p.shape
        if self._sums is not None:
            self._sums.add(part, extent, p, group, first_head // group)
        if not self.asked.scores:
            return
        request, position, window_rows, *rest = extent
        own = (*(None if x is None else _each(x, heads) for x in (request, position, window_rows)), *rest)
        found = self._selection.results(count * heads, 0, torch.empty, device=p.device)
        _reduce_dense(own, p.view(-1, width), self._selection, found, UNIT, normalise=self._normalise)
        out, place = self._out, (part, slice(first_head, first_head + heads))
        wanted = [(out.head_positions, found.positions), (out.head_scores, found.scores)] if self.asked.top_k else []
        if self.asked.fingerprint:
            wanted += [(out.head_histogram, found.histogram), (out.head_entropy, found.entropy)]
        if self.asked.spans:
            wanted.append((out.head_span_mass, found.span_mass))
        for whole, piece in wanted:
            whole[place] = piece.view(count, heads, *piece.shape[1:])


def _each(x: torch.Tensor, times: int) -> torch.Tensor:
    """x [n] with each element so many times, in memory of its own and without a look at the device."""
    return x[:, None].expand(-1, times).contiguous().view(-1)


def attention_rows(
    layer: LayerRows, row_request: torch.Tensor, *, width: int, head_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`."""
    q = layer.q
    dense = torch.empty((q.shape[0], width), dtype=torch.float32, device=q.device)
    s = torch.arange(width, device=q.device)
    for chunk in _averages(layer, row_request, head_mask):
        last = layer.row_position[chunk.rows].long()[:, None]
        size = layer.softmax.rows(chunk.rows).window
        size = size.long()[:, None] if isinstance(size, torch.Tensor) else size
        first = (last - size + 1).clamp(min=0)
        first = torch.where(size < 0, 0, first) if isinstance(size, torch.Tensor) else first * int(size >= 0)
        scores = chunk.scratch.attention[: len(last)]
        # scratch counts from the unit that holds the first visible key
        column = (s - first // UNIT * UNIT).clamp(0, scores.shape[1] - 1)
        dense[chunk.rows] = torch.where((s >= first) & (s <= last), scores.gather(1, column), 0)
    return dense


def reduce_rows(
    attention: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    selection: Selection,
    out: TopK,
    *,
    normalise: bool = False,
) -> None:
    """See `attnhook.kernels.topk.split.reduce_rows`; ``attention`` is only read."""
    rows, width = attention.shape
    if out.scores.shape[1] > _MAX_TOP_K:
        return split.reduce_rows(attention, first, last, selection, out, normalise=normalise)
    if rows == 0:
        return
    # each row is a request of its own
    request = torch.arange(rows, dtype=torch.int32, device=attention.device)
    extent = request, last.contiguous(), (last - first + 1).contiguous(), -1, rows, width
    if selection.first_reported is not None:
        selection = selection._replace(first_reported=selection.first_reported.contiguous())
    with _on_device(attention.device):
        _reduce_dense(extent, attention.contiguous(), selection, out, _WHOLE, normalise=normalise)


def _reduce_dense(
    extent: tuple[Any, ...], attention: torch.Tensor, selection: Selection, out: TopK, unit: int, *, normalise: bool
) -> None:
    """`_reduce` of attention [rows, keys] whose tiles are not known yet."""
    rows, width = attention.shape
    tiles = math.ceil(width / TILE)
    scratch = Scratch(attention, *_tiles(rows, tiles, attention.device))
    tiles_kernel[(rows, math.ceil(width / UNIT))](
        *extent, *scratch, selection.first_reported, width, tiles, UNIT=unit, TILE=TILE, BLOCK=UNIT
    )
    _reduce(extent, scratch, selection, out, unit, normalise=normalise)


def _tiles(rows: int, tiles: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the mass, entropy and best key of each tile."""
    mass, entropy = (torch.empty((rows, tiles), dtype=torch.float32, device=device) for _ in range(2))
    return mass, entropy, torch.empty((rows, tiles), dtype=torch.int64, device=device)


def _reduce(
    extent: tuple[Any, ...],
    scratch: Scratch,
    selection: Selection,
    out: TopK,
    unit: int,
    *,
    normalise: bool,
) -> None:
    """Launch what turns attention and tiles into results."""
    spans = selection.spans
    rows, (width, tiles) = len(out.entropy), (scratch.attention.shape[1], scratch.tile_mass.shape[1])
    top_k, span_count = out.scores.shape[1], out.span_mass.shape[1]
    masses_kernel[(rows, 1 + math.ceil(span_count / BINS))](
        *extent, scratch.attention, scratch.tile_mass, spans, *((0, 0, 0) if spans is None else spans.stride()),
        out.histogram, out.span_mass, span_count, width, tiles,
        BIN_STARTS=BIN_STARTS, RANGES=BINS, BLOCK=MASS_BLOCK, UNIT=unit, TILE=TILE,
    )  # fmt: skip
    select_kernel[(rows,)](
        *extent, *scratch, selection.first_reported, out.positions, out.scores, out.entropy, top_k, width, tiles,
        RENORMALISE=normalise, UNIT=unit, TILE=TILE, **select_shape(top_k, tiles),
    )  # fmt: skip


class _Chunk(NamedTuple):
    """Rows whose attention is in scratch; ``extent`` is what every kernel wants to know of them."""

    rows: slice
    extent: tuple[Any, ...]
    scratch: Scratch


def _averages(
    layer: LayerRows,
    row_request: torch.Tensor,
    head_mask: torch.Tensor | None,
    first_reported: torch.Tensor | None = None,
    own: _Heads | None = None,
) -> Iterator[_Chunk]:
    """Compute the rows' attention, of as many at once as the plan allows, and what ``own`` wants of each head.

    What uses the scratch must be launched before the next chunk is asked for.
    """
    q, keys, row_position, (scale, softcap, window, sinks, alibi_slopes, lse), _ = layer
    dot_type = _dot_type(q, keys)
    rows, heads, head_dim = q.shape
    if rows == 0:
        return
    every = own is not None and own.every
    plan = make_plan(q, keys, window, lse=lse is not None, per_head=every)
    group, requests = heads // keys.num_kv_heads, keys.page_table.shape[0]
    shape = launch_shape(group, plan.tile_rows, head_dim, keys.cache.element_size())
    block_s = split_block(plan.splits)
    row_request, row_position = row_request.contiguous(), row_position.contiguous()
    window_rows = window.contiguous() if isinstance(window, torch.Tensor) else None
    sinks, alibi_slopes = (None if x is None else x.contiguous() for x in (sinks, alibi_slopes))
    k_scale, k_scale_step, scale = _k_scale(keys, scale, q.device)
    selected = None if head_mask is None else head_mask.bool().contiguous().view(torch.uint8)
    selected_step = 0 if head_mask is None or head_mask.dim() == 1 else heads
    computed = selected if own is None else None  # heads whose logits are computed
    scratch, work = allocate(plan, group, q.device, lse=lse is not None)
    direct = every and not plan.one_pass
    own_p = torch.empty((plan.rows, heads, plan.width), dtype=torch.float32, device=q.device) if direct else None
    head_lse = own.lse if own is not None else None
    constants = {"HEAD_DIM": head_dim, "SOFTCAP": bool(softcap), "DOT_TYPE": dot_type, "UNIT": UNIT, **shape}
    # where probabilities are kept too, a third block of keys has no room in the shared memory of small GPUs
    of_direct = {**constants, "num_stages": 2} if direct else constants

    with _on_device(q.device):
        for start in range(0, rows, plan.rows):
            part = slice(start, min(start + plan.rows, rows))
            count = part.stop - start
            extent = (
                row_request[part], row_position[part], None if window_rows is None else window_rows[part],
                -1 if isinstance(window, torch.Tensor) else min(window, keys.max_keys), requests, keys.max_keys,
            )  # fmt: skip
            inputs = (
                q[part], *q.stride(), keys.cache, *keys.strides,
                keys.page_table, *keys.page_table.stride(), keys.page_size, *extent,
                scale, k_scale, k_scale_step, alibi_slopes, float(softcap),
            )  # fmt: skip
            chosen = selected, selected_step, group
            inputs_of_computed = *inputs, computed, selected_step, group
            if plan.one_pass:
                for kv_head in range(0, keys.num_kv_heads, plan.kv_heads):
                    kv_heads = min(plan.kv_heads, keys.num_kv_heads - kv_head)
                    logits_kernel[(count, kv_heads, plan.splits)](
                        *inputs_of_computed, *work, kv_head, kv_heads * group, plan.width, plan.splits, **constants
                    )
                    block_h = padded(kv_heads * group)
                    average_kernel[(count, plan.splits)](
                        *extent, *work, *scratch, sinks, selected, selected_step, first_reported,
                        None if head_lse is None else head_lse[part],
                        kv_head * group, kv_heads * group, heads, plan.width, plan.splits, EVERY=own is not None,
                        BLOCK_H=block_h, BLOCK_ALL=padded(heads), BLOCK_S=block_s, UNIT=UNIT, TILE=TILE,
                        num_warps=8 if block_h > 64 else 4,
                    )  # fmt: skip
                    if every and own is not None:
                        # the scratch lies as for kv_heads * group heads
                        size = count * kv_heads * group * plan.width
                        p = work[0].view(-1)[:size].view(count, kv_heads * group, plan.width)
                        own.reduce(part, extent, p, kv_head * group, group)
            else:
                tiles = math.ceil(count / plan.tile_rows)
                if lse is None:
                    norms_kernel[(tiles, keys.num_kv_heads, plan.splits)](
                        *inputs_of_computed, *work[:2], count, heads, plan.splits, **constants
                    )
                    merge_kernel[(count,)](
                        *work[:2], sinks, *work[2:], heads, plan.splits, BLOCK_H=padded(heads), BLOCK_S=block_s
                    )
                    norm: tuple[Any, ...] = work[2], heads, 1, work[3]
                    if head_lse is not None:
                        head_lse[part] = (work[2] - work[3].log()).view(-1, heads)[:count]
                else:
                    norm = lse[part], *lse.stride(), None
                    if head_lse is not None:
                        head_lse[part] = lse[part]
                direct_kernel[(tiles, plan.splits)](
                    *inputs, *chosen, *norm, own_p, *scratch, first_reported,
                    count, keys.num_kv_heads, heads, plan.width, plan.splits,
                    TILE=TILE, BLOCK_ALL=padded(heads), **of_direct,
                )  # fmt: skip
                if own_p is not None and own is not None:
                    own.reduce(part, extent, own_p[:count], 0, group)
            yield _Chunk(part, extent, scratch)


def allocate(
    plan: Plan, group: int, device: torch.device, *, lse: bool = False
) -> tuple[Scratch, tuple[torch.Tensor, ...]]:
    """The scratch of a plan: what the reduction reads, and what comes before the attention.

    One pass: logits ``[rows, heads, keys]``, maximum and sum ``[rows, heads, splits]`` (NaN where a logit is not
    finite). Recompute: maximum and sum, and from these shift and factor ``[rows, heads]``; with ``lse`` nothing.
    """

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    rows, width = plan.rows, plan.width
    scratch = Scratch(floats(rows, width), *_tiles(rows, width // TILE, device))
    if lse:
        return scratch, ()
    heads = plan.kv_heads * group
    parts = floats(rows, heads, plan.splits), floats(rows, heads, plan.splits)
    if plan.one_pass:
        return scratch, (floats(rows, heads, width), *parts)
    return scratch, (*parts, floats(rows, heads), floats(rows, heads))


def _dot_type(q: torch.Tensor, keys: PagedKeys) -> tl.dtype:
    """The type that both sides of the product are exact in; float32 where 16 bits are not enough."""
    k_type = keys.cache.dtype
    if q.dtype not in _DOT_TYPES:
        raise ValueError(
            f"q is {q.dtype}, the Triton kernel computes in float32: convert q, or use ATTNHOOK_KERNEL=torch"
        )
    if k_type not in _DOT_TYPES and k_type not in _FP8:
        raise ValueError(f"keys are {k_type}, the Triton kernel reads {', '.join(map(str, (*_DOT_TYPES, *_FP8)))}")
    for name, tensor in (("cache", keys.cache), ("page_table", keys.page_table)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}: move it there")
    if k_type == torch.float8_e4m3fn and q.device.type == "cuda" and torch.version.cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            raise ValueError(f"keys are {k_type}, which Triton reads from compute capability 8.9 up, not {capability}")
    exact = _DOT_TYPES[q.dtype] if k_type in (q.dtype, *_FP8) else tl.float32
    # the interpreter multiplies the bit patterns of bfloat16 (triton issue 11584); float32 gives the same products
    return tl.float32 if _INTERPRETED and exact == tl.bfloat16 else exact


def _k_scale(keys: PagedKeys, scale: float, device: torch.device) -> tuple[torch.Tensor | None, int, float]:
    """(tensor or None, elements from one kv head to the next, scale) without reading a device value."""
    factor = keys.k_scale
    if factor is None:
        return None, 0, float(scale)
    if not isinstance(factor, torch.Tensor):
        return None, 0, float(scale) * float(factor)
    if factor.numel() not in (1, keys.num_kv_heads):
        raise ValueError(f"k_scale must hold 1 or {keys.num_kv_heads} values, got shape {list(factor.shape)}")
    if factor.device != device:
        raise ValueError(f"k_scale is on {factor.device}, q is on {device}: move it there")
    return factor.contiguous(), int(factor.numel() > 1), float(scale)


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()
