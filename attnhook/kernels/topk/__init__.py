"""Exact top-k attention and full-distribution features of query rows over paged keys.

`topk_attention` picks the implementation by device: Triton on GPUs, the vectorised torch path
elsewhere. ``ATTNHOOK_KERNEL=naive|torch|triton`` forces one, which is how they are compared.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from attnhook.errors import OptionError
from attnhook.kernels.topk.types import PagedKeys, TopK, check_inputs
from attnhook.options import KERNELS

if TYPE_CHECKING:
    import torch

__all__ = ["PagedKeys", "TopK", "topk_attention"]


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
    """Head-averaged attention of each query row over its visible keys, reduced to what a record keeps.

    For row t of request r at position p the visible keys are ``max(0, p - W + 1) .. p``. With
    ``z_h(s) = softcap(scale * <q_h, k(s)> + slope_h * (s - p))`` and
    ``p_h = exp(z_h) / (sum exp(z_h) + exp(sink_h))``, the row's attention is the mean of ``p_h`` over
    the selected heads. Everything is accumulated in float32 (float64 inputs: float64).

    Parameters
    ----------
    q : [T, Hq, D] float
        Queries as the engine's attention sees them (after rotary embedding). T may be 0.
    keys : PagedKeys
        Paged view of the key cache, Hkv heads; Hq must be a multiple of Hkv.
    row_request : [T] int32 or int64
        Row of ``keys.page_table`` that each query belongs to.
    row_position : [T] int32 or int64
        Position p of each query in its request, counted from 0. The page table must cover 0..p,
        except positions that the window hides, whose entries are never read.
    top_k : int
        Entries to keep per row, >= 1.
    scale : float
        Factor on the dot product.
    softcap : float
        ``c`` of ``c * tanh(z / c)``; 0 turns it off.
    window : int or [T] int32
        Number of visible keys, the row's own included; < 0 means all of 0..p. One value per row
        expresses chunked attention and left padding too.
    sinks : [Hq] float, optional
        Learned logit per head that takes part in the softmax and belongs to no key.
    alibi_slopes : [Hq] float, optional
        ALiBi slope per head.
    head_mask : [Hq] or [R, Hq] bool, optional
        Heads to average over (per request); every row needs at least one. Default: all.
    spans : [R, n, 2] int32 or int64, optional
        Half-open position ranges per request whose attention mass is wanted.
    first_reported : [R] int32 or int64, optional
        Positions below this are left out of the top k (and of nothing else).

    Returns
    -------
    TopK
        ``positions`` and ``scores`` are sorted by descending score, ties to the lower position; rows
        with fewer than ``top_k`` reportable keys end in position -1, score 0. A NaN or infinity in a
        row's q or visible keys makes that row's entropy NaN: the caller must drop it.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices do not fit together.
    """
    check_inputs(
        q, keys, row_request, row_position, top_k, window, sinks, alibi_slopes, head_mask, spans, first_reported
    )
    forced = os.environ.get("ATTNHOOK_KERNEL")
    if forced and forced not in KERNELS:
        raise OptionError("ATTNHOOK_KERNEL", f"ATTNHOOK_KERNEL={forced!r} is not one of {', '.join(KERNELS)}")
    name = forced or ("triton" if q.device.type in ("cuda", "xpu") and _has_triton() else "torch")
    if name == "triton":
        from attnhook.kernels.topk import triton as impl
    elif name == "naive":
        from attnhook.kernels.topk import naive as impl  # type: ignore[no-redef]
    else:
        from attnhook.kernels.topk import cpu as impl  # type: ignore[no-redef]
    return impl.topk_attention(
        q,
        keys,
        row_request,
        row_position,
        top_k=top_k,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        head_mask=head_mask,
        spans=spans,
        first_reported=first_reported,
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
