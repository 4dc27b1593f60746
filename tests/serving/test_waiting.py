"""What waits for a request's next token, and its way to the sinks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import attnhook
from attnhook.record.token_record import TokenRecord
from attnhook.record.tokens import sequence
from attnhook.serving.waiting import Waiting, publish
from attnhook.serving.wire import Share
from attnhook.sinks import outlet
from attnhook.sinks.jsonl import read_jsonl


def row(position: int) -> bytes:
    numbers = np.zeros((1, 20), np.float32)
    numbers[0, [0, 4]] = 1
    return TokenRecord("r", position, (0,), np.array([[0]], np.int32), np.ones((1, 1), np.float32), numbers).to_bytes()


def test_what_a_prompt_in_pieces_brings_goes_with_the_first_token() -> None:
    waiting = Waiting()
    waiting.add(Share(prompt=[row(0)], check=0.1))
    waiting.add(Share(prompt=[row(1)], error="the second piece failed", check=0.3))
    waiting.add(Share(prompt=[row(2)], error="and the third", check=None))
    share = waiting.take([b"", row(3)])
    assert share.prompt == [row(0), row(1), row(2)] and share.generated == [row(3)]
    assert (share.error, share.check) == ("the second piece failed", 0.3) and share
    later = waiting.take()
    assert not later and later == Share()


def test_what_is_for_the_sinks_only_goes_into_no_reply() -> None:
    share = Waiting(reply=False).take([row(1)])
    assert share.generated and not share.reply and not share


@pytest.fixture
def kept(tmp_path) -> Iterator[object]:
    path = tmp_path / "records.jsonl"
    attnhook.install(sinks=[f"jsonl:{path}?tokens=1"])
    try:
        yield path
    finally:
        attnhook.uninstall()


def test_sinks_get_the_rows_with_the_ids_that_they_ask_for(kept) -> None:
    share = Share([row(3)], [row(2)])
    publish(share, lambda: sequence([7, 8, 9], [10]), lambda: 1)
    publish(Share([row(4)]), lambda: None, lambda: 0)  # a request that the engine has forgotten
    assert outlet.flush(30)
    lines = [(line["query_position"], line.get("query_token"), line.get("layers")) for line in read_jsonl(kept)]
    assert [(position, token) for position, token, _ in lines] == [(2, 9), (3, 10), (4, None)]
    assert lines[0][2]["0"]["token_ids"] == [-1]  # position 0 lies below the mask prefix


def test_without_sinks_nothing_is_looked_up() -> None:
    def never() -> None:
        raise AssertionError("looked up")

    publish(Share([row(3)]), never, never)  # type: ignore[arg-type]
