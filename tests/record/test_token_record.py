"""Reading a record in Python."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import TokenRecord, fill_zones, join_layers, without_tokens
from tests.record.samples import ARRAYS, FINGERPRINTS, a_record, assert_same


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


@pytest.mark.parametrize("ids", [False, True])
def test_layers_that_were_captured_apart_make_the_whole_record(ids):
    numbers = np.arange(4 * 3).reshape(4, 3)
    whole = a_record(
        layers=(0, 3, 7, 29),
        token_positions=numbers.astype(np.int32),
        attention_scores=(numbers / 16).astype(np.float32),
        fingerprints=np.concatenate([FINGERPRINTS, FINGERPRINTS[::-1]]),
        span_mass=(numbers[:, :2] / 16).astype(np.float32),
        query_token=5 if ids else -1,
        token_ids=(numbers + 100).astype(np.int32) if ids else None,
    )

    def part(*rows: int) -> TokenRecord:
        own = {name: getattr(whole, name)[list(rows)] for name in ARRAYS if getattr(whole, name) is not None}
        return dataclasses.replace(whole, layers=tuple(whole.layers[row] for row in rows), **own)

    assert_same(join_layers([part(1, 3), part(0, 2)]), whole)
    assert_same(join_layers([whole]), whole)
    if ids:  # where a part has none, there are none
        assert_same(join_layers([part(1, 3), without_tokens(part(0, 2))]), without_tokens(whole))
        assert_same(join_layers([without_tokens(part(1, 3)), part(0, 2)]), without_tokens(whole))
