"""The functions that stand in for Transformers' own while attnhook is installed.

Each calls the original with its arguments unchanged; with no session listening that is all it does.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch

from attnhook.backends.transformers import midway, places, reasons, streams, virtual
from attnhook.backends.transformers.caches import cached_tokens
from attnhook.backends.transformers.formula import check_layer
from attnhook.backends.transformers.frames import Frame, Run, concerns, local
from attnhook.backends.transformers.layers import is_causal_attention, layer_number, sees_a_prefix
from attnhook.backends.transformers.masks import FLASH, SDPA, Visible, family, visible
from attnhook.capture import Session, StepCapture, sessions
from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import PagedKeys
from attnhook.records import TokenRecord
from attnhook.rowledger import RowLedger

Original = Callable[..., Any]


def forget_compiled_code() -> None:
    """Make models that ``torch.compile`` has compiled already be compiled again, with the hooks in place.

    Compiled code does not watch the functions that we replace, so it would run on unobserved.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def observing_interface(original: Original) -> Original:
    """``AttentionInterface.get_interface`` that hands out observed attention functions."""

    @wraps(original)
    def get_interface(self: Any, implementation: str | None, default: Any) -> Any:
        function = original(self, implementation, default)
        return partial(_attend, function, implementation) if sessions() and not local.aside else function

    return get_interface


def observing_call(original: Original) -> Original:
    """``PreTrainedModel.__call__`` that opens a frame around the forward pass."""

    @wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not sessions() or local.aside:
            return original(self, *args, **kwargs)
        if local.frames or local.run is not None or local.refused:
            return _observed_call(original, self, args, kwargs)
        return _outermost_call(original, self, args, kwargs)

    return __call__


