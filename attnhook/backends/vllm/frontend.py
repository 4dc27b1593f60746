"""In vLLM's front end: requests that ask, on their way to the engine.

A request of a server is admitted by its route (`server.wrap_create`), which alone can ask for capture: what any other
route, or a client's own parameters for the engine, ask for is refused where every request passes,
`wrap_process_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

from attnhook.backends.vllm.refusing import client_error
from attnhook.capture.rows import wants_prompt
from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.frontend import FrontEnd, ServedModel
from attnhook.serving.gate import Place
from attnhook.serving.wire import ASK, FIELDS, KEY, foreign, pack_options
from attnhook.system import switch

Original = Callable[..., Any]

_model: Any = None  # ModelConfig of the engine that this front end feeds, once it is known
_device: str | None = None  # on which that engine computes: "cpu", "cuda"


def wrap_init(original: Original) -> Original:
    """``InputProcessor.__init__``: remember the model, whose layers and heads a request may name."""

    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global _model, _device
        from attnhook.backends.vllm import HOOKS

        HOOKS.check_modules()
        original(self, vllm_config, *args, **kwargs)
        _model = vllm_config.model_config
        _device = str(vllm_config.device_config.device_type)

    return __init__


def served_name(model: Any) -> str:
    """The name under which a ModelConfig's model is served."""
    name = getattr(model, "served_model_name", None) or getattr(model, "model", "")
    return str(name[0] if isinstance(name, list) else name)


def served_model() -> ServedModel:
    """What is known of the model by now."""
    free: dict[str, Any] = {"layers": []} if getattr(_model, "is_attention_free", False) else {}
    return ServedModel.of(
        served_name(_model),
        getattr(_model, "hf_text_config", None),
        dtype=getattr(_model, "dtype", None),
        device=_device,
        generates=getattr(_model, "runner_type", "generate") != "pooling",
        **free,
    )


def _version() -> str | None:
    from attnhook.backends.vllm import VllmBackend

    return VllmBackend().version()


front_end = FrontEnd(
    "vllm", _version, served_model, ("/v1/chat/completions", "/v1/completions", "/invocations"), key_mass=True
)


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


_prompt_tokens: ContextVar[int | None] = ContextVar("attnhook_prompt_tokens", default=None)


def wrap_extract_prompt_len(original: Original) -> Original:
    """``_extract_prompt_len`` of the serving classes, right before they ask a request for its parameters."""

    @wraps(original)
    def _extract_prompt_len(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = original(self, *args, **kwargs)
        _prompt_tokens.set(count)
        return count

    return _extract_prompt_len


def wrap_to_sampling_params(original: Original) -> Original:
    """``to_sampling_params`` of a request: what its route has admitted asks; otherwise asking is a clean HTTP 400.

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
        prompt, new = _prompt_tokens.get(), params.max_tokens
        if prompt is None or new is None:
            front_end.policy.check_spans(known.options, None)
        else:
            front_end.measure(known.options, known.place, prompt, new, params.n or 1)
        mark(params, known.options)
        return params

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


def mark(params: Any, options: RequestOptions, *, reply: bool = True) -> None:
    """Ask for capture in SamplingParams; without ``reply`` for the sinks only."""
    params.extra_args = {**(params.extra_args or {}), KEY: pack_options(options, reply=reply)}
    if wants_prompt(options):
        params.skip_reading_prefix_cache = True  # a cached row is not computed, so it could not be captured


_serves = switch.serving()  # whether other people's requests come to this process


def serving() -> None:
    """From now on requests come from clients, who ask by the fields of their routes and by nothing else."""
    global _serves
    _serves = True


def wrap_process_inputs(original: Original) -> Original:
    """``InputProcessor.process_inputs``, which every request passes.

    Who calls vLLM in Python asks through ``SamplingParams.extra_args``; of a server's client nothing is taken there.
    """

    @wraps(original)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        _refuse_names(extra)
        options = None
        if foreign(extra) is not None:
            options = _as_client_errors(front_end.options, extra)
            params = params.clone()
            params.extra_args = {key: value for key, value in extra.items() if key not in FIELDS}
            if options is not None:
                mark(params, options)
        elif KEY not in extra and hasattr(params, "extra_args") and (everything := front_end.everything()) is not None:
            params = params.clone()
            mark(params, everything, reply=False)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sent: Any = getattr(request, "sampling_params", None)
        if options is not None and request.prompt_token_ids and sent.max_tokens is not None:
            front_end.measure(options, None, len(request.prompt_token_ids), sent.max_tokens, 1)
        packed = (getattr(sent, "extra_args", None) or {}).get(KEY)
        if packed is not None:  # plain text, which goes to the workers
            sent.extra_args = {**sent.extra_args, KEY: str(packed)}
        return request

    return process_inputs


def _as_client_errors(check: Callable[[dict[str, Any]], RequestOptions | None], fields: dict[str, Any]) -> Any:
    try:
        return check(fields)
    except OptionError as error:
        raise client_error(error.field, str(error)) from error
