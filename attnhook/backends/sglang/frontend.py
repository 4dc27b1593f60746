"""In SGLang's front end: requests that ask, and records on their way out of its results.

Every way in, HTTP or `Engine`, passes `TokenizerManager.generate_request`. The OpenAI routes leave their options in
the request's scope (`server`); ``/generate`` and `Engine` ask with the same fields, at the top of a body or in
``sampling_params["custom_params"]``. What any other route or a client's own parameters ask for is refused.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

from attnhook.backends.sglang.reading import Reader
from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.frontend import FrontEnd, ServedModel
from attnhook.serving.gate import Place, leave_with_the_reply
from attnhook.serving.refusal import Refusal
from attnhook.serving.replies import Stream
from attnhook.serving.routes import path_of
from attnhook.serving.wire import ASK, FIELDS, KEY, foreign, pack_options, unpack_options

Original = Callable[..., Any]

GENERATE = "/generate"
_HEALTH_CHECK = "HEALTH_CHECK"
_manager: Any = None  # the TokenizerManager of this process


def wrap_init(original: Original) -> Original:
    """``TokenizerManager.__init__``: remember the model, and check that our hooks are there."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        global _manager
        from attnhook.backends.sglang import FRONTEND, HOOKS, SERVER

        original(self, *args, **kwargs)
        HOOKS.check_in_place(FRONTEND)
        if "sglang.srt.entrypoints.http_server" in sys.modules:
            HOOKS.check_in_place(SERVER)
        _manager = self

    return __init__


def served_model() -> ServedModel:
    """What is known of the model by now."""
    config = getattr(_manager, "model_config", None)
    device = getattr(getattr(_manager, "server_args", None), "device", None)
    return ServedModel.of(
        str(getattr(_manager, "served_model_name", "")),
        getattr(config, "hf_text_config", None),
        heads=getattr(config, "num_attention_heads", None),
        dtype=getattr(config, "dtype", None),
        device=None if device is None else str(device),
        generates=bool(getattr(_manager, "is_generation", True)),
    )


def _version() -> str | None:
    from attnhook.backends.sglang import SglangBackend

    return SglangBackend().version()


front_end = FrontEnd(
    "sglang", _version, served_model, ("/v1/chat/completions", "/v1/completions", GENERATE, "/invocations"),
    key_mass=True,
)  # fmt: skip


@dataclass
class Ticket:
    """What an OpenAI route leaves in the request's scope under `KEY`."""

    options: RequestOptions
    place: Place
    stream: Stream | None
    reader: Reader | None = None
    error: OptionError | Refusal | None = None  # what only the tokenized prompt showed


