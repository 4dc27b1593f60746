"""Delivery: takes records off the engine's hands and brings them to sinks and observers in the background.

Each sink has its own bounded queue and writer thread, so that a slow or dead one holds up neither the
engine nor another sink. What does not fit is dropped and counted; what is queued is written before the
process exits, also after Ctrl-C, SIGTERM, an uncaught exception or the end of a multiprocessing child.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

from attnhook.errors import OptionError, PluginError
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord
from attnhook.sinks.opening import open_sink
from attnhook.sinks.privacy import wants_tokens
from attnhook.sinks.record_writers import Observer, ObserverWriter, RecordWriter, SinkWriter
from attnhook.sinks.writer import State
from attnhook.system import forks, moved, termination
from attnhook.system.addresses import masked

logger = logging.getLogger("attnhook")

STALL_SECONDS = 60.0  # `close` gives up on a sink that has finished no write for so long

__getattr__ = moved.names(
    __name__,
    {
        "BATCH": "sinks.record_writers",
        "FLUSH_SECONDS": "sinks.writer",
        "LINGER_SECONDS": "sinks.record_writers",
        "SWEEP_SECONDS": "sinks.record_writers",
    },
)

_open: set[Delivery] = set()  # strong: one that its owner forgot still gets its records written at exit


class Delivery:
    """Sinks and observers behind one `put` that never waits.

    Parameters
    ----------
    sinks
        Open sinks by name; closed by `close`.
    queue_size
        Records that may wait for each sink and observer, >= 1.
    observers
        A callable that sees every record, or several by name. Each runs on its own thread.

    Raises
    ------
    OptionError
        ``queue_size`` is below 1.
    """

    def __init__(
        self,
        sinks: Mapping[str, Sink],
        *,
        queue_size: int = 65536,
        observers: Observer | Mapping[str, Observer] | None = None,
    ) -> None:
        if queue_size < 1:
            raise OptionError("queue_size", f"queue_size={queue_size} must be at least 1 record")
        if observers is None:
            observers = {}
        elif not isinstance(observers, Mapping):
            observers = {"observers": observers}
        self.sinks: dict[str, Sink] = dict(sinks)
        #: Whether a sink keeps token ids, so that records are to be put with them; the others' do not get them.
        self.tokens = any(wants_tokens(sink) for sink in self.sinks.values())
        self._size = queue_size
        # held for microseconds; reentrant, because a signal handler may put as well
        self._lock = threading.RLock()
        self._writers: list[RecordWriter] = [SinkWriter(name, sink) for name, sink in sinks.items()]
        self._writers += [ObserverWriter(name, observer) for name, observer in observers.items()]
        for writer in self._writers:
            writer.lock = self._lock
        self._closing = self._stopped = self._reported = False
        _open.add(self)
        # last registered, first run: what the sinks have imported by now, such as pyarrow's S3, is put down after them
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        termination.watch(_stop_all, _close_soon)

    @classmethod
    def from_urls(
        cls, urls: Sequence[str], *, queue_size: int = 65536, observe: bool = True, listen_later: bool = False
    ) -> Delivery:
        """A delivery to the sinks that ``urls`` name and, with ``observe``, to the plugins' observers.

        With ``listen_later`` sinks that listen do so at their first record, in the process that has it.
        Raises PluginError where a sink cannot be opened or is named twice (those opened before are closed
        again), OptionError where ``queue_size`` is below 1.
        """
        observers = _plugin_observers() if observe else {}
        sinks: dict[str, Sink] = {}
        with ExitStack() as opened:
            for url in urls:
                if url in sinks:
                    raise PluginError(
                        f"sink {masked(url)!r} is named twice: every record would be there twice; name it once"
                    )
                sinks[url] = open_sink(url, listen_later=True) if listen_later else open_sink(url)
                opened.callback(sinks[url].close)
            delivery = cls(sinks, queue_size=queue_size, observers=observers)
            opened.pop_all()
        return delivery

    def put(self, records: Sequence[TokenRecord]) -> None:
        """Queue ``records``, in order, for every sink and observer; never waits, never raises.

        Those that do not fit a queue are dropped and counted there (``queue_full``), all of them after
        `close` (``closed``). Producers on several threads may together exceed a queue's size by a put each.
        """
        # One record per step of an engine finds cold caches, where a lock costs more than all else here. A writer that
        # is awake looks into its queue once more before it sleeps.
        for writer in self._writers:
            if writer.awake and len(writer.queue) + len(records) <= self._size:
                writer.queue.extend(records)
                if not writer.awake:  # it may have looked just before
                    self._late(writer)  # type: ignore[unreachable] # its thread sets it
            elif records:
                self._put(writer, records)

    def _put(self, writer: RecordWriter, records: Sequence[TokenRecord]) -> None:
        with self._lock:
            # the writer only shortens its queue, so that this is never too much room
            room = 0 if self._closing else max(self._size - len(writer.queue), 0)
            if len(records) <= room:
                writer.queue.extend(records)
            else:
                writer.queue.extend(records[:room])
                writer.dropped["closed" if self._closing else "queue_full"] += len(records) - room
            if not self._closing:
                if writer.state is State.IDLE:  # its thread starts now
                    _close_at_multiprocessing_exit()
                writer.wake()

    def _late(self, writer: RecordWriter) -> None:
        with self._lock:
            if self._closing:
                writer.sweep()
            else:
                writer.wake()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was put before is written and flushed; False if ``timeout`` seconds were too few."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            barriers = [(writer, writer.barrier()) for writer in self._writers]
        # a list, so that each sink is waited for even if one before it was not done
        return all([writer.wait(barrier, deadline) for writer, barrier in barriers])

    def close(self, timeout: float | None = None) -> None:
        """Write what is queued, end the threads and close the sinks; calling it again is harmless.

        Waits ``timeout`` seconds or, by default, for as long as each sink finishes a write now and then
        (`STALL_SECONDS`). Records of a sink that is given up are counted as ``close_timeout``; what was
        dropped over the delivery's life is logged.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._stopped:
            self._stop(deadline)
        for writer in self._writers:
            writer.join(deadline, STALL_SECONDS)
        _open.discard(self)
        if not _open:
            termination.unwatch()
        dropped = {writer.shown: dict(writer.dropped) for writer in self._writers if writer.dropped}
        if dropped and not self._reported:
            self._reported = True
            logger.warning("attention records were dropped, by sink and reason: %s", dropped)

    def _stop(self, deadline: float | None) -> None:
        """Take no more records and tell the writers to finish."""
        held = self._lock.acquire(timeout=-1 if deadline is None else max(deadline - time.monotonic(), 0.0))
        try:
            self._closing = True
            for writer in self._writers:
                writer.end()
            self._stopped = True
        finally:
            if held:
                self._lock.release()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Records per sink: ``queued`` (waiting or being written), ``written``, ``dropped`` by reason.

        They add up to what was put, save for a batch that is changing hands this instant. A write or an
        observer that raises counts its records as ``write_failed`` or ``observer_failed``, a live sink gives its
        own reasons (`DroppedError`); nothing is tried twice.
        """
        return {
            writer.name: {
                "queued": len(writer.queue) + len(writer.batch),
                "written": writer.written,
                "dropped": dict(writer.dropped),
            }
            for writer in self._writers
        }

    def __enter__(self) -> Delivery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        # what the parent queued is the parent's to write, and its threads do not exist here
        self._lock = threading.RLock()
        self._reported = False
        for writer in self._writers:
            writer.lock = self._lock
            writer.after_fork()


def _plugin_observers() -> dict[str, Observer]:
    """One observer per plugin that implements ``attnhook_token``, so that one cannot hold up another."""
    manager = plugins.manager()
    implementations = manager.hook.attnhook_token.get_hookimpls()
    found: dict[str, Observer] = {}
    for implementation in implementations:
        others = [other.plugin for other in implementations if other.plugin is not implementation.plugin]
        hook = manager.subset_hook_caller("attnhook_token", others)
        found[f"observer {implementation.plugin_name}"] = partial(_call_hook, hook)
    return found


def _call_hook(hook: Callable[..., object], record: TokenRecord) -> None:
    hook(record=record)  # pluggy takes keywords only


def _close_all() -> None:
    for delivery in list(_open):
        delivery.close()


def _stop_all(seconds: float) -> None:
    """Have all writers finish at once, so that a sink that hangs takes no time from the others."""
    deadline = time.monotonic() + seconds
    for delivery in list(_open):
        delivery._stop(deadline)


def _close_soon(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for delivery in list(_open):
        delivery.close(max(deadline - time.monotonic(), 0.0))


@forks.in_child
def _after_fork_in_child() -> None:
    for delivery in _open:
        delivery._after_fork()


def _close_at_multiprocessing_exit() -> None:
    # a multiprocessing child (every vLLM and SGLang worker) may leave by os._exit, past atexit
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _close_all, exitpriority=0)
