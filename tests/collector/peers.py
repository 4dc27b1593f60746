"""Peers that speak ZeroMQ's protocol over a bare socket, as well or as badly as a test wants."""

from __future__ import annotations

import socket
import struct

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def command(name: bytes, data: bytes = b"") -> bytes:
    body = bytes([len(name)]) + name + data
    return bytes([4, len(body)]) + body


def ready(kind: bytes = b"PUSH") -> bytes:
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind)


def message(data: bytes, *, more: bool = False) -> bytes:
    return bytes([2 + more]) + struct.pack(">Q", len(data)) + data


def ping(ttl: int = 0, context: bytes = b"") -> bytes:
    return command(b"PING", struct.pack(">H", ttl) + context)


def connect(address: str, *, shake: bool = True) -> socket.socket:
    """A connection, with its handshake done unless not wanted."""
    sock = socket.create_connection(("127.0.0.1", port_of(address)), timeout=60)
    if shake:
        sock.sendall(GREETING + ready())
        expect(sock, 64)
        head = expect(sock, 2)
        assert expect(sock, head[1]).startswith(b"\x05READY")
    return sock


def expect(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, f"the connection ended after {data!r}"
        data += part
    return data


def ended(sock: socket.socket) -> bool:
    """Whether the other side closes the connection, whatever it sent before."""
    try:
        while sock.recv(65536):
            continue
    except ConnectionError:
        return True
    return True


def die(sock: socket.socket) -> None:
    """End the connection as the system does for a process that is killed with bytes unread: by a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
