"""vLLM's server surface: flags, guard rails, the capabilities endpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from attnhook.backends.vllm import frontend
from attnhook.backends.vllm.frontend import front_end
from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.flags import add_flags
from attnhook.serving.gate import LeavingStream, Place
from attnhook.serving.refusal import Refusal
from attnhook.serving.routes import RouteGuard
from attnhook.serving.wire import ASK

Original = Callable[..., Any]


def wrap_add_cli_args(original: Original) -> Original:
    """``EngineArgs.add_cli_args``: our flags in ``vllm serve --help``."""

    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def wrap_create(original: Original) -> Original:
    """``create_chat_completion`` and ``create_completion``: refuse with a clear status what may not be captured."""

    @wraps(original)
    async def create(self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        async def run(options: RequestOptions | None, place: Place | None) -> tuple[Any, bool]:
            if options is None or place is None:
                return await original(self, request, raw_request, *args, **kwargs), False
            if getattr(request, "use_beam_search", False):
                raise OptionError(
                    ASK, f"{ASK}=true with use_beam_search=true: beam search cannot be captured; drop one"
                )
            with frontend.admitted(request, options, place):
                reply = await original(self, request, raw_request, *args, **kwargs)
            streams = hasattr(reply, "__aiter__")
            return LeavingStream(reply, place) if streams else reply, streams

        def refuse(error: OptionError | Refusal) -> Any:
            if isinstance(error, OptionError):
                return self.create_error_response(str(error), param=error.field)
            status = HTTPStatus(error.status)
            return self.create_error_response(str(error), status.phrase, status, error.field)

        fields = request.model_extra or {}
        if ASK not in fields:
            return await original(self, request, raw_request, *args, **kwargs)
        return await front_end.carry(fields, raw_request.headers if raw_request is not None else {}, run, refuse)

    return create


def wrap_register_vllm_serve_api_routers(original: Original) -> Original:
    """``register_vllm_serve_api_routers``: add ``GET /v1/attention/capabilities``, and guard the other routes."""

    @wraps(original)
    def register_vllm_serve_api_routers(app: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(app, *args, **kwargs)
        app.add_api_route("/v1/attention/capabilities", front_end.capabilities, methods=["GET"])
        app.add_middleware(RouteGuard, carrying=front_end.carrying)
        frontend.serving()
        return result

    return register_vllm_serve_api_routers
