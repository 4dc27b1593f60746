"""At the routes: who may ask, records in replies, the server's flags and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving import (
    ASK,
    KEY,
    Attention,
    LeavingStream,
    Place,
    Refusal,
    RouteGuard,
    ServedModel,
    add_flags,
    safely,
)
from tinyserve_attnhook import requests
from tinyserve_attnhook.requests import Asking, Ticket, front_end, ticket

Original = Callable[..., Any]


def wrap_completions(original: Original) -> Original:
    """``completions``: refuse with a clear status what may not be captured."""

    @wraps(original)
    async def completions(http: HttpRequest) -> Any:
        async def run(options: RequestOptions | None, place: Place | None) -> tuple[Any, bool]:
            if options is None or place is None:
                return await original(http), False
            mine = Ticket(options, place)
            token = ticket.set(mine)
            try:
                reply = await original(http)
            finally:
                ticket.reset(token)
            if mine.error is not None:
                raise mine.error
            streams = hasattr(reply, "body_iterator")
            if streams:
                reply.body_iterator = LeavingStream(reply.body_iterator, place)
            return reply, streams

        try:
            body = await http.json()
        except ValueError:  # which tinyserve refuses by itself
            body = None
        if not isinstance(body, dict) or ASK not in body:
            return await original(http)
        return await front_end.carry(body, http.headers, run, _refuse)

    return completions


def _refuse(error: OptionError | Refusal) -> JSONResponse:
    status = 400 if isinstance(error, OptionError) else error.status
    told = {"message": str(error), "type": "BadRequestError", "param": error.field, "code": status}
    return JSONResponse({"error": told}, status)


def wrap_choice(original: Original) -> Original:
    """``choice``: the fields of the records that come with these tokens."""

    @wraps(original)
    def choice(request: Any, text: str, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        fields = original(request, text, outputs, *args, **kwargs)
        asking: Asking | None = getattr(request, "attnhook", None)
        if asking is not None and asking.reply:
            found = safely(_settled, request.id, asking, outputs)
            if found is None:
                found = Attention(error="the records of these tokens are lost; the server's log says why")
            fields |= found.fields()
        return fields

    return choice


def _settled(request: str, asking: Asking, outputs: list[Any]) -> Attention:
    found = Attention()
    for output in outputs:
        if KEY in output.extra:
            found.extend(Attention.of(output.extra[KEY], request, 0))
    asking.sent += len(outputs)
    return asking.account.settle(found, asking.sent, finished=outputs[-1].finished)


def wrap_make_app(original: Original) -> Original:
    """``make_app``: ``GET /v1/attention/capabilities``; other routes say that they carry no records."""

    @wraps(original)
    def make_app(engine: Any, *args: Any, **kwargs: Any) -> Any:
        from tinyserve_attnhook import hooks

        hooks.check_in_place(("requests.", "server."))
        requests.served = ServedModel.of(engine.model.name, engine.model.config, dtype="float32", device="cpu")
        app = original(engine, *args, **kwargs)
        app.add_route("/v1/attention/capabilities", _capabilities, methods=["GET"])
        app.add_middleware(RouteGuard, carrying=front_end.carrying)
        return app

    return make_app


async def _capabilities(http: HttpRequest) -> JSONResponse:
    return JSONResponse(await front_end.capabilities())


def wrap_make_parser(original: Original) -> Original:
    """``make_parser``: our flags in ``python -m tinyserve --help``."""

    @wraps(original)
    def make_parser(*args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        add_flags(parser)
        return parser

    return make_parser
