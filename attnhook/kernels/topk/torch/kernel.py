"""The two entries of the torch path: `attention` computes the rows block by block, `reduce` sums them up."""

from __future__ import annotations

from typing import Any

import torch

from attnhook.kernels.topk.torch.attention import blocks, result_type
from attnhook.kernels.topk.torch.reduce import empty_result, reduce_block
from attnhook.kernels.topk.types import PagedKeys, TopK


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
    """See `attnhook.kernels.topk.topk_attention`."""
    out = empty_result(q.shape[0], top_k, 0 if spans is None else spans.shape[1], q.device, result_type(q))
    span_list = None if spans is None else spans.tolist()
    report_from = None if first_reported is None else first_reported.tolist()
    for block in blocks(
        q, keys, row_request, row_position, scale=scale, softcap=softcap, window=window, sinks=sinks,
        alibi_slopes=alibi_slopes, head_mask=head_mask,
    ):  # fmt: skip
        reduce_block(
            block.attention, block.lead, block.first, block.position, block.firsts, TopK(*(x[block.rows] for x in out)),
            normalise=sinks is not None,
            spans=() if span_list is None else span_list[block.request],
            report_from=0 if report_from is None else report_from[block.request],
        )  # fmt: skip
    return out


def attention_rows(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    width: int,
    lse: torch.Tensor | None = None,
    **softmax: Any,
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`."""
    dense = torch.zeros((q.shape[0], width), dtype=result_type(q), device=q.device)
    for block in blocks(q, keys, row_request, row_position, **softmax):
        seen = block.attention[:, block.lead :]
        dense[block.rows, block.first : block.first + seen.shape[1]] = seen
    return dense
