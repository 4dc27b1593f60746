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
from attnhook.kernels.topk.types import LayerRows, PagedKeys, Selection, TopK
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
    rows, span_count = q.shape[0], selection.span_count
    f32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    if top_k > _MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is above the Triton kernel's {_MAX_TOP_K}: use ATTNHOOK_KERNEL=torch")
    out = TopK(
        torch.empty((rows, top_k), dtype=torch.int32, device=q.device),
        torch.empty((rows, top_k), **f32),
        torch.empty((rows, BINS), **f32),
        torch.empty((rows,), **f32),
        torch.empty((rows, span_count), **f32),
    )
    if first_reported is not None:
        selection = selection._replace(first_reported=first_reported.contiguous())
    for chunk in _averages(layer, row_request, selection.head_mask, selection.first_reported):
        _reduce(
            chunk.extent, chunk.scratch, selection, TopK(*(x[chunk.rows] for x in out)), UNIT,
            normalise=layer.softmax.sinks is not None,
        )  # fmt: skip
    return out


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
    tiles = math.ceil(width / TILE)
    mass, entropy = (torch.empty((rows, tiles), dtype=torch.float32, device=attention.device) for _ in range(2))
    best = torch.empty((rows, tiles), dtype=torch.int64, device=attention.device)
    scratch = Scratch(attention.contiguous(), mass, entropy, best)
    # each row is a request of its own
    request = torch.arange(rows, dtype=torch.int32, device=attention.device)
    extent = request, last.contiguous(), (last - first + 1).contiguous(), -1, rows, width
    if selection.first_reported is not None:
        selection = selection._replace(first_reported=selection.first_reported.contiguous())
    with _on_device(attention.device):
        tiles_kernel[(rows, math.ceil(width / UNIT))](
            *extent, *scratch, selection.first_reported, width, tiles, UNIT=_WHOLE, TILE=TILE, BLOCK=UNIT
        )
        _reduce(extent, scratch, selection, out, _WHOLE, normalise=normalise)


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
) -> Iterator[_Chunk]:
    """Compute the rows' attention, of as many at once as the plan allows.

    What uses the scratch must be launched before the next chunk is asked for.
    """
    q, keys, row_position, (scale, softcap, window, sinks, alibi_slopes, lse) = layer
    dot_type = _dot_type(q, keys)
    rows, heads, head_dim = q.shape
    if rows == 0:
        return
    plan = make_plan(q, keys, window, lse=lse is not None)
    group, requests = heads // keys.num_kv_heads, keys.page_table.shape[0]
    shape = launch_shape(group, plan.tile_rows, head_dim, keys.cache.element_size())
    block_s = split_block(plan.splits)
    row_request, row_position = row_request.contiguous(), row_position.contiguous()
    window_rows = window.contiguous() if isinstance(window, torch.Tensor) else None
    sinks, alibi_slopes = (None if x is None else x.contiguous() for x in (sinks, alibi_slopes))
    k_scale, k_scale_step, scale = _k_scale(keys, scale, q.device)
    selected = None if head_mask is None else head_mask.bool().contiguous().view(torch.uint8)
    selected_step = 0 if head_mask is None or head_mask.dim() == 1 else heads
    scratch, work = allocate(plan, group, q.device, lse=lse is not None)
    constants = {"HEAD_DIM": head_dim, "SOFTCAP": bool(softcap), "DOT_TYPE": dot_type, "UNIT": UNIT, **shape}

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
                scale, k_scale, k_scale_step, alibi_slopes, float(softcap), selected, selected_step, group,
            )  # fmt: skip
            if plan.one_pass:
                for kv_head in range(0, keys.num_kv_heads, plan.kv_heads):
                    kv_heads = min(plan.kv_heads, keys.num_kv_heads - kv_head)
                    logits_kernel[(count, kv_heads, plan.splits)](
                        *inputs, *work, kv_head, kv_heads * group, plan.width, plan.splits, **constants
                    )
                    block_h = padded(kv_heads * group)
                    average_kernel[(count, plan.splits)](
                        *extent, *work, *scratch, sinks, selected, selected_step, first_reported,
                        kv_head * group, kv_heads * group, heads, plan.width, plan.splits,
                        BLOCK_H=block_h, BLOCK_ALL=padded(heads), BLOCK_S=block_s, UNIT=UNIT, TILE=TILE,
                        num_warps=8 if block_h > 64 else 4,
                    )  # fmt: skip
            else:
                tiles = math.ceil(count / plan.tile_rows)
                if lse is None:
                    norms_kernel[(tiles, keys.num_kv_heads, plan.splits)](
                        *inputs, *work[:2], count, heads, plan.splits, **constants
                    )
                    merge_kernel[(count,)](
                        *work[:2], sinks, *work[2:], heads, plan.splits, BLOCK_H=padded(heads), BLOCK_S=block_s
                    )
                    norm: tuple[Any, ...] = work[2], heads, 1, work[3]
                else:
                    norm = lse[part], *lse.stride(), None
                direct_kernel[(tiles, plan.splits)](
                    *inputs, *norm, *scratch, first_reported,
                    count, keys.num_kv_heads, heads, plan.width, plan.splits,
                    TILE=TILE, BLOCK_ALL=padded(heads), **constants,
                )  # fmt: skip
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
    tiles = width // TILE
    best = torch.empty((rows, tiles), dtype=torch.int64, device=device)
    scratch = Scratch(floats(rows, width), floats(rows, tiles), floats(rows, tiles), best)
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
