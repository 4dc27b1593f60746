"""SGLang's server surface: flags, guard rails, OpenAI replies, the capabilities endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from attnhook.backends.sglang import frontend
from attnhook.backends.sglang.frontend import front_end
from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.flags import add_flags
from attnhook.serving.gate import Place
from attnhook.serving.refusal import Refusal
from attnhook.serving.replies import Attention, Stream
from attnhook.serving.routes import RouteGuard
from attnhook.serving.wire import ASK, KEY

Original = Callable[..., Any]


def wrap_add_cli_args(original: Original) -> Original:
    """``ServerArgs.add_cli_args``: our flags in ``sglang serve --help``."""

    @wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(parser, *args, **kwargs)
        add_flags(parser)
        return result

    return add_cli_args


def wrap_handle_request(original: Original) -> Original:
    """``OpenAIServingBase.handle_request``: refuse what may not be captured, put records into chat and text replies."""

    @wraps(original)
    async def handle_request(self: Any, request: Any, raw_request: Any, *args: Any, **kwargs: Any) -> Any:
        async def run(options: RequestOptions | None, place: Place | None) -> tuple[Any, bool]:
            if options is None or place is None:
                return await original(self, request, raw_request, *args, **kwargs), False
            ticket = frontend.Ticket(options, place, Stream() if getattr(request, "stream", False) else None)
            raw_request.scope[KEY] = ticket
            reply = await original(self, request, raw_request, *args, **kwargs)
            if ticket.error is not None:
                return refuse(ticket.error), False
            streams = hasattr(reply, "body_iterator")
            if streams:
                reply.body_iterator = frontend.lines(reply.body_iterator, ticket, place)
            return _with_records(reply, ticket) if hasattr(reply, "choices") else reply, streams

        def refuse(error: OptionError | Refusal) -> Any:
            if isinstance(error, OptionError):
                return self.create_error_response(str(error), param=error.field)
            status = HTTPStatus(error.status)
            return self.create_error_response(str(error), status.phrase, status.value, error.field)

        body = getattr(raw_request, "_json", None)
        if not isinstance(body, dict) or ASK not in body or not _carries(self):
            return await original(self, request, raw_request, *args, **kwargs)
        return await front_end.carry(body, raw_request.headers, run, refuse)

    return handle_request


def _carries(serving: Any) -> bool:
    """Whether the replies of a route have choices that records fit into."""
    return hasattr(serving, "_build_chat_response") or hasattr(serving, "_build_completion_response")


def _with_records(reply: Any, ticket: frontend.Ticket) -> Any:
    """A whole reply with its records; SGLang's own classes of choices take no further fields."""
    from starlette.responses import Response

    data = json.loads(reply.model_dump_json(by_alias=True))
    found = ticket.reader.choices if ticket.reader is not None else {}
    for choice in data["choices"]:
        choice.update(found.get(choice["index"], Attention()).fields())
    return Response(json.dumps(data, ensure_ascii=False, separators=(",", ":")), media_type="application/json")


class _Routes(list[Any]):
    """SGLang's routes and ours; a list of its own, so that it can be told apart and taken back."""


def add_routes(original: list[Any]) -> _Routes:
    """``app.router.routes``: add ``GET /v1/attention/capabilities``."""
    from fastapi.routing import APIRoute

    return _Routes([*original, APIRoute("/v1/attention/capabilities", front_end.capabilities, methods=["GET"])])


class _Middleware(list[Any]):
    """SGLang's middleware and ours; a list of its own, so that it can be told apart and taken back."""


def add_middleware(original: list[Any]) -> _Middleware:
    """``app.user_middleware``: the routes that can't carry records say so; the last one in the list runs first."""
    from starlette.middleware import Middleware

    return _Middleware([*original, Middleware(RouteGuard, carrying=front_end.carrying)])
