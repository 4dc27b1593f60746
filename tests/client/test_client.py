"""``attnhook run --url``: a real vLLM server's answer, and one line of error where there is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnhook.client.client import Client
from attnhook.errors import OptionError, ServerError
from attnhook.record import fingerprint as fp
from attnhook.record.answer import SINK
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import without_sink
from attnhook.sinks.jsonl import read_jsonl
from tests.backends.vllm.engine import free_port, needs_vllm, serve
from tests.cli.test_run import (
    Cli,
    attnhook_cli,  # noqa: F401 - a fixture
    command,
    refused,
)

QUESTION = "What is the capital of France? 🎉"
CAPABILITIES = ("GET", "/v1/attention/capabilities")
MODELS = ("GET", "/v1/models")
CHAT = ("POST", "/v1/chat/completions")
TEXT = ("POST", "/v1/completions")
GOOD: dict[tuple[str, str], Any] = {
    CAPABILITIES: (200, {"engine": {"name": "vllm", "version": "1"}}),
    MODELS: (200, {"data": [{"id": "smol"}]}),
}


@contextmanager
def server(answers: dict[tuple[str, str], Any]) -> Iterator[tuple[str, list[Any]]]:
    """A real HTTP server, 404 where it has no answer; what it was asked.

    An answer is (status, JSON or bytes), or a function that makes it from the body of the request.
    """
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"null")
            asked.append((self.path, body, dict(self.headers)))
            found = answers.get((self.command, self.path), (404, {"detail": "Not Found"}))
            status, answer = found(body) if callable(found) else found
            self.send_response(status)
            if status == 307:
                self.send_header("Location", "/v1/models")
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


@pytest.mark.slow
def test_no_server_and_a_server_without_attnhook(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    ran = command("run", "--url", url, "--out", str(tmp_path / "r.jsonl"))
    refused(ran, url.removesuffix("/v1"), "cannot be reached", "refused", "vllm serve", folder=tmp_path)
    with server({}) as (url, _):
        refused(command("run", "--url", url), "has no attnhook", "404", "ATTNHOOK=1 vllm serve")


@pytest.mark.slow
def test_options_that_make_no_sense_are_refused() -> None:
    url = "http://127.0.0.1:9/v1"
    refused(command("run", "--url", url, "--dtype", "float32"), "--dtype cannot be used with --url")
    refused(command("run", "--url", url, "--device", "cpu"), "--device cannot be used with --url")
    refused(command("run", "--api-key", "secret"), "--api-key is for --url only")
    refused(command("run", "--url", url, "--top-k", "0"), "top_k=0")
    with server(GOOD) as (url, _):
        refused(command("run", "--url", url, "--model", "/models/a"), "'/models/a' is not served", "serves smol")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://host:x/", "http://a b/"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(OptionError, match="must be an address such as"):
        Client(url)


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    with server(GOOD) as (url, asked):
        Client(url, attention_key="k2").capabilities()
        Client(url + "/", api_key="k1").capabilities()
        headers = [{name.lower(): value for name, value in request[2].items()} for request in asked]
        assert headers[0]["authorization"] == "Bearer from-environment" and headers[0]["x-attention-key"] == "k2"
        assert headers[1]["authorization"] == "Bearer k1" and "x-attention-key" not in headers[1]
    with pytest.raises(OptionError, match=r"api_key.*ASCII") as bad:
        Client(url, api_key="a\nb-secret")
    assert "secret" not in str(bad.value)
    with server({CAPABILITIES: (307, {})}) as (url, asked):
        with pytest.raises(ServerError, match="HTTP 307"):
            Client(url).capabilities()
        assert len(asked) == 1  # the keys did not travel on


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ((400, error("top_k_attention=300\nmust be")), ["HTTP 400", "top_k_attention=300 must be", "change what"]),
        ((401, {"error": "Unauthorized"}), ["HTTP 401", "Unauthorized", "--api-key"]),
        ((403, error("wants its capture key")), ["HTTP 403", "wants its capture key", "--attention-key"]),
        ((429, error("12 requests are capturing")), ["HTTP 429", "12 requests", "try again later"]),
        ((500, b"\x1b[31mboom"), ["HTTP 500", "boom", "log"]),
        ((200, b"<html>"), ["does not answer in JSON"]),
        ((200, b"[]"), ["OpenAI-compatible"]),
        ((200, {}), ["without attention_tokens", "no choice"]),
        ((200, {"choices": [{"message": {}}]}), ["without attention_tokens", "message"]),
        (
            (200, {"choices": [{"attention_tokens": [], "attention_error": "no such layer"}]}),
            ["could not capture: no such layer"],
        ),
        ((200, {"choices": [{"attention_tokens": []}]}), ["without token ids"]),
        (
            (200, {"prompt_token_ids": [1], "choices": [{"token_ids": [2], "attention_tokens": [{}]}]}),
            ["schema_version None"],
        ),
    ],
)
def test_replies_that_cannot_be_used(answer: Any, parts: list[str], attnhook_cli: Cli) -> None:  # noqa: F811
    with server({**GOOD, CHAT: answer}) as (url, _):
        ran = attnhook_cli("run", "--url", url)
    refused(ran, *parts)
    assert "\x1b" not in ran.err


def test_without_a_chat_template_the_text_is_completed() -> None:
    missing = (400, error("you must provide a chat template if the tokenizer does not define one"))
    text = (200, {"choices": [{"text": " b", "prompt_token_ids": [1], "token_ids": [2], "attention_tokens": []}]})
    with server({**GOOD, CHAT: missing, TEXT: text, ("POST", "/detokenize"): (200, {"prompt": "x"})}) as (url, asked):
        reply = Client(url).ask("a", layers=(0, -1), top_k=3)
        assert (reply.text, reply.token_ids, reply.records, reply.engine) == (" b", [1, 2], [], "vllm 1")
        (body,) = [body for path, body, _ in asked if path == "/v1/completions"]
        assert (body["prompt"], body["attention_layers"], body["top_k_attention"]) == ("a", [0, -1], 3)


def test_one_request_for_the_text_of_a_token() -> None:
    ids = list(range(200))
    with server({("POST", "/detokenize"): (200, {"prompt": "x"})}) as (url, asked):
        Client(url).pieces("smol", ids)
        windows = [tuple(body["tokens"]) for _, body, _ in asked]
    assert len(windows) == len(set(windows)) <= 1.05 * len(ids)
    assert max(map(len, windows)) <= 40


def test_zones_are_those_of_a_local_run() -> None:
    """The JSON has each layer's own mass of the sink, whether it is among the reported positions or not."""
    rng = np.random.default_rng(0)
    p, k = 40, 4
    attention = rng.dirichlet(np.full(p + 1, 0.2), 3)
    attention[0, 0] += 2
    attention[1, 0] = 1e-3
    attention = attention / attention.sum(axis=1, keepdims=True)
    bins = [fp.bin_of(p - position) for position in range(p + 1)]
    histogram = np.stack([np.bincount(bins, row, fp.BINS) for row in attention])
    entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(axis=1) / np.log(p + 1)
    order = np.argsort(-attention, axis=1)[:, :k]
    assert not all(0 in row for row in order)
    record = TokenRecord(
        "r", p, (0, 1, 2), order.astype(np.int32), np.take_along_axis(attention, order, 1).astype(np.float32),
        fp.assemble(histogram, entropy).astype(np.float32), span_names=(SINK,),
        span_mass=attention[:, :1].astype(np.float32),
    )  # fmt: skip
    ids = {"prompt_token_ids": list(range(p + 1)), "token_ids": [7]}
    body = (200, {"choices": [{"message": {"content": "x"}, **ids, "attention_tokens": [record.to_dict()]}]})
    with server({**GOOD, CHAT: body, ("POST", "/detokenize"): (200, {"prompt": "x"})}) as (url, _):
        reply = Client(url).ask("a")
    np.testing.assert_allclose(reply.records[0].span_mass, record.span_mass, rtol=0, atol=1e-7)
    (mine,), (exact,) = reply.zones, without_sink([record], SINK)
    assert mine.name == exact.name and mine.confidence == pytest.approx(exact.confidence, abs=1e-5)


