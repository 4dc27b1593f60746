"""Asking one server over HTTP, with headers that are for it alone."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from attnhook.system.addresses import scrubbed

_ERROR_BYTES = 2**20  # of an error's body


class StatusError(Exception):
    """The server answered with another status than 2xx."""

    def __init__(self, status: int, body: bytes, location: str | None) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body  #: at most 1 MiB of it
        self.location = location  #: where a redirect leads


class UnreachableError(Exception):
    """No answer, or none to its end. Its text is the cause, without the secrets of the address."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: the redirect becomes an HTTPError."""


def is_address(url: str) -> bool:
    """Whether it is the address of a server, such as ``http://127.0.0.1:8000/v1``: paths can be put behind it."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as it will be when it is looked up
        whole = bool(host) and parts.port != 0  # a port that is no number raises
    except ValueError:
        return False
    return whole and parts.scheme in ("http", "https") and not parts.query and not parts.fragment


def is_header(text: str) -> bool:
    """Whether a header may have this value."""
    return text.isascii() and text.isprintable()


class Site:
    """The server at ``url``, an address without a slash at its end, which gets ``headers`` with each request.

    It alone gets them: a redirect, which may lead to another host, is an error. Waits ``timeout`` seconds for each
    piece of an answer.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, timeout: float) -> None:
        self._url, self._headers, self._timeout = url, dict(headers), timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    @contextmanager
    def open(self, path: str, data: bytes | None = None) -> Iterator[Any]:
        """The open reply to a GET or, with ``data``, to a POST.

        Raises StatusError, and UnreachableError also for what breaks off until the reply is closed.
        """
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            with error:
                raise StatusError(error.code, _body(error), error.headers.get("Location")) from error
        except (OSError, HTTPException) as error:
            raise UnreachableError(scrubbed(str(getattr(error, "reason", None) or error), self._url)) from error


def _body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(_ERROR_BYTES)
    except (OSError, HTTPException):  # broken off: the status says enough
        return b""
