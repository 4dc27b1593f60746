"""Routes that can't carry records say so, and get the bodies of everything else unchanged."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from attnhook.serving.routes import RouteGuard, asks

CARRYING = ["/v1/completions"]


def call(path: str, body: bytes, *, pieces: int = 1, method: str = "POST", root: str = "") -> tuple[int, bytes]:
    """Status and body of a reply; the application behind the guard sends back what it got."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got = b""
        while True:
            message = await receive()
            got += message.get("body", b"")
            if not message.get("more_body"):
                break
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": got})

    size = -(-len(body) // pieces) or 1
    parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": n < len(parts) - 1} for n, part in enumerate(parts)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": root + path, "root_path": root}
    asyncio.run(RouteGuard(app, lambda: CARRYING)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


ASKING = [
    b'{"input": "x", "return_attention_tokens": true}',
    b'{"return_attention_tokens": "yes"}',
    b'{"\\u0072eturn_attention_tokens": 1}',
    json.dumps({"return_attention_tokens": True}).encode("utf-16"),
    b'{"vllm_xargs": {"return_attention_tokens": true}}',
    b'{"sampling_params": {"n": 1, "extra_args": {"return_attention_tokens": 0}}}',
    b'{"sampling_params": [{}, {"custom_params": {"return_attention_tokens": 1}}]}',
    b'--b\r\nContent-Disposition: form-data; name="return_attention_tokens"\r\n\r\ntrue\r\n--b--',
]
OTHERS = [
    b"",
    b"{",
    b'{"return_attention_tokens": false}',
    b'{"input": "what does return_attention_tokens mean?"}',
    b"[" * 100_000,
    b'["return_attention_tokens"]',
]


@pytest.mark.parametrize("body", ASKING)
@pytest.mark.parametrize("pieces", [1, 5])
def test_an_asking_body_is_refused(body: bytes, pieces: int) -> None:
    status, reply = call("/v1/embeddings", body, pieces=pieces)
    error = json.loads(reply)["error"]
    assert status == 400 and error["param"] == "return_attention_tokens"
    assert "/v1/embeddings cannot carry attention" in error["message"] and "/v1/completions" in error["message"]


@pytest.mark.parametrize("body", OTHERS)
@pytest.mark.parametrize("pieces", [1, 3])
def test_other_bodies_pass_unchanged(body: bytes, pieces: int) -> None:
    assert call("/v1/embeddings", body, pieces=pieces) == (200, body)


@pytest.mark.parametrize("body", ASKING + OTHERS)
def test_routes_that_carry_pass(body: bytes) -> None:
    assert call("/v1/completions", body) == (200, body)
    assert call("/v1/completions", body, root="/behind/a/proxy") == (200, body)
    assert call("/v1/embeddings", body, method="GET") == (200, body)


def test_what_asks() -> None:
    assert asks(b'{"return_attention_tokens": true}') == "return_attention_tokens"
    assert asks(b'{"return_attention_tokens": null, "vllm_xargs": {"x": 1}, "attnhook": 1}') is None
    assert asks(b'{"custom_params": {"attnhook": "{}"}}') == "attnhook"
    assert asks(b'{"vllm_xargs": {"attention_mode": "raw"}}') == "attention_mode"
