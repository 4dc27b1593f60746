"""The ledger: what each producer has sent and what of it arrived, so that nothing is lost without being counted.

Producers may claim anything. So sums stop at `MAX_COUNT`, and how much is remembered of producers is bounded: one by
one, and all of them together.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from attnhook.sinks.frames import Frame, known_reasons

#: Where every sum stops: the largest number that JSON, floats and the journal all keep exactly.
MAX_COUNT: Final = 2**53
_MAX_PRODUCERS = 10_000
_MAX_GAPS = 1000  # of one producer
_MAX_ALL_GAPS = 20_000  # of all producers


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
        self._gapped: OrderedDict[bytes, None] = OrderedDict()  # producers with gaps, the latest last
        self._gaps = 0

    def frame(self, frame: Frame) -> Arrival:
        """Count a frame that came."""
        first, dropped = _count(frame.first), _counts(frame.dropped)  # a journal's entry may hold anything
        known = self._producers.get(frame.producer)
        if known is None:
            known = self._producers[frame.producer] = Numbers(), {}
            self.producers_seen = _sum(self.producers_seen, 1)
            if len(self._producers) > _MAX_PRODUCERS:  # silent for longest; its counts are in the sums
                name, (numbers, _) = self._producers.popitem(last=False)
                self._note_gaps(name, len(numbers.gaps), 0)
        else:
            self._producers.move_to_end(frame.producer)
        numbers, said = known
        gaps = len(numbers.gaps)
        arrival = numbers.arrive(first, len(frame.rows))
        self._note_gaps(frame.producer, gaps, len(numbers.gaps))
        while self._gaps > _MAX_ALL_GAPS:  # they stay counted as lost
            name = next(iter(self._gapped))
            silent, _ = self._producers[name]
            self._note_gaps(name, len(silent.gaps), 0)
            silent.gaps = []
        self.lost = _sum(self.lost, arrival.lost - arrival.found)
        self.received = _sum(self.received, len(frame.rows) - arrival.repeated)
        self.repeated = _sum(self.repeated, arrival.repeated)
        for reason, count in dropped.items():
            more = count - said.get(reason, 0)
            if more > 0:  # frames may overtake each other
                self.producer_dropped[reason] = _sum(self.producer_dropped[reason], more)
                said[reason] = count
        return arrival

    def _note_gaps(self, producer: bytes, before: int, after: int) -> None:
        self._gaps += after - before
        self._gapped.pop(producer, None)
        if after:
            self._gapped[producer] = None

    def rejects(self, reason: str) -> None:
        """Count a message that is no frame."""
        self.rejected[reason] = _sum(self.rejected[reason], 1)

    def damaged(self, bad: Mapping[str, int]) -> None:
        """Count records that are damaged, by reason."""
        for reason, count in bad.items():
            self.bad[reason] = _sum(self.bad[reason], count)

    def drop(self, store: str, reason: str, count: int) -> None:
        """Count records that a store did not get."""
        reasons = self.dropped.setdefault(store, Counter())
        reasons[reason] = _sum(reasons[reason], count)

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for msgpack."""
        return {
            **self.counts(),
            "producers": [
                (name, numbers.next, numbers.gaps, said) for name, (numbers, said) in self._producers.items()
            ],
        }

    @property
    def known(self) -> int:
        """Producers that are remembered one by one."""
        return len(self._producers)

    def counts(self) -> dict[str, Any]:
        """The sums alone."""
        return {
            "received": self.received,
            "lost": self.lost,
            "repeated": self.repeated,
            "rejected": dict(self.rejected),
            "bad": dict(self.bad),
            "dropped": {store: dict(reasons) for store, reasons in self.dropped.items()},
            "producers_seen": self.producers_seen,
            "producer_dropped": dict(self.producer_dropped),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave. Raises ValueError, TypeError, KeyError or AttributeError, and changes nothing,
        where it is none."""
        fresh = Ledger()
        for name in ("received", "lost", "repeated", "producers_seen"):
            setattr(fresh, name, _count(state[name]))
        fresh.rejected, fresh.bad = _counts(state["rejected"]), _counts(state["bad"])
        fresh.producer_dropped = _counts(known_reasons(state["producer_dropped"]))
        fresh.dropped = {str(store): _counts(reasons) for store, reasons in state["dropped"].items()}
        for name, following, gaps, said in state["producers"]:
            numbers = Numbers()
            numbers.next = _count(following)
            numbers.gaps = [(_count(start), _count(stop)) for start, stop in gaps]
            fresh._producers[bytes(name)] = numbers, dict(_counts(known_reasons(said)))
            fresh._note_gaps(bytes(name), 0, len(numbers.gaps))
        self.__dict__.update(fresh.__dict__)


def _sum(one: int, other: int) -> int:
    return max(min(one + other, MAX_COUNT), 0)


def _count(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} is no count")
    return _sum(value, 0)


def _counts(counts: Mapping[str, Any]) -> Counter[str]:
    return Counter({str(reason): _count(count) for reason, count in counts.items()})
