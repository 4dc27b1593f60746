"""The row's layout: one description, which everything that reads or writes rows' bytes agrees with."""

from __future__ import annotations

import ast
import base64
import dataclasses
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnhook.errors import RecordError
from attnhook.record import block, columns, layout, packing
from attnhook.record import fingerprint as fp
from attnhook.record.block import read_rows
from attnhook.record.layout import (
    HEADER,
    LONG_HEADER,
    SECTIONS,
    STRUCT,
    Header,
    Section,
    Shape,
    layout_of,
    row_size,
    sections_size,
)
from attnhook.record.packing import layers_of, row_without_tokens
from attnhook.record.token_record import TokenRecord, without_tokens
from attnhook.record.zones import are_fingerprints
from tests.helpers import ROOT
from tests.record.samples import ARRAYS, a_record, assert_same, packed, token_records

#: Rows as attnhook wrote them before the layout was described in one place: versions 1 and 2, to the byte.
GOLDEN = {
    "raw": (
        "K}Z1r0RjR50ssR51^@{F3jhTG001Na003icaBM9xZ*pfZZEs{{Y-Dd^F&}VpZ*6dN0{|TWBLDyZ|NsC0|NsC000000BLDyZ3;+NC"
        "003Y=0000000000001CA0000!004kJ006)|002ln001~Y0000!000000000y004kI006)|0000z001C8002Ne003Y;004kJ0059Z"
        "005vp006K(006)}007WE007`U008hk002Nf005vq0000#004kL004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ"
        "004kJ004kJ004kJ004kJ004kJ004kJ0000!0000#004kK002Ng"
    ),
    "prompt": (
        "K}Z1r0RR910ssR51^@s600960|NkTa003icaBM9x0{|TWBLDyZ|NsC0|NsC000000BLDyZ3;+NC003Y=0000000000001CA0000!"
        "004kJ006)|002ln001~Y0000!000000000y004kI006)|0000z001C8002Ne003Y;004kJ0059Z005vp006K(006)}007WE007`U"
        "008hk002Nf005vq0000#004kL004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ"
        "004kJ"
    ),
    "sketch": (
        "K}Z1s00IC20ssR51po#B0{{R3001Na006_K;)1N^sG;Saiyy<h0{|TWBLDyZ|NsC0|NsC000000BLDyZ3;+NC003Y=0000000000"
        "001CA0000!004kJ006)|002ln001~Y0000!000000000y004kI006)|0000z001C8002Ne003Y;004kJ0059Z005vp006K(006)}"
        "007WE007`U008hk002Nf005vq0000#004kL004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ"
        "004kJ004kJ004kJ0000!0000#004kK002Ng"
    ),
    "lean": (
        "K}Z1t0RR910RR911^@s600000001Na003icaBM9x9RL6Tz&ro|NIn1nI6nXY06qW!0000006YKyfII*Iz&ro|06hQzAUyy8Ks^8e"
        "U_Af;fIR>JkUanZpgjNpusr|(z&!u}&^-VE;5`5U@I3"
    ),
    "raw_ids": (
        "K}Z4s00IC20ssR51^@{F3jhEB001Na003icaBM9xZ*pfZZEs{{Y-Dd^F&}VpZ*6dN0{|TWBLDyZ|NsC0|NsC000000BLDyZ3;+NC"
        "003Y=0000000000001CA0000!004kJ006)|002ln001~Y0000!000000000y004kI006)|0000z001C8002Ne003Y;004kJ0059Z"
        "005vp006K(006)}007WE007`U008hk002Nf005vq0000#004kL004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ"
        "004kJ004kJ004kJ004kJ004kJ004kJ0000!0000#004kK002Ng1ONa42><{9|NsC0|NsC01poj5|NsAg2LJ#7"
    ),
    "lean_ids": (
        "K}Z4u0RR910RR911^@s6000L7001Na003icaBM9x9RL6Tz&ro|NIn1nI6nXY06qW!0000006YKyfII*Iz&ro|06hQzAUyy8Ks^8e"
        "U_Af;fIR>JkUanZpgjNpusr|(z&!u}&^-VE;5`5U@IC+k|Nj"
    ),
    "ends": (
        "K}Z4s0RaF10ssR51^@s600960|9}7g|9@j`aBM9x0094gBLDyZ|NsC0|NsC000000BLDyZ3;+NC003Y=0000000000001CA0000!"
        "004kJ006)|002ln001~Y0000!000000000y004kI006)|0000z001C8002Ne003Y;004kJ0059Z005vp006K(006)}007WE007`U"
        "008hk002Nf005vq0000#004kL004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ004kJ"
        "004kJ1ONa42><{9|NsC0|NsC01poj5|NsAg2LJ#7"
    ),
}


