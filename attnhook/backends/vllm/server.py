"""vLLM's server surface: flags, guard rails, the capabilities endpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from attnhook.backends.vllm import frontend
from attnhook.errors import OptionError
from attnhook.serving.capabilities import capabilities
from attnhook.serving.flags import add_flags
from attnhook.serving.gate import Gate, Place, leave_with_the_reply
from attnhook.serving.refusal import Refusal
from attnhook.serving.routes import RouteGuard
from attnhook.serving.wire import ASK

Original = Callable[..., Any]

_gate = Gate()


def with_flags(original: Original) -> Original:
    """``EngineArgs.add_cli_args``: our flags in ``vllm serve --help``."""

    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def guarded(original: Original) -> Original:
    """``create_chat_completion`` and ``create_completion``: refuse with a clear status what may not be captured."""

    @wraps(original)
    async def create(self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ASK not in (request.model_extra or {}):
            return await original(self, request, raw_request, *args, **kwargs)
        policy, place, streaming = frontend.policy(), None, False
        try:
            if request.model_extra[ASK]:  # who may not ask learns nothing from how the fields are checked
                policy.admit(raw_request.headers if raw_request is not None else {})
            options = frontend.options_of(request)
            if options is None:
                return await original(self, request, raw_request, *args, **kwargs)
            options = policy.apply(options)
            place = _gate.place(policy.max_concurrent)
            with frontend.admitted(request, options, place):
                reply = await original(self, request, raw_request, *args, **kwargs)
            streaming = hasattr(reply, "__aiter__")
            return _Leaving(reply, place) if streaming else reply
        except OptionError as error:
            return self.create_error_response(str(error), param=error.field)
        except Refusal as refusal:
            status = HTTPStatus(refusal.status)
            return self.create_error_response(str(refusal), status.phrase, status, refusal.field)
        finally:
            if place is not None and not streaming:
                leave_with_the_reply(place)

    return create


class _Leaving:
    """A stream whose place is free when it ends, fails or is thrown away.

    A generator would not do: its ``finally`` never runs where the client is gone before the first chunk is taken.
    """

    def __init__(self, stream: Any, place: Place) -> None:
        self._stream, self._place = stream, place  # which is left where both are dropped

    def __aiter__(self) -> _Leaving:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._stream)
        except BaseException:  # its end, an error, or the client is gone
            self._place.leave()
            raise

    async def aclose(self) -> None:
        """Close the engine's stream too."""
        self._place.leave()
        await self._stream.aclose()


_CARRYING = frozenset({"/v1/chat/completions", "/v1/completions", "/invocations"})


def _carrying() -> frozenset[str]:
    return _CARRYING if frontend.generates() else frozenset()


def with_capabilities(original: Original) -> Original:
    """``register_vllm_serve_api_routers``: add ``GET /v1/attention/capabilities``, and guard the other routes."""

    @wraps(original)
    def register_vllm_serve_api_routers(app: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(app, *args, **kwargs)

        async def tell() -> dict[str, Any]:
            from attnhook.backends.vllm import VllmBackend

            name, layers, heads = frontend.model_shape()
            return capabilities(
                "vllm", VllmBackend().version(), name, layers, heads, frontend.policy(),
                dtype=frontend.model_dtype(), device=frontend.model_device(), generates=frontend.generates(),
            )  # fmt: skip

        app.add_api_route("/v1/attention/capabilities", tell, methods=["GET"])
        app.add_middleware(RouteGuard, carrying=_carrying)
        frontend.serving()
        return result

    return register_vllm_serve_api_routers
