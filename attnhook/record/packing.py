"""Rows to bytes and back, one by one or those of a step at once; `attnhook.record.layout` knows what lies where."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np

from attnhook.errors import RecordError
from attnhook.record.layout import (
    FIELD_AT,
    HEAD_KINDS,
    MAGIC,
    NAME_SEPARATOR,
    ROW_VERSIONS,
    SECTIONS,
    STRUCT,
    Header,
    RowLayout,
    heads_of,
    version_of,
)
from attnhook.record.row import (
    MODES,
    PHASES,
    UNKNOWN,
    Mode,
    RowData,
    RowName,
    ThinkPhase,
    is_token,
)

_FEW = 4  # rows
_REMEDY = "shorten or mend its names"
#: Versions with token ids, each as a byte, and the same without.
_WITHOUT_TOKENS = {
    bytes((version_of(True, *others),)): bytes((version_of(False, *others),))
    for others in product((False, True), repeat=2)
}
_VERSION_AT, _PHASE_AT = FIELD_AT["version"], FIELD_AT["phase"]  # each a byte
_OF_ROWS = ("choice", "id_size", "step", "position")  # fields in which the rows of a step differ
_CHOICE, _ID_SIZE, _STEP, _POSITION = map(Header._fields.index, _OF_ROWS)
_NUMBERS = next(section.dtype for section in SECTIONS if section.name == "layers")


def pack(row: RowData) -> bytes:
    """The binary row of a record; see `TokenRecord.to_bytes`."""
    ids = row.token_ids
    shape, mode, phase, model = row.token_positions.shape, row.mode, row.think_phase, row.model
    heads = heads_of(row)
    version = version_of(ids is not None, row.sink_mass is not None, heads[2] > 0)
    try:
        front = _front(row.layers, row.span_names, shape, version, mode, phase, model, heads)
    except TypeError:  # lists have no hash
        front = _front(tuple(row.layers), tuple(row.span_names), shape, version, mode, phase, model, heads)
    parts = front.head(row)
    if ids is not None:
        _check_tokens(row, ids)
    for value, (part, scalar, dtype, size) in zip(front.values(row), front.parts):  # noqa: B905 # strict=True costs 5%
        if scalar:
            part = np.array(value, dtype).tobytes()
        elif part is None:
            # an astype that changes nothing costs more than all the rest, and a row is on a hot path
            part = (value if value.dtype is dtype else value.astype(dtype)).tobytes()
        if len(part) != size:
            arrays = [getattr(row, place.name) for place in front.layout.places.values() if place.shape]
            shapes = [array.shape for array in arrays if isinstance(array, np.ndarray)]
            raise _misfit(row, f"its arrays disagree, {[(len(row.layers),), *shapes]}")
        parts.append(part)
    return b"".join(parts)


def pack_rows(
    rows: Sequence[RowName],
    layers: Sequence[int],
    positions: np.ndarray,
    scores: np.ndarray,
    fingerprints: np.ndarray,
    span_mass: np.ndarray,
    sink_mass: np.ndarray | None = None,
    heads: Mapping[str, np.ndarray] = MappingProxyType({}),
    *,
    mode: Mode,
    model: str,
    think_phase: ThinkPhase = "output",
    span_names: tuple[str, ...] = (),
) -> list[bytes]:
    """The binary rows of T records with the same layers, k and spans, much faster than one by one.

    ``positions`` [T, L, k], ``scores`` [T, L, k], ``fingerprints`` [T, L, 20], ``span_mass`` [T, L, n] and
    ``sink_mass`` [T, L] are those of the records, ``heads`` their fields of that name, [T, L, H, ...]. Raises
    RecordError where a name or a number does not fit its field, or no layer was captured.
    """
    given = {
        "token_positions": positions,
        "attention_scores": scores,
        "fingerprints": fingerprints,
        "span_mass": span_mass,
    }
    if sink_mass is not None:
        given["sink_mass"] = sink_mass
    given |= heads
    count = len(positions)
    kinds = sum(1 << bit for bit, name in enumerate(HEAD_KINDS) if name in heads)
    number = next((array.shape[2] for array in heads.values()), 0)
    each = heads["head_positions"].shape[3] if "head_positions" in heads else 0
    version = version_of(False, sink_mass is not None, kinds > 0)
    front = _front(
        tuple(layers), tuple(span_names), positions.shape[1:], version, mode, think_phase, model, (number, each, kinds)
    )
    fronts = [b"".join(front.head(row)) for row in rows]
    places = front.layout.places
    fits = all(array.shape == (count, *places[name].shape) for name, array in given.items())
    if not fits or len(fronts) != count:
        shapes = [(len(rows),), (len(layers),), *(array.shape for array in given.values())]
        raise _misfit(rows[0], f"its arrays disagree, {shapes}")
    arrays = [
        (place, None if place.name == "layers" else np.ascontiguousarray(given[place.name], place.dtype))
        for place in front.places
        if place.size
    ]
    if count <= _FEW:  # then calls for all rows cost more than calls for each
        return [
            b"".join((head, *(front.layers if array is None else array[t].tobytes() for _, array in arrays)))
            for t, head in enumerate(fronts)
        ]
    table = np.empty((count, front.layout.size - front.ahead), np.uint8)
    for place, array in arrays:
        own = np.frombuffer(front.layers, np.uint8) if array is None else array.reshape(count, -1).view(np.uint8)
        table[:, place.at - front.ahead : place.at - front.ahead + place.size] = own
    return [head + values.tobytes() for head, values in zip(fronts, table, strict=True)]


def unpack(data: bytes) -> dict[str, Any]:
    """The fields of one binary row's record; see `TokenRecord.from_bytes`."""
    header, bounds, layout = _read(data)
    start = bounds[-1]
    try:
        request_id, model, names = (bytes(data[at:end]).decode() for at, end in pairwise(bounds))
    except UnicodeDecodeError as error:
        raise RecordError(f"damaged record: a name is not UTF-8: {error}") from error
    span_names = _split(names, header.spans)
    if span_names is None:
        raise RecordError(f"damaged record: span names {names!r} where its header announces {header.spans} spans")
    fields: dict[str, Any] = {
        name: np.frombuffer(data, place.dtype, place.length, start + place.at).reshape(place.shape)
        for name, place in layout.places.items()
        if name != "layers"
    }
    for place in layout.bounded:
        if (fields[place.name] < place.section.least).any():
            raise RecordError(f"damaged record: a number of {place.name} is below {place.section.least}")
    if header.shape.tokens:
        fields["query_token"] = int(fields["query_token"])
    return fields | {
        "layers": _layers_in(data, start, layout),
        "request_id": request_id,
        "query_position": header.position,
        "decode_step": None if header.step < 0 else header.step,
        "choice": header.choice,
        "mode": MODES[header.mode],
        "think_phase": PHASES[header.phase],
        "model": model,
        "span_names": span_names,
    }


