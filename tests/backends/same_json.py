"""The same request to every server must give the same JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.backends.servers import Server
from tests.oracle import FEATURE, PROBABILITY

BODY: dict[str, Any] = {
    "model": "smol",
    "prompt": "The capital of France is Paris, and the capital of Italy is",
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "return_attention_tokens": True,
    "attention_prompt": True,
    "attention_layers": "all",
    "top_k_attention": 6,
    "attention_heads": [0, 4],
    "attention_spans": {"start": [0, 3]},
    "attention_mask_prefix": 1,
}


def compare_with_others(engine: str, server: Server, replies: Path) -> None:
    """Ask, and compare with what the servers before this one answered: the later one of two always sees the other."""
    status, reply = server.post("/v1/completions", BODY)
    assert status == 200, reply
    mine = reply["choices"][0]
    whole = replies / f"{engine}.tmp"
    whole.write_text(json.dumps(mine), encoding="utf-8")
    whole.replace(replies / f"{engine}.json")
    others = [json.loads(path.read_text(encoding="utf-8")) for path in replies.glob("*.json") if path.stem != engine]
    if not others:
        pytest.skip("no other server has run before this one")
    for other in others:
        assert mine["token_ids"] == other["token_ids"]
        for name in ("attention_tokens", "prompt_attention_tokens"):
            assert len(mine[name]) == len(other[name]) > 0
            for one, two in zip(mine[name], other[name], strict=True):
                _same_entry(one, two)


def _same_entry(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name in one.keys() - {"layers", "fingerprint", "spans", "sink_mass"}:
        assert one[name] == two[name]
    assert one["sink_mass"] == pytest.approx(two["sink_mass"], abs=FEATURE)
    assert one["fingerprint"] == pytest.approx(two["fingerprint"], abs=FEATURE)
    assert one["spans"].keys() == two["spans"].keys()
    assert list(one["spans"].values()) == pytest.approx(list(two["spans"].values()), abs=FEATURE)
    assert one["layers"].keys() == two["layers"].keys()
    for number, mine in one["layers"].items():
        other = two["layers"][number]
        assert mine.keys() == other.keys()
        assert mine["attention_scores"] == pytest.approx(other["attention_scores"], abs=PROBABILITY)
        assert mine["sink_mass"] == pytest.approx(other["sink_mass"], abs=FEATURE)
        assert mine["fingerprint"] == pytest.approx(other["fingerprint"], abs=FEATURE)
        scores = dict(zip(other["token_positions"], other["attention_scores"], strict=True))
        for position, score in zip(mine["token_positions"], mine["attention_scores"], strict=True):
            # the order is the same but for ties, which may also leave the last place to another position
            least = min(other["attention_scores"])
            assert abs(scores.get(position, least) - score) <= PROBABILITY, (number, mine, other)
