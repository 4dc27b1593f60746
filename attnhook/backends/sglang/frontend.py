"""In SGLang's front end: requests that ask, and records on their way out of its results.

Every way in, HTTP or `Engine`, passes `TokenizerManager.generate_request`. The OpenAI routes leave their options in
the request's scope (`server`); everybody else asks with the same fields, at the top of a ``/generate`` body or in
``sampling_params["custom_params"]``.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

from attnhook.errors import OptionError
from attnhook.options import REQUEST_FIELDS, RequestOptions, check_heads, check_reach, resolve_layers
from attnhook.serving.capabilities import attention_layers
from attnhook.serving.policy import Gate, Policy, Refusal
from attnhook.serving.replies import NOTHING_CAME, Attention, Stream
from attnhook.serving.wire import ASK, FIELDS, KEY, Share, asked, pack_options, unpack_options

Original = Callable[..., Any]

gate = Gate()
_GENERATE = "/generate"
_HEALTH_CHECK = "HEALTH_CHECK"
_manager: Any = None  # the TokenizerManager of this process


@cache
def policy() -> Policy:
    """This process's guard rails; read when the first request comes, after the server's flags have been."""
    return Policy.from_environ()


def knowing_the_model(original: Original) -> Original:
    """``TokenizerManager.__init__``: remember the model, and check that our hooks are there."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        global _manager
        from attnhook.backends.sglang import FRONTEND, SERVER, check_hooks

        original(self, *args, **kwargs)
        check_hooks(FRONTEND)
        if "sglang.srt.entrypoints.http_server" in sys.modules:
            check_hooks(SERVER)
        _manager = self

    return __init__


def model_shape() -> tuple[str, list[int] | None, int | None]:
    """Name, layers and query heads of the model; None where only the workers know."""
    config = getattr(_manager, "model_config", None)
    return (
        str(getattr(_manager, "served_model_name", "")),
        attention_layers(getattr(config, "hf_text_config", None)),
        getattr(config, "num_attention_heads", None),
    )


