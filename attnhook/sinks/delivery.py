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
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, cast

from attnhook.errors import DroppedError, OptionError, PluginError
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord, without_tokens
from attnhook.sinks.opening import open_sink
from attnhook.sinks.privacy import wants_tokens
from attnhook.system import forks, termination
from attnhook.system.addresses import scrubbed, shown

logger = logging.getLogger("attnhook")

Observer = Callable[[TokenRecord], object]

BATCH = 1024  # most records that one `Sink.write` gets
SWEEP_SECONDS = 0.5  # that an ending writer waits for the lock
LINGER_SECONDS = 0.02  # a writer that wakes up waits so long for more: a busy producer need not wake it again
FLUSH_SECONDS = 1.0  # a sink that never runs dry is flushed this often
STALL_SECONDS = 60.0  # `close` gives up on a sink that has finished no write for so long

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
        self._writers: list[_Writer] = [_SinkWriter(name, sink) for name, sink in sinks.items()]
        self._writers += [_ObserverWriter(name, observer) for name, observer in observers.items()]
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
                        f"sink {shown(url)!r} is named twice: every record would be there twice; name it once"
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

    def _put(self, writer: _Writer, records: Sequence[TokenRecord]) -> None:
        with self._lock:
            # the writer only shortens its queue, so that this is never too much room
            room = 0 if self._closing else max(self._size - len(writer.queue), 0)
            if len(records) <= room:
                writer.queue.extend(records)
            else:
                writer.queue.extend(records[:room])
                writer.dropped["closed" if self._closing else "queue_full"] += len(records) - room
            if not self._closing:
                writer.wake()

    def _late(self, writer: _Writer) -> None:
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
            writer.join(deadline)
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
                writer.stop()
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


