"""Queries of the captured rows where CUDA graphs run the model: Python does not run when a graph is replayed.

So the copy is part of the graph: rows that a fixed index names go into fixed buffers, pass after pass, and
who captures a pass sets the index before it and reads the buffers after it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger("attnhook")


class KeptQueries:
    """Buffers of some layers' queries, at addresses that never change.

    Parameters
    ----------
    shapes
        Layer -> (query heads, dimensions).
    rows
        Most rows that one replay may be asked for.
    dtype, device
        Those of the queries.
    """

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = rows
        self._aimed = False
        # 0 where nothing is wanted: a row that every graph has
        self._index = torch.zeros(rows, dtype=torch.int64, device=device)
        # layers of one shape lie together, so that one fill reaches them all
        self._blocks: list[torch.Tensor] = []
        self._kept: dict[int, torch.Tensor] = {}
        for shape in dict.fromkeys(shapes.values()):
            numbers = [number for number, its in shapes.items() if its == shape]
            block = torch.zeros(len(numbers), rows, *shape, dtype=dtype, device=device)
            self._blocks.append(block)
            self._kept.update(zip(numbers, block, strict=True))

    def __contains__(self, number: object) -> bool:
        """Whether queries of this layer are kept."""
        return number in self._kept

    def records(self, number: int) -> bool:
        """Whether an attention call of this layer is to `keep` its queries now: while a graph is being captured."""
        if number not in self._kept:
            return False
        if self._index.device.type == "cuda":
            return torch.cuda.is_current_stream_capturing()
        return True  # no graphs, so every pass stands for a replay: this is how the buffers are tested without a GPU

    def keep(self, number: int, q: torch.Tensor) -> None:
        """Copy the rows of q [N, Hq, D] that the index names; becomes part of the graph."""
        count = min(self.rows, len(q))
        try:
            torch.index_select(q, 0, self._index[:count], out=self._kept[number][:count])
        except RuntimeError as error:  # an engine that hands out queries of another type or shape than its model's
            self.drop(number, error)

    def drop(self, number: int, error: Exception) -> None:
        """Keep no queries of a layer any more."""
        logger.warning("layer %d is not captured under CUDA graphs", number, exc_info=error)
        self._kept.pop(number, None)

    def aim(self, places: torch.Tensor) -> None:
        """Set the index, int64 [U], before a pass; more rows than there is room for are left out.

        What earlier passes left in the buffers becomes NaN: a pass that no graph runs leaves it so, and rows with a NaN
        are told as such, where old queries would give numbers that look right.
        """
        if len(places) <= self.rows:
            self._aimed = True
            for block in self._blocks:
                block[:, : len(places)].fill_(torch.nan)
            self._index[: len(places)] = places
            self._index[len(places) :] = 0

    def rest(self) -> None:
        """Before a pass that nothing is wanted of: its graph may have fewer rows than the last pass's index names."""
        if self._aimed:
            self._index.zero_()
            self._aimed = False

    def get(self, number: int, count: int) -> torch.Tensor | None:
        """Queries [count, Hq, D] of the last pass, which the next one overwrites; None where they were not kept."""
        kept = self._kept.get(number)
        return None if kept is None or count > self.rows else kept[:count]
