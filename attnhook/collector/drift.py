"""A drift monitor beside the receiver: on a thread of its own, behind a queue that never blocks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from typing import Any, Final, NamedTuple

import numpy as np

from attnhook.analysis.drift.baseline import Baseline
from attnhook.analysis.drift.monitor import IDLE_SECONDS, DriftMonitor
from attnhook.record.block import RowBlock
from attnhook.record.tally import short

logger = logging.getLogger("attnhook")

STATES: Final = ("filling", "ok", "warning", "alarm")
_FRAMES = 256  # that may wait
_ROWS = 2**17  # of all frames that wait
_WAIT = 1.0


class _Rows(NamedTuple):
    fingerprints: np.ndarray
    fits: np.ndarray  # bool [N]: the fingerprint is taken as the baseline's were, with or without the attention sink
    ids: list[str]
    ours: np.ndarray  # bool [N]: of the baseline's model
    steps: np.ndarray


class DriftWatch:
    """Feeds a `DriftMonitor` with what the collector receives.

    Rows of other models than the baseline's, and of the other kind where it was fitted on prompt or generated rows
    only, are skipped, as are rows that do not tell their attention on position 0 where the baseline is without it. What
    does not fit the queue is skipped and counted. State begins anew with each process.
    """

    def __init__(self, baseline: Baseline, *, idle_seconds: float = IDLE_SECONDS, frames: int = _FRAMES) -> None:
        self._baseline = baseline
        self._monitor = DriftMonitor(baseline, idle_seconds=idle_seconds)
        self._queue: queue.Queue[_Rows | None] = queue.Queue(frames)
        self._lock = threading.Lock()
        self._waiting = 0  # rows in the queue
        self._skipped: Counter[str] = Counter()
        self._error = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attnhook drift", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Look at what is queued, for some seconds at most, and end."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(5)

    def offer(self, block: RowBlock) -> None:
        """Hand over received rows; returns at once, whatever the watcher does."""
        if not len(block):
            return
        with self._lock:
            full = self._waiting + len(block) > _ROWS and self._waiting > 0
            self._waiting += 0 if full else len(block)
        if not full:
            # what is remembered of names is bounded here: a row's own may have 65,535 bytes
            ids, model = [short(name) for name in block.ids], self._baseline.model
            ours = np.array([not model or name == model for name in block.models], bool)
            try:
                self._queue.put_nowait(_Rows(*self._taken(block), ids, ours, block.steps))
                return
            except queue.Full:
                with self._lock:
                    self._waiting -= len(block)
        with self._lock:
            self._skipped["queue_full"] += len(block)

    def _taken(self, block: RowBlock) -> tuple[np.ndarray, np.ndarray]:
        if not self._baseline.without_sink:
            return block.fingerprints, np.ones(len(block), bool)
        return block.free_fingerprints()[0], block.tell_sink

    def stats(self) -> dict[str, Any]:
        """State, statistic, thresholds and counts, as JSON values."""
        settings = self._baseline.settings
        with self._lock:
            status = self._monitor.status().to_dict()
            skipped, error = dict(self._skipped), self._error
        return {
            **status,
            "window": settings.window,
            "false_alarm_rate": settings.false_alarm_rate,
            "horizon": settings.horizon,
            "model": self._baseline.model,
            "rows": self._baseline.rows,
            "skipped": skipped,
            "error": error,
        }

    def _run(self) -> None:
        while True:
            try:
                rows = self._queue.get(timeout=0.05 if self._stopping.is_set() else _WAIT)
            except queue.Empty:
                rows = None
                if self._stopping.is_set():
                    return
            if rows is not None:
                with self._lock:
                    self._waiting -= len(rows.ids)
            try:
                self._look(rows)
            except Exception as error:  # whatever it is, receiving goes on, and /stats says what it was
                with self._lock:
                    self._skipped["failed"] += 0 if rows is None else len(rows.ids)
                    if not self._error:
                        logger.exception("the drift monitor failed; received records are stored all the same")
                    self._error = f"{type(error).__name__}: {error}"

    def _look(self, rows: _Rows | None) -> None:
        now = time.monotonic()
        if rows is None:
            with self._lock:
                before, after = self._monitor.status().state, self._monitor.finish_idle(now=now)
        else:
            wanted = rows.ours.copy()
            other_model = int((~wanted).sum())
            if self._baseline.rows != "all":
                wanted &= (rows.steps < 0) == (self._baseline.rows == "prompt")
            other_rows = int((~wanted).sum()) - other_model
            wanted &= rows.fits
            no_sink = int((~wanted).sum()) - other_model - other_rows
            ids = [name for name, keep in zip(rows.ids, wanted.tolist(), strict=True) if keep]
            with self._lock:
                for reason, count in (
                    ("other_model", other_model),
                    ("other_rows", other_rows),
                    ("no_sink_mass", no_sink),
                ):
                    if count:
                        self._skipped[reason] += count
                before, after = (
                    self._monitor.status().state,
                    self._monitor.add(rows.fingerprints[wanted], ids, now=now),
                )
        if after != before and "filling" not in (before, after):
            logger.warning("drift: %s, was %s", after, before)
