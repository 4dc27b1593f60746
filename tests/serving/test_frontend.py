"""A server's front end without an engine: who is admitted, what is refused, and that every place is given back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.responses import StreamingResponse

from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.frontend import FrontEnd, ServedModel
from attnhook.serving.gate import LeavingStream, Place
from attnhook.serving.policy import Policy
from attnhook.serving.refusal import Refusal

ASKING = {"return_attention_tokens": True}
MODEL = ServedModel("fake-4", range(4), 8, "float32", "cpu")


def front_end(model: ServedModel = MODEL, **policy: Any) -> FrontEnd:
    front = FrontEnd("fake", lambda: "1.0", lambda: model, ("/v1/completions",))
    front.policy = Policy(**policy)  # type: ignore[misc] # what ATTNHOOK_* would tell
    return front


def carry(front: FrontEnd, fields: dict[str, Any], headers: dict[str, str] | None = None, **answer: Any) -> Any:
    """What a route answers: the options that reached the engine, or the refusal as (status, field, message)."""

    async def run(options: RequestOptions | None, place: Place | None) -> tuple[Any, bool]:
        assert front.gate.count == (options is not None)
        if options is not None and "tokens" in answer:
            front.measure(options, place, *answer["tokens"])
        if "fails" in answer:
            raise answer["fails"]
        return options, False

    def refuse(error: OptionError | Refusal) -> Any:
        return getattr(error, "status", 400), error.field, str(error)

    found = asyncio.run(front.carry(fields, headers or {}, run, refuse))
    assert front.gate.count == 0
    return found


def test_options_reach_the_engine_as_the_server_serves_them() -> None:
    options = carry(front_end(mask_prefix=5), {**ASKING, "top_k_attention": 3, "attention_spans": {"all": [0, 9]}})
    assert (options.top_k, options.mask_prefix, options.spans) == (3, 5, {"all": (5, 9)})
    assert carry(front_end(), {"return_attention_tokens": False}) is None


@pytest.mark.parametrize(
    ("policy", "fields", "status", "field"),
    [
        ({}, {"top_k_attention": 1000}, 400, "top_k_attention"),
        ({}, {"attention_layers": [4]}, 400, "attention_layers"),
        ({}, {"attention_heads": [8]}, 400, "attention_heads"),
        ({"allowed": False}, {}, 403, "return_attention_tokens"),
        ({"api_key": "secret"}, {"top_k_attention": 1000}, 403, "return_attention_tokens"),
        ({"fingerprint_only": True}, {}, 403, "attention_mode"),
    ],
)
def test_what_is_refused_names_its_field(policy: dict[str, Any], fields: Any, status: int, field: str) -> None:
    found = carry(front_end(**policy), {**ASKING, **fields})
    assert found[:2] == (status, field) and field in found[2]


def test_the_key_lets_in_and_places_run_out() -> None:
    front = front_end(api_key="secret", max_concurrent=1)
    key = {"x-attention-key": "secret"}
    assert carry(front, ASKING, key).top_k == 32
    taken = front.gate.place()
    found = asyncio.run(_refused(front, key))
    assert found.status == 429 and "1 requests are capturing already" in str(found)
    taken.leave()
    assert carry(front, ASKING, key).top_k == 32


async def _refused(front: FrontEnd, headers: dict[str, str]) -> Any:
    async def run(options: Any, place: Any) -> Any:
        raise AssertionError("it was let in")

    return await front.carry(ASKING, headers, run, lambda error: error)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (ServedModel("embedder", generates=False), "embedder generates no tokens"),
        (ServedModel("mamba", layers=()), "mamba has no attention layer"),
    ],
)
def test_a_model_that_has_nothing_says_so(model: ServedModel, why: str) -> None:
    front = front_end(model, capture_all=True)
    status, field, message = carry(front, ASKING)
    assert (status, field) == (400, "return_attention_tokens") and why in message
    assert front.everything() is None
    assert (front.carrying() == ()) is not model.generates


def test_all_traffic_is_captured_as_fingerprints_where_the_server_wants_it() -> None:
    assert front_end().everything() is None
    everything = front_end(capture_all=True).everything()
    assert everything is not None and everything.mode == "fingerprint"


def test_a_request_that_comes_to_too_much_is_refused_and_leaves_no_trace() -> None:
    front = front_end(max_bytes=100_000, max_bytes_in_flight=120_000)
    fields = {**ASKING, "attention_layers": "all"}
    status, _, message = carry(front, fields, tokens=(10, 500, 1))
    assert status == 400 and "may come to" in message and "100000" in message
    status, field, _ = carry(front, {**fields, "attention_spans": {"far": [100, 200]}}, tokens=(10, 20, 1))
    assert (status, field) == (400, "attention_spans")
    held = front.gate.place()
    held.reserve(100_000, None)
    status, _, message = _busy(front, fields)
    assert status == 429 and "at the same time" in message
    held.leave()
    assert front.gate.bytes == 0


def _busy(front: FrontEnd, fields: dict[str, Any]) -> Any:
    async def run(options: Any, place: Any) -> Any:
        front.measure(options, place, 10, 20, 1)
        raise AssertionError("there was room")

    return asyncio.run(front.carry(fields, {}, run, lambda error: (getattr(error, "status", 400), "", str(error))))


def test_an_engine_that_fails_gives_the_place_back() -> None:
    front = front_end()
    with pytest.raises(RuntimeError, match="the engine's"):
        carry(front, ASKING, fails=RuntimeError("the engine's"))
    gc.collect()
    assert front.gate.count == 0


def test_capabilities_tell_the_model_and_the_limits() -> None:
    told = asyncio.run(front_end(max_concurrent=3).capabilities())
    assert told["engine"] == {"name": "fake", "version": "1.0"} and told["model"] == "fake-4"
    assert told["layers"] == [0, 1, 2, 3] and told["query_heads"] == 8 and told["limits"]["max_concurrent"] == 3


# -- streams


def streamed(front: FrontEnd, chunks: int, *, leaves_after: int | None, fails: bool = False) -> int:
    """Lines that a client gets of a guarded stream, which it may leave, from a real StreamingResponse."""

    async def lines() -> AsyncIterator[str]:
        for _ in range(chunks):
            yield "data: x\n\n"
        if fails:
            raise ValueError("the engine's")

    got = 0
    gone = asyncio.Event()

    async def run(options: Any, place: Any) -> tuple[Any, bool]:
        return LeavingStream(lines(), place), True

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
        reply = await front.carry(ASKING, {}, run, SimpleNamespace)
        assert front.gate.count == 1
        await StreamingResponse(reply)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)

    asyncio.run(main())
    return got


@pytest.mark.slow
@pytest.mark.parametrize("leaves_after", [None, 0, 1, 3])
def test_a_stream_gives_its_place_back(leaves_after: int | None) -> None:
    front = front_end()
    got = streamed(front, 5, leaves_after=leaves_after)
    gc.collect()
    assert got == 5 if leaves_after is None else got <= leaves_after + 1
    assert front.gate.count == 0


def test_a_stream_that_fails_gives_its_place_back() -> None:
    front = front_end()
    with pytest.raises(Exception, match=r"the engine's|unhandled errors"):  # in a group or not
        streamed(front, 2, leaves_after=None, fails=True)
    gc.collect()
    assert front.gate.count == 0
