"""In vLLM's front end: requests that ask, and records on their way into outputs and replies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

from attnhook.errors import OptionError
from attnhook.options import REQUEST_FIELDS, RequestOptions, check_heads, check_reach, resolve_layers
from attnhook.serving.capabilities import attention_layers
from attnhook.serving.policy import Policy
from attnhook.serving.replies import Attention, Stream
from attnhook.serving.wire import ASK, FIELDS, KEY, Share, asked, pack_options

Original = Callable[..., Any]


@cache
def policy() -> Policy:
    """This process's guard rails; read when the first request comes, after the server's flags have been."""
    return Policy.from_environ()


_model: Any = None  # ModelConfig of the engine that this front end feeds, once it is known
_device: str | None = None  # on which that engine computes: "cpu", "cuda"


def knowing_the_model(original: Original) -> Original:
    """``InputProcessor.__init__``: remember the model, whose layers and heads a request may name."""

    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global _model, _device
        from attnhook.backends.vllm import check_modules

        check_modules()
        original(self, vllm_config, *args, **kwargs)
        _model = vllm_config.model_config
        _device = str(vllm_config.device_config.device_type)

    return __init__


def served_name(model: Any) -> str:
    """The name under which a ModelConfig's model is served."""
    name = getattr(model, "served_model_name", None) or getattr(model, "model", "")
    return str(name[0] if isinstance(name, list) else name)


def model_shape() -> tuple[str, list[int] | None, int | None]:
    """Name, layers and query heads of the model; None where only the workers know."""
    config = getattr(_model, "hf_text_config", None)
    return served_name(_model), attention_layers(config), getattr(config, "num_attention_heads", None)


def model_dtype() -> str | None:
    """The dtype in which the model computes, such as "bfloat16"."""
    dtype = getattr(_model, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def model_device() -> str | None:
    """The kind of device on which the model computes."""
    return _device


def check_model(options: RequestOptions) -> None:
    """Raise OptionError for a layer or head that the model does not have."""
    _, layers, heads = model_shape()
    if layers:
        resolve_layers(options.layers, layers, "attention_layers")
    if heads:
        check_heads(options.heads, heads, "attention_heads")


# the request that this task serves, with its options
_checked: ContextVar[tuple[Any, RequestOptions] | None] = ContextVar("attnhook_checked", default=None)


@contextmanager
def checked(request: Any, options: RequestOptions) -> Iterator[None]:
    """Inside the block, `options_of` need not check this request again."""
    token = _checked.set((request, options))
    try:
        yield
    finally:
        _checked.reset(token)


def options_of(request: Any) -> RequestOptions | None:
    """What an OpenAI request asks for; None where it does not ask. Raises OptionError."""
    known = _checked.get()
    if known is not None and known[0] is request:
        return known[1]
    options = _options(request.model_extra)
    if options is not None and getattr(request, "use_beam_search", False):
        raise OptionError(ASK, f"{ASK}=true with use_beam_search=true: beam search cannot be captured; drop one")
    return options


_prompt_tokens: ContextVar[int | None] = ContextVar("attnhook_prompt_tokens", default=None)


def counting(original: Original) -> Original:
    """``_extract_prompt_len`` of the serving classes, right before they ask a request for its parameters."""

    @wraps(original)
    def _extract_prompt_len(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = original(self, *args, **kwargs)
        _prompt_tokens.set(count)
        return count

    return _extract_prompt_len


def _check_spans(options: RequestOptions, prompt: int | None, new: int | None) -> None:
    if prompt is not None and new is not None:
        check_reach(options.spans, prompt + new, REQUEST_FIELDS["spans"])


def asking(original: Original) -> Original:
    """``to_sampling_params`` of a chat or completion request: its fields become ours, or a clean HTTP 400."""

    @wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = options_of(self)
        params = original(self, *args, **kwargs)
        if options is not None:
            _check_spans(options, _prompt_tokens.get(), params.max_tokens)
            mark(params, options)
        return params

    return to_sampling_params


def refusing_capture(original: Original) -> Original:
    """``to_sampling_params`` of a request whose reply has no place for records: a clean HTTP 400."""

    @wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.model_extra or {}).get(ASK):
            raise OptionError(
                ASK, f"{ASK}=true: {type(self).__name__} cannot carry attention; use /v1/chat/completions"
            )
        return original(self, *args, **kwargs)

    return to_sampling_params


def _options(extra: dict[str, Any] | None) -> RequestOptions | None:
    if not extra or ASK not in extra:
        return None
    options = asked(extra)
    if options is not None:
        check_model(options)
    return options


def mark(params: Any, options: RequestOptions, *, reply: bool = True) -> None:
    """Ask for capture in SamplingParams; without ``reply`` for the sinks only."""
    params.extra_args = {**(params.extra_args or {}), KEY: pack_options(options, reply=reply)}
    if options.prompt:
        params.skip_reading_prefix_cache = True  # a cached row is not computed, so it could not be captured


def admitting(original: Original) -> Original:
    """``InputProcessor.process_inputs``: offline requests ask through ``SamplingParams.extra_args``."""

    @wraps(original)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if ASK in extra:
            options = _options(extra)
            params = params.clone()
            params.extra_args = {name: value for name, value in extra.items() if name not in FIELDS}
            if options is not None:
                mark(params, options)
                request = original(self, request_id, prompt, params, *args, **kwargs)
                _check_spans(options, len(request.prompt_token_ids or ()) or None, request.sampling_params.max_tokens)
                return request
        elif KEY not in extra and hasattr(params, "extra_args") and policy().capture_all:
            params = params.clone()
            mark(params, RequestOptions.resolve(arguments={"mode": "fingerprint"}), reply=False)
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def receiving(original: Original) -> Original:
    """``OutputProcessor.process_outputs``: take the records out of the engine's outputs."""

    @wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            transfer = output.kv_transfer_params
            if transfer and KEY in transfer:
                share = Share.unpack(transfer[KEY])
                output.kv_transfer_params = {k: v for k, v in transfer.items() if k != KEY} or None
                state = self.request_states.get(output.request_id)
                if state is not None:
                    parent = state.parent_req
                    request = state.external_req_id if parent is None else parent.external_req_id
                    _attention_of(state).extend(Attention.of(share, request, state.request_index))
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _attention_of(state: Any) -> Attention:
    return state.__dict__.setdefault("_attnhook", Attention())  # type: ignore[no-any-return]


def completing(original: Original) -> Original:
    """``RequestState._new_completion_output``: an output brings the records of its tokens."""

    @wraps(original)
    def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        attention = self.__dict__.get("_attnhook")
        if attention is not None:
            delta = self.output_kind.name == "DELTA"
            _put(output, attention.take() if delta else attention.copy())
        return output

    return _new_completion_output


def _put(output: Any, attention: Attention) -> None:
    output.attention_tokens = attention.generated
    output.prompt_attention_tokens = attention.prompt
    output.attention_error = attention.error
    output.attention_self_check = attention.check


def _of(output: Any) -> Attention:
    return Attention(
        getattr(output, "attention_tokens", []),
        getattr(output, "prompt_attention_tokens", []),
        getattr(output, "attention_error", None),
        getattr(output, "attention_self_check", None),
    )


def merging(original: Original) -> Original:
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


def chat_reply(original: Original) -> Original:
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


def completion_reply(original: Original) -> Original:
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


def chat_stream(original: Original) -> Original:
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


def completion_stream(original: Original) -> Original:
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
