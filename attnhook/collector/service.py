"""The collector: receiver, ledger, journal, stores and counts put together."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from attnhook import __version__
from attnhook.collector.drift import DriftWatch
from attnhook.collector.journal import Entry, Journal
from attnhook.collector.ledger import Ledger
from attnhook.collector.locks import StoreLock
from attnhook.collector.receiver import Receiver
from attnhook.collector.replay import not_stored
from attnhook.collector.writer import StoreWriter
from attnhook.errors import PluginError
from attnhook.record.block import RowBlock, read_rows
from attnhook.record.tally import Tally
from attnhook.sinks import config, frames

logger = logging.getLogger("attnhook")

QUEUE_BYTES: Final = 256 * 2**20
DRAIN_SECONDS: Final = 5.0
STOP_SECONDS: Final = 30.0


class Collector:
    """Takes records from any number of ``zmq:`` sinks into the stores that ``stores`` name.

    Every frame goes to the journal, then to each store's queue. A store whose queue (``queue_bytes``) is full does
    not get the frame: its records are counted as dropped there, the other stores are not held up. What is in the
    journal and not in a store when the process ends, however it ends, is written at the next start.

    Raises PluginError where an address, a store or the journal cannot be used, or another collector uses the store.
    """

    def __init__(
        self,
        listen: str,
        stores: Sequence[str],
        *,
        journal: Path | None = None,
        queue_bytes: int = QUEUE_BYTES,
        drift: DriftWatch | None = None,
    ) -> None:
        if not stores:
            raise PluginError("the collector has no store: name one, such as --store sqlite:records.db")
        if len(set(stores)) != len(stores):
            raise PluginError(f"a store is named twice in {', '.join(stores)}: name it once")
        self.stores = list(stores)
        self.ledger = Ledger()
        self.tally = Tally()
        self.drift = drift
        self._lock = threading.Lock()
        self._logged: set[str] = set()
        self._unusable: set[int] = set()  # entries of the journal
        self._began = time.monotonic()
        self.replayed = 0  #: records that a process before this one had left in the journal
        with ExitStack() as opened:
            self._locks = [StoreLock(url) for url in stores]
            for lock in self._locks:
                opened.callback(lock.close)
            self.journal = Journal(journal or _beside(stores[0]), self.stores)
            opened.callback(self.journal.close)
            self._restore()
            self._writers: list[StoreWriter] = []
            for url in stores:
                writer = StoreWriter(url, max_bytes=queue_bytes, written=self._written, refused=self._refused)
                self._writers.append(writer)
                opened.callback(writer.abandon)
            self._replay()
            self.receiver = Receiver(listen, self._handle)
            opened.pop_all()

    def start(self) -> None:
        """Begin to take and write records."""
        for writer in self._writers:
            writer.start()
        if self.drift is not None:
            self.drift.start()
        self.receiver.start()

    def stop(self, *, drain: float = DRAIN_SECONDS, seconds: float = STOP_SECONDS) -> bool:
        """Take what is on its way (``drain`` seconds at most), write what is queued, and close.

        False if a store did not take everything within ``seconds``; the rest stays in the journal.
        """
        if not self.receiver.stop(drain):
            logger.warning(
                "producers were still sending after %g seconds; what they send now is counted as lost", drain
            )
        if self.drift is not None:
            self.drift.stop()
        done = [writer.stop(seconds) for writer in self._writers]
        with self._lock:
            self._begin_segment()  # the counts, and nothing but them where all is written
            self.journal.close()
        for lock in self._locks:
            lock.close()
        return all(done)

    @property
    def problems(self) -> list[str]:
        """What is wrong now, for people; empty when all is well."""
        found = [f"{writer.name}: {writer.error}" for writer in self._writers if writer.error]
        found += [f"{writer.name}: its thread has ended" for writer in self._writers if not writer.alive]
        if not self.receiver.alive:
            found.append("the receiver's thread has ended")
        if self.journal.error:
            found.append(f"journal: {self.journal.error}")
        return found

    def stats(self) -> dict[str, Any]:
        """Everything that is counted, as JSON values; the counts of ``records`` outlast restarts."""
        with self._lock:
            ledger, known = self.ledger.counts(), self.ledger.known
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._began, 1),
            "listen": self.receiver.address,
            "problems": self.problems,
            "records": {name: ledger[name] for name in ("received", "lost", "repeated", "bad", "dropped")},
            "messages": {
                "rejected": ledger["rejected"],
                "strangers": self.receiver.strangers,
                "failed": self.receiver.failed,
            },
            "connections": {"open": self.receiver.connected, "closed": dict(self.receiver.closed)},
            "producers": {
                "seen": ledger["producers_seen"],
                "known": known,
                "dropped": ledger["producer_dropped"],
            },
            "stores": {writer.name: writer.stats() for writer in self._writers},
            "journal": {
                "bytes": self.journal.nbytes,
                "failed": self.journal.failed,
                "replayed": self.replayed,
                "unusable": self.journal.unusable,
            },
            "seen": self.tally.snapshot(),
            **({} if self.drift is None else {"drift": self.drift.stats()}),
        }

    # -- on the receiver's thread

    def _handle(self, data: bytes) -> bool:
        """Take a message; whether it was a frame with no more bad records than good ones."""
        try:
            frame = frames.decode(data)
        except frames.FrameError as error:
            with self._lock:
                self.ledger.rejects(error.reason)
            self._log_once(error.reason, "a message was rejected (%s): %s", error.reason, error)
            return False
        block, bad = read_rows(frame.rows)
        tokens = bool(block.tokens.any()) and not any(writer.keeps_tokens for writer in self._writers)
        if tokens:  # no store keeps them: the journal is not to either
            block = block.without_tokens()
        if tokens or bad:  # what is damaged is kept by its number only, or it could fill the journal's disk
            rows = [*block.rows(), *[b""] * sum(bad.values())]
            data = frames.encode(frame.producer, frame.first, frame.dropped, rows)
        with self._lock:
            if self.journal.full or self.journal.idle:
                self._begin_segment()
            self.ledger.frame(frame)
            self.ledger.damaged(bad)
            full = [writer for writer in self._writers if not writer.has_room(block.nbytes)] if len(block) else []
            for writer in full:
                self.ledger.drop(writer.name, "queue_full", len(block))
            skip = [writer.url for writer in full]
            # a frame that no store gets is kept by its number only
            wanted = len(block) > 0 and len(full) < len(self._writers)
            if wanted:
                number = self.journal.append("frame", skip, dict(bad), body=data)
            else:
                passed = [frame.producer, frame.first, len(frame.rows), frame.dropped, frame.end]
                self.journal.append("passed", passed, skip, len(block), dict(bad))
        if full:
            self._log_once("queue_full", "%s: the queue is full, records are dropped", ", ".join(w.name for w in full))
        if wanted:
            for writer in self._writers:
                if writer not in full:
                    writer.put(block, number)
        self.tally.add(block.fingerprints, block.zones, block.ids, block.steps)
        if self.drift is not None:
            self.drift.offer(block)
        return sum(bad.values()) <= len(block)

    # -- on the writers' threads

    def _written(self, store: str, number: int) -> None:
        with self._lock:
            self.journal.acknowledge(store, number)

    def _refused(self, store: str, count: int) -> None:
        with self._lock:
            self.ledger.drop(store.partition("?")[0], "refused", count)

    # -- before the start

    def _restore(self) -> None:
        """The ledger as it was: the last state and what came after it."""
        for entry in self.journal.read():
            try:
                self._restore_entry(entry)
            except Exception as error:  # whatever it is: one entry is no reason not to start
                self._unusable.add(entry.number)
                self.journal.put_aside(entry, f"{type(error).__name__}: {error}")
        if self.journal.unusable:
            logger.error("%d entries of the journal could not be used and are left out", self.journal.unusable)
        try:
            self.journal.begin(self.ledger.state())
        except OSError as error:
            raise PluginError(
                f"the collector's journal {self.journal.folder} cannot be written: {error}; make room there, or name "
                "another folder with --journal"
            ) from error

    def _restore_entry(self, entry: Entry) -> None:
        if entry.kind == "state":
            self.ledger.restore(entry.state)
        elif entry.kind == "frame":
            frame = frames.decode(entry.body, kept=True)
            block, bad = read_rows(frame.rows)
            # journals of the first release have damaged records in their frames, in place of their counts
            self._count_again(frame, entry.meta[1], len(block), entry.meta[2] if len(entry.meta) > 2 else bad)
        elif entry.kind == "passed":
            _, (producer, first, count, dropped, end), skip, good, bad = entry.meta
            if type(count) is not int or not 0 <= count <= frames.MAX_BYTES:  # an empty row takes two bytes
                raise ValueError(f"a frame of {str(count)[:40]} records")
            dropped = frames.known_reasons(dropped)
            self._count_again(frames.Frame(producer, first, dropped, [b""] * count, end), skip, good, bad)
        elif entry.kind != "ack":
            raise ValueError(f"an entry of kind {entry.kind!r}" if entry.kind else "its bytes are damaged")

    def _count_again(self, frame: frames.Frame, skip: Iterable[str], good: int, bad: Mapping[str, int]) -> None:
        self.ledger.damaged(bad)
        self.ledger.frame(frame)
        for url in skip:
            self.ledger.drop(url.partition("?")[0], "queue_full", good)

    def _replay(self) -> None:
        """Queue what stores lack of the journal's frames."""
        waiting: dict[str, list[tuple[int, RowBlock]]] = {url: [] for url in self.stores}
        for entry in self.journal.frames():
            if entry.number in self._unusable:
                continue
            lacking = [
                url for url in self.stores if url not in entry.meta[1] and entry.number > self.journal.acknowledged(url)
            ]
            if lacking:
                block, _ = read_rows(frames.decode(entry.body, kept=True).rows)
                self.replayed += len(block)
                for url in lacking:
                    waiting[url].append((entry.number, block))
        for writer in self._writers:
            for number, block in not_stored(writer.url, waiting[writer.url], writer.stored_id):
                writer.put(block, number)
        if self.replayed:
            logger.warning("%d records wait in the journal of an earlier run and are written now", self.replayed)

    def _begin_segment(self) -> None:
        try:
            self.journal.begin(self.ledger.state())
        except OSError as error:
            self._log_once("journal", "the journal cannot be written; records are kept in memory only: %s", error)

    def _log_once(self, key: str, message: str, *values: object) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.warning(message + " (counted; later ones are not logged)", *values)


def _beside(url: str) -> Path:
    """The journal's folder beside a store: ``x.db.journal``."""
    scheme, _, rest = url.partition(":")
    path, _ = config.split(rest)
    if scheme not in ("sqlite", "parquet", "jsonl") or "://" in path:
        raise PluginError(f"the journal of {url} needs a folder on this machine: name one with --journal")
    path = os.path.expanduser(path).rstrip("/")
    return Path(path + ".journal")
