"""Asking a server with a key: what is an address, and how each thing that can go wrong is told."""

from __future__ import annotations

import json
import socket

import pytest

from attnhook.client.client import Client
from attnhook.collector.monitor import Source
from attnhook.errors import OptionError, ServerError
from attnhook.system.web import Site, StatusError, UnreachableError, is_address, is_header
from tests.collector.test_monitor import serving


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("https://models.example.com", True),
        ("http://[::1]:9002", True),
        ("http://user:password@10.0.0.7:80/a/b", True),
        ("ftp://x", False),
        ("127.0.0.1:8000", False),
        ("http://", False),
        ("http://:80", False),
        ("http://x:y", False),
        ("http://x:0", False),
        ("http://x:65536", False),
        ("http://[::1", False),
        ("http://x?a=b", False),  # a path behind it would be a part of the query
        ("http://x/#top", False),
        ("http://a b", False),
        ("http://a\x1bb", False),
        ("http://é.example", False),
        ("http://.example.com", False),  # Python's look-up raises UnicodeError for these two
        (f"http://{'a' * 64}.example", False),
    ],
)
def test_what_is_an_address(url, good):
    assert is_address(url) is good
    if not good:
        for use in (Client, Source):
            with pytest.raises(OptionError, match="must be an address such as http://127"):
                use(url)


def test_what_a_header_may_be():
    assert is_header("Bearer abc def") and is_header("")
    assert not is_header("a\nb") and not is_header("é") and not is_header("a\x7f")


def test_headers_and_data_arrive_and_the_reply_is_given():
    with serving(200, b"hello") as (url, asked):
        with Site(url, {"Authorization": "Bearer k"}, timeout=10).open("/a") as reply:
            assert reply.read() == b"hello"
        with Site(url, {}, timeout=10).open("/b", b"{}") as reply:
            assert reply.status == 200
    assert asked == [("/a", "Bearer k"), ("/b", None)]


def ask(url: str, data: bytes | None = None, timeout: float = 10) -> bytes:
    with Site(url, {"Authorization": "k"}, timeout=timeout).open("/", data) as reply:
        return reply.read()


@pytest.mark.slow
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("data", [None, b"{}"])
def test_a_redirect_is_an_error_and_is_not_followed(status, data):
    with (
        serving(200, b"{}") as (other, asked),
        serving(status, b"moved", Location=other + "/x") as (url, first),
        pytest.raises(StatusError) as error,
    ):
        ask(url, data)
    assert (error.value.status, error.value.body, error.value.location) == (status, b"moved", other + "/x")
    assert len(first) == 1 and asked == []


def test_of_an_errors_body_no_more_is_read_than_is_told():
    with serving(500, b"x" * 3_000_000) as (url, _), pytest.raises(StatusError) as error:
        ask(url)
    assert error.value.body == b"x" * 2**20 and error.value.location is None


def test_an_error_whose_body_breaks_off_is_told_by_its_status():
    broken = {"Transfer-Encoding": "chunked"}
    with serving(503, b"ff\r\nonly the beginn", **broken) as (url, _):
        with pytest.raises(ServerError, match="gives HTTP 503: no message; the server's log says more") as error:
            Client(url).get("/v1/models")
        assert error.value.status == 503
        with pytest.raises(ServerError, match="answers HTTP 503"):
            Source(url).stats()


def test_a_reply_that_breaks_off_is_no_answer():
    with serving(200, b"ff\r\nonly the beginn", **{"Transfer-Encoding": "chunked"}) as (url, _):
        with pytest.raises(UnreachableError):
            ask(url)
        with pytest.raises(ServerError, match="cannot be reached"):
            Client(url).get("/v1/models")


def test_nobody_there_and_somebody_who_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="timed out"):
            ask(url, timeout=0.2)
    with pytest.raises(UnreachableError, match="refused"):
        ask(url)


def test_the_cause_does_not_tell_the_addresss_secrets():
    with pytest.raises(UnreachableError, match="nonnumeric port") as error:  # http.client knows no user info
        ask("http://user:hunter22@127.0.0.1")
    assert "hunter22" not in str(error.value)


def test_what_an_answer_holds_is_the_askers_to_judge():
    with serving(200, b"no json") as (url, _):
        with pytest.raises(ServerError, match="does not answer in JSON"):
            Client(url).get("/v1/models")
        with pytest.raises(json.JSONDecodeError), Site(url, {}, timeout=10).open("/") as reply:
            json.loads(reply.read())
