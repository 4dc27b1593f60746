"""Columns give back every record exactly, and so do the rows that a store keeps in them."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings

from attnhook.errors import RecordError
from attnhook.record import arrow, columns
from tests.record.samples import assert_same
from tests.sinks.samples import assert_rows, batches, lean, record, with_ids


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


def test_names_are_those_of_the_fields_and_of_the_arrow_schema():
    assert tuple(field.name for field in fields(columns.Columns)) == arrow.NAMES == tuple(arrow.arrow_schema().names)


@pytest.mark.parametrize("name", ["LIGHT", "NAMES", "SCHEMA_VERSION", "check_version", "fixed_list", "layer_sets"])
def test_what_the_old_module_had_is_found_for_one_release(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert getattr(import_module("attnhook.sinks.columns"), name) is getattr(arrow, name)


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


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "was not written by attnhook"),
        ({b"pandas": b"{}"}, "was not written by attnhook"),
        ({arrow.VERSION_KEY: b"3"}, "schema version 3; this attnhook reads 2: upgrade"),
        ({arrow.VERSION_KEY: b"0"}, "schema version 0"),
        ({arrow.VERSION_KEY: b"\xffx"}, "schema version"),
    ],
)
def test_columns_of_another_version_are_refused(metadata, message):
    with pytest.raises(RecordError, match=f"a file.*{message}"):
        arrow.check_version(metadata, "a file")
    arrow.check_version(arrow.arrow_schema().metadata, "a file")


def test_the_layers_of_rows_are_counted_and_damage_is_named():
    rows = [record(0), with_ids(1), lean(2), record(3, layers=(0, 29))]
    kept = columns.from_records(rows)
    found = arrow.layer_sets(kept.to_arrow())
    assert found == {(3, 29): 2, (29,): 1, (0, 29): 1}
    kept.record[1] = kept.record[1][:-1]
    with pytest.raises(RecordError, match="damaged record"):
        arrow.layer_sets(kept.to_arrow())
    kept.record[1], kept.layer[2] = None, None
    assert arrow.layer_sets(kept.to_arrow()) == {(3, 29): 1, (): 2, (0, 29): 1}
