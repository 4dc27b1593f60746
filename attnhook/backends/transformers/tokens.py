"""The token ids of a batch of sequences: `generate`'s own, or those that the passes of another loop were given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnhook.record.row import UNKNOWN
from attnhook.record.tokens import Lookup


class History:
    """Ids by sequence and padded index; `UNKNOWN` where no pass was given ids."""

    def __init__(self) -> None:
        self._ids = np.zeros((0, 0), np.int64)
        self._first = 0  # padded index of the first column

    @classmethod
    def whole(cls, ids: torch.Tensor, first: int) -> History:
        """Of sequences [batch, n] whose first column has the padded index ``first``."""
        found = cls()
        found._ids, found._first = ids.detach().cpu().numpy(), first
        return found

    def add(self, first: int, ids: Any, batch: int, count: int) -> bool:
        """Take the ids [batch, count] of the padded indices from ``first``; False where they are none of that shape."""
        if not isinstance(ids, torch.Tensor) or tuple(ids.shape) != (batch, count) or ids.is_floating_point():
            return False
        rows, columns = self._ids.shape
        end = first + count
        if rows != batch or columns < end:
            wider = np.full((batch, max(end, 2 * columns)), UNKNOWN, np.int64)
            if rows == batch:
                wider[:, :columns] = self._ids
            self._ids = wider
        self._ids[:, first:end] = ids.detach().cpu().numpy()
        return True

    def of(self, sequence: int, start: int) -> Lookup:
        """Look up positions of a sequence whose first token is at padded index ``start``."""
        ids, shift = self._ids, start - self._first

        def token_at(position: int) -> int:
            index = position + shift
            return int(ids[sequence, index]) if sequence < len(ids) and 0 <= index < ids.shape[1] else UNKNOWN

        return token_at