class Refused(ValueError):
    """A `Refusal` as SGLang's own routes understand it: they read ``status_code``."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal, self.status_code = refusal, refusal.status


class _Asked(NamedTuple):
    """What a request asks for: once for all of its prompts, or per prompt."""

    options: list[RequestOptions | None]
    place: Place | None  # None for who calls the engine in Python
    repeats: bool = False  # whether each event of its stream holds all rows so far

    def of(self, prompt: int) -> RequestOptions | None:
        return self.options[prompt if len(self.options) > 1 else 0]


# what this task serves, for `wrap_validate_one_request`
_serving: ContextVar[_Asked | None] = ContextVar("attnhook_serving", default=None)


def wrap_generate_request(original: Original) -> Original:
    """``TokenizerManager.generate_request``: mark what asks, and take our elements out of every result."""

    @wraps(original)
    async def generate_request(self: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> Any:
        ticket: Ticket | None = _scope(request).get(KEY)
        wanted = _wanted(obj, request) if ticket is None else _Asked([ticket.options], ticket.place)
        if ticket is not None:
            _refuse_foreign(obj, fields_too=True)
        _mark_all(obj, wanted)
        reader = Reader(bool(getattr(obj, "stream", False) and _streams_what_is_new(self)))
        if ticket is not None:
            reader.stream, ticket.reader = ticket.stream, reader
        repeats = ticket is None and bool(getattr(obj, "stream", False)) and not reader.incremental
        token = _serving.set(wanted._replace(repeats=repeats) if any(wanted.options) else None)
        try:
            async with aclosing(original(self, obj, request, *args, **kwargs)) as results:
                async for result in results:
                    _read(reader, obj, wanted, result, native=ticket is None)
                    yield result
        except (OptionError, Refused) as error:
            if ticket is not None:
                ticket.error = error.refusal if isinstance(error, Refused) else error
            raise
        finally:
            with suppress(ValueError):  # closed by another task than the one that began it, whose context ends with it
                _serving.reset(token)
            if ticket is None and wanted.place is not None:
                leave_with_the_reply(wanted.place)

    return generate_request


def _mark_all(obj: Any, wanted: _Asked) -> None:
    """Mark what a request asks for, or what is captured of all traffic."""
    if any(wanted.options):
        mark(obj, wanted.options)
    elif hasattr(obj, "sampling_params") and _is_traffic(obj) and (everything := front_end.everything()) is not None:
        mark(obj, [everything], reply=False)


def _read(reader: Reader, obj: Any, wanted: _Asked, result: Any, *, native: bool) -> None:
    """Take our elements out of one result, which may be that of several prompts."""
    for n, item in enumerate(result if isinstance(result, list) else [result]):
        index = item.get("index", n) if isinstance(item, dict) else n
        # several samples of a prompt lie together
        options = None
        if any(wanted.options):
            options = wanted.of(index // (getattr(obj, "parallel_sample_num", None) or 1))
        if options is not None:
            reader.read(item, index, options, native=native)
        elif isinstance(item, dict) and "meta_info" in item:
            item["meta_info"].pop(KEY, None)  # of others in the same batch


def wrap_validate_one_request(original: Original) -> Original:
    """``TokenizerManager._validate_one_request``: what only the tokenized prompt shows is refused before any work."""

    @wraps(original)
    def _validate_one_request(self: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, obj, input_ids, *args, **kwargs)
        params = getattr(obj, "sampling_params", None)
        packed = _custom_params(params).get(KEY)
        if packed is not None and input_ids is not None and isinstance(params, dict):
            options, reply = unpack_options(packed)
            prompt, new = len(input_ids), params.get("max_new_tokens")
            # the context is the end of what has none
            tokens = self.context_len if new is None else min(prompt + new, self.context_len)
            known = _serving.get()
            asks = reply and known is not None
            try:
                front_end.measure(
                    options,
                    known.place if known is not None and asks else None,
                    prompt,
                    max(0, tokens - prompt),
                    params.get("n") or 1,
                    repeats=known is not None and known.repeats,
                )
            except Refusal as refusal:
                raise Refused(refusal) from refusal
        return result

    return _validate_one_request


def _streams_what_is_new(manager: Any) -> bool:
    """--incremental-streaming-output, which older versions leave among the server's arguments."""
    holder = manager if hasattr(manager, "incremental_streaming_output") else manager.server_args
    return bool(getattr(holder, "incremental_streaming_output", False))


def _scope(request: Any) -> Mapping[str, Any]:
    """What a route may have left for us; SGLang's other front ends come with requests that have none."""
    return getattr(request, "scope", None) or {}


def _custom_params(params: Any) -> dict[str, Any]:
    custom = params.get("custom_params") if isinstance(params, dict) else None
    return custom if isinstance(custom, dict) else {}


def _each(params: Any) -> list[dict[str, Any]]:
    """The ``custom_params`` of each of a request's sampling parameters."""
    return [_custom_params(one) for one in (params if isinstance(params, list) else [params])]


