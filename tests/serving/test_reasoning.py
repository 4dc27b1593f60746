"""Which tokens are reasoning, from the ids that open and close a block."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook.record.row import PHASES
from attnhook.serving.reasoning import Markers, PhaseFollower, Phases, find_markers, mark_phases

START, END = 8, 9
ONE = Markers((START,), (END,))
SEVERAL = Markers((1, 2), (1, 3, 2))  # with a token in common


def phases(prompt: list[int], tokens: list[int], markers: Markers = ONE) -> str:
    """One letter for each token: t(hink) or o(utput)."""
    return "".join(phase[0] for phase in PhaseFollower(markers, prompt).follow(tokens))


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ([], [], ""),
        ([], [5, 6], "oo"),
        ([5], [START, 5, 6, END, 7, 7], "ttttoo"),  # both markers are reasoning
        ([5, START], [5, END, 7], "tto"),  # the template opens the block
        ([START, 5, END, 6], [7, 7], "oo"),  # an earlier turn's block is closed
        ([START, 5, END, 6, START, 4], [7, END, 7], "tto"),
        ([START, END], [7], "o"),  # thinking is off
        ([END, START], [7], "t"),
        ([], [END, 7], "oo"),  # it closes nothing
        ([], [START, START, END, 7], "ttto"),
        ([], [START, 5, END, 7, START, 6, END, 7], "tttottto"),
    ],
)
def test_one_token_at_each_end(prompt: list[int], tokens: list[int], expected: str) -> None:
    assert phases(prompt, tokens) == expected


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ([], [1, 2, 5, 1, 3, 2, 7], "ottttto"),  # the block is known with the last token of its start
        ([1], [2, 5], "tt"),  # a start over the end of the prompt
        ([1, 2, 5, 1, 3], [2, 7], "to"),
        ([1, 2, 5, 1, 3, 2], [7], "o"),
        ([1, 2, 1, 3], [3, 2], "tt"),
        ([2, 2], [3, 2, 1, 1, 2], "oooot"),
    ],
)
def test_several_tokens_at_each_end(prompt: list[int], tokens: list[int], expected: str) -> None:
    assert phases(prompt, tokens, SEVERAL) == expected


def test_one_marker_that_ends_in_the_other() -> None:
    closing = Markers((2,), (1, 2))
    assert phases([], [2, 5, 1, 2, 7], closing) == "tttto"
    assert phases([2, 1, 2], [7], closing) == "o"
    assert phases([], [1, 2, 5, 2, 7], Markers((1, 2), (2,))) == "ottto"


@given(
    st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.data(),
    st.sampled_from([Markers((1,), (2,)), SEVERAL, Markers((2,), (1, 2))]),
)  # fmt: skip
def test_pieces_of_a_stream_are_the_whole(prompt: list[int], tokens: list[int], data: Any, m: Markers) -> None:
    whole = PhaseFollower(m, prompt).follow(tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    follower = PhaseFollower(m, prompt)
    parts = [follower.follow(tokens[a:b]) for a, b in itertools.pairwise([0, *cuts, len(tokens)])]
    assert list(itertools.chain(*parts)) == whole
    assert set(whole) <= set(PHASES)
    # a prompt counts as if its tokens had been generated
    assert PhaseFollower(m, []).follow([*prompt, *tokens])[len(prompt) :] == whole


def test_a_block_needs_both_ends() -> None:
    with pytest.raises(ValueError, match="both ends"):
        Markers((1,), ())


def test_phases_of_the_tokens_that_were_accepted_last() -> None:
    phases = Phases(Markers((1,), (2,)), [9, 1])
    sequence = [9, 1, 5, 2, 6]
    assert phases.of_last(sequence[:3], 1, start=2) == ["think"]
    assert phases.of_last(sequence, 1, start=2) == ["output"]  # the end of the block passed by without a call
    assert phases.of_last(sequence, 0, start=2) == []


def test_a_parser_that_tells_no_markers_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Markers:
        raise KeyError("no such token")

    assert find_markers(fails, "some_parser") is None
    assert find_markers(lambda: None, "silent_parser") is None
    assert ["some_parser" in r.getMessage() or "silent_parser" in r.getMessage() for r in caplog.records] == [True] * 2
    caplog.clear()
    assert find_markers(lambda: None, None) is None and not caplog.records  # no parser, nothing to tell
    assert find_markers(lambda: Markers((1,), (2,)), "good") == Markers((1,), (2,))


def test_rows_of_refused_drafts_and_those_not_wanted_stay_as_they_are() -> None:
    rows = [b"AH\x01\x00\x00first", b"", b"AH\x01\x00\x00third", b"AH\x01\x00\x00refused"]
    marked = mark_phases(rows, ["think", "think", "output"])
    assert marked == [b"AH\x01\x00" + bytes([PHASES.index("think")]) + b"first", b"", *rows[2:]]
