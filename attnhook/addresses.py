"""``host:port?name=value`` addresses of sinks and of the collector, and which of them leave this machine."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from attnhook.errors import PluginError


def host_port(text: str, *, user: str, default_host: str = "127.0.0.1") -> tuple[str, int]:
    """The host and the port of ``host:port``, ``[v6]:port`` or ``:port``; port 0 lets the system choose.

    Raises PluginError naming ``user``.
    """
    try:
        parts = urlsplit(f"//{text}")
        port, host = parts.port, parts.hostname or default_host
        if port is None or parts.path or parts.query or parts.username is not None:
            raise ValueError("it is not host:port")
    except ValueError as error:
        raise PluginError(f"{user}: bad address {text!r}: {error}; write one such as 127.0.0.1:9464") from error
    return host, port


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listener(host: str, port: int, *, user: str) -> socket.socket:
    """A bound and listening TCP socket. Raises PluginError where the port is taken or the host is not ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise PluginError(f"{user} cannot listen on {host}:{port}: {error}; {listen_remedy(error.errno)}") from error


def listen_remedy(code: int | None) -> str:
    """What to do about an address that cannot be listened on."""
    if code == errno.EADDRINUSE:
        return "another process has that port: stop it or choose another port"
    if code == errno.EADDRNOTAVAIL:
        return "that is no address of this machine: use 127.0.0.1 or one that `ip address` lists"
    if code == errno.EACCES:
        return "ports below 1024 are for root: choose a higher one"
    return "choose another address"


def split_options(config: str, allowed: Mapping[str, Callable[[str], Any]], *, user: str) -> tuple[str, dict[str, Any]]:
    """Split ``address?name=value&...``; ``allowed`` has a parser per name, which raises ValueError.

    Raises PluginError for an unknown name or a bad value.
    """
    address, _, query = config.partition("?")
    options: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in allowed:
            known = ", ".join(allowed)
            raise PluginError(f"{user}: unknown option {name!r} in {config!r}; it takes {known}")
        try:
            options[name] = allowed[name](text)
        except ValueError as error:
            raise PluginError(f"{user}: {name}={text!r} in {config!r}: {error}") from error
    return address, options


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else low - 1
        if not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A parser of seconds from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return value

    return parse
