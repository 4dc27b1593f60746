"""How many bytes of JSON a request may be answered with, estimated before any work is done."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from attnhook.capture.rows import prompt_ranges
from attnhook.errors import OptionError
from attnhook.options import REQUEST_FIELDS, RequestOptions, resolve_layers
from attnhook.record.fingerprint import BINS, SIZE
from attnhook.serving.gate import Place
from attnhook.serving.policy import Policy
from attnhook.serving.wire import ASK

_ENTRY = 184
_LAYER = 114
_HEADS = 120
_SUM_BYTES = 8  # where it is added up


class _Sizes(NamedTuple):
    """Bytes of JSON without spaces: a number with its comma, a position, a sum of thousands of rows, and around each
    array what is not numbers."""

    number: float
    position: float
    sum: float
    array: int


#: With 7 decimals; with the type and the shape.
_SIZES = {"float": _Sizes(10, 7, 13, 2), "base64": _Sizes(16 / 3, 16 / 3, 16 / 3, 62)}


def generated_rows(options: RequestOptions, new: int) -> int:
    """Rows of ``new`` generated tokens that these options want."""
    if options.max_tokens == 0:
        return min(new, 1)  # the prompt's last row, where it is a chosen one
    return min(-(-new // options.stride), options.max_tokens)


def head_bytes(options: RequestOptions, heads: int) -> float:
    """JSON bytes of the numbers per head of one row and layer."""
    told, size = options.per_head, _SIZES[options.encoding_format]
    if not told:
        return 0
    lists = size.array <= 2
    each = (
        ((size.position + size.number) * options.top_k_per_head + 4 * lists) * ("top" in told)
        + (SIZE * size.number + 3 * lists) * ("fingerprint" in told)
        + size.number * len(options.spans) * ("spans" in told)
        + (size.number + lists) * ("sink" in told)
        + (size.number + 2 * lists) * ("lse" in told)
    )
    arrays = 2 * ("top" in told) + ("fingerprint" in told) + ("sink" in told) + ("lse" in told)
    spans = sum(len(json.dumps(name)) + 2 + size.array for name in options.spans) * ("spans" in told)
    return _HEADS + spans + arrays * size.array + heads * each


def reply_bytes(options: RequestOptions, layers: int, prompt: int, new: int, heads: int = 0) -> int:
    """The most JSON bytes of attention that one answer to a prompt of ``prompt`` tokens may hold, to about a quarter.

    ``layers`` are those that the options name in this model, ``new`` the most tokens of the answer, ``heads`` the query
    heads of a layer.
    """
    size = _SIZES[options.encoding_format]
    wanted = prompt_ranges(options, 0, prompt - 1)
    rows = generated_rows(options, new) + sum(map(len, wanted))
    spans = sum(len(json.dumps(name)) + 12 for name in options.spans)  # numbers by name, in either format
    entry = _ENTRY + SIZE * size.number + size.array + spans
    groups = {None: 0, "mean": 1, "kv_head": heads}[options.key_mass]  # no model has more kv heads than query heads
    sums = layers * (groups * ((prompt + new) * size.sum + 2) + size.array + _LAYER) if groups else 0
    if options.mode == "fingerprint":
        return math.ceil(rows * entry + sums)
    own = SIZE * size.number if options.mode == "raw" else BINS * size.number + 40
    entry += layers * (_LAYER + own + 3 * size.array + spans + head_bytes(options, heads))
    kept = generated_rows(options, new) * min(options.top_k, prompt + new)
    kept += sum(_entries(one.stop, options.top_k) - _entries(one.start, options.top_k) for one in wanted)
    return math.ceil(rows * entry + layers * kept * (size.position + size.number) + sums)


def _entries(rows: int, top_k: int) -> int:
    """Entries that the first rows of a prompt have: each as many as it sees keys, and at most so many."""
    growing = min(rows, top_k)
    return growing * (growing + 1) // 2 + (rows - growing) * top_k


#: A stream that repeats what it has sent may come to so many times as much as one reply, over all of its events.
REPEATED = 16


def check_repeating(
    options: RequestOptions, layers: int, prompt: int, new: int, choices: int, limit: int, heads: int = 0
) -> None:
    """Raise OptionError where a stream whose every event holds all rows so far comes to too many bytes altogether."""
    last = reply_bytes(options, layers, prompt, new, heads)
    first = reply_bytes(options, layers, prompt, min(new, 1), heads)  # the rows of the prompt, which each event repeats
    size = choices * (first * new + (last - first) * (new - 1) // 2)
    if size > REPEATED * limit:
        raise OptionError(
            ASK,
            f"{ASK}=true with a stream of {new} tokens: each event repeats all before it, which may come to {size} "
            f"bytes of attention altogether; this server allows {REPEATED * limit} ({REPEATED} times "
            "--attention-tokens-max-bytes): ask without a stream, for less, or on a server with "
            "--incremental-streaming-output",
        )


def count_layers(options: RequestOptions, layers: Sequence[int] | None, config: Any) -> int:
    """How many layers the options name, as far as a front end can tell: of ``layers``, or of a model's ``config``."""
    known = layers or range(getattr(config, "num_hidden_layers", None) or 128)
    return len(resolve_layers(options.layers, known))


