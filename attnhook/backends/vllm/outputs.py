"""In vLLM's front end: records on their way into outputs and replies."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from functools import wraps
from typing import Any

from attnhook.serving.account import ChoiceAccount
from attnhook.serving.replies import Attention, Stream
from attnhook.serving.wire import ASK, KEY, Share, reason, unpack_options

logger = logging.getLogger("attnhook")

Original = Callable[..., Any]


class _Kept:
    """What is ours of one RequestState."""

    def __init__(self, account: ChoiceAccount) -> None:
        self.account: ChoiceAccount | None = account
        self.new = Attention()  # has come since the last output
        self.all = Attention()  # is in outputs, but not in one that was the last to bring it

    def fail(self, error: Exception) -> None:
        """Tell it to the one request that it concerns."""
        logger.exception("attention of one request is lost")
        self.new.error = self.new.error or reason(error)

    def output(self, tokens: int, *, finished: bool, delta: bool) -> Attention:
        """What goes with an output of a request that has so many tokens now."""
        new = self.new.take()
        self.all.extend(new if self.account is None else self.account.settle(new, tokens, finished=finished))
        return self.all.take() if delta else self.all.copy()


def _kept(state: Any) -> _Kept | None:
    return state.__dict__.get("_attnhook")  # type: ignore[no-any-return]


def wrap_add_request(original: Original) -> Original:
    """``OutputProcessor.add_request``: the account of a request that asks begins."""

    @wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, request, *args, **kwargs)
        packed = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
        state = self.request_states.get(request.request_id)
        if packed is not None and state is not None and _kept(state) is None:
            options, reply = unpack_options(packed)
            if reply:
                prompt = request.prompt_token_ids
                state._attnhook = _Kept(ChoiceAccount(options, None if prompt is None else len(prompt)))
        return result

    return add_request


def wrap_process_outputs(original: Original) -> Original:
    """``OutputProcessor.process_outputs``: take the records out of the engine's outputs."""

    @wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            transfer = output.kv_transfer_params
            if transfer and KEY in transfer:
                output.kv_transfer_params = {k: v for k, v in transfer.items() if k != KEY} or None
                state = self.request_states.get(output.request_id)
                kept = None if state is None else _kept(state)
                if kept is not None:
                    try:  # all requests of this process pass here: nothing of one may hold the others up
                        _receive(kept, state, transfer[KEY])
                    except Exception as error:
                        kept.fail(error)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _receive(kept: _Kept, state: Any, packed: Any) -> None:
    parent = state.parent_req
    request = state.external_req_id if parent is None else parent.external_req_id
    if getattr(state, "streaming_input", False):
        kept.account = None  # its tokens become its prompt, piece by piece
    kept.new.extend(Attention.of(Share.unpack(packed), request, state.request_index))


def wrap_new_completion_output(original: Original) -> Original:
    """``RequestState._new_completion_output``: an output brings the records of its tokens."""

    @wraps(original)
    def _new_completion_output(self: Any, token_ids: Any, finish_reason: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, token_ids, finish_reason, *args, **kwargs)
        kept = _kept(self)
        if kept is not None:
            try:
                tokens, delta = len(self.detokenizer.output_token_ids), self.output_kind.name == "DELTA"
                _put(output, kept.output(tokens, finished=finish_reason is not None, delta=delta))
            except Exception as error:
                kept.fail(error)
                _put(output, kept.new.take())
        return output

    return _new_completion_output


def _put(output: Any, attention: Attention) -> None:
    output.attention_tokens = attention.generated
    output.prompt_attention_tokens = attention.prompt
    output.attention_error = attention.error
    output.attention_self_check = attention.check
    output.attention_key_mass = attention.key_mass
    output.attention_encoding_format = attention.encoding_format


def _of(output: Any) -> Attention:
    return Attention(
        getattr(output, "attention_tokens", []),
        getattr(output, "prompt_attention_tokens", []),
        getattr(output, "attention_error", None),
        getattr(output, "attention_self_check", None),
        getattr(output, "attention_key_mass", None),
        getattr(output, "attention_encoding_format", "float"),
    )


def wrap_add(original: Original) -> Original:
    """``RequestOutput.add``: outputs that a slow reader gets in one piece bring all their records."""

    @wraps(original)
    def add(self: Any, next_output: Any, aggregate: bool) -> Any:
        if aggregate:
            later = {output.index: _of(output) for output in next_output.outputs}
            for output in self.outputs:
                if later.get(output.index):
                    whole = _of(output).copy()
                    whole.extend(later[output.index])
                    _put(output, whole)
        return original(self, next_output, aggregate)

    return add


def wrap_chat_completion_full_generator(original: Original) -> Original:
    """``OpenAIServingChat.chat_completion_full_generator``."""

    @wraps(original)
    async def chat_completion_full_generator(self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asks(request):
            return await original(self, request, results, *args, **kwargs)
        last: list[Any] = []

        async def watched() -> AsyncIterator[Any]:
            async for result in results:
                last[:] = [result]
                yield result

        response = await original(self, request, watched(), *args, **kwargs)
        if last and hasattr(response, "choices"):
            found = {output.index: _of(output).checked(len(output.token_ids)) for output in last[0].outputs}
            for choice in response.choices:
                _fill(choice, found.get(choice.index, Attention()))
        return response

    return chat_completion_full_generator


def wrap_request_output_to_completion_response(original: Original) -> Original:
    """``OpenAIServingCompletion.request_output_to_completion_response``."""

    @wraps(original)
    def request_output_to_completion_response(self: Any, results: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, results, request, *args, **kwargs)
        if _asks(request):
            outputs = [output for result in results for output in result.outputs]
            for choice, output in zip(response.choices, outputs, strict=True):
                _fill(choice, _of(output).checked(len(output.token_ids)))
        return response

    return request_output_to_completion_response


def _fill(choice: Any, attention: Attention) -> None:
    for name, value in attention.fields().items():
        setattr(choice, name, value)


def wrap_chat_completion_stream_generator(original: Original) -> Original:
    """``OpenAIServingChat.chat_completion_stream_generator``."""

    @wraps(original)
    async def chat_completion_stream_generator(self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asks(request):
            async for line in original(self, request, results, *args, **kwargs):
                yield line
            return
        stream = Stream(lambda result: [(output.index, _of(output)) for output in result.outputs])
        async for line in original(self, request, stream.watch(results), *args, **kwargs):
            yield stream.line(line)

    return chat_completion_stream_generator


def wrap_completion_stream_generator(original: Original) -> Original:
    """``OpenAIServingCompletion.completion_stream_generator``."""

    @wraps(original)
    async def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, results: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _asks(request):
            async for line in original(self, request, engine_inputs, results, *args, **kwargs):
                yield line
            return
        choices = request.n or 1
        stream = Stream(
            lambda result: [(output.index + result[0] * choices, _of(output)) for output in result[1].outputs]
        )
        async for line in original(self, request, engine_inputs, stream.watch(results), *args, **kwargs):
            yield stream.line(line)

    return completion_stream_generator


def _asks(request: Any) -> bool:
    return bool((request.model_extra or {}).get(ASK))
