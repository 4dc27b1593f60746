"""Options on their way to an engine's workers, records on their way back, as text and bytes.

Engines move requests and outputs between processes with pickle, msgpack or JSON: whatever they use carries these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import msgspec

from attnhook.errors import AttnhookError, OptionError
from attnhook.options import REQUEST_FIELDS, RequestOptions, quoted

#: The request field that asks for capture.
ASK = "return_attention_tokens"
#: All request fields that are ours.
FIELDS = frozenset({ASK, *REQUEST_FIELDS.values()})
#: Where an engine's own dictionaries keep what is ours.
KEY = "attnhook"


class Packed(str):
    """Options that this process has packed. A client sends plain text, which is never taken for it.

    Engines know no such text: the front end turns it into plain text where the request leaves for the workers.
    """

    __slots__ = ()


def asked(fields: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> RequestOptions | None:
    """The options that a request body's fields ask for; None where it does not ask.

    Raises OptionError for an unknown or bad field, also where capture is not asked for: what a client
    misspells must not be ignored.
    """
    options = RequestOptions.resolve(request={k: v for k, v in fields.items() if k != ASK}, environ=environ)
    wanted = fields.get(ASK, False)
    if not isinstance(wanted, bool):
        raise OptionError(ASK, f"{ASK}={quoted(wanted)} must be true or false")
    return options if wanted else None


class _Asking(msgspec.Struct):
    options: RequestOptions
    reply: bool


def pack_options(options: RequestOptions, *, reply: bool = True) -> Packed:
    """Options as text, the same for equal options; without ``reply`` the records go to the sinks only."""
    asking: Any = _Asking(options, reply)
    if isinstance(options.heads, Mapping):  # by layer: msgspec sorts names that are text only
        asking = msgspec.to_builtins(asking, str_keys=True)
    return Packed(msgspec.json.encode(asking, order="deterministic").decode())


def foreign(fields: Mapping[str, Any]) -> str | None:
    """The first of a client's own names for the engine that is ours, at a place where it may not be; None: none is."""
    for name, value in fields.items():
        if name in FIELDS or (name == KEY and not isinstance(value, Packed)):
            return name
    return None


def unpack_options(text: str) -> tuple[RequestOptions, bool]:
    """What `pack_options` was given."""
    asking = _decoder.decode(text.encode())
    return asking.options, asking.reply


_decoder = msgspec.json.Decoder(_Asking)


@dataclass
class Share:
    """One request's records of one engine step, or why there are none."""

    generated: list[bytes] = field(default_factory=list)  # rows that tokens were or could be sampled from, in order
    prompt: list[bytes] = field(default_factory=list)
    error: str | None = None
    reply: bool = True  # false: for the sinks only
    check: float | None = None  # self_check: largest relative difference of a rebuilt attention output
    pieces: list[dict[str, Any]] = field(default_factory=list)  # what a pass adds to the key mass: serving/key_mass.py
    key_mass: dict[str, Any] | None = None  # all of it, with the last record

    def __bool__(self) -> bool:
        """Whether it goes into a reply: it holds something, and is not for the sinks only."""
        return self.reply and bool(self.generated or self.prompt or self.error or self.key_mass)

    def pack(self) -> dict[str, Any]:
        """Plain values, which any serialiser takes."""
        return {
            "generated": self.generated,
            "prompt": self.prompt,
            "error": self.error,
            "reply": self.reply,
            "check": self.check,
            "pieces": self.pieces,
            "key_mass": self.key_mass,
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Share:
        """What `pack` made."""
        return cls(
            list(packed["generated"]), list(packed["prompt"]), packed["error"], packed["reply"], packed.get("check"),
            list(packed.get("pieces", ())), packed.get("key_mass"),
        )  # fmt: skip


@overload
def worse(one: float | None, other: float) -> float: ...
@overload
def worse(one: float | None, other: float | None) -> float | None: ...
def worse(one: float | None, other: float | None) -> float | None:
    """The larger of two self-check errors, where None is no check; NaN is worse than any number."""
    if one is None or other is None:
        return other if one is None else one
    return one if one != one or one >= other else other


def reason(error: Exception) -> str:
    """An exception as ``attention_error`` tells it."""
    return str(error) if isinstance(error, AttnhookError) else f"{type(error).__name__}: {error}"
