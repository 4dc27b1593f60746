"""The columns in Arrow: names, versions, and what is read off a batch at once."""

from __future__ import annotations

import warnings
from dataclasses import fields
from importlib import import_module

import pytest

from attnhook.errors import RecordError
from attnhook.record import arrow, columns
from tests.sinks.samples import lean, record, with_ids


def test_names_are_those_of_the_fields_and_of_the_arrow_schema():
    assert tuple(field.name for field in fields(columns.Columns)) == arrow.NAMES == tuple(arrow.arrow_schema().names)


@pytest.mark.parametrize("name", ["LIGHT", "NAMES", "SCHEMA_VERSION", "check_version", "fixed_list", "layer_sets"])
def test_what_the_old_module_had_is_found_for_one_release(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert getattr(import_module("attnhook.sinks.columns"), name) is getattr(arrow, name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "was not written by attnhook"),
        ({b"pandas": b"{}"}, "was not written by attnhook"),
        ({arrow.VERSION_KEY: b"4"}, "schema version 4; this attnhook reads 3: upgrade"),
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
