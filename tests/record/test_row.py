"""What is read off a row's fields."""

from __future__ import annotations

import numpy as np
import pytest

from attnhook.record.row import is_token
from tests.record.samples import a_record


def test_top():
    record = a_record()
    assert record.top() == [(0, pytest.approx(0.61)), (35, pytest.approx(0.1)), (12, pytest.approx(0.04))]
    assert record.top(3) == [(35, pytest.approx(0.9))]
    with pytest.raises(KeyError, match=r"layer 5 was not captured; captured: \[3, 29\]"):
        record.top(5)


def test_key_mass_and_spans():
    record = a_record(choice=2)
    assert record.key == ("cmpl-1", 2, 36)
    np.testing.assert_allclose(record.topk_mass, [0.9, 0.75], rtol=1e-6)
    assert record.spans == {"doc1": pytest.approx(0.2), "prompt": pytest.approx(0.375)}
    assert a_record(span_names=()).spans == {}
    assert record.fingerprint.dtype == np.float32
    assert record.fingerprint.shape == (20,)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, True), (-1, True), (2**31 - 1, True), (-2, False), (2**31, False), (True, False), (1.0, False), ("1", False)],
)
def test_a_token_is_a_number_that_a_row_holds(value, expected):
    assert is_token(value) == expected
