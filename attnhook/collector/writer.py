"""One store's writer: a queue bounded in bytes and a thread that writes, tries again, and says what is safe."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from attnhook.errors import PluginError
from attnhook.plugins.contracts import Sink
from attnhook.record.block import RowBlock, joined
from attnhook.record.columns import now_us
from attnhook.record.tally import short
from attnhook.sinks.opening import open_sink
from attnhook.sinks.privacy import id_in, wants_tokens

logger = logging.getLogger("attnhook")

BATCH_RECORDS = 8192
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)
_REOPEN_AFTER = 4  # failures in a row


class _Waiting(NamedTuple):
    block: RowBlock
    number: int | None  # of its journal entry


class StoreWriter:
    """Writes blocks to the store that ``url`` names.

    A write that fails is tried again until it succeeds or `stop` gives up: stores take a batch as a whole or not at
    all. What no store could ever take (a record that it refuses) is found by halves and given to ``refused``.
    ``written`` is told the journal's number up to which everything is in the store.
    """

    def __init__(
        self, url: str, *, max_bytes: int, written: Callable[[str, int], None], refused: Callable[[str, int], None]
    ) -> None:
        self.url = url
        self.name = url.partition("?")[0]
        self.error = ""  #: why it cannot write, while it cannot
        self.records = 0  #: written since the start
        self.retries = 0
        self.refused = 0  #: records that the store could never take
        self._sink: Sink = open_sink(url)
        self._max_bytes = max_bytes
        self._written, self._refused = written, refused
        self._queue: deque[_Waiting] = deque()
        self._queued = self._queued_bytes = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name=f"attnhook {self.name}", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def has_room(self, size: int) -> bool:
        """Whether a block of so many bytes would fit; an empty queue takes any."""
        with self._changed:
            return not self._queue or self._queued_bytes + size <= self._max_bytes

    def put(self, block: RowBlock, number: int | None) -> None:
        """Queue a block, also beyond the bound; never waits for the store."""
        with self._changed:
            self._queue.append(_Waiting(block, number))
            self._queued += len(block)
            self._queued_bytes += block.nbytes
            self._changed.notify()

    def stop(self, seconds: float) -> bool:
        """Write what waits and close the store; False if it could not within ``seconds``."""
        with self._changed:
            self._stopping = True
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 30)  # a write that hangs is left to the journal
        return not self._queue

    def stored_id(self, request_id: str) -> str:
        """What a request id becomes in the store."""
        return id_in(self._sink, request_id)

    @property
    def keeps_tokens(self) -> bool:
        """Whether the store keeps token ids."""
        return wants_tokens(self._sink)

    def abandon(self) -> None:
        """Close the store of a writer that was never started."""
        self._sink.close()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def stats(self) -> dict[str, Any]:
        """Counts since the start."""
        with self._changed:
            return {
                "written": self.records,
                "duplicates": getattr(self._sink, "duplicates", None),
                "queued": self._queued,
                "queued_bytes": self._queued_bytes,
                "retries": self.retries,
                "error": self.error or None,
            }

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if not self._queue:
                    break
                batch = self._next_batch()
            if not self._deliver([item.block for item in batch]):
                break  # given up; it is still in the queue, and in the journal
            with self._changed:
                for item in batch:
                    self._queue.popleft()
                    self._queued -= len(item.block)
                    self._queued_bytes -= item.block.nbytes
            numbers = [item.number for item in batch if item.number is not None]
            if numbers:
                self._written(self.url, numbers[-1])
        try:
            self._sink.close()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            logger.error("%s could not be closed: %s", self.name, self.error)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        count = 0
        for item in self._queue:
            if batch and count + len(item.block) > BATCH_RECORDS:
                break
            batch.append(item)
            count += len(item.block)
        return batch

    def _deliver(self, blocks: list[RowBlock]) -> bool:
        """Write until the store has them; False where it is time to give up."""
        time_us, failures = now_us(), 0
        while True:
            try:
                self._write(blocks, time_us)
            except (ValueError, TypeError) as error:  # RecordError too: trying again would change nothing
                return self._deliver_parts(blocks, error)
            except Exception as error:
                failures += 1
                self._failed(error, failures)
                if not self._wait(failures):
                    return False
            else:
                if failures:
                    logger.warning("%s takes records again", self.name)
                self.error = ""
                self.records += sum(map(len, blocks))
                return True

    def _write(self, blocks: list[RowBlock], time_us: int) -> None:
        blocks = [block for block in blocks if len(block)]
        if not blocks:
            return
        sink: Any = self._sink
        if hasattr(getattr(sink, "inner", sink), "write_columns"):  # a store, perhaps behind privacy rules
            sink.write_columns(joined([block.columns(time_us) for block in blocks]))
        else:
            self._sink.write([record for block in blocks for record in block.records()])
            self._sink.flush()

    def _deliver_parts(self, blocks: list[RowBlock], error: Exception) -> bool:
        if len(blocks) > 1:
            return all(self._deliver([block]) for block in blocks)
        (block,) = blocks
        if len(block) == 1:
            self.refused += 1
            if str(self.refused).strip("0") == "1":  # 1, 10, 100, ...: who sends them is not to fill the log
                name = short(block.ids[0])
                logger.warning(
                    "%s refuses a record of request %r: %s (%d so far)", self.name, name, error, self.refused
                )
            self._refused(self.url, 1)
            return True
        middle = len(block) // 2
        return self._deliver([block.part(0, middle)]) and self._deliver([block.part(middle, len(block))])

    def _failed(self, error: Exception, failures: int) -> None:
        message = f"{type(error).__name__}: {error}"
        if message != self.error:
            logger.error("%s does not take records, trying again: %s", self.name, message)
        self.error = message
        self.retries += 1
        if failures % _REOPEN_AFTER == 0:  # the file may have been replaced, or the disk mounted again
            try:
                fresh = open_sink(self.url)
            except PluginError as problem:
                self.error = str(problem)
                return
            old, self._sink = self._sink, fresh
            try:
                old.close()
            except Exception as problem:
                logger.warning("%s could not be closed: %s", self.name, problem)

    def _wait(self, failures: int) -> bool:
        """Wait before the next try; False where it is time to give up."""
        until = time.monotonic() + RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1]
        with self._changed:
            while (left := min(until, self._deadline) - time.monotonic()) > 0:
                self._changed.wait(left)
            return time.monotonic() < self._deadline
