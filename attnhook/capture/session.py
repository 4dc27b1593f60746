"""Who listens for records, and what listening has cost."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from attnhook.capture.key_mass import KeySums
from attnhook.errors import AttnhookError
from attnhook.options import RequestOptions
from attnhook.record.token_record import TokenRecord
from attnhook.system import forks

logger = logging.getLogger("attnhook")


_sessions: tuple[Session, ...] = ()  # replaced whole, so that an engine thread reads it without a lock


_lock = threading.Lock()


class Spent:
    """What capture took of this process's time, counted over all sessions (on a GPU: of the host's time)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0  # forward steps whose records were made
        self._lock = threading.Lock()

    def add(self, began: float, steps: int = 0) -> None:
        """A piece of work that began at ``time.perf_counter() == began`` has ended."""
        taken = time.perf_counter() - began
        with self._lock:
            self.seconds += taken
            self.steps += steps


spent = Spent()


class Session:
    """One listener: a `capture()` block, or the process's sinks.

    ``strict`` sessions raise what cannot be captured into the caller; the others drop the rows, count them
    by reason in ``dropped`` and log each reason once. Backends fill in token ids for those with ``tokens``, and
    give what a pass adds to ``key_sums``, where there are any.
    """

    def __init__(
        self,
        options: RequestOptions,
        deliver: Callable[[Sequence[TokenRecord]], object],
        *,
        strict: bool,
        model: object = None,
        dropped: Counter[str] | None = None,
        tokens: bool = False,
        key_sums: KeySums | None = None,
    ) -> None:
        self.options = options
        self.deliver = deliver
        self.strict = strict
        self.tokens = tokens
        self.model = model
        self.key_sums = key_sums  # where the options ask for key mass
        self.dropped: Counter[str] = Counter() if dropped is None else dropped
        self.active = False
        self.ran: Counter[str] = Counter()  # class of a model -> its forward passes while this session listened
        self.alone: dict[str, Exception] = {}  # class of a model that was left alone -> why it has no records
        self._logged: set[str] = set()

    def leave_alone(self, name: str, why: Exception) -> None:
        """Note a model that is no decoder, such as an encoder beside one: it has no rows, so none is dropped."""
        if name not in self.alone:
            self.alone[name] = why
            logger.info("left alone: %s", why)

    def drop(self, reason: str, rows: int, why: str | Exception) -> None:
        """Count ``rows`` dropped rows; the first time a reason occurs, log why."""
        self.dropped[reason] += rows
        if reason not in self._logged:
            self._logged.add(reason)
            # a refusal says all that there is to know; any other error is ours to find
            traced = why if isinstance(why, Exception) and not isinstance(why, AttnhookError) else None
            logger.warning("dropping attention records (%s): %s", reason, why, exc_info=traced)

    def refuse(self, error: Exception, rows: int) -> None:
        """Raise ``error`` in a strict session, else drop ``rows`` rows because of it."""
        if self.strict:
            raise error
        reason = "unsupported" if isinstance(error, AttnhookError) else "capture_failed"
        self.drop(reason, rows, error)

    def __enter__(self) -> Session:
        global _sessions
        with _lock:
            _sessions = (*_sessions, self)
            self.active = True
        return self

    def __exit__(self, *_: object) -> None:
        global _sessions
        with _lock:
            _sessions = tuple(s for s in _sessions if s is not self)
            self.active = False


@forks.in_child
def _after_fork_in_child() -> None:
    global _lock
    _lock, spent._lock = threading.Lock(), threading.Lock()  # another thread of the parent may have held them


def sessions() -> tuple[Session, ...]:
    """Sessions that listen now; empty means that nothing needs to be captured."""
    return _sessions