def _refuse_foreign(obj: Any, *, fields_too: bool) -> None:
    """Raise OptionError for a name of ours among a client's own parameters, with ``fields_too`` for any of them."""
    for custom in _each(getattr(obj, "sampling_params", None)):
        name = foreign(custom)
        if name is not None and (fields_too or KEY in custom):
            raise OptionError(
                KEY if KEY in custom else name,
                f"custom_params: the name {KEY if KEY in custom else name!r} is attnhook's own; ask with {ASK}=true at "
                f"the top of a request to /v1/chat/completions, /v1/completions or {GENERATE}",
            )


def _wanted(obj: Any, request: Any) -> _Asked:
    """What a request that came by no OpenAI route asks for, admitted. Raises OptionError and `Refused`."""
    native = _is_native(request)
    _refuse_foreign(obj, fields_too=not native)
    if not native:
        return _Asked([None], None)
    body = getattr(request, "_json", None) if request is not None else None
    each = [body] if isinstance(body, dict) and ASK in body else _each(getattr(obj, "sampling_params", None))
    if not any(ASK in fields for fields in each):
        return _Asked([None], None)
    if request is None:  # in Python
        return _Asked([front_end.options(fields) for fields in each], None)
    try:
        return _Asked(*front_end.admit(each, request.headers))
    except Refusal as refusal:
        raise Refused(refusal) from refusal


def _is_native(request: Any) -> bool:
    """Whether a request came by ``/generate``, or from Python; not whether its path looks like that."""
    if request is None:
        return not _serves()
    scope = _scope(request)
    route = getattr(scope.get("route"), "path", None)
    return (path_of(scope) if route is None else route) == GENERATE


def _serves() -> bool:
    """Whether this process is SGLang's HTTP server, to which other people's requests come."""
    return getattr(sys.modules.get("sglang.srt.entrypoints.http_server"), "_global_state", None) is not None


def mark(obj: Any, options: list[RequestOptions | None], *, reply: bool = True) -> None:
    """Ask for capture in a GenerateReqInput's sampling parameters; ours of the client's fields are taken out.

    Raises OptionError for a request that no record can come of.
    """
    if not hasattr(obj, "sampling_params") or not front_end.model().generates:
        raise OptionError(ASK, f"{ASK}=true: {type(obj).__name__} generates no tokens; drop it")
    several = isinstance(obj.sampling_params, list)
    each = obj.sampling_params if several else [obj.sampling_params]
    wanted = options * len(each) if len(options) == 1 else options
    marked = [_marked(params or {}, one, reply) for params, one in zip(each, wanted, strict=True)]
    obj.sampling_params = marked if several else marked[0]


def _marked(params: dict[str, Any], options: RequestOptions | None, reply: bool) -> dict[str, Any]:
    custom = params.get("custom_params") or {}
    if options is None or not isinstance(custom, dict):
        return params
    if (params.get("beam_width") or 1) > 1:
        if not reply:
            return params  # all traffic that can be captured
        raise OptionError(ASK, f"{ASK}=true with beam_width={params['beam_width']}: beam search cannot be captured")
    if reply and params.get("max_new_tokens") == 0:
        raise OptionError(
            ASK, f"{ASK}=true with max_new_tokens=0: there is no token to give attention of; use 1 or more"
        )
    kept = {name: value for name, value in custom.items() if name not in FIELDS}
    # plain text: SGLang sends it to its schedulers, and nothing of a client's gets here under this name
    return {**params, "custom_params": {**kept, KEY: str(pack_options(options, reply=reply))}}


def _is_traffic(obj: Any) -> bool:
    """Whether a request is a client's, and not the engine's own health check; its warm-up looks like a client's."""
    rid = getattr(obj, "rid", None)
    return not (isinstance(rid, str) and rid.startswith(_HEALTH_CHECK))


async def lines(reply: AsyncIterator[Any], ticket: Ticket, place: Any) -> AsyncIterator[Any]:
    """A streamed OpenAI reply with its records; the place is free when it ends, however it ends."""
    try:
        async for line in reply:
            text = line.decode() if isinstance(line, bytes) else line
            yield ticket.stream.line(text) if ticket.stream is not None else text
    finally:
        place.leave()