def model_dtype() -> str | None:
    """The model's dtype, such as "bfloat16"; None where it is not known yet."""
    dtype = getattr(getattr(_manager, "model_config", None), "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def model_device() -> str | None:
    """The kind of device on which the model computes, such as "cuda"."""
    device = getattr(getattr(_manager, "server_args", None), "device", None)
    return None if device is None else str(device)


def options_of(fields: Mapping[str, Any]) -> RequestOptions | None:
    """What a body's fields ask for, checked against the model; None where it does not ask. Raises OptionError."""
    options = asked(fields)
    if options is not None:
        _, layers, heads = model_shape()
        if layers:
            resolve_layers(options.layers, layers, "attention_layers")
        if heads:
            check_heads(options.heads, heads, "attention_heads")
    return options


@dataclass
class Reader:
    """Takes our elements out of the results of one request, whose choices it tells apart by their ids."""

    incremental: bool
    stream: Stream | None = None  # of an OpenAI reply, which gets what is new
    choices: dict[int, Attention] = field(default_factory=dict)  # all so far
    _seen: dict[str, int] = field(default_factory=dict)  # elements per id
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # JSON so far, of native replies

    def read(self, result: dict[str, Any], index: int, *, native: bool) -> None:
        """One result: its records go to ``choices`` and ``stream``, in native replies into ``meta_info``."""
        meta = result.get("meta_info") or {}
        elements = meta.pop(KEY, None) or []
        request = str(meta.get("id", ""))
        if not self.incremental:
            done, self._seen[request] = self._seen.get(request, 0), len(elements)
            elements = elements[done:]
        new = Attention()
        for element in elements:
            if element is not None:
                new.extend(Attention.of(Share.unpack(element), request, index))
        whole = self.choices.setdefault(index, Attention())
        whole.extend(new)
        if not whole and meta.get("finish_reason") is not None and result.get("output_ids"):
            new.error = whole.error = NOTHING_CAME
        if self.stream is not None:
            self.stream.add(index, new)
        elif native:
            meta.update(self._native(request, new))

    def _native(self, request: str, new: Attention) -> dict[str, Any]:
        """Fields for ``meta_info``: what is new, or all so far, as the engine does with its own lists."""
        fields = new.fields()
        if self.incremental:
            return fields
        sofar = self._entries.setdefault(request, {})
        for name, value in fields.items():
            sofar[name] = sofar.get(name, []) + value if isinstance(value, list) else sofar.get(name, value)
        return dict(sofar)


@dataclass
class Ticket:
    """What an OpenAI route leaves in the request's scope under `KEY`."""

    options: RequestOptions
    stream: Stream | None
    reader: Reader | None = None
    error: OptionError | None = None  # what only the tokenized prompt showed


class _Refused(ValueError):
    """A `Refusal` as SGLang's own routes understand it: they read ``status_code``."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.status_code = refusal.status


def serving(original: Original) -> Original:
    """``TokenizerManager.generate_request``: mark what asks, and take our elements out of every result."""

    @wraps(original)
    async def generate_request(self: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> Any:
        ticket: Ticket | None = _scope(request).get(KEY)
        place = None
        if ticket is None:
            native = _native_options(obj, request)
            if any(native) and request is not None:
                place = _admit([options for options in native if options is not None], request.headers)
        else:
            native = [ticket.options]
        asks = any(native)
        if asks:
            mark(obj, native)
        elif policy().capture_all and hasattr(obj, "sampling_params") and _is_traffic(obj):
            mark(obj, [RequestOptions.resolve(arguments={"mode": "fingerprint"})], reply=False)
        reader = Reader(bool(getattr(obj, "stream", False) and _streams_what_is_new(self)))
        if ticket is not None:
            reader.stream, ticket.reader = ticket.stream, reader
        try:
            async with aclosing(original(self, obj, request, *args, **kwargs)) as results:
                async for result in results:
                    for n, item in enumerate(result if isinstance(result, list) else [result]):
                        index = item.get("index", n) if isinstance(item, dict) else n
                        # several samples of a prompt lie together
                        prompt = index // (getattr(obj, "parallel_sample_num", None) or 1)
                        if asks and native[prompt if len(native) > 1 else 0] is not None:
                            reader.read(item, index, native=ticket is None)
                        elif isinstance(item, dict) and "meta_info" in item:
                            item["meta_info"].pop(KEY, None)  # of others in the same batch
                    yield result
        except OptionError as error:
            if ticket is not None:
                ticket.error = error
            raise
        finally:
            if place is not None:
                place.leave()

    return generate_request


def counting(original: Original) -> Original:
    """``TokenizerManager._validate_one_request``: a span that begins where the request never comes to is an error."""

    @wraps(original)
    def _validate_one_request(self: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, obj, input_ids, *args, **kwargs)
        params = getattr(obj, "sampling_params", None)
        packed = _custom_params(params).get(KEY)
        if packed is not None and input_ids is not None and isinstance(params, dict):
            options, _ = unpack_options(packed)
            new = params.get("max_new_tokens")  # the context is the end of what has none
            tokens = self.context_len if new is None else min(len(input_ids) + new, self.context_len)
            check_reach(options.spans, tokens, REQUEST_FIELDS["spans"])
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


def _native_options(obj: Any, request: Any) -> list[RequestOptions | None]:
    """What a request that came by no OpenAI route asks for, per prompt or once for all. Raises OptionError."""
    body = getattr(request, "_json", None) if request is not None else None
    path = str(_scope(request).get("path", "")) if request is not None else _GENERATE
    if isinstance(body, dict) and ASK in body and path.endswith(_GENERATE):
        return [options_of(body)]
    params = getattr(obj, "sampling_params", None)
    each = params if isinstance(params, list) else [params]
    found = [_custom_params(one) for one in each]
    if any(KEY in custom for custom in found):
        raise OptionError(KEY, f"custom_params: the name {KEY!r} is attnhook's own; ask with {ASK}=true")
    if not path.endswith(_GENERATE) and (
        (isinstance(body, dict) and body.get(ASK)) or any(custom.get(ASK) for custom in found)
    ):
        raise OptionError(
            ASK,
            f"{ASK}=true: {path} cannot carry attention asked for so; put the fields at the top of a request to "
            "/v1/chat/completions, /v1/completions or /generate",
        )
    return [options_of(custom) if ASK in custom else None for custom in found]


def _admit(options: list[RequestOptions], headers: Mapping[str, str]) -> Any:
    try:
        for one in options:
            policy().check(one, headers)
        return gate.place(policy().max_concurrent)
    except Refusal as refusal:
        raise _Refused(refusal) from refusal


def mark(obj: Any, options: list[RequestOptions | None], *, reply: bool = True) -> None:
    """Ask for capture in a GenerateReqInput's sampling parameters; ours of the client's fields are taken out.

    Raises OptionError for a request that no record can come of.
    """
    if not hasattr(obj, "sampling_params"):
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
    return {**params, "custom_params": {**kept, KEY: pack_options(options, reply=reply)}}


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