def layers_of(data: bytes) -> tuple[int, ...]:
    """The captured layers of a binary row, read without the rest of it.

    Raises RecordError if ``data`` is not one whole row of a known version.
    """
    _, bounds, layout = _read(data)
    return _layers_in(data, bounds[-1], layout)


def with_phase(data: bytes, phase: ThinkPhase) -> bytes:
    """A binary row with another ``think_phase``, which is known later than the rest."""
    return data[:_PHASE_AT] + bytes((PHASES.index(phase),)) + data[_PHASE_AT + 1 :]


def row_without_tokens(data: bytes) -> bytes:
    """A binary row without token ids. What is no whole row with ids is given back as it is."""
    if not has_tokens(data) or len(data) < STRUCT.size:
        return data
    header = Header.read(data)
    layout, start = header.layout, header.bounds[-1]
    if len(data) != start + layout.size:
        return data
    pieces = [data[start + at : start + end] for at, end in layout.without_tokens]
    version = _WITHOUT_TOKENS[data[_VERSION_AT : _VERSION_AT + 1]]
    return b"".join((data[:_VERSION_AT], version, data[_VERSION_AT + 1 : start], *pieces))


def has_tokens(data: bytes) -> bool:
    """Whether a binary row is of the version that has token ids."""
    return data[_VERSION_AT : _VERSION_AT + 1] in _WITHOUT_TOKENS


class _Front:
    """What rows of one layout share, and what is each row's own; see `_front`."""

    def __init__(self, header: Header, texts: bytes, layers: bytes, problem: str) -> None:
        self.layout = header.layout
        self.layers = layers  # the section
        self.places = [*self.layout.places.values()]  # of the sections behind the head
        if self.places[0].name == "layers":  # then all rows have the same there, and the head takes it along
            self.places.pop(0)
            texts += layers
        self.ahead = self.layout.size - sum(place.size for place in self.places)
        self.values = attrgetter(*(place.name for place in self.places))
        #: Of each place: the bytes there, where rows share them; whether it is one number; type and bytes.
        self.parts = [
            (layers if place.name == "layers" else None, not place.shape, place.dtype, place.size)
            for place in self.places
        ]
        self._struct, count = header.struct
        self._fields, self._texts, self._problem = [*header][:count], texts, problem

    def head(self, row: RowName | RowData) -> list[bytes]:
        """The header of a row and the rest of its head, in pieces. Raises RecordError where one does not fit."""
        if self._problem:
            raise _misfit(row, self._problem)
        try:
            request_id = row.request_id.encode()  # a JSON body can hold lone surrogates, which have no UTF-8
            fields = self._fields.copy()
            fields[_CHOICE] = row.choice
            fields[_ID_SIZE] = len(request_id)
            fields[_STEP] = -1 if row.decode_step is None else row.decode_step
            fields[_POSITION] = row.query_position
            return [self._struct.pack(*fields), request_id, self._texts]
        except (struct.error, UnicodeEncodeError) as error:
            raise _misfit(row, f"{error}; {_REMEDY}") from error


