"""Writers of records: for a sink, and for an observer. Whatever these raise is counted, and the thread goes on."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable

from attnhook.errors import DroppedError
from attnhook.plugins.contracts import Sink
from attnhook.record.token_record import TokenRecord, without_tokens
from attnhook.sinks.writer import State, Writer
from attnhook.system.addresses import scrubbed

logger = logging.getLogger("attnhook")

Observer = Callable[[TokenRecord], object]

BATCH = 1024  # most records that one `Sink.write` gets
SWEEP_SECONDS = 0.5  # that an ending writer waits for the lock
LINGER_SECONDS = 0.02  # a writer that wakes up waits so long for more: a busy producer need not wake it again


class RecordWriter(Writer[TokenRecord]):
    """The writer of one sink or observer; counts every record as written or dropped."""

    lock: threading.RLock  # the delivery's

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._logged: set[tuple[str, str]] = set()

    def _reset(self) -> None:
        super()._reset()
        self.written = 0
        self.dropped: Counter[str] = Counter()

    # -- on the producers' threads, under the lock

    def wake(self) -> None:
        if self._thread is None:
            try:
                self.start()
            except RuntimeError as error:
                self._log_once("no thread for %s, its records wait for close()", error)
        super().wake()

    def sweep(self) -> None:
        """Once the thread has done its last: count what a put that overlapped with it left behind."""
        if self.state is not State.DONE:
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

    # -- on the writer's own thread

    def linger(self) -> None:
        self._hurry.wait(LINGER_SECONDS)
        self._hurry.clear()

    def take(self) -> threading.Event | None:
        while len(self.batch) < BATCH:
            try:
                item = self.queue.popleft()
            except IndexError:
                return None
            if isinstance(item, threading.Event):
                return item
            self.batch.append(item)
        return None

    def deliver(self) -> bool:
        self.hand_over()
        if "queue_full" in self.dropped:
            self._log_once("%s is too slow and its full queue drops records; a larger queue_size may help")
        return True

    def ended(self) -> None:
        # not for long: a signal handler may have interrupted a put that holds it, and waits for us. That put then
        # sweeps itself, should it ever go on.
        if self.lock.acquire(timeout=SWEEP_SECONDS):
            try:
                self.sweep()
            finally:
                self.lock.release()

    def survive(self, error: BaseException) -> None:
        """What went wrong outside of the plugin (no memory, say): the batch is lost for it, and the thread goes on."""
        lost, self.batch = len(self.batch), []
        if lost:
            self.dropped["write_failed"] += lost
        self._log_once("%s failed to write", error)

    def given_up(self, lost: int) -> None:
        if lost:
            self.dropped["close_timeout"] += lost
        logger.error(
            "gave up on %s: a write of %d records does not end, %d more wait behind it",
            self.shown,
            len(self.batch),
            lost,
        )

    def hand_over(self) -> None:
        """Give ``batch`` to the sink or observer, count it, and let no exception of the plugin out."""
        raise NotImplementedError

    def _failed(self, message: str, error: BaseException) -> None:
        """Log what a plugin raised: whatever it is, the thread goes on; Ctrl-C is the plugin's nowhere but there."""
        if isinstance(error, KeyboardInterrupt) and self._thread is not threading.current_thread():
            raise error
        self._log_once(message, error)

    def _log_once(self, message: str, error: BaseException | None = None) -> None:
        key = message, type(error).__name__
        if key not in self._logged:
            self._logged.add(key)
            try:
                text = "" if error is None else f": {key[1]}: {scrubbed(str(error), self.name)}"
                logger.warning(message + "%s", self.shown, text)
            except Exception:  # a filter of the process's own: no record is to be lost for it
                traceback.print_exc()


class SinkWriter(RecordWriter):
    def __init__(self, name: str, sink: Sink) -> None:
        super().__init__(name)
        self._sink = sink

    def hand_over(self) -> None:
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
        try:
            self._sink.flush()
        except BaseException as error:
            # not counted as dropped: the sink may still hold them and succeed later
            self._failed("%s failed to flush", error)

    def finish(self) -> None:
        try:
            self._sink.close()
        except BaseException as error:
            self._failed("%s failed to close", error)


class ObserverWriter(RecordWriter):
    def __init__(self, name: str, observer: Observer) -> None:
        super().__init__(name)
        self._observer = observer

    def hand_over(self) -> None:
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
