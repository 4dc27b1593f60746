"""What token ids in records must be: those of the request's own sequence, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check(record: Any, sequence: Sequence[int], masked: int = 0) -> None:
    """A TokenRecord's ids are those of ``sequence`` (prompt and output) at its positions, none below ``masked``."""
    assert record.token_ids is not None and record.token_ids.shape == record.token_positions.shape
    at = record.query_position
    assert record.query_token == (sequence[at] if at >= masked else -1)
    for positions, ids in zip(record.token_positions.tolist(), record.token_ids.tolist(), strict=True):
        assert ids == [sequence[p] if p >= 0 else -1 for p in positions]
        assert all(p == -1 or p >= masked for p in positions)


def check_line(line: dict[str, Any], sequence: Sequence[int]) -> None:
    """The same for a line of a jsonl sink, in raw mode."""
    assert line["schema_version"] == 2
    assert line["query_token"] == sequence[line["query_position"]]
    for layer in line["layers"].values():
        assert layer["token_ids"] == [sequence[p] for p in layer["token_positions"]]
        assert layer["token_ids"]
