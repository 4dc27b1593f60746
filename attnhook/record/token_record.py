"""TokenRecord: what attnhook keeps for one query row, its compact binary row and its JSON."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp

Mode = Literal["raw", "sketch", "fingerprint"]
ThinkPhase = Literal["think", "output"]
MODES: tuple[Mode, ...] = get_args(Mode)
PHASES: tuple[ThinkPhase, ...] = get_args(ThinkPhase)

SCHEMA_VERSION = 1  # of rows and entries without token ids
TOKENS_VERSION = 2  # of those with them: what version 1 holds, and the ids behind it
VERSIONS = (SCHEMA_VERSION, TOKENS_VERSION)

# magic, version, mode, phase, spans, choice, layers, k, request id bytes, model bytes, span name bytes,
# decode step (-1 for a prompt row), query position
_HEADER = struct.Struct("<2sBBBBHHHHHHii")
#: The same header for `numpy.dtype`, for readers of many rows at once.
HEADER_FIELDS: list[tuple[str, str]] = [
    ("magic", "S2"),
    *((name, "u1") for name in ("version", "mode", "phase", "spans")),
    *((name, "<u2") for name in ("choice", "layers", "k", "id_size", "model_size", "names_size")),
    ("step", "<i4"),
    ("position", "<i4"),
]
MAGIC = b"AH"
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")
_TYPES = (_INT, _FLOAT, _FLOAT, _FLOAT)  # of positions, scores, fingerprints, span masses
_FEW = 4  # rows
_MAX_ENTRIES = 2**22  # positions of one record that is read from JSON
_VERSION_AT, _PHASE_AT = 2, 4  # their bytes in the header
_WITH_TOKENS = bytes([TOKENS_VERSION])
NAME_SEPARATOR = "\x1f"
# the JSON carries probabilities to 7 decimals: half the bytes; 5e-8 is far below the numerics contract
_DECIMALS = 7


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """Attention of one query row over the captured layers.

    L >= 1 captured layers, k entries, n spans. Rows with fewer than k reportable keys end in position -1 and
    score 0. `to_dict` and `from_dict` are the JSON of the HTTP interface, `to_bytes` and `from_bytes` a compact
    binary row.

    Token ids are there only while a sink with ``tokens=1`` is open (see `attnhook.record.tokens`).
    """

    request_id: str
    query_position: int  # position of the row in the request's full sequence, from 0
    layers: tuple[int, ...]  # layer numbers as in the model, ascending
    token_positions: np.ndarray  # int32 [L, k]
    attention_scores: np.ndarray  # float32 [L, k], descending; true probabilities
    fingerprints: np.ndarray  # float32 [L, 20]
    decode_step: int | None = 0  # index of the generated token; None for a prompt row
    choice: int = 0
    mode: Mode = "raw"
    think_phase: ThinkPhase = "output"  # of the token that was sampled from the row; prompt rows are "output"
    model: str = ""
    span_names: tuple[str, ...] = ()
    span_mass: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # float32 [L, n]
    query_token: int = -1  # id of the token at query_position; -1 where it is masked, not known, or there are no ids
    token_ids: np.ndarray | None = None  # int32 [L, k]: ids at token_positions, -1 as above; None: no ids

    @property
    def key(self) -> tuple[str, int, int]:
        """(request id, choice, query position): unique for a row, so stores can drop repeats."""
        return self.request_id, self.choice, self.query_position

    @property
    def is_prompt(self) -> bool:
        """Whether this is a prompt row: no generated token was sampled from it."""
        return self.decode_step is None

    @cached_property
    def fingerprint(self) -> np.ndarray:
        """Mean over the captured layers, float32[20]."""
        mean: np.ndarray = self.fingerprints.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    @property
    def topk_mass(self) -> np.ndarray:
        """Sum of each layer's reported scores, float32[L]; at most 1."""
        mass: np.ndarray = self.attention_scores.sum(axis=1, dtype=np.float64).astype(np.float32)
        return mass

    @property
    def spans(self) -> dict[str, float]:
        """Attention mass in each named position range, mean over the captured layers."""
        if not self.span_names:
            return {}
        return dict(zip(self.span_names, self.span_mass.mean(axis=0, dtype=np.float64).tolist(), strict=True))

    def top(self, layer: int | None = None) -> list[tuple[int, float]]:
        """(position, score) pairs of one captured layer, the last one by default, best first.

        Raises KeyError if the layer was not captured.
        """
        if layer is not None and layer not in self.layers:
            raise KeyError(f"layer {layer} was not captured; captured: {list(self.layers)}")
        row = len(self.layers) - 1 if layer is None else self.layers.index(layer)
        kept = self.token_positions[row] >= 0
        return list(
            zip(self.token_positions[row][kept].tolist(), self.attention_scores[row][kept].tolist(), strict=True)
        )

    @cached_property
    def zone(self) -> str:
        """Name of the zone that the record's fingerprint falls into; see `fill_zones` for many records.

        Raises RecordError where the fingerprint is none (NaN, or out of range).
        """
        from attnhook.record.zones import classify

        return classify(self.fingerprint).name

    def to_dict(self) -> dict[str, Any]:
        """The JSON of one entry of ``choices[i].attention_tokens``, with plain Python numbers."""
        entry: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION if self.token_ids is None else TOKENS_VERSION,
            "mode": self.mode,
            "decode_step": self.decode_step,
            "query_position": self.query_position,
            "think_phase": self.think_phase,
        }
        if self.mode != "fingerprint":
            entry["layers"] = {str(layer): self._layer(i) for i, layer in enumerate(self.layers)}
        entry["fingerprint"] = _rounded(self.fingerprint)
        entry["manifold"] = self.zone
        if self.span_names:
            entry["spans"] = {name: round(mass, _DECIMALS) for name, mass in self.spans.items()}
        if self.token_ids is not None:
            entry["query_token"] = self.query_token
        return entry

    def _layer(self, i: int) -> dict[str, Any]:
        kept = int((self.token_positions[i] >= 0).sum())
        positions = self.token_positions[i, :kept].tolist()
        scores = _rounded(self.attention_scores[i, :kept])
        numbers = self.fingerprints[i]
        layer: dict[str, Any]
        if self.mode == "raw":
            layer = {
                "token_positions": positions,
                "attention_scores": scores,
                "topk_mass": round(float(self.topk_mass[i]), _DECIMALS),
                "fingerprint": _rounded(numbers),
            }
        else:
            layer = {
                "top_hubs": positions,
                "hub_scores": scores,
                "dist_hist": _rounded(numbers[fp.HISTOGRAM]),
                "entropy": round(float(numbers[fp.ENTROPY]), _DECIMALS),
                "local_mass": round(float(numbers[fp.LOCAL]), _DECIMALS),
                "mid_mass": round(float(numbers[fp.MID]), _DECIMALS),
                "long_mass": round(float(numbers[fp.LONG]), _DECIMALS),
            }
        if self.span_names:
            layer["spans"] = dict(zip(self.span_names, _rounded(self.span_mass[i]), strict=True))
        if self.token_ids is not None:
            layer["token_ids"] = self.token_ids[i, :kept].tolist()
        return layer

    @classmethod
    def from_dict(
        cls, entry: Mapping[str, Any], *, request_id: str = "", choice: int = 0, model: str = ""
    ) -> TokenRecord:
        """Read one raw-mode entry of ``choices[i].attention_tokens``, or one line of a JSONL sink.

        The JSON has 7 decimals, so numbers come back within 1e-7. Raises RecordError if ``entry`` is not such an
        entry.
        """
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
                f"entry of mode {entry.get('mode')!r}: only raw entries hold a whole record; ask for "
                "attention_mode 'raw'"
            )
        wanted = ["decode_step", "query_position", "think_phase", "layers"]
        wanted += ["query_token"] * (version == TOKENS_VERSION)
        missing = [name for name in wanted if name not in entry]
        if missing:
            raise RecordError(f"entry without {', '.join(missing)}; it has {', '.join(map(str, entry))}: pass it whole")
        step, position, phase = entry["decode_step"], entry["query_position"], entry["think_phase"]
        spans = entry.get("spans", {})
        if not _is_count(position) or not (step is None or _is_count(step)) or phase not in PHASES:
            raise RecordError(
                f"damaged entry: query_position {position!r}, decode_step {step!r}, think_phase {phase!r}; expected "
                f"whole numbers from 0 up (decode_step may be null) and one of {', '.join(PHASES)}"
            )
        try:
            layers = sorted((int(layer), values) for layer, values in entry["layers"].items())
            k = max(len(values["token_positions"]) for _, values in layers)
            if len(layers) * k > _MAX_ENTRIES:  # one long layer among many short ones would take all memory
                raise ValueError(f"{len(layers)} layers of up to {k} positions; {_MAX_ENTRIES} in all are read")
            positions = np.full((len(layers), k), -1, np.int32)
            scores = np.zeros((len(layers), k), np.float32)
            for i, (_, values) in enumerate(layers):
                count = len(values["token_positions"])
                if not all(map(_is_count, values["token_positions"])):
                    raise ValueError(f"token_positions {values['token_positions']}")
                positions[i, :count] = values["token_positions"]
                scores[i, :count] = np.array(values["attention_scores"], np.float32).reshape(count)
            numbers = [np.array(values["fingerprint"], np.float32).reshape(fp.SIZE) for _, values in layers]
            if not isinstance(spans, Mapping):
                raise ValueError(f"spans {spans!r}")
            mass = np.array([[values["spans"][name] for name in spans] for _, values in layers], np.float32)
            mass = mass.reshape(len(layers), len(spans))
            query, ids = -1, None
            if version == TOKENS_VERSION:
                query, ids = entry["query_token"], np.full((len(layers), k), -1, np.int32)
                for i, (_, values) in enumerate(layers):
                    if len(values["token_ids"]) != len(values["token_positions"]):
                        raise ValueError(
                            f"token_ids {values['token_ids']} of {len(values['token_positions'])} positions"
                        )
                    ids[i, : len(values["token_ids"])] = values["token_ids"]
                    if not all(map(_is_token, [query, *values["token_ids"]])):
                        raise ValueError(f"query_token {query!r}, token_ids {values['token_ids']}")
            if not all(np.isfinite(array).all() for array in (scores, mass, *numbers)):
                raise ValueError("a number that is not finite")
        except KeyError as error:
            raise RecordError(f"damaged entry at query position {position}: a layer lacks {error}") from error
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise RecordError(f"damaged entry at query position {position}: {error}; pass it as it came") from error
        return cls(
            request_id=request_id,
            query_position=position,
            layers=tuple(layer for layer, _ in layers),
            token_positions=positions,
            attention_scores=scores,
            fingerprints=np.stack(numbers),
            decode_step=step,
            choice=choice,
            think_phase=phase,
            model=model,
            span_names=tuple(spans),
            span_mass=mass,
            query_token=query,
            token_ids=ids,
        )

    def to_bytes(self) -> bytes:
        """A self-contained binary row, about ``64 + L * (8 k + 4 n + 82)`` bytes, little-endian.

        Token ids, where there are any, make it ``4 + 4 L k`` bytes longer.

        Raises RecordError where a name or a number does not fit its field, or no layer was captured.
        """
        layers, k = self.token_positions.shape
        name = RowName(self.request_id, self.choice, self.decode_step, self.query_position)
        head = _head(name, self.layers, k, self.mode, self.think_phase, self.model, self.span_names)
        positions, scores, prints, masses = (
            self.token_positions,
            self.attention_scores,
            self.fingerprints,
            self.span_mass,
        )
        data = b"".join(
            (
                head,
                # a comparison costs a third of an astype that changes nothing, and a row is on a hot path
                (positions if positions.dtype == _INT else positions.astype(_INT)).tobytes(),
                (scores if scores.dtype == _FLOAT else scores.astype(_FLOAT)).tobytes(),
                (prints if prints.dtype == _FLOAT else prints.astype(_FLOAT)).tobytes(),
                (masses if masses.dtype == _FLOAT else masses.astype(_FLOAT)).tobytes(),
            )
        )
        numbers = layers * (2 * k + fp.SIZE + len(self.span_names))
        if len(data) != len(head) + 4 * numbers or len(self.layers) != layers:
            shapes = [(len(self.layers),), *(array.shape for array in (positions, scores, prints, masses))]
            raise RecordError(f"record {self.key!r} does not fit the binary row: its arrays disagree, {shapes}")
        return data if self.token_ids is None else self._with_tokens(data, self.token_ids)

    def _with_tokens(self, data: bytes, ids: np.ndarray) -> bytes:
        if ids.shape != self.token_positions.shape or not _is_token(self.query_token):
            raise RecordError(
                f"record {self.key!r} does not fit the binary row: query token {self.query_token!r}, token ids of "
                f"shape {ids.shape} for positions of shape {self.token_positions.shape}"
            )
        whole = data, np.int32(self.query_token).astype(_INT).tobytes(), ids.astype(_INT).tobytes()
        return _with_byte(b"".join(whole), _VERSION_AT, _WITH_TOKENS)

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenRecord:
        """Read one binary row; its arrays are read-only views of ``data``.

        Raises RecordError if ``data`` is not one whole row of a known version.
        """
        if len(data) < _HEADER.size or data[:2] != MAGIC:
            raise RecordError(f"not an attnhook record: {len(data)} bytes that begin with {bytes(data[:4])!r}")
        _, version, mode, phase, spans, choice, layers, k, id_size, model_size, names_size, step, position = (
            _HEADER.unpack_from(data)
        )
        if version not in VERSIONS:
            raise RecordError(
                f"record of schema version {version}; this attnhook reads {SCHEMA_VERSION} and {TOKENS_VERSION}: "
                "upgrade attnhook"
            )
        tokens = version == TOKENS_VERSION
        expected = row_size(layers, k, spans, id_size + model_size + names_size, tokens)
        if len(data) != expected:
            raise RecordError(f"damaged record: {len(data)} bytes where its header announces {expected}")
        if mode >= len(MODES) or phase >= len(PHASES) or layers == 0:
            raise RecordError(f"damaged record: mode {mode}, phase {phase}, {layers} layers in its header")
        if step < -1 or position < 0:
            raise RecordError(f"damaged record: decode step {step}, query position {position} in its header")
        at = _HEADER.size
        try:
            request_id, at = bytes(data[at : at + id_size]).decode(), at + id_size
            model, at = bytes(data[at : at + model_size]).decode(), at + model_size
            names, at = bytes(data[at : at + names_size]).decode(), at + names_size
        except UnicodeDecodeError as error:
            raise RecordError(f"damaged record: a name is not UTF-8: {error}") from error
        span_names = _split(names, spans)
        if span_names is None:
            raise RecordError(f"damaged record: span names {names!r} where its header announces {spans} spans")

        def take(dtype: str, *shape: int) -> np.ndarray:
            nonlocal at
            count = int(np.prod(shape))
            array = np.frombuffer(data, dtype, count, at).reshape(shape)
            at += array.nbytes
            return array

        return cls(
            request_id=request_id,
            query_position=position,
            layers=tuple(take("<i2", layers).tolist()),
            token_positions=take("<i4", layers, k),
            attention_scores=take("<f4", layers, k),
            fingerprints=take("<f4", layers, fp.SIZE),
            decode_step=None if step < 0 else step,
            choice=choice,
            mode=MODES[mode],
            think_phase=PHASES[phase],
            model=model,
            span_names=span_names,
            span_mass=take("<f4", layers, spans),
            query_token=int(take("<i4", 1)[0]) if tokens else -1,
            token_ids=take("<i4", layers, k) if tokens else None,
        )