def golden() -> dict[str, TokenRecord]:
    """What those rows were made of."""
    prints = fp.assemble(np.stack([np.arange(16) / 128, np.full(16, 1 / 16)]), np.array([0.125, 1]))
    ids: dict = {"token_ids": np.array([[9, -1, -1], [5, 2**31 - 1, 7]], np.int32), "query_token": 4}
    bare: dict = {"span_names": (), "span_mass": np.zeros((2, 0), np.float32)}
    lean: dict = {
        "layers": (29,),
        "token_positions": np.zeros((1, 0), np.int32),
        "attention_scores": np.zeros((1, 0), np.float32),
        "fingerprints": prints[:1],
        "mode": "fingerprint",
        "span_names": (),
        "span_mass": np.zeros((1, 0), np.float32),
    }

    def one(**changes: object) -> TokenRecord:
        whole: dict = {
            "attention_scores": np.array([[0.875, 0, 0], [0.625, 0.125, 0.0625]], np.float32),
            "fingerprints": prints,
            "span_mass": np.array([[0.125, 0.5], [0.25, 0.75]], np.float32),
        }
        return a_record(**{**whole, **changes})

    last = 2**31 - 1
    sketch: dict = {"mode": "sketch", "think_phase": "think", "span_names": ("", "ü")}
    return {
        "raw": one(model="org/model", decode_step=5, choice=2),
        "prompt": one(decode_step=None, **bare),
        "sketch": one(request_id="å€", model="模型", **sketch),
        "lean": one(**lean),
        "raw_ids": one(model="org/model", think_phase="think", **ids),
        "lean_ids": one(**lean, token_ids=np.zeros((1, 0), np.int32), query_token=-1, decode_step=7),
        "ends": one(query_position=last, decode_step=last, choice=2**16 - 1, layers=(0, 2**15 - 1), **ids, **bare),
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_are_what_they_were_to_the_byte(name):
    row, record = base64.b85decode(GOLDEN[name]), golden()[name]
    assert record.to_bytes() == row
    found = TokenRecord.from_bytes(row)
    assert_same(found, record)
    assert found.to_bytes() == row
    assert packed([without_tokens(record)] * 6) == [row_without_tokens(row)] * 6
    read, bad = read_rows([row])
    assert not bad
    assert_same(read.records()[0], record)


def test_the_header_is_what_it_was():
    """By offsets that are written out here, for once."""
    row = base64.b85decode(GOLDEN["raw"])
    assert HEADER.itemsize == 26 and HEADER.names == Header._fields[:13]
    found = Header.read(row)
    assert found == (b"AH", 1, 0, 1, 2, 2, 2, 3, 6, 9, 11, 5, 36, 0, 0, 0)
    assert found[:13] == struct.unpack_from("<2sBBBBHHHHHHii", row)
    assert found[:13] == np.frombuffer(row, HEADER, 1)[0].item()
    assert found.bounds == (26, 32, 41, 52)
    assert [row[start:end] for start, end in pairwise(found.bounds)] == [b"cmpl-1", b"org/model", b"doc1\x1fprompt"]
    assert STRUCT.pack(*found[:13]) == row[: HEADER.itemsize]


def test_the_header_of_numbers_per_head():
    """By offsets that are written out here, for once."""
    top = {"head_positions": np.zeros((2, 9, 4), np.int32), "head_scores": np.ones((2, 9, 4), np.float32)}
    row = a_record(decode_step=5, choice=2, head_lse=np.ones((2, 9), np.float32), **top).to_bytes()
    assert LONG_HEADER.itemsize == 30 and LONG_HEADER.names == Header._fields
    found = Header.read(row)
    assert found == struct.unpack_from("<2sBBBBHHHHHHiiHBB", row)
    assert found == np.frombuffer(row, LONG_HEADER, 1)[0].item()
    assert (found.version, found.heads, found.head_k, found.head_kinds) == (5, 9, 4, 0b10001)
    assert found.bounds == (30, 36, 36, 47) and row[30:36] == b"cmpl-1"
    with_sink = a_record(sink_mass=np.zeros(2, np.float32), **top).to_bytes()
    assert Header.read(with_sink)[1] == 7 and Header.read(with_sink).head_kinds == 1


@pytest.mark.parametrize(
    ("at", "value"),
    [(26, 0), (28, 0), (29, 0), (29, 32), (29, 0b10000)],
    ids=["no head", "no positions", "nothing told", "an unknown kind", "positions of nothing"],
)
def test_a_header_of_heads_that_nobody_wrote_is_refused_by_all(at, value):
    top = {"head_positions": np.zeros((2, 1, 1), np.int32), "head_scores": np.ones((2, 1, 1), np.float32)}
    row = bytearray(a_record(**top).to_bytes())
    row[at] = value
    header = Header.read(bytes(row))
    row = row[: header.bounds[-1]].ljust(header.bounds[-1] + header.layout.size, b"\0")  # as long as it announces
    with pytest.raises(RecordError, match="damaged record"):
        TokenRecord.from_bytes(bytes(row))
    found, bad = read_rows([bytes(row), a_record().to_bytes()])
    assert (len(found), bad) == (1, {"damaged_record": 1})


FLAGS = [st.integers(0, 1)] * 5
SHAPES = st.builds(
    Shape,
    st.integers(1, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 255), st.integers(0, 1), st.integers(0, 1),
    st.integers(0, 200), st.integers(0, 255), *FLAGS,
)  # fmt: skip


@given(st.lists(SHAPES, min_size=1, max_size=6), st.integers(0, 3 * 2**16))
def test_sizes_of_one_row_and_of_many_are_the_same(shapes, text):
    many = Shape(*np.array(shapes, np.int64).T)
    sizes = [layout_of(shape).size for shape in shapes]
    assert sections_size(many).tolist() == sizes == [sections_size(shape) for shape in shapes]
    without = many._replace(**dict.fromkeys(Shape._fields[5:], np.zeros_like(many.k)))
    expected = [HEADER.itemsize + text + layout_of(Shape(*shape[:5])).size for shape in shapes]
    assert row_size(*without[:3], text, *without[3:5]).tolist() == expected
    for shape, size in zip(shapes, sizes, strict=True):
        end = 0
        for place in layout_of(shape).places.values():
            assert place.at == end
            end += place.size
            assert place.size == place.length * place.dtype.itemsize == np.prod(place.shape) * place.dtype.itemsize
        assert end == size


def _agree(records: list[TokenRecord]) -> None:
    """Whatever reads or writes the rows of these records says the same of them."""
    rows = [record.to_bytes() for record in records]
    many = Header.read_many(np.frombuffer(b"".join(row[: LONG_HEADER.itemsize] for row in rows), LONG_HEADER))
    assert (many.bounds[-1] + sections_size(many.shape)).tolist() == list(map(len, rows))
    block, bad = read_rows(rows)
    assert not bad
    for record, row, read in zip(records, rows, block.records(), strict=True):
        header, own = Header.read(row), layout_of(Shape.of(record))
        assert layout_of(header.shape) is header.layout is own
        assert len(row) == header.bounds[-1] + own.size
        for name, place in own.places.items():
            at = header.bounds[-1] + place.at
            found = np.frombuffer(row, place.dtype, place.length, at).reshape(place.shape)
            np.testing.assert_array_equal(found, getattr(record, name))
        for other in (TokenRecord.from_bytes(row), read):
            assert_same(other, record)
        assert layers_of(row) == record.layers
        bare = without_tokens(record)
        assert row_without_tokens(row) == bare.to_bytes()
        for copies in (1, 6):  # few and many rows go different ways
            assert packed([bare] * copies) == [bare.to_bytes()] * copies
    for name in ("layer", "query_token", "record"):
        assert getattr(block.columns(0), name) == getattr(columns.from_records(records, 0), name)


@settings(max_examples=60)
@given(st.lists(token_records(), min_size=1, max_size=5))
def test_all_that_read_or_write_rows_agree(records):
    _agree(records)


@contextmanager
def other_sections(sections: tuple[Section, ...]) -> Iterator[None]:
    """Rows have these sections, and nothing is remembered of others."""
    caches = (layout._layout, packing._front, columns.fits_columns)
    with pytest.MonkeyPatch.context() as patch:
        for module in (layout, block):
            patch.setattr(module, "SECTIONS", sections)
        patch.setattr(layout, "_TERMS", layout._terms())
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@settings(max_examples=30)
@given(st.lists(token_records(), min_size=1, max_size=4))
def test_nothing_else_knows_in_which_order_the_sections_lie(records):
    with other_sections(SECTIONS[::-1]):
        row, layers = records[0].to_bytes(), records[0].layers
        assert row[-2 * len(layers) :] == np.array(layers, "<i2").tobytes()
        _agree(records)


@pytest.mark.parametrize("where", [0, 3, len(SECTIONS)])
def test_a_section_more_is_one_line(where):
    more = Section("head_mass", np.dtype("<f4"), ("layers", 3))
    record = a_record(token_ids=np.zeros((2, 3), np.int32), query_token=5)
    bare = a_record(**{name: getattr(golden()["lean"], name) for name in (*ARRAYS[:4], "layers", "mode", "span_names")})
    with other_sections((*SECTIONS[:where], more, *SECTIONS[where:])):
        for one in (record, bare):
            one.__dict__["head_mass"] = np.linspace(0, 1, 3 * len(one.layers), dtype=np.float32).reshape(-1, 3)
        row, lean = record.to_bytes(), bare.to_bytes()
        fields = packing.unpack(row)
        np.testing.assert_array_equal(fields.pop("head_mass"), record.head_mass)
        assert_same(TokenRecord(**fields), record)
        found, bad = read_rows([row, lean])
        assert not bad
        np.testing.assert_array_equal(found.records()[0].head_mass, record.head_mass)
        assert found.columns(0).record == [row, lean]  # there is no column for it
        assert len(row_without_tokens(row)) == len(row) - 4 - 4 * 6
        np.testing.assert_array_equal(packing.unpack(row_without_tokens(row))["head_mass"], record.head_mass)
        damaged = bare.head_mass.copy()
        damaged[0, 1] = np.nan
        bare.__dict__["head_mass"] = damaged
        assert read_rows([bare.to_bytes()])[1] == {"damaged_record": 1}


@pytest.mark.parametrize("field", ["version", "mode", "phase", "layers", "step", "position"])
def test_a_header_that_one_reader_refuses_is_refused_by_all(field):
    """A step or a position below what there can be went through where many rows were read at once."""
    place = HEADER.fields[field]
    wrong = {"version": 9, "mode": 3, "phase": 2, "layers": 0, "step": -2, "position": -1}[field]
    row = bytearray(a_record(decode_step=5).to_bytes())
    row[place[1] : place[1] + place[0].itemsize] = np.array(wrong, place[0]).tobytes()
    if field == "layers":
        row = row[: Header.read(bytes(row)).bounds[-1]]
    with pytest.raises(RecordError, match="schema version 9" if field == "version" else "damaged record: mode"):
        TokenRecord.from_bytes(bytes(row))
    with pytest.raises(RecordError):
        layers_of(bytes(row))
    found, bad = read_rows([bytes(row), a_record().to_bytes()])
    assert (len(found), bad) == (1, {"record_version" if field == "version" else "damaged_record": 1})


def _is_good(row: bytes) -> bool:
    """Whether a row, read alone, is a record of which every number can be."""
    try:
        found = TokenRecord.from_bytes(row)
    except RecordError:
        return False
    numbers = [value for value in vars(found).values() if isinstance(value, np.ndarray)]
    if not all(np.isfinite(array).all() for array in numbers if array is not None):
        return False
    try:
        return bool(are_fingerprints(np.stack([found.fingerprint, found.free_fingerprint])).all())
    except RecordError:  # a sink mass that its fingerprint does not have
        return False


@pytest.mark.slow
@settings(max_examples=300)
@given(token_records(), st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=3))
def test_a_damaged_row_is_good_alone_where_it_is_good_among_many(record, flips):
    row = bytearray(record.to_bytes())
    for at, bits in flips:  # half of them in the header and the texts, where it matters most
        row[at % (len(row) if at % 2 else min(len(row), 60))] ^= bits
    found, bad = read_rows([bytes(row)])
    assert len(found) == _is_good(bytes(row)) == 1 - sum(bad.values())
    for same in found.records():
        assert same.to_bytes() == bytes(row)


