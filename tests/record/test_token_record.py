"""TokenRecord: the binary row loses nothing and refuses damage; the JSON is the one of the HTTP interface."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.token_record import (
    MODES,
    PHASES,
    RowName,
    TokenRecord,
    fill_zones,
    pack_rows,
    row_without_tokens,
    with_phase,
    without_tokens,
)

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
FINGERPRINTS = fp.assemble(np.stack([np.arange(16) / 128, np.full(16, 1 / 16)]), np.array([0.125, 1]))
ARRAYS = ("token_positions", "attention_scores", "fingerprints", "span_mass", "token_ids")


def _floats(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32))


@st.composite
def _fingerprints(draw: st.DrawFn, layers: int) -> np.ndarray:
    weights = draw(hnp.arrays(np.float64, (layers, fp.BINS), elements=st.floats(0, 1)))
    return fp.assemble(weights / np.maximum(weights.sum(-1, keepdims=True), 1), draw(_floats(layers)))


@st.composite
def token_records(draw: st.DrawFn) -> TokenRecord:
    layers = draw(st.integers(1, 4))
    k = draw(st.integers(0, 6))
    spans = tuple(draw(st.lists(NAMES, max_size=3, unique=True)))
    tokens = st.integers(-1, 2**31 - 1)
    ids = draw(st.none() | hnp.arrays(np.int32, (layers, k), elements=tokens))
    return TokenRecord(
        request_id=draw(NAMES),
        query_position=draw(st.integers(0, 2**31 - 1)),
        layers=tuple(sorted(draw(st.sets(st.integers(0, 2**15 - 1), min_size=layers, max_size=layers)))),
        token_positions=draw(hnp.arrays(np.int32, (layers, k), elements=st.integers(-1, 2**31 - 1))),
        attention_scores=draw(_floats(layers, k)),
        fingerprints=draw(_fingerprints(layers)),
        decode_step=draw(st.none() | st.integers(0, 2**31 - 1)),
        choice=draw(st.integers(0, 2**16 - 1)),
        mode=draw(st.sampled_from(MODES)),
        think_phase=draw(st.sampled_from(PHASES)),
        model=draw(NAMES),
        span_names=spans,
        span_mass=draw(_floats(layers, len(spans))),
        query_token=-1 if ids is None else draw(tokens),
        token_ids=ids,
    )


def a_record(**changes: object) -> TokenRecord:
    values: dict = {
        "request_id": "cmpl-1",
        "query_position": 36,
        "layers": (3, 29),
        "token_positions": np.array([[35, -1, -1], [0, 35, 12]], np.int32),
        "attention_scores": np.array([[0.9, 0, 0], [0.61, 0.1, 0.04]], np.float32),
        "fingerprints": FINGERPRINTS,
        "span_names": ("doc1", "prompt"),
        "span_mass": np.array([[0.1, 0.5], [0.3, 0.25]], np.float32),
    }
    return TokenRecord(**{**values, **changes})


def assert_same(one: TokenRecord, other: TokenRecord) -> None:
    for field in dataclasses.fields(TokenRecord):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name in ARRAYS and mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs, field.name


# -- the binary row


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
    if name in ARRAYS and mine is not None and theirs is not None:
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


def packed(records):
    """All in one call; they have the same layers, k, spans, mode and model."""
    last = records[-1]
    return pack_rows(
        [RowName(r.request_id, r.choice, r.decode_step, r.query_position) for r in records],
        last.layers,
        *(np.stack([getattr(last, name) for _ in records]) for name in ARRAYS[:4]),
        mode=last.mode,
        think_phase=last.think_phase,
        model=last.model,
        span_names=last.span_names,
    )


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
        assert row[2] == 1  # as before there were any
    else:
        assert row[2] == 2
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


# -- the JSON


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


@given(token_records())
def test_raw_json_is_read_back(record):
    layers, k = record.token_positions.shape
    some = np.arange(k) < np.arange(1, layers + 1)[:, None]  # rows of different lengths, as at a sequence's start
    record = dataclasses.replace(
        record,
        mode="raw",
        token_positions=np.where(some, np.maximum(record.token_positions, 0), -1).astype(np.int32),
        attention_scores=np.where(some, record.attention_scores, 0).astype(np.float32),
    )
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
    assert_same(TokenRecord.from_bytes(again.to_bytes()), again)  # its arrays agree


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


# -- reading one record in Python


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
