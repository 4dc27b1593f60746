"""vLLM's server surface: flags, guard rails, the capabilities endpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from attnhook.backends.vllm import frontend
from attnhook.errors import OptionError
from attnhook.options import RequestOptions
from attnhook.serving.capabilities import capabilities
from attnhook.serving.policy import FLAGS, Gate, Policy, Refusal
from attnhook.serving.wire import ASK

Original = Callable[..., Any]

_gate = Gate()


class _SetVariable(argparse.Action):
    """Hands a flag's value to every process that the server starts, as the variable that ``const`` names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = not (option_string or "").startswith("--no-")
        os.environ[self.const] = str(int(values) if isinstance(values, bool) else values)
        try:
            RequestOptions.resolve()
            Policy.from_environ()
        except OptionError as error:
            parser.error(f"{self.option_strings[0]}: {error}")
        setattr(namespace, self.dest, values)


def with_flags(original: Original) -> Original:
    """``EngineArgs.add_cli_args``: our flags in ``vllm serve --help``."""

    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(title="attnhook", description="Exact attention in replies (ATTNHOOK=1).")
        for flag in FLAGS:
            names = [flag.flag]
            settings: dict[str, Any] = {"action": _SetVariable, "const": flag.variable, "help": flag.help}
            if flag.kind is bool:
                names.append("--no-" + flag.flag[2:])
                settings["nargs"] = 0
            else:
                settings["type"] = flag.kind
            group.add_argument(*names, default=None, **settings)
        return parser

    return add_cli_args


def guarded(original: Original) -> Original:
    """``create_chat_completion`` and ``create_completion``: refuse with a clear status what may not be captured."""

    @wraps(original)
    async def create(self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ASK not in (request.model_extra or {}):
            return await original(self, request, raw_request, *args, **kwargs)
        try:
            options = frontend.options_of(request)
            if options is None:
                return await original(self, request, raw_request, *args, **kwargs)
            frontend.policy().check(options, raw_request.headers if raw_request is not None else {})
            _gate.enter(frontend.policy().max_concurrent)
        except OptionError as error:
            return self.create_error_response(str(error), param=error.field)
        except Refusal as refusal:
            status = HTTPStatus(refusal.status)
            return self.create_error_response(str(refusal), status.phrase, status, refusal.field)
        streaming = False
        try:
            with frontend.checked(request, options):
                reply = await original(self, request, raw_request, *args, **kwargs)
            streaming = hasattr(reply, "__aiter__")
            return _leaving(reply) if streaming else reply
        finally:
            if not streaming:
                _gate.leave()

    return create


async def _leaving(stream: Any) -> Any:
    """The stream; its place is free when it ends, however it ends."""
    try:
        async for line in stream:
            yield line
    finally:
        _gate.leave()


def with_capabilities(original: Original) -> Original:
    """``register_api_routers``: add ``GET /v1/attention/capabilities``."""

    @wraps(original)
    def register_api_routers(args: Any, app: Any, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, app, *rest, **kwargs)

        async def tell() -> dict[str, Any]:
            from attnhook.backends.vllm import VllmBackend

            name, layers, heads = frontend.model_shape()
            version, dtype = VllmBackend().version(), frontend.model_dtype()
            return capabilities("vllm", version, name, layers, heads, frontend.policy(), dtype=dtype)

        app.add_api_route("/v1/attention/capabilities", tell, methods=["GET"])
        return result

    return register_api_routers
