"""The oracle: top-k attention written as its definition, one row at a time, in plain torch.

Computes in float64 whatever it is given, so that it can judge the other implementations.
"""

from __future__ import annotations

import math

import torch

from attnhook.kernels.topk.types import LayerRows, PagedKeys, Selection, Softmax, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS


def topk_attention(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`; scores, histogram and entropy come back in float64."""
    q, _, row_position, softmax = layer
    top_k, _, spans, first_reported = selection
    rows = q.shape[0]
    span_count = selection.span_count
    f64 = {"dtype": torch.float64, "device": q.device}
    positions = torch.full((rows, top_k), -1, dtype=torch.int32, device=q.device)
    scores = torch.zeros((rows, top_k), **f64)  # type: ignore[call-overload]
    histogram = torch.zeros((rows, BINS), **f64)  # type: ignore[call-overload]
    entropy = torch.zeros((rows,), **f64)  # type: ignore[call-overload]
    span_mass = torch.zeros((rows, span_count), **f64)  # type: ignore[call-overload]

    for t in range(rows):
        request, p = int(row_request[t]), int(row_position[t])
        first, a = row_attention(layer, t, request, selection.head_mask)
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
        normalised = a if softmax.sinks is None or a.sum() == 0 else a / a.sum()
        if len(seen) > 1:
            entropy[t] = torch.special.entr(normalised).sum() / math.log(len(seen))
        elif not torch.isfinite(a).all():
            entropy[t] = math.nan
        for n in range(span_count):
            start, end = (int(x) for x in spans[request, n])  # type: ignore[index]
            span_mass[t, n] = a[(seen >= start) & (seen < end)].sum()
    return TopK(positions, scores, histogram, entropy, span_mass)


def attention_rows(
    layer: LayerRows, row_request: torch.Tensor, *, width: int, head_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`; float64."""
    dense = torch.zeros((layer.q.shape[0], width), dtype=torch.float64, device=layer.q.device)
    for t, request in enumerate(row_request.tolist()):
        first, a = row_attention(layer, t, request, head_mask)
        dense[t, first : first + len(a)] = a
    return dense


def row_attention(
    layer: LayerRows, row: int, request: int, head_mask: torch.Tensor | None = None
) -> tuple[int, torch.Tensor]:
    """The first key that a row sees, and its head-averaged attention, float64, from there to its own key."""
    softmax, position = layer.softmax.rows(row), int(layer.row_position[row])
    width = int(softmax.window)
    first = 0 if width < 0 else max(0, position - width + 1)
    p = head_probabilities(layer.q[row], layer.keys, request, position, first, softmax)
    if head_mask is not None:
        p = p[head_mask.expand(layer.keys.page_table.shape[0], -1)[request].bool()]
    return first, p.mean(0)


def head_probabilities(
    q: torch.Tensor, keys: PagedKeys, request: int, position: int, first: int, softmax: Softmax
) -> torch.Tensor:
    """Each head's attention float64 ``[Hq, position + 1 - first]`` of one query ``[Hq, D]``.

    ``softmax`` is that row's: its ``lse`` is [Hq]; the window is what ``first`` says.
    """
    scale, softcap, _, sinks, alibi_slopes, lse = softmax
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
