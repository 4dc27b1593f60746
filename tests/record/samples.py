"""Records for the tests of one row, and what makes two of them the same."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnhook.record import fingerprint as fp
from attnhook.record.packing import pack_rows
from attnhook.record.row import MODES, PHASES, RowName
from attnhook.record.token_record import TokenRecord

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
FINGERPRINTS = fp.assemble(np.stack([np.arange(16) / 128, np.full(16, 1 / 16)]), np.array([0.125, 1]))
OF_HEADS = (*("head_positions", "head_scores", "head_fingerprints", "head_span_mass", "head_sink_mass", "head_lse"),)
ARRAYS = ("token_positions", "attention_scores", "fingerprints", "span_mass", "token_ids", "sink_mass", *OF_HEADS)


def _floats(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32))


@st.composite
def _fingerprints(draw: st.DrawFn, layers: int) -> np.ndarray:
    weights = draw(hnp.arrays(np.float64, (layers, fp.BINS), elements=st.floats(0, 1)))
    return fp.assemble(weights / np.maximum(weights.sum(-1, keepdims=True), 1), draw(_floats(layers)))


@st.composite
def _heads(draw: st.DrawFn, layers: int, spans: int) -> dict:
    """Some numbers per head, or none."""
    heads, k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shapes: dict[str, tuple[int, ...]] = {"head_fingerprints": (fp.SIZE,), "head_sink_mass": (), "head_lse": ()}
    if spans:
        shapes["head_span_mass"] = (spans,)
    found = {name: draw(_floats(layers, heads, *shapes[name])) for name in draw(st.sets(st.sampled_from([*shapes])))}
    if draw(st.booleans()):
        found["head_scores"] = draw(_floats(layers, heads, k))
        found["head_positions"] = draw(hnp.arrays(np.int32, (layers, heads, k), elements=st.integers(-1, 2**31 - 1)))
    return found


@st.composite
def token_records(draw: st.DrawFn) -> TokenRecord:
    layers = draw(st.integers(1, 4))
    k = draw(st.integers(0, 6))
    spans = tuple(draw(st.lists(NAMES, max_size=3, unique=True)))
    tokens = st.integers(-1, 2**31 - 1)
    ids = draw(st.none() | hnp.arrays(np.int32, (layers, k), elements=tokens))
    position, prints = draw(st.integers(0, 2**31 - 1)), draw(_fingerprints(layers))
    part = draw(st.none() | _floats(layers))  # that the sink has of its bin
    return TokenRecord(
        **draw(_heads(layers, len(spans))),
        request_id=draw(NAMES),
        query_position=position,
        layers=tuple(sorted(draw(st.sets(st.integers(0, 2**15 - 1), min_size=layers, max_size=layers)))),
        token_positions=draw(hnp.arrays(np.int32, (layers, k), elements=st.integers(-1, 2**31 - 1))),
        attention_scores=draw(_floats(layers, k)),
        fingerprints=prints,
        decode_step=draw(st.none() | st.integers(0, 2**31 - 1)),
        choice=draw(st.integers(0, 2**16 - 1)),
        mode=draw(st.sampled_from(MODES)),
        think_phase=draw(st.sampled_from(PHASES)),
        model=draw(NAMES),
        span_names=spans,
        span_mass=draw(_floats(layers, len(spans))),
        query_token=-1 if ids is None else draw(tokens),
        token_ids=ids,
        sink_mass=None if part is None else part * prints[:, fp.HISTOGRAM][:, fp.bin_of(position)],
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


def packed(records):
    """All in one call; they have the same layers, k, spans, mode and model."""
    last = records[-1]
    return pack_rows(
        [RowName(r.request_id, r.choice, r.decode_step, r.query_position) for r in records],
        last.layers,
        *(np.stack([getattr(last, name) for _ in records]) for name in ARRAYS[:4]),
        None if last.sink_mass is None else np.stack([last.sink_mass for _ in records]),
        {n: np.stack([getattr(last, n) for _ in records]) for n in OF_HEADS if getattr(last, n) is not None},
        mode=last.mode,
        think_phase=last.think_phase,
        model=last.model,
        span_names=last.span_names,
    )
