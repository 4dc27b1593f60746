"""Records in replies and streams, without an engine."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from attnhook import OptionError, TokenRecord
from attnhook.options import RequestOptions
from attnhook.serving.replies import NOTHING_CAME, Attention, Stream
from attnhook.serving.wire import Share, asked, pack_options, unpack_options, worse


def record(position: int) -> TokenRecord:
    fingerprint = np.zeros((1, 20), np.float32)
    fingerprint[0, [0, 4]] = 1
    return TokenRecord("r", position, (0,), np.array([[0]], np.int32), np.array([[1.0]], np.float32), fingerprint)


async def results(*found: list[tuple[int, Attention]]) -> AsyncIterator[list[tuple[int, Attention]]]:
    for result in found:
        yield result


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> str:
    body = {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(body)}\n\n"


def run(stream: Stream, found: list[list[tuple[int, Attention]]], lines: list[list[str]]) -> list[dict[str, Any]]:
    """Choices of the chunks, where each result is followed by some lines."""

    async def go() -> list[str]:
        out, pending = [], iter(lines)
        async for _ in stream.watch(results(*found)):
            out += [stream.line(line) for line in next(pending)]
        return out

    return [json.loads(line[6:])["choices"][0] for line in asyncio.run(go())]


def test_records_wait_for_a_chunk_that_carries_tokens() -> None:
    stream = Stream(lambda result: result)
    role, text = chunk({"role": "assistant", "content": ""}), chunk({"content": "a"})
    found = run(
        stream,
        [[(0, Attention([record(3)], [record(1)]))], [(0, Attention([record(4)]))], [(0, Attention([record(5)]))]],
        [[role, text], [], [chunk({"content": "bc"}, "stop")]],
    )
    assert "attention_tokens" not in found[0]
    assert [entry["query_position"] for entry in found[1]["attention_tokens"]] == [3]
    assert [entry["query_position"] for entry in found[1]["prompt_attention_tokens"]] == [1]
    # the parser held one chunk back: its records come with the next
    assert [entry["query_position"] for entry in found[2]["attention_tokens"]] == [4, 5]


def test_a_stream_without_records_says_so() -> None:
    found = run(Stream(lambda result: result), [[], []], [[chunk({"content": "a"})], [chunk({}, "stop")]])
    assert "attention_tokens" not in found[0]
    assert found[1]["attention_tokens"] == [] and found[1]["attention_error"] == NOTHING_CAME


def test_the_worst_self_check_counts() -> None:
    assert worse(None, None) is None and worse(None, 1.0) == worse(1.0, None) == worse(0.5, 1.0) == worse(1.0, 0.5) == 1
    assert math.isnan(worse(math.nan, 1.0) or 0) and math.isnan(worse(1.0, math.nan) or 0)
    whole = Attention([record(3)], check=1e-6)
    whole.extend(Attention([record(4)], check=3e-6))
    whole.extend(Attention([record(5)]))
    assert whole.copy().fields()["attention_self_check"] == {"max_error": 3e-6}
    assert whole.take().check == 3e-6 and whole.check is None
    assert "attention_self_check" not in Attention([record(3)]).fields()
    for wrong in (math.nan, math.inf):
        assert Attention([record(3)], check=wrong).fields()["attention_self_check"] == {"max_error": None}


def test_a_stream_brings_the_self_check_with_its_records() -> None:
    found = run(
        Stream(lambda result: result),
        [[(0, Attention([record(3)], check=1e-6))], [(0, Attention([record(4)], check=2e-6))], []],
        [[chunk({"role": "assistant"})], [chunk({"content": "ab"})], [chunk({}, "stop")]],
    )
    assert [choice.get("attention_self_check") for choice in found] == [None, {"max_error": 2e-6}, None]


@pytest.mark.parametrize("line", ["data: [DONE]\n\n", ": keep-alive\n\n", 'data: {"error": {}}\n\n'])
def test_other_lines_pass(line: str) -> None:
    assert Stream(lambda result: result).line(line) == line


def test_an_empty_reply_says_why() -> None:
    assert Attention().checked(3).fields() == {"attention_tokens": [], "attention_error": NOTHING_CAME}
    assert Attention().checked(0).fields() == {"attention_tokens": []}


@pytest.mark.parametrize("reply", [True, False])
def test_options_survive_the_wire(reply: bool) -> None:
    options = RequestOptions.resolve(
        arguments={"layers": [3, -1], "heads": [0], "spans": {"a": (1, 4)}, "top_k": 5, "prompt": True}, environ={}
    )
    assert unpack_options(pack_options(options, reply=reply)) == (options, reply)
    for check in (None, 1e-6):
        share = Share([b"a", b""], [b"b"], "why", reply, check)
        assert Share.unpack(share.pack()) == share
    old = {name: value for name, value in Share(check=1.0).pack().items() if name != "check"}
    assert Share.unpack(old).check is None


def test_asking() -> None:
    assert asked({"return_attention_tokens": False, "top_k_attention": 3}, {}) is None
    assert asked({"return_attention_tokens": True, "top_k_attention": 3, "seed": 1}, {}) == RequestOptions(top_k=3)
    with pytest.raises(OptionError, match="true or false"):
        asked({"return_attention_tokens": 1}, {})
    with pytest.raises(OptionError, match="from 1 to 256"):
        asked({"return_attention_tokens": False, "top_k_attention": 0}, {})
