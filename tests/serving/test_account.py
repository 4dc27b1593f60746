"""What a choice's reply brings is what its tokens were asked to bring, or it says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook import TokenRecord
from attnhook.capture.rows import wants_row
from attnhook.options import RequestOptions
from attnhook.record.key_mass import KeyMass
from attnhook.serving.account import ChoiceAccount
from attnhook.serving.replies import NOTHING_CAME, Attention

PROMPT = 7  # tokens


def row(step: int | None, position: int) -> TokenRecord:
    fingerprint = np.zeros((1, 20), np.float32)
    fingerprint[0, [0, 4]] = 1
    one = TokenRecord("r", position, (0,), np.array([[0]], np.int32), np.array([[1.0]], np.float32), fingerprint)
    return replace(one, decode_step=step)


def generated(*steps: int) -> list[TokenRecord]:
    return [row(step, PROMPT - 1 + step) for step in steps]


def prompt(*positions: int) -> list[TokenRecord]:
    return [row(None, position) for position in positions]


def test_rows_beyond_the_tokens_that_are_kept_go() -> None:
    """Three of five tokens that were accepted together are left before a stop string."""
    account = ChoiceAccount(RequestOptions())
    first = account.settle(Attention(generated(0)), 1, finished=False)
    last = account.settle(Attention(generated(1, 2, 3, 4)), 3, finished=True)
    assert [record.decode_step for record in first.generated + last.generated] == [0, 1, 2]
    assert first.error is None and last.error is None


def test_rows_that_come_before_their_tokens_wait() -> None:
    account = ChoiceAccount(RequestOptions())
    first = account.settle(Attention(generated(0, 1, 2)), 1, finished=False)
    second = account.settle(Attention(), 2, finished=False)
    last = account.settle(Attention(), 3, finished=True)
    assert [[record.decode_step for record in part.generated] for part in (first, second, last)] == [[0], [1], [2]]
    assert not (first.error or second.error or last.error)


CASES: list[tuple[str, RequestOptions, Attention, int, str]] = [
    ("missing", RequestOptions(), Attention(generated(0, 1, 3)), 4, "need rows of the decode steps [0, 1, 2, 3]"),
    ("twice", RequestOptions(), Attention(generated(0, 1, 1)), 2, "[0, 1, 1] came"),
    ("out of order", RequestOptions(), Attention(generated(1, 0)), 2, "[1, 0] came"),
    ("not wanted", RequestOptions(stride=2), Attention(generated(0, 1)), 2, "[0, 1] came"),
    ("elsewhere", RequestOptions(), Attention([*generated(0), row(1, 90)]), 2, "position 90"),
    ("no rows", RequestOptions(), Attention(), 2, NOTHING_CAME),
    (
        "prompt missing",
        RequestOptions(prompt=True),
        Attention(generated(0), prompt(0, 1, 3, 4, 5)),
        1,
        "6 rows come before the prompt's last",
    ),
    (
        "chosen row missing",
        RequestOptions(rows=((1, 3), (5, 7))),
        Attention(generated(0), prompt(1, 2)),
        1,
        "attention_rows: 3 chosen rows come before the prompt's last, and [1, 2] are here",
    ),
    (
        "chosen row missing, none generated",
        RequestOptions(rows=((1, 3),), max_tokens=0),
        Attention(prompt=prompt(1)),
        1,
        "attention_rows: 2 chosen rows come before the prompt's last, and [1] are here",
    ),
    (
        "chosen last row missing",
        RequestOptions(rows=((6, 7),), max_tokens=0),
        Attention(),
        1,
        NOTHING_CAME,
    ),
    ("no prompt", RequestOptions(prompt=True), Attention(generated(0)), 1, "and [] are here"),
]


@pytest.mark.parametrize(("name", "options", "came", "tokens", "part"), CASES, ids=[case[0] for case in CASES])
def test_what_does_not_match_is_told(name: str, options: Any, came: Attention, tokens: int, part: str) -> None:
    settled = ChoiceAccount(options, PROMPT).settle(came, tokens, finished=True)
    assert settled.error is not None and part in settled.error
    assert settled.generated == came.generated


def test_with_no_rows_of_the_answer_those_of_the_prompt_are_all() -> None:
    options = RequestOptions(rows=((1, 3),), max_tokens=0)
    account = ChoiceAccount(options, PROMPT)
    assert account.settle(Attention(prompt=prompt(1, 2)), 1, finished=False).error is None
    assert account.settle(Attention(), 5, finished=True).error is None


@pytest.mark.parametrize(
    ("mass", "part"),
    [(None, "none came with the last record"), (3, "3 rows were added up, and 4 came"), (4, None)],
)
def test_the_key_mass_is_of_as_many_rows_as_came(mass: int | None, part: str | None) -> None:
    account = ChoiceAccount(RequestOptions(rows=((1, 3),), key_mass="mean"), PROMPT)
    first = Attention(generated(0), prompt(1, 2))
    assert account.settle(first, 1, finished=False).error is None
    last = Attention(generated(1), key_mass=None if mass is None else KeyMass({0: np.ones(8)}, mass))
    error = account.settle(last, 2, finished=True).error
    assert (error is None) if part is None else (error is not None and part in error)


def test_what_is_told_already_is_told_once() -> None:
    account = ChoiceAccount(RequestOptions())
    assert account.settle(Attention(error="a key is NaN"), 1, finished=False).error == "a key is NaN"
    assert account.settle(Attention(generated(1)), 2, finished=True).error is None


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.data(),
)
def test_every_loss_is_found(stride: int, most: int, whole: bool, pieces: list[int], data: st.DataObject) -> None:
    """However the tokens come: with every row it is silent, without any one of them it is not."""
    options = RequestOptions(stride=stride, max_tokens=most, prompt=whole)
    total = sum(pieces)
    rows = [*generated(*(step for step in range(total) if wants_row(options, step)))]
    before = prompt(*range(PROMPT - 1)) if whole else []

    def errors(rows: list[TokenRecord], before: list[TokenRecord]) -> list[str]:
        account, at, found = ChoiceAccount(options), 0, []
        for piece in pieces:
            now = [record for record in rows if at <= (record.decode_step or 0) < at + piece]
            new = Attention(now, before if not at else [])
            at += piece
            settled = account.settle(new, at, finished=at == total)
            assert settled.generated == now
            found += [settled.error] if settled.error else []
        return found

    assert errors(rows, before) == []
    lost = data.draw(st.sampled_from(rows))
    assert len(errors([record for record in rows if record is not lost], before)) == 1
    moved = data.draw(st.sampled_from(rows))
    others = [record for record in rows if record is not moved]
    if others:
        changed = replace(moved, query_position=moved.query_position + 1)
        assert errors([changed if record is moved else record for record in rows], []) != [] or whole
    if whole:
        gone = data.draw(st.sampled_from(before))
        assert errors(rows, [record for record in before if record is not gone])
