"""Between SGLang's pipeline stages: rows go the way of the sampled tokens, from the last stage to the first.

SGLang sends a dictionary of tensors round; `customized_info` is not in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any

import torch

from attnhook.backends.sglang.requests import Row
from attnhook.serving.guard import safely
from attnhook.serving.wire import KEY


def wrap_pp_prepare_tensor_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SchedulerPPMixin._pp_prepare_tensor_dict``, in the last stage."""

    @wraps(original)
    def _pp_prepare_tensor_dict(self: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = original(self, result, *args, **kwargs)
        packed = safely(_pack, result)
        if packed is not None:
            tensors[KEY] = packed.to(tensors["next_token_ids"].device)
        return tensors

    return _pp_prepare_tensor_dict


def wrap_pp_prep_batch_result(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SchedulerPPMixin._pp_prep_batch_result``, in the other stages."""

    @wraps(original)
    def _pp_prep_batch_result(self: Any, batch: Any, metadata: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, batch, metadata, outputs, *args, **kwargs)
        packed = outputs.tensors.get(KEY)
        if packed is not None:
            safely(_unpack, packed, result)
        return result

    return _pp_prep_batch_result


def _pack(result: Any) -> torch.Tensor | None:
    rows: dict[str, Row] | None = getattr(result.logits_output, "attnhook", None)
    if not rows:
        return None
    data = pickle.dumps({request: asdict(row) for request, row in rows.items()})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpack(packed: torch.Tensor, result: Any) -> None:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    if result.logits_output is None:
        result.logits_output = LogitsProcessorOutput(next_token_logits=None)
    rows = pickle.loads(packed.cpu().numpy().tobytes())
    result.logits_output.attnhook = {request: Row(**row) for request, row in rows.items()}
