"""Records in HTTP replies, in the place of their marks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")

from starlette.responses import JSONResponse, Response, StreamingResponse

from attnhook import TokenRecord
from attnhook.record.key_mass import KeyMass
from attnhook.serving.gate import Gate, leave_with_the_reply
from attnhook.serving.replies import Attention, entries
from attnhook.serving.routes import RouteGuard


def record(position: int, layers: int = 3, k: int = 4) -> TokenRecord:
    random = np.random.default_rng(position)
    histogram = random.dirichlet(np.ones(16), layers)
    masses = np.stack([histogram[:, :3].sum(1), histogram[:, 3:8].sum(1), histogram[:, 8:].sum(1)], 1)
    numbers = np.concatenate([masses, random.random((layers, 1)), histogram], 1).astype(np.float32)
    positions = np.sort(random.integers(0, position + 1, (layers, k)), 1).astype(np.int32)
    scores = np.sort(random.dirichlet(np.ones(k), layers).astype(np.float32))[:, ::-1]
    return TokenRecord("r", position, tuple(range(layers)), positions, scores, numbers)


def answer(
    reply: Callable[[], Response], *, sent: Callable[[dict[str, Any]], None] = lambda _: None
) -> tuple[Any, bytes]:
    """Headers and body of what a route answers through the guard."""
    messages: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await reply()(scope, receive, send)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)
        sent(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "asgi": {"spec_version": "2.4"}}
    asyncio.run(RouteGuard(app, lambda: ["/v1/completions"])(scope, receive, send))
    assert [message.get("more_body", False) for message in messages[1:]] == [True] * (len(messages) - 2) + [False]
    return dict(messages[0]["headers"]), b"".join(message["body"] for message in messages[1:])


def test_in_base64_too_and_key_mass_likewise() -> None:
    records, mass = [record(n) for n in range(9)], KeyMass({n: np.full(40, n, np.float32) for n in range(3)}, 9)
    found = Attention(records, records[:2], key_mass=mass, encoding_format="base64")
    _, body = answer(lambda: JSONResponse({"choices": [found.fields()]}))
    (choice,) = json.loads(body)["choices"]
    assert choice["attention_tokens"] == [one.to_dict("base64") for one in records]
    assert choice["prompt_attention_tokens"] == choice["attention_tokens"][:2]
    assert choice["attention_key_mass"] == mass.to_list("base64")
    assert "base64" in choice["attention_tokens"][0]["layers"]["0"]["fingerprint"]


def plain(records: list[TokenRecord]) -> Any:
    return json.loads(json.dumps(Attention(records).fields()["attention_tokens"]))


def test_a_json_reply() -> None:
    rows, prompt = [record(position) for position in range(40, 45)], [record(position, 30, 32) for position in range(9)]

    def reply() -> Response:
        fields = Attention(rows, prompt, check=1e-6).fields()
        assert isinstance(fields["attention_tokens"], str)
        return JSONResponse(
            {"choices": [{"index": 0, "text": "\u00e9 [1]", **fields}, {"attention_tokens": entries([])}]}
        )

    headers, body = answer(reply)
    assert b"content-length" not in headers and headers[b"content-type"] == b"application/json"
    first, second = json.loads(body)["choices"]
    assert first.pop("attention_tokens") == plain(rows) and first.pop("prompt_attention_tokens") == plain(prompt)
    assert first == {"index": 0, "text": "\u00e9 [1]", "attention_self_check": {"max_error": 1e-6}}
    assert second == {"attention_tokens": []}


def test_a_stream() -> None:
    rows = [record(position) for position in range(6)]

    async def lines() -> AsyncIterator[str]:
        for row in rows:
            yield f"data: {json.dumps({'choices': [{'attention_tokens': entries([row])}]})}\n\n"
        yield "data: [DONE]\n\n"

    _, body = answer(lambda: StreamingResponse(lines(), media_type="text/event-stream"))
    events = body.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: "))["choices"][0]["attention_tokens"] for event in events[:-1]]
    assert found == [plain([row]) for row in rows]


def test_a_text_that_looks_like_a_mark_stays() -> None:
    text = f"attnhook-records-{'0' * 32}"

    def reply() -> Response:
        return JSONResponse({"text": text, "quoted": f'"{text}"', "attention_tokens": entries([record(3)])})

    _, body = answer(reply)
    told = json.loads(body)
    assert told["text"] == text and told["quoted"] == f'"{text}"' and told["attention_tokens"] == plain([record(3)])


def test_replies_without_records_are_as_they_were() -> None:
    headers, body = answer(lambda: JSONResponse({"a": 1}))
    assert body == b'{"a":1}' and headers[b"content-length"] == b"7"


def test_outside_of_a_reply_records_are_written_at_once() -> None:
    assert entries([record(2)])[0]["query_position"] == 2


def test_a_place_is_free_when_the_reply_is_sent_and_not_before() -> None:
    gate, counts, threads = Gate(), [], set()

    def reply() -> Response:
        place = gate.place(1)
        response = JSONResponse({"attention_tokens": entries([record(n, 30, 256) for n in range(300, 320)])})
        leave_with_the_reply(place)
        return response

    def sent(message: dict[str, Any]) -> None:
        counts.append(gate.count)
        threads.add(threading.current_thread())

    _, body = answer(reply, sent=sent)
    assert len(json.loads(body)["attention_tokens"]) == 20
    assert len(counts) > 20 and set(counts) == {1} and gate.count == 0
    place = gate.place(1)
    leave_with_the_reply(place)  # where nobody sends anything later
    assert gate.count == 0


def test_records_that_come_again_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, written = [record(position) for position in range(5)], []
    whole = TokenRecord.to_dict
    monkeypatch.setattr(
        TokenRecord, "to_dict", lambda self, form: written.append(self.query_position) or whole(self, form)
    )

    async def lines() -> AsyncIterator[str]:
        for count in range(1, 6):
            fields = Attention(rows[:count], rows[:2]).fields(again=True)
            yield f"data: {json.dumps({'meta_info': fields})}\n\n"

    _, body = answer(lambda: StreamingResponse(lines(), media_type="text/event-stream"))
    assert sorted(written) == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    events = [json.loads(event.removeprefix("data: "))["meta_info"] for event in body.decode().strip().split("\n\n")]
    assert [event["attention_tokens"] for event in events] == [plain(rows[:count]) for count in range(1, 6)]
    assert all(event["prompt_attention_tokens"] == plain(rows[:2]) for event in events)