@lru_cache(maxsize=256)
def _front(
    layers: tuple[int, ...],
    spans: tuple[str, ...],
    shape: tuple[int, ...],  # of the positions
    version: int,
    mode: Mode,
    phase: ThinkPhase,
    model: str,
    heads: tuple[int, int, int],
) -> _Front:
    """What such rows share; what is wrong with it is told when a row, which has a key to name, is to be packed."""
    count, k = shape if len(shape) == 2 else (len(layers), 0)
    names, problem, texts, numbers = NAME_SEPARATOR.join(spans), "", (b"", b""), b""
    try:
        texts = model.encode(), names.encode()
        numbers = np.asarray(layers, _NUMBERS).tobytes()
    except (UnicodeEncodeError, OverflowError) as error:
        problem = f"{error}; {_REMEDY}"
    if len(layers) != count:
        problem = f"its arrays disagree: {len(layers)} layers, positions of shape {shape}"
    if not layers or (spans and _split(names, len(spans)) != spans):
        problem = (
            f"{len(layers)} layers, spans {spans!r}; capture at least one layer and give spans names without control "
            "characters"
        )
    header = Header(
        magic=MAGIC,
        version=version,
        mode=MODES.index(mode),
        phase=PHASES.index(phase),
        spans=len(spans),
        layers=count,
        k=k,
        model_size=len(texts[0]),
        names_size=len(texts[1]),
        heads=heads[0],
        head_k=heads[1],
        head_kinds=heads[2],
        **dict.fromkeys(_OF_ROWS, 0),
    )
    return _Front(header, b"".join(texts), numbers, problem)


def _check_tokens(row: RowData, ids: np.ndarray) -> None:
    """Raise RecordError unless all are ids, or -1, and there is one for each position."""
    if ids.shape != row.token_positions.shape or not is_token(row.query_token) or (ids < UNKNOWN).any():
        raise _misfit(
            row,
            f"query token {row.query_token!r}, token ids of shape {ids.shape} from {ids.min(initial=UNKNOWN)} up for "
            f"positions of shape {row.token_positions.shape}",
        )


def _split(names: str, count: int) -> tuple[str, ...] | None:
    """The ``count`` joined names, or None where there are more or fewer."""
    parts = tuple(names.split(NAME_SEPARATOR)) if count or names else ()
    return parts if len(parts) == count else None


def _layers_in(data: bytes, start: int, layout: RowLayout) -> tuple[int, ...]:
    place = layout.places["layers"]
    return _numbers_of(bytes(data[start + place.at : start + place.at + place.size]))


@lru_cache(maxsize=64)
def _numbers_of(layers: bytes) -> tuple[int, ...]:
    """The numbers that a section of layers holds; rows read together were captured at few sets of layers."""
    return tuple(np.frombuffer(layers, _NUMBERS).tolist())


def _misfit(row: RowName | RowData, why: str) -> RecordError:
    return RecordError(f"record {row.key!r} does not fit the binary row: {why}")


def _read(data: bytes) -> tuple[Header, tuple[int, ...], RowLayout]:
    """A whole row's header, `Header.bounds` and layout. Raises RecordError unless it is one of a known version."""
    if len(data) < STRUCT.size or data[: len(MAGIC)] != MAGIC:
        raise RecordError(f"not an attnhook record: {len(data)} bytes that begin with {bytes(data[:4])!r}")
    header = Header.read(data)
    if header.version not in ROW_VERSIONS:
        raise RecordError(
            f"record of schema version {header.version}; this attnhook reads {ROW_VERSIONS[0]} to {ROW_VERSIONS[-1]}: "
            "upgrade attnhook"
        )
    bounds, layout = header.bounds, header.layout
    expected = bounds[-1] + layout.size
    if len(data) != expected:
        raise RecordError(f"damaged record: {len(data)} bytes where its header announces {expected}")
    if not header.is_sound:
        raise RecordError(
            f"damaged record: mode {header.mode}, phase {header.phase}, {header.layers} layers, decode step "
            f"{header.step}, query position {header.position} in its header"
        )
    return header, bounds, layout
