"""Hostile clients of a real SGLang server: see `tests.backends.hostile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.hostile import ENVIRONMENT, KEY, Route, hostile_run
from tests.backends.sglang.engine import needs_sglang, serve

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_sglang]

NEW = 5


def chat(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "word " * words}]


def sampling(**fields: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, **fields}


ROUTES = [
    *2 * [
        Route("/v1/chat/completions", lambda n: {"model": "smol", "messages": chat(n), "max_tokens": NEW}, True),
        Route("/v1/completions", lambda n: {"model": "smol", "prompt": "word " * n, "max_tokens": NEW}, True),
        Route("/generate", lambda n: {"text": "word " * n, "sampling_params": sampling()}, True),
    ],
    Route("/generate", lambda n: {"text": ["word " * n, "Hi"], "sampling_params": [sampling(), sampling()]}, True),
    Route("/invocations", lambda n: {"model": "smol", "messages": chat(n), "max_tokens": NEW}, True),
    Route("/api/generate", lambda n: {"model": "smol", "prompt": "word " * n, "options": {"num_predict": NEW}}),
    Route("/api/chat", lambda n: {"model": "smol", "messages": chat(n), "options": {"num_predict": NEW}}),
    Route("/v1/responses", lambda n: {"model": "smol", "input": "word " * n, "max_output_tokens": NEW}),
    Route("/v1/messages", lambda n: {"model": "smol", "messages": chat(n), "max_tokens": NEW}),
    Route("/v1/embeddings", lambda n: {"model": "smol", "input": "word " * n}),
    Route(
        "/vertex_generate",
        lambda n: {"instances": [{"text": "word " * n}], "parameters": {"sampling_params": sampling()}},
    ),
    Route("/tokenize", lambda n: {"model": "smol", "prompt": "word " * n}),
]  # fmt: skip
HIDDEN: list[Any] = [
    lambda fields: {"custom_params": fields},
    lambda fields: {"sampling_params": sampling(custom_params=fields)},
    lambda fields: {"parameters": {"sampling_params": sampling(custom_params=fields)}},
]


@pytest.mark.long  # vLLM's asks the same of the same guard rails
def test_hostile_clients(smol_path: str, tmp_path: Path) -> None:
    sink = tmp_path / "sink.jsonl"
    with serve(tmp_path, smol_path, **ENVIRONMENT, ATTNHOOK_SINKS=f"jsonl:{sink}") as server:
        small = {"model": "smol", "prompt": "Hi", "max_tokens": 2}
        hostile_run(server, ROUTES, HIDDEN, small, sink)
        log = server.log.read_text(errors="replace")
    assert KEY not in log, "the key is in the server's log"
    assert "attention of one request is lost" not in log and "capture failed" not in log
