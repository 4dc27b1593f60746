"""``host:port`` addresses of sinks and of the collector, which of them leave this machine, and how URLs are shown."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from attnhook.errors import AttnhookError, PluginError
from attnhook.system import moved

__getattr__ = moved.names(__name__, {"shown": "system.addresses:masked"})

_HIDDEN = "***"
#: Options of the built-in sinks that are no secret; a value of any other may be one, if only by a misspelt name.
_OPEN = frozenset(
    {"allow_bucket_creation", "busy", "endpoint_override", "every", "fingerprints", "hash_ids", "hwm", "idle"}
    | {"keep_days", "linger", "origin", "region", "rotate", "scheme", "spool", "tokens", "zstd"}
)
_WITH_PATHS = ("jsonl", "memory", "parquet", "sqlite")  # sinks whose place may hold an @ of its own
_SCHEME = re.compile(r"([A-Za-z][\w+.-]*):")
_OPTION = re.compile(r"[?&#;]([^=&#;?/\s]+)=([^&#;\s]*)")


def _secrets(url: str) -> list[tuple[int, int]]:
    """Where the user info and the values of options lie in a URL, as half-open ranges."""
    found: list[tuple[int, int]] = []
    places = [match.end() for match in re.finditer("//", url)]
    if not places and (scheme := _SCHEME.match(url)) and scheme[1].lower() not in _WITH_PATHS:
        places = [scheme.end()]  # websocket:user:password@host:9003
    for start in places:
        if found and start < found[-1][1]:
            continue
        end = min((at for at in (url.find(mark, start) for mark in "/?#") if at >= 0), default=len(url))
        port = url[start:end].rpartition(":")[2]
        if "@" not in url[start:end] and ":" in url[start:end] and not (port.isdigit() or port.endswith("]")):
            end = len(url)  # no port stands there: a password with a slash in it
        at = url.rfind("@", start, end)
        if at >= 0:
            found.append((start, at))
    for option in _OPTION.finditer(url):
        if option[1].lower() not in _OPEN and option[2]:
            found.append(option.span(2))
    return sorted(found)


def masked(url: str) -> str:
    """A URL of a sink or a server as messages and logs may have it: ``***`` for its user info and its options' values.

    Values of the built-in sinks' harmless options (``every=1m``) stay.
    """
    parts, done = [], 0
    for start, end in _secrets(url):
        if start >= done:
            parts += [url[done:start], _HIDDEN]
            done = end
    return "".join([*parts, url[done:]])


def scrubbed(text: str, *urls: str) -> str:
    """A text, such as another library's error, with everything out of it that `masked` hides in these URLs."""
    for url in urls:
        text = text.replace(url, masked(url))
        hidden = {url[start:end] for start, end in _secrets(url)}
        hidden |= {secret.rpartition(":")[2] for secret in hidden}
        hidden |= {unquote(secret) for secret in hidden}
        for secret in sorted(hidden, key=len, reverse=True):
            if len(secret) > 3:  # shorter ones are in many a word
                text = text.replace(secret, _HIDDEN)
    return text


@contextmanager
def hiding(*urls: str) -> Iterator[None]:
    """Take out of attnhook's own errors what `masked` hides in these URLs, whoever wrote it into them."""
    try:
        yield
    except AttnhookError as error:
        clean = scrubbed(str(error), *urls)
        if clean == str(error):
            raise
        error.args = (clean, *error.args[1:])
        raise error from None  # its cause may have the secret too


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
        # not chained: the library's own error repeats the address, with what should not be shown
        place, at, rest = text.rpartition("@")
        hidden = masked(f"x:{_HIDDEN}@{rest}" if at else f"x:{text}")[2:]
        raise PluginError(
            f"{scrubbed(user, f'x:{text}')}: bad address {hidden!r}: {scrubbed(str(error), f'x:{text}', place)}; write "
            "one such as 127.0.0.1:9464"
        ) from None
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
    """A bound TCP socket that listens, for ``::`` also to IPv4.

    Raises PluginError where the port is taken or the host is not ours.
    """
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
