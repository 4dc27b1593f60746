"""The binary row, described once: a header, three texts and sections of numbers, little-endian and without gaps.

The texts are the request id, the model's name and the names of the spans. The header tells their sizes, the numbers of
layers, entries and spans, and by its version whether there are token ids, sink masses and numbers per head; with these
it is four bytes longer. Whoever reads or writes a row's bytes asks here where a field or a section lies. A new section
is a line of `SECTIONS` and a field of `RowData`.
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
#: Versions of a row: without and with token ids; the same with sink masses; all four with numbers per head.
ROW_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)
_WITH_HEADS = 5  # the first version that has these
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
    # what follows is there in versions with numbers per head, and 0 in the others
    heads: _Short = 0  # query heads
    head_k: _Byte = 0  # positions of each
    head_kinds: _Byte = 0  # which numbers there are: one bit for each of `HEAD_KINDS`

    @classmethod
    def read(cls, data: bytes) -> Header:
        """What ``data`` begins with; it has at least ``HEADER.itemsize`` bytes."""
        if data[_VERSION_AT] < _WITH_HEADS:
            return cls._make((*STRUCT.unpack_from(data), 0, 0, 0))
        # one that is cut off is not as long as it announces
        return cls._make(LONG_STRUCT.unpack(bytes(data[: LONG_STRUCT.size]).ljust(LONG_STRUCT.size, b"\0")))

    @classmethod
    def read_many(cls, table: np.ndarray) -> Header:
        """The headers of N rows, from an array [N] of `LONG_HEADER`; what sizes are made of as int64."""
        found = {name: table[name].astype(np.int64) if name in _WIDE else table[name] for name in cls._fields}
        for name in _OF_HEADS:  # in the other versions the texts begin there
            found[name] = np.where(table["version"] < _WITH_HEADS, 0, found[name])
        return cls(**found)

    @property
    def struct(self) -> tuple[struct.Struct, int]:
        """How one row's header is written, and how many of the fields."""
        if self.version < _WITH_HEADS:
            return STRUCT, len(self) - len(_OF_HEADS)
        return LONG_STRUCT, len(self)

    @property
    def shape(self) -> Shape:
        """What the sections' sizes follow from."""
        kinds = [self.head_kinds >> bit & 1 for bit in range(len(HEAD_KINDS))]
        return Shape(self.layers, self.k, self.spans, *_optional(self.version), self.heads, self.head_k, *kinds)

    @property
    def layout(self) -> RowLayout:
        """`layout_of` the shape of one row."""
        if self.version < _WITH_HEADS:
            return _layout(self.layers, self.k, self.spans, *_optional(self.version), *_NO_HEADS)
        return _layout(*self.shape)

    @property
    def bounds(self) -> tuple[Any, Any, Any, Any]:
        """Where in the row the request id, the model's name, the spans' names and the sections begin."""
        first = STRUCT.size + (self.version >= _WITH_HEADS) * (LONG_STRUCT.size - STRUCT.size)
        return first, (second := first + self.id_size), (third := second + self.model_size), third + self.names_size

    @property
    def is_sound(self) -> Any:
        """Whether a row can have these numbers."""
        known = (self.mode < len(MODES)) & (self.phase < len(PHASES))
        # numbers per head of no head, or of an unknown kind, are none that were written
        top = (self.head_kinds & 1) == (self.head_k > 0)
        told = top & (self.heads > 0) & (self.head_kinds > 0) & (self.head_kinds < 1 << len(HEAD_KINDS))
        whole = (self.version < _WITH_HEADS) | told
        return known & whole & (self.layers > 0) & (self.step >= -1) & (self.position >= 0)


def _optional(version: Any) -> tuple[Any, Any]:
    """Whether rows of that version have token ids, and sink masses."""
    return version % 2 == 0, (version - 1) // 2 % 2 == 1


def version_of(tokens: bool, sink: bool, heads: bool = False) -> int:
    """The version of rows with or without token ids, sink masses and numbers per head."""
    return 1 + tokens + 2 * sink + 4 * heads


