"""Record numbers that skip, repeat and overtake each other are counted exactly, also over a restart."""

from __future__ import annotations

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from attnhook.collector import ledger as ledger_module
from attnhook.collector.ledger import Ledger, Numbers
from attnhook.frames import Frame


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=30))
def test_counts_are_those_of_a_set_of_numbers(arrivals):
    numbers, seen = Numbers(), set()
    lost = repeated = 0
    for first, count in arrivals:
        new = set(range(first, first + count))
        arrival = numbers.arrive(first, count)
        lost += arrival.lost - arrival.found
        repeated += arrival.repeated
        assert arrival.repeated == len(new & seen)
        seen |= new
        missing = set(range(max(seen) + 1)) - seen
        assert lost == numbers.missing == len(missing)
        assert numbers.next == max(seen) + 1
        assert {n for start, stop in numbers.gaps for n in range(start, stop)} == missing


def test_old_gaps_stay_counted_and_take_no_more_room():
    ledger = Ledger()
    for i in range(3000):
        ledger.frame(Frame(bytes(16), 2 * i, {}, [b""], False))  # every second record is lost
    assert (ledger.received, ledger.lost) == (3000, 2999)
    ((_, _, gaps, _),) = ledger.state()["producers"]
    assert len(gaps) == 1000


def test_an_end_frame_shows_what_was_lost_at_the_end():
    ledger = Ledger()
    ledger.frame(Frame(bytes(16), 0, {}, [b"", b""], False))
    ledger.frame(Frame(bytes(16), 7, {"collector_busy": 4}, [], True))
    assert (ledger.received, ledger.lost) == (2, 5)
    assert ledger.producer_dropped == {"collector_busy": 4}


def test_producers_are_forgotten_and_their_counts_are_not(monkeypatch):
    monkeypatch.setattr(ledger_module, "_MAX_PRODUCERS", 10)
    ledger = Ledger()
    for i in range(100):
        ledger.frame(Frame(i.to_bytes(16, "big"), 1, {"busy": 2}, [b""], False))
    assert (ledger.received, ledger.lost, ledger.producers_seen) == (100, 100, 100)
    assert ledger.producer_dropped == {"busy": 200}
    assert len(ledger.state()["producers"]) == 10


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=20
    ),
    st.integers(0, 20),
)
def test_a_ledger_goes_on_where_it_was(arrivals, cut):
    whole, part = Ledger(), Ledger()
    for i, (producer, first, count, dropped) in enumerate(arrivals):
        if i == cut:
            state = msgpack.unpackb(msgpack.packb(part.state()))
            part = Ledger()
            part.restore(state)
        frame = Frame(bytes([producer]) * 16, first, {"busy": dropped}, [b""] * count, False)
        assert whole.frame(frame) == part.frame(frame)
        part.drop("sqlite:x", "queue_full", 1)
        whole.drop("sqlite:x", "queue_full", 1)
    assert msgpack.packb(whole.state()) == msgpack.packb(part.state())
