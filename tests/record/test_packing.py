"""The binary row loses nothing and refuses damage."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnhook.errors import RecordError
from attnhook.record.packing import row_without_tokens, with_phase
from attnhook.record.row import PHASES
from attnhook.record.token_record import TokenRecord, without_tokens
from tests.record.samples import ARRAYS, NAMES, a_record, assert_same, packed, token_records


@pytest.mark.slow
@given(token_records())
def test_the_binary_row_loses_nothing(record):
    data = record.to_bytes()
    assert_same(TokenRecord.from_bytes(data), record)
    assert TokenRecord.from_bytes(data).to_bytes() == data
    assert_same(TokenRecord.from_bytes(memoryview(data)), record)  # what a ring buffer hands out


@given(token_records(), st.sampled_from(PHASES))
def test_the_phase_of_a_row_can_be_told_later(record, phase):
    again = TokenRecord.from_bytes(with_phase(record.to_bytes(), phase))
    assert_same(again, dataclasses.replace(record, think_phase=phase))


@settings(max_examples=20)
@given(token_records())
def test_a_row_cut_short_or_too_long_is_refused(record):
    data = record.to_bytes()
    for end in range(len(data)):
        with pytest.raises(RecordError):
            TokenRecord.from_bytes(data[:end])
    with pytest.raises(RecordError, match="header announces"):
        TokenRecord.from_bytes(data + b"\0")


@given(token_records(), st.data())
def test_a_damaged_row_is_refused_or_still_a_record(record, data):
    row = bytearray(record.to_bytes())
    at = data.draw(st.integers(0, len(row) - 1))
    row[at] ^= data.draw(st.integers(1, 255))
    try:
        again = TokenRecord.from_bytes(bytes(row))
    except RecordError as error:
        assert re.match(r"not an attnhook record|record of schema version|damaged record", str(error))
        return
    # one number or one character is another, and that alone: nothing is out of step, nothing of it was left out
    assert again.to_bytes() == bytes(row)
    if row[2] != record.to_bytes()[2] or row[26:30] != record.to_bytes()[26:30]:
        return  # the version, or what is told per head: in a small row a token id and a sink mass, say, are as long
    changed = [field.name for field in dataclasses.fields(TokenRecord) if not _equal(field.name, again, record)]
    assert len(changed) == 1
    assert again.decode_step is None or again.decode_step >= 0
    assert again.query_position >= 0
    for name in ARRAYS:
        mine, theirs = getattr(again, name), getattr(record, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


def _equal(name: str, one: TokenRecord, other: TokenRecord) -> bool:
    mine, theirs = getattr(one, name), getattr(other, name)
    if name in ARRAYS and (mine is None or theirs is None):
        return mine is theirs
    if name in ARRAYS:
        return mine.tobytes() == theirs.tobytes()  # NaN is equal to itself, and -0 is another number than 0
    return bool(mine == theirs)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data):
    with pytest.raises(RecordError, match="not an attnhook record"):
        TokenRecord.from_bytes(data)


def test_another_version_says_what_to_do():
    row = bytearray(a_record().to_bytes())
    row[2] = 9
    with pytest.raises(RecordError, match=r"schema version 9.*upgrade"):
        TokenRecord.from_bytes(bytes(row))


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "x" * 70000},
        {"request_id": "\ud800"},  # JSON can say this, UTF-8 cannot
        {"model": "m" * 70000},
        {"choice": 70000},
        {"query_position": 2**31},
        {"layers": (3, 40000)},
        {"layers": (3,)},
        {"span_names": ("doc1",)},
        {"span_names": ("doc1\x1fdoc2", "prompt")},
        {"attention_scores": np.zeros((2, 2), np.float32)},
        {
            "layers": (),
            "token_positions": np.zeros((0, 3), np.int32),
            "attention_scores": np.zeros((0, 3), np.float32),
            "fingerprints": np.zeros((0, 20), np.float32),
            "span_mass": np.zeros((0, 2), np.float32),
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_fit_a_row_is_refused_when_it_is_made(changes):
    with pytest.raises(RecordError, match="does not fit the binary row"):
        a_record(**changes).to_bytes()
    with pytest.raises(RecordError, match="does not fit the binary row"):
        packed([a_record(), a_record(**changes)])


@settings(max_examples=50)
@given(record=token_records(), others=st.lists(st.tuples(NAMES, st.integers(0, 2**31 - 1)), max_size=3))
def test_rows_that_are_packed_together_are_those_of_their_records(record, others):
    records = [record]
    for name, position in others:
        records.append(dataclasses.replace(record, request_id=name, query_position=position, decode_step=position))
    assert packed(records) == [without_tokens(r).to_bytes() for r in records]


@given(record=token_records())
def test_token_ids_come_last_in_a_row_and_go_again(record):
    bare, row = without_tokens(record), record.to_bytes()
    assert row_without_tokens(row) == bare.to_bytes()
    if record.token_ids is None:
        assert bare is record
        assert row[2] % 2 == 1
    else:
        assert row[2] % 2 == 0
        assert len(row) == len(bare.to_bytes()) + 4 + 4 * record.token_ids.size
    for cut in (row[:-1], row[:10], b"", row + b"x"):
        assert row_without_tokens(cut) == cut  # is no whole row


def test_what_a_row_of_the_first_version_was():
    """A row that attnhook wrote before there were token ids, to the byte."""
    row = bytes.fromhex(
        "4148010000000000" "01000100" "01000100" "0000" "05000000" "07000000" "72" "6d" "0300" "02000000" "0000403f"
    ) + np.full(20, 0.25, "<f4").tobytes()  # fmt: skip
    found = TokenRecord.from_bytes(row)
    assert (found.key, found.layers, found.decode_step) == (("r", 0, 7), (3,), 5)
    assert (found.token_positions.tolist(), found.attention_scores.tolist()) == ([[2]], [[0.75]])
    assert (found.token_ids, found.query_token) == (None, -1)
    assert found.to_bytes() == row


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": np.zeros((2, 2), np.int32)},
        {"token_ids": np.full((2, 3), -2, np.int32)},
        {"query_token": -2},
        {"query_token": 2**31},
        {"query_token": True},
    ],
)
def test_token_ids_that_do_not_fit_are_refused(changes):
    ids = {"token_ids": np.zeros((2, 3), np.int32)}
    with pytest.raises(RecordError, match="does not fit the binary row: query token"):
        a_record(**{**ids, **changes}).to_bytes()


def test_token_ids_are_in_the_json_of_a_record_that_has_them():
    record = a_record(token_ids=np.array([[9, -1, -1], [5, 9, 7]], np.int32), query_token=4)
    entry = record.to_dict()
    assert (entry["schema_version"], entry["query_token"]) == (2, 4)
    assert [layer["token_ids"] for layer in entry["layers"].values()] == [[9], [5, 9, 7]]
    assert_same(TokenRecord.from_bytes(record.to_bytes()), record)
    again = TokenRecord.from_dict(json.loads(json.dumps(entry)))
    np.testing.assert_array_equal(again.token_ids, record.token_ids)
    assert again.query_token == 4


def test_the_row_is_compact():
    layers, k = 4, 32
    record = a_record(
        layers=(0, 1, 2, 3),
        token_positions=np.zeros((layers, k), np.int32),
        attention_scores=np.zeros((layers, k), np.float32),
        fingerprints=np.zeros((layers, 20), np.float32),
        span_names=(),
        span_mass=np.zeros((layers, 0), np.float32),
    )
    assert len(record.to_bytes()) <= 64 + layers * (8 * k + 82)


def test_what_is_read_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        TokenRecord.from_bytes(a_record().to_bytes()).attention_scores[0, 0] = 1


def test_lists_of_layers_and_names_are_taken_and_what_is_no_list_is_said():
    record = a_record()
    lists = dataclasses.replace(record, layers=[3, 29], span_names=["doc1", "prompt"])
    assert lists.to_bytes() == record.to_bytes()
    with pytest.raises(TypeError):
        dataclasses.replace(record, span_names=("doc1", 2)).to_bytes()