def layers_of(data: bytes) -> tuple[int, ...]:
    """The captured layers of a binary row, read without the rest of it.

    Raises RecordError if ``data`` is not one whole row of a known version.
    """
    if len(data) < _HEADER.size or data[:2] != MAGIC or data[2] != SCHEMA_VERSION:
        return TokenRecord.from_bytes(data).layers  # which says what is wrong
    *_, spans, _, layers, k, id_size, model_size, names_size, _, _ = _HEADER.unpack_from(data)
    names = id_size + model_size + names_size
    if layers == 0 or len(data) != row_size(layers, k, spans, names):
        return TokenRecord.from_bytes(data).layers
    return tuple(np.frombuffer(data, "<i2", layers, _HEADER.size + names).tolist())


class RowName(NamedTuple):
    """What tells a row from the others of a step; see `TokenRecord`."""

    request_id: str
    choice: int
    decode_step: int | None
    query_position: int

    @property
    def key(self) -> tuple[str, int, int]:
        """That of its `TokenRecord`."""
        return self.request_id, self.choice, self.query_position


def pack_rows(
    rows: Sequence[RowName],
    layers: Sequence[int],
    positions: np.ndarray,
    scores: np.ndarray,
    fingerprints: np.ndarray,
    span_mass: np.ndarray,
    *,
    mode: Mode,
    model: str,
    think_phase: ThinkPhase = "output",
    span_names: tuple[str, ...] = (),
) -> list[bytes]:
    """The binary rows of T records with the same layers, k and spans, much faster than one by one.

    ``positions`` [T, L, k], ``scores`` [T, L, k], ``fingerprints`` [T, L, 20] and ``span_mass`` [T, L, n] are those of
    the records. Raises RecordError where a name or a number does not fit its field, or no layer was captured.
    """
    count, size, k = positions.shape
    heads = [_head(row, layers, k, mode, think_phase, model, span_names) for row in rows]
    wanted = (size, k), (size, k), (size, fp.SIZE), (size, len(span_names))
    arrays = positions, scores, fingerprints, span_mass
    fits = all(array.shape == (count, *shape) for array, shape in zip(arrays, wanted, strict=True))
    if not fits or len(layers) != size or len(heads) != count:
        shapes = [(len(rows),), (len(layers),), *(array.shape for array in arrays)]
        raise RecordError(f"record {rows[0].key!r} does not fit the binary row: its arrays disagree, {shapes}")
    if count <= _FEW:  # then calls for all rows cost more than calls for each
        packed = [np.ascontiguousarray(array, dtype) for array, dtype in zip(arrays, _TYPES, strict=True)]
        return [b"".join((head, *(array[t].tobytes() for array in packed))) for t, head in enumerate(heads)]
    columns = [
        np.ascontiguousarray(array, dtype).reshape(count, -1).view(np.uint8)
        for array, dtype in zip(arrays, _TYPES, strict=True)
        if array.size
    ]
    return [head + values.tobytes() for head, values in zip(heads, np.concatenate(columns, axis=1), strict=True)]