def observing_sample(original: Original) -> Original:
    """``GenerationMixin._sample`` that tells the frames inside which tokens are prompt."""

    @wraps(original)
    def _sample(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or next((a for a in args if hasattr(a, "num_return_sequences")), None)
        chunked = getattr(config, "prefill_chunk_size", None) is not None
        outer, aside = local.run, local.aside
        before = virtual.of_generation(self)
        run = local.run = Run(
            choices=getattr(config, "num_return_sequences", None) or 1,
            prompt_length=before + input_ids.shape[1] if chunked else None,
            sequences=input_ids,
            given=input_ids.shape[1],
            virtual=before,
            starts=places.starts_of(kwargs.get("attention_mask")),
            # who listens from here on must get every row
            ledgers={session: RowLedger() for session in sessions()},
        )
        local.aside = 0
        try:
            result = original(self, input_ids, *args, **kwargs)
        finally:
            local.run, local.aside = outer, aside
        if run.ledgers:
            run.settle(self, result)
        return result

    return _sample


def observing_generate(original: Original) -> Original:
    """``GenerationMixin.generate`` that tells whose answer the models inside it serve, and ends a refused stream."""

    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, local.generating = local.generating, self
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            streamer = None if error is not local.refusal else streams.streamer_of(original, self, args, kwargs)
            if streamer is not None:
                local.refusal = None  # a generate() around this one may have the same streamer
                streams.fail(streamer, error)
            raise
        finally:
            local.generating = outer
            if outer is None:
                local.refusal = None

    return generate


def observing_stop(original: Original) -> Original:
    """``StoppingCriteriaList.__call__`` that notes which sequences are finished, and their tokens."""

    @wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _aside():
            done = original(self, *args, **kwargs)
        run = local.run
        if run is not None and not local.aside:
            run.sequences = args[0] if args else kwargs.get("input_ids")
            run.note_finished(done)
        return done

    return __call__


def observing_processors(original: Original) -> Original:
    """``LogitsProcessorList.__call__``: a model that a processor calls (guidance) gives no token of this answer."""

    @wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _aside():
            return original(self, *args, **kwargs)

    return __call__


def observing_prompt(original: Original) -> Original:
    """PEFT's ``PeftModel.get_prompt``, which makes the virtual tokens of the pass that follows."""

    @wraps(original)
    def get_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompt = original(self, *args, **kwargs)
        virtual.note(prompt)
        return prompt

    return get_prompt


@contextmanager
def _aside() -> Iterator[None]:
    """Passes inside the block are none of the generation around it: they run unobserved."""
    if local.run is None:
        yield
        return
    local.aside += 1
    try:
        yield
    finally:
        local.aside -= 1


def eager_while_capturing(original: Original) -> Original:
    """No automatic compilation in ``generate`` while capturing: Python does not run in a replayed graph."""

    @wraps(original)
    def _valid_auto_compile_criteria(self: Any, *args: Any, **kwargs: Any) -> bool:
        return not sessions() and bool(original(self, *args, **kwargs))

    return _valid_auto_compile_criteria


def refusing_decoding(original: Original, mode: str) -> Original:
    """A decoding method whose forward passes are refused by name."""

    @wraps(original)
    def decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, local.refused = local.refused, mode
        try:
            return original(self, *args, **kwargs)
        finally:
            local.refused = outer

    return decode


@torch.compiler.disable(reason="attnhook captures attention in Python")  # type: ignore[untyped-decorator,no-untyped-call]
def _outermost_call(original: Original, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A pass that no generation of ours is known around: one may have begun before the hooks were there."""
    try:
        local.run, local.refused = midway.running()
    except midway.Between:
        return original(model, *args, **kwargs)
    except UnsupportedError as error:
        for session in sessions():
            if concerns(session, model):
                _refuse(session, error)
        return original(model, *args, **kwargs)
    try:
        return _observed_call(original, model, args, kwargs)
    finally:
        local.run = local.refused = None


@torch.compiler.disable(reason="attnhook captures attention in Python")  # type: ignore[untyped-decorator,no-untyped-call]
def _observed_call(original: Original, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # who listens is settled when a pass begins: who joins later would get part of its layers
    listening = local.frames[0].listening if local.frames else sessions()
    if not local.frames:
        for session in listening:
            session.ran[type(model).__name__] += 1
    try:
        frame = Frame(model, args, kwargs, listening)
    except Exception as error:
        for session in listening:
            if session.active and concerns(session, model):
                _refuse(session, error)
        return original(model, *args, **kwargs)
    if not local.frames and model in _in_one_graph and _in_one_graph[model] == _compiled_by(model):
        return _unobserved(original, frame, args, kwargs)
    local.frames.append(frame)
    try:
        output = original(model, *args, **kwargs)
    except RuntimeError as error:
        if len(local.frames) > 1 or not _breaks_a_graph(error):
            raise
        _in_one_graph[model] = _compiled_by(model)
        return _unobserved(original, frame, args, kwargs)
    finally:
        local.frames.pop()
    if local.frames:
        local.frames[-1].saw_attention |= frame.saw_attention
        local.frames[-1].others |= frame.others
    elif not frame.saw_attention:
        _nothing_seen(frame)
    _finish(frame, output)
    return output


# models compiled with fullgraph=True, with what runs them then
_in_one_graph: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()


def _compiled_by(model: Any) -> tuple[int, int]:
    """Tells whether a model is still compiled as it was: by a forward of its own, or by `torch.nn.Module.compile`."""
    return id(model.__dict__.get("forward")), id(getattr(model, "_compiled_call_impl", None))


def _breaks_a_graph(error: RuntimeError) -> bool:
    """Whether torch.compile could not take a model in one piece because of our observers."""
    return type(error).__module__ == "torch._dynamo.exc" and "attnhook captures" in str(error)


def _unobserved(original: Original, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model that is compiled in one piece as if nobody listened, and say that it cannot be captured."""
    refused = UnsupportedError(
        f"{type(frame.model).__name__} is compiled with fullgraph=True, and Python that captures attention cannot run "
        "inside one graph: compile it with fullgraph=False (a captured pass runs uncompiled then)"
    )
    for session in frame.listening:
        if session.active and concerns(session, frame.model):
            _refuse(session, refused)
    if cached_tokens(frame.cache) != frame.past:
        local.refusal = refused
        raise refused  # part of the pass has run: it cannot be run again
    local.aside += 1
    try:
        return original(frame.model, *args, **kwargs)
    finally:
        local.aside -= 1


def _refuse(session: Session, error: Exception, rows: int = 1) -> None:
    """Refuse a pass, or rows of it; the generation around it then lacks them, and that has been said."""
    if local.run is not None:
        local.run.ledger(session).refused = True
    local.refusal = error if session.strict else local.refusal
    session.refuse(error, rows)


def _nothing_seen(frame: Frame) -> None:
    """A pass without causal attention: refuse a decoder, leave alone and note what is none or runs beside one."""
    error, decoder = reasons.unseen(frame.model, frame.others)
    for session in frame.listening:
        if not session.active or not concerns(session, frame.model):
            continue
        if decoder and local.generating in (None, frame.model):
            _refuse(session, error)
        else:
            session.leave_alone(type(frame.model).__name__, error)


def _finish(frame: Frame, output: Any) -> None:
    """Deliver what a pass captured."""
    if frame.steps:
        frame.finish_rows(output)
        if any(session.tokens for session in frame.listening):
            frame.note_tokens(local.frames)
    for session, step in frame.steps.items():
        if not session.active:
            continue
        if session in frame.accounted:
            frame.account(session)
        if step is None:
            continue
        try:
            if step.missing:
                raise UnsupportedError(
                    f"{type(frame.model).__name__}: layers {step.missing} made no causal attention call in this "
                    "forward pass"
                )
            records: Sequence[TokenRecord] = step.records(session.drop)
            if session.tokens:
                records = frame.with_tokens(records, step)
        except Exception as error:
            _refuse(session, error, len(step.rows))
        else:
            session.deliver(records)


def _attend(*args: Any, **kwargs: Any) -> Any:
    # the wrapper of torch.compiler.disable is slow for something that runs per layer and token
    if torch.compiler.is_dynamo_compiling():
        return _attend_uncompiled(*args, **kwargs)
    return _attend_observed(*args, **kwargs)


@torch.compiler.disable(reason="attnhook captures attention in Python")  # type: ignore[untyped-decorator,no-untyped-call]
def _attend_uncompiled(*args: Any, **kwargs: Any) -> Any:
    return _attend_observed(*args, **kwargs)


def _attend_observed(
    function: Original,
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
        frame.others.add(type(module))
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
            _refuse(session, error, len(step.rows) if step else 1)
    return output


def _is_a_decoders(module: Any, told: bool | None) -> bool:
    """Whether an attention call has rows of ours; ``told`` is the call's own ``is_causal``."""
    if told is not None:
        return told
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
    if mask is None and q_len > 1 and sees_a_prefix(module):
        raise UnsupportedError(
            f"{type(module).__name__} (layer {number}) ran over {q_len} queries without a mask, so they see later "
            "ones; only causal attention can be captured"
        )
    window = kwargs.get("sliding_window") if kind == FLASH else None  # elsewhere the mask holds it
    if kind == FLASH:
        _refuse_packed(kwargs)
    name = (session, id(mask), key.shape[2], window, query.device)
    if name not in frame.plans:
        try:
            frame.plans[name] = _plan(frame, step, mask, kind, query, key.shape[2], window)
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
    frame: Frame, step: StepCapture, mask: Any, kind: str, query: torch.Tensor, kv_len: int, window: int | None
) -> _Plan:
    batch, _, q_len, _ = query.shape
    device = query.device
    sources, indices = [row.source for row in step.rows], frame.query_index(step)
    source, index = torch.tensor(sources, device=device), torch.tensor(indices, device=device)
    position = torch.tensor([row.position for row in step.rows], device=device)
    seen = visible(mask, kind, source, index, q_len, kv_len, window)
    # a static cache has places for tokens to come, a sliding one has dropped the first
    own = index + (frame.past if kv_len >= frame.past + q_len else kv_len - q_len)
    if bool((seen.last != own).any()):
        t = int((seen.last != own).nonzero()[0])
        raise UnsupportedError(
            f"the last key that a row sees is number {int(seen.last[t])} of {kv_len}, and its own is {int(own[t])}: it "
            "sees later tokens, or not itself, or keys that are no tokens; only causal attention can be captured"
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
