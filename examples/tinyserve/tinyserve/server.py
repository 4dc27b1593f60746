"""HTTP: ``POST /v1/completions``, whole or streamed, and ``GET /v1/models``, on 127.0.0.1 alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tinyserve import engine as engines
from tinyserve import parallel
from tinyserve.engine import Engine, Output, Request


def make_app(engine: Engine, tokenizer: Any) -> Starlette:
    """The application of one engine."""
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/health", lambda _: Response(), methods=["GET"]),
    ]
    app = Starlette(routes=routes)
    app.state.engine, app.state.tokenizer, app.state.name = engine, tokenizer, engine.model.name
    return app


async def models(http: HttpRequest) -> Response:
    """What is served."""
    return JSONResponse({"object": "list", "data": [{"id": http.app.state.name, "object": "model"}]})


async def completions(http: HttpRequest) -> Response:
    """One prompt, as text or token ids, and its answer."""
    state = http.app.state
    try:
        body = await http.json()
        outputs, request = submit(state, body)
    except (ValueError, TypeError, AttributeError) as error:
        return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
    replies = _replies(state, body, request, outputs)
    if body.get("stream"):
        return StreamingResponse(_events(replies), media_type="text/event-stream")
    return JSONResponse([reply async for reply in replies][-1])


def submit(state: Any, body: dict[str, Any]) -> tuple[asyncio.Queue[Any], Request]:
    """Let a body's prompt be answered; the queue gets its outputs. Raises ValueError and TypeError for a bad body."""
    loop, outputs = asyncio.get_running_loop(), asyncio.Queue[Any]()
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompt = state.tokenizer(prompt)["input_ids"]
    vocabulary = state.engine.model.config.vocab_size
    if not isinstance(prompt, list) or not all(isinstance(one, int) and 0 <= one < vocabulary for one in prompt):
        raise ValueError(f"prompt must be text or a list of token ids below {vocabulary}")
    if body.get("n", 1) != 1:
        raise ValueError(f"n={body['n']!r}: tinyserve gives one choice")
    stop = [] if body.get("ignore_eos") else [state.tokenizer.eos_token_id]
    request = Request(
        prompt,
        int(body.get("max_tokens", 16)),
        lambda output: loop.call_soon_threadsafe(outputs.put_nowait, output),
        frozenset(one for one in stop if one is not None),
        float(body.get("temperature", 0)),
    )
    state.engine.submit(request)
    return outputs, request


async def _replies(
    state: Any, body: dict[str, Any], request: Request, queue: asyncio.Queue[Any]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream, one a token; else one whole reply."""
    outputs: list[Output] = []
    made, sent = int(time.time()), ""
    try:
        while not outputs or not outputs[-1].finished:
            output = await queue.get()
            if isinstance(output, Exception):
                raise RuntimeError("the engine has ended, its log says why") from output
            outputs.append(output)
            if body.get("stream") or output.finished:
                text = state.tokenizer.decode([one.token for one in outputs], skip_special_tokens=True)
                if text.endswith("\ufffd") and not output.finished:
                    text = sent  # a character whose last bytes are still to come
                new = outputs[-1:] if body.get("stream") else outputs
                reply = {
                    "id": request.id,
                    "object": "text_completion",
                    "created": made,
                    "model": state.name,
                    "choices": [choice(request, text[len(sent) :], new, bool(body.get("return_token_ids")))],
                }
                if output.finished:
                    answer = {"prompt_tokens": len(request.prompt), "completion_tokens": len(outputs)}
                    reply["usage"] = {**answer, "total_tokens": sum(answer.values())}
                sent = text
                yield reply
    finally:
        request.aborted = not outputs or not outputs[-1].finished  # the client is gone


def choice(request: Request, text: str, outputs: list[Output], tell_ids: bool) -> dict[str, Any]:
    """The choice of a reply, or of a stream's chunk, that brings these outputs."""
    reason = None
    if outputs[-1].finished:
        reason = "stop" if outputs[-1].token in request.stop else "length"
    ids = {"token_ids": [one.token for one in outputs]} if tell_ids else {}
    return {"index": 0, "text": text, "finish_reason": reason, **ids}


async def _events(replies: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    async for reply in replies:
        yield f"data: {json.dumps(reply)}\n\n"
    yield "data: [DONE]\n\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tinyserve", description=__doc__)
    parser.add_argument("model", help="folder of a Llama model")
    parser.add_argument("--port", type=int, default=8009)
    parser.add_argument("--served-model-name", help="default: the folder")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="processes that share the model")
    parser.add_argument("--pages", type=int, default=512, help="of 16 tokens, of the key cache")
    parser.add_argument("--budget", type=int, default=64, help="most tokens of one pass")
    return parser


def main() -> None:
    """Serve until Ctrl-C."""
    parser = make_parser()
    arguments = parser.parse_args()
    name = arguments.served_model_name or arguments.model
    from transformers import AutoTokenizer

    try:
        model = parallel.start(arguments.model, name, arguments.pages, arguments.tensor_parallel)
    except ValueError as error:
        parser.error(str(error))
    engine = engines.start(model, arguments.pages, arguments.budget)
    app = make_app(engine, AutoTokenizer.from_pretrained(arguments.model))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")
