"""Top-k attention as Triton kernels: the path for GPUs. Compiles with Triton 3.4 to 3.7.

Two phases, four launches:

1. *Logits*, over (row, kv head, key split). The query heads of a kv head share one load of each of its
   key blocks, so a row reads every visible key once and never reads it again. Logits go to scratch as
   float32, with the running maximum and sum of exponentials of the split.
2. *Average*, over (row, key split): normalise each head with its splits' maxima and sums (and its
   sink), average over the selected heads, and sum up every tile of `_TILE` keys: its mass, its share of
   the entropy, its best key. *Masses* and *select* then answer from the tiles: a histogram bin or a span
   is a range of whole tiles and two ragged ends, and the top k keys lie in the k tiles with the best
   keys, because each of those tiles holds a key better than anything outside them.

A key competes in the selection as one int64, the bits of its score above its negated position: scores
are not negative, so integers order like floats, ties go to the lower position, and the result depends
on no scheduling.

Memory: a row takes one float per (query head, addressable key) plus about 5 bytes per key; with an
integer window only the keys that it can show count. Rows are computed in chunks of at most
`_SCRATCH_BYTES` (one row at least). Sizes and grids follow from shapes alone and nothing waits for the
device, so a call can be captured in a CUDA graph. Give page tables only as many columns as the batch
needs: they set the size of the scratch.

Rows at a negative position are padding: no keys, position -1, zeros. Rows that the page table cannot
hold (position or request out of range) read nothing and get a NaN entropy. float64 is refused.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnhook.fingerprint import BIN_STARTS, BINS
from attnhook.kernels.topk.types import PagedKeys, TopK

_SCRATCH_BYTES = 256 << 20
_UNIT = 128  # keys that a split is a multiple of; a whole number of tiles and of key blocks
_TILE = 32  # keys whose sums and best key are kept; 128 bytes of scores, one cache line
_MAX_SPLITS = 64
_MAX_TOP_K = 1024  # the running top k lives in registers
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class _Scratch(NamedTuple):
    """What phase 1 hands to phase 2 for one chunk of rows; ``keys`` counts from the row's base."""

    logits: torch.Tensor  # float32 [rows, Hq, keys]
    split_max: torch.Tensor  # float32 [rows, Hq, splits]
    split_sum: torch.Tensor  # float32 [rows, Hq, splits]; NaN where a logit is not finite
    attention: torch.Tensor  # float32 [rows, keys]
    tile_mass: torch.Tensor  # float32 [rows, tiles]
    tile_entropy: torch.Tensor  # float32 [rows, tiles]; -sum a ln a
    tile_best: torch.Tensor  # int64 [rows, tiles]


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
) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`; every result is float32."""
    if top_k > _MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is above the Triton kernel's {_MAX_TOP_K}: use ATTNHOOK_KERNEL=torch")
    rows = q.shape[0]
    span_count = 0 if spans is None else spans.shape[1]
    f32 = {"dtype": torch.float32, "device": q.device}
    out = TopK(
        torch.empty((rows, top_k), dtype=torch.int32, device=q.device),
        torch.empty((rows, top_k), **f32),  # type: ignore[call-overload]
        torch.empty((rows, BINS), **f32),  # type: ignore[call-overload]
        torch.empty((rows,), **f32),  # type: ignore[call-overload]
        torch.empty((rows, span_count), **f32),  # type: ignore[call-overload]
    )
    first_reported = None if first_reported is None else first_reported.contiguous()
    span_strides = (0, 0, 0) if spans is None else spans.stride()
    k_bits = max(1, _bits(top_k))
    for chunk in _averages(
        q, keys, row_request, row_position, scale=scale, softcap=softcap, window=window, sinks=sinks,
        alibi_slopes=alibi_slopes, head_mask=head_mask, first_reported=first_reported,
    ):  # fmt: skip
        scratch, part = chunk.scratch, TopK(*(x[chunk.rows] for x in out))
        count, (width, tiles) = len(part.entropy), (scratch.attention.shape[1], scratch.tile_mass.shape[1])
        _masses_kernel[(count, 1 + math.ceil(span_count / BINS))](
            *chunk.extent, scratch.attention, scratch.tile_mass, spans, *span_strides,
            part.histogram, part.span_mass, span_count, width, tiles,
            BIN_STARTS=BIN_STARTS, RANGES=BINS, BLOCK=128, UNIT=_UNIT, TILE=_TILE,
        )  # fmt: skip
        _select_kernel[(count,)](
            *chunk.extent, *scratch[3:], first_reported, part.positions, part.scores, part.entropy,
            top_k, width, tiles,
            RENORMALISE=sinks is not None, UNIT=_UNIT, TILE=_TILE, K_BITS=k_bits,
            T_BITS=max(k_bits, 6 if tiles <= 64 else 10), W_BITS=min(_bits(_TILE), max(0, 10 - k_bits)),
        )  # fmt: skip
    return out


def attention_rows(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    width: int,
    window: int | torch.Tensor = -1,
    **softmax: Any,
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`."""
    dense = torch.empty((q.shape[0], width), dtype=torch.float32, device=q.device)
    s = torch.arange(width, device=q.device)
    for chunk in _averages(q, keys, row_request, row_position, window=window, **softmax):
        last = row_position[chunk.rows].long()[:, None]
        size = window[chunk.rows].long()[:, None] if isinstance(window, torch.Tensor) else window
        first = torch.where(torch.as_tensor(size, device=q.device) < 0, 0, (last - size + 1).clamp(min=0))
        scores = chunk.scratch.attention[: len(last)]
        # scratch counts from the unit that holds the first visible key
        column = (s - first // _UNIT * _UNIT).clamp(0, scores.shape[1] - 1)
        dense[chunk.rows] = torch.where((s >= first) & (s <= last), scores.gather(1, column), 0)
    return dense


class _Chunk(NamedTuple):
    """Rows whose attention is in scratch; ``extent`` is what every kernel wants to know of them."""

    rows: slice
    extent: tuple[Any, ...]
    scratch: _Scratch


def _averages(
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
    first_reported: torch.Tensor | None = None,
) -> Iterator[_Chunk]:
    """Run the first two kernels over the rows, as many at once as the scratch holds.

    What uses the scratch must be launched before the next chunk is asked for.
    """
    dot_type = _dot_type(q, keys)
    rows, heads, head_dim = q.shape
    kv_heads, requests = keys.num_kv_heads, keys.page_table.shape[0]
    if rows == 0:
        return
    width = _scratch_keys(keys.max_keys, window)
    chunk = min(rows, max(1, _SCRATCH_BYTES // _row_bytes(heads, width)))
    splits = _split_count(chunk * kv_heads, width)
    scratch = _allocate(chunk, heads, width, splits, q.device)
    row_request, row_position = row_request.contiguous(), row_position.contiguous()
    window_rows = window.contiguous() if isinstance(window, torch.Tensor) else None
    sinks, alibi_slopes = (None if x is None else x.contiguous() for x in (sinks, alibi_slopes))
    k_scale, k_scale_step, scale = _k_scale(keys, scale, q.device)
    selected = None if head_mask is None else head_mask.bool().contiguous().view(torch.uint8)
    selected_step = 0 if head_mask is None or head_mask.dim() == 1 else heads
    shape = _launch_shape(heads // kv_heads, head_dim, keys.cache.element_size())
    padded_heads = triton.next_power_of_2(heads)

    with _on_device(q.device):
        for start in range(0, rows, chunk):
            end = min(start + chunk, rows)
            count = end - start
            extent = (
                row_request[start:end], row_position[start:end],
                None if window_rows is None else window_rows[start:end],
                -1 if isinstance(window, torch.Tensor) else min(window, keys.max_keys),
                requests, keys.max_keys,
            )  # fmt: skip
            q_part = q[start:end]
            _logits_kernel[(count, kv_heads, splits)](
                q_part, *q_part.stride(), keys.cache, *keys.strides,
                keys.page_table, *keys.page_table.stride(), keys.page_size, *extent,
                scale, k_scale, k_scale_step, alibi_slopes, float(softcap), selected, selected_step,
                *scratch[:3], heads, heads // kv_heads, width, splits,
                HEAD_DIM=head_dim, SOFTCAP=bool(softcap), DOT_TYPE=dot_type, UNIT=_UNIT, **shape,
            )  # fmt: skip
            _average_kernel[(count, splits)](
                *extent, *scratch, sinks, selected, selected_step, first_reported, heads, width, splits,
                BLOCK_H=padded_heads, BLOCK_S=8 if splits <= 8 else _MAX_SPLITS, UNIT=_UNIT, TILE=_TILE,
                num_warps=8 if padded_heads > 64 else 4,
            )  # fmt: skip
            yield _Chunk(slice(start, end), extent, scratch)


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


def _scratch_keys(max_keys: int, window: int | torch.Tensor) -> int:
    """Keys per row that scratch must hold: whole units from the one that holds the first visible key."""
    unbounded = isinstance(window, torch.Tensor) or window < 0
    most = max_keys if unbounded else min(max_keys, window + _UNIT - 1)
    return max(1, math.ceil(most / _UNIT)) * _UNIT


def _split_count(groups: int, width: int) -> int:
    """Key splits per row: enough programs for the device, more than one each for a long row in a batch."""
    wanted = min(max(4096 // groups, 8), _MAX_SPLITS)
    return min(wanted, width // _UNIT)


def _row_bytes(heads: int, width: int) -> int:
    """Scratch of one row, at most."""
    return 4 * heads * (width + 2 * min(_MAX_SPLITS, width // _UNIT)) + 4 * width + 16 * (width // _TILE)


def _allocate(rows: int, heads: int, width: int, splits: int, device: torch.device) -> _Scratch:
    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    tiles = width // _TILE
    return _Scratch(
        floats(rows, heads, width),
        floats(rows, heads, splits),
        floats(rows, heads, splits),
        floats(rows, width),
        floats(rows, tiles),
        floats(rows, tiles),
        torch.empty((rows, tiles), dtype=torch.int64, device=device),
    )


def _bits(n: int) -> int:
    """log2 of the next power of two; n >= 1."""
    return (n - 1).bit_length()


def _launch_shape(group: int, head_dim: int, key_bytes: int) -> dict[str, Any]:
    """Block sizes of the logits kernel: the key block in shared memory stays at 32 KiB or less."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if head_dim > 128:
        block_d = 128 if head_dim % 128 == 0 else 64  # 576 = 9 x 64
    block_g = max(16, triton.next_power_of_2(group))
    if block_g > 128:
        block_d = min(block_d, 64)  # the queries take shared memory too
    return {
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
        "BLOCK_N": 32 if block_g > 64 or key_bytes > 2 else 64,
        "num_warps": 8 if block_g > 64 else 4,
        "num_stages": 3 if key_bytes <= 2 else 2,
    }


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


