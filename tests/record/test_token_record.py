"""Reading a record in Python."""

from __future__ import annotations

import numpy as np
import pytest

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import fill_zones
from tests.record.samples import a_record


def test_zones_of_many_records_are_those_of_each():
    rng = np.random.default_rng(0)
    many = []
    for _ in range(50):
        numbers = fp.assemble(rng.dirichlet(np.full(16, 0.1), 2), rng.random(2))
        many.append([a_record(fingerprints=numbers), a_record(fingerprints=numbers)])
    fill_zones([])
    fill_zones([one for one, _ in many])
    assert [one.zone for one, _ in many] == [other.zone for _, other in many]
    assert len({one.zone for one, _ in many}) > 1
    with pytest.raises(RecordError):
        fill_zones([a_record(), a_record(fingerprints=np.full((2, 20), np.nan, np.float32))])


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
