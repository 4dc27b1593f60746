"""Many binary rows read at once: several times faster than `TokenRecord.from_bytes` one by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.columns import NAMES, Columns
from attnhook.record.token_record import (
    HEADER_FIELDS,
    MAGIC,
    MODES,
    NAME_SEPARATOR,
    PHASES,
    TOKENS_VERSION,
    VERSIONS,
    TokenRecord,
    row_size,
    row_without_tokens,
)
from attnhook.record.zones import ZONE_NAMES, are_fingerprints, classify_many

_FINGERPRINT = MODES.index("fingerprint")
_HEADER = np.dtype(HEADER_FIELDS)
_ROW_MEMORY = 320  # bytes of a row's header, names and fingerprint, beside the row itself
_ZONES, _MODES, _PHASES = (np.array(names, object) for names in (ZONE_NAMES, MODES, PHASES))


class RowBlock:
    """Good rows, decoded as far as counting needs; `records` decodes the rest.

    ``ids`` and ``models`` are the rows' request ids and model names, ``steps`` int32 [N] (-1 for prompt rows),
    ``tokens`` bool [N] whether a row has token ids,
    ``fingerprints`` float32 [N, 20] the means over each row's layers, ``zones`` int8 [N] indices into
    `ZONE_NAMES`, and ``nbytes`` about the memory that all this takes. Made by `read_rows`, whose work and memory are
    bounded by the rows' number and bytes, whatever is in them.
    """

    def __init__(self, rows: Sequence[bytes], zones: np.ndarray | None = None) -> None:
        self._data = b"".join(rows)
        self._flat = np.frombuffer(self._data, np.uint8)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        self._starts = np.cumsum(lengths) - lengths
        self.nbytes = len(self._data) + _ROW_MEMORY * len(rows)
        self._header = self._gather(self._starts, _HEADER.itemsize).view(_HEADER).reshape(len(rows))
        self._bodies = self._starts + _HEADER.itemsize + _text(self._header)  # where each row's numbers begin
        self._names()
        self.steps: np.ndarray = self._header["step"]
        self.tokens: np.ndarray = self._header["version"] == TOKENS_VERSION
        self.fingerprints = np.zeros((len(rows), fp.SIZE), np.float32)
        for where, (layers, k, _, _) in self._shapes():
            at = layers * (2 + 8 * k)
            own = self._numbers(where, at, "<f4", layers, fp.SIZE)
            self.fingerprints[where] = own[:, 0] if layers == 1 else own.mean(axis=1, dtype=np.float64)
        self.zones = np.zeros(len(rows), np.int8) if zones is None else zones

    def __len__(self) -> int:
        return len(self.ids)

    def records(self) -> list[TokenRecord]:
        """The rows as records, in order, with their fingerprints and zones filled in."""
        header = {name: self._header[name].tolist() for name in ("mode", "phase", "choice", "position", "step")}
        zones = [ZONE_NAMES[code] for code in self.zones.tolist()]
        found: list[TokenRecord] = [None] * len(self)  # type: ignore[list-item] # every row is in one shape
        for where, (layers, k, spans, ids) in self._shapes():
            numbers = self._numbers(where, 0, "<i2", layers)
            tokens = self._numbers(where, at := 2 * layers, "<i4", layers, k)
            scores = self._numbers(where, at := at + 4 * layers * k, "<f4", layers, k)
            prints = self._numbers(where, at := at + 4 * layers * k, "<f4", layers, fp.SIZE)
            masses = self._numbers(where, at := at + 4 * layers * fp.SIZE, "<f4", layers, spans)
            own = self._numbers(where, at := at + 4 * layers * spans, "<i4", ids)
            of_keys = self._numbers(where, at + 4, "<i4", layers, k) if ids else None
            for i, row in enumerate(where.tolist()):
                record = object.__new__(TokenRecord)
                # a frozen dataclass sets its fields by one slow call each
                record.__dict__.update(
                    request_id=self.ids[row],
                    query_position=header["position"][row],
                    layers=tuple(numbers[i].tolist()),
                    token_positions=tokens[i],
                    attention_scores=scores[i],
                    fingerprints=prints[i],
                    decode_step=None if header["step"][row] < 0 else header["step"][row],
                    choice=header["choice"][row],
                    mode=MODES[header["mode"][row]],
                    think_phase=PHASES[header["phase"][row]],
                    model=self.models[row],
                    span_names=self._span_names(row, spans),
                    span_mass=masses[i],
                    query_token=int(own[i, 0]) if ids else -1,
                    token_ids=None if of_keys is None else of_keys[i],
                    fingerprint=self.fingerprints[row],  # where cached_property keeps it, as the zone
                    zone=zones[row],
                )
                found[row] = record
        return found

    def columns(self, time: int) -> Columns:
        """The rows as the stores' columns, stored at ``time`` (microseconds since 1970, UTC); no record is decoded."""
        header = self._header
        rows: list[bytes | None] = [*self.rows()]
        layer: list[int | None] = [None] * len(self)
        step: list[int | None] = self.steps.tolist()
        for row in np.flatnonzero(self.steps < 0).tolist():
            step[row] = None
        lean = (header["mode"] == _FINGERPRINT) & (header["layers"] == 1) & (header["k"] == 0) & (header["spans"] == 0)
        for row in np.flatnonzero(lean).tolist():  # the columns alone hold all of such a record
            layer[row] = int(np.frombuffer(self._data, "<i2", 1, int(self._bodies[row]))[0])
            rows[row] = None
        query: list[int | None] = [None] * len(self)
        for row in np.flatnonzero(self.tokens).tolist():
            query[row] = self._query_token(row)
        return Columns(
            request_id=self.ids,
            choice=header["choice"].tolist(),
            query_position=header["position"].tolist(),
            decode_step=step,
            model=self.models,
            time=[time] * len(self),
            zone=_ZONES[self.zones].tolist(),
            mode=_MODES[header["mode"]].tolist(),
            think_phase=_PHASES[header["phase"]].tolist(),
            layer=layer,
            fingerprint=self.fingerprints,
            record=rows,
            query_token=query,
        )

    def _query_token(self, row: int) -> int:
        header = self._header[row : row + 1]
        layers, k, spans = (int(header[name][0]) for name in ("layers", "k", "spans"))
        at = int(self._starts[row]) + row_size(layers, k, spans, int(_text(header)[0]))
        return int(np.frombuffer(self._data, "<i4", 1, at)[0])

    def part(self, start: int, stop: int) -> RowBlock:
        """Rows ``start`` to ``stop``, as a block."""
        return RowBlock(self.rows()[start:stop], self.zones[start:stop])

    def without(self, keys: set[tuple[str, int, int]]) -> RowBlock:
        """The rows whose (request id, choice, query position) is not in ``keys``, as a block."""
        own = zip(self.ids, self._header["choice"].tolist(), self._header["position"].tolist(), strict=True)
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
        for where, (layers, k, spans, ids) in self._shapes():
            at = layers * (2 + 4 * k)
            sound[where] &= np.isfinite(self._numbers(where, at, "<f4", layers * k)).all(axis=1)
            at += layers * (4 * k + 4 * fp.SIZE)
            sound[where] &= np.isfinite(self._numbers(where, at, "<f4", layers * spans)).all(axis=1)
            if ids:
                at += 4 * layers * spans
                sound[where] &= (self._numbers(where, at, "<i4", 1 + layers * k) >= -1).all(axis=1)
            if spans or self._header["names_size"][where].any():
                for row in where.tolist():
                    sound[row] &= self._has_names(row, spans)
        for row in self._unreadable:
            sound[row] = False
        return sound

    def _names(self) -> None:
        self._unreadable: list[int] = []
        starts = self._starts + _HEADER.itemsize
        middles = starts + self._header["id_size"]
        self.ids: list[str] = self._texts(starts, middles)
        self.models: list[str] = self._texts(middles, middles + self._header["model_size"])

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
        stop = int(self._bodies[row])
        return self._data[stop - int(self._header["names_size"][row]) : stop]

    def _span_names(self, row: int, spans: int) -> tuple[str, ...]:
        """The names of a sound row's spans."""
        return tuple(self._raw_names(row).decode().split(NAME_SEPARATOR)) if spans else ()

    def _shapes(self) -> Iterator[tuple[np.ndarray, tuple[int, int, int, int]]]:
        """The rows of each (layers, k, spans, 1 with token ids); in a frame all are alike, as a rule."""
        header = self._header
        if not len(header):
            return
        numbers = [header[name].astype(np.int64) for name in ("layers", "k", "spans")]
        columns = np.stack([*numbers, self.tokens])
        if (columns == columns[:, :1]).all():
            yield np.arange(len(header)), tuple(columns[:, 0].tolist())
            return
        kinds, which = np.unique(columns, axis=1, return_inverse=True)
        order = np.argsort(which.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(which.ravel()))
        for i, where in enumerate(np.split(order, ends[:-1])):
            yield where, tuple(kinds[:, i].tolist())

    def _numbers(self, where: np.ndarray, at: int, dtype: str, *shape: int) -> np.ndarray:
        """Array [len(where), *shape] of what lies ``at`` bytes behind the names of these rows."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return self._gather(self._bodies[where] + at, size).view(dtype).reshape(len(where), *shape)

    def _gather(self, starts: np.ndarray, size: int) -> np.ndarray:
        """uint8 [len(starts), size] of what begins at these places, contiguous and writable by nobody else."""
        if not len(starts) or not size:
            return np.zeros((len(starts), size), np.uint8)
        step = int(starts[1] - starts[0]) if len(starts) > 1 else size
        first = int(starts[0])
        if step >= size and (starts == first + np.arange(len(starts)) * step).all():  # columns of a table
            table = np.lib.stride_tricks.as_strided(self._flat[first:], (len(starts), size), (step, 1), writeable=False)
            return np.ascontiguousarray(table) if step > size else table.copy()
        data = self._data
        return np.frombuffer(bytearray().join([data[at : at + size] for at in starts.tolist()]), np.uint8).reshape(
            len(starts), size
        )


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
    zones = _zones(block.fingerprints)
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
    size = _HEADER.itemsize
    header = np.frombuffer(b"".join([row[:size].ljust(size, b"\0") for row in rows]), _HEADER)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ours = header["magic"] == MAGIC
    other = ours & (lengths >= size) & ~np.isin(header["version"], VERSIONS)
    wide = {name: header[name].astype(np.int64) for name in ("layers", "k", "spans")}
    announced = row_size(wide["layers"], wide["k"], wide["spans"], _text(header), header["version"] == TOKENS_VERSION)
    fine = ours & ~other & (announced == lengths) & (wide["layers"] > 0)
    fine &= (header["mode"] < len(MODES)) & (header["phase"] < len(PHASES))
    if fine.all():
        return rows
    for reason, count in (("record_version", other.sum()), ("damaged_record", (~fine & ~other).sum())):
        if count:
            bad[reason] += int(count)
    return [row for row, good in zip(rows, fine.tolist(), strict=True) if good]


def _text(header: np.ndarray) -> np.ndarray:
    sizes: np.ndarray = header["id_size"].astype(np.int64) + header["model_size"] + header["names_size"]
    return sizes


def _zones(fingerprints: np.ndarray) -> np.ndarray:
    """int8 [N]; -1 where it is no attention fingerprint."""
    sound = are_fingerprints(fingerprints)
    if sound.all():
        return classify_many(fingerprints)[0]
    codes = np.full(len(fingerprints), -1, np.int8)
    codes[sound] = classify_many(fingerprints[sound])[0]
    return codes
