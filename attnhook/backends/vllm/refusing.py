"""Errors of ours as vLLM knows a client's: HTTP 400 on every route, and an `OptionError` in Python."""

from __future__ import annotations

from functools import cache
from typing import Any

from attnhook.errors import OptionError


@cache
def _error_class() -> type[OptionError]:
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:  # it answers a ValueError with HTTP 400
        return OptionError

    class ClientError(OptionError, VLLMValidationError):  # type: ignore[misc]
        """An `OptionError` that vLLM answers with HTTP 400, on whatever route it comes."""

        parameter: str | None
        value: Any = None

        def __init__(self, field: str, message: str) -> None:
            super().__init__(field, message)
            self.parameter = field

        def __str__(self) -> str:
            return str(self.args[0])

    return ClientError


def client_error(field: str, message: str) -> OptionError:
    """What a client did wrong, to be raised."""
    return _error_class()(field, message)
