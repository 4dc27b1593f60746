"""Many rows at once are what the rows are one by one."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnhook.record import fingerprint as fp
from attnhook.record.arrow import NAMES
from attnhook.record.block import joined, read_rows
from attnhook.record.columns import from_records
from attnhook.record.token_record import TokenRecord
from tests.sinks.samples import batches, lean, record


def same_columns(ours, theirs) -> bool:
    return all(
        np.array_equal(getattr(ours, name), getattr(theirs, name), equal_nan=True)
        if name == "fingerprint"
        else getattr(ours, name) == getattr(theirs, name)
        for name in NAMES
    )


@given(batches(max_size=8))
def test_rows_come_back_as_records_and_as_columns(batch):
    rows = [one.to_bytes() for one in batch]
    block, bad = read_rows(rows)
    assert not bad and len(block) == len(batch) and block.nbytes >= sum(map(len, rows))
    records = block.records()
    assert [one.to_bytes() for one in records] == rows
    for found, one in zip(records, map(TokenRecord.from_bytes, rows), strict=True):
        assert found.key == one.key and found.zone == one.zone
        assert np.array_equal(found.fingerprint, one.fingerprint)
        assert (found.layers, found.decode_step, found.mode, found.think_phase, found.span_names) == (
            one.layers, one.decode_step, one.mode, one.think_phase, one.span_names,
        )  # fmt: skip
        assert found.span_mass.shape == one.span_mass.shape
    assert same_columns(block.columns(5), from_records(batch, 5))


@given(batches(max_size=8), st.data())
def test_parts_and_what_is_left_out(batch, data):
    rows = [one.to_bytes() for one in batch]
    block, _ = read_rows(rows)
    cut = data.draw(st.integers(0, len(batch)))
    both = joined([block.part(0, cut).columns(5), block.part(cut, len(batch)).columns(5)])
    assert same_columns(both, block.columns(5))
    out = {one.key for one in batch[:cut]}
    kept = block.without(out)
    assert [one.to_bytes() for one in kept.records()] == rows[cut:]
    assert kept.zones.tolist() == block.zones[cut:].tolist()


@given(st.lists(st.sampled_from(["good", "lean", "cut", "long", "version", "empty", "noise"]), max_size=12), st.data())
def test_bad_rows_are_counted_and_left_out(kinds, data):
    rows, good, bad = [], [], Counter()
    for i, kind in enumerate(kinds):
        row = (lean if kind == "lean" else record)(i).to_bytes()
        if kind in ("good", "lean"):
            good.append(row)
        elif kind == "cut":
            row = row[: data.draw(st.integers(1, len(row) - 1))]
        elif kind == "long":
            row += b"x"
        elif kind == "version":
            row = row[:2] + b"\x09" + row[3:]
        elif kind == "empty":
            row = b""
        else:
            row = data.draw(st.binary(max_size=200).filter(lambda noise: noise[:2] != b"AH"))
        rows.append(row)
        if kind not in ("good", "lean"):
            bad["record_version" if kind == "version" else "damaged_record"] += 1
    block, found = read_rows(rows)
    assert [one.to_bytes() for one in block.records()] == good
    assert found == bad


def test_numbers_that_are_none_and_names_that_are_not_text_are_damage():
    whole = record()
    nan = np.array(whole.fingerprints)
    nan[1, 7] = np.nan
    large = np.array(whole.fingerprints)
    large[0, 7] = 3
    scores = np.array(whole.attention_scores)
    scores[0, 0] = np.inf
    mass = np.full_like(whole.span_mass, np.nan)
    rows = [
        record(0, fingerprints=nan),
        record(1, fingerprints=large),
        record(2, attention_scores=scores),
        record(3, span_mass=mass),
    ]
    data = [row.to_bytes() for row in rows]
    data.append(record(4, request_id="é" * 3).to_bytes().replace("é".encode(), b"\xc3("))
    data.append(record(5, model="é" * 3).to_bytes().replace("é".encode(), b"\xc3("))
    data.append(record(6, span_names=("ab",)).to_bytes().replace(b"ab", b"a\x1f"))  # two names where one is announced
    data.append(record(7, span_names=("é",)).to_bytes().replace("é".encode(), b"\xc3("))
    block, bad = read_rows([record(8).to_bytes(), *data, record(9).to_bytes()])
    assert bad == {"damaged_record": len(data)}
    assert [one.query_position for one in block.records()] == [8, 9]


def test_nothing_is_nothing():
    block, bad = read_rows([])
    assert (len(block), block.records(), len(block.columns(0)), bad) == (0, [], 0, {})


def test_a_frame_full_of_bad_fingerprints_costs_a_moment():
    """Found by halves, every second row of 16 MiB took 15 seconds."""
    good = lean(0).to_bytes()
    bad = good[: -4 * fp.SIZE] + np.full(fp.SIZE, 5, "<f4").tobytes()
    count = 16 * 2**20 // len(good)
    began = time.process_time()
    block, counts = read_rows([bad if i % 2 else good for i in range(count)])
    assert time.process_time() - began < 4
    assert len(block) == (count + 1) // 2 and counts == {"damaged_record": count // 2}


def test_memory_is_told_with_what_a_small_row_needs_beside_its_bytes():
    rows = [lean(0).to_bytes()] * 4096
    tracemalloc.start()
    block, _ = read_rows(rows)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 * block.nbytes < taken < 1.2 * block.nbytes