_WIDE = {"spans", "layers", "k", "id_size", "model_size", "names_size", "heads", "head_k"}
_OF_HEADS = ("heads", "head_k", "head_kinds")
_LONG_FIELDS: list[tuple[str, str]] = [
    (name, hint.__metadata__[0]) for name, hint in get_type_hints(Header, include_extras=True).items()
]
#: The fields of the header without those of the heads, as `numpy.dtype` takes them.
HEADER_FIELDS: list[tuple[str, str]] = _LONG_FIELDS[: -len(_OF_HEADS)]
#: The header without numbers per head, and with them, for many rows at a time.
HEADER, LONG_HEADER = np.dtype(HEADER_FIELDS), np.dtype(_LONG_FIELDS)
_KINDS = [LONG_HEADER[name] for name, _ in _LONG_FIELDS]
_CODES = [f"{kind.itemsize}s" if kind.kind == "S" else kind.char for kind in _KINDS]
#: The same one row at a time; both begin alike.
STRUCT, LONG_STRUCT = (struct.Struct("<" + "".join(codes)) for codes in (_CODES[: -len(_OF_HEADS)], _CODES))
#: Where each field of the header begins.
FIELD_AT = dict(zip(Header._fields, accumulate((kind.itemsize for kind in _KINDS), initial=0), strict=False))
_VERSION_AT = FIELD_AT["version"]


class Shape(NamedTuple):
    """What a row's sections depend on, of one row or, as arrays [N], of N."""

    layers: Any
    k: Any
    spans: Any
    tokens: Any = False  # whether there are token ids
    sink: Any = False  # whether there are sink masses
    heads: Any = 0  # query heads of which there are numbers
    head_k: Any = 0
    # whether there are these numbers per head, in the order of `HEAD_KINDS`
    head_top: Any = False
    head_prints: Any = False
    head_spans: Any = False
    head_sink: Any = False
    head_norm: Any = False

    @classmethod
    def of(cls, row: RowData) -> Shape:
        """That of a record's row; a record whose arrays disagree has none, which shows when it is packed."""
        layers, k = row.token_positions.shape if row.token_positions.ndim == 2 else (len(row.layers), 0)
        heads, head_k, kinds = heads_of(row)
        there = [bool(kinds >> bit & 1) for bit in range(len(HEAD_KINDS))]
        optional = row.token_ids is not None, row.sink_mass is not None
        return cls(layers, k, len(row.span_names), *optional, heads, head_k, *there)


_NO_HEADS = (0,) * (len(Shape._fields) - Shape._fields.index("heads"))
#: Fields of `RowData` that tell which numbers there are per head, one for each bit of the header's ``head_kinds``.
HEAD_KINDS = ("head_positions", "head_fingerprints", "head_span_mass", "head_sink_mass", "head_lse")


def heads_of(row: RowData) -> tuple[int, int, int]:
    """Query heads of which a record has numbers, positions of each, and which numbers: a bit for each `HEAD_KINDS`."""
    kinds = heads = 0
    for bit, name in enumerate(HEAD_KINDS):
        array = getattr(row, name)
        if array is not None:
            kinds |= 1 << bit
            heads = array.shape[1] if array.ndim > 1 else 0
    positions = row.head_positions
    return heads, 0 if positions is None else positions.shape[-1], kinds


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
    Section("head_positions", _INT, ("layers", "heads", "head_k"), when="head_top"),
    Section("head_scores", _FLOAT, ("layers", "heads", "head_k"), when="head_top"),
    Section("head_fingerprints", _FLOAT, ("layers", "heads", fp.SIZE), when="head_prints"),
    Section("head_span_mass", _FLOAT, ("layers", "heads", "spans"), when="head_spans"),
    Section("head_sink_mass", _FLOAT, ("layers", "heads"), when="head_sink"),
    Section("head_lse", _FLOAT, ("layers", "heads"), when="head_norm"),
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
def _layout(*shape: Any) -> RowLayout:
    return RowLayout(Shape(*shape))


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
