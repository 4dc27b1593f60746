"""The layout of the 20-number fingerprint: the one place that knows a bin edge or an index.

A fingerprint (schema 1) is float32[20]: ``[local, mid, long, entropy, histogram x 16]``. The histogram
sums the attention of one query row over log2 bins of the distance d = query position - key position:
bin 0 holds d in {0, 1}, bin i holds 2**i <= d < 2**(i + 1), the last bin everything from 32768 up.
The functions take and return numpy arrays or torch tensors alike and import neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

    ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)

SCHEMA_VERSION = 1
BINS = 16
SIZE = 20

#: First distance of each bin; bin i ends where bin i + 1 begins, the last one never.
BIN_STARTS: tuple[int, ...] = (0, *(2**i for i in range(1, BINS)))

LOCAL, MID, LONG, ENTROPY = 0, 1, 2, 3
HISTOGRAM = slice(4, SIZE)

_LOCAL_BINS = slice(0, 3)  # d <= 7
_MID_BINS = slice(3, 8)  # 8 <= d <= 255
_LONG_BINS = slice(8, BINS)  # d >= 256
_STARTS = [bins.start for bins in (_LOCAL_BINS, _MID_BINS, _LONG_BINS)]

#: Names of the 20 numbers, for tables and plots.
NAMES: tuple[str, ...] = (
    "local_mass",
    "mid_mass",
    "long_mass",
    "entropy",
    *(f"d{start}" for start in BIN_STARTS),
)


def bin_of(distance: int) -> int:
    """Index of the bin that holds ``distance`` (>= 0 tokens)."""
    if distance < 0:
        raise ValueError(f"distance must be >= 0, got {distance}")
    return min(max(distance.bit_length() - 1, 0), BINS - 1)


def bin_label(index: int) -> str:
    """The distances of bin ``index`` as people write them: ``"0-1"``, ``"8-15"``, ``">=32768"``."""
    if index == BINS - 1:
        return f">={BIN_STARTS[index]}"
    return f"{BIN_STARTS[index]}-{BIN_STARTS[index + 1] - 1}"


def masses(histogram: ArrayT) -> tuple[ArrayT, ArrayT, ArrayT]:
    """Local, mid and long mass, each ``[...]``, of histograms ``[..., 16]``."""
    return (
        histogram[..., _LOCAL_BINS].sum(-1),
        histogram[..., _MID_BINS].sum(-1),
        histogram[..., _LONG_BINS].sum(-1),
    )


def assemble(histogram: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Fingerprints float32 ``[..., 20]`` from histograms ``[..., 16]`` and entropies ``[...]``."""
    import numpy as np

    whole = np.empty((*entropy.shape, SIZE), np.float32)
    np.add.reduceat(histogram, _STARTS, axis=-1, out=whole[..., : len(_STARTS)], dtype=np.float32)
    whole[..., 3] = entropy
    whole[..., 4:] = histogram
    return whole
