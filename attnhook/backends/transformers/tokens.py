"""The token ids that a batch of sequences was given, pass by pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnhook.tokens import UNKNOWN, Lookup


class History:
    """Ids by sequence and padded index; `UNKNOWN` where no pass was given ids."""

    def __init__(self) -> None:
        self._ids = np.zeros((0, 0), np.int64)

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
        ids = self._ids

        def token_at(position: int) -> int:
            index = position + start
            return int(ids[sequence, index]) if sequence < len(ids) and index < ids.shape[1] else UNKNOWN

        return token_at
