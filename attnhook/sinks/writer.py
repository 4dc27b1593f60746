"""A bounded writer: a queue, and the thread that empties it.

A delivery has one for each sink and observer, the collector one for each store. What they share is here: a producer
never waits, a signal handler finds no lock taken, and what waits is written before the end. A subclass says what an
item is, how many may wait, and what becomes of one that cannot be written.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from enum import IntEnum
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

from attnhook.system.addresses import masked

FLUSH_SECONDS = 1.0  # a queue that never runs dry is flushed this often

Item = TypeVar("Item")


class State(IntEnum):
    """What a writer does. It only ever goes down this list; most skip `GIVEN_UP`."""

    IDLE = 0  # its thread has not been started
    RUNNING = 1  # its thread sleeps until something is put, and writes it
    STOPPING = 2  # takes no more, and writes what waits
    GIVEN_UP = 3  # a write does not end: nobody waits for it any longer
    DONE = 4  # has done its last: what it wrote to is closed


class Writer(Generic[Item]):
    """One queue and its thread.

    A producer appends to ``queue`` and then, unless the writer is ``awake``, calls `wake`. Barriers (`barrier`) stand
    in the same queue. ``batch`` is what the thread has taken from it and not yet written.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = masked(name)  # for logs: a name is a URL
        self._inherited = False
        self._reset()

    def _reset(self) -> None:
        self.queue: deque[Item | threading.Event] = deque()  # an event is a barrier
        self.batch: list[Item] = []
        # No Condition: its `with` is Python code, where a KeyboardInterrupt can leave the lock taken for
        # good. SimpleQueue.put is one C call that does not wait; the bell holds a token or two.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._hurry = threading.Event()  # cuts waits of the thread short
        self.awake = False  # the thread looks into the queue after it set this to False, and only then sleeps
        self._thread: threading.Thread | None = None
        self._claim = threading.Lock()  # whoever gets it is the one that writes
        self._unflushed = False
        self._progress = self._flushed = time.monotonic()
        # what `state` follows from: set by different threads, and never taken back, so that none undoes another's
        self._stopping = self._given_up = False
        self._done = threading.Event()

    @property
    def state(self) -> State:
        """What it does now."""
        if self._done.is_set():
            return State.DONE
        if self._given_up:
            return State.GIVEN_UP
        if self._stopping:
            return State.STOPPING
        return State.IDLE if self._thread is None else State.RUNNING

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def after_fork(self) -> None:
        """In a child: the parent's queue is the parent's to write, and its thread does not exist here."""
        self._inherited = True  # what this process never writes to is not its to close
        self._reset()

    # -- on the producers' threads

    def start(self) -> None:
        """Start the thread. Raises RuntimeError where the interpreter ends, or the system has no thread left."""
        # bound before it starts: a signal handler may come by here meanwhile
        self._thread = threading.Thread(target=self._run, name=f"attnhook {self.shown}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            raise
        except BaseException:  # Ctrl-C; should the thread run after all, _claim keeps a second one off
            self._thread = None
            raise

    def wake(self) -> None:
        """Have the thread look into the queue."""
        if self._bell.empty():
            self._bell.put(None)

    def barrier(self) -> threading.Event:
        """An event that is set once all that was put before is written and flushed; see `wait`."""
        if self.state >= State.STOPPING:
            return self._done
        barrier = threading.Event()
        if self.state is State.IDLE and not self.queue:
            barrier.set()  # nothing was ever put
        else:
            self.queue.append(barrier)
            self.wake()
            self._hurry.set()
        return barrier

    def end(self) -> None:
        """Write what waits, then finish. Calling it again is harmless."""
        self._stopping = True
        self.awake = False
        self._bell.put(None)
        self._hurry.set()

    # -- on a thread that waits

    def wait(self, barrier: threading.Event, deadline: float | None) -> bool:
        """Wait for a barrier until ``deadline`` (of `time.monotonic`), while there is hope; whether it is set."""
        while not barrier.wait(_slice(deadline)):
            hopeless = not self.alive or self._given_up or self._thread is threading.current_thread()
            if hopeless or _over(deadline):
                return barrier.is_set()
        return True

    def join(self, deadline: float | None, stall: float) -> None:
        """Wait until it is done, after `end`; without a thread, write here and now.

        Gives up at ``deadline`` or, where that is None, once no write has ended for ``stall`` seconds.
        """
        if not self.alive:
            if self.queue or not self._inherited:
                self._run()
            else:
                self._done.set()
        since = time.monotonic()
        while not self._done.wait(_slice(deadline)):
            if self._given_up or self._thread is threading.current_thread():
                return
            stalled = time.monotonic() - max(since, self._progress) > stall
            if stalled if deadline is None else _over(deadline):
                self._give_up()
                return
        if self.alive and self._thread is not threading.current_thread():
            cast(threading.Thread, self._thread).join(1.0)  # it has nothing left to do

    def _give_up(self) -> None:
        self._given_up = True
        lost = 0
        while self.queue:
            with suppress(IndexError):  # the thread, if it wakes up after all, takes from it too
                lost += not isinstance(self.queue.popleft(), threading.Event)
        self.given_up(lost)

    # -- on the writer's own thread

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work()
            if not self._done.is_set():
                self.finish()
                self._done.set()
            self.ended()
        finally:
            self.awake = False
            self._claim.release()

    def _work(self) -> None:
        while self.queue or self.state < State.STOPPING:
            if self.state < State.STOPPING:
                self._sleep()
            try:
                if not self._drain():
                    return
            except BaseException as error:
                if self._thread is not threading.current_thread():
                    raise
                self.survive(error)

    def _sleep(self) -> None:
        """Until something is put, or it is to stop."""
        self.awake = False
        if not self.queue:
            self._bell.get()
        self.awake = True
        self.linger()
        if self.state >= State.STOPPING:  # since just now
            self.awake = False

    def _drain(self) -> bool:
        """Write until the queue is empty; False where `deliver` says that there is no use in going on."""
        while self.queue:
            barrier = self.take()
            try:
                if self.batch:
                    self._unflushed = True
                    if not self.deliver():
                        return False
                    self.batch = []
                    self._progress = time.monotonic()
                if barrier is not None or not self.queue or time.monotonic() - self._flushed > FLUSH_SECONDS:
                    self._flush()
            finally:
                if barrier is not None:
                    barrier.set()
        return True

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if self._unflushed:
            self._unflushed = False
            self.flush()

    # -- what subclasses do differently; all but `given_up` on the writer's own thread

    def linger(self) -> None:
        """Wait for more, after something has woken it up."""

    def take(self) -> threading.Event | None:
        """Move items from ``queue`` into ``batch``, at most up to the next barrier, which is returned."""
        raise NotImplementedError

    def deliver(self) -> bool:
        """Write ``batch`` and count it; False to leave it unwritten and end."""
        raise NotImplementedError

    def flush(self) -> None:
        """Bring what was delivered since the last time to where it is safe."""

    def finish(self) -> None:
        """Close what it wrote to."""

    def ended(self) -> None:
        """See to what came too late: called after `state` has become `State.DONE`, and in each later `join`."""

    def survive(self, error: BaseException) -> None:
        """Go on after an error that `take`, `deliver` or `flush` let out; by default it ends the thread."""
        raise error

    def given_up(self, lost: int) -> None:
        """Tell of ``lost`` items that were taken out of the queue, since a write does not end."""


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _slice(deadline: float | None) -> float:
    """Seconds to wait before looking around again."""
    return 0.2 if deadline is None else min(0.2, max(deadline - time.monotonic(), 0.0))
