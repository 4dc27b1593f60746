"""The binary row, described once: a header, three texts and sections of numbers, little-endian and without gaps.

The texts are the request id, the model's name and the names of the spans. The header tells their sizes, the numbers of
layers, entries and spans, and by its version whether there are token ids and sink masses. Whoever reads or writes a
row's bytes asks here where a field or a section lies. A new section is a line of `SECTIONS` and a field of `RowData`.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.row import MODES, PHASES, UNKNOWN, RowData

MAGIC = b"AH"
#: Versions of a row: without and with token ids; the same with sink masses.
ROW_VERSIONS = (1, 2, 3, 4)
NAME_SEPARATOR = "\x1f"  # between the names of the spans

_Byte = Annotated[Any, "u1"]
_Short = Annotated[Any, "<u2"]
_Int = Annotated[Any, "<i4"]


class Header(NamedTuple):
    """The header of one row, or of N rows at once: then each field, and all that is made of it, is an array [N]."""

    magic: Annotated[Any, "S2"]
    version: _Byte
    mode: _Byte  # index into MODES
    phase: _Byte  # index into PHASES
    spans: _Byte
    choice: _Short
    layers: _Short
    k: _Short
    id_size: _Short  # bytes of the request id
    model_size: _Short  # of the model's name
    names_size: _Short  # of the spans' names with what separates them
    step: _Int  # decode step, -1 for a prompt row
    position: _Int  # query position

    @classmethod
    def read(cls, data: bytes) -> Header:
        """What ``data`` begins with; it has at least ``HEADER.itemsize`` bytes."""
        return cls._make(STRUCT.unpack_from(data))

    @classmethod
    def read_many(cls, table: np.ndarray) -> Header:
        """The headers of N rows, from an array [N] of `HEADER`; what sizes are made of as int64."""
        return cls(**{name: table[name].astype(np.int64) if name in _WIDE else table[name] for name in cls._fields})

    @property
    def shape(self) -> Shape:
        """What the sections' sizes follow from."""
        return Shape(self.layers, self.k, self.spans, *_optional(self.version))

    @property
    def layout(self) -> RowLayout:
        """`layout_of` the shape of one row."""
        return _layout(self.layers, self.k, self.spans, *_optional(self.version))

    @property
    def bounds(self) -> tuple[Any, Any, Any, Any]:
        """Where in the row the request id, the model's name, the spans' names and the sections begin."""
        first = STRUCT.size
        return first, (second := first + self.id_size), (third := second + self.model_size), third + self.names_size

    @property
    def is_sound(self) -> Any:
        """Whether a row can have these numbers."""
        known = (self.mode < len(MODES)) & (self.phase < len(PHASES))
        return known & (self.layers > 0) & (self.step >= -1) & (self.position >= 0)


def _optional(version: Any) -> tuple[Any, Any]:
    """Whether rows of that version have token ids, and sink masses."""
    return version % 2 == 0, version > 2


def version_of(tokens: bool, sink: bool) -> int:
    """The version of rows with or without token ids and sink masses."""
    return 1 + tokens + 2 * sink


_WIDE = {"spans", "layers", "k", "id_size", "model_size", "names_size"}
#: The header's fields, as `numpy.dtype` takes them.
HEADER_FIELDS: list[tuple[str, str]] = [
    (name, hint.__metadata__[0]) for name, hint in get_type_hints(Header, include_extras=True).items()
]
#: The header, for many rows at a time.
HEADER = np.dtype(HEADER_FIELDS)
_KINDS = [HEADER[name] for name, _ in HEADER_FIELDS]
#: The same for `Header`, one row at a time.
STRUCT = struct.Struct("<" + "".join(f"{kind.itemsize}s" if kind.kind == "S" else kind.char for kind in _KINDS))
#: Where each field of the header begins.
FIELD_AT = dict(zip(Header._fields, accumulate((kind.itemsize for kind in _KINDS), initial=0), strict=False))


class Shape(NamedTuple):
    """What a row's sections depend on, of one row or, as arrays [N], of N."""

    layers: Any
    k: Any
    spans: Any
    tokens: Any = False  # whether there are token ids
    sink: Any = False  # whether there are sink masses

    @classmethod
    def of(cls, row: RowData) -> Shape:
        """That of a record's row; a record whose arrays disagree has none, which shows when it is packed."""
        layers, k = row.token_positions.shape if row.token_positions.ndim == 2 else (len(row.layers), 0)
        return cls(layers, k, len(row.span_names), row.token_ids is not None, row.sink_mass is not None)


