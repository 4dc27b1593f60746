"""The two entries of the torch path: `attention` computes the rows block by block, `reduce` sums them up."""

from __future__ import annotations

import torch

from attnhook.kernels.topk.torch.attention import Block, blocks, result_type
from attnhook.kernels.topk.torch.reduce import empty_result, of_head, reduce_block
from attnhook.kernels.topk.types import LayerRows, PerKey, Selection, TopK


def topk_attention(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`."""
    q, spans, first_reported = layer.q, selection.spans, selection.first_reported
    asked = selection.per_head
    out = empty_result((q.shape[0], q.shape[1]), selection, q.device, result_type(q))
    span_list = None if spans is None else spans.tolist()
    report_from = None if first_reported is None else first_reported.tolist()
    for block in blocks(layer, row_request, selection.head_mask, asked, selection.per_key):
        if selection.per_key is not None and layer.key_mass is not None:
            add_by_key(block, selection.per_key, layer.keys.num_kv_heads, layer.key_mass)
        own = TopK(*(x[block.rows] for x in out))

        def reduce(attention: torch.Tensor, found: TopK, block: Block = block) -> None:
            reduce_block(
                attention, block.lead, block.first, block.position, block.firsts, found,
                normalise=layer.softmax.sinks is not None,
                spans=() if span_list is None else span_list[block.request],
                report_from=0 if report_from is None else report_from[block.request],
            )  # fmt: skip

        reduce(block.attention, own)
        if block.lse is not None:
            own.head_lse[:] = block.lse.T
        for h in range(q.shape[1] if asked.scores else 0):
            block.attention[:, block.lead :] = block.heads[h]  # the mean has been used, and its zeros ahead stay
            reduce(block.attention, of_head(own, h))
    return out


def add_by_key(block: Block, per_key: PerKey, kv_heads: int, key_mass: torch.Tensor) -> None:
    """Add a block's attention to ``key_mass`` [S, G, W]; see `PerKey`."""
    attention = block.attention[None, :, block.lead :]  # [G, R, N]
    if per_key.kv_heads:
        attention = block.heads.view(kv_heads, -1, *attention.shape[1:]).mean(1)
        broken = torch.isnan(block.attention[:, block.lead :].sum(-1))
        attention[:, broken] = torch.nan  # where a logit of any head is none
    add_rows(attention, per_key.slot[block.rows], key_mass[..., block.first :])


def add_rows(attention: torch.Tensor, slot: torch.Tensor, key_mass: torch.Tensor) -> None:
    """Add attention [G, R, N] of rows to the sums of their slots [R]; ``key_mass`` is [S, G, N or more]."""
    slots, counts = torch.unique_consecutive(slot, return_counts=True)
    for one, rows in zip(slots.tolist(), torch.split(attention, counts.tolist(), dim=1), strict=True):
        key_mass[one, :, : rows.shape[2]] += rows.sum(1)


def attention_rows(
    layer: LayerRows, row_request: torch.Tensor, *, width: int, head_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`."""
    q = layer.q
    dense = torch.zeros((q.shape[0], width), dtype=result_type(q), device=q.device)
    for block in blocks(layer, row_request, head_mask):
        seen = block.attention[:, block.lead :]
        dense[block.rows, block.first : block.first + seen.shape[1]] = seen
    return dense
