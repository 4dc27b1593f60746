"""The attention sink is taken out exactly: against fingerprints of the other keys' attention, computed in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook.errors import RecordError
from attnhook.record import fingerprint as fp
from attnhook.record.block import read_rows
from attnhook.record.row import VERSIONS
from attnhook.record.sink_mass import free_means, without_sink
from attnhook.record.token_record import TokenRecord, fill_zones, free_fingerprints, join_layers
from attnhook.record.zones import classify


def fingerprint_of(attention: np.ndarray, keys: int) -> np.ndarray:
    """By the definition: float64 attention [n] on the last n of ``keys`` visible keys, its own key last."""
    count = len(attention)
    distances = np.arange(count)[::-1]
    histogram = np.array([attention[[fp.bin_of(int(d)) == b for d in distances]].sum() for b in range(fp.BINS)])
    whole = attention.sum()
    share = attention[attention > 0] / whole if whole else np.zeros(0)
    entropy = -(share * np.log(share)).sum() / np.log(keys) if keys > 1 else 0.0
    return fp.assemble(histogram, np.array(entropy))


@given(st.integers(1, 700), st.integers(1, 4), st.floats(1e-6, 1), st.floats(0.1, 4), st.integers(0, 2**32 - 1))
def test_it_is_the_fingerprint_of_the_other_keys(position, layers, sink, sharpness, seed):
    draw = np.random.default_rng(seed)
    attention = draw.random((layers, position + 1)) ** sharpness
    attention[:, 0] = 0
    attention *= (1 - sink) / attention.sum(axis=1, keepdims=True)
    attention[:, 0] = sink
    whole = np.stack([fingerprint_of(row, position + 1) for row in attention])
    wanted = np.stack([fingerprint_of(row[1:], position) for row in attention])
    (found,), sound = without_sink(whole[None], attention[None, :, 0], np.array([position]))
    assert sound.all()
    # what is left of a row that is nearly all sink is a difference of nearly equal numbers
    np.testing.assert_allclose(found[:, fp.HISTOGRAM], wanted[:, fp.HISTOGRAM], atol=2e-6)
    if sink < 0.99 and position > 2:
        np.testing.assert_allclose(found[:, fp.ENTROPY], wanted[:, fp.ENTROPY], atol=2e-4)
    (mean,), _ = free_means(whole[None], attention[None, :, 0], np.array([position]))
    np.testing.assert_allclose(mean, found.mean(axis=0, dtype=np.float64), atol=1e-7)


def a_row(position: int, sink: list[float] | None, **changes: object) -> TokenRecord:
    """Half of each layer's attention 4 to 7 back, the sink's part on position 0 and the rest on the row itself."""
    prints = []
    for mass in sink or [0.3, 0.3]:
        attention = np.zeros(position + 1)
        attention[-1], attention[max(-6, -position - 1)] = 0.5 - mass, 0.5
        attention[0] += mass
        prints.append(fingerprint_of(attention, position + 1))
    values: dict = {
        "request_id": "r",
        "query_position": position,
        "layers": (3, 29),
        "token_positions": np.full((2, 1), position - 5, np.int32),
        "attention_scores": np.full((2, 1), 0.5, np.float32),
        "fingerprints": np.stack(prints),
        "span_mass": np.zeros((2, 0), np.float32),
        "sink_mass": None if sink is None else np.array(sink, np.float32),
    }
    return TokenRecord(**{**values, **changes})


def test_a_window_that_hides_it_and_the_row_at_position_0_stay_as_they_are():
    row = a_row(400, [0.0, 0.0])
    assert np.array_equal(row.free_fingerprint, row.fingerprint)
    first = a_row(
        0, [1.0, 1.0], fingerprints=np.stack([fingerprint_of(np.ones(1), 1)] * 2), token_positions=np.zeros((2, 1), int)
    )
    assert np.array_equal(first.free_fingerprint, first.fingerprint)


def test_the_zone_is_that_of_the_attention_without_it():
    seen, unseen = a_row(900, [0.45, 0.49]), a_row(900, None)
    far = a_row(900, [0.45, 0.49], sink_mass=None)
    assert np.array_equal(unseen.free_fingerprint, unseen.fingerprint)  # of attnhook before 0.2
    assert seen.zone == classify(seen.free_fingerprint).name == "syntax_floor"
    assert far.zone == classify(far.fingerprint).name
    assert seen.free_fingerprint[fp.LONG] < 1e-6 < 0.4 < seen.fingerprint[fp.LONG]
    again = [a_row(900, [0.45, 0.49]), a_row(900, None), a_row(300, [0.1, 0.2])]
    prints = free_fingerprints(again)
    for print_, row in zip(prints, again, strict=True):
        np.testing.assert_array_equal(print_, row.free_fingerprint)
    fill_zones(again)
    assert [row.__dict__["zone"] for row in again] == [a_row(900, [0.45, 0.49]).zone, unseen.zone, again[2].zone]
    block, bad = read_rows([row.to_bytes() for row in again])
    assert not bad and [row.zone for row in block.records()] == [row.zone for row in again]


def test_the_last_position_that_there_can_be():
    """Headers hold it in 32 bits, where one more is below 0."""
    near, bin_ = a_row(900, [0.2, 0.3]), fp.HISTOGRAM.start + fp.BINS - 1
    prints = near.fingerprints.copy()
    prints[:, bin_] += near.sink_mass  # where position 0 lies from there
    prints[:, fp.HISTOGRAM.start + fp.bin_of(900)] -= near.sink_mass
    row = replace(near, query_position=2**31 - 1, fingerprints=prints)
    block, bad = read_rows([row.to_bytes()])
    assert not bad and np.isfinite(row.free_fingerprint).all()
    np.testing.assert_array_equal(block.free_fingerprints()[0][0], row.free_fingerprint)


@pytest.mark.parametrize("sink", [[0.9, 0.1], [float("nan"), 0.1], [-0.1, 0.1]])
def test_a_mass_that_does_not_fit_is_damage(sink):
    bad, good = a_row(900, [0.2, 0.2], sink_mass=np.array(sink, np.float32)), a_row(900, [0.2, 0.2])
    with pytest.raises(RecordError, match=r"attention sink.*does not fit"):
        _ = bad.zone
    with pytest.raises(RecordError, match=r"attention sink.*does not fit"):
        fill_zones([good, bad])
    block, found = read_rows([good.to_bytes(), bad.to_bytes(), good.to_bytes()])
    assert len(block) == 2 and found == {"damaged_record": 1}


def test_entries_tell_it_and_old_ones_are_read_without():
    row = a_row(50, [0.2, 0.4])
    entry = row.to_dict()
    assert entry["schema_version"] in VERSIONS and entry["sink_mass"] == pytest.approx(0.3)
    assert [layer["sink_mass"] for layer in entry["layers"].values()] == pytest.approx([0.2, 0.4])
    assert entry["manifold"] == row.zone
    read = TokenRecord.from_dict(entry)
    np.testing.assert_allclose(read.sink_mass, row.sink_mass, atol=1e-7)
    old = a_row(50, None).to_dict()
    assert "sink_mass" not in old and TokenRecord.from_dict(old).sink_mass is None
    assert a_row(50, [0.2, 0.4], mode="fingerprint").to_dict()["sink_mass"] == pytest.approx(0.3)
    for bad in ({**entry, "layers": {**entry["layers"], "3": {**entry["layers"]["3"], "sink_mass": "x"}}},):
        with pytest.raises(RecordError, match="damaged entry"):
            TokenRecord.from_dict(bad)


def test_layers_that_are_joined_keep_it_where_all_have_it():
    first, second = a_row(50, [0.2, 0.4]), a_row(50, [0.1, 0.3], layers=(1, 7))
    joined = join_layers([first, second])
    assert joined.layers == (1, 3, 7, 29) and joined.sink_mass.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert join_layers([first, a_row(50, None, layers=(1, 7))]).sink_mass is None
