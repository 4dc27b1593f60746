"""What to capture: options per request and per process, from one precedence, validated once.

Request field > call argument > environment (``ATTNHOOK_*``) > default. An unknown name or a value out
of range raises `OptionError` with the field as the caller wrote it, the value and the allowed range.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from attnhook.errors import OptionError
from attnhook.record.row import MODES, TOP_K_PER_HEAD_MAX, Mode
from attnhook.system import moved, switch
from attnhook.system.addresses import masked

__getattr__ = moved.names(__name__, {"shown": "options:quoted"})

LayerSpec = Literal["last", "auto", "all"] | tuple[int, ...]
Heads = tuple[int, ...] | Mapping[int, tuple[int, ...]] | None

#: What can be told of each query head by itself.
PER_HEAD = ("spans", "fingerprint", "sink", "top", "lse")

#: Of which heads the attention is summed up by key: the mean over the selected ones, or over those of each kv head.
KEY_MASS = ("mean", "kv_head")

#: How arrays of a reply are written: as lists of numbers, or in base64.
ENCODINGS = ("float", "base64")

TOP_K_MAX = 256
KERNELS = ("compiled", "naive", "torch", "triton")
_AUTO_LAYERS = 4
_SPANS_MAX = 255
_SPAN_NAME_MAX = 255
_SPAN_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_QUOTED = 400  # characters


def quoted(value: object) -> str:
    """A value as an error repeats it: whole where it is short, else its ends, however much a client has sent."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits, which Python does not write out
        return f"<{type(value).__name__}>"
    return text if len(text) <= _QUOTED else f"{text[:300]}...{text[-60:]} ({len(text)} characters)"


