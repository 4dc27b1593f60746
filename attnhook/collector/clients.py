"""HTTP clients that are slow: what they hold, and for how long.

uvicorn waits for the rest of a request, and for a client that reads no answer, without end.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS: Final = 128
HEAD_SECONDS: Final = 10.0  # for a request's first line and headers, from the connection on
BODY_SECONDS: Final = 60.0  # for head and body together
UNREAD_SECONDS: Final = 30.0  # in which a client reads nothing of an answer
_LOOK_SECONDS = 1.0
#: Connections of this process that were ended here, by reason.
closed: Counter[str] = Counter({"late_request": 0, "unread_answer": 0, "crowded": 0})


def most_connections() -> int:
    """How many there may be: at most an eighth of the process's descriptors."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(min(MAX_CONNECTIONS, soft // 8), 1)


class Client(H11Protocol):
    """One connection. It ends where its request does not come or its answer is not read within the limits.

    Where there are too many, a newcomer takes the place of the one that has been at its request for longest; one that
    sends its request at once is answered, however many others do not.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._since = time.monotonic()  # the request's beginning, or that of waiting for it
        self._unread: float | None = None
        self._look: asyncio.TimerHandle | None = None

    @property
    def waits_since(self) -> float | None:
        """Since when the request, or the rest of it, has been waited for; None while it is being answered."""
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete and not cycle.more_body
        return None if answering else self._since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            waiting = [one for one in self.connections if isinstance(one, Client) and one is not self]
            waiting = [one for one in waiting if one.waits_since is not None]
            oldest = min(waiting, key=lambda one: one._since, default=self)
            oldest.give_up("crowded")
        self._look = self.loop.call_later(_LOOK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The answer is written, and the next request may come."""
        self._since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as is written."""
        self._unread = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self._unread = None
        super().resume_writing()

    def give_up(self, reason: str) -> None:
        """End the connection at once."""
        closed[reason] += 1
        self.connections.discard(self)
        self.transport.abort()

    def _check(self) -> None:
        now, since = time.monotonic(), self.waits_since
        in_body = self.cycle is not None and not self.cycle.response_complete
        late = since is not None and now - since > (BODY_SECONDS if in_body else HEAD_SECONDS)
        if late:
            self.give_up("late_request")
        elif self._unread is not None and now - self._unread > UNREAD_SECONDS:
            self.give_up("unread_answer")
        else:
            self._look = self.loop.call_later(_LOOK_SECONDS, self._check)
