"""Record numbers that skip, repeat and overtake each other are counted exactly, also over a restart."""

from __future__ import annotations

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook.collector import ledger as ledger_module
from attnhook.collector.ledger import MAX_COUNT, Ledger, Numbers
from attnhook.sinks.frames import MAX_NUMBER, OTHER, Frame


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
        ledger.frame(Frame(i.to_bytes(16, "big"), 1, {"collector_busy": 2}, [b""], False))
    assert (ledger.received, ledger.lost, ledger.producers_seen) == (100, 100, 100)
    assert ledger.producer_dropped == {"collector_busy": 200}
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
        frame = Frame(bytes([producer]) * 16, first, {"collector_busy": dropped}, [b""] * count, False)
        assert whole.frame(frame) == part.frame(frame)
        part.drop("sqlite:x", "queue_full", 1)
        whole.drop("sqlite:x", "queue_full", 1)
    assert msgpack.packb(whole.state()) == msgpack.packb(part.state())


def test_sums_stop_where_every_format_keeps_them_exactly():
    """2,100 tiny frames once took them beyond 2^64, which no journal can hold."""
    ledger = Ledger()
    for i in range(10_000):
        ledger.frame(Frame(i.to_bytes(16, "big"), MAX_NUMBER, {"nan": MAX_NUMBER, OTHER: MAX_NUMBER}, [b""], False))
    assert ledger.received == 10_000
    assert ledger.lost == MAX_COUNT and ledger.producer_dropped == {"nan": MAX_COUNT, OTHER: MAX_COUNT}
    for i in range(3):
        ledger.damaged({"damaged_record": MAX_COUNT - 1})
        ledger.drop("sqlite:x", "refused", MAX_COUNT - 1)
        ledger.frame(Frame(bytes([i + 1]) * 16, 2**64 - 1, {}, [b""], False))  # as a journal may hold it
    assert ledger.bad["damaged_record"] == ledger.dropped["sqlite:x"]["refused"] == ledger.lost == MAX_COUNT
    state = msgpack.unpackb(msgpack.packb(ledger.counts()))
    assert max(state["lost"], state["received"]) == MAX_COUNT
    assert msgspec.json.decode(msgspec.json.encode(ledger.counts())) == ledger.counts()


def test_gaps_of_all_producers_together_are_bounded_and_stay_counted(monkeypatch):
    monkeypatch.setattr(ledger_module, "_MAX_ALL_GAPS", 100)
    monkeypatch.setattr(ledger_module, "_MAX_PRODUCERS", 20)
    ledger = Ledger()
    for i in range(50):
        for j in range(1, 8):
            ledger.frame(Frame(bytes([i]) * 16, 2 * j, {}, [b""], False))
        held = [gaps for _, _, gaps, _ in ledger.state()["producers"]]
        assert sum(map(len, held)) == ledger._gaps <= 100 and len(held) <= 20
        assert len(held[-1]) == 7, "those of who was heard last are kept"
    assert (ledger.received, ledger.lost) == (350, 50 * 8)
    ledger.frame(Frame(bytes([49]) * 16, 0, {}, [b"", b""], False))  # the first gap comes after all
    assert ledger.lost == 50 * 8 - 2


@pytest.mark.parametrize(
    "change",
    [
        {"lost": "many"},
        {"lost": True},
        {"producers": [(b"p" * 16, 1)]},
        {"producers": 7},
        {"bad": [1]},
        {"dropped": {"sqlite:x": 3}},
        {"rejected": None},
    ],
)
def test_a_state_that_is_none_changes_nothing(change):
    ledger = Ledger()
    ledger.frame(Frame(bytes(16), 3, {"nan": 1}, [b""], False))
    before = ledger.state()
    with pytest.raises((TypeError, ValueError, AttributeError)):
        ledger.restore({**before, **change})
    with pytest.raises(KeyError):
        ledger.restore({})
    assert ledger.state() == before


def test_reasons_of_an_old_state_are_those_of_the_fixed_list():
    ledger = Ledger()
    state = {**ledger.state(), "producer_dropped": {f"reason {i}": 1 for i in range(5000)} | {"nan": 3}}
    ledger.restore({**state, "producers": [(bytes(16), 1, [], {"x": 2, "y": 3, "nan": 1})]})
    assert ledger.producer_dropped == {"nan": 3, OTHER: 5000}
    ((_, _, _, said),) = ledger.state()["producers"]
    assert said == {"nan": 1, OTHER: 5}
