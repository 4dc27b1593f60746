"""Hostile clients of a real ``vllm serve``: see `tests.backends.hostile`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.backends.hostile import ENVIRONMENT, KEY, Route, hostile_run
from tests.backends.vllm.engine import needs_vllm, serve

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_vllm]

NEW = 5


def chat(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "word " * words}]


ROUTES = [
    *2 * [
        Route("/v1/chat/completions", lambda n: {"model": "smol", "messages": chat(n), "max_tokens": NEW}, True),
        Route("/v1/completions", lambda n: {"model": "smol", "prompt": "word " * n, "max_tokens": NEW}, True),
    ],
    Route("/invocations", lambda n: {"model": "smol", "prompt": "word " * n, "max_tokens": NEW}, True),
    Route("/v1/chat/completions/batch", lambda n: {"model": "smol", "messages": [chat(n)] * 2, "max_tokens": NEW}),
    Route("/v1/responses", lambda n: {"model": "smol", "input": "word " * n, "max_output_tokens": NEW}),
    Route("/v1/messages", lambda n: {"model": "smol", "messages": chat(n), "max_tokens": NEW}),
    Route("/v1/embeddings", lambda n: {"model": "smol", "input": "word " * n}),
    Route("/tokenize", lambda n: {"model": "smol", "prompt": "word " * n}),
    Route(
        "/inference/v1/generate",
        lambda n: {"model": "smol", "token_ids": [504] * n, "sampling_params": {"max_tokens": NEW}},
    ),
    Route("/v1/completions/render", lambda n: {"model": "smol", "prompt": "word " * n, "max_tokens": NEW}),
]  # fmt: skip
HIDDEN: list[Any] = [
    lambda fields: {"vllm_xargs": fields},
    lambda fields: {"kv_transfer_params": fields},
    lambda fields: {"sampling_params": {"max_tokens": NEW, "extra_args": fields}},
]


def test_hostile_clients(smol_path: str, tmp_path: Path) -> None:
    sink = tmp_path / "sink.jsonl"
    environ = {**ENVIRONMENT, "ATTNHOOK_SINKS": f"jsonl:{sink}", "VLLM_LOGGING_LEVEL": "INFO"}
    with serve(tmp_path, smol_path, "--enable-scale-out", **environ) as server:
        small = {"model": "smol", "prompt": "Hi", "max_tokens": 2}
        hostile_run(server, ROUTES, HIDDEN, small, sink)
        log = server.log.read_text(errors="replace")
    if os.environ.get("HOSTILE_LOG"):
        print(log)
    assert KEY not in log, "the key is in the server's log"
    assert "attention records of this step are lost" not in log and "capture failed" not in log