class _Writer:
    """The queue and the thread of one sink or observer."""

    lock: threading.RLock  # the delivery's

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = shown(name)  # for logs: a sink's name is its URL
        self._inherited = False
        self._logged: set[tuple[str, str]] = set()
        self._reset()

    def _reset(self) -> None:
        self.queue: deque[TokenRecord | threading.Event] = deque()  # an event is a barrier of flush()
        self.batch: list[TokenRecord] = []  # taken from the queue, not yet written
        self.written = 0
        self.dropped: Counter[str] = Counter()
        # No Condition: its `with` is Python code, where a KeyboardInterrupt can leave the lock taken for
        # good. SimpleQueue.put is one C call that does not wait; the bell holds a token or two.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._hurry = threading.Event()  # cuts the linger short
        self.awake = False  # the thread looks into the queue after it set this to False, and only then sleeps
        self._thread: threading.Thread | None = None
        self._claim = threading.Lock()  # whoever gets it is the one that calls the sink
        self._done = threading.Event()
        self._stopping = self._given_up = self._unflushed = False
        self._progress = self._flushed = time.monotonic()

    def after_fork(self) -> None:
        self._inherited = True  # a sink that this process never writes to is not its to close
        self._reset()

    # -- on the producers' threads, under the delivery's lock

    def wake(self) -> None:
        if self._thread is None:
            # bound before it starts: a signal handler may come by here meanwhile
            self._thread = threading.Thread(target=self._run, name=f"attnhook {self.shown}", daemon=True)
            try:
                self._thread.start()
                _close_at_multiprocessing_exit()
            except RuntimeError as error:  # the interpreter is ending, or the system has no thread left
                self._log_once("no thread for %s, its records wait for close()", error)
            except BaseException:  # Ctrl-C; should the thread run after all, _claim keeps a second one off
                self._thread = None
                raise
        if self._bell.empty():
            self._bell.put(None)

    @property
    def _threadless(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def barrier(self) -> threading.Event:
        if self._stopping:
            return self._done
        barrier = threading.Event()
        if self._thread is None and not self.queue:
            barrier.set()  # nothing was ever put
        else:
            self.queue.append(barrier)
            self.wake()
            self._hurry.set()
        return barrier

    def sweep(self) -> None:
        """Once the thread has done its last: count what a put that overlapped with it left behind."""
        if not self._done.is_set():
            return
        lost = 0
        while self.queue:
            item = self.queue.popleft()
            if isinstance(item, threading.Event):
                item.set()
            else:
                lost += 1
        if lost:
            self.dropped["closed"] += lost

    def stop(self) -> None:
        self._stopping = True
        self.awake = False  # puts that come now are counted as closed
        self._bell.put(None)
        self._hurry.set()

    # -- on a thread that waits

    def wait(self, barrier: threading.Event, deadline: float | None) -> bool:
        while not barrier.wait(_slice(deadline)):
            nobody = self._threadless or self._given_up or self._thread is threading.current_thread()
            if nobody or _over(deadline):
                return barrier.is_set()
        return True

    def join(self, deadline: float | None) -> None:
        if self._threadless:
            if self.queue or not self._inherited:
                self._run()
            else:
                self._done.set()
        since = time.monotonic()
        while not self._done.wait(_slice(deadline)):
            if self._given_up or self._thread is threading.current_thread():
                return
            stalled = time.monotonic() - max(since, self._progress) > STALL_SECONDS
            if stalled if deadline is None else _over(deadline):
                self._give_up()
                return
        if not (self._threadless or self._thread is threading.current_thread()):
            cast(threading.Thread, self._thread).join(1.0)  # it has nothing left to do

    def _give_up(self) -> None:
        self._given_up = True
        lost = 0
        while self.queue:
            with suppress(IndexError):  # the thread, if it wakes up after all, takes from it too
                lost += not isinstance(self.queue.popleft(), threading.Event)
        if lost:
            self.dropped["close_timeout"] += lost
        logger.error(
            "gave up on %s: a write of %d records does not end, %d more wait behind it",
            self.shown,
            len(self.batch),
            lost,
        )

    # -- on the writer's own thread

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            while self.queue or not self._stopping:
                if not self._stopping:
                    self.awake = False
                    if not self.queue:
                        self._bell.get()
                    self.awake = True
                    self._hurry.wait(LINGER_SECONDS)
                    self._hurry.clear()
                    if self._stopping:  # since just now
                        self.awake = False  # type: ignore[unreachable] # stop() sets it
                try:
                    self._drain()
                except BaseException as error:
                    self._survive(error)
            if not self._done.is_set():
                self._finish()
                self._done.set()
            # not for long: a signal handler may have interrupted a put that holds it, and waits for us. That put then
            # sweeps itself, should it ever go on.
            if self.lock.acquire(timeout=SWEEP_SECONDS):
                try:
                    self.sweep()
                finally:
                    self.lock.release()
        finally:
            self.awake = False
            self._claim.release()

    def _drain(self) -> None:
        while self.queue:
            barrier = self._take()
            try:
                if self.batch:
                    self._unflushed = True
                    self.deliver()
                    self.batch = []
                    self._progress = time.monotonic()
                if "queue_full" in self.dropped:
                    self._log_once("%s is too slow and its full queue drops records; a larger queue_size may help")
                if barrier is not None or not self.queue or time.monotonic() - self._flushed > FLUSH_SECONDS:
                    self._flush()
            finally:
                if barrier is not None:
                    barrier.set()

    def _take(self) -> threading.Event | None:
        """Fill ``batch``, at most up to the next barrier, which is returned."""
        while len(self.batch) < BATCH:
            try:
                item = self.queue.popleft()
            except IndexError:
                return None
            if isinstance(item, threading.Event):
                return item
            self.batch.append(item)
        return None

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if self._unflushed:
            self._unflushed = False
            try:
                self.flush()
            except BaseException as error:
                # not counted as dropped: the sink may still hold them and succeed later
                self._failed("%s failed to flush", error)

    def _finish(self) -> None:
        try:
            self.finish()
        except BaseException as error:
            self._failed("%s failed to close", error)

    def _failed(self, message: str, error: BaseException) -> None:
        """Log what a plugin raised: whatever it is, the thread goes on; Ctrl-C is the plugin's nowhere but there."""
        if isinstance(error, KeyboardInterrupt) and self._thread is not threading.current_thread():
            raise error
        self._log_once(message, error)

    def _survive(self, error: BaseException) -> None:
        """What went wrong outside of the plugin (no memory, say): the batch is lost for it, and the thread goes on."""
        if self._thread is not threading.current_thread():
            raise error
        lost, self.batch = len(self.batch), []
        if lost:
            self.dropped["write_failed"] += lost
        self._log_once("%s failed to write", error)

    def _log_once(self, message: str, error: BaseException | None = None) -> None:
        key = message, type(error).__name__
        if key not in self._logged:
            self._logged.add(key)
            try:
                text = "" if error is None else f": {key[1]}: {scrubbed(str(error), self.name)}"
                logger.warning(message + "%s", self.shown, text)
            except Exception:  # a filter of the process's own: no record is to be lost for it
                traceback.print_exc()

    # -- what a sink and an observer do differently

    def deliver(self) -> None:
        """Hand ``batch`` over and count it as written or dropped; lets no exception of the plugin out."""
        raise NotImplementedError

    def flush(self) -> None:
        """Flush the sink."""

    def finish(self) -> None:
        """Close the sink."""


class _SinkWriter(_Writer):
    def __init__(self, name: str, sink: Sink) -> None:
        super().__init__(name)
        self._sink = sink

    def deliver(self) -> None:
        count = len(self.batch)  # before the plugin has it
        try:
            self._sink.write(self.batch)
        except DroppedError as error:
            self.dropped[error.reason] += error.count
            self.written += count - error.count
            self._log_once("%s drops records", error)
        except BaseException as error:
            self._failed("%s failed to write", error)
            self.dropped["write_failed"] += count
        else:
            self.written += count

    def flush(self) -> None:
        self._sink.flush()

    def finish(self) -> None:
        self._sink.close()


class _ObserverWriter(_Writer):
    def __init__(self, name: str, observer: Observer) -> None:
        super().__init__(name)
        self._observer = observer

    def deliver(self) -> None:
        failed = 0
        for record in self.batch:
            try:
                self._observer(without_tokens(record))
            except BaseException as error:
                self._failed("%s failed", error)
                failed += 1
            self._progress = time.monotonic()
        self.written += len(self.batch) - failed
        if failed:
            self.dropped["observer_failed"] += failed


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


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _slice(deadline: float | None) -> float:
    """Seconds to wait before looking around again."""
    return 0.2 if deadline is None else min(0.2, max(deadline - time.monotonic(), 0.0))


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
