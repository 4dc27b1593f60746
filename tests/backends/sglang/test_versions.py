"""Other versions of SGLang than the environment's: one server each, whatever mood its scheduler can be put in.

tools/sglang_other.sh puts a version and the packages of its time into a folder of the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.backends.servers import Server
from tests.backends.sglang.engine import UNDER_TEST, check, needs_sglang, serve
from tests.backends.vllm.engine import ALL, from_entry

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.long, needs_sglang]

ASK = {"return_attention_tokens": True}
FAULT = 13  # a top_k that makes standin/sitecustomize.py raise inside the capture step
VERSIONS = ("0.5.11", "0.5.21")
GIVEN = os.environ.get(UNDER_TEST)
FLAGS = "SGLANG_UNDER_TEST_FLAGS"  # more of the server's flags, such as --page-size 16


def folder_of(version: str) -> Path:
    return Path(GIVEN) if GIVEN else Path(sys.prefix) / f"sglang-{version}"


@pytest.fixture(scope="module", params=["given"] if GIVEN else VERSIONS)
def server(
    request: pytest.FixtureRequest, smol_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = folder_of(request.param)
    if not (folder / "sglang").is_dir():
        pytest.skip(f"no SGLang {request.param} in {folder}: tools/sglang_other.sh puts it there")
    flags = ["--chunked-prefill-size", "64", "--enable-mixed-chunk", *os.environ.get(FLAGS, "").split()]
    with serve(tmp_path_factory.mktemp("sglang"), smol_path, *flags, **{UNDER_TEST: str(folder)}) as running:
        yield running


def generate(server: Server, ids: list[int], new: int = 6, **fields: Any) -> dict[str, Any]:
    params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    status, reply = server.post("/generate", {"input_ids": ids, "sampling_params": params, **fields})
    assert status == 200, reply
    result: dict[str, Any] = reply
    return result


def rows(entries: list[dict[str, Any]]) -> list[Any]:
    return [from_entry(entry) for entry in entries]


def exact(smol: Any, ids: list[int], result: dict[str, Any], **options: Any) -> None:
    meta = result["meta_info"]
    assert meta.get("attention_error") is None
    before = rows(meta["prompt_attention_tokens"]) if "prompt_attention_tokens" in meta else None
    print(check(smol, ids, result["output_ids"], rows(meta["attention_tokens"]), before, **options))


def test_fresh_cached_and_prompt_rows_again(server: Server, smol: Any, tokenizer: Any, long_text: str) -> None:
    assert server.get("/v1/attention/capabilities")["engine"]["name"] == "sglang"
    ids = tokenizer(long_text)["input_ids"][:150]
    fresh = generate(server, ids, **ALL)
    exact(smol, ids, fresh)
    cached = generate(server, ids, **{**ALL, "attention_prompt": False})
    exact(smol, ids, cached)
    assert cached["meta_info"]["cached_tokens"] >= 128
    # the prompt's rows are asked for: what is cached is computed again
    again = generate(server, ids, **ALL)
    assert again["meta_info"]["cached_tokens"] == 0
    exact(smol, ids, again)


def test_a_crowd_of_which_some_ask(server: Server, smol: Any, tokenizer: Any, long_text: str) -> None:
    """Chunks of several requests in one pass, and replies of more tokens than SGLang sends at once."""
    text = tokenizer(long_text)["input_ids"]
    prompts = [text[700 + 90 * n : 700 + 90 * n + 20 + 17 * n] for n in range(8)]
    asks: list[dict[str, Any]] = [
        ALL, {}, {**ASK, "top_k_attention": 32, "attention_layers": "all"}, {},
        ALL, {**ASK, "attention_layers": "auto"}, {}, ALL,
    ]  # fmt: skip
    new = [54, 8, 9, 53, 11, 10, 13, 14]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: generate(server, prompts[n], new[n], **asks[n]), range(8)))
    for ids, result, ask, tokens in zip(prompts, found, asks, new, strict=True):
        assert len(result["output_ids"]) == tokens
        if ask:
            layers = 4 if ask.get("attention_layers") == "auto" else 30
            exact(smol, ids, result, top_k=ask.get("top_k_attention", 32), layers=layers)
        else:
            assert not {"attention_tokens", "attention_error", "attnhook"} & result["meta_info"].keys()


def test_streams_and_chats_tell_the_same(server: Server, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    fields = {**ASK, "attention_layers": [3, 20], "attention_prompt": True}
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    whole = generate(server, ids, 12, **fields)["meta_info"]["attention_tokens"]
    assert [entry["decode_step"] for entry in whole] == list(range(12))
    events = server.events("/generate", {"input_ids": ids, "sampling_params": params, **fields})
    for event in events:
        assert len(event["meta_info"]["attention_tokens"]) == len(event["output_ids"])
    assert events[-1]["meta_info"]["attention_tokens"] == whole
    body = {"model": "smol", "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    status, reply = server.post("/v1/chat/completions", body)
    assert status == 200 and reply["choices"][0]["attention_tokens"] == whole
    chunks = server.events("/v1/chat/completions", body)
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [entry for choice in choices for entry in choice.get("attention_tokens", [])] == whole
    before = [entry for choice in choices for entry in choice.get("prompt_attention_tokens", [])]
    assert before == reply["choices"][0]["prompt_attention_tokens"] and len(before) == len(ids) - 1


def test_several_samples(server: Server, smol: Any, tokenizer: Any) -> None:
    ids = [tokenizer(text)["input_ids"] for text in ("The capital of France is", "One, two, three")]
    params = {"max_new_tokens": 6, "temperature": 0.7, "ignore_eos": True, "n": 2}
    status, reply = server.post("/generate", {"input_ids": ids, "sampling_params": params, **ALL})
    assert status == 200 and len(reply) == 4, reply
    for n, result in enumerate(reply):
        exact(smol, ids[n // 2], result)
    body = {"model": "smol", "prompt": ids, "max_tokens": 6, "n": 2, "temperature": 0.7, "ignore_eos": True, **ASK}
    status, reply = server.post("/v1/completions", body)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for n, choice in enumerate(reply["choices"]):
        first = len(ids[n // 2]) - 1
        assert [entry["query_position"] for entry in choice["attention_tokens"]] == list(range(first, first + 6))


def test_bad_fields_and_faults_end_nothing(server: Server, tokenizer: Any) -> None:
    body = {"model": "smol", "prompt": "hi", "max_tokens": 3, **ASK}
    status, reply = server.post("/v1/completions", {**body, "top_k_attention": 0})
    assert status == 400 and reply["param"] == "top_k_attention"
    status, reply = server.post("/generate", {"text": "hi", "sampling_params": {}, **ASK, "attention_layers": [99]})
    assert status == 400 and "0..29" in reply["error"]["message"]
    ids = tokenizer("The capital of France is")["input_ids"]
    good = generate(server, ids, **ALL)
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(generate, server, ids, **{**ALL, "top_k_attention": FAULT})
        other = pool.submit(generate, server, ids[1:], **ALL)
    meta = bad.result()["meta_info"]
    assert "injected" in meta["attention_error"] and not meta.get("attention_tokens")
    assert bad.result()["output_ids"] == good["output_ids"]
    assert len(other.result()["meta_info"]["attention_tokens"]) == 6
    assert "attention_error" not in other.result()["meta_info"]
    again = generate(server, ids, **ALL)
    assert again["meta_info"]["attention_tokens"] == good["meta_info"]["attention_tokens"]
