"""In vLLM's front end: requests that ask, on their way to the engine.

A request of a server is admitted by its route (`server.guarded`), which alone can ask for capture: what any other
route, or a client's own parameters for the engine, ask for is refused where every request passes, `admitting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, NamedTuple

from attnhook.backends.vllm.refusing import client_error
from attnhook.errors import OptionError
from attnhook.options import REQUEST_FIELDS, RequestOptions, check_heads, check_reach, resolve_layers
from attnhook.serving.budget import count_layers, measure
from attnhook.serving.capabilities import attention_layers
from attnhook.serving.gate import Place
from attnhook.serving.policy import Policy
from attnhook.serving.wire import ASK, FIELDS, KEY, asked, foreign, pack_options
from attnhook.system import switch

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
    """Name, layers and query heads of the model; None where only the workers know, no layers where it has none."""
    config = getattr(_model, "hf_text_config", None)
    layers = [] if getattr(_model, "is_attention_free", False) else attention_layers(config)
    return served_name(_model), layers, getattr(config, "num_attention_heads", None)


def generates() -> bool:
    """Whether the model generates tokens: one that makes embeddings has no rows that could be asked for."""
    return getattr(_model, "runner_type", "generate") != "pooling"


def model_dtype() -> str | None:
    """The dtype in which the model computes, such as "bfloat16"."""
    dtype = getattr(_model, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def model_device() -> str | None:
    """The kind of device on which the model computes."""
    return _device


def check_model(options: RequestOptions) -> None:
    """Raise OptionError for a layer or head that the model does not have, and for a model that has no attention."""
    name, layers, heads = model_shape()
    if layers is not None:
        if not layers:
            raise OptionError(
                ASK, f"{ASK}=true: {name} has no attention layer, so there is nothing to capture: drop it"
            )
        resolve_layers(options.layers, layers, REQUEST_FIELDS["layers"])
    if heads:
        check_heads(options.heads, heads, REQUEST_FIELDS["heads"])


class Admitted(NamedTuple):
    """A request of a route that may ask, with its options as this server serves them."""

    request: Any
    options: RequestOptions
    place: Place


# what this task serves
_admitted: ContextVar[Admitted | None] = ContextVar("attnhook_admitted", default=None)


@contextmanager
def admitted(request: Any, options: RequestOptions, place: Place) -> Iterator[None]:
    """Inside the block this request may ask for capture."""
    token = _admitted.set(Admitted(request, options, place))
    try:
        yield
    finally:
        _admitted.reset(token)


def options_of(request: Any) -> RequestOptions | None:
    """What an OpenAI request asks for; None where it does not ask. Raises OptionError."""
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


def asking(original: Original) -> Original:
    """``to_sampling_params`` of a chat or completion request: its fields become ours, or a clean HTTP 400.

    Raises Refusal where a reply of this size is too much now.
    """

    @wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = _admitted.get()
        _refuse_names(getattr(self, "vllm_xargs", None) or {})
        if known is None or known.request is not self:
            _refuse_to_ask(self)
            return original(self, *args, **kwargs)
        params = original(self, *args, **kwargs)
        _measure(known, _prompt_tokens.get(), params)
        mark(params, known.options)
        return params

    return to_sampling_params


def _measure(known: Admitted, prompt: int | None, params: Any) -> None:
    """Refuse what reaches beyond this request, or comes to more bytes than this server allows."""
    options, place, new = known.options, known.place, params.max_tokens
    if prompt is None or new is None:
        policy().check_spans(options, None)
        return
    check_reach(options.spans, prompt + new, REQUEST_FIELDS["spans"])
    layers = count_layers(options, model_shape()[1], getattr(_model, "hf_text_config", None))
    measure(policy(), place, options, layers, prompt, new, params.n or 1)


def refusing_capture(original: Original) -> Original:
    """``to_sampling_params`` of a request whose reply has no place for records: a clean HTTP 400."""

    @wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_names(getattr(self, "vllm_xargs", None) or {})
        _refuse_to_ask(self)
        return original(self, *args, **kwargs)

    return to_sampling_params


def _refuse_names(parameters: dict[str, Any]) -> None:
    """Of a client's own parameters for the engine; a stream that has begun could not be told any more."""
    name = foreign(parameters)
    if name is not None and (_serves or name == KEY):
        raise client_error(
            name,
            f"vllm_xargs or extra_args: the name {name!r} is attnhook's own; ask with {ASK}=true at the top of a "
            "request to /v1/chat/completions or /v1/completions",
        )


def _refuse_to_ask(request: Any) -> None:
    extra = request.model_extra or {}
    if extra.get(ASK):
        raise client_error(
            ASK,
            f"{ASK}=true: {type(request).__name__} cannot carry attention on this route; use /v1/chat/completions or "
            "/v1/completions",
        )


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


_serves = switch.serving()  # whether other people's requests come to this process


def serving() -> None:
    """From now on requests come from clients, who ask by the fields of their routes and by nothing else."""
    global _serves
    _serves = True


def admitting(original: Original) -> Original:
    """``InputProcessor.process_inputs``, which every request passes.

    Who calls vLLM in Python asks through ``SamplingParams.extra_args``; of a server's client nothing is taken there.
    """

    @wraps(original)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        _refuse_names(extra)
        options = None
        if foreign(extra) is not None:
            options = _options_offline(extra)
            params = params.clone()
            params.extra_args = {key: value for key, value in extra.items() if key not in FIELDS}
            if options is not None:
                mark(params, options)
        elif KEY not in extra and hasattr(params, "extra_args") and policy().capture_all and model_shape()[1] != []:
            params = params.clone()
            mark(params, RequestOptions.resolve(arguments={"mode": "fingerprint"}), reply=False)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sent: Any = getattr(request, "sampling_params", None)
        if options is not None:
            prompt_tokens = len(request.prompt_token_ids or ()) or None
            if prompt_tokens is not None and sent.max_tokens is not None:
                check_reach(options.spans, prompt_tokens + sent.max_tokens, REQUEST_FIELDS["spans"])
        packed = (getattr(sent, "extra_args", None) or {}).get(KEY)
        if packed is not None:  # plain text, which goes to the workers
            sent.extra_args = {**sent.extra_args, KEY: str(packed)}
        return request

    return process_inputs


def _options_offline(extra: dict[str, Any]) -> RequestOptions | None:
    try:
        return _options(extra)
    except OptionError as error:
        raise client_error(error.field, str(error)) from error
