"""The collector's connections: who may stay, who is read and handled first, and how much memory they hold together."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Final

from attnhook.collector.zmtp import Peer

MAX_CONNECTIONS: Final = 512
#: Of unfinished and waiting messages, over all connections. From a quarter of it on, few of them are read at a time, so
#: that they become whole one after the other; beyond it, connections are closed. In between there is room for what is
#: read before that is looked at, and for the few (four of 16 MiB).
BUDGET_BYTES: Final = 160 * 2**20
HANDSHAKE_SECONDS: Final = 10.0
STALLED_SECONDS: Final = 60.0  # an unfinished message that grows no more
#: Why connections are closed by this side; nothing that a peer sends becomes a key.
REASONS: Final = ("stranger", "protocol", "too_long", "handshake_timeout", "stalled", "memory", "crowded")
_TRUST = 8  # good messages that make up for a bad one


class Connection:
    """One peer's socket and what is known of it."""

    def __init__(self, sock: socket.socket, max_bytes: int) -> None:
        self.sock = sock
        self.peer = Peer(max_bytes)
        self.message: bytes | None = None  #: whole, and not handled yet
        self.began = self.heard = time.monotonic()
        self.trust = 0  #: above 0: its messages are good; below 0: the latest ones were not

    @property
    def held(self) -> int:
        """Bytes of memory for what it sent."""
        return self.peer.held + (0 if self.message is None else len(self.message))

    def judge(self, good: bool) -> None:
        """Its latest message was good, or was not."""
        self.trust = min(self.trust + 1, _TRUST) if good else -_TRUST

    def read(self, into: bytearray) -> bool:
        """Take what came; False where the peer is gone. Raises ProtocolError."""
        try:
            count = self.sock.recv_into(into)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not count:
            return False
        self.heard = time.monotonic()
        with memoryview(into) as view:
            self.peer.feed(view[:count])
        self.message = self.peer.take()
        return self.answer()

    def answer(self) -> bool:
        """Send what the protocol owes the peer, as far as it takes it now; False where it is gone."""
        out = self.peer.out
        if out:
            try:
                del out[: self.sock.send(out)]
            except BlockingIOError:
                return True
            except OSError:
                return False
        return True


def late(connections: Iterable[Connection], now: float) -> list[tuple[Connection, str]]:
    """Those that began something and do not go on with it, and why they are to go."""
    found = []
    for one in connections:
        if not one.peer.ready and now - one.began > HANDSHAKE_SECONDS:
            found.append((one, "handshake_timeout"))
        elif one.message is None and one.peer.held and now - one.heard > STALLED_SECONDS:
            found.append((one, "stalled"))
    return found


def heaviest(connections: Iterable[Connection]) -> Connection | None:
    """Who is to go where they hold too much memory: the largest of those whose messages were bad, or else that have
    sent none yet, or else of all."""
    holding = [one for one in connections if one.held]
    return max(holding, key=lambda one: (one.trust < 0, one.trust == 0, one.held), default=None)


def least(connections: Iterable[Connection], now: float) -> Connection | None:
    """Who is to go for a newcomer: the oldest that has sent nothing good, or else who is silent for longest.

    None where all have sent something good within the last minute. A producer that is sent away while it is silent
    connects again, and loses nothing.
    """
    found = min(connections, key=lambda one: (one.trust > 0, one.heard if one.trust > 0 else one.began), default=None)
    if found is None or (found.trust > 0 and (found.held or now - found.heard < STALLED_SECONDS)):
        return None
    return found


def most_connections() -> int:
    """How many there may be: at most a third of the process's descriptors."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(min(MAX_CONNECTIONS, soft // 3), 1)


def keep_alive(sock: socket.socket) -> None:
    """Let the system find out, within two minutes, that the peer's host is gone: nothing is ever sent to a peer."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # macOS and Windows have some of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def no_counts() -> Counter[str]:
    """A counter that shows all of its reasons."""
    return Counter(dict.fromkeys(REASONS, 0))
