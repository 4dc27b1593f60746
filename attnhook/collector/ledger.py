"""The ledger: what each producer has sent and what of it arrived, so that nothing is lost without being counted."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, NamedTuple

from attnhook.frames import Frame

_MAX_PRODUCERS = 10_000
_MAX_GAPS = 1000


class Arrival(NamedTuple):
    """What a frame changed, in records."""

    lost: int  # numbers that were skipped
    found: int  # numbers counted as lost before, which came after all
    repeated: int  # numbers that were there already


class Numbers:
    """Which of a producer's record numbers have come. Frames may overtake each other when it reconnects."""

    def __init__(self) -> None:
        self.next = 0
        self.gaps: list[tuple[int, int]] = []  # [start, stop), ascending, all below next

    @property
    def missing(self) -> int:
        """Numbers below ``next`` that have not come and still may."""
        return sum(stop - start for start, stop in self.gaps)

    def arrive(self, first: int, count: int) -> Arrival:
        """Numbers ``first`` to ``first + count - 1`` have come."""
        stop, lost = first + count, 0
        if first > self.next:
            self.gaps.append((self.next, first))
            lost = first - self.next
        fresh = max(stop - max(first, self.next), 0)
        found = 0
        if first < self.next:
            gaps = []
            for start, end in self.gaps:
                inside = max(min(stop, end) - max(first, start), 0)
                if not inside:
                    gaps.append((start, end))
                    continue
                found += inside
                gaps += [(a, b) for a, b in ((start, min(first, end)), (max(stop, start), end)) if a < b]
            self.gaps = gaps
        self.next = max(self.next, stop)
        del self.gaps[: max(len(self.gaps) - _MAX_GAPS, 0)]  # they stay counted as lost
        return Arrival(lost, found, count - fresh - found)


class Ledger:
    """Counts over all producers; survives restarts as `state`."""

    def __init__(self) -> None:
        self.received = 0  #: records that came, repeated ones not counted
        self.lost = 0  #: records that were sent and never came
        self.repeated = 0
        self.rejected: Counter[str] = Counter()  #: messages that are no frames, by reason
        self.bad: Counter[str] = Counter()  #: records that are damaged, by reason
        self.dropped: dict[str, Counter[str]] = {}  #: records that a store did not get, by store and reason
        self.producers_seen = 0
        self.producer_dropped: Counter[str] = Counter()  #: records that producers say they dropped, by reason
        self._producers: OrderedDict[bytes, tuple[Numbers, dict[str, int]]] = OrderedDict()

    def frame(self, frame: Frame) -> Arrival:
        """Count a frame that came."""
        known = self._producers.get(frame.producer)
        if known is None:
            known = self._producers[frame.producer] = Numbers(), {}
            self.producers_seen += 1
            if len(self._producers) > _MAX_PRODUCERS:
                self._producers.popitem(last=False)  # silent for longest; its counts are in the sums
        else:
            self._producers.move_to_end(frame.producer)
        numbers, said = known
        arrival = numbers.arrive(frame.first, len(frame.rows))
        self.lost += arrival.lost - arrival.found
        self.received += len(frame.rows) - arrival.repeated
        self.repeated += arrival.repeated
        for reason, count in frame.dropped.items():
            more = count - said.get(reason, 0)
            if more > 0:  # frames may overtake each other
                self.producer_dropped[reason] += more
                said[reason] = count
        return arrival

    def drop(self, store: str, reason: str, count: int) -> None:
        """Count records that a store did not get."""
        self.dropped.setdefault(store, Counter())[reason] += count

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for msgpack."""
        return {
            "received": self.received,
            "lost": self.lost,
            "repeated": self.repeated,
            "rejected": dict(self.rejected),
            "bad": dict(self.bad),
            "dropped": {store: dict(reasons) for store, reasons in self.dropped.items()},
            "producers_seen": self.producers_seen,
            "producer_dropped": dict(self.producer_dropped),
            "producers": [
                (name, numbers.next, numbers.gaps, said) for name, (numbers, said) in self._producers.items()
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` gave."""
        for name in ("received", "lost", "repeated", "producers_seen"):
            setattr(self, name, state[name])
        self.rejected, self.bad = Counter(state["rejected"]), Counter(state["bad"])
        self.dropped = {store: Counter(reasons) for store, reasons in state["dropped"].items()}
        self.producer_dropped = Counter(state["producer_dropped"])
        self._producers = OrderedDict()
        for name, following, gaps, said in state["producers"]:
            numbers = Numbers()
            numbers.next, numbers.gaps = following, [(start, stop) for start, stop in gaps]
            self._producers[name] = numbers, dict(said)
