"""The oracle: top-k attention written as its definition, one row at a time, in plain torch.

Computes in float64 whatever it is given, so that it can judge the other implementations.
"""

from __future__ import annotations

import math

import torch

from attnhook.kernels.topk.types import LayerRows, PagedKeys, Selection, Softmax, TopK
from attnhook.record.fingerprint import BIN_STARTS


def topk_attention(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`; what is float32 there comes back in float64."""
    q, _, row_position, softmax, key_mass = layer
    rows, heads, _ = q.shape
    asked, mask = selection.per_head, selection.head_mask
    out = selection.results(rows, heads, torch.zeros, dtype=torch.float64, device=q.device)
    for t in range(rows):
        request, p = int(row_request[t]), int(row_position[t])
        own = selection.requests(row_request[t : t + 1].long())
        first, p_h, lse = row_probabilities(layer, t, request)
        chosen = p_h if mask is None else p_h[mask.expand(layer.keys.page_table.shape[0], -1)[request].bool()]
        sink = softmax.sinks is not None
        a = chosen.mean(0)
        out.positions[t], out.scores[t] = best(a, first, own, selection.top_k)
        out.histogram[t], out.entropy[t] = histogram(a, p - first), entropy(a, normalise=sink)
        out.span_mass[t] = masses(a, first, own)
        if key_mass is not None and selection.per_key is not None:
            groups = p_h.view(layer.keys.num_kv_heads, -1, len(a)).mean(1) if selection.per_key.kv_heads else a[None]
            key_mass[int(selection.per_key.slot[t]), :, first : p + 1] += groups
        for h in range(heads):
            if asked.top_k:
                out.head_positions[t, h], out.head_scores[t, h] = best(p_h[h], first, own, asked.top_k)
            if asked.fingerprint:
                out.head_histogram[t, h] = histogram(p_h[h], p - first)
                out.head_entropy[t, h] = entropy(p_h[h], normalise=sink)
            if asked.spans:
                out.head_span_mass[t, h] = masses(p_h[h], first, own)
            if asked.lse:
                out.head_lse[t, h] = lse[h]
    return out


def best(a: torch.Tensor, first: int, selection: Selection, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int32 [k] and scores [k] of the k largest of a row's attention [S] to keys from ``first`` on."""
    positions, scores = torch.full((top_k,), -1, dtype=torch.int32), a.new_zeros(top_k)
    seen = torch.arange(first, first + len(a), device=a.device)
    reportable = seen >= (0 if selection.first_reported is None else int(selection.first_reported[0]))
    # a stable sort keeps the lower position first among equal scores
    order = torch.sort(a[reportable], descending=True, stable=True).indices[:top_k]
    positions[: len(order)] = seen[reportable][order].int()
    scores[: len(order)] = a[reportable][order]
    return positions.to(a.device), scores


def histogram(a: torch.Tensor, furthest: int) -> torch.Tensor:
    """Mass of a row's attention [S] in each bin of distance; the first key is ``furthest`` away."""
    distance = furthest - torch.arange(len(a), device=a.device)
    ends = [*BIN_STARTS[1:], furthest + 1]
    bins = [a[(distance >= start) & (distance < end)].sum() for start, end in zip(BIN_STARTS, ends, strict=True)]
    return torch.stack(bins)


def entropy(a: torch.Tensor, *, normalise: bool) -> torch.Tensor:
    """Normalised entropy of a row's attention [S]; ``normalise``: a learned sink has taken some of it."""
    if len(a) == 1:
        return torch.where(torch.isfinite(a[0]), 0.0, math.nan)
    # a sink that takes everything leaves no distribution to speak of: entropy 0
    shares = a if not normalise or a.sum() == 0 else a / a.sum()
    spread: torch.Tensor = torch.special.entr(shares).sum() / math.log(len(a))
    return spread


def masses(a: torch.Tensor, first: int, selection: Selection) -> torch.Tensor:
    """Mass of a row's attention [S] to keys from ``first`` on in each of its spans, [n]."""
    seen = torch.arange(first, first + len(a), device=a.device)
    bounds = [] if selection.spans is None else selection.spans[0].tolist()
    found = [a[(seen >= start) & (seen < end)].sum() for start, end in bounds]
    return torch.stack(found) if found else a.new_zeros(0)


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
    first, p, _ = row_probabilities(layer, row, request)
    if head_mask is not None:
        p = p[head_mask.expand(layer.keys.page_table.shape[0], -1)[request].bool()]
    return first, p.mean(0)


def row_probabilities(layer: LayerRows, row: int, request: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The first key that a row sees, each head's attention float64 [Hq, S] from there on, and log-sum-exp [Hq]."""
    softmax, position = layer.softmax.rows(row), int(layer.row_position[row])
    width = int(softmax.window)
    first = 0 if width < 0 else max(0, position - width + 1)
    return first, *head_probabilities(layer.q[row], layer.keys, request, position, first, softmax)


def head_probabilities(
    q: torch.Tensor, keys: PagedKeys, request: int, position: int, first: int, softmax: Softmax
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's attention float64 ``[Hq, position + 1 - first]`` of one query ``[Hq, D]``, and log-sum-exp [Hq].

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
        total = torch.where(torch.isfinite(lse), lse, math.nan).double()
    elif sinks is None:
        total = torch.logsumexp(z, dim=-1)
    else:
        total = torch.logsumexp(torch.cat([z, sinks.double()[:, None]], dim=-1), dim=-1)
    return torch.exp(z - total[:, None]), total
