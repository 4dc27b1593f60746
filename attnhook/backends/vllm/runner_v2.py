"""vLLM's second model runner: when a pass runs, and which rows it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch

from attnhook.backends.vllm.worker import Runner, ours, running
from attnhook.plugins.engine import Computed
from attnhook.serving.guard import safely

Original = Callable[..., Any]


def wrap_prepare_attn(original: Original) -> Original:
    """``GPUModelRunner.prepare_attn``, which runs for real batches only, right before their pass."""

    @wraps(original)
    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        tables = original(self, input_batch, *args, **kwargs)
        own = ours(self)
        if own is not None and own.asked:
            safely(own.worker.begin, _rows(self, own, input_batch), own.asks.keys() & set(input_batch.req_ids))
            running(own)
        return tables

    return prepare_attn


def _rows(runner: Any, own: Runner, batch: Any) -> Iterator[Computed]:
    """The asking requests' rows in a batch."""
    asking = [(i, request) for i, request in enumerate(batch.req_ids) if request in own.asks]
    starts = [int(batch.query_start_loc_np[i]) for i, _ in asking]
    firsts = [int(batch.num_computed_tokens_np[i]) for i, _ in asking]
    # the runner's own count runs ahead of the accepted tokens where drafts are verified asynchronously
    if runner.speculative_config is not None:
        firsts = batch.positions[torch.tensor(starts, device=batch.positions.device, dtype=torch.int64)].tolist()
    for (i, request), start, first in zip(asking, starts, firsts, strict=True):
        packed, prompt_end = own.asks[request]
        count = int(batch.query_start_loc_np[i + 1]) - start
        drafts = 0 if batch.num_draft_tokens_per_req is None else int(batch.num_draft_tokens_per_req[i])
        sampled = 0 if first + count < int(batch.prefill_len_np[i]) else 1 + drafts
        yield Computed(request, packed, i, start, first, count, sampled, prompt_end)
