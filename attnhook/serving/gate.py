"""Who is capturing now in one server process: how many requests, and how many bytes they may answer with."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from attnhook.serving.pieces import pieces
from attnhook.serving.refusal import Refusal
from attnhook.serving.wire import ASK


class Gate:
    """Counts the requests that are capturing now, and the bytes that their replies may come to.

    Giving back takes no lock: a place that the garbage collector drops gives back in whatever code runs at that
    moment, which may be the gate's own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = self._bytes = 0
        self._returned: deque[tuple[int, int]] = deque()  # requests and bytes, on their way back

    @property
    def count(self) -> int:
        """Requests that are capturing now."""
        with self._lock:
            self._settle()
            return self._count

    @property
    def bytes(self) -> int:
        """Bytes that the replies of these requests may come to."""
        with self._lock:
            self._settle()
            return self._bytes

    def place(self, limit: int | None = None) -> Place:
        """A place for one more request. Raises Refusal (429) where ``limit`` are taken."""
        with self._lock:
            self._settle()
            free = limit is None or self._count < limit
            if free:
                self._count += 1
        if not free:  # outside the lock: making an exception may collect garbage
            raise Refusal(
                429, ASK, f"{ASK}=true: {limit} requests are capturing already, which is the limit; try again later"
            )
        return Place(self)

    def _grow(self, size: int, limit: int | None) -> int | None:
        """Take room for bytes; what is taken already where there is not enough."""
        with self._lock:
            self._settle()
            if limit is not None and self._bytes + size > limit:
                return self._bytes
            self._bytes += size
            return None

    def _settle(self) -> None:
        while self._returned:
            count, size = self._returned.popleft()
            self._count -= count
            self._bytes -= size

    def _give_back(self, count: int, size: int) -> None:
        self._returned.append((count, size))


class Place:
    """A place in a `Gate`: a reply that is abandoned before it begins runs no code of ours, but is dropped."""

    def __init__(self, gate: Gate) -> None:
        self._gate: Gate | None = gate
        self.bytes = 0

    def reserve(self, size: int, limit: int | None) -> None:
        """Take room for ``size`` more bytes. Raises Refusal (429) where all replies together would pass ``limit``."""
        gate = self._gate
        if gate is None:
            return
        taken = gate._grow(size, limit)
        if taken is None:
            self.bytes += size
            return
        raise Refusal(
            429,
            ASK,
            f"{ASK}=true: this reply may come to {size} bytes of attention, and the replies that are on their way to "
            f"{taken} already; this server allows {limit} at the same time: try again later, or ask for less",
        )

    def leave(self) -> None:
        """Give the place back, if that has not been done."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate._give_back(1, self.bytes)

    def __del__(self) -> None:
        self.leave()


def leave_with_the_reply(place: Place) -> None:
    """Give a place back when the reply that this task makes is sent: until then its records take room."""
    reply = pieces.get()
    if reply:
        reply.at_end(place.leave)
    else:
        place.leave()


class LeavingStream:
    """A stream whose place is free when it ends, fails or is thrown away.

    A generator would not do: its ``finally`` never runs where the client is gone before the first chunk is taken.
    """

    def __init__(self, stream: Any, place: Place) -> None:
        self._stream, self._place = stream, place  # which is left where both are dropped

    def __aiter__(self) -> LeavingStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._stream)
        except BaseException:  # its end, an error, or the client is gone
            self._place.leave()
            raise

    async def aclose(self) -> None:
        """Close the engine's stream too."""
        self._place.leave()
        await self._stream.aclose()