class Section(NamedTuple):
    """Numbers of a row: a field of `RowData`."""

    name: str
    dtype: np.dtype[Any]
    axes: tuple[str | int, ...]  # a field of `Shape`, or a length that never changes
    when: str = ""  # the field of `Shape` that tells whether a row has it; "": every row
    least: int | None = None  # of whole numbers: none is below


_NUMBER, _INT, _FLOAT = np.dtype("<i2"), np.dtype("<i4"), np.dtype("<f4")
#: In the order in which they lie in a row.
SECTIONS: tuple[Section, ...] = (
    Section("layers", _NUMBER, ("layers",)),
    Section("token_positions", _INT, ("layers", "k")),
    Section("attention_scores", _FLOAT, ("layers", "k")),
    Section("fingerprints", _FLOAT, ("layers", fp.SIZE)),
    Section("span_mass", _FLOAT, ("layers", "spans")),
    Section("sink_mass", _FLOAT, ("layers",), when="sink"),
    Section("query_token", _INT, (), when="tokens", least=UNKNOWN),
    Section("token_ids", _INT, ("layers", "k"), when="tokens", least=UNKNOWN),
)


class Place(NamedTuple):
    """Where a section lies in rows of one shape."""

    name: str
    dtype: np.dtype[Any]
    at: int  # bytes behind where the sections begin
    size: int  # bytes
    shape: tuple[int, ...]
    length: int  # numbers
    section: Section


class RowLayout:
    """Where the sections lie in rows of one shape; see `layout_of`.

    ``places`` has those sections that there are, by name and in order; ``size`` is the bytes of all;
    ``bounded`` has the places whose numbers have a least one, and ``without_tokens`` the pieces, from and to, that a
    row without token ids has.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.places: dict[str, Place] = {}
        self.size = 0
        for section in SECTIONS:
            if not section.when or getattr(shape, section.when):
                own = tuple(axis if isinstance(axis, int) else getattr(shape, axis) for axis in section.axes)
                length = math.prod(own)
                size = length * section.dtype.itemsize
                self.places[section.name] = Place(section.name, section.dtype, self.size, size, own, length, section)
                self.size += size
        self.bounded = [place for place in self.places.values() if place.section.least is not None]
        self.without_tokens = self._without("tokens")

    def _without(self, when: str) -> list[tuple[int, int]]:
        """From where to where a row's sections lie that it has without that: as few pieces as there can be."""
        pieces = [(0, 0)]
        for place in self.places.values():
            if place.section.when != when:
                start, end = pieces[-1]
                if end == place.at:
                    pieces.pop()
                else:
                    start = place.at
                pieces.append((start, place.at + place.size))
        return pieces


def layout_of(shape: Shape) -> RowLayout:
    """The layout of rows of that shape; few shapes are in use at a time."""
    return _layout(*shape)


@lru_cache(maxsize=1024)
def _layout(layers: int, k: int, spans: int, tokens: bool, sink: bool) -> RowLayout:
    return RowLayout(Shape(layers, k, spans, tokens, sink))


def row_size(layers: Any, k: Any, spans: Any, text: Any, tokens: Any = False, sink: Any = False) -> Any:
    """Bytes of a row whose texts take ``text`` bytes; of many rows, where arrays are given.

    ``tokens`` and ``sink``: with token ids, and with sink masses.
    """
    return HEADER.itemsize + text + sections_size(Shape(layers, k, spans, tokens, sink))


def sections_size(shape: Shape) -> Any:
    """Bytes of all sections of a row; of many rows, where the shape has arrays."""
    return sum(math.prod((getattr(shape, axis) for axis in axes), start=size) for axes, size in _TERMS.items())


def _terms() -> dict[tuple[str, ...], int]:
    """What `sections_size` adds up: bytes of all sections that grow with the same fields of `Shape`."""
    found: Counter[tuple[str, ...]] = Counter()
    for section in SECTIONS:
        named = tuple(axis for axis in (section.when, *section.axes) if isinstance(axis, str) and axis)
        found[named] += section.dtype.itemsize * math.prod(axis for axis in section.axes if isinstance(axis, int))
    return dict(found)


_TERMS = _terms()
