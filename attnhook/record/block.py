"""Many binary rows read at once: several times faster than `TokenRecord.from_bytes` one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.arrow import NAMES
from attnhook.record.columns import Columns, fits_columns
from attnhook.record.layout import (
    LONG_HEADER,
    MAGIC,
    NAME_SEPARATOR,
    ROW_VERSIONS,
    SECTIONS,
    STRUCT,
    Header,
    Place,
    RowLayout,
    Shape,
    layout_of,
    sections_size,
)
from attnhook.record.packing import row_without_tokens
from attnhook.record.row import MODES, PHASES
from attnhook.record.sink_mass import free_means
from attnhook.record.token_record import TokenRecord
from attnhook.record.zones import ZONE_NAMES, are_fingerprints, classify_many

_FINGERPRINT = MODES.index("fingerprint")
_ROW_MEMORY = 320  # bytes of a row's header, names and fingerprint, beside the row itself
_ZONES, _MODES, _PHASES = (np.array(names, object) for names in (ZONE_NAMES, MODES, PHASES))


class RowBlock:
    """Good rows, decoded as far as counting needs; `records` decodes the rest.

    ``ids`` and ``models`` are the rows' request ids and model names, ``steps`` int32 [N] (-1 for prompt rows),
    ``tokens`` bool [N] whether a row has token ids, ``tell_sink`` bool [N] whether it has sink masses,
    ``fingerprints`` float32 [N, 20] the means over each row's layers, ``zones`` int8 [N] indices into
    `ZONE_NAMES`, and ``nbytes`` about the memory that all this takes. Made by `read_rows`, whose work and memory are
    bounded by the rows' number and bytes, whatever is in them.
    """

    def __init__(self, rows: Sequence[bytes], zones: np.ndarray | None = None) -> None:
        self._data = b"".join(rows)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        self._starts = np.cumsum(lengths) - lengths
        self.nbytes = len(self._data) + _ROW_MEMORY * len(rows)
        self._header = Header.read_many(self._gather(self._starts, LONG_HEADER, 1)[:, 0])
        ids_at, models_at, self._names_at, self._bodies = (self._starts + bound for bound in self._header.bounds)
        self._unreadable: list[int] = []  # rows whose id or model is no UTF-8
        self.ids: list[str] = self._texts(ids_at, models_at)
        self.models: list[str] = self._texts(models_at, self._names_at)
        self.steps: np.ndarray = self._header.step
        self.tokens: np.ndarray = self._header.shape.tokens
        self.tell_sink: np.ndarray = self._header.shape.sink
        self._order, self._ends, self._shapes = self._by_shape()
        self.fingerprints: np.ndarray = self._means()
        self.zones = np.zeros(len(rows), np.int8) if zones is None else zones

    def __len__(self) -> int:
        return len(self.ids)

    def records(self) -> list[TokenRecord]:
        """The rows as records, in order, with their fingerprints and zones filled in."""
        found: list[TokenRecord] = [None] * len(self)  # type: ignore[list-item] # every row has a layout
        for where, layout in self._layouts():
            fields = self._sections(where, layout) | self._others(where, layout)
            for row, values in zip(where.tolist(), zip(*fields.values(), strict=True), strict=True):
                record = object.__new__(TokenRecord)
                # a frozen dataclass sets its fields by one slow call each; strict=True would cost a third of all this
                record.__dict__.update(zip(fields, values))  # noqa: B905
                found[row] = record
        return found

    def columns(self, time: int) -> Columns:
        """The rows as the stores' columns, stored at ``time`` (microseconds since 1970, UTC); no record is decoded."""
        header = self._header
        rows: list[bytes | None] = [*self.rows()]
        layer: list[int | None] = [None] * len(self)
        query: list[int | None] = [None] * len(self)
        sink: list[float | None] = [None] * len(self)
        for where, layout in self._layouts():
            if (place := layout.places.get("query_token")) is not None:
                _put(query, where, self._numbers(where, place))
            if (place := layout.places.get("sink_mass")) is not None:
                _put(sink, where, self._numbers(where, place).mean(axis=1, dtype=np.float64))
            if fits_columns(layout):
                lean = where[header.mode[where] == _FINGERPRINT]
                _put(layer, lean, self._numbers(lean, layout.places["layers"]).ravel())
                for row in lean.tolist():
                    rows[row] = None
        return Columns(
            request_id=self.ids,
            choice=header.choice.tolist(),
            query_position=header.position.tolist(),
            decode_step=_steps(self.steps),
            model=self.models,
            time=[time] * len(self),
            zone=_ZONES[self.zones].tolist(),
            mode=_MODES[header.mode].tolist(),
            think_phase=_PHASES[header.phase].tolist(),
            layer=layer,
            fingerprint=self.fingerprints,
            record=rows,
            query_token=query,
            sink_mass=sink,
        )

    def part(self, start: int, stop: int) -> RowBlock:
        """Rows ``start`` to ``stop``, as a block."""
        return RowBlock(self.rows()[start:stop], self.zones[start:stop])

    def without(self, keys: set[tuple[str, int, int]]) -> RowBlock:
        """The rows whose (request id, choice, query position) is not in ``keys``, as a block."""
        own = zip(self.ids, self._header.choice.tolist(), self._header.position.tolist(), strict=True)
        kept = np.array([key not in keys for key in own], bool)
        rows = [row for row, keep in zip(self.rows(), kept.tolist(), strict=True) if keep]
        return RowBlock(rows, self.zones[kept])

    def without_tokens(self) -> RowBlock:
        """The same rows without token ids."""
        return RowBlock([row_without_tokens(row) for row in self.rows()], self.zones)

    def rows(self) -> list[bytes]:
        """The rows, each as bytes."""
        ends = [*self._starts[1:].tolist(), len(self._data)] if len(self) else []
        return [self._data[start:end] for start, end in zip(self._starts.tolist(), ends, strict=True)]

    def sound(self) -> np.ndarray:
        """bool [N]: the names are UTF-8 and as many as announced, the numbers finite, the token ids from -1 up."""
        sound = np.ones(len(self), bool)
        sound &= np.isfinite(self.fingerprints).all(axis=1)
        for where, layout in self._layouts():
            for place in layout.places.values():
                if place.dtype.kind == "f" and place.name != "fingerprints":  # their means have told
                    sound[where] &= np.isfinite(self._plain(where, place)).all(axis=1)
                elif place.section.least is not None:
                    sound[where] &= (self._plain(where, place) >= place.section.least).all(axis=1)
            if layout.shape.spans or self._header.names_size[where].any():
                for row in where.tolist():
                    sound[row] &= self._has_names(row, layout.shape.spans)
        sound[self._unreadable] = False
        return sound

    def _texts(self, starts: np.ndarray, ends: np.ndarray) -> list[str]:
        """The text between each row's two places; rows where it is no UTF-8 get "" and go to ``_unreadable``."""
        data = self._data
        raw = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        known: dict[bytes, str | None] = {}
        for one in set(raw):  # a frame has few requests and models
            try:
                known[one] = one.decode()
            except UnicodeDecodeError:
                known[one] = None
        found = [known[one] for one in raw]
        if None in known.values():
            self._unreadable += [row for row, text in enumerate(found) if text is None]
        return [text or "" for text in found] if self._unreadable else found  # type: ignore[return-value] # no None

    def _has_names(self, row: int, spans: int) -> bool:
        """Whether a row has as many names of spans as spans, in UTF-8."""
        raw = self._raw_names(row)
        try:
            raw.decode()
        except UnicodeDecodeError:
            return False
        return raw.count(NAME_SEPARATOR.encode()) + 1 == spans if spans or raw else True

    def _raw_names(self, row: int) -> bytes:
        return self._data[self._names_at[row] : self._bodies[row]]

    def _span_names(self, row: int) -> tuple[str, ...]:
        """The names of a sound row's spans, of which there are some."""
        return tuple(self._raw_names(row).decode().split(NAME_SEPARATOR))

    def _means(self) -> np.ndarray:
        """float32 [N, 20]: each row's fingerprints, mean over its layers."""
        found = np.empty((len(self), fp.SIZE), np.float32)
        for where, layout in self._layouts():
            own = self._numbers(where, layout.places["fingerprints"])
            mean = own[:, 0] if own.shape[1] == 1 else own.mean(axis=1, dtype=np.float64).astype(np.float32)
            if len(mean) == len(found):  # all rows, in order
                return mean
            found[where] = mean
        return found

    def free_fingerprints(self) -> tuple[np.ndarray, np.ndarray]:
        """`TokenRecord.free_fingerprint` of each row, float32 [N, 20], and whether it can be told, bool [N]."""
        found, sound = self.fingerprints, np.ones(len(self), bool)
        for where, layout in self._layouts():
            if (place := layout.places.get("sink_mass")) is not None:
                own = self._numbers(where, layout.places["fingerprints"])
                means, good = free_means(own, self._numbers(where, place), self._header.position[where])
                if len(means) == len(found):  # all rows, in order
                    return means, good
                found = self.fingerprints.copy() if found is self.fingerprints else found
                found[where], sound[where] = means, good
        return found, sound

    def _by_shape(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows by their shapes, where those of each shape end in that order, and the shapes [M, 4]."""
        shapes = np.stack(self._header.shape)
        if (shapes == shapes[:, :1]).all():  # in a frame all are alike, as a rule
            return np.arange(shapes.shape[1]), np.array([shapes.shape[1]]), shapes[:, :1].T
        kinds, which = np.unique(shapes, axis=1, return_inverse=True)
        return np.argsort(which.ravel(), kind="stable"), np.cumsum(np.bincount(which.ravel())), kinds.T

    def _layouts(self) -> Iterator[tuple[np.ndarray, RowLayout]]:
        """The rows of each layout. No layout is kept: it is larger than a small row, and each row may have its own."""
        start = 0
        for end, shape in zip(self._ends.tolist(), self._shapes.tolist(), strict=False):  # no rows, no shape
            yield self._order[start:end], layout_of(Shape(*shape))
            start = end

    def _sections(self, where: np.ndarray, layout: RowLayout) -> dict[str, Iterable[Any]]:
        """The sections of these rows as a record's fields; what they do not have is what a record without it has."""
        found: dict[str, Iterable[Any]] = {}
        for section in SECTIONS:
            place = layout.places.get(section.name)
            if place is None:
                found[section.name] = [getattr(TokenRecord, section.name)] * len(where)
                continue
            numbers = self._numbers(where, place)
            if section.name == "layers":
                found[section.name] = map(tuple, numbers.tolist())
            else:
                found[section.name] = numbers if section.axes else numbers.tolist()
        return found

    def _others(self, where: np.ndarray, layout: RowLayout) -> dict[str, Iterable[Any]]:
        """What else these rows have as a record's fields, and what a record finds out about itself."""
        rows, header, spans = where.tolist(), self._header, layout.shape.spans
        return {
            "request_id": [self.ids[row] for row in rows],
            "model": [self.models[row] for row in rows],
            "span_names": [self._span_names(row) for row in rows] if spans else [()] * len(rows),
            "query_position": header.position[where].tolist(),
            "decode_step": _steps(self.steps[where]),
            "choice": header.choice[where].tolist(),
            "mode": _MODES[header.mode[where]].tolist(),
            "think_phase": _PHASES[header.phase[where]].tolist(),
            "fingerprint": map(self.fingerprints.__getitem__, rows),  # where cached_property keeps it, as the zone
            "zone": _ZONES[self.zones[where]].tolist(),
        }

    def _numbers(self, where: np.ndarray, place: Place) -> np.ndarray:
        """Array [len(where), ...] of that section of these rows."""
        return self._plain(where, place).reshape(len(where), *place.shape)

    def _plain(self, where: np.ndarray, place: Place) -> np.ndarray:
        """The same as [len(where), numbers]."""
        return self._gather(self._bodies[where] + place.at, place.dtype, place.length)

    def _gather(self, starts: np.ndarray, dtype: np.dtype[Any], length: int) -> np.ndarray:
        """Array [len(starts), length] of what begins at these places, contiguous and of its own."""
        size = length * dtype.itemsize
        if not len(starts) or not size:
            return np.zeros((len(starts), length), dtype)
        step = int(starts[1] - starts[0]) if len(starts) > 1 else size
        first = int(starts[0])
        if step >= size and (len(starts) < 3 or (np.diff(starts) == step).all()):  # columns of a table
            return np.ndarray((len(starts), length), dtype, self._data, first, (step, dtype.itemsize)).copy()
        data = self._data
        whole = bytearray().join([data[at : at + size] for at in starts.tolist()])
        return np.frombuffer(whole, dtype).reshape(len(starts), length)


def read_rows(rows: Sequence[bytes]) -> tuple[RowBlock, Counter[str]]:
    """Decode rows that `TokenRecord.to_bytes` made.

    Returns the good ones and how many are not: ``record_version`` for those of another schema version,
    ``damaged_record`` for the rest (cut, not finite, no attention fingerprint).
    """
    bad: Counter[str] = Counter()
    rows = _whole(rows, bad)
    block = RowBlock(rows)
    sound = block.sound()
    if not sound.all():
        bad["damaged_record"] += int((~sound).sum())
        rows = [row for row, good in zip(rows, sound.tolist(), strict=True) if good]
        block = RowBlock(rows)
    zones = _zones(block)
    if (zones < 0).any():
        bad["damaged_record"] += int((zones < 0).sum())
        rows = [row for row, zone in zip(rows, zones.tolist(), strict=True) if zone >= 0]
        return RowBlock(rows, zones[zones >= 0]), bad
    block.zones = zones
    return block, bad


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of several columns, in order."""
    if len(parts) == 1:
        return parts[0]
    lists: dict[str, Any] = {name: list(chain.from_iterable(getattr(part, name) for part in parts)) for name in NAMES}
    lists["fingerprint"] = np.concatenate([part.fingerprint for part in parts])
    return Columns(**lists)


def _whole(rows: Sequence[bytes], bad: Counter[str]) -> Sequence[bytes]:
    """The rows of a known version that are as long as their headers announce."""
    size = LONG_HEADER.itemsize
    table = np.frombuffer(b"".join([row[:size].ljust(size, b"\0") for row in rows]), LONG_HEADER)
    header = Header.read_many(table)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ours = header.magic == MAGIC
    other = ours & (lengths >= STRUCT.size) & ~np.isin(header.version, ROW_VERSIONS)
    announced = header.bounds[-1] + sections_size(header.shape)
    fine = ours & ~other & (announced == lengths) & header.is_sound
    if fine.all():
        return rows
    for reason, count in (("record_version", other.sum()), ("damaged_record", (~fine & ~other).sum())):
        if count:
            bad[reason] += int(count)
    return [row for row, good in zip(rows, fine.tolist(), strict=True) if good]


def _steps(steps: np.ndarray) -> list[int | None]:
    """Decode steps as records have them."""
    found: list[int | None] = steps.tolist()
    for row in np.flatnonzero(steps < 0).tolist():
        found[row] = None
    return found


def _put(column: list[Any], where: np.ndarray, numbers: np.ndarray) -> None:
    """Write the numbers [n] of rows ``where`` [n] to their places in a column."""
    for row, number in zip(where.tolist(), numbers.tolist(), strict=True):
        column[row] = number


def _zones(block: RowBlock) -> np.ndarray:
    """int8 [N], of the attention without the sink; -1 where it is no attention fingerprint."""
    fingerprints, sound = block.free_fingerprints()
    sound = sound & are_fingerprints(block.fingerprints) & are_fingerprints(fingerprints)
    if sound.all():
        return classify_many(fingerprints)[0]
    codes = np.full(len(fingerprints), -1, np.int8)
    codes[sound] = classify_many(fingerprints[sound])[0]
    return codes