def _head(
    row: RowName, layers: Sequence[int], k: int, mode: Mode, phase: ThinkPhase, model: str, spans: tuple[str, ...]
) -> bytes:
    """A row's header, names and layers. Raises RecordError where one does not fit its field, or there is no layer."""
    try:
        # a JSON body can hold lone surrogates, which have no UTF-8
        request_id, model_name = row.request_id.encode(), model.encode()
        names = NAME_SEPARATOR.join(spans).encode()
        numbers = _layer_numbers(tuple(layers))
        header = _HEADER.pack(
            MAGIC,
            SCHEMA_VERSION,
            MODES.index(mode),
            PHASES.index(phase),
            len(spans),
            row.choice,
            len(layers),
            k,
            len(request_id),
            len(model_name),
            len(names),
            -1 if row.decode_step is None else row.decode_step,
            row.query_position,
        )
    except (struct.error, UnicodeEncodeError, OverflowError) as error:
        raise RecordError(
            f"record {row.key!r} does not fit the binary row: {error}; shorten or mend its names"
        ) from error
    if not layers or (spans and _split(names.decode(), len(spans)) != spans):
        raise RecordError(
            f"record {row.key!r} does not fit the binary row: {len(layers)} layers, spans {spans!r}; capture at least "
            "one layer and give spans names without control characters"
        )
    return b"".join((header, request_id, model_name, names, numbers))