@needs_vllm
@pytest.mark.model
@pytest.mark.slow
def test_a_real_server(smol_path: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    html, out = folder / "report.html", folder / "records.jsonl"
    common = ("--prompt", QUESTION, "--layers", "auto", "--prompt-rows", "--max-new-tokens", "12")
    with serve(tmp_path, smol_path, ATTNHOOK_API_KEY="abc") as running:
        url = running.url + "/v1"
        remote = ("run", "--url", url, *common)
        # the server's own words, before any success
        refused(command(*remote, "--html", str(html)), "HTTP 403", "X-Attention-Key", "--attention-key", folder=folder)
        refused(command("run", "--url", url, "--layers", "99", "--attention-key", "abc"), "HTTP 400", "0..29")
        shown = command(*remote, "--attention-key", "abc", "--html", str(html), "--out", str(out))
        assert shown.code == 0, shown.err
        got = command(*remote, "--json", ATTNHOOK_API_KEY="abc").json
        text = command(*remote, "--no-chat", "--json", "--attention-key", "abc").json
    local = command("run", "--dtype", "float32", "--json", *common).json
    word = got["text"].split()[0]
    assert word and word in shown.out and "where each token looked (layer 29)" in shown.out
    assert shown.out.splitlines()[-2:] == [f"wrote {out}", f"wrote {html}"]
    # the same as the local run tells
    assert got["model"] == "smol"
    for name in ("text", "tokens", "token_ids", "prompt_length", "dropped"):
        assert got[name] == local[name], name
    assert "".join(got["tokens"]) == tokenizer.decode(got["token_ids"])
    new, prompt = len(got["token_ids"]) - got["prompt_length"], got["prompt_length"]
    for name, count in (("attention_tokens", new), ("prompt_attention_tokens", prompt - 1)):
        assert len(got[name]) == len(local[name]) == count
        for mine, theirs in zip(got[name], local[name], strict=True):
            assert mine["query_position"] == theirs["query_position"]
            assert mine["manifold"] == theirs["manifold"]
            np.testing.assert_allclose(mine["fingerprint"], theirs["fingerprint"], rtol=0, atol=1e-3)
            assert mine["spans"]["sink"] == pytest.approx(theirs["spans"]["sink"], abs=1e-3)
            for layer, numbers in mine["layers"].items():
                assert numbers["spans"]["sink"] == pytest.approx(theirs["layers"][layer]["spans"]["sink"], abs=1e-3)
    assert text["token_ids"][: text["prompt_length"]] == tokenizer(QUESTION)["input_ids"]
    lines = list(read_jsonl(out))
    assert len(lines) == new + prompt - 1 and {line["model"] for line in lines} == {"smol"}
    assert lines[0]["request_id"].startswith("chatcmpl-")
    page = html.read_text(encoding="utf-8")
    assert "on vllm" in page and "positions-3" in page and "spans-3" in page
