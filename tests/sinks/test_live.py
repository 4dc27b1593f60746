"""The prometheus, otlp and websocket sinks, each against a real client or receiver."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import attnhook
from attnhook.errors import PluginError
from attnhook.record.zones import ZONE_NAMES
from attnhook.sinks.opening import open_sink
from attnhook.sinks.otlp import OtlpSink
from attnhook.sinks.prometheus import PrometheusSink
from attnhook.sinks.websocket import WebsocketSink
from tests.helpers import generate, tiny_model
from tests.sinks.samples import record


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# -- prometheus


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        return reply.read().decode()


def test_prometheus_counts_what_it_got_and_passes_promtool():
    sink = PrometheusSink()
    sink.open(":0")
    records = [record(i) for i in range(40)] + [record(40, decode_step=None)]
    sink.write(records)
    text = scrape(sink.port)
    lines = text.splitlines()
    assert 'attnhook_records_total{row="generated"} 40.0' in lines
    assert 'attnhook_records_total{row="prompt"} 1.0' in lines
    for name in ZONE_NAMES:
        count = sum(one.zone == name for one in records)
        assert f'attnhook_zone_records_total{{zone="{name}"}} {float(count)}' in lines
    local = sum(one.fingerprint[0] <= 0.5 for one in records)
    assert f'attnhook_mass_ratio_bucket{{band="local",le="0.5"}} {float(local)}' in lines
    assert "request" not in text.replace("attnhook_", ""), "request ids are no labels"
    promtool = shutil.which("promtool")
    if promtool is not None:  # the collector's test says so where it is missing
        result = subprocess.run([promtool, "check", "metrics"], input=text.encode(), capture_output=True, timeout=60)
        assert result.returncode == 0 and result.stderr == b"", result.stderr.decode()
    taken = PrometheusSink()
    with pytest.raises(PluginError, match="another process has that port"):
        taken.open(f"127.0.0.1:{sink.port}")
    sink.close()
    sink.close()
    with pytest.raises(OSError):
        scrape(sink.port)


@pytest.mark.slow  # imports Transformers
def test_prometheus_shows_capture_seconds_and_the_sinks_of_this_process():
    model = tiny_model()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    attnhook.install(sinks=[f"prometheus::{port}", "memory:"])
    try:
        generate(model)
        from attnhook.process import lifecycle

        assert lifecycle.flush(60)
        values = dict(line.rsplit(" ", 1) for line in scrape(port).splitlines() if not line.startswith("#"))
    finally:
        attnhook.uninstall()
    assert float(values["attnhook_capture_seconds_total"]) > 0
    assert float(values["attnhook_capture_steps_total"]) >= 5
    assert values['attnhook_sink_written_records_total{sink="memory:"}'] == "5.0"
    assert values['attnhook_records_total{row="generated"}'] == "5.0"


@pytest.mark.parametrize("config", ["", "x", "127.0.0.1", "127.0.0.1:99999", "a/b:1"])
def test_bad_addresses_are_refused(config):
    for scheme in ("prometheus", "websocket"):
        with pytest.raises(PluginError, match=f"sink {scheme}:.*such as 127.0.0.1:9464"):
            open_sink(f"{scheme}:{config}")


# -- otlp


class Receiver(http.server.BaseHTTPRequestHandler):
    """An OTLP/HTTP receiver that reads the protobuf."""

    requests: list[ExportTraceServiceRequest]
    status = 200

    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *_: object) -> None:
        """Keep the output clean."""


@pytest.fixture
def receiver():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.requests, server.status = [], 200
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def spans_of(server) -> dict[str, tuple]:
    found = {}
    for request in server.requests:
        for resource in request.resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    assert values["attnhook.request.id"] not in found, "one span per request"
                    found[values["attnhook.request.id"]] = (service, span, values)
    return found


def test_one_span_per_request_over_real_http(receiver):
    sink = open_sink(f"otlp:{receiver.url}")
    records = [record(i, request_id=f"r{i % 3}", decode_step=None if i < 3 else i) for i in range(30)]
    sink.write(records[:17])
    sink.write(records[17:])
    sink.close()
    found = spans_of(receiver)
    assert set(found) == {"r0", "r1", "r2"}
    for name, (service, span, values) in found.items():
        own = [one for one in records if one.request_id == name]
        assert (service, span.name) == ("attnhook", "attnhook.request")
        assert (values["attnhook.records"], values["attnhook.prompt_records"]) == (10, 1)
        assert values["gen_ai.request.model"] == "org/model"
        for zone in ZONE_NAMES:
            assert values[f"attnhook.zone.{zone}"] == sum(one.zone == zone for one in own) / 10
        assert np.isclose(values["attnhook.mean.local"], np.mean([one.fingerprint[0] for one in own]), atol=1e-6)
        assert 0 <= span.end_time_unix_nano - span.start_time_unix_nano < 60e9
        assert abs(span.start_time_unix_nano / 1e9 - time.time()) < 3600
    assert sink.dropped == {}


def test_a_request_that_is_silent_ends_by_itself():
    exporter = InMemorySpanExporter()
    sink = OtlpSink(exporter)
    sink.open("?idle=1s")
    sink.write([record(0, request_id="silent")])
    until(lambda: not sink._open, "the span ends")
    sink.write([record(0, request_id="other")])
    sink.close()
    names = [span.attributes["attnhook.request.id"] for span in exporter.get_finished_spans()]
    assert names == ["silent", "other"]


def test_a_receiver_that_refuses_is_counted(receiver):
    receiver.status = 400
    sink = open_sink(f"otlp:{receiver.url}/v1/traces")
    sink.write([record(0, request_id=name) for name in "abc"])
    sink.close()
    assert sink.dropped == {"export_failed": 3}


@pytest.mark.slow
def test_no_receiver_does_not_hold_up_the_close():
    sink = open_sink("otlp:http://127.0.0.1:9")
    sink.write([record(0)])
    began = time.monotonic()
    sink.close()
    assert sum(sink.dropped.values()) == 1
    assert time.monotonic() - began < 45


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_sends_its_own_requests_only(receiver):
    sink = OtlpSink()
    sink.open(f"http://127.0.0.1:{receiver.server_port}?idle=60s")
    sink.write([record(0, request_id="of the parent")])
    with sink._lock:  # as its thread has it now and then
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            sink.write([record(0, request_id="of the child")])
            sink.close()
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    sink.close()
    spans = [
        {attribute.key: attribute.value.string_value for attribute in span.attributes}["attnhook.request.id"]
        for request in receiver.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert sorted(spans) == ["of the child", "of the parent"]


def test_otlp_wants_an_http_address():
    for config in ("", "127.0.0.1:4318", "grpc://127.0.0.1:4317"):
        with pytest.raises(PluginError, match=r"otlp:http://127\.0\.0\.1:4318"):
            open_sink(f"otlp:{config}")


# -- websocket


def test_clients_see_records_as_they_come_and_nothing_is_computed_without_them():
    sink = WebsocketSink()
    sink.open("127.0.0.1:0")
    bad = record(0, fingerprints=np.full((2, 20), 7, np.float32))
    sink.write([bad])  # nobody looks, so nobody minds
    with connect(f"ws://127.0.0.1:{sink.port}") as one, connect(f"ws://127.0.0.1:{sink.port}") as two:
        until(lambda: sink.clients == 2, "two clients")
        sink.write([record(i, request_id="live") for i in range(3)])
        for client in (one, two):
            assert json.loads(client.recv(60)) == {"type": "hello", "schema_version": 1}
            message = json.loads(client.recv(60))
            assert message["type"] == "records"
            assert [entry["query_position"] for entry in message["records"]] == [0, 1, 2]
            assert message["records"][0] == {
                "request_id": "live", "choice": 0, "model": "org/model", **record(0).to_dict(),
            }  # fmt: skip
        one.close()
        until(lambda: sink.clients == 1, "one client left")
        sink.close()
        with pytest.raises(ConnectionClosed):
            two.recv(60)
    sink.close()


@pytest.mark.slow
def test_a_slow_client_is_dropped_and_the_others_see_everything():
    sink = WebsocketSink()
    sink.open("127.0.0.1:0")
    # a client that shakes hands and then reads nothing, with little room in the kernel
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", sink.port))
    slow.sendall(
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with connect(f"ws://127.0.0.1:{sink.port}") as quick:
        until(lambda: sink.clients == 2, "two clients")
        quick.recv(60)
        batch = [record(i) for i in range(200)]
        written = 0
        deadline = time.monotonic() + 120
        while sink.dropped["slow_client"] == 0:
            sink.write(batch)
            written += 1
            assert len(json.loads(quick.recv(60))["records"]) == 200
            assert time.monotonic() < deadline
        until(lambda: sink.clients == 1, "the slow one is gone")
        sink.write(batch[:1])
        assert len(json.loads(quick.recv(60))["records"]) == 1
    assert written > 64 and sink.dropped == {"slow_client": 1}
    slow.close()
    sink.close()


def test_who_may_watch():
    with pytest.raises(PluginError, match="give a token"):
        open_sink("websocket:0.0.0.0:0")
    with pytest.raises(PluginError, match="at least 8"):
        open_sink("websocket:127.0.0.1:0?token=short")
    sink = WebsocketSink()
    sink.open("127.0.0.1:0?token=long-enough&origin=https://explorer.example")
    url = f"ws://127.0.0.1:{sink.port}"

    def status(path: str = "", **arguments) -> int:
        try:
            with connect(url + path, **arguments) as client:
                client.recv(60)
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    assert status() == 401
    assert status("/?token=wrong") == 401
    assert status("/?token=long-enough") == 101
    assert status(additional_headers={"Authorization": "Bearer long-enough"}) == 101
    for origin in ("https://explorer.example", "http://localhost:5173", "http://127.0.0.1:8000"):
        assert status("/?token=long-enough", origin=origin) == 101
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        assert status("/?token=long-enough", origin=origin) == 403
    with pytest.raises(PluginError, match="another process has that port"):
        WebsocketSink().open(f"127.0.0.1:{sink.port}")
    sink.close()