def join_layers(parts: Sequence[TokenRecord]) -> TokenRecord:
    """The record of one row from parts that have different layers of it."""
    order = np.argsort([layer for part in parts for layer in part.layers])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    layers = [layer for part in parts for layer in part.layers]
    ids = all(part.token_ids is not None for part in parts)
    return replace(
        parts[0],
        layers=tuple(layers[i] for i in order),
        token_positions=joined("token_positions"),
        attention_scores=joined("attention_scores"),
        fingerprints=joined("fingerprints"),
        span_mass=joined("span_mass"),
        query_token=parts[0].query_token if ids else -1,
        token_ids=joined("token_ids") if ids else None,
    )


def with_phase(data: bytes, phase: ThinkPhase) -> bytes:
    """A binary row with another ``think_phase``, which is known later than the rest."""
    return _with_byte(data, _PHASE_AT, bytes([PHASES.index(phase)]))


def without_tokens(record: TokenRecord) -> TokenRecord:
    """The record without token ids: itself, where it has none."""
    return record if record.token_ids is None else replace(record, query_token=-1, token_ids=None)


def row_without_tokens(data: bytes) -> bytes:
    """`without_tokens` of a binary row. What is no whole row with ids is given back as it is."""
    if not has_tokens(data) or len(data) < _HEADER.size:
        return data
    spans, _, layers, k, *sizes = _HEADER.unpack_from(data)[4:11]
    if len(data) != row_size(layers, k, spans, sum(sizes), True):
        return data
    end = row_size(layers, k, spans, sum(sizes))
    return _with_byte(data[:end], _VERSION_AT, bytes([SCHEMA_VERSION]))


