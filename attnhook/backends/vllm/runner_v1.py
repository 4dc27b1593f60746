"""vLLM's first model runner: when a pass runs, and which rows it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch

from attnhook.backends.vllm.worker import Runner, ours, running
from attnhook.plugins.engine import Computed
from attnhook.serving.guard import safely

Original = Callable[..., Any]


def wrap_model_forward(original: Original) -> Original:
    """``GPUModelRunner._model_forward``: the pass itself, with its metadata in vLLM's forward context."""

    @wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = ours(self)
        if own is None or not own.asked:
            return original(self, *args, **kwargs)
        asking = own.asks.keys() & own.scheduled.num_scheduled_tokens.keys()
        safely(own.worker.begin, _rows(self, own, kwargs.get("positions")), asking)
        running(own)
        try:
            output = original(self, *args, **kwargs)
        except BaseException:
            own.worker.abandon()
            raise
        safely(own.finish, _metadata())
        return output

    return _model_forward


def _metadata() -> Any:
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata


def _rows(runner: Any, own: Runner, positions: torch.Tensor | None) -> Iterator[Computed]:
    """The asking requests' rows in a batch."""
    scheduled, batch = own.scheduled, runner.input_batch
    drafts = scheduled.scheduled_spec_decode_tokens
    asking = [(i, r) for i, r in enumerate(batch.req_ids) if r in own.asks and r in scheduled.num_scheduled_tokens]
    starts = [int(runner.query_start_loc.np[i]) for i, _ in asking]
    firsts = [int(batch.num_computed_tokens_cpu[i]) for i, _ in asking]
    # the runner's own count runs ahead of the accepted tokens where drafts are verified asynchronously
    if positions is not None and positions.dim() == 1:
        if positions.device.type == "cpu":
            known = positions.numpy()
            firsts = [int(known[start]) for start in starts]
        elif runner.speculative_config:
            firsts = positions[torch.tensor(starts, device=positions.device, dtype=torch.int64)].tolist()
    for (i, request), start, first in zip(asking, starts, firsts, strict=True):
        packed, prompt_end = own.asks[request]
        sampled = 0 if bool(runner.discard_request_mask.np[i]) else 1 + len(drafts.get(request, ()))
        count = scheduled.num_scheduled_tokens[request]
        yield Computed(request, packed, i, start, first, count, sampled, prompt_end)
