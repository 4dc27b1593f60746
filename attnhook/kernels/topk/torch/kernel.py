"""The two entries of the torch path: `attention` computes the rows block by block, `reduce` sums them up."""

from __future__ import annotations

import torch

from attnhook.kernels.topk.torch.attention import Block, blocks, result_type
from attnhook.kernels.topk.torch.reduce import empty_result, of_head, reduce_block
from attnhook.kernels.topk.types import LayerRows, Selection, TopK


def topk_attention(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`."""
    q, spans, first_reported = layer.q, selection.spans, selection.first_reported
    asked = selection.per_head
    out = empty_result((q.shape[0], q.shape[1]), selection, q.device, result_type(q))
    span_list = None if spans is None else spans.tolist()
    report_from = None if first_reported is None else first_reported.tolist()
    for block in blocks(layer, row_request, selection.head_mask, asked):
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