# do_not_specialize below: scalars that change from call to call must not compile a kernel for 1, one for
# multiples of 16 and one for the rest.


@triton.jit
def _extent(row, row_request, row_position, window_rows, window, requests, max_keys, UNIT: tl.constexpr):
    """(request, first visible key, its unit's start, one past the last visible key, whether it fits)."""
    request = tl.load(row_request + row).to(tl.int64)
    position = tl.load(row_position + row).to(tl.int64)
    width = window
    if window_rows is not None:
        width = tl.load(window_rows + row).to(tl.int64)
    fits = (position < 0) | ((position < max_keys) & (request >= 0) & (request < requests))
    end = tl.where(fits & (position >= 0), position + 1, 0).to(tl.int32)
    first = tl.where(width < 0, 0, tl.maximum(end - width, 0)).to(tl.int32)
    base = first // UNIT * UNIT
    # padding rows may name no request; whatever is loaded for them is not used
    return tl.minimum(tl.maximum(request, 0), requests - 1), first, base, end, fits


@triton.jit
def _split_keys(base, end, splits, UNIT: tl.constexpr):
    """Keys per split, a multiple of UNIT: every row uses the splits that it fills, from 0 up."""
    units = (end - base + UNIT - 1) // UNIT
    return tl.maximum((units + splits - 1) // splits, 1) * UNIT


@triton.jit
def _selection_key(score, index):
    """int64 that orders by score, then by lower index; -1, below all others, for NaN."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(score >= 0, (bits << 32) | (0x7FFFFFFF - index).to(tl.int64), -1)


@triton.jit
def _selected_index(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _merge(x, RUN: tl.constexpr, BITS: tl.constexpr):
    """Sort the bitonic runs of 2**RUN in x [2] * BITS: downwards and upwards in turn, a single one upwards."""
    index = tl.reshape(tl.arange(0, 2**BITS), [2] * BITS)
    for bit in tl.static_range(RUN - 1, -1, -1):
        # the partner, whose index differs in this bit: integers wrap, so the difference is exact
        other = tl.sum(x, axis=BITS - 1 - bit, keep_dims=True) - x
        larger = (index >> bit) & 1
        if RUN < BITS:
            larger = larger ^ ((index >> RUN) & 1) ^ 1
        x = tl.where(larger != 0, tl.maximum(x, other), tl.minimum(x, other))
    return x


@triton.jit
def _best_of_both(best, found, K_BITS: tl.constexpr, BITS: tl.constexpr):
    """The 2**K_BITS largest of ``found`` [2**BITS] and ``best`` [2**K_BITS], a bitonic run like the result."""
    x = tl.reshape(found, [2] * BITS)
    for run in tl.static_range(1, K_BITS + 1):
        x = _merge(x, run, BITS)
    # of a run that goes down and one that goes up, the larger of each pair are the best of both, and bitonic
    for j in tl.static_range(BITS - K_BITS):
        x = tl.max(x, axis=BITS - 1 - j - K_BITS)
        x = _merge(x, K_BITS, BITS - 1 - j)
    return tl.maximum(tl.reshape(x, [2**K_BITS]), _downwards(best, K_BITS))


@triton.jit
def _downwards(best, K_BITS: tl.constexpr):
    # bitwise not reverses the order of integers and overflows on none
    return tl.reshape(~_merge(tl.reshape(~best, [2] * K_BITS), K_BITS, K_BITS), [2**K_BITS])


@triton.jit(do_not_specialize=["page_size", "window", "requests", "max_keys", "splits"])
def _logits_kernel(
    q, q_row, q_head, q_dim, cache, k_page, k_slot, k_head, k_dim,
    page_table, table_row, table_column, page_size,
    row_request, row_position, window_rows, window, requests, max_keys,
    scale, k_scale, k_scale_step, alibi_slopes, softcap, selected, selected_step,
    logits, split_max, split_sum, heads, group, width, splits,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    request, first, base, end, _ = _extent(
        row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    keys = _split_keys(base, end, splits, UNIT)
    start = base + split * keys
    stop = tl.minimum(start + keys, end)
    if start >= stop:
        return

    # [G]: the query heads that share this kv head
    g = tl.arange(0, BLOCK_G)
    head = kv_head * group + g
    live = g < group
    if selected is not None:
        live = live & (tl.load(selected + request * selected_step + head, mask=live, other=0) != 0)
        if tl.sum(live.to(tl.int32)) == 0:
            return  # nobody averages over these heads: don't read their keys
    factor = scale
    if k_scale is not None:
        factor = scale * tl.load(k_scale + kv_head * k_scale_step).to(tl.float32)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=live, other=0).to(tl.float32)

    # [G, D]
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    q_ptr = q + row * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :] * q_dim
    if HEAD_DIM <= BLOCK_D:
        q_block = tl.load(q_ptr, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0).to(DOT_TYPE)
    k_base = cache + kv_head.to(tl.int64) * k_head
    table = page_table + request * table_row
    out_ptr = logits + (row * heads + head)[:, None] * width - base

    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.full([BLOCK_G], 0, tl.float32)
    for n in range(start, stop, BLOCK_N):
        # [N]: hidden keys, and the pages that hold only those, are never touched
        s = n + tl.arange(0, BLOCK_N)
        visible = (s >= first) & (s < stop)
        page = tl.load(table + (s // page_size).to(tl.int64) * table_column, mask=visible, other=0).to(tl.int64)
        k_ptr = k_base + page * k_page + (s % page_size).to(tl.int64) * k_slot
        # [G, N] += [G, D] x [D, N]
        if HEAD_DIM <= BLOCK_D:
            k_mask = (d < HEAD_DIM)[:, None] & visible[None, :]
            k_block = tl.load(k_ptr[None, :] + d[:, None] * k_dim, mask=k_mask, other=0.0).to(DOT_TYPE)
            z = tl.dot(q_block, k_block, input_precision="ieee")
        else:
            z = tl.full([BLOCK_G, BLOCK_N], 0, tl.float32)
            for d0 in range(0, HEAD_DIM, BLOCK_D):
                in_head = d0 + d < HEAD_DIM
                q_block = tl.load(q_ptr + d0 * q_dim, mask=live[:, None] & in_head[None, :], other=0).to(DOT_TYPE)
                k_mask = in_head[:, None] & visible[None, :]
                k_block = tl.load(k_ptr[None, :] + (d0 + d)[:, None] * k_dim, mask=k_mask, other=0.0).to(DOT_TYPE)
                z = tl.dot(q_block, k_block, z, input_precision="ieee")
        z = z * factor
        if alibi_slopes is not None:
            z += slope[:, None] * (s - (end - 1)).to(tl.float32)[None, :]
        # the soft-cap and exp would make an infinity look like a number; a NaN stays in the sum
        z = tl.where(tl.abs(z) < float("inf"), z, float("nan"))
        if SOFTCAP:
            z = softcap * (1 - 2 / (tl.exp(2 * (z / softcap)) + 1))  # tanh, exact at both ends
        shown = live[:, None] & visible[None, :]
        tl.store(out_ptr + s[None, :], z, mask=shown)
        z = tl.where(shown, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        # no key so far for this head leaves the maximum at -inf
        shift = tl.where(new_top == -float("inf"), 0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        top = new_top
    part = (row * heads + head) * splits + split
    tl.store(split_max + part, top, mask=live)
    tl.store(split_sum + part, total, mask=live)


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "splits"])
def _average_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    logits, split_max, split_sum, attention, tile_mass, tile_entropy, tile_best,
    sinks, selected, selected_step, first_reported, heads, width, splits,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, base, end, _ = _extent(
        row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    keys = _split_keys(base, end, splits, UNIT)
    start = base + split * keys
    stop = tl.minimum(start + keys, end)
    if start >= stop:
        return

    # [H]: each head's maximum and normaliser from its splits [H, S]
    h = tl.arange(0, BLOCK_H)
    live = h < heads
    if selected is not None:
        live = live & (tl.load(selected + request * selected_step + h, mask=live, other=0) != 0)
    j = tl.arange(0, BLOCK_S)
    part = (row * heads + h)[:, None] * splits + j[None, :]
    filled = live[:, None] & (j * keys < end - base)[None, :]
    tops = tl.load(split_max + part, mask=filled, other=-float("inf"))
    sums = tl.load(split_sum + part, mask=filled, other=0)
    top = tl.max(tops, axis=1)
    if sinks is not None:
        sink = tl.load(sinks + h, mask=live, other=0).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(live, top, 0)
    total = tl.sum(sums * tl.exp(tops - top[:, None]), axis=1)
    if sinks is not None:
        total += tl.exp(sink - top)
    # no selected head: 0 / 0, so that the row is seen to be broken
    share = 1 / tl.where(live, total, 1)
    count = tl.sum(live.to(tl.float32))

    report_from = first
    if first_reported is not None:
        report_from = tl.maximum(first, tl.load(first_reported + request))
    for n in range(start, stop, UNIT):
        # [H, N] -> [N]
        s = n + tl.arange(0, UNIT)
        visible = (s >= first) & (s < stop)
        shown = live[:, None] & visible[None, :]
        z = tl.load(logits + (row * heads + h)[:, None] * width + (s - base)[None, :], mask=shown, other=-float("inf"))
        p_h = tl.where(shown, tl.exp(z - top[:, None]) * share[:, None], 0)
        a = tl.where(visible, tl.sum(p_h, axis=0) / count, 0)
        tl.store(attention + row * width + (s - base), a)
        # [N] -> [tiles]; the clamp keeps 0 ln 0 at 0 and NaN a NaN
        entropy = -a * tl.log(tl.maximum(a, 1.1754944e-38))
        best = tl.where(visible & (s >= report_from), _selection_key(a, s - base), -1)
        tile = row * (width // TILE) + (n - base) // TILE + tl.arange(0, UNIT // TILE)
        tl.store(tile_mass + tile, tl.sum(tl.reshape(a, [UNIT // TILE, TILE]), axis=1))
        tl.store(tile_entropy + tile, tl.sum(tl.reshape(entropy, [UNIT // TILE, TILE]), axis=1))
        tl.store(tile_best + tile, tl.max(tl.reshape(best, [UNIT // TILE, TILE]), axis=1))


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "span_count", "tiles"])
def _masses_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    attention, tile_mass, spans, span_request, span_row, span_end, histogram, span_mass, span_count, width, tiles,
    BIN_STARTS: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, first, base, end, _ = _extent(
        row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    BINS: tl.constexpr = len(BIN_STARTS)
    # [R]: keys low..high-1 of the bins (part 0) or of some spans; distance d is key end - 1 - d
    i = tl.arange(0, RANGES)
    low = tl.where(i < BINS, first, end)
    high = tl.where(i < BINS, end, 0)
    if part == 0:
        for b in tl.static_range(1, BINS):
            high = tl.where(i == b, end - BIN_STARTS[b], high)
            low = tl.where(i == b - 1, end - BIN_STARTS[b], low)
    out = histogram + row * BINS + i
    kept = i < BINS
    if spans is not None:  # noqa: SIM102 - decided when the kernel is compiled, unlike the next
        if part > 0:
            n = (part - 1) * RANGES + i
            kept = n < span_count
            span = spans + request * span_request + n * span_row
            # clipped before they become int32: an open end may be any number
            low = tl.minimum(tl.maximum(tl.load(span, mask=kept, other=0), 0), end).to(tl.int32)
            high = tl.minimum(tl.maximum(tl.load(span + span_end, mask=kept, other=0), 0), end).to(tl.int32)
            out = span_mass + row * span_count + n
    low = tl.maximum(low, first) - base
    high = tl.minimum(high, end) - base

    # [R, TILE]: a ragged start and a ragged end; in between whole tiles
    low_tile = (low + TILE - 1) // TILE
    high_tile = tl.maximum(high, 0) // TILE
    head_end = tl.minimum(low_tile * TILE, high)
    tail_start = tl.maximum(high_tile * TILE, head_end)
    t = tl.arange(0, TILE)
    head = low[:, None] + t[None, :]
    tail = tail_start[:, None] + t[None, :]
    scores = attention + row * width
    ragged = tl.load(scores + head, mask=head < head_end[:, None], other=0)
    ragged += tl.load(scores + tail, mask=tail < high[:, None], other=0)
    # [R, tiles] in blocks
    whole = tl.full([RANGES, BLOCK], 0, tl.float32)
    used = (end - base) // TILE
    for c in range(0, used, BLOCK):
        tile = c + tl.arange(0, BLOCK)
        mass = tl.load(tile_mass + row * tiles + tile, mask=tile < used, other=0)
        inside = (tile[None, :] >= low_tile[:, None]) & (tile[None, :] < high_tile[:, None])
        whole += tl.where(inside, mass[None, :], 0)
    tl.store(out, tl.sum(ragged, axis=1) + tl.sum(whole, axis=1), mask=kept)


@triton.jit(do_not_specialize=["window", "requests", "max_keys", "top_k", "tiles"])
def _select_kernel(
    row_request, row_position, window_rows, window, requests, max_keys,
    attention, tile_mass, tile_entropy, tile_best,
    first_reported, positions, scores, entropy, top_k, width, tiles,
    RENORMALISE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    K_BITS: tl.constexpr, T_BITS: tl.constexpr, W_BITS: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 2**K_BITS
    BLOCK_T: tl.constexpr = 2**T_BITS
    BLOCK_W: tl.constexpr = 2**W_BITS
    row = tl.program_id(0).to(tl.int64)
    request, first, base, end, fits = _extent(
        row, row_request, row_position, window_rows, window, requests, max_keys, UNIT
    )
    report_from = first
    if first_reported is not None:
        report_from = tl.maximum(first, tl.load(first_reported + request))

    # [T] -> [K]: the tiles with the best keys
    used = (end - base + TILE - 1) // TILE
    best = tl.full([K], -1, tl.int64)
    masses = tl.full([BLOCK_T], 0, tl.float32)
    entropies = tl.full([BLOCK_T], 0, tl.float32)
    for c in range(0, used, BLOCK_T):
        tile = c + tl.arange(0, BLOCK_T)
        ptr = row * tiles + tile
        masses += tl.load(tile_mass + ptr, mask=tile < used, other=0)
        entropies += tl.load(tile_entropy + ptr, mask=tile < used, other=0)
        found = tl.load(tile_best + ptr, mask=tile < used, other=-1)
        best = _best_of_both(best, found, K_BITS, T_BITS)

    # [K, W] -> [K]: the best keys of those tiles, W columns at a time
    first_key = _selected_index(best) // TILE * TILE
    chosen = best >= 0
    best = tl.full([K], -1, tl.int64)
    for w in range(0, TILE, BLOCK_W):
        index = first_key[:, None] + w + tl.arange(0, BLOCK_W)[None, :]
        reported = chosen[:, None] & (index >= report_from - base) & (index < end - base)
        a = tl.load(attention + row * width + index, mask=reported, other=0)
        found = tl.where(reported, _selection_key(a, index), -1)
        best = _best_of_both(best, found, K_BITS, K_BITS + W_BITS)
    best = _downwards(best, K_BITS)
    reported = best >= 0
    column = tl.arange(0, K)
    kept = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(scores + row * top_k + column, tl.where(reported, kept, 0), mask=column < top_k)
    index = tl.where(reported, _selected_index(best) + base, -1)
    tl.store(positions + row * top_k + column, index, mask=column < top_k)

    count = end - first
    spread = tl.sum(entropies)
    if RENORMALISE:  # H(a / S) = H(a) / S + ln S
        mass = tl.sum(masses)
        # a sink that takes everything leaves no distribution to speak of: entropy 0
        spread = tl.where(mass == 0, 0, spread / mass + tl.log(mass))
    # one visible key: 0, or NaN if it is broken
    spread = tl.where(count > 1, spread / tl.log(tl.maximum(count, 2).to(tl.float32)), spread * 0)
    spread = tl.where(count > 0, spread, 0)
    tl.store(entropy + row, tl.where(fits, spread, float("nan")))


_INTERPRETED = not isinstance(_logits_kernel, triton.JITFunction)
