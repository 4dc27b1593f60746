"""``host:port`` addresses of sinks and of the collector, and which of them leave this machine."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from attnhook.errors import PluginError


def host_port(text: str, *, user: str, default_host: str = "127.0.0.1") -> tuple[str, int]:
    """The host and the port of ``host:port``, ``[v6]:port`` or ``:port``; port 0 lets the system choose.

    Raises PluginError naming ``user``.
    """
    try:
        parts = urlsplit(f"//{text}")
        port, host = parts.port, parts.hostname or default_host
        if port is None or parts.path or parts.query or parts.fragment or parts.username is not None:
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


def require_token(host: str, token: str | None, *, user: str) -> None:
    """Refuse, by PluginError, an address that other machines can reach without a token."""
    if token is not None and (len(token) < 8 or not (token.isascii() and token.isprintable()) or " " in token):
        raise PluginError(f"{user}: the token must be at least 8 printable ASCII characters without spaces")
    if token is None and not is_loopback(host):
        raise PluginError(
            f"{user}: {host} can be reached from other machines: give a token, or listen on 127.0.0.1 (the default)"
        )


def same_token(given: str | None, token: str) -> bool:
    """Whether they are equal, in a time that does not tell how much of them is."""
    return given is not None and hmac.compare_digest(given.encode(errors="replace"), token.encode())


def listener(host: str, port: int, *, user: str) -> socket.socket:
    """A bound TCP socket that listens, for ``::`` also to IPv4. Raises PluginError where the port is taken or the host is not ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        code = getattr(error, "errno", None)
        raise PluginError(f"{user} cannot listen on {host}:{port}: {error}; {listen_remedy(code)}") from error


def listen_remedy(code: int | None) -> str:
    """What to do about an address that cannot be listened on."""
    if code == errno.EADDRINUSE:
        return "another process has that port: stop it or choose another port"
    if code == errno.EADDRNOTAVAIL:
        return "that is no address of this machine: use 127.0.0.1 or one that `ip address` lists"
    if code == errno.EACCES:
        return "ports below 1024 are for root: choose a higher one"
    return "choose another address"
