"""The JSON of a record: one entry of ``choices[i].attention_tokens``, one line of a JSONL sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.entry_heads import read_heads, write_heads
from attnhook.record.numbers import (
    DECIMALS,
    Put,
    decoded,
    decoded_lists,
    finite,
    is_count,
    listed,
    positions_and_scores,
    rounded,
)
from attnhook.record.row import PHASES, SCHEMA_VERSION, TOKENS_VERSION, UNKNOWN, VERSIONS, RowData, is_token


def write_entry(row: RowData, zone: str, put: Put = listed) -> dict[str, Any]:
    """The entry of a record in that zone, whose arrays ``put`` writes; see `TokenRecord.to_dict`."""
    entry: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION if row.token_ids is None else TOKENS_VERSION,
        "mode": row.mode,
        "decode_step": row.decode_step,
        "query_position": row.query_position,
        "think_phase": row.think_phase,
    }
    if row.mode != "fingerprint":
        mass = row.topk_mass
        entry["layers"] = {str(layer): _layer(row, i, mass, put) for i, layer in enumerate(row.layers)}
    entry["fingerprint"] = put(row.fingerprint)
    if row.sink_mass is not None:
        entry["sink_mass"] = round(float(row.sink_mass.mean(dtype=np.float64)), DECIMALS)
    entry["manifold"] = zone
    if row.span_names:
        entry["spans"] = {name: round(mass, DECIMALS) for name, mass in row.spans.items()}
    if row.token_ids is not None:
        entry["query_token"] = row.query_token
    return entry


def _layer(row: RowData, i: int, topk_mass: np.ndarray, put: Put) -> dict[str, Any]:
    kept = int((row.token_positions[i] >= 0).sum())
    positions, scores = put(row.token_positions[i, :kept]), put(row.attention_scores[i, :kept])
    numbers = row.fingerprints[i]
    layer: dict[str, Any]
    if row.mode == "raw":
        layer = {
            "token_positions": positions,
            "attention_scores": scores,
            "topk_mass": round(float(topk_mass[i]), DECIMALS),
            "fingerprint": put(numbers),
        }
    else:
        layer = {
            "top_hubs": positions,
            "hub_scores": scores,
            "dist_hist": put(numbers[fp.HISTOGRAM]),
            "entropy": round(float(numbers[fp.ENTROPY]), DECIMALS),
            "local_mass": round(float(numbers[fp.LOCAL]), DECIMALS),
            "mid_mass": round(float(numbers[fp.MID]), DECIMALS),
            "long_mass": round(float(numbers[fp.LONG]), DECIMALS),
        }
    if row.sink_mass is not None:
        layer["sink_mass"] = round(float(row.sink_mass[i]), DECIMALS)
    if row.span_names:
        layer["spans"] = dict(zip(row.span_names, rounded(row.span_mass[i]), strict=True))
    if heads := write_heads(row, i, put):
        layer["heads"] = heads
    if row.token_ids is not None:
        layer["token_ids"] = put(row.token_ids[i, :kept])
    return layer


def read_entry(entry: object) -> dict[str, Any]:
    """The fields of `RowData` that a raw-mode entry holds; see `TokenRecord.from_dict`.

    Raises RecordError if ``entry`` is not such an entry.
    """
    entry, version = _whole(entry)
    step, position, phase = entry["decode_step"], entry["query_position"], entry["think_phase"]
    if not is_count(position) or not (step is None or is_count(step)) or phase not in PHASES:
        raise RecordError(
            f"damaged entry: query_position {position!r}, decode_step {step!r}, think_phase {phase!r}; expected "
            f"whole numbers from 0 up (decode_step may be null) and one of {', '.join(PHASES)}"
        )
    fields: dict[str, Any] = {"query_position": position, "decode_step": step, "think_phase": phase}
    try:
        layers = sorted((int(layer), values) for layer, values in entry["layers"].items())
        values = [each for _, each in layers]
        fields["token_positions"], fields["attention_scores"] = positions_and_scores(
            [decoded_lists(each["token_positions"]) for each in values],
            [decoded_lists(each["attention_scores"]) for each in values],
            "layers",
        )
        fields |= _fingerprints_and_spans(values, entry.get("spans", {}))
        if "sink_mass" in entry:  # not in those of attnhook before 0.2
            fields["sink_mass"] = finite(np.array([float(each["sink_mass"]) for each in values], np.float32))
        fields |= read_heads(values, fields["span_names"])
        if version == TOKENS_VERSION:
            fields |= _tokens(values, entry["query_token"], fields["token_positions"].shape[1])
    except KeyError as error:
        raise RecordError(f"damaged entry at query position {position}: a layer lacks {error}") from error
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"damaged entry at query position {position}: {error}; pass it as it came") from error
    return fields | {"layers": tuple(layer for layer, _ in layers)}


def _whole(entry: object) -> tuple[Mapping[str, Any], int]:
    """The entry with all fields of its version, and that version. Raises RecordError."""
    if not isinstance(entry, Mapping):
        raise RecordError(f"entry {str(entry)[:80]!r} is not a JSON object: give one of attention_tokens")
    version = entry.get("schema_version")
    if version not in VERSIONS or isinstance(version, bool):
        raise RecordError(
            f"entry of schema_version {version!r}; this attnhook reads {SCHEMA_VERSION} and {TOKENS_VERSION}: use "
            "the same attnhook on both sides"
        )
    if entry.get("mode") != "raw":
        raise RecordError(
            f"entry of mode {entry.get('mode')!r}: only raw entries hold a whole record; ask for attention_mode 'raw'"
        )
    wanted = ["decode_step", "query_position", "think_phase", "layers"]
    wanted += ["query_token"] * (version == TOKENS_VERSION)
    missing = [name for name in wanted if name not in entry]
    if missing:
        raise RecordError(f"entry without {', '.join(missing)}; it has {', '.join(map(str, entry))}: pass it whole")
    return entry, version


def _fingerprints_and_spans(layers: list[Mapping[str, Any]], spans: object) -> dict[str, Any]:
    """Arrays [L, 20] and [L, n], and the names of the n spans."""
    numbers = [np.array(decoded(values["fingerprint"]), np.float32).reshape(fp.SIZE) for values in layers]
    if not isinstance(spans, Mapping):
        raise ValueError(f"spans {spans!r}")
    mass = np.array([[values["spans"][name] for name in spans] for values in layers], np.float32)
    return {
        "fingerprints": finite(np.stack(numbers)),
        "span_names": tuple(spans),
        "span_mass": finite(mass.reshape(len(layers), len(spans))),
    }


def _tokens(layers: list[Mapping[str, Any]], query: object, k: int) -> dict[str, Any]:
    """The id of the query's token, and those of the keys [L, k]."""
    ids = np.full((len(layers), k), UNKNOWN, np.int32)
    for i, values in enumerate(layers):
        own, count = decoded_lists(values["token_ids"]), len(decoded_lists(values["token_positions"]))
        if len(own) != count:
            raise ValueError(f"token_ids {own} of {count} positions")
        if not is_token(query) or not all(map(is_token, own)):
            raise ValueError(f"query_token {query!r}, token_ids {own}")
        ids[i, :count] = own
    return {"query_token": query, "token_ids": ids}
