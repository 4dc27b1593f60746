"""The layout of the fingerprint: bins cover every distance once, and each number is where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnhook.record import fingerprint as fp


def test_size_and_names():
    assert fp.SIZE == 20 == len(fp.NAMES) == 4 + fp.BINS
    assert fp.NAMES[:6] == ("local_mass", "mid_mass", "long_mass", "entropy", "d0", "d2")
    assert len(set(fp.NAMES)) == fp.SIZE
    assert len(range(fp.SIZE)[fp.HISTOGRAM]) == fp.BINS == len(fp.BIN_STARTS)


@pytest.mark.parametrize(
    ("distance", "index"),
    [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (255, 7), (256, 8), (32767, 14), (32768, 15), (2**40, 15)],
)
def test_bin_edges(distance, index):
    assert fp.bin_of(distance) == index


@given(st.integers(0, 2**31 - 1))
def test_every_distance_is_in_the_bin_that_says_so(distance):
    index = fp.bin_of(distance)
    assert fp.BIN_STARTS[index] <= distance
    assert index == fp.BINS - 1 or distance < fp.BIN_STARTS[index + 1]


def test_negative_distances_are_refused():
    with pytest.raises(ValueError, match=r"got -1"):
        fp.bin_of(-1)


def test_labels():
    labels = [fp.bin_label(i) for i in range(fp.BINS)]
    assert labels[:4] == ["0-1", "2-3", "4-7", "8-15"]
    assert labels[-2:] == ["16384-32767", ">=32768"]


@pytest.mark.parametrize(
    ("distance", "mass"), [(0, fp.LOCAL), (7, fp.LOCAL), (8, fp.MID), (255, fp.MID), (256, fp.LONG), (10**6, fp.LONG)]
)
def test_masses_of_one_distance(distance, mass):
    histogram = np.zeros(fp.BINS, np.float32)
    histogram[fp.bin_of(distance)] = 1
    assert [float(m) for m in fp.masses(histogram)] == [float(m == mass) for m in (fp.LOCAL, fp.MID, fp.LONG)]


def test_assemble_puts_each_number_where_it_belongs():
    histogram = np.random.default_rng(0).dirichlet(np.ones(fp.BINS), size=(3, 2))
    entropy = np.full((3, 2), 0.25)
    out = fp.assemble(histogram, entropy)
    assert out.shape == (3, 2, 20)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[..., fp.HISTOGRAM], histogram, rtol=1e-6)
    np.testing.assert_allclose(out[..., fp.ENTROPY], 0.25)
    np.testing.assert_allclose(out[..., fp.LOCAL] + out[..., fp.MID] + out[..., fp.LONG], 1, rtol=1e-6)


def test_masses_take_torch_tensors():
    torch = pytest.importorskip("torch")
    histogram = torch.rand(5, fp.BINS)
    for mine, theirs in zip(fp.masses(histogram), fp.masses(histogram.numpy()), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-6)
