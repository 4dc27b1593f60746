"""The numbers per head in the JSON of a record: ``heads`` of each layer of an entry, lists with one item per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.numbers import Put, decoded, decoded_lists, finite, listed, positions_and_scores
from attnhook.record.row import TOP_K_PER_HEAD_MAX, RowData

_MAX_NUMBERS = 2**24  # of one record that is read from JSON


def write_heads(row: RowData, i: int, put: Put = listed) -> dict[str, Any]:
    """``heads`` of layer number ``i`` of a record, whose arrays ``put`` writes; empty where it has no such numbers.

    As lists, those of positions and scores end with the last position; as arrays all have as many, -1 and 0 behind it.
    """
    found: dict[str, Any] = {}
    if row.head_positions is not None and row.head_scores is not None:
        positions, scores = put(row.head_positions[i]), put(row.head_scores[i])
        if put is listed:
            counts = (row.head_positions[i] >= 0).sum(axis=1).tolist()
            positions, scores = ([own[:n] for own, n in zip(x, counts, strict=True)] for x in (positions, scores))
        found["token_positions"], found["attention_scores"] = positions, scores
    if row.head_fingerprints is not None:
        found["fingerprint"] = put(row.head_fingerprints[i])
    if row.head_span_mass is not None:
        found["spans"] = dict(zip(row.span_names, map(put, row.head_span_mass[i].T), strict=True))
    if row.head_sink_mass is not None:
        found["sink_mass"] = put(row.head_sink_mass[i])
    if row.head_lse is not None:
        found["lse"] = put(row.head_lse[i])
    return found


def read_heads(layers: Sequence[Mapping[str, Any]], span_names: Sequence[str]) -> dict[str, np.ndarray]:
    """The fields of `RowData` that the ``heads`` of an entry's layers hold.

    Raises ValueError, TypeError or KeyError where the layers do not hold the same, or a number is none.
    """
    each = [values.get("heads", {}) for values in layers]
    kinds = {frozenset(heads) for heads in each}
    if len(kinds) > 1:
        raise ValueError(f"layers whose heads tell different things: {sorted(map(sorted, kinds))}")
    known = {"token_positions", "attention_scores", "fingerprint", "spans", "sink_mass", "lse"}
    (names,) = kinds
    if names - known:
        raise ValueError(f"heads tell {sorted(names - known)}; known: {sorted(known)}")
    found: dict[str, np.ndarray] = {}
    count = len(each)
    if "token_positions" in names:
        found |= _top(each)
    if "fingerprint" in names:
        found["head_fingerprints"] = _numbers([decoded(heads["fingerprint"]) for heads in each]).reshape(
            count, -1, fp.SIZE
        )
    if "spans" in names:
        masses = [[decoded(heads["spans"][name]) for name in span_names] for heads in each]
        found["head_span_mass"] = _numbers(masses).reshape(count, len(span_names), -1).transpose(0, 2, 1).copy()
    for name, field in (("sink_mass", "head_sink_mass"), ("lse", "head_lse")):
        if name in names:
            found[field] = _numbers([decoded(heads[name]) for heads in each]).reshape(count, -1)
    if len({array.shape[1] for array in found.values()}) > 1:
        raise ValueError(f"different numbers of heads: { ({name: array.shape[1] for name, array in found.items()}) }")
    return found


def _top(layers: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays [L, H, k], k the most positions of a head."""
    positions = [decoded_lists(layer["token_positions"]) for layer in layers]
    values = [decoded_lists(layer["attention_scores"]) for layer in layers]
    heads = len(positions[0])
    if (lengths := {len(own) for own in (*positions, *values)}) != {heads}:
        raise ValueError(f"different numbers of heads: {sorted(lengths)}")
    where, scores = ([own for layer in x for own in layer] for x in (positions, values))
    if isinstance(layers[0]["token_positions"], Mapping):  # arrays, which have as many of each
        scores = [own[: len(places)] for own, places in zip(scores, where, strict=True)]
    # where all keys are masked none is told
    found = positions_and_scores(where, scores, "heads", least=1, most=TOP_K_PER_HEAD_MAX)
    head_positions, head_scores = (array.reshape(len(layers), heads, -1) for array in found)
    return {"head_positions": head_positions, "head_scores": head_scores}


def _numbers(values: Any) -> np.ndarray:
    numbers = np.array(values, np.float32)
    if numbers.size > _MAX_NUMBERS:
        raise ValueError(f"{numbers.size} numbers per head; {_MAX_NUMBERS} are read")
    return finite(numbers)
