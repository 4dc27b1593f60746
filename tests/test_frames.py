"""Frames: what is sent comes back, and nothing else passes."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook import frames

REASONS = {"pickle", "not_msgpack", "not_a_frame", "frame_version", "damaged_frame"}


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**53 - 1),
    st.dictionaries(st.text(max_size=40), st.integers(0, 2**53 - 1), max_size=20),
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
    good = frames.encode(b"p" * 16, 5, {"busy": 1}, [b"row", b"other"])
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
