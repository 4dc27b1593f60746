"""What is secret in an address is printed nowhere: in no error, log or command's output."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

import attnhook
from attnhook.client.client import Client
from attnhook.collector.monitor import Source as Monitor
from attnhook.errors import AttnhookError, OptionError
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Sink
from attnhook.process import lifecycle
from attnhook.sinks.delivery import Delivery
from attnhook.sinks.opening import open_sink
from attnhook.store import open_store
from attnhook.system.addresses import hiding, host_port, masked, scrubbed
from tests.helpers import ROOT, python
from tests.sinks.samples import record

SECRET = "geheim-4711"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("websocket:0.0.0.0:9003?token=S&origin=https://a.b", "websocket:0.0.0.0:9003?token=***&origin=https://a.b"),
        ("websocket:0.0.0.0:9003?tokn=S", "websocket:0.0.0.0:9003?tokn=***"),  # misspelt
        ("websocket:user:S@0.0.0.0:9003", "websocket:***@0.0.0.0:9003"),
        ("websocket:S@0.0.0.0:9003", "websocket:***@0.0.0.0:9003"),
        ("otlp:https://me:S@host:4318/v1?idle=5s", "otlp:https://***@host:4318/v1?idle=5s"),
        ("otlp:https://me:a/S@host:4318", "otlp:https://***@host:4318"),
        ("otlp:https://me:a?S@host:4318", "otlp:https://***@host:4318"),
        ("https://me:a@S@host/x@y", "https://***@host/x@y"),
        ("http://S@host", "http://***@host"),
        ("parquet:s3://AK:S@bucket/x?region=eu", "parquet:s3://***@bucket/x?region=eu"),
        ("http://127.0.0.1:8000/v1?API_KEY=S#x=S", "http://127.0.0.1:8000/v1?API_KEY=***#x=***"),
        ("udp:host:1?ttl=S", "udp:host:1?ttl=***"),  # of somebody else's sink: nobody knows
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://host/a@b", "http://host/a@b"),
        ("jsonl:/a@b/c@d.jsonl?every=1h&zstd=1", "jsonl:/a@b/c@d.jsonl?every=1h&zstd=1"),
        ("sqlite:a@b.db?tokens=1", "sqlite:a@b.db?tokens=1"),
        ("prometheus::9464", "prometheus::9464"),
        ("memory:", "memory:"),
        ("observer mine", "observer mine"),
    ],
)
def test_shown(url, expected):
    assert masked(url.replace("S", SECRET)) == expected
    assert masked(expected) == expected


def test_scrubbed_takes_parts_out_of_what_libraries_say():
    url = f"http://me:{SECRET}%21@host:1?token=other-{SECRET}"
    text = f"nonnumeric port: '{SECRET}%21@host'; {SECRET}! is wrong at {url}, other-{SECRET}"
    assert scrubbed(text, url) == "nonnumeric port: '***@host'; *** is wrong at http://***@host:1?token=***, ***"
    assert scrubbed("a word: me", "http://me@host") == "a word: me"  # too short to be told from a word


def test_hiding_keeps_the_error_and_its_field():
    with pytest.raises(OptionError) as caught, hiding(f"x:?token={SECRET}"):
        try:
            raise LookupError(SECRET)
        except LookupError as error:
            raise OptionError("url", f"{SECRET} is bad") from error
    assert (str(caught.value), caught.value.field, caught.value.__cause__) == ("*** is bad", "url", None)
    assert caught.value.__suppress_context__


def refusal(call: Any) -> str:
    with pytest.raises(AttnhookError) as caught:
        call()
    error: BaseException | None = caught.value
    assert error is not None
    told = str(error)
    while error is not None:  # what a traceback would print
        assert SECRET not in str(error), str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return told


URLS = [
    f"websocket:0.0.0.0:9003?tokn={SECRET}",
    f"websocket:me:{SECRET}@127.0.0.1:9003",
    f"websocket:nowhere?token={SECRET}",
    f"websocket:127.0.0.1:99999?token={SECRET}",
    f"websocket:127.0.0.1:9003?token={SECRET} with a space",
    f"prometheus:me:{SECRET}@127.0.0.1:9464",
    f"prometheus:127.0.0.1:9464?token={SECRET}",
    f"otlp:ftp://me:{SECRET}@host",
    f"otlp:http://me:{SECRET}@host?idle=never",
    f"otlp:http://host?token={SECRET}",
    f"zmq:nowhere://me:{SECRET}@host",
    f"zmq:tcp://me:{SECRET}@host?hwm=0",
    f"parquet:s3://AK:{SECRET}@bucket/x",
    f"parquet:s3://AK:a/{SECRET}@bucket/x",
    f"parquet:nosuch://me:{SECRET}@host/x?token={SECRET}",
    f"jsonl:/no/such/folder/x?password={SECRET}",
    f"sqlite:/no/such/folder/x?key={SECRET}",
    f"nosuch:x?token={SECRET}",
    f"memory:x?token={SECRET}",
]


@pytest.mark.parametrize("url", URLS)
def test_a_sink_that_is_refused_does_not_tell(url):
    refusal(lambda: open_sink(url))
    refusal(lambda: Delivery.from_urls(["memory:", url, url]))
    refusal(lambda: attnhook.install(sinks=url))
    if url.partition(":")[0] in ("jsonl", "sqlite", "parquet", "nosuch", "otlp"):
        refusal(lambda: open_store(url))
    with pytest.raises(OptionError) as caught:
        attnhook.install(sinks=[url, 3])
    assert SECRET not in str(caught.value)
    assert lifecycle.installed() == {}


@pytest.mark.parametrize("client", [Client, Monitor])
@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@127.0.0.1:1",
        f"http://me:a/{SECRET}@127.0.0.1:1/v1",
        f"ftp://me:{SECRET}@h",
        f"http://h:1/?token={SECRET}",
    ],
)
def test_clients_do_not_tell(client, url):
    told = refusal(lambda: client(url).get("/x") if client is Client else client(url).stats())
    assert "***" in told


class Failing(Sink):
    """Says in its errors where it writes to."""

    def open(self, config: str) -> None:
        self.config = config

    def write(self, batch: Any) -> None:
        raise OSError(f"{self.config} does not take it")

    def flush(self) -> None:
        raise OSError(f"{self.config} does not flush")

    def close(self) -> None:
        raise OSError(f"{self.config} does not close")


def test_the_log_and_thread_names_do_not_tell(caplog, monkeypatch):
    real = plugins.sink_classes()
    monkeypatch.setattr(plugins, "sink_classes", lambda: {**real, "failing": Failing})
    url = f"failing:http://me:{SECRET}@host?token=x{SECRET}"
    with caplog.at_level(logging.DEBUG), Delivery.from_urls([url], observe=False) as delivery:
        delivery.put([record(0)])
        delivery.flush(60)
        names = [thread.name for thread in threading.enumerate()]
    assert "attnhook failing:http://***@host?token=***" in names
    assert [r.message for r in caplog.records if r.name == "attnhook"] == [
        "failing:http://***@host?token=*** failed to write: OSError: http://***@host?token=*** does not take it",
        "failing:http://***@host?token=*** failed to flush: OSError: http://***@host?token=*** does not flush",
        "failing:http://***@host?token=*** failed to close: OSError: http://***@host?token=*** does not close",
        "attention records were dropped, by sink and reason: "
        "{'failing:http://***@host?token=***': {'write_failed': 1}}",
    ]
    assert SECRET not in caplog.text
    assert delivery.stats()[url]["dropped"] == {"write_failed": 1}  # the sink's own name stays


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("sinks", "test", f"websocket:127.0.0.1:0?token={SECRET}"),
        ("sinks", "test", f"otlp:http://me:{SECRET}@127.0.0.1:1?idle=1s"),
        ("sinks", "test", f"websocket:127.0.0.1:9003?tokn={SECRET}"),
        ("sinks", "prune", f"parquet:s3://me:{SECRET}@x", "--keep-days", "1"),
        ("sinks", "convert", f"parquet:s3://me:{SECRET}@x", f"sqlite:/x?token={SECRET}"),
        ("verify", "--url", f"http://me:{SECRET}@127.0.0.1:1"),
        ("verify", "--url", f"http://127.0.0.1:1?key={SECRET}"),
        ("monitor", "--url", f"http://me:{SECRET}@127.0.0.1:1", "--prometheus"),
        ("run", "--url", f"http://me:{SECRET}@127.0.0.1:1", "hello"),
    ],
    ids=" ".join,
)
def test_no_command_tells(arguments):
    code = f"import sys; sys.argv = {['attnhook', *arguments]!r}; from attnhook.cli.app import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_start_up_does_not_tell():
    code = "import transformers; print('ran')"
    done = python("-c", code, ATTNHOOK="1", ATTNHOOK_SINKS=f"websocket:0.0.0.0:9003?tokn={SECRET}")
    assert done.stdout == "ran\n" and "unknown option 'tokn'" in done.stderr
    assert SECRET not in done.stderr


def test_host_port():
    assert host_port("127.0.0.1:1", user="x") == ("127.0.0.1", 1)
    told = refusal(lambda: host_port(f"me:{SECRET}@127.0.0.1:1", user=f"sink x:me:{SECRET}@127.0.0.1:1"))
    assert told.startswith("sink x:***@127.0.0.1:1: bad address '***@127.0.0.1:1'")
