"""``attnhook monitor``: what a collector sees, on the terminal, as JSON lines or as Prometheus text."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from attnhook.analysis.zones import COLOURS
from attnhook.errors import OptionError, ServerError

_TIMEOUT = 10.0  # seconds
_BAR = 40  # characters


class Source:
    """A collector at ``url``. Raises OptionError for an address that is none."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or " " in url:
            raise OptionError("url", f"--url {url!r} must be an address such as http://127.0.0.1:9002")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise OptionError("token", "the token must be printable ASCII, as HTTP headers are")
        self.url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def stats(self) -> dict[str, Any]:
        """What GET /stats gives. Raises ServerError."""
        try:
            found = json.loads(self._get("/stats"))
            found["seen"]["recent"], found["stores"], found["records"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/stats is not that of a collector: {error!r}; look at --url") from error
        return found  # type: ignore[no-any-return]

    def metrics(self) -> str:
        """What GET /metrics gives. Raises ServerError."""
        return self._get("/metrics").decode()

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
                data: bytes = reply.read()
                return data
        except urllib.error.HTTPError as error:
            remedy = "give its token with --token-file" if error.code == 401 else "look at --url"
            raise ServerError(f"{self.url}{path} answers HTTP {error.code}: {remedy}", error.code) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"{self.url} cannot be reached: {reason}; is `attnhook collect` running there?"
            ) from error


def show(source: Source, interval: float, count: int, console: Console | None = None) -> None:
    """A live screen; ends after ``count`` looks (0: with Ctrl-C). A collector that goes away is waited for."""
    first = source.stats()  # a wrong address is an error, not a screen
    console = console or Console()
    with Live(screen(first), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        live.refresh()
        try:
            for _ in _ticks(interval, count - 1 if count else 0, done=count == 1):
                try:
                    shown = screen(source.stats())
                except ServerError as error:
                    shown = Panel(Text(str(error), "red"))
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return


def print_stats(source: Source, interval: float, count: int) -> None:
    """One JSON object a line."""
    print(json.dumps(source.stats()), flush=True)
    for _ in _ticks(interval, count - 1 if count else 0, done=count == 1):
        print(json.dumps(source.stats()), flush=True)


def print_metrics(source: Source, interval: float, count: int) -> None:
    """The metrics, ``count`` times."""
    print(source.metrics(), end="", flush=True)
    for _ in _ticks(interval, count - 1, done=count == 1):
        print(source.metrics(), end="", flush=True)


def screen(stats: dict[str, Any]) -> RenderableType:
    """One look at a collector's stats."""
    seen, recent, records = stats["seen"], stats["seen"]["recent"], stats["records"]
    head = Table.grid(padding=(0, 3))
    head.add_row(
        Text.assemble(("records/s ", "dim"), (f"{recent['rate']:,.0f}", "bold")),
        Text.assemble(("received ", "dim"), (f"{records['received']:,}", "bold")),
        _count("lost", records["lost"]),
        _count("dropped", sum(sum(reasons.values()) for reasons in records["dropped"].values())),
        _count("rejected", sum(stats["messages"]["rejected"].values()) + sum(records["bad"].values())),
        _count("dropped by producers", sum(stats["producers"]["dropped"].values())),
    )
    parts: list[RenderableType] = [head, _zones(recent["zones"]), _means(recent["means"])]
    if any(records["dropped"].values()):
        parts.append(Text("drops: " + _reasons(records["dropped"]), "yellow"))
    parts += [Text(problem, "bold red") for problem in stats["problems"]]
    parts += [_stores(stats["stores"]), _requests(seen["top_requests"])]
    title = f"attnhook {stats['version']} · {stats['listen']} · up {stats['uptime_seconds']:,.0f} s"
    return Panel(Group(*parts), title=title)


def _ticks(interval: float, count: int, *, done: bool) -> Iterator[None]:
    """``count`` times, or for ever where it is 0, unless ``done`` already."""
    made = 0
    while not done and (count == 0 or made < count):
        time.sleep(interval)
        made += 1
        yield


def _count(name: str, count: int) -> Text:
    return Text.assemble((f"{name} ", "dim"), (f"{count:,}", "bold red" if count else "bold"))


def _reasons(dropped: dict[str, dict[str, int]]) -> str:
    return ", ".join(
        f"{store} {reason} {count:,}" for store, reasons in dropped.items() for reason, count in reasons.items()
    )


def _zones(shares: dict[str, float]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, share in shares.items():
        bar = Text("█" * round(share * _BAR), COLOURS.get(name, "white")).append(
            "·" * (_BAR - round(share * _BAR)), "dim"
        )
        table.add_row(name, bar, f"{share:6.1%}")
    return table


def _means(means: dict[str, float | None]) -> Text:
    return Text(
        "last minute, means: "
        + "  ".join(f"{name} {'-' if mean is None else format(mean, '.3f')}" for name, mean in means.items())
    )


def _stores(stores: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim")
    for name in ("store", "written", "waiting", "retries", "state"):
        table.add_column(name, justify="left" if name in ("store", "state") else "right")
    for name, store in stores.items():
        state = Text(store["error"], "red") if store["error"] else Text("ok", "green")
        table.add_row(Text(name), f"{store['written']:,}", f"{store['queued']:,}", f"{store['retries']:,}", state)
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim")
    for name in ("request", "records", "entropy", "zone", "seen"):
        table.add_column(name, justify="right" if name in ("records", "entropy") else "left")
    for request in requests:
        table.add_row(
            Text(request["request_id"][:40]),  # Text: an id is no markup
            f"{request['records']:,}",
            f"{request['entropy']:.3f}",
            Text(request["zone"], COLOURS.get(request["zone"], "white")),
            f"{request['seconds_ago']:.0f} s ago",
        )
    return table
