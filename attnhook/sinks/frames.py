"""Frames: what a ``zmq:`` sink sends to a collector, in msgpack. Nothing here, or behind it, unpickles anything.

A frame is the array ``["attnhook", 1, kind, producer, first, dropped, rows]``: the format's name and version;
``"records"`` or ``"end"``; 16 bytes that name one opened sink; the number of the frame's first record, counted
from 0 over all that this producer has sent; what it has dropped so far, by reason; and the records, each as
`TokenRecord.to_bytes` gives it (none in an end frame, whose ``first`` is the number of records sent in all).

What a peer may say is bounded before anything is made of it: bytes, records, numbers and reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, NamedTuple

from msgspec import DecodeError, Meta, Raw, Struct, ValidationError, msgpack

from attnhook.errors import RecordError

FORMAT: Final = "attnhook"
VERSION: Final = 1
MAX_BYTES: Final = 16 * 2**20  # a collector refuses longer messages
MAX_ROWS: Final = 4096  # records in a frame
MAX_NUMBER: Final = 2**40  # of records: 100,000 a second for four months
#: Why records are dropped before they are sent; a collector counts every other reason as `OTHER`.
DROP_REASONS: Final = frozenset(
    (
        "collector_busy",
        "queue_full",
        "write_failed",
        "observer_failed",
        "close_timeout",
        "closed",
        "unsupported",
        "capture_failed",
        "nan",
        "max_tokens",
    )
)
OTHER: Final = "other"
_MAX_REASONS = 20
_MAX_REASON = 40  # characters
_NAME = b"\xa8" + FORMAT.encode()  # follows the first byte of a frame, and the version follows it
_AFTER = 1 + len(_NAME)

_Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
_Reason = Annotated[str, Meta(max_length=_MAX_REASON)]
_Natural = Annotated[int, Meta(ge=0, le=2**53)]  # what the first release let pass


class _Head(Struct, array_like=True, forbid_unknown_fields=True):
    format: Literal["attnhook"]
    version: Literal[1]
    kind: Literal["records", "end"]
    producer: Annotated[bytes, Meta(min_length=16, max_length=16)]


class _Sent(_Head, array_like=True, forbid_unknown_fields=True):
    first: _Number
    dropped: Annotated[dict[_Reason, _Number], Meta(max_length=_MAX_REASONS)]
    rows: Annotated[list[bytes], Meta(max_length=MAX_ROWS)]


class _Kept(_Head, array_like=True, forbid_unknown_fields=True):
    first: _Natural
    dropped: Annotated[dict[_Reason, _Natural], Meta(max_length=_MAX_REASONS)]
    rows: list[bytes]


_sent, _kept, _anything = msgpack.Decoder(_Sent), msgpack.Decoder(_Kept), msgpack.Decoder(Raw)
_encoder = msgpack.Encoder()


class FrameError(RecordError):
    """A message that is no frame of a version that this release reads; ``reason`` is one word for a counter."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Frame(NamedTuple):
    """One message of a producer."""

    producer: bytes
    first: int
    dropped: dict[str, int]
    rows: list[bytes]
    end: bool


def encode(producer: bytes, first: int, dropped: Mapping[str, int], rows: Sequence[bytes]) -> bytes:
    """A frame of at most `MAX_ROWS` records, whose number of bytes is to be at most `MAX_BYTES`."""
    return _pack("records", producer, first, dropped, rows)


def encode_end(producer: bytes, sent: int, dropped: Mapping[str, int]) -> bytes:
    """The last frame of a producer that has sent ``sent`` records."""
    return _pack("end", producer, sent, dropped, ())


def _pack(kind: str, producer: bytes, first: int, dropped: Mapping[str, int], rows: Sequence[bytes]) -> bytes:
    return _encoder.encode([FORMAT, VERSION, kind, producer, first, dict(dropped), rows])


def decode(data: bytes, *, kept: bool = False) -> Frame:
    """Read one message, or one that a journal has ``kept``: its numbers may exceed what a peer may claim today.

    The schema is checked while it is read, so that nothing is made of what is no frame. `Frame.dropped` has no
    reasons but `DROP_REASONS` and `OTHER`. Raises FrameError.
    """
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise FrameError(
            "pickle", f"a pickle of {len(data)} bytes: nothing is ever unpickled; send with the zmq: sink of attnhook"
        )
    try:
        message = _kept.decode(data) if kept else _sent.decode(data)
    except (ValueError, RecursionError) as error:  # of msgspec, or text that is no UTF-8
        raise _refusal(data, error) from error
    if (message.kind == "end") != (not message.rows):
        raise _damaged(f"{len(message.rows)} rows in a frame of kind {message.kind!r}")
    return Frame(message.producer, message.first, known_reasons(message.dropped), message.rows, message.kind == "end")


def known_reasons(dropped: dict[str, int]) -> dict[str, int]:
    """The counts by reasons that this release knows; the rest together."""
    if dropped.keys() <= DROP_REASONS:
        return dropped
    known = {reason: count for reason, count in dropped.items() if reason in DROP_REASONS}
    known[OTHER] = sum(count for reason, count in dropped.items() if reason not in DROP_REASONS)
    return known


def _refusal(data: bytes, error: Exception) -> FrameError:
    """What is wrong with a message, found without making anything of it."""
    if data[1:_AFTER] == _NAME and data[0] & 0xF0 == 0x90 and not _is_cut(error):
        version = data[_AFTER : _AFTER + 1]
        if version == bytes([VERSION]):
            return _damaged(str(error)[:200])
        return FrameError(
            "frame_version",
            f"a frame whose format has the number 0x{version.hex()}; this attnhook reads {VERSION}: use the same "
            "attnhook on both sides",
        )
    try:
        _anything.decode(data)
    except (DecodeError, RecursionError) as why:
        return FrameError(
            "not_msgpack",
            f"{len(data)} bytes that begin with {data[:8]!r} are no msgpack ({why}); send with the zmq: sink of "
            "attnhook",
        )
    return FrameError(
        "not_a_frame",
        f"{len(data)} bytes of msgpack that begin with {data[:16]!r} are no attnhook frame; send with the zmq: sink of "
        "attnhook",
    )


def _is_cut(error: Exception) -> bool:
    """Whether msgspec could not read the bytes at all, rather than read what the schema has not."""
    return isinstance(error, DecodeError) and not isinstance(error, ValidationError)


def _damaged(what: str) -> FrameError:
    return FrameError("damaged_frame", f"damaged frame: {what}; send with the zmq: sink of attnhook")
