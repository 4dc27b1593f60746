"""Running counts over many records: zones, entropy and masses, over all time, the last minute and per request."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.zones import ZONE_NAMES

#: Upper bounds of the histograms' buckets.
BOUNDS: np.ndarray = np.round(np.arange(1, 21) / 20, 2)
#: The numbers of a fingerprint that are counted in histograms.
MEASURES: dict[str, int] = {"entropy": fp.ENTROPY, "local": fp.LOCAL, "mid": fp.MID, "long": fp.LONG}
RECENT_SECONDS = 60
_COLUMNS = list(MEASURES.values())
_MAX_REQUESTS = 4096
_MAX_NAME = 200  # characters of a request id that are remembered

Clock = Callable[[], float]


class Tally:
    """Counts of everything that `add` was given; safe to use from several threads.

    ``clock`` gives monotonic seconds: no rate depends on the wall clock, which may jump.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self.records = 0
        self.prompt_records = 0
        self.zones = np.zeros(len(ZONE_NAMES), np.int64)
        self.sums = np.zeros(len(MEASURES))
        self.histograms = np.zeros((len(MEASURES), len(BOUNDS) + 1), np.int64)  # the last bucket is above 1: rounding
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._past: deque[tuple[float, np.ndarray]] = deque([(clock(), self._vector())])

    def add(self, fingerprints: np.ndarray, zones: np.ndarray, ids: Sequence[str], steps: np.ndarray) -> None:
        """Count rows: float32 [N, 20], zone codes [N], request ids and decode steps (-1 for prompt rows)."""
        if not len(ids):
            return
        values = fingerprints[:, _COLUMNS]
        buckets = np.searchsorted(BOUNDS, values - 1e-6)  # 0.05 in float32 is above 0.05
        width = self.histograms.shape[1]
        flat = (buckets + np.arange(len(MEASURES)) * width).ravel()
        counts = np.bincount(flat, minlength=self.histograms.size).reshape(self.histograms.shape)
        found = np.bincount(zones, minlength=len(ZONE_NAMES))
        with self._lock:
            self.records += len(ids)
            self.prompt_records += int((steps < 0).sum())
            self.zones += found
            self.sums += values.sum(axis=0, dtype=np.float64)
            self.histograms += counts
            now = self._clock()
            self._count_requests(ids, zones, values[:, 0], now)
            self._remember(now)

    def snapshot(self, top: int = 10) -> dict[str, Any]:
        """Everything as plain numbers, for JSON; ``recent`` is about the last minute."""
        with self._lock:
            return self._snapshot(top)

    def totals(self) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
        """A `snapshot` without requests and, of the same moment, the records by zone and the sums by measure."""
        with self._lock:
            zones = dict(zip(ZONE_NAMES, self.zones.tolist(), strict=True))
            return self._snapshot(0), zones, dict(zip(MEASURES, self.sums.tolist(), strict=True))

    def _snapshot(self, top: int) -> dict[str, Any]:
        now = self._clock()
        self._remember(now)
        since, before = self._past[0]
        return {
            "records": self.records,
            "prompt_records": self.prompt_records,
            **_shares(self._vector()),
            "recent": {
                "seconds": round(now - since, 3),
                "rate": self._rate(now),
                **_shares(self._vector() - before),
            },
            "histograms": {
                name: {"le": [*BOUNDS.tolist(), "+Inf"], "counts": counts}
                for name, counts in zip(MEASURES, self.histograms.tolist(), strict=True)
            },
            "top_requests": [
                request.to_dict(name, now)
                for name, request in sorted(self._requests.items(), key=lambda item: -item[1].records)
                if now - request.last <= RECENT_SECONDS
            ][:top],
        }

    def _vector(self) -> np.ndarray:
        return np.concatenate([[self.records], self.zones, self.sums])

    def _remember(self, now: float) -> None:
        """Keep what was counted once a second, for a minute."""
        if now - self._past[-1][0] >= 1:
            self._past.append((now, self._vector()))
        while len(self._past) > 1 and now - self._past[1][0] >= RECENT_SECONDS:
            self._past.popleft()

    def _rate(self, now: float) -> float:
        """Records per second over the last ten seconds, or since the start."""
        for since, before in self._past:
            if now - since <= 10:
                return round(float(self.records - before[0]) / max(now - since, 1.0), 1)
        return 0.0

    def _count_requests(self, ids: Sequence[str], zones: np.ndarray, entropies: np.ndarray, now: float) -> None:
        places: dict[str, int] = {}
        codes = np.fromiter((places.setdefault(name, len(places)) for name in ids), np.int64, len(ids))
        per_zone = np.bincount(codes * len(ZONE_NAMES) + zones, minlength=len(places) * len(ZONE_NAMES))
        sums = np.bincount(codes, entropies)
        for (whole, place), entropy in zip(places.items(), sums.tolist(), strict=True):
            name = short(whole)
            request = self._requests.get(name)
            if request is None:
                request = self._requests[name] = _Request()
                if len(self._requests) > _MAX_REQUESTS:
                    self._requests.popitem(last=False)
            else:
                self._requests.move_to_end(name)
            start = place * len(ZONE_NAMES)
            request.add(per_zone[start : start + len(ZONE_NAMES)], entropy, now)


def short(name: str) -> str:
    """A name to remember a request by: itself, or of a long one its beginning and a number that tells it from others.

    A row's names may have 65,535 bytes, and who sends them chooses how many different ones there are.
    """
    if len(name) <= _MAX_NAME:
        return name
    digest = blake2b(name.encode(errors="replace"), digest_size=8).hexdigest()
    return f"{name[: _MAX_NAME - len(digest) - 2]}..{digest}"


class _Request:
    def __init__(self) -> None:
        self.zones = np.zeros(len(ZONE_NAMES), np.int64)
        self.records = 0
        self.entropy = 0.0
        self.last = 0.0

    def add(self, zones: np.ndarray, entropy: float, now: float) -> None:
        self.zones += zones
        self.records += int(zones.sum())
        self.entropy += entropy
        self.last = now

    def to_dict(self, name: str, now: float) -> dict[str, Any]:
        return {
            "request_id": name,
            "records": self.records,
            "entropy": round(self.entropy / self.records, 4),
            "zone": ZONE_NAMES[int(self.zones.argmax())],
            "seconds_ago": round(now - self.last, 1),
        }


def _shares(vector: np.ndarray) -> dict[str, Any]:
    """Zone shares and means of a vector of counts; None where there is nothing to divide."""
    count = float(vector[0])
    numbers = (vector[1:] / max(count, 1.0)).round(4).tolist()
    means = dict(zip(MEASURES, numbers[len(ZONE_NAMES) :], strict=True))
    return {
        "zones": dict(zip(ZONE_NAMES, numbers, strict=False)),
        "means": {name: mean if count else None for name, mean in means.items()},
    }