def has_tokens(data: bytes) -> bool:
    """Whether a binary row is of the version that has token ids."""
    return data[_VERSION_AT : _VERSION_AT + 1] == _WITH_TOKENS


def _with_byte(data: bytes, at: int, byte: bytes) -> bytes:
    return data[:at] + byte + data[at + 1 :]


def fill_zones(records: Sequence[TokenRecord], fingerprints: np.ndarray | None = None) -> None:
    """Find the zones of many records at once, a hundred times faster than `TokenRecord.zone` one by one.

    Call it before `TokenRecord.to_dict` on each. ``fingerprints``, float32 [n, 20], are the records' own where the
    caller has them. Where every record knows its zone already, nothing is done. Raises RecordError where one has
    no valid fingerprint.
    """
    from attnhook.record.zones import ZONE_NAMES, classify_many

    if not all("zone" in record.__dict__ for record in records):
        if fingerprints is None:
            fingerprints = np.stack([record.fingerprint for record in records])
        codes, _ = classify_many(fingerprints)
        for record, code in zip(records, codes.tolist(), strict=True):
            record.__dict__["zone"] = ZONE_NAMES[code]  # where cached_property keeps it


def row_size(layers: Any, k: Any, spans: Any, text: Any, tokens: Any = False) -> Any:
    """Bytes of a row whose names take ``text`` bytes, ``tokens``: with ids; of many rows, where arrays are given."""
    return _HEADER.size + text + layers * (2 + 8 * k + 4 * fp.SIZE + 4 * spans) + tokens * (4 + 4 * layers * k)


@lru_cache(maxsize=1024)
def _layer_numbers(layers: tuple[int, ...]) -> bytes:
    return np.asarray(layers, "<i2").tobytes()


def _split(names: str, count: int) -> tuple[str, ...] | None:
    """The ``count`` joined names, or None where there are more or fewer."""
    parts = tuple(names.split(NAME_SEPARATOR)) if count or names else ()
    return parts if len(parts) == count else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31


def _rounded(array: np.ndarray) -> list[float]:
    return np.round(array.astype(np.float64), _DECIMALS).tolist()  # type: ignore[no-any-return]
