"""Retention: when a store lets go of old records, and why a clock that jumps cannot empty it."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable

from attnhook.errors import AttnhookError
from attnhook.record.columns import now_us

logger = logging.getLogger("attnhook")

EVERY_SECONDS = 600.0
DAY_US = 86_400_000_000
JUMP_SECONDS = 3600.0


class Retention:
    """Decides, for a store that keeps ``days`` (None: everything), what is too old by now.

    Two guards against a wrong clock. A wall clock that runs ahead of the machine's own by over an hour since the
    store was opened stops the pruning until it is opened again. And records count as old relative to the newest
    one too: the clock may be at most a day past it, so a store that nobody writes to keeps its last days until
    `attnhook sinks prune` is told otherwise.
    """

    def __init__(self, days: float | None) -> None:
        self.days = days
        self._next = 0.0
        self._opened = _elapsed(), now_us()
        self._jumped = False

    def keep(self, newest: Callable[[], int | None], prune: Callable[[int], int]) -> None:
        """Prune if it is time. A failure is logged and tried again later: it must not fail the write before it."""
        try:
            before = self.due(newest)
            removed = prune(before) if before is not None else 0
        except (AttnhookError, OSError, sqlite3.Error) as error:
            logger.warning("records older than %g days could not be removed: %s", self.days, error)
        else:
            if removed:
                logger.info("%d records older than %g days were removed", removed, self.days)

    def due(self, newest: Callable[[], int | None]) -> int | None:
        """The time (microseconds since 1970) before which records go now; None where nothing is to be done.

        ``newest`` tells the time of the newest record, None where there is none; it is asked every ten minutes.
        """
        if self.days is None or _elapsed() < self._next:
            return None
        self._next = _elapsed() + EVERY_SECONDS
        now = now_us()
        ahead = (now - self._opened[1]) / 1e6 - (_elapsed() - self._opened[0])
        if abs(ahead) > JUMP_SECONDS:
            if not self._jumped:
                logger.warning("the clock jumped by %+.0f s: nothing is pruned until the store is opened again", ahead)
            self._jumped = True
            return None
        last = newest()
        return None if last is None else cutoff(self.days, min(now, last + DAY_US))


def cutoff(days: float, now: int | None = None) -> int:
    """The time ``days`` before ``now`` (default: the wall clock), microseconds since 1970."""
    return (now_us() if now is None else now) - int(days * DAY_US)


def _elapsed() -> float:
    """Seconds on a clock that nobody sets and that runs on while a machine sleeps, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
