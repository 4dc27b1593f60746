"""The JSON of a record is the one of the HTTP interface, and is read back."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given

from attnhook.errors import RecordError
from attnhook.record.numbers import decoded, encoded
from attnhook.record.token_record import TokenRecord
from tests.record.samples import FINGERPRINTS, OF_HEADS, a_record, assert_same, token_records


def test_raw_json():
    entry = a_record(decode_step=0).to_dict()
    assert list(entry) == [
        "schema_version",
        "mode",
        "decode_step",
        "query_position",
        "think_phase",
        "layers",
        "fingerprint",
        "manifold",
        "spans",
    ]
    assert entry["schema_version"] == 1
    assert (entry["mode"], entry["decode_step"], entry["query_position"]) == ("raw", 0, 36)
    assert entry["think_phase"] == "output"
    assert list(entry["layers"]) == ["3", "29"]
    assert entry["layers"]["3"]["token_positions"] == [35]  # the two keys that do not exist are left out
    assert entry["layers"]["3"]["attention_scores"] == [0.9]
    assert entry["layers"]["29"] == {
        "token_positions": [0, 35, 12],
        "attention_scores": [0.61, 0.1, 0.04],
        "topk_mass": 0.75,
        "fingerprint": [0.1875, 0.3125, 0.5, 1.0, *[0.0625] * 16],
        "spans": {"doc1": 0.3, "prompt": 0.25},
    }
    np.testing.assert_allclose(entry["fingerprint"], FINGERPRINTS.mean(axis=0), atol=1e-7)
    assert entry["manifold"] == a_record().zone
    assert entry["spans"] == {"doc1": 0.2, "prompt": 0.375}


def test_sketch_json():
    entry = a_record(mode="sketch", think_phase="think").to_dict()
    assert entry["mode"] == "sketch"
    assert entry["think_phase"] == "think"
    numbers = FINGERPRINTS[0]
    layer = entry["layers"]["3"]
    assert list(layer) == [
        "top_hubs",
        "hub_scores",
        "dist_hist",
        "entropy",
        "local_mass",
        "mid_mass",
        "long_mass",
        "spans",
    ]
    assert (layer["top_hubs"], layer["hub_scores"]) == ([35], [0.9])
    np.testing.assert_allclose(layer["dist_hist"], numbers[4:], atol=1e-7)
    got = [layer[name] for name in ("local_mass", "mid_mass", "long_mass", "entropy")]
    np.testing.assert_allclose(got, numbers[:4], atol=1e-7)


def test_fingerprint_json():
    entry = a_record(
        mode="fingerprint", token_positions=np.zeros((2, 0), np.int32), attention_scores=np.zeros((2, 0), np.float32)
    ).to_dict()
    assert "layers" not in entry
    assert len(entry["fingerprint"]) == 20
    assert entry["manifold"]


def test_without_spans_and_for_prompt_rows():
    entry = a_record(decode_step=None, span_names=(), span_mass=np.zeros((2, 0), np.float32)).to_dict()
    assert "spans" not in entry and "spans" not in entry["layers"]["29"]
    assert entry["decode_step"] is None
    assert a_record(decode_step=None).is_prompt
    assert not a_record(decode_step=0).is_prompt


@given(token_records())
def test_the_json_is_valid_finite_and_plain(record):
    text = json.dumps(record.to_dict(), allow_nan=False)
    entry = json.loads(text)
    assert entry == record.to_dict()  # plain numbers, strings and lists only
    assert ("layers" in entry) == (record.mode != "fingerprint")
    again = TokenRecord.from_bytes(record.to_bytes())
    assert again.to_dict() == record.to_dict()


def raw(record):
    """The record in mode raw, with positions that a capture could give: none behind the last."""
    layers, k = record.token_positions.shape
    some = np.arange(k) < np.arange(1, layers + 1)[:, None]  # rows of different lengths, as at a sequence's start
    return dataclasses.replace(
        record,
        mode="raw",
        token_positions=np.where(some, np.maximum(record.token_positions, 0), -1).astype(np.int32),
        attention_scores=np.where(some, record.attention_scores, 0).astype(np.float32),
        head_positions=None if record.head_positions is None else np.maximum(record.head_positions, 0),
    )


@given(token_records())
def test_raw_json_is_read_back(record):
    layers, k = record.token_positions.shape
    record = raw(record)
    entry = json.loads(json.dumps(record.to_dict()))
    again = TokenRecord.from_dict(entry, request_id=record.request_id, choice=record.choice, model=record.model)
    for name in ("key", "decode_step", "mode", "think_phase", "model", "layers", "span_names"):
        assert getattr(again, name) == getattr(record, name)
    width = min(k, layers)  # that of the widest row
    np.testing.assert_array_equal(again.token_positions, record.token_positions[:, :width])
    np.testing.assert_allclose(again.attention_scores, record.attention_scores[:, :width], rtol=0, atol=1e-7)
    np.testing.assert_allclose(again.fingerprints, record.fingerprints, rtol=0, atol=1e-7)
    assert again.spans == pytest.approx(record.spans, rel=0, abs=1e-7)
    np.testing.assert_allclose(again.span_mass, record.span_mass, rtol=0, atol=1e-7)
    assert again.span_mass.shape == record.span_mass.shape
    for name in OF_HEADS:
        mine, theirs = getattr(again, name), getattr(record, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-7)
    assert_same(TokenRecord.from_bytes(again.to_bytes()), again)  # its arrays agree


@given(token_records())
def test_in_base64_json_comes_back_as_it_was(record):
    record = raw(record) if record.mode == "raw" else record
    entry = json.loads(json.dumps(record.to_dict("base64"), allow_nan=False))
    assert entry.keys() == record.to_dict().keys()
    numbers = decoded(entry["fingerprint"])
    assert numbers.dtype == np.dtype("<f4") and np.array_equal(numbers, record.fingerprint)
    if record.mode != "raw":
        return
    lists = TokenRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    again = TokenRecord.from_dict(entry)
    assert np.array_equal(again.fingerprints, record.fingerprints)
    assert np.array_equal(again.token_positions, lists.token_positions)
    kept = again.token_positions >= 0
    assert np.array_equal(again.attention_scores[kept], record.attention_scores[:, : kept.shape[1]][kept])
    for name in OF_HEADS:
        mine, theirs = getattr(again, name), getattr(lists, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_an_array_in_base64():
    array = np.array([[0.5, -2], [1e-9, 3e8]], np.float32)
    assert encoded(array) == {"dtype": "float32", "shape": [2, 2], "base64": "AAAAPwAAAMBfcIkwGA2PTQ=="}
    assert np.array_equal(decoded(encoded(array)), array)
    assert np.array_equal(decoded(encoded(np.array([3, -1], np.int64))), [3, -1])
    assert decoded([1, 2]) == [1, 2] and decoded({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"shape": [3, 2]},
        {"shape": "2"},
        {"shape": [-1]},
        {"shape": [2**31 - 1, 2**31 - 1]},
        {"base64": "AAAA"},
        {"base64": "!!!!"},
        {"base64": 3},
    ],
    ids=str,
)
def test_a_damaged_array_in_base64_is_refused(change):
    entry = a_record().to_dict("base64")
    entry["layers"]["3"]["fingerprint"] |= change
    with pytest.raises(RecordError, match=r"damaged entry at query position|a layer lacks 'float64'"):
        TokenRecord.from_dict(entry)


def of_heads(**changes: object) -> dict:
    """An entry with numbers of two heads in each of its two layers."""
    numbers: dict = {
        "head_positions": np.array([[[35, -1], [35, 3]], [[0, 1], [2, 3]]], np.int32),
        "head_scores": np.array([[[0.9, 0], [0.5, 0.25]], [[0.5, 0.25], [0.75, 0]]], np.float32),
        "head_span_mass": np.array([[[0.5, 0.25], [0.125, 1]], [[0, 0.5], [0.75, 0]]], np.float32),
        "head_lse": np.array([[1.5, -2], [0, 30.25]], np.float32),
    }
    entry = a_record(**numbers).to_dict()
    entry["layers"]["29"]["heads"] |= changes
    return entry


def test_heads_in_json():
    layer = of_heads()["layers"]["3"]["heads"]
    assert layer == {
        "token_positions": [[35], [35, 3]],  # what does not exist is left out
        "attention_scores": [[0.9], [0.5, 0.25]],
        "spans": {"doc1": [0.5, 0.125], "prompt": [0.25, 1.0]},
        "lse": [1.5, -2.0],
    }
    assert "heads" not in a_record().to_dict()["layers"]["3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "heads tell different things"),
        ({"lse": [1.0]}, "a layer lacks|inhomogeneous|different numbers"),
        ({"lse": [1.0, float("nan")]}, "not finite"),
        ({"spans": {"doc1": [0.1, 0.2]}}, "lacks 'prompt'"),
        ({"token_positions": [[0, 1], [-2]]}, r"token_positions \[-2\]"),
        ({"token_positions": [[0, 1], [*range(17)]]}, "up to 16 are read"),
        ({"attention_scores": [[0.5], [0.1, 0.2]]}, "reshape"),
        ({"attention_scores": [[0.5, 0.2]]}, "different numbers of heads"),
        ({"token_positions": [[0], [1], [2]]}, "different numbers of heads"),
    ],
)
def test_damaged_heads_are_refused(changes, message):
    with pytest.raises(RecordError, match=message):
        TokenRecord.from_dict(of_heads(**changes))


def changed(**changes: object) -> dict:
    return {**a_record().to_dict(), **changes}


def layer_changed(**changes: object) -> dict:
    entry = a_record().to_dict()
    entry["layers"]["3"] = {**entry["layers"]["3"], **changes}
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "not a JSON object"),
        ({}, "schema_version None"),
        (changed(schema_version=3), r"schema_version 3; this attnhook reads 1 and 2.*same attnhook"),
        (changed(schema_version=True), "schema_version True"),
        (changed(schema_version=2), "without query_token;"),
        (changed(schema_version=2, query_token=5), "a layer lacks 'token_ids'"),
        (layer_changed(token_ids=[7]) | {"schema_version": 2, "query_token": -2}, "query_token -2"),
        (layer_changed(token_ids=[2**31]) | {"schema_version": 2, "query_token": 5}, "damaged entry"),
        (layer_changed(token_ids=[7, 8]) | {"schema_version": 2, "query_token": 5}, "of 1 positions"),
        (a_record(mode="sketch").to_dict(), "mode 'sketch'.*attention_mode 'raw'"),
        (a_record(mode="fingerprint").to_dict(), "mode 'fingerprint'"),
        ({"schema_version": 1, "mode": "raw", "layers": {}}, "without decode_step, query_position, think_phase;"),
        (changed(query_position=-1), "query_position -1"),
        (changed(decode_step=True), "decode_step True"),
        (changed(think_phase="sleep"), "think_phase 'sleep'"),
        (changed(layers={}), "damaged entry at query position 36"),
        (changed(layers=[1]), "damaged entry"),
        (changed(layers={"three": {}}), "three"),
        (changed(layers={"3": {"token_positions": [1]}}), "a layer lacks 'attention_scores'"),
        (changed(spans=[1]), "damaged entry"),
        (changed(spans={"a": 0.5}), "a layer lacks 'a'"),
        (changed(spans={"doc1": 0.2, "prompt": 0.375, "a": 0.1}), "a layer lacks 'a'"),
        (layer_changed(spans={"doc1": "b", "prompt": 0.1}), "damaged entry"),
        (layer_changed(spans={"doc1": float("inf"), "prompt": 0.1}), "not finite"),
        (layer_changed(attention_scores=[0.5, 0.25]), "damaged entry"),
        (layer_changed(attention_scores=[float("nan")]), "not finite"),
        (layer_changed(token_positions=[-1]), r"token_positions \[-1\]"),
        (layer_changed(token_positions=[2**31]), "token_positions"),
        (layer_changed(fingerprint=[0.5] * 19), "damaged entry"),
    ],
)
def test_json_that_is_no_raw_entry_is_refused(entry, message):
    with pytest.raises(RecordError, match=message):
        TokenRecord.from_dict(entry)
