"""SIGTERM and SIGHUP: what is queued is written before a process dies of them.

Their default action ends a process at once, past ``atexit``. Where a script has no handler of its own, ours writes
what waits, for `GRACE_SECONDS` at most, and then lets the default action happen.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

GRACE_SECONDS = 5.0  # supervisors send SIGKILL after ten seconds or more

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_stop: Callable[[float], object] | None = None
_close: Callable[[float], object] | None = None
_ending = False


def watch(stop: Callable[[float], object], close: Callable[[float], object]) -> None:
    """Call ``stop(seconds)`` and ``close(seconds)`` before the process dies, where the script has no handler itself.

    ``stop`` is called on the main thread, on top of whatever it was doing, ``close`` on another. Does nothing outside
    the main thread, which alone may set handlers. A handler that the script sets later replaces ours.
    """
    global _stop, _close
    _stop, _close = stop, close
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _handle)


def unwatch() -> None:
    """Take our handlers back, where they still are ours."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    global _ending
    if _ending:  # `timeout` and shells send it to the process and to its group: a second one is no haste
        return
    _ending = True
    try:
        _bounded()
    finally:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _bounded() -> None:
    if _stop is not None:
        _stop(GRACE_SECONDS)  # here: the interrupted code may hold the lock that it needs, which is reentrant
    # on a thread of its own, since a sink may hang; not a threading.Thread, whose start waits for a lock that the
    # interrupted code may hold
    finished = _thread.allocate_lock()
    finished.acquire()

    def work() -> None:
        try:
            if _close is not None:
                _close(GRACE_SECONDS)
        finally:
            finished.release()

    _thread.start_new_thread(work, ())
    finished.acquire(timeout=GRACE_SECONDS + 0.5)
