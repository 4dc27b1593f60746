"""The oracle: top-k attention written as its definition, one row at a time, in plain torch.

Computes in float64 whatever it is given, so that it can judge the other implementations.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnhook.kernels.topk.types import PagedKeys, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS


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
    """See `attnhook.kernels.topk.topk_attention`; scores, histogram and entropy come back in float64."""
    rows = q.shape[0]
    span_count = 0 if spans is None else spans.shape[1]
    f64 = {"dtype": torch.float64, "device": q.device}
    positions = torch.full((rows, top_k), -1, dtype=torch.int32, device=q.device)
    scores = torch.zeros((rows, top_k), **f64)  # type: ignore[call-overload]
    histogram = torch.zeros((rows, BINS), **f64)  # type: ignore[call-overload]
    entropy = torch.zeros((rows,), **f64)  # type: ignore[call-overload]
    span_mass = torch.zeros((rows, span_count), **f64)  # type: ignore[call-overload]

    for t in range(rows):
        request, p = int(row_request[t]), int(row_position[t])
        width = int(window[t]) if isinstance(window, torch.Tensor) else window
        first = 0 if width < 0 else max(0, p - width + 1)
        a = row_attention(
            q[t], keys, request, p, first, scale=scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
            head_mask=None if head_mask is None else head_mask.expand(keys.page_table.shape[0], -1)[request],
            lse=None if lse is None else lse[t],
        )  # fmt: skip
        seen = torch.arange(first, p + 1, device=q.device)

        reportable = seen >= (0 if first_reported is None else int(first_reported[request]))
        # a stable sort keeps the lower position first among equal scores
        order = torch.sort(a[reportable], descending=True, stable=True).indices[:top_k]
        positions[t, : len(order)] = seen[reportable][order].int()
        scores[t, : len(order)] = a[reportable][order]

        distance = p - seen
        for i, start in enumerate(BIN_STARTS):
            end = BIN_STARTS[i + 1] if i + 1 < BINS else p + 1
            histogram[t, i] = a[(distance >= start) & (distance < end)].sum()
        # a sink that takes everything leaves no distribution to speak of: entropy 0
        normalised = a if sinks is None or a.sum() == 0 else a / a.sum()
        if len(seen) > 1:
            entropy[t] = torch.special.entr(normalised).sum() / math.log(len(seen))
        elif not torch.isfinite(a).all():
            entropy[t] = math.nan
        for n in range(span_count):
            start, end = (int(x) for x in spans[request, n])  # type: ignore[index]
            span_mass[t, n] = a[(seen >= start) & (seen < end)].sum()
    return TopK(positions, scores, histogram, entropy, span_mass)


def attention_rows(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    width: int,
    window: int | torch.Tensor = -1,
    head_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    **softmax: Any,
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`; float64."""
    dense = torch.zeros((q.shape[0], width), dtype=torch.float64, device=q.device)
    for t in range(q.shape[0]):
        request, p = int(row_request[t]), int(row_position[t])
        size = int(window[t]) if isinstance(window, torch.Tensor) else window
        first = 0 if size < 0 else max(0, p - size + 1)
        mask = None if head_mask is None else head_mask.expand(keys.page_table.shape[0], -1)[request]
        own = None if lse is None else lse[t]
        dense[t, first : p + 1] = row_attention(q[t], keys, request, p, first, head_mask=mask, lse=own, **softmax)
    return dense


def row_attention(
    q: torch.Tensor,
    keys: PagedKeys,
    request: int,
    position: int,
    first: int,
    *,
    head_mask: torch.Tensor | None = None,
    **softmax: Any,
) -> torch.Tensor:
    """Head-averaged attention float64 ``[position + 1 - first]`` of one query ``[Hq, D]``."""
    p = head_probabilities(q, keys, request, position, first, **softmax)
    return p.mean(0) if head_mask is None else p[head_mask.bool()].mean(0)


def head_probabilities(
    q: torch.Tensor,
    keys: PagedKeys,
    request: int,
    position: int,
    first: int,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each head's attention float64 ``[Hq, position + 1 - first]`` of one query ``[Hq, D]``."""
    heads, head_dim = q.shape
    seen = torch.arange(first, position + 1, device=q.device)
    page = keys.page_table[request, seen // keys.page_size].long()
    k = keys.pages(head_dim)[page, seen % keys.page_size].double()  # [S, Hkv, D]
    if keys.k_scale is not None:
        factor = torch.as_tensor(keys.k_scale, dtype=torch.float64, device=q.device)
        k = k * (factor.view(1, -1, 1) if factor.dim() else factor)
    k = k.repeat_interleave(heads // keys.num_kv_heads, dim=1)  # [S, Hq, D]
    z = scale * torch.einsum("hd,shd->hs", q.double(), k)
    if alibi_slopes is not None:
        z = z + alibi_slopes.double()[:, None] * (seen - position)
    # the soft-cap and softmax can make a number of an infinity
    z = torch.where(torch.isfinite(z), z, math.nan)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if lse is not None:
        return torch.exp(z - torch.where(torch.isfinite(lse), lse, math.nan).double()[:, None])
    if sinks is None:
        return torch.softmax(z, dim=-1)
    return torch.softmax(torch.cat([z, sinks.double()[:, None]], dim=-1), dim=-1)[:, :-1]
