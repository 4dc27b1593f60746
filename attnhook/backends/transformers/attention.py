"""One attention call of a decoder's layer: run as it is, then reduced to the rows that sessions want."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attnhook.backends.transformers import reasons
from attnhook.backends.transformers.formula import check_layer
from attnhook.backends.transformers.frames import Frame
from attnhook.backends.transformers.layers import is_causal_attention, layer_number, sees_a_prefix
from attnhook.backends.transformers.masks import FLASH, SDPA, Visible, family, visible
from attnhook.backends.transformers.runs import local, refuse
from attnhook.capture.session import Session
from attnhook.capture.step import StepCapture
from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import PagedKeys


def attend(*args: Any, **kwargs: Any) -> Any:
    # the wrapper of torch.compiler.disable is slow for something that runs per layer and token
    if torch.compiler.is_dynamo_compiling():
        return _uncompiled(*args, **kwargs)
    return _observed(*args, **kwargs)


@torch.compiler.disable(reason="attnhook captures attention in Python")  # type: ignore[untyped-decorator,no-untyped-call]
def _uncompiled(*args: Any, **kwargs: Any) -> Any:
    return _observed(*args, **kwargs)


def _observed(
    function: Callable[..., Any],
    implementation: str | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    output = function(module, query, key, value, attention_mask, *args, **kwargs)
    frame = local.frames[-1] if local.frames else None
    if frame is None:
        return output
    if not _is_a_decoders(module, kwargs.get("is_causal")):
        frame.others[type(module)] = bool(kwargs.get("is_causal"))
        return output
    frame.saw_attention = True
    for session in frame.listening:
        if not session.active:
            continue
        try:
            with torch.no_grad():
                _observe(frame, session, implementation, module, query, key, value, attention_mask, kwargs, output[0])
        except Exception as error:
            step = frame.steps.get(session)
            frame.steps[session] = None  # a record without this layer would be a partial one
            refuse(session, error, len(step.rows) if step else 1)
    return output


def _is_a_decoders(module: Any, told: bool | None) -> bool:
    """Whether an attention call has rows of ours; ``told`` is the call's own ``is_causal``."""
    if told is not None:
        return told and isinstance(getattr(module, "layer_idx", None), int)
    # an encoder's modules may be of the same class as those of a decoder with a prefix
    return is_causal_attention(module) and (not sees_a_prefix(module) or reasons.generates(local.frames[0].model))


def _observe(
    frame: Frame,
    session: Session,
    implementation: str | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    output: torch.Tensor,
) -> None:
    if session in frame.steps and frame.steps[session] is None:
        return  # refused already, or no rows to capture
    batch, heads, q_len, head_dim = query.shape
    step = frame.step(session, batch, q_len, heads, mask)
    if step is None:
        return
    number = layer_number(frame.model, module)
    if number not in step.wanted:
        return
    if number not in step.missing:
        raise UnsupportedError(
            f"layer {number} of {type(frame.model).__name__} made a second attention call in one forward pass, so its "
            "record would be one of two; such a model cannot be captured"
        )
    kind = family(implementation)
    _refuse_arguments(kwargs)
    reasons.refuse_compressed(module)
    window = kwargs.get("sliding_window") if kind == FLASH else None  # elsewhere the mask holds it
    if kind == FLASH:
        _refuse_packed(kwargs)
    name = (session, id(mask), key.shape[2], window, query.device)
    if name not in frame.plans:
        try:
            frame.plans[name] = _plan(frame, step, mask, kind, query, key.shape[2], window, not sees_a_prefix(module))
        except UnsupportedError as error:
            why = reasons.sparse(module)
            raise error if why is None else UnsupportedError(why) from error
    plan = frame.plans[name]

    softmax: dict[str, Any] = {
        "scale": kwargs["scaling"] if kwargs.get("scaling") is not None else head_dim**-0.5,
        # sdpa has no soft-cap and ignores the argument: what it computes is what we report
        "softcap": (kwargs.get("softcap") or 0.0) if kind != SDPA else 0.0,
        "sinks": kwargs.get("s_aux") if kind != SDPA else None,
    }
    keys = PagedKeys.from_dense(key)
    q = query.detach().transpose(1, 2)[plan.pick]  # [T, Hq, D]
    check_layer(module, kind, q[-1], key, value, plan.last[0], plan.seen, softmax, output[plan.last])
    step.add(number, q, keys, plan.seen.last, plan.shift, window=plan.seen.count, **softmax)


class _Plan(NamedTuple):
    """Where the rows of one step are, shared by the layers under one mask."""

    pick: Any  # index of the rows in [B, q_len]: slices where possible, so that q is a view
    last: tuple[int, int]  # (sequence, query) of the last row
    seen: Visible
    shift: torch.Tensor  # int32 [B]: slot minus position
    mask: Any  # kept so that its id stays its own


def _plan(
    frame: Frame,
    step: StepCapture,
    mask: Any,
    kind: str,
    query: torch.Tensor,
    kv_len: int,
    window: int | None,
    causal: bool,
) -> _Plan:
    batch, _, q_len, _ = query.shape
    device = query.device
    sources, indices = [row.source for row in step.rows], frame.query_index(step)
    source, index = torch.tensor(sources, device=device), torch.tensor(indices, device=device)
    position = torch.tensor([row.position for row in step.rows], device=device)
    seen = visible(mask, kind, source, index, q_len, kv_len, window, causal)
    # a static cache has places for tokens to come, a sliding one has dropped the first
    own = index + (frame.past if kv_len >= frame.past + q_len else kv_len - q_len)
    if bool((seen.last != own).any()):
        t = int((seen.last != own).nonzero()[0])
        raise UnsupportedError(
            f"the last key that a row sees is number {int(seen.last[t])} of {kv_len}, and its own is {int(own[t])}: it "
            "sees later tokens (bidirectional attention), or not itself, or keys that are no tokens; only causal "
            "attention can be captured"
        )
    if bool((seen.count > position + 1 + frame.virtual).any()):
        raise UnsupportedError("the attention mask shows a row more keys than its sequence has tokens")
    shift = torch.zeros(batch, dtype=torch.int32, device=device)
    shift[source] = (seen.last - position).to(torch.int32)
    one_run = batch == 1 and indices[-1] - indices[0] + 1 == len(indices)
    pick = (0, slice(indices[0], indices[-1] + 1)) if one_run else (source, index)
    return _Plan(pick, (sources[-1], indices[-1]), seen, shift, mask)


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    """Flash attention finds packed sequences in arguments that no mask shows."""
    position_ids = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seqlens") is not None
    if isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2 and position_ids.shape[0] == 1:
        packed = packed or bool((position_ids[0, 1:] != position_ids[0, :-1] + 1).any())
    if packed:
        raise UnsupportedError(
            "flash attention over packed sequences cannot be captured: load the model with sdpa, or pass the sequences "
            "as a batch"
        )


def _refuse_arguments(kwargs: dict[str, Any]) -> None:
    refused = {
        "position_bias": "a learned position bias",
        "head_mask": "a head mask",
        "cache": "continuous batching's paged cache",
        "indices": "sparse attention",
        "topk_indices": "sparse attention",
    }
    for name, what in refused.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"the model's attention uses {what} ({name}=), which cannot be captured yet")
