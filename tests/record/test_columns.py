"""Columns give back every record exactly, and so do the rows that a store keeps in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from attnhook.errors import RecordError
from attnhook.record import columns
from tests.record.samples import assert_same
from tests.sinks.samples import assert_rows, batches, lean, record


@pytest.mark.slow
@settings(deadline=None)
@given(batches())
def test_columns_lose_nothing(records):
    batch = columns.from_records(records, time=5).to_arrow()
    batch.validate(full=True)
    for found, whole in zip(columns.to_records(batch), records, strict=True):
        assert_same(found, whole)
    again = columns.Columns.from_arrow(batch)
    assert again.to_arrow().equals(batch)
    assert_rows(batch.to_pylist(), records)


def test_a_lean_record_needs_no_binary_row_and_any_other_has_one():
    lines = {
        "lean": lean(),
        "two layers": replace(
            record(),
            mode="fingerprint",
            token_positions=np.zeros((2, 0), np.int32),
            attention_scores=np.zeros((2, 0), np.float32),
            span_names=(),
            span_mass=np.zeros((2, 0), np.float32),
        ),
        "spans": lean(span_names=("a",), span_mass=np.ones((1, 1), np.float32)),
        "raw": lean(mode="raw"),
        "whole": record(),
    }
    kept = columns.from_records(list(lines.values())).record
    assert {name: row is None for name, row in zip(lines, kept, strict=True)} == {
        name: name == "lean" for name in lines
    }


def test_a_record_whose_arrays_disagree_is_named():
    with pytest.raises(RecordError, match=r"'r', 0, 4.*2 layers and fingerprints of shape \(1, 20\)"):
        columns.from_records([record(3), record(4, fingerprints=lean(4).fingerprints)])
