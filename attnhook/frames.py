"""Frames: what a ``zmq:`` sink sends to a collector, in msgpack. Nothing here, or behind it, unpickles anything.

A frame is the array ``["attnhook", 1, kind, producer, first, dropped, rows]``: the format's name and version;
``"records"`` or ``"end"``; 16 bytes that name one opened sink; the number of the frame's first record, counted
from 0 over all that this producer has sent; what it has dropped so far, by reason; and the records, each as
`TokenRecord.to_bytes` gives it (none in an end frame, whose ``first`` is the number of records sent in all).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgpack  # type: ignore[import-untyped]

from attnhook.errors import RecordError

FORMAT = "attnhook"
VERSION = 1
MAX_BYTES = 16 * 2**20  # a collector refuses longer messages
_MAX_NUMBER = 2**53


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
    """A frame of records, whose number of bytes is to be at most `MAX_BYTES`."""
    return _pack("records", producer, first, dropped, rows)


def encode_end(producer: bytes, sent: int, dropped: Mapping[str, int]) -> bytes:
    """The last frame of a producer that has sent ``sent`` records."""
    return _pack("end", producer, sent, dropped, ())


def _pack(kind: str, producer: bytes, first: int, dropped: Mapping[str, int], rows: Sequence[bytes]) -> bytes:
    packed: bytes = msgpack.packb([FORMAT, VERSION, kind, producer, first, dict(dropped), list(rows)])
    return packed


def decode(data: bytes) -> Frame:
    """Read one message. Raises FrameError, and allocates no more than the message is long."""
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise FrameError(
            "pickle", f"a pickle of {len(data)} bytes: nothing is ever unpickled; send with the zmq: sink of attnhook"
        )
    try:
        message = msgpack.unpackb(data, raw=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise FrameError(
            "not_msgpack",
            f"{len(data)} bytes that begin with {data[:8]!r} are no msgpack ({type(error).__name__}: {error}); "
            "send with the zmq: sink of attnhook",
        ) from error
    if not isinstance(message, list) or len(message) < 2 or message[0] != FORMAT:
        raise FrameError(
            "not_a_frame",
            f"msgpack that is no attnhook frame: {str(message)[:60]}; send with the zmq: sink of attnhook",
        )
    if message[1] != VERSION:
        raise FrameError(
            "frame_version",
            f"frame format {str(message[1])[:20]}; this attnhook reads {VERSION}: use the same attnhook on both sides",
        )
    if len(message) != 7:
        raise _damaged(f"{len(message)} fields in place of 7")
    _, _, kind, producer, first, dropped, rows = message
    if kind not in ("records", "end") or not isinstance(producer, bytes) or len(producer) != 16:
        raise _damaged(f"kind {str(kind)[:20]!r}, producer {str(producer)[:20]!r}")
    if not _is_number(first) or not isinstance(rows, list) or (kind == "end") != (not rows):
        raise _damaged(f"first {str(first)[:20]!r} and {type(rows).__name__} of rows")
    if not all(type(row) is bytes for row in rows):
        raise _damaged("a row that is no bytes")
    if not isinstance(dropped, dict) or not all(
        isinstance(reason, str) and len(reason) <= 40 and _is_number(count) for reason, count in dropped.items()
    ):
        raise _damaged(f"dropped {str(dropped)[:60]}")
    if len(dropped) > 20:
        raise _damaged(f"{len(dropped)} reasons of drops")
    return Frame(producer, first, dropped, rows, kind == "end")


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _damaged(what: str) -> FrameError:
    return FrameError("damaged_frame", f"damaged frame: {what}; send with the zmq: sink of attnhook")
