"""Places for captures: each is given back, however its request ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.responses import StreamingResponse

from attnhook.backends.vllm import server
from attnhook.serving.gate import Gate
from tests.backends.vllm.engine import needs_vllm

pytestmark = needs_vllm


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_gate", Gate())


def streamed(chunks: int, *, leaves_after: int | None, fails: bool = False) -> int:
    """Lines that a client gets of a guarded stream, which it may leave, from a real StreamingResponse."""

    async def create(self: Any, request: Any, raw_request: Any = None) -> AsyncIterator[str]:
        async def lines() -> AsyncIterator[str]:
            for _ in range(chunks):
                yield "data: x\n\n"
            if fails:
                raise ValueError("the engine's")

        return lines()

    got = 0
    gone = asyncio.Event()

    async def send(message: Any) -> None:
        nonlocal got
        got += bool(message.get("body"))
        if leaves_after is not None and got >= leaves_after:
            gone.set()
        await asyncio.sleep(0)  # as behind a middleware, or where the socket is full

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def main() -> None:
        if leaves_after == 0:
            gone.set()
        request = SimpleNamespace(model_extra={"return_attention_tokens": True})
        reply = await server.guarded(create)(None, request)
        assert server._gate.count == 1
        await StreamingResponse(reply)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)

    asyncio.run(main())
    return got


@pytest.mark.parametrize("leaves_after", [None, 0, 1, 3])
def test_a_stream_gives_its_place_back(leaves_after: int | None) -> None:
    got = streamed(5, leaves_after=leaves_after)
    gc.collect()
    assert got == 5 if leaves_after is None else got <= leaves_after + 1
    assert server._gate.count == 0


def test_a_stream_that_fails_gives_its_place_back() -> None:
    with pytest.raises(Exception, match=r"the engine's|unhandled errors"):  # in a group or not
        streamed(2, leaves_after=None, fails=True)
    gc.collect()
    assert server._gate.count == 0