@dataclass(frozen=True)
class RequestOptions:
    """What one request wants captured."""

    top_k: int = 32
    layers: LayerSpec = "last"
    #: average over these query heads, of every layer or by layer (others: all of theirs); None: all
    heads: Heads = None
    mode: Mode = "raw"
    prompt: bool = False  # prompt rows too
    rows: tuple[tuple[int, int], ...] = ()  # these prompt rows too: half-open ranges of positions, ascending, apart
    stride: int = 1  # every n-th generated row
    max_tokens: int = 4096  # at most this many generated rows; 0: none, but for a chosen one of the prompt
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # half-open position ranges
    mask_prefix: int = 0  # positions below it are never reported
    per_head: tuple[str, ...] = ()  # of `PER_HEAD`: told of every query head too, in every captured layer
    top_k_per_head: int = 1  # positions of each head, where "top" is told
    key_mass: str | None = None  # of `KEY_MASS`: sums of the captured rows' attention by key; None: none
    encoding_format: str = "float"  # servers: how arrays of a reply are written, of `ENCODINGS`
    self_check: bool = False  # servers: rebuild the attention output of every captured row and layer

    @classmethod
    def resolve(
        cls,
        request: Mapping[str, Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> RequestOptions:
        """Merge the three sources; ``request`` is an HTTP body, whose unrelated fields are left alone.

        Raises OptionError for an unknown or bad field.
        """
        values: dict[str, Any] = {}
        named: dict[str, str] = {}  # as the last who gave it calls it
        environ = os.environ if environ is None else environ
        for name, spec in _FIELDS.items():
            if spec.env in environ:
                values[name], named[name] = spec.check(spec.env, spec.parse(spec.env, environ[spec.env])), spec.env
        for name, value in (arguments or {}).items():
            if name not in _FIELDS:
                raise OptionError(name, f"unknown option {quoted(name)}{_hint(name, _FIELDS)}")
            values[name], named[name] = _FIELDS[name].check(name, value), name
        by_json = {spec.json: name for name, spec in _FIELDS.items()}
        for key, value in (request or {}).items():
            if key in by_json:
                values[by_json[key]], named[by_json[key]] = _FIELDS[by_json[key]].check(key, value), key
            elif key.startswith("attention_"):
                raise OptionError(key[:80], f"unknown field {quoted(key)}{_hint(key[:80], by_json)}")
        if values.get("per_head") and values.get("mode") == "fingerprint":
            if named["per_head"] == _FIELDS["per_head"].env and named["mode"] != _FIELDS["mode"].env:
                values["per_head"] = ()  # the process's default gives way to who asks for fingerprints
            else:
                name, mode = named["per_head"], named["mode"]
                raise OptionError(
                    name,
                    f"{name}={list(values['per_head'])} with {mode}='fingerprint', whose records have nothing of a "
                    f"layer: ask for {mode}='raw', or drop {name}",
                )
        if "rows" in values:
            values["rows"] = _as_ranges(named["rows"], values["rows"], values.get("spans") or {})
        if values.get("max_tokens") == 0 and not (values.get("prompt") or values.get("rows")):
            name = named["max_tokens"]
            raise OptionError(name, f"{name}=0 without rows of the prompt captures nothing: ask for rows too")
        if isinstance(values.get("heads"), Mapping):
            values.setdefault("layers", tuple(values["heads"]))
        return cls(**values)


@dataclass(frozen=True)
class CaptureOptions:
    """What one process captures when no call says otherwise, and where records go."""

    request: RequestOptions = field(default_factory=RequestOptions)
    sinks: tuple[str, ...] = ()
    queue_size: int = 65536  # records that may wait for each sink

    @classmethod
    def resolve(
        cls,
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        plugins: Callable[[], Collection[str]] = frozenset,
    ) -> CaptureOptions:
        """Options from call arguments (``sinks``, ``queue_size`` and those of a request) and environment.

        ``plugins`` tells the variables that plugins read; it loads them, so it is called where a variable is none of
        attnhook's own. Raises OptionError for an unknown or bad argument or ``ATTNHOOK_*`` variable.
        """
        environ = os.environ if environ is None else environ
        known = variables()
        if strange := [name for name in environ if name.startswith("ATTNHOOK_") and name not in known]:
            known |= set(plugins())
            for name in strange:
                if name not in known:
                    raise OptionError(name, f"unknown environment variable {name}{_hint(name, known)}")
        arguments = dict(arguments or {})
        if arguments.get("self_check") is True:
            raise OptionError(
                "self_check",
                "self_check=True: only a request to a server can ask for it (attention_self_check); `attnhook verify` "
                "checks the numbers in this process",
            )
        if arguments.get("encoding_format") == "base64":
            raise OptionError(
                "encoding_format",
                "encoding_format='base64': only a request to a server can ask for it (attention_encoding_format); "
                "records in this process are arrays",
            )
        values: dict[str, Any] = {}
        urls = [url.strip() for url in environ.get("ATTNHOOK_SINKS", "").split(",") if url.strip()]
        if urls:
            values["sinks"] = _check_sinks("ATTNHOOK_SINKS", urls)
        if environ.get("ATTNHOOK_KERNEL", "") not in ("", *KERNELS):
            # the kernel reads it at every call; here a wrong one is found before an engine runs
            raise OptionError(
                "ATTNHOOK_KERNEL", f"ATTNHOOK_KERNEL={environ['ATTNHOOK_KERNEL']!r} must be one of {', '.join(KERNELS)}"
            )
        if "ATTNHOOK_QUEUE_SIZE" in environ:
            size = _parse_int("ATTNHOOK_QUEUE_SIZE", environ["ATTNHOOK_QUEUE_SIZE"])
            values["queue_size"] = _between(1, 10**8)("ATTNHOOK_QUEUE_SIZE", size)
        if "sinks" in arguments:
            values["sinks"] = _check_sinks("sinks", arguments.pop("sinks"))
        if "queue_size" in arguments:
            values["queue_size"] = _between(1, 10**8)("queue_size", arguments.pop("queue_size"))
        return cls(request=RequestOptions.resolve(arguments=arguments, environ=environ), **values)


def variables() -> set[str]:
    """Names of attnhook's own environment variables, but for the switch ``ATTNHOOK``."""
    return {*(spec.env for spec in _FIELDS.values()), *_PROCESS_VARIABLES}


def graph_layers(environ: Mapping[str, str] | None = None) -> LayerSpec | None:
    """Layers whose queries a server keeps under CUDA graphs, from ``ATTNHOOK_GRAPH_LAYERS``; None where unset.

    Raises OptionError for what names no layers.
    """
    name = "ATTNHOOK_GRAPH_LAYERS"
    text = (os.environ if environ is None else environ).get(name, "")
    return _check_layers(name, parse_layers(name, text)) if text else None


def enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``ATTNHOOK`` asks for capture. Raises OptionError unless it is unset, empty, 0 or 1."""
    if (fault := switch.fault(environ)) is not None:
        raise OptionError("ATTNHOOK", fault)
    return (os.environ if environ is None else environ).get("ATTNHOOK") == "1"


def resolve_layers(spec: LayerSpec, available: Sequence[int], name: str = "layers") -> tuple[int, ...]:
    """Layer numbers, ascending, that ``spec`` selects among the model's attention layers.

    Negative numbers count from the end of ``available``. Raises OptionError for a layer that the model does
    not have, with the range that it has.
    """
    layers = sorted(available)
    if spec == "last":
        return (layers[-1],)
    if spec == "all":
        return tuple(layers)
    if spec == "auto":
        count = min(_AUTO_LAYERS, len(layers))
        return tuple(layers[(i + 1) * len(layers) // count - 1] for i in range(count))
    chosen = set()
    for layer in spec:
        number = layers[layer] if -len(layers) <= layer < 0 else layer
        if number not in layers:
            dense = layers == list(range(len(layers)))
            have = f"0..{len(layers) - 1}" if dense else ", ".join(map(str, layers))
            raise OptionError(
                name,
                f"{name}: layer {layer} does not exist: the model's attention layers are {have} "
                f"(or -{len(layers)}..-1 from the end)",
            )
        chosen.add(number)
    return tuple(sorted(chosen))


def check_heads(heads: Heads, count: int, name: str = "heads") -> None:
    """Raise OptionError where a selected query head, of any layer, is not in 0..count-1."""
    by_layer = heads.items() if isinstance(heads, Mapping) else [(None, heads or ())]
    for layer, chosen in by_layer:
        for head in chosen:
            if not 0 <= head < count:
                of = "" if layer is None else f" of layer {layer}"
                raise OptionError(
                    name, f"{name}: head {head}{of} does not exist: the model's query heads are 0..{count - 1}"
                )


def resolve_choice(
    layers: LayerSpec, heads: Heads, available: Sequence[int], names: tuple[str, str] = ("layers", "heads")
) -> tuple[tuple[int, ...], Heads]:
    """The chosen layers, as `resolve_layers` gives them, and ``heads`` by these numbers where they are told by layer.

    Raises OptionError as `resolve_layers` does; for heads of a layer that is not there, is not chosen, or is named
    twice.
    """
    if not isinstance(heads, Mapping):
        return resolve_layers(layers, available, names[0]), heads
    name, found = names[1], dict[int, tuple[int, ...]]()
    for layer, chosen in heads.items():
        (number,) = resolve_layers((layer,), available, name)
        if number in found:
            raise OptionError(name, f"{name}: layer {number} is named twice, as {layer} too: name it once")
        found[number] = chosen
    captured = resolve_layers(layers, available, names[0])
    if strange := found.keys() - {*captured}:
        raise OptionError(
            name,
            f"{name}: layer {min(strange)} is not captured: the captured layers are {', '.join(map(str, captured))}; "
            "name it among them, or drop its heads",
        )
    return captured, dict(sorted(found.items()))


def _hint(name: str, known: Mapping[str, Any] | set[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def parse_layers(name: str, text: str) -> LayerSpec:
    """``"last"``, ``"auto"``, ``"all"`` or comma-separated numbers, as typed by a person."""
    if text in ("last", "auto", "all"):
        return text  # type: ignore[return-value]
    return _parse_ints(name, text, "last, auto, all or layer numbers such as 0,14,-1")


def parse_heads(name: str, text: str) -> Any:
    """Comma-separated head numbers, or JSON of them by layer, as typed by a person; not checked yet."""
    wanted = 'head numbers such as 0,3, or JSON of them by layer such as {"12": [0, 3]}'
    if text.lstrip().startswith("{"):
        return _parse_json(name, text, wanted)
    return _parse_ints(name, text, wanted)


def _parse_ints(name: str, text: str, wanted: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(name, f"{name}={quoted(text)} must be {wanted}") from None


def _parse_int(name: str, text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text  # the check refuses it, and knows the range


def _parse_bool(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise OptionError(name, f"{name}={quoted(text)} must be 0 or 1")
    return text == "1"


def _parse_spans(name: str, text: str) -> Any:
    return _parse_json(name, text, 'JSON such as {"system": [0, 40]}')


def _parse_rows(name: str, text: str) -> Any:
    return _parse_json(name, text, 'JSON such as [[0, 40], "question"]')


def _parse_json(name: str, text: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise OptionError(name, f"{name}={quoted(text)} must be {wanted}") from None


def _between(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise OptionError(name, f"{name}={quoted(value)} must be a whole number from {low} to {high}")
        return value

    return check


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(name, f"{name}={quoted(value)} must be true or false")
    return value


def _check_ints(name: str, value: Any, low: int | None = None) -> tuple[int, ...]:
    if not _is_ints(value) or not value or (low is not None and min(value) < low):
        wanted = "whole numbers" if low is None else f"whole numbers from {low} up"
        raise OptionError(name, f"{name}={quoted(value)} must be a non-empty list of {wanted}")
    return tuple(dict.fromkeys(value))


def _is_ints(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes | bytearray)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )


def _check_layers(name: str, value: Any) -> LayerSpec:
    if isinstance(value, str) and value in ("last", "auto", "all"):
        return value  # type: ignore[return-value]
    try:
        return _check_ints(name, value)
    except OptionError:
        raise OptionError(
            name, f'{name}={quoted(value)} must be "last", "auto", "all" or a list of layer numbers such as [0, 14, -1]'
        ) from None


def _check_heads(name: str, value: Any) -> Heads:
    if value is None:
        return None
    by_layer = isinstance(value, Mapping)
    lists = {_as_layer(layer): heads for layer, heads in value.items()} if by_layer else {0: value}
    if lists and all(_is_ints(heads) and heads and min(heads) >= 0 for heads in lists.values()) and None not in lists:
        chosen = {int(layer or 0): tuple(dict.fromkeys(heads)) for layer, heads in lists.items()}
        if by_layer and len(chosen) == len(value):
            return chosen
        if not by_layer:
            return chosen[0]
    raise OptionError(
        name,
        f"{name}={quoted(value)} must be a non-empty list of whole numbers from 0 up, or such lists by layer number",
    )


def _as_layer(value: Any) -> int | None:
    """A layer's number, also as JSON writes a name; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,5}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def parse_ranges(name: str, text: str) -> list[tuple[int, int]]:
    """Comma-separated ranges of positions, as typed by a person."""
    try:
        return [(int(start), int(end)) for start, end in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise OptionError(name, f"{name}={quoted(text)} must be ranges of positions such as 0:4,180:196") from None


def parse_names(text: str) -> list[str]:
    """Comma-separated names, as typed by a person; not checked yet."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_per_head(name: str, value: Any) -> tuple[str, ...]:
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or any(not isinstance(one, str) or one not in PER_HEAD for one in value)
    ):
        raise OptionError(name, f"{name}={quoted(value)} must be a list of {', '.join(PER_HEAD)}")
    return tuple(one for one in PER_HEAD if one in value)


def _check_key_mass(name: str, value: Any) -> str | None:
    if value is None or value is False:
        return None
    if not isinstance(value, str) or value not in KEY_MASS:
        raise OptionError(name, f"{name}={quoted(value)} must be one of {', '.join(KEY_MASS)}, or false")
    return value


def _check_encoding(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in ENCODINGS:
        raise OptionError(name, f"{name}={quoted(value)} must be one of {', '.join(ENCODINGS)}")
    return value


def _check_mode(name: str, value: Any) -> Mode:
    if value not in MODES:
        raise OptionError(name, f"{name}={quoted(value)} must be one of {', '.join(MODES)}")
    return value  # type: ignore[no-any-return]


def _check_spans(name: str, value: Any) -> Mapping[str, tuple[int, int]]:
    if not isinstance(value, Mapping):
        raise OptionError(name, f"{name}={quoted(value)} must map names to [start, end] position ranges")
    if len(value) > _SPANS_MAX:
        raise OptionError(name, f"{name} has {len(value)} spans; at most {_SPANS_MAX} are allowed")
    spans = {}
    for label, bounds in value.items():
        if not _is_ints(bounds) or len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] < 2**31:
            raise OptionError(
                name,
                f"{name}: {quoted(label)}: {quoted(bounds)} must be [start, end] positions, 0 <= start < end < 2**31",
            )
        # what the records' binary row can hold
        if not isinstance(label, str) or not _SPAN_NAME.fullmatch(label) or len(label.encode()) > _SPAN_NAME_MAX:
            raise OptionError(
                name,
                f"{name}: {quoted(label)} must be a name of 1 to {_SPAN_NAME_MAX} bytes of UTF-8 without control "
                "characters",
            )
        spans[label] = (bounds[0], bounds[1])
    return spans


def _check_rows(name: str, value: Any) -> list[tuple[int, int] | str]:
    wanted = f"{name}={quoted(value)} must be a list of [start, end] positions, 0 <= start < end < 2**31, or span names"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise OptionError(name, wanted)
    if len(value) > _SPANS_MAX:
        raise OptionError(name, f"{name} has {len(value)} ranges; at most {_SPANS_MAX} are allowed")
    rows: list[tuple[int, int] | str] = []
    for one in value:
        if isinstance(one, str):
            rows.append(one)
        elif _is_ints(one) and len(one) == 2 and 0 <= one[0] < one[1] < 2**31:
            rows.append((one[0], one[1]))
        else:
            raise OptionError(name, f"{wanted}: {quoted(one)} is neither")
    return rows


def _as_ranges(
    name: str, rows: Sequence[tuple[int, int] | str], spans: Mapping[str, tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Ranges, ascending and apart, from ranges and names of spans."""
    found: list[tuple[int, int]] = []
    for one in rows:
        if isinstance(one, str) and one not in spans:
            have = f"the spans are {', '.join(map(quoted, spans))}" if spans else "there are no spans"
            raise OptionError(name, f"{name}: {quoted(one)} is no span: {have}")
        found.append(spans[one] if isinstance(one, str) else one)
    apart: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(end, apart[-1][1])
        else:
            apart.append((start, end))
    return tuple(apart)


def check_rows(rows: tuple[tuple[int, int], ...], tokens: int, name: str = "rows") -> None:
    """Raise OptionError where a chosen row lies beyond a prompt of so many tokens."""
    for start, end in rows:
        if end > tokens:
            raise OptionError(
                name,
                f"{name}: [{start}, {end}] reaches beyond the prompt, whose positions are 0..{tokens - 1}: choose rows "
                "of the prompt (those of the answer are told by themselves)",
            )


def check_reach(spans: Mapping[str, tuple[int, int]], tokens: int, name: str = "spans") -> None:
    """Raise OptionError for a span that begins beyond the most tokens that a request can come to have.

    An end may lie further: that is how the answer as far as it comes is named.
    """
    for label, (start, end) in spans.items():
        if start >= tokens:
            raise OptionError(
                name,
                f"{name}: {quoted(label)}: [{start}, {end}] begins beyond the request's positions 0..{tokens - 1}: its "
                "prompt and the most tokens of its answer",
            )


def _check_sinks(name: str, value: Any) -> tuple[str, ...]:
    urls = (value,) if isinstance(value, str) else value
    if not isinstance(urls, Sequence) or any(not isinstance(url, str) or ":" not in url for url in urls):
        if isinstance(value, str):
            value = masked(value)
        elif isinstance(value, (list, tuple)):
            value = [masked(url) if isinstance(url, str) else url for url in value]
        raise OptionError(name, f"{name}={quoted(value)} must be sink URLs such as jsonl:records.jsonl")
    return tuple(urls)


@dataclass(frozen=True)
class _Field:
    json: str
    env: str
    parse: Callable[[str, str], Any]
    check: Callable[[str, Any], Any]


_FIELDS: dict[str, _Field] = {
    "top_k": _Field("top_k_attention", "ATTNHOOK_TOP_K", _parse_int, _between(1, TOP_K_MAX)),
    "layers": _Field("attention_layers", "ATTNHOOK_LAYERS", parse_layers, _check_layers),
    "heads": _Field("attention_heads", "ATTNHOOK_HEADS", parse_heads, _check_heads),
    "mode": _Field("attention_mode", "ATTNHOOK_MODE", lambda _, text: text, _check_mode),
    "prompt": _Field("attention_prompt", "ATTNHOOK_PROMPT", _parse_bool, _check_bool),
    "rows": _Field("attention_rows", "ATTNHOOK_ROWS", _parse_rows, _check_rows),
    "stride": _Field("attention_stride", "ATTNHOOK_STRIDE", _parse_int, _between(1, 10**6)),
    "max_tokens": _Field("attention_max_tokens", "ATTNHOOK_MAX_TOKENS", _parse_int, _between(0, 10**7)),
    "spans": _Field("attention_spans", "ATTNHOOK_SPANS", _parse_spans, _check_spans),
    "mask_prefix": _Field("attention_mask_prefix", "ATTNHOOK_MASK_PREFIX", _parse_int, _between(0, 2**31 - 1)),
    "per_head": _Field("attention_per_head", "ATTNHOOK_PER_HEAD", lambda _, text: parse_names(text), _check_per_head),
    "top_k_per_head": _Field(
        "attention_top_k_per_head", "ATTNHOOK_TOP_K_PER_HEAD", _parse_int, _between(1, TOP_K_PER_HEAD_MAX)
    ),
    "key_mass": _Field("attention_key_mass", "ATTNHOOK_KEY_MASS", lambda _, text: text or None, _check_key_mass),
    "encoding_format": _Field(
        "attention_encoding_format", "ATTNHOOK_ENCODING_FORMAT", lambda _, text: text, _check_encoding
    ),
    "self_check": _Field("attention_self_check", "ATTNHOOK_SELF_CHECK", _parse_bool, _check_bool),
}

#: Options of a request and their names in an HTTP body.
REQUEST_FIELDS: Mapping[str, str] = {name: spec.json for name, spec in _FIELDS.items()}

_PROCESS_VARIABLES = {
    "ATTNHOOK_SINKS",
    "ATTNHOOK_QUEUE_SIZE",
    "ATTNHOOK_KERNEL",
    "ATTNHOOK_CACHE",
    "ATTNHOOK_HASH_KEY",  # sinks with hash_ids=1; see sinks/privacy.py
    # servers; see serving/policy.py
    "ATTNHOOK_RETURN_ATTENTION_TOKENS",
    "ATTNHOOK_MAX_CONCURRENT",
    "ATTNHOOK_FINGERPRINT_ONLY",
    "ATTNHOOK_API_KEY",
    "ATTNHOOK_CAPTURE_ALL",
    "ATTNHOOK_GRAPH_LAYERS",
    "ATTNHOOK_SPAN_WIDTH",
    "ATTNHOOK_MAX_BYTES",
    "ATTNHOOK_KEY_MASS_BYTES",
    "ATTNHOOK_MAX_BYTES_IN_FLIGHT",
}
