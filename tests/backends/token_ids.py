"""What token ids in records must be: those of the request's own sequence, nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnhook.sinks.jsonl import read_jsonl


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


def check_sinks(folder: Path, reply: Any, sequence: Sequence[int]) -> None:
    """A server's ``sink.jsonl`` and, with ids, ``ids.jsonl`` have what the reply has; the reply has no ids."""
    choice = reply.choices[0]
    entries = [*choice.prompt_attention_tokens, *choice.attention_tokens]
    wanted = [entry["query_position"] for entry in entries]
    assert not any("query_token" in entry or entry["schema_version"] != 1 for entry in entries)
    plain = _lines(folder / "sink.jsonl", reply.id, len(wanted))
    assert [line["query_position"] for line in plain] == wanted
    assert not any("query_token" in line or "token_ids" in line["layers"]["29"] for line in plain)
    ids = _lines(folder / "ids.jsonl", reply.id, len(wanted))
    assert [line["query_position"] for line in ids] == wanted
    for line in ids:
        check_line(line, sequence)


def _lines(path: Path, request: str, count: int) -> list[dict[str, Any]]:
    """A request's lines, once there are so many, or after 20 s."""
    lines: list[dict[str, Any]] = []
    for _ in range(100):
        lines = [line for line in read_jsonl(path, tolerate_torn_tail=True) if request in line["request_id"]]
        if len(lines) >= count:
            break
        time.sleep(0.2)
    return lines
