"""One peer of the collector's socket in ZeroMQ's wire protocol (ZMTP 3, https://rfc.zeromq.org/spec/23), without input
and output: bytes go in, whole messages and bytes to answer come out.

The collector speaks the protocol itself because libzmq cannot be left to strangers. Its 4.3.5 ends the process
(``stream_engine_base.cpp:310``) where a peer that sent a heartbeat dies while the receiver lags, bounds what waits by
messages and not by bytes, and knows no limit of connections or of parts.
"""

from __future__ import annotations

import struct
from typing import Final

#: Sent as soon as a peer connects: version 3.1, no security, and the rest zeros.
GREETING: Final = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_SIGNATURE = 10  # bytes of a greeting before its version
_MECHANISM = slice(12, 32)
_MORE, _LONG, _COMMAND = 1, 2, 4  # bits of a frame's first byte
_MAX_COMMAND = 4096  # bytes
_MAX_COMMANDS = 1000  # in one go
_MAX_PARTS = 256  # of one message
_MAX_OWED = 4096  # bytes of answers that a peer leaves unread
_CONTEXT = 16  # bytes of a heartbeat that are sent back


class ProtocolError(Exception):
    """The peer does not keep to the protocol; ``reason`` is ``stranger``, ``protocol`` or ``too_long``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Peer:
    """What one connection has sent. `feed` it, `take` messages until there is none, and send what is in ``out``.

    ``max_bytes`` bounds a message, all of its parts together: a longer one is refused at its length, unread.
    """

    def __init__(self, max_bytes: int) -> None:
        self.ready = False  #: whether it has said that it is a PUSH socket
        self.out = bytearray(GREETING)  #: what is to be sent to it
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._greeted = False
        self._parts: list[bytes] = []
        self._parts_bytes = 0

    @property
    def held(self) -> int:
        """Bytes that wait here for the rest of their message."""
        return len(self._buffer) + self._parts_bytes

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes that came."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next whole message, or None until more bytes come. Raises ProtocolError; the peer is useless then."""
        if not self._greeted and not self._greet():
            return None
        for _ in range(_MAX_COMMANDS):
            frame = self._frame()
            if frame is None:
                return None
            flags, body = frame
            if flags & _COMMAND:
                self._command(body)
                continue
            if not flags & _MORE and not self._parts:
                return body
            self._parts.append(body)
            self._parts_bytes += len(body)
            if len(self._parts) > _MAX_PARTS:
                raise ProtocolError("too_long", f"a message of more than {_MAX_PARTS} parts")
            if not flags & _MORE:
                message = b"".join(self._parts)
                self._parts, self._parts_bytes = [], 0
                return message
        raise ProtocolError("protocol", f"{_MAX_COMMANDS} commands at once and no message")

    def _greet(self) -> bool:
        """Read the greeting; whether it is there."""
        start = bytes(self._buffer[: len(GREETING)])
        if (start and start[0] != 0xFF) or (len(start) >= _SIGNATURE and not start[_SIGNATURE - 1] & 1):
            raise ProtocolError("stranger", f"bytes that begin with {start[:8]!r} and not with a greeting of ZeroMQ")
        if len(start) > _SIGNATURE and start[_SIGNATURE] < 3:
            raise ProtocolError("stranger", f"ZeroMQ's protocol {start[_SIGNATURE]}, older than ZeroMQ 4")
        if len(start) < len(GREETING):
            return False
        if start[_MECHANISM] != GREETING[_MECHANISM]:
            raise ProtocolError("stranger", f"security {start[_MECHANISM].rstrip(bytes(1))!r}; the collector has none")
        del self._buffer[: len(GREETING)]
        self._greeted = True
        self.out += _command("READY", _property("Socket-Type", b"PULL"))
        return True

    def _frame(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if not buffer:
            return None
        flags = buffer[0]
        if flags & ~(_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
            raise ProtocolError("protocol", f"a frame that begins with {flags:#04x}")
        if not self.ready and not flags & _COMMAND:
            raise ProtocolError("stranger", "a message before the handshake's end")
        start = 9 if flags & _LONG else 2
        if len(buffer) < start:
            return None
        size: int = struct.unpack_from(">Q", buffer, 1)[0] if flags & _LONG else buffer[1]
        most = _MAX_COMMAND if flags & _COMMAND else self._max_bytes - self._parts_bytes
        if size > most:
            raise ProtocolError("too_long", f"a frame of {size} bytes; at most {most} are taken here")
        if len(buffer) < start + size:
            return None
        with memoryview(buffer) as view:
            body = bytes(view[start : start + size])
        del buffer[: start + size]
        return flags, body

    def _command(self, body: bytes) -> None:
        name, data = body[1 : 1 + body[0]] if body else b"", body[1 + body[0] :] if body else b""
        if not self.ready:
            if name != b"READY" or _property("Socket-Type", b"PUSH").lower() not in data.lower():
                raise ProtocolError("stranger", f"command {name[:20]!r}: only PUSH sockets are taken")
            self.ready = True
        elif name == b"PING" and len(data) >= 2 and len(self.out) < _MAX_OWED:
            self.out += _command("PONG", data[2 : 2 + _CONTEXT])  # after the two bytes of a time to live
        # other commands mean nothing to a PULL socket


def _command(name: str, data: bytes) -> bytes:
    body = bytes([len(name)]) + name.encode() + data
    return bytes([_COMMAND, len(body)]) + body


def _property(name: str, value: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + struct.pack(">I", len(value)) + value