@pytest.mark.parametrize("name", ["query_token", "token_ids"])
def test_ids_that_one_reader_refuses_are_refused_by_all(name):
    """A row with an id below -1 was read one by one, could then not be written again, and was damage among many."""
    row = bytearray(a_record(token_ids=np.zeros((2, 3), np.int32), query_token=5).to_bytes())
    header = Header.read(bytes(row))
    place = layout_of(header.shape).places[name]
    at = header.bounds[-1] + place.at
    row[at : at + 4] = struct.pack("<i", -2)
    with pytest.raises(RecordError, match=f"damaged record: a number of {name} is below -1"):
        TokenRecord.from_bytes(bytes(row))
    found, bad = read_rows([bytes(row)])
    assert (len(found), bad) == (0, {"damaged_record": 1})


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", ARRAYS[:4])
def test_arrays_that_make_up_for_one_another_are_refused(name, count):
    """One number too many here and one too few there is as long as a row must be, and reads back as other numbers."""
    other = "fingerprints" if name != "fingerprints" else "attention_scores"
    record = a_record()
    longer = np.concatenate([getattr(record, name).ravel(), np.zeros(2, getattr(record, name).dtype)])
    shorter = getattr(record, other).ravel()[:-2]
    changes = {name: longer.reshape(2, -1), other: shorter.reshape(2, -1)}
    with pytest.raises(RecordError, match="arrays disagree"):
        dataclasses.replace(record, **changes).to_bytes()
    with pytest.raises(RecordError, match="arrays disagree"):
        packed([dataclasses.replace(record, **changes)] * count)


def test_only_those_that_handle_rows_ask_for_the_layout():
    """Who else would read or change a row's bytes calls one of these; only the layout makes a struct or a dtype."""
    asking, describing = set(), set()
    for path in (ROOT / "attnhook").rglob("*.py"):
        name = path.relative_to(ROOT / "attnhook").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "attnhook.record.layout":
                asking.add(name)
            called = node.func if isinstance(node, ast.Call) else None
            if name.startswith("record/") and isinstance(called, ast.Attribute) and called.attr in ("Struct", "dtype"):
                describing.add(name)
    assert asking == {f"record/{name}.py" for name in ("block", "columns", "packing", "token_record")}
    assert describing == {"record/layout.py"}
