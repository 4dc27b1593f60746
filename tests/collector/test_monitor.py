"""``attnhook monitor`` against a real collector, and its screen."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from attnhook import monitor
from attnhook.errors import OptionError, ServerError
from attnhook.sinks.zmq import ZmqSink
from tests.collector.processes import collect, wait_for
from tests.helpers import python
from tests.sinks.samples import record

MAIN = "from attnhook.cli import main; main()"


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
