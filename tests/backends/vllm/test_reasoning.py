"""A real server of a reasoning model: which tokens are reasoning, and what ``attnhook verify --url`` finds.

SmolLM2 does not reason; its tokenizer gets two reserved tokens renamed to <think> and </think> and its template
opens a block, as those of reasoning models do. vLLM's thinking budget then closes blocks where the test wants.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnhook.sinks.jsonl import read_jsonl
from tests.backends.vllm.engine import ALL, Server, needs_vllm, offline, records, serve
from tests.cli.test_run import command

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_vllm]

START, END = 13, 14
RENAMED = {'"<jupyter_code>"': '"<think>"', '"<jupyter_output>"': '"</think>"'}
OPENS = "{% if add_generation_prompt and enable_thinking | default(true) %}{{ '<think>\\n' }}{% endif %}"
NEW = 12
ASK = {
    "model": "smol", "temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True,
    "return_attention_tokens": True,
}  # fmt: skip
MESSAGES = {"messages": [{"role": "user", "content": "Name a colour."}]}


@pytest.fixture(scope="module")
def model(smol_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("thinker")
    for file in Path(smol_path).iterdir():
        if file.name == "tokenizer.json":
            text = file.read_text(encoding="utf-8")
            for old, new in RENAMED.items():
                assert text.count(old) == 2  # among the added tokens and in the vocabulary
                text = text.replace(old, new)
            (folder / file.name).write_text(text, encoding="utf-8")
        elif file.name == "chat_template.jinja":
            (folder / file.name).write_text(file.read_text(encoding="utf-8") + OPENS, encoding="utf-8")
        else:
            (folder / file.name).symlink_to(file)
    return str(folder)


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vllm")
    sink = {"ATTNHOOK_SINKS": f"jsonl:{folder}/sink.jsonl"}
    with serve(folder, model, "--reasoning-parser", "deepseek_r1", **sink) as running:
        yield running


def expected(prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    """Phases by the definition, token by token."""
    found = []
    for at in range(len(prompt), len(prompt) + len(output)):
        ids = [*prompt, *output][: at + 1]
        before = [token for token in ids[:-1] if token in (START, END)]
        found.append("think" if before[-1:] == [START] or ids[-1] == START else "output")
    return found


def phases(entries: Sequence[dict[str, Any]]) -> list[str]:
    return [entry["think_phase"] for entry in entries]


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    status, reply = server.post("/v1/chat/completions", {**ASK, **MESSAGES, **fields})
    assert status == 200, reply
    return reply  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({}, "t" * NEW),  # the template opens a block and nothing closes it
        ({"thinking_token_budget": 3}, "ttt" + "o" * (NEW - 3)),  # of which the prompt has one
        ({"thinking_token_budget": 3, "logit_bias": {str(START): 100}}, "t" * NEW),  # each block is opened again
        ({"logit_bias": {str(END): 100}}, "t" + "o" * (NEW - 1)),  # closes its block, then none
        ({"chat_template_kwargs": {"enable_thinking": False}}, "o" * NEW),
        ({"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {str(START): 100}}, "t" * NEW),
    ],
)
def test_phases_of_whole_and_streamed_answers(server: Server, fields: dict[str, Any], how: str) -> None:
    import openai

    reply = ask(server, attention_prompt=True, **fields)
    (choice,) = reply["choices"]
    found = phases(choice["attention_tokens"])
    assert "".join(phase[0] for phase in found) == how
    assert found == expected(reply["prompt_token_ids"], choice["token_ids"])
    assert set(phases(choice["prompt_attention_tokens"])) == {"output"}

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    body = {**ASK, **fields}
    model, messages = body.pop("model"), MESSAGES["messages"]
    chunks = client.chat.completions.create(model=model, messages=messages, stream=True, extra_body=body)
    entries = [entry for chunk in chunks for c in chunk.choices for entry in getattr(c, "attention_tokens", [])]
    assert phases(entries) == found
    assert entries == choice["attention_tokens"]


def test_choices_strides_and_prompts_of_their_own(server: Server) -> None:
    reply = ask(server, n=2, temperature=0.9, seed=1, thinking_token_budget=4, attention_stride=2)
    assert len(reply["choices"]) == 2
    for choice in reply["choices"]:
        every = expected(reply["prompt_token_ids"], choice["token_ids"])
        assert phases(choice["attention_tokens"]) == every[::2]
        assert {"think", "output"} == set(every)
    body = {**ASK, "prompt": ["One, two", "One<think>, two", "<think>One</think>"], "thinking_token_budget": 2}
    status, reply = server.post("/v1/completions", body)
    assert status == 200, reply
    for choice in reply["choices"]:
        assert phases(choice["attention_tokens"]) == expected(choice["prompt_token_ids"], choice["token_ids"])
    assert [phases(choice["attention_tokens"])[0] for choice in reply["choices"]] == ["output", "think", "output"]


def test_sinks_get_the_phases(server: Server) -> None:
    reply = ask(server, thinking_token_budget=5)
    wanted = phases(reply["choices"][0]["attention_tokens"])
    assert {"think", "output"} == set(wanted)
    found: list[str] = []
    for _ in range(50):
        lines = read_jsonl(server.log.parent / "sink.jsonl", tolerate_torn_tail=True)
        found = phases([line for line in lines if reply["id"] in line["request_id"]])
        if len(found) == NEW:
            break
        time.sleep(0.2)
    assert found == wanted


def test_verify_of_a_server(server: Server) -> None:
    ran = command("verify", "--url", server.url + "/v1", "--json")
    print(ran.out)
    assert ran.json["problems"] == [] and ran.json["ok"]
    told = server.get("/v1/attention/capabilities")
    assert told["dtype"] == "float32"


def test_offline(model: str, tokenizer: Any, tmp_path: Path) -> None:
    """With a parser that names its markers only to requests that ask for thinking."""
    ids = [START, *tokenizer("The capital of France is")["input_ids"]]
    sampling = {"max_tokens": 6, "ignore_eos": True, "n": 2, "temperature": 0.9}
    requests = [
        {"ids": ids, "sampling": sampling, "fields": ALL},
        {"ids": ids, "sampling": {**sampling, "allowed_token_ids": [END]}, "fields": ALL},
        {"ids": [*ids, END], "sampling": sampling, "fields": ALL},
    ]
    found = offline(tmp_path, model, requests, reasoning_parser="deepseek_v3")["replies"]
    for request, reply, first in zip(requests, found, ("think", "think", "output"), strict=True):
        for choice in reply["choices"]:
            mine = [record.think_phase for record in records(choice["generated"])]
            assert mine == expected(request["ids"], choice["ids"]) and mine[0] == first
            if "allowed_token_ids" in request["sampling"]:
                assert mine == ["think", *["output"] * 5]
