"""The exceptions that attnhook raises; each message says the cause, the value seen and the remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class AttnhookError(Exception):
    """Base class of every error that attnhook raises on purpose."""


class OptionError(AttnhookError, ValueError):
    """An option, request field or environment variable has an unknown name or a bad value.

    ``field`` is the name as the caller wrote it, so that a server can put it in its HTTP 400.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnsupportedError(AttnhookError, NotImplementedError):
    """The engine, model or decoding mode does something that cannot be captured exactly."""


class PluginError(AttnhookError, RuntimeError):
    """A plugin, backend or sink could not be found, loaded or opened."""


class ServerError(AttnhookError, RuntimeError):
    """A server cannot be reached, refuses a request or answers what attnhook cannot use.

    ``status`` is that of the HTTP reply, where there was one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RecordError(AttnhookError, ValueError):
    """Bytes or JSON that are not a token record of a schema version that this release reads."""


class DroppedError(AttnhookError):
    """A sink could not take ``count`` records, the last ones of a batch, and dropped them for ``reason`` (one word)."""

    def __init__(self, reason: str, count: int, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.count = count


@contextmanager
def naming(what: str, remedy: str) -> Iterator[None]:
    """Around a plugin's own code: what it raises by mistake becomes a PluginError that begins with ``what``.

    ``remedy`` is the message's end, with the punctuation before it. Errors that attnhook raises on purpose stay as they
    are.
    """
    try:
        yield
    except AttnhookError:
        raise
    except Exception as error:
        raise PluginError(f"{what}: {type(error).__name__}: {error}{remedy}") from error


def install(extra: str) -> str:
    """How a person installs what the extra ``attnhook[extra]`` names, from a registry and from a checkout."""
    return f"pip install 'attnhook[{extra}]', or in a checkout of attnhook pip install '.[{extra}]'"


def require(what: str, extra: str, *modules: str) -> None:
    """Before slow work: PluginError with the remedy where a module that ``what`` comes to need later is missing."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise PluginError(f"{what} needs {name}: {install(extra)}")


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Around an import of an optional library: where it fails, PluginError with the remedy, attnhook[extra]."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PluginError(f"{what} needs {error.name}: {install(extra)}") from error
    except ImportError as error:  # it is there, and broken or of another release
        cause = " ".join(str(error).split())
        raise PluginError(f"{what} cannot import what it needs ({cause}): {install(extra)}") from error
