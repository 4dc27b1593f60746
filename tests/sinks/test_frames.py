"""Frames: what is sent comes back, and nothing else passes."""

from __future__ import annotations

import pickle
import time
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook.sinks import frames

REASONS = {"pickle", "not_msgpack", "not_a_frame", "frame_version", "damaged_frame"}


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, frames.MAX_NUMBER),
    st.dictionaries(st.sampled_from(sorted(frames.DROP_REASONS)), st.integers(0, frames.MAX_NUMBER)),
    st.lists(st.binary(max_size=50), min_size=1, max_size=20),
)
def test_a_frame_comes_back(producer, first, dropped, rows):
    assert frames.decode(frames.encode(producer, first, dropped, rows)) == (producer, first, dropped, rows, False)
    assert frames.decode(frames.encode_end(producer, first, dropped)) == (producer, first, dropped, [], True)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_with_a_reason(data):
    with pytest.raises(frames.FrameError) as error:
        frames.decode(data)
    assert error.value.reason in REASONS


@given(st.data())
def test_a_damaged_frame_is_refused_or_differs(data):
    # no reasons: of one that is not known the name does not matter
    good = frames.encode(b"p" * 16, 5, {}, [b"row", b"other"])
    at = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != good[at]))
    damaged = good[:at] + bytes([byte]) + good[at + 1 :]
    try:
        found = frames.decode(damaged)
    except frames.FrameError as error:
        assert error.reason in REASONS
    else:
        assert found != frames.decode(good)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_called_one(protocol):
    with pytest.raises(frames.FrameError, match="nothing is ever unpickled") as error:
        frames.decode(pickle.dumps({"a": 1}, protocol=protocol))
    assert error.value.reason == "pickle"


def test_nesting_beyond_the_limit_is_refused():
    with pytest.raises(frames.FrameError) as error:
        frames.decode(b"\x91" * 100_000 + b"\x00")
    assert error.value.reason == "not_msgpack"


def packed(*fields: object) -> bytes:
    """A frame in which some fields are not as they should be."""
    whole = ["attnhook", 1, "records", b"p" * 16, 0, {}, [b"row"]]
    return msgspec.msgpack.encode([*whole[: max(7 - len(fields), 0)], *fields])


@given(st.dictionaries(st.text(max_size=40), st.integers(0, 2**30), max_size=20))
def test_reasons_that_are_not_known_are_counted_together(dropped):
    found = frames.decode(frames.encode(b"p" * 16, 0, dropped, [b"row"])).dropped
    known = {reason: count for reason, count in dropped.items() if reason in frames.DROP_REASONS}
    rest = sum(dropped.values()) - sum(known.values())
    assert found == (known if len(known) == len(dropped) else {**known, "other": rest})


@pytest.mark.parametrize(
    "data, reason",
    [
        (packed(frames.MAX_NUMBER + 1, {}, [b"row"]), "damaged_frame"),
        (packed(2**64 - 1, {}, [b"row"]), "damaged_frame"),
        (packed(-1, {}, [b"row"]), "damaged_frame"),
        (packed(True, {}, [b"row"]), "damaged_frame"),
        (packed(1.0, {}, [b"row"]), "damaged_frame"),
        (packed({"nan": frames.MAX_NUMBER + 1}, [b"row"]), "damaged_frame"),
        (packed({"r" * 41: 1}, [b"row"]), "damaged_frame"),
        (packed({str(i): 1 for i in range(21)}, [b"row"]), "damaged_frame"),
        (packed([b"row"] * (frames.MAX_ROWS + 1)), "damaged_frame"),
        (packed({0: b"row"}), "damaged_frame"),
        (packed([]), "damaged_frame"),
        (packed("end", b"p" * 16, 0, {}, [b"row"]), "damaged_frame"),
        (packed("more", b"p" * 16, 0, {}, [b"row"]), "damaged_frame"),
        (packed("attnhook", 1, "records", b"p" * 16, 0, {}, [b"row"], 8), "damaged_frame"),
        (packed({}, []).replace(b"\x80\x90", b"\x81\xa3\xed\xa0\x80\x01\x91\xc4\x00"), "damaged_frame"),
        (packed(2, "records", b"p" * 16, 0, {}, [b"row"]), "frame_version"),
        (packed("other", 1, "records", b"p" * 16, 0, {}, [b"row"]), "not_a_frame"),
        (packed()[:-1], "not_msgpack"),
        (packed() + b"\0", "not_msgpack"),
    ],
)
def test_what_a_peer_may_not_say_is_refused_by_name(data, reason):
    with pytest.raises(frames.FrameError) as error:
        frames.decode(data)
    assert error.value.reason == reason, error.value
    assert len(str(error.value)) < 400


def test_as_many_rows_and_as_large_numbers_as_are_allowed():
    rows = [b""] * frames.MAX_ROWS
    found = frames.decode(frames.encode(b"p" * 16, frames.MAX_NUMBER, {"nan": frames.MAX_NUMBER}, rows))
    assert (found.first, found.dropped, found.rows) == (frames.MAX_NUMBER, {"nan": frames.MAX_NUMBER}, rows)
    # a journal of another release may hold more
    longer = packed([b""] * (frames.MAX_ROWS + 1))
    assert len(frames.decode(longer, kept=True).rows) == frames.MAX_ROWS + 1


_HEAD = b"\x97\xa8attnhook\x01\xa7records\xc4\x10" + b"p" * 16 + b"\x00"


@pytest.mark.parametrize(
    "data",
    [
        _HEAD + b"\xdf" + (8_000_000).to_bytes(4, "big") + b"\x80\xc0" * 8_000_000,  # a map of maps
        _HEAD + b"\x80\xdd" + (16_000_000).to_bytes(4, "big") + b"\x80" * 16_000_000,  # empty maps as rows
        _HEAD + b"\x80\xdd" + (8_000_000).to_bytes(4, "big") + b"\xc4\0" * 8_000_000,  # empty rows
        _HEAD + b"\x80\xdd\xff\xff\xff\xff",  # four thousand million rows, it says
        b"\xdd" + (16_000_000).to_bytes(4, "big") + b"\x80" * 16_000_000,  # no frame at all: empty maps
        b"\xdf" + (8_000_000).to_bytes(4, "big") + b"\xc0\x80" * 8_000_000,
        b"\xdb" + (16_000_000).to_bytes(4, "big") + b"\xff" * 16_000_000,  # text that is none
        b"\x91" * 16_000_000,
    ],
    ids=["map", "maps", "rows", "claim", "array", "maps-of-maps", "text", "deep"],
)
def test_sixteen_megabytes_of_anything_cost_a_moment_and_next_to_no_memory(data):
    tracemalloc.start()
    try:
        began = time.process_time()
        with pytest.raises(frames.FrameError):
            frames.decode(data)
        spent = time.process_time() - began
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "msgpack made 1.3 GB of it"
    assert spent < 1.0
