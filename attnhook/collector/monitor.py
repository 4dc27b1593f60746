"""``attnhook monitor``: what a collector sees, on the terminal, as JSON lines or as Prometheus text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from attnhook.errors import OptionError, ServerError
from attnhook.record.zones import COLOURS
from attnhook.system.addresses import masked
from attnhook.system.web import Site, StatusError, UnreachableError, is_address, is_header

_TIMEOUT = 10.0  # seconds
_BAR = 40  # characters
_REPLY_BYTES = 64 * 2**20
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # escape sequences are not a producer's to send


class Source:
    """A collector at ``url``. Raises OptionError for an address that is none."""

    def __init__(self, url: str, token: str | None = None) -> None:
        if not is_address(url):
            raise OptionError("url", f"--url {masked(url)!r} must be an address such as http://127.0.0.1:9002")
        if token is not None and not is_header(token):
            raise OptionError("token", "the token must be printable ASCII, as HTTP headers are")
        self.url = url.rstrip("/")
        self.shown = masked(self.url)  #: for messages
        self._site = Site(self.url, {} if token is None else {"Authorization": f"Bearer {token}"}, timeout=_TIMEOUT)

    def stats(self) -> dict[str, Any]:
        """What GET /stats gives. Raises ServerError."""
        try:
            found = json.loads(self._get("/stats"))
            screen(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ServerError(f"{self.shown}/stats is not that of a collector: {error!r}; look at --url") from error
        return found  # type: ignore[no-any-return]

    def metrics(self) -> str:
        """What GET /metrics gives. Raises ServerError."""
        try:
            return self._get("/metrics").decode()
        except UnicodeDecodeError as error:
            raise ServerError(f"{self.shown}/metrics is not that of a collector: {error}; look at --url") from error

    def _get(self, path: str) -> bytes:
        try:
            with self._site.open(path) as reply:
                data: bytes = reply.read(_REPLY_BYTES + 1)
        except StatusError as error:
            raise ServerError(
                f"{self.shown}{path} answers HTTP {error.status}: {_remedy(error)}", error.status
            ) from error
        except UnreachableError as error:
            raise ServerError(
                f"{self.shown} cannot be reached: {error}; is `attnhook collect` running there?"
            ) from error
        if len(data) > _REPLY_BYTES:
            raise ServerError(f"{self.shown}{path} answers with more than {_REPLY_BYTES} bytes: look at --url")
        return data


def _remedy(error: StatusError) -> str:
    if error.status == 401:
        return "give its token with --token-file"
    if 300 <= error.status < 400:
        where = _clean(str(error.location))[:100]
        return (
            f"it sends elsewhere, to {where}; redirects are not followed, for the token's sake: give the collector's "
            "own address"
        )
    return "look at --url"


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
    parts += [Text(_clean(problem), "bold red") for problem in stats["problems"]]
    parts += [_stores(stats["stores"]), _requests(seen["top_requests"])]
    title = f"attnhook {stats['version']} · {stats['listen']} · up {stats['uptime_seconds']:,.0f} s"
    return Panel(Group(*parts), title=Text(_clean(title)))


def _ticks(interval: float, count: int, *, done: bool) -> Iterator[None]:
    """``count`` times, or for ever where it is 0, unless ``done`` already."""
    made = 0
    while not done and (count == 0 or made < count):
        time.sleep(interval)
        made += 1
        yield


def _count(name: str, count: int) -> Text:
    return Text.assemble((f"{name} ", "dim"), (f"{count:,}", "bold red" if count else "bold"))


def _clean(text: str) -> str:
    """A text that came from elsewhere, without what would steer the terminal."""
    return _CONTROL.sub("�", text)


def _reasons(dropped: dict[str, dict[str, int]]) -> str:
    return ", ".join(
        f"{_clean(store)} {_clean(reason)} {count:,}"
        for store, reasons in dropped.items()
        for reason, count in reasons.items()
    )


def _zones(shares: dict[str, float]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, share in shares.items():
        bar = Text("█" * round(share * _BAR), COLOURS.get(name, "white")).append(
            "·" * (_BAR - round(share * _BAR)), "dim"
        )
        table.add_row(Text(_clean(name)), bar, f"{share:6.1%}")
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
        state = Text(_clean(store["error"]), "red") if store["error"] else Text("ok", "green")
        table.add_row(
            Text(_clean(name)), f"{store['written']:,}", f"{store['queued']:,}", f"{store['retries']:,}", state
        )
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim")
    for name in ("request", "records", "entropy", "zone", "seen"):
        table.add_column(name, justify="right" if name in ("records", "entropy") else "left")
    for request in requests:
        table.add_row(
            Text(_clean(request["request_id"][:40])),  # Text: an id is no markup
            f"{request['records']:,}",
            f"{request['entropy']:.3f}",
            Text(request["zone"], COLOURS.get(request["zone"], "white")),
            f"{request['seconds_ago']:.0f} s ago",
        )
    return table
