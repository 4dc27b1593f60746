"""Where the CPU kernel adds the attention of rows up by key; see `attnhook.kernels.topk.types.PerKey`.

Rows that alone are added to their sums are so by the threads that compute them. Rows that share sums, as those of a
prompt do, go to memory of their own first and are added up in their order, whatever the threads did.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attnhook.kernels.topk.torch.attention import buffer
from attnhook.kernels.topk.torch.kernel import add_rows
from attnhook.kernels.topk.types import LayerRows

_FLOAT = 4  # bytes


def aim(table: np.ndarray, layers: Sequence[LayerRows], slot: np.ndarray) -> bool:
    """Point rows at the sums of their layer; ``slot`` int64 is that of each. False where rows share sums.

    Raises ValueError where the sums do not cover a row's keys.
    """
    keys = np.stack([table["layer"], slot])
    if len(np.unique(keys, axis=1).T) != table.size:
        return False
    sums = [layer.key_mass for layer in layers]
    shapes = np.array([(0, 0, 0) if one is None else one.shape for one in sums], np.int64)[table["layer"]]
    if (table["first"] + table["keys"] > shapes[:, 2]).any() or (slot >= shapes[:, 0]).any() or slot.min() < 0:
        raise ValueError(
            f"key_mass has {shapes[:, 0].min()} slots of {shapes[:, 2].min()} keys, and a row is of slot "
            f"{slot.max()} or sees key {int((table['first'] + table['keys']).max()) - 1}"
        )
    base = np.array([0 if one is None else one.data_ptr() for one in sums], np.int64)[table["layer"]]
    table["key_mass"] = base + slot * shapes[:, 1] * shapes[:, 2] * _FLOAT
    table["key_stride"], table["key_first"] = shapes[:, 2], table["first"]
    return True


class Apart:
    """Memory in which each row of a table has its attention [groups, keys] by itself, until it is added."""

    def __init__(self, table: np.ndarray, groups: int) -> None:
        self._table = table
        sizes = table["keys"] * groups
        self._ends = np.cumsum(sizes)
        like = torch.empty(0)
        self._memory = buffer("by key", int(self._ends[-1]), like, torch.float32).zero_()
        table["key_mass"] = self._memory.data_ptr() + (self._ends - sizes) * _FLOAT
        table["key_stride"], table["key_first"] = table["keys"], 0

    def add(self, layers: Sequence[LayerRows], slot: np.ndarray) -> None:
        """Add the rows to the sums of their slots, int64 [rows], in their order."""
        start = 0
        for row, end, own in zip(self._table, self._ends.tolist(), slot.tolist(), strict=True):
            sums = layers[row["layer"]].key_mass
            assert sums is not None
            first, keys = int(row["first"]), int(row["keys"])
            sums[own, :, first : first + keys] += self._memory[start:end].view(-1, keys)
            start = end


class Block:
    """The same for the rows of a prompt's block over ``width`` keys from ``lowest`` on, added up at once."""

    def __init__(self, table: np.ndarray, groups: int, lowest: int, width: int) -> None:
        self._lowest = lowest
        size, like = groups * width, torch.empty(0)
        memory = buffer("by key", table.size * size, like, torch.float32).zero_()
        self._rows = memory.view(table.size, groups, width)
        table["key_mass"] = memory.data_ptr() + np.arange(table.size) * size * _FLOAT
        table["key_stride"], table["key_first"] = width, table["first"] - lowest

    def add(self, layer: LayerRows, slot: np.ndarray) -> None:
        """Add the rows to the sums of their slots, int64 [rows]."""
        assert layer.key_mass is not None
        add_rows(self._rows.transpose(0, 1), torch.from_numpy(slot), layer.key_mass[..., self._lowest :])
