"""Watching requests as they come: groups rows into requests, keeps a window of them, tells the state."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np

from attnhook.analysis.drift.baseline import Baseline
from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp

State = Literal["filling", "ok", "warning", "alarm"]
IDLE_SECONDS: Final = 30.0
_MAX_OPEN = 10_000
_SHOWN = 3


@dataclass(frozen=True)
class Status:
    """What a monitor knows now; "filling" until the window is full."""

    state: State
    statistic: float | None  # of the latest full window
    warning: float
    alarm: float
    requests: int  # that are finished
    open_requests: int
    alarms: int  # times that the state became alarm
    warnings: int  # times that it became warning from below
    moved: tuple[tuple[str, float, float], ...]  # what moved most: name, the window's mean, in spreads of requests

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        moved = [{"name": name, "mean": mean, "spreads": spreads} for name, mean, spreads in self.moved]
        return {**asdict(self), "moved": moved}


class DriftMonitor:
    """Compares the latest requests with a baseline. Not thread-safe: use it from one thread.

    A request is finished when no row of it came for ``idle_seconds``, or when more than 10,000 are open (the one that
    was quiet longest). State: a statistic above the alarm threshold is an alarm, which lasts until it is below the
    warning threshold; above that is a warning, which lasts until it is below half of it.
    """

    def __init__(self, baseline: Baseline, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self.baseline = baseline
        self._idle = idle_seconds
        self._open: OrderedDict[str, tuple[np.ndarray, float]] = OrderedDict()  # sum of 20 and rows; time of the last
        self._window: deque[np.ndarray] = deque(maxlen=baseline.settings.window)
        self._sum = np.zeros(fp.SIZE)
        self._state: State = "filling"
        self._statistic: float | None = None
        self._requests = self._alarms = self._warnings = 0

    def add(self, fingerprints: np.ndarray, ids: Sequence[str], *, now: float) -> State:
        """Take rows as they come: float32 [N, 20], their requests, and the time in monotonic seconds.

        Raises RecordError, and takes nothing, where shapes differ or a number is not finite.
        """
        rows = np.asarray(fingerprints, np.float64)
        if rows.shape != (len(ids), fp.SIZE):
            raise RecordError(
                f"{len(ids)} request ids need fingerprints of shape [{len(ids)}, {fp.SIZE}], got {list(rows.shape)}"
            )
        if not np.isfinite(rows).all():
            raise RecordError("a fingerprint holds a number that is not finite; leave damaged records out")
        places: dict[str, int] = {}
        codes = np.fromiter((places.setdefault(name, len(places)) for name in ids), np.int64, len(ids))
        sums = np.zeros((len(places), fp.SIZE + 1))
        np.add.at(sums, codes, np.concatenate([rows, np.ones((len(rows), 1))], axis=1))
        for name, place in places.items():
            before = self._open.pop(name, None)
            self._open[name] = (sums[place] if before is None else before[0] + sums[place], now)
        while len(self._open) > _MAX_OPEN:
            self._finish(self._open.popitem(last=False)[1][0])
        return self.finish_idle(now=now)

    def finish_idle(self, *, now: float) -> State:
        """Finish the requests of which no row came for ``idle_seconds``."""
        while self._open:
            name, (sums, last) = next(iter(self._open.items()))
            if now - last < self._idle:
                break
            del self._open[name]
            self._finish(sums)
        return self._state

    def finish_all(self) -> State:
        """Finish all requests, in the order of their last rows: nothing more is to come."""
        while self._open:
            self._finish(self._open.popitem(last=False)[1][0])
        return self._state

    def add_request(self, mean: np.ndarray) -> State:
        """Take one finished request: the mean of its fingerprints, float [20]."""
        mean = np.asarray(mean, np.float64)
        if mean.shape != (fp.SIZE,) or not np.isfinite(mean).all():
            raise RecordError(f"a request's mean has {fp.SIZE} finite numbers, got {mean.tolist()}")
        if len(self._window) == self._window.maxlen:
            self._sum -= self._window[0]
        self._window.append(mean)
        self._sum += mean
        self._requests += 1
        if self._requests % 1000 == 0:
            self._sum = np.sum(self._window, axis=0)  # rounding does not add up for ever
        if len(self._window) == self._window.maxlen:
            size = len(self._window)
            self._statistic = float(self.baseline.statistic(self._sum / size, size))
            self._judge(self._statistic)
        return self._state

    def status(self) -> Status:
        """The state and what led to it."""
        return Status(
            state=self._state,
            statistic=self._statistic,
            warning=self.baseline.warning,
            alarm=self.baseline.alarm,
            requests=self._requests,
            open_requests=len(self._open),
            alarms=self._alarms,
            warnings=self._warnings,
            moved=self._moved(),
        )

    def _finish(self, sums: np.ndarray) -> None:
        self.add_request(sums[: fp.SIZE] / sums[fp.SIZE])

    def _judge(self, statistic: float) -> None:
        before = self._state
        if statistic > self.baseline.alarm:
            self._state = "alarm"
        elif statistic > self.baseline.warning:
            self._state = "alarm" if before == "alarm" else "warning"
        elif statistic > self.baseline.warning / 2:
            self._state = "warning" if before in ("alarm", "warning") else "ok"
        else:
            self._state = "ok"
        if self._state == "alarm" and before != "alarm":
            self._alarms += 1
        if self._state == "warning" and before not in ("alarm", "warning"):
            self._warnings += 1

    def _moved(self) -> tuple[tuple[str, float, float], ...]:
        if len(self._window) < (self._window.maxlen or 0):
            return ()
        mean, spread = self._sum / len(self._window), self.baseline.spread
        spreads = np.where(spread > 0, (mean - self.baseline.mean) / np.where(spread > 0, spread, 1), 0)
        most = np.argsort(-np.abs(spreads), kind="stable")[:_SHOWN]
        return tuple((fp.NAMES[i], round(float(mean[i]), 6), round(float(spreads[i]), 3)) for i in most)
