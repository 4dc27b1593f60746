"""Looking token ids up by position."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnhook.record import tokens
from tests.record.samples import a_record

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=8)


@given(IDS, IDS, st.integers(0, 20))
def test_sequences_follow_one_another(prompt, output, position):
    whole = [*prompt, *output]
    expected = whole[position] if position < len(whole) else -1
    assert tokens.sequence(prompt, output)(position) == tokens.sequence(whole)(position) == expected


def test_what_has_no_id():
    at = tokens.sequence([5, 6, 99], [7], hidden=1, vocabulary=50)
    assert [at(position) for position in range(5)] == [-1, 6, -1, 7, -1]


def test_a_record_gets_those_of_its_positions_and_none_of_a_masked_prefix():
    record = a_record(query_position=12, token_positions=np.array([[11, 3, -1], [12, 4, 11]], np.int32))
    ids = list(range(100, 120))
    (whole,) = tokens.fill([record], tokens.sequence(ids))
    assert (whole.query_token, whole.token_ids.tolist()) == (112, [[111, 103, -1], [112, 104, 111]])
    assert whole.token_ids.dtype == np.int32
    (masked,) = tokens.fill([record], tokens.sequence(ids), mask_prefix=4)
    assert (masked.query_token, masked.token_ids.tolist()) == (112, [[111, -1, -1], [112, 104, 111]])
    (hidden,) = tokens.fill([record], tokens.sequence(ids), mask_prefix=13)
    assert (hidden.query_token, set(hidden.token_ids.ravel().tolist())) == (-1, {-1})
    assert record.token_ids is None
