"""The functions that stand in for Transformers' own while attnhook is installed.

Each calls the original with its arguments unchanged; with no session listening that is all it does.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch

from attnhook.backends.transformers import midway, places, reasons, streams, virtual
from attnhook.backends.transformers.attention import attend
from attnhook.backends.transformers.caches import cached_tokens, continuous_batching
from attnhook.backends.transformers.frames import Frame, forget_conversation
from attnhook.backends.transformers.runs import Run, concerns, local, refuse
from attnhook.capture.ledger import RowLedger
from attnhook.capture.session import sessions
from attnhook.errors import UnsupportedError
from attnhook.record.token_record import TokenRecord

Original = Callable[..., Any]


def _forget_compiled_code() -> None:
    """Make models that ``torch.compile`` has compiled already be compiled again, with the hooks in place.

    Compiled code does not watch the functions that we replace, so it would run on unobserved.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def wrap_get_interface(original: Original) -> Original:
    """``AttentionInterface.get_interface`` that hands out observed attention functions."""

    @wraps(original)
    def get_interface(self: Any, implementation: str | None, default: Any) -> Any:
        function = original(self, implementation, default)
        return partial(attend, function, implementation) if sessions() and not local.aside else function

    return get_interface


def wrap_call(original: Original) -> Original:
    """``PreTrainedModel.__call__`` that opens a frame around the forward pass."""
    _forget_compiled_code()

    @wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not sessions() or local.aside:
            return original(self, *args, **kwargs)
        if local.frames or local.run is not None or local.refused:
            return _observed_call(original, self, args, kwargs)
        return _outermost_call(original, self, args, kwargs)

    return __call__


def wrap_sample(original: Original) -> Original:
    """``GenerationMixin._sample`` that tells the frames inside which tokens are prompt."""

    @wraps(original)
    def _sample(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or next((a for a in args if hasattr(a, "num_return_sequences")), None)
        chunked = getattr(config, "prefill_chunk_size", None) is not None
        outer, aside = local.run, local.aside
        before = virtual.of_generation(self)
        starts, wrong = places.prompts(kwargs.get("attention_mask"))
        run = local.run = Run(
            choices=getattr(config, "num_return_sequences", None) or 1,
            prompt_length=before + input_ids.shape[1] if chunked else None,
            sequences=input_ids,
            given=input_ids.shape[1],
            virtual=before,
            starts=starts,
            wrong=wrong,
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


def wrap_generate(original: Original) -> Original:
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


def wrap_stopping_criteria(original: Original) -> Original:
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


def wrap_logits_processors(original: Original) -> Original:
    """``LogitsProcessorList.__call__``: a model that a processor calls (guidance) gives no token of this answer."""

    @wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _aside():
            return original(self, *args, **kwargs)

    return __call__


def wrap_generate_batch(original: Original) -> Original:
    """``generate_batch``, refused where it is called: in the thread in which its passes run nobody would see it."""

    @wraps(original)
    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        for session in sessions():
            if concerns(session, self):
                refuse(session, continuous_batching())
        return original(self, *args, **kwargs)

    return generate_batch


def wrap_cache_rearrangement(original: Original) -> Original:
    """A method of ``Cache`` after which its rows belong to other texts than before."""

    @wraps(original)
    def rearranged(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        forget_conversation(self)
        return result

    return rearranged


def wrap_get_prompt(original: Original) -> Original:
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


def wrap_valid_auto_compile_criteria(original: Original) -> Original:
    """No automatic compilation in ``generate`` while capturing: Python does not run in a replayed graph."""

    @wraps(original)
    def _valid_auto_compile_criteria(self: Any, *args: Any, **kwargs: Any) -> bool:
        return not sessions() and bool(original(self, *args, **kwargs))

    return _valid_auto_compile_criteria


def wrap_beam_search(original: Original) -> Original:
    """``GenerationMixin._beam_search``, whose passes give no token each."""
    return _refused(original, "beam search")


def wrap_assisted_decoding(original: Original) -> Original:
    """``GenerationMixin._assisted_decoding``, whose passes give several tokens or none."""
    return _refused(original, "assisted (speculative) decoding")


def _refused(original: Original, mode: str) -> Original:
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
                refuse(session, error)
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
                refuse(session, error)
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
            refuse(session, refused)
    if cached_tokens(frame.cache) != frame.past:
        local.refusal = refused
        raise refused  # part of the pass has run: it cannot be run again
    local.aside += 1
    try:
        return original(frame.model, *args, **kwargs)
    finally:
        local.aside -= 1


def _nothing_seen(frame: Frame) -> None:
    """A pass without causal attention: refuse a decoder, leave alone and note what is none or runs beside one."""
    error, decoder = reasons.unseen(frame.model, frame.others)
    for session in frame.listening:
        if not session.active or not concerns(session, frame.model):
            continue
        if decoder and local.generating in (None, frame.model):
            refuse(session, error)
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
            added = step.key_mass()
        except Exception as error:
            refuse(session, error, len(step.rows))
        else:
            session.deliver(records)
            if session.key_sums is not None:
                session.key_sums.add(added, session.drop)
