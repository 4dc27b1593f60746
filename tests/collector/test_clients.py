"""Slow HTTP clients, many of them, against the collector's real HTTP server."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
import urllib.request

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from attnhook.collector import clients
from attnhook.collector.server import Server
from tests.collector.peers import ended
from tests.collector.processes import Collect, ended_at_last, wait_for

BIG = 64 * 2**20


async def echo(request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def big(request) -> Response:
    return Response(bytes(BIG))


async def slow(request) -> Response:
    await asyncio.sleep(3)
    return PlainTextResponse("slow")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(clients, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(clients, "BODY_SECONDS", 2.0)
    monkeypatch.setattr(clients, "UNREAD_SECONDS", 1.0)
    monkeypatch.setattr(clients, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(clients, "MAX_CONNECTIONS", 10)
    found = Server("127.0.0.1:0", token=None)
    found.start(Starlette(routes=[Route("/echo", echo, methods=["POST"]), Route("/big", big), Route("/slow", slow)]))
    yield found
    found.stop()


def opened(url: str, data: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=60)
    sock.sendall(data)
    return sock


def asked(url: str, data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(url, data, timeout=30) as reply:
        return reply.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent, least, most",
    [
        (b"", 0.9, 2),
        (b"GET /echo HT", 0.9, 2),
        (b"GET /echo HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", 0.9, 2),
        (b"POST /echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n123", 1.9, 3),
    ],
    ids=["nothing", "line", "headers", "body"],
)
def test_a_request_that_does_not_come_is_not_waited_for(server, sent, least, most):
    began = time.monotonic()
    with opened(server.url, sent) as sock:
        assert ended(sock)
    assert least < time.monotonic() - began < most + 5, "five seconds for a busy machine"


@pytest.mark.slow
def test_a_second_request_on_a_connection_has_its_own_time(server):
    one = b"POST /echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\nx"
    with opened(server.url, one) as sock:
        for _ in range(4):
            assert b"200 OK" in sock.recv(65536)
            time.sleep(0.5)
            sock.sendall(one)
        assert b"200 OK" in sock.recv(65536)
        sock.sendall(b"POST /ec")
        assert ended(sock)


@pytest.mark.slow
def test_an_answer_that_takes_long_is_not_a_slow_client(server):
    assert asked(server.url + "/slow") == b"slow"


@pytest.mark.slow
def test_who_does_not_read_the_answer_is_let_go_and_who_reads_slowly_is_not(server, monkeypatch):
    monkeypatch.setattr(
        clients, "UNREAD_SECONDS", 5.0
    )  # beside other tests a reader may wait a second for the processor
    request = b"GET /big HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with opened(server.url, request) as deaf, opened(server.url, request) as reading:
        got = 0
        while got < BIG:
            part = reading.recv(2**20)
            assert part, f"ended after {got} bytes"
            got += len(part)
            time.sleep(0.01)
        time.sleep(6)
        assert ended(deaf)


def test_who_asks_at_once_is_answered_however_many_do_not(server):
    half = [opened(server.url, b"GET /echo HT") for _ in range(200)]
    for i in range(5):
        began = time.monotonic()
        assert asked(server.url + "/echo", b"x" * i) == str(i).encode()
        assert time.monotonic() - began < 5
    open_now = 0
    for sock in half:
        sock.setblocking(False)
        try:
            open_now += sock.recv(1) != b""
        except BlockingIOError:
            open_now += 1
        except ConnectionError:
            continue
    assert open_now <= 10, "the oldest ones made room"
    for sock in half:
        sock.close()


@pytest.mark.slow
def test_with_256_descriptors_a_collector_answers_beside_900_half_sent_requests_and_500_half_open_peers(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        started = Collect(tmp_path, "--store", "sqlite:x.db")  # which inherits the limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ended_at_last(started) as collector:
        half = []
        for i in range(900):
            half.append(opened(collector.url, b"GET /stats HTTP/1.1\r\nHost: 127.0.0.1\r\n"))
            if i % 2:
                half.append(opened(collector.address.replace("tcp", "http"), b"\xff"))
            if i % 100 == 99:
                assert collector.get("/health") == (200, b'{"status":"ok"}')
        stats = collector.stats()
        assert stats["problems"] == [] and stats["connections"]["open"] <= 85
        wait_for(lambda: collector.stats()["connections"]["open"] == 0, "the end of half-open peers", 60)

        def turned_away() -> int:
            closed = collector.stats()["http"]["closed"]
            return closed["crowded"] + closed["late_request"]

        # before the sockets close here: a client that leaves is neither
        wait_for(lambda: turned_away() == 900, "the end of half-sent requests", 60)
        for sock in half:
            sock.close()
        assert collector.get("/health")[0] == 200
        assert turned_away() == 900 and collector.stats()["http"]["closed"]["unread_answer"] == 0
