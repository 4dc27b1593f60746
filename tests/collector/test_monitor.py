"""``attnhook monitor`` against a real collector, and its screen."""

from __future__ import annotations

import http.server
import io
import json
import threading
from contextlib import contextmanager
from typing import ClassVar

import pytest
from rich.console import Console

from attnhook.collector import monitor
from attnhook.errors import OptionError, ServerError
from attnhook.sinks.zmq import ZmqSink
from tests.collector.processes import collect, wait_for
from tests.helpers import python
from tests.sinks.samples import record

MAIN = "from attnhook.cli.app import main; main()"


def shown(stats: dict) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(monitor.screen(stats))
    return console.export_text()


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    with collect(tmp_path_factory.mktemp("monitor"), "--store", "sqlite:x.db") as found:
        sink = ZmqSink()
        sink.open(found.address)
        sink.write([record(i, request_id=f"chat-[bold]{i % 3}") for i in range(30)])
        sink.close()
        wait_for(lambda: found.stats()["stores"]["sqlite:x.db"]["written"] == 30, "30 records written")
        yield found


def test_the_screen_shows_zones_rate_drops_and_requests(collector):
    stats = collector.stats()
    text = shown(stats)
    assert "received 30" in text and "dropped 0" in text and "sqlite:x.db" in text
    for name, share in stats["seen"]["recent"]["zones"].items():
        assert any(name in line and f"{share:.1%}" in line for line in text.splitlines())
    assert f"entropy {stats['seen']['recent']['means']['entropy']:.3f}" in text
    assert "chat-[bold]0" in text, "a request id is not markup"


def test_the_screen_shows_what_is_wrong(collector):
    stats = collector.stats()
    stats["problems"] = ["sqlite:x.db: database or disk is full"]
    stats["records"]["dropped"] = {"sqlite:x.db": {"queue_full": 1234}}
    stats["records"]["lost"] = 77
    stats["producers"]["dropped"] = {"collector_busy": 5}
    stats["seen"]["recent"]["means"] = dict.fromkeys(stats["seen"]["recent"]["means"])
    text = shown(stats)
    for piece in ("disk is full", "sqlite:x.db queue_full 1,234", "lost 77", "entropy -"):
        assert piece in text


@pytest.mark.slow
def test_the_command_in_its_three_modes(collector):
    live = python("-c", MAIN, "monitor", "--url", collector.url, "--count", "2", "--interval", "0.2")
    assert live.returncode == 0 and "received 30" in live.stdout, live.stderr
    lines = python("-c", MAIN, "monitor", "--url", collector.url, "--count", "2", "--interval", "0.2", "--jsonl")
    first, second = map(json.loads, lines.stdout.splitlines())
    assert first["records"]["received"] == 30 and second["uptime_seconds"] > first["uptime_seconds"]
    metrics = python("-c", MAIN, "monitor", "--url", collector.url, "--prometheus")
    assert "attnhook_collector_received_records_total 30.0" in metrics.stdout.splitlines()


def test_what_it_cannot_watch_is_one_line(collector, tmp_path):
    nobody = python("-c", MAIN, "monitor", "--url", "http://127.0.0.1:9", "--count", "1")
    assert nobody.returncode == 2 and nobody.stderr.count("\n") == 1
    assert "is `attnhook collect` running there?" in nobody.stderr
    with pytest.raises(OptionError, match="--url 'ftp://x'"):
        monitor.Source("ftp://x")
    with pytest.raises(ServerError, match="HTTP 404"):
        monitor.Source(collector.url + "/health").stats()


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Answers as ``reply`` says, and keeps what it was asked."""

    reply: tuple[int, dict[str, str], bytes] = (200, {}, b"")
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.asked.append((self.path, self.headers["Authorization"]))
        status, headers, body = self.reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def serving(status: int = 200, body: bytes = b"", **headers: str):
    """A server that gives one answer to everything: its address and what it was asked."""
    handler = type("Handler", (Elsewhere,), {"reply": (status, headers, body), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("what", ["stats", "metrics"])
def test_a_redirect_is_not_followed_and_the_token_goes_nowhere_else(collector, status, what):
    with (
        serving(200, json.dumps(collector.stats()).encode()) as (other, asked),
        serving(status, Location=other + "/stats") as (url, first),
        pytest.raises(ServerError, match=f"answers HTTP {status}: it sends elsewhere, to {other}") as error,
    ):
        getattr(monitor.Source(url, "secret-token"), what)()
    assert asked == [] and first == [(f"/{what}", "Bearer secret-token")]
    assert error.value.status == status


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[1]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"seen": {"recent": 3}}',
        b'{"seen": {"recent": {"rate": "fast"}}, "stores": {}, "records": {}}',
    ],
)
def test_what_is_no_collector_is_told_in_a_line(body):
    with serving(200, body) as (url, _), pytest.raises(ServerError, match="is not that of a collector"):
        monitor.Source(url).stats()
    with serving(200, b"\xff") as (url, _), pytest.raises(ServerError, match="is not that of a collector"):
        monitor.Source(url).metrics()


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(monitor, "_REPLY_BYTES", 1000)
    with serving(200, b" " * 10_000) as (url, _), pytest.raises(ServerError, match="more than 1000 bytes"):
        monitor.Source(url).metrics()


@pytest.mark.parametrize("url", ["http://[::1", "http://x:99999999", "http://a\x1bb", "http://x:y"])
def test_an_address_that_is_none(url):
    with pytest.raises(OptionError, match="must be an address"):
        monitor.Source(url)


def test_nothing_that_a_producer_sends_steers_the_terminal(collector):
    stats = collector.stats()
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m"
    stats["seen"]["top_requests"][0]["request_id"] = evil
    stats["problems"] = [evil]
    stats["stores"] = {evil: {**stats["stores"]["sqlite:x.db"], "error": evil}}
    stats["records"]["dropped"] = {evil: {evil: 1}}
    stats["listen"] = evil
    console = Console(width=110, file=io.StringIO(), force_terminal=False)
    console.print(monitor.screen(stats))
    assert not set(console.file.getvalue()) & {"\x1b", "\x07", "\x9b"}