def count_heads(heads: int | None, config: Any) -> int:
    """Query heads of a layer, as far as a front end can tell: ``heads``, or by a model's ``config``."""
    return heads or getattr(config, "num_attention_heads", None) or 128


def count_groups(options: RequestOptions, heads: int, config: Any) -> int:
    """How many sums of a layer's keys the options want: one, or one for each kv head by a model's ``config``."""
    return 1 if options.key_mass == "mean" else getattr(config, "num_key_value_heads", None) or heads


def check_key_mass(sums: int, keys: int, limit: int) -> None:
    """Raise OptionError where so many sums of so many keys take more memory than a server allows."""
    size, name = sums * keys * _SUM_BYTES, REQUEST_FIELDS["key_mass"]
    if size > limit:
        raise OptionError(
            name,
            f"{name}: {sums} sums of up to {keys} keys take {size} bytes of memory while the request runs; this server "
            f"allows {limit} (--attention-tokens-key-mass-bytes): ask for fewer attention_layers, for 'mean', or for a "
            "smaller max_tokens",
        )


def measure(
    policy: Policy,
    place: Place,
    options: RequestOptions,
    layers: int,
    prompt: int,
    new: int,
    choices: int,
    heads: int = 0,
) -> None:
    """Refuse a prompt of a request that tells more than a server allows, or comes to more bytes; else take the room.

    Raises OptionError, and Refusal where there is no room now.
    """
    policy.check_spans(options, prompt + new)
    size = check_reply(options, layers, prompt, new, choices, policy.max_bytes, already=place.bytes, heads=heads)
    place.reserve(size, policy.max_bytes_in_flight)


def check_reply(
    options: RequestOptions,
    layers: int,
    prompt: int,
    new: int,
    choices: int,
    limit: int,
    *,
    already: int = 0,
    heads: int = 0,
) -> int:
    """`reply_bytes` of all choices of a prompt.

    Raises OptionError where they pass ``limit`` together with what other prompts of the request come to
    (``already``), with the numbers and the remedy.
    """
    size = reply_bytes(options, layers, prompt, new, heads) * choices
    if already + size > limit:
        rows = generated_rows(options, new) * choices
        before = choices * sum(map(len, prompt_ranges(options, 0, prompt - 1)))
        asked = f"{rows} generated rows" + (f" and {before} of the prompt" if before else "")
        more = f", and {already} of the request's other prompts" if already else ""
        remedies = [f"a smaller max_tokens (now {new})", "fewer attention_layers", "a smaller top_k_attention"]
        remedies += ["less of attention_per_head"] * bool(options.per_head)
        remedies += ["no attention_key_mass"] * bool(options.key_mass)
        remedies += ["no attention_prompt"] * options.prompt
        remedies += ["fewer attention_rows"] * bool(options.rows) + ["fewer or shorter attention_spans"] * bool(
            options.spans
        )
        raise OptionError(
            ASK,
            f"{ASK}=true: {asked} of {layers} layers may come to {size} bytes of attention{more}; this server answers "
            f"with at most {limit} a request (--attention-tokens-max-bytes): ask for {', '.join(remedies)}, or "
            "attention_mode 'fingerprint'",
        )
    return size
