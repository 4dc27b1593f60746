"""One store's writer: a queue bounded in bytes and a thread that writes, tries again, and says what is safe."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from attnhook.errors import PluginError
from attnhook.plugins.contracts import Sink
from attnhook.record.block import RowBlock, joined
from attnhook.record.columns import now_us
from attnhook.record.tally import short
from attnhook.sinks.opening import open_sink
from attnhook.sinks.privacy import id_in, wants_tokens
from attnhook.sinks.writer import Writer

logger = logging.getLogger("attnhook")

BATCH_RECORDS = 8192
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)
_REOPEN_AFTER = 4  # failures in a row


class _Waiting(NamedTuple):
    block: RowBlock
    number: int | None  # of its journal entry


class _Amount(NamedTuple):
    blocks: int = 0
    rows: int = 0
    nbytes: int = 0

    def plus(self, block: RowBlock) -> _Amount:
        return _Amount(self.blocks + 1, self.rows + len(block), self.nbytes + block.nbytes)

    def less(self, other: _Amount) -> _Amount:
        return _Amount(self.blocks - other.blocks, self.rows - other.rows, self.nbytes - other.nbytes)


class StoreWriter(Writer[_Waiting]):
    """Writes blocks to the store that ``url`` names.

    A write that fails is tried again until it succeeds or `stop` gives up: stores take a batch as a whole or not at
    all. What no store could ever take (a record that it refuses) is found by halves and given to ``refused``.
    ``written`` is told the journal's number up to which everything is in the store.
    """

    def __init__(
        self, url: str, *, max_bytes: int, written: Callable[[str, int], None], refused: Callable[[str, int], None]
    ) -> None:
        super().__init__(url.partition("?")[0])
        self.url = url
        self.error = ""  #: why it cannot write, while it cannot
        self.records = 0  #: written since the start
        self.retries = 0
        self.refused = 0  #: records that the store could never take
        self._sink: Sink = open_sink(url)
        self._max_bytes = max_bytes
        self._written, self._refused = written, refused
        # the queue's size is what came less what went: each is counted by one thread, so that no lock is needed
        self._came, self._went = _Amount(), _Amount()
        self._deadline = float("inf")

    # -- on the collector's threads

    def has_room(self, size: int) -> bool:
        """Whether a block of so many bytes would fit; an empty queue takes any."""
        queued = self._queued
        return not queued.blocks or queued.nbytes + size <= self._max_bytes

    def put(self, block: RowBlock, number: int | None) -> None:
        """Queue a block, also beyond the bound; never waits for the store."""
        self._came = self._came.plus(block)
        self.queue.append(_Waiting(block, number))
        if not self.awake:
            self.wake()

    def stop(self, seconds: float) -> bool:
        """Write what waits and close the store; False if it could not within ``seconds``."""
        self._deadline = time.monotonic() + seconds
        self.end()
        if self._thread is not None:
            self._thread.join(seconds + 30)  # a write that hangs is left to the journal
        return not self._queued.blocks

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

    def stats(self) -> dict[str, Any]:
        """Counts since the start."""
        queued = self._queued
        return {
            "written": self.records,
            "duplicates": getattr(self._sink, "duplicates", None),
            "queued": queued.rows,
            "queued_bytes": queued.nbytes,
            "retries": self.retries,
            "error": self.error or None,
        }

    @property
    def _queued(self) -> _Amount:
        went = self._went  # first: what came can only be more by then
        return self._came.less(went)

    # -- on its own thread

    def take(self) -> threading.Event | None:
        """Blocks of `BATCH_RECORDS` rows in all, or one that has more."""
        rows = 0
        while self.queue:
            item = self.queue[0]  # nobody else takes from it
            if isinstance(item, threading.Event):
                self.queue.popleft()
                return item
            rows += len(item.block)
            if self.batch and rows > BATCH_RECORDS:
                break
            self.batch.append(item)
            self.queue.popleft()
        return None

    def deliver(self) -> bool:
        """Write until the store has it; False where it is time to give up: it is left to the journal."""
        if not self._store([item.block for item in self.batch]):
            return False
        for item in self.batch:
            self._went = self._went.plus(item.block)
        numbers = [item.number for item in self.batch if item.number is not None]
        if numbers:
            self._written(self.url, numbers[-1])
        return True

    def finish(self) -> None:
        """Close the store."""
        try:
            self._sink.close()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            logger.error("%s could not be closed: %s", self.name, self.error)

    def _store(self, blocks: list[RowBlock]) -> bool:
        time_us, failures = now_us(), 0
        while True:
            try:
                self._write(blocks, time_us)
            except (ValueError, TypeError) as error:  # RecordError too: trying again would change nothing
                return self._store_parts(blocks, error)
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

    def _store_parts(self, blocks: list[RowBlock], error: Exception) -> bool:
        if len(blocks) > 1:
            return all(self._store([block]) for block in blocks)
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
        return self._store([block.part(0, middle)]) and self._store([block.part(middle, len(block))])

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
        while (left := min(until, self._deadline) - time.monotonic()) > 0:
            self._hurry.wait(left)  # `stop` cuts it short, and sets the deadline before
            self._hurry.clear()
        return time.monotonic() < self._deadline
