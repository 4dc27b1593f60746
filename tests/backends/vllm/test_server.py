"""A real ``vllm serve``, asked with the official client: replies, streams, bad input, faults."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnhook import TokenRecord
from attnhook.record.key_mass import KeyMass
from attnhook.sinks.jsonl import read_jsonl
from tests.backends.same_json import compare_with_others
from tests.backends.servers import run
from tests.backends.token_ids import check_sinks
from tests.backends.vllm.engine import (
    ALL,
    KEYS,
    OF_HEADS,
    Server,
    check,
    engine_environment,
    from_entry,
    needs_vllm,
    ready_for,
    serve,
)
from tests.helpers import ROOT

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_vllm]

ASK = {"return_attention_tokens": True}
FAULT = 13  # a top_k that makes faulty/sitecustomize.py raise inside the capture step
LIMIT = 12


@pytest.fixture(scope="module")
def server(smol_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vllm")
    faulty = f"{Path(__file__).parent / 'faulty'}{os.pathsep}{ROOT}"
    flags = ["--attention-tokens-max-concurrent", str(LIMIT), "--enable-prompt-tokens-details"]
    sinks = f"jsonl:{folder}/sink.jsonl,jsonl:{folder}/ids.jsonl?tokens=1"
    with serve(folder, smol_path, *flags, fresh=True, PYTHONPATH=faulty, ATTNHOOK_SINKS=sinks) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(client: Any, text: str = "Name a colour.", new: int = 8, **extra: Any) -> Any:
    return client.chat.completions.create(
        model="smol",
        messages=message(text),
        max_tokens=new,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
    )


def rows(entries: list[dict[str, Any]]) -> list[Any]:
    return [from_entry(entry) for entry in entries]


def entries_of(choices: list[Any], name: str = "attention_tokens") -> list[dict[str, Any]]:
    return [entry for choice in choices for entry in getattr(choice, name, [])]


def test_a_chat_reply(client: Any, smol: Any) -> None:
    reply = chat(client, **ALL, **KEYS)
    choice = reply.choices[0]
    entries, prompt = choice.attention_tokens, choice.prompt_attention_tokens
    mass = choice.attention_key_mass
    print(check(smol, reply.prompt_token_ids, choice.token_ids, rows(entries), rows(prompt), key_mass=mass))
    entry = entries[0]
    assert entry["schema_version"] == 1 and entry["mode"] == "raw" and entry["think_phase"] == "output"
    assert entry["manifold"] and len(entry["fingerprint"]) == 20
    layer = entry["layers"]["29"]
    assert layer["topk_mass"] == pytest.approx(sum(layer["attention_scores"]), abs=1e-6)
    # the same in base64
    packed = chat(client, **ALL, **KEYS, **OF_HEADS, attention_encoding_format="base64").choices[0]
    lists = chat(client, **ALL, **KEYS, **OF_HEADS).choices[0]
    both = ([TokenRecord.from_dict(entry) for entry in choice.attention_tokens] for choice in (packed, lists))
    for one, other in zip(*both, strict=True):
        assert np.array_equal(one.token_positions, other.token_positions)
        assert np.allclose(one.head_fingerprints, other.head_fingerprints, atol=1e-7)
    masses = [KeyMass.from_list(choice.attention_key_mass) for choice in (packed, lists)]
    assert np.allclose(masses[0][29], masses[1][29], atol=1e-6)
    sizes = [len(json.dumps(choice.attention_key_mass)) for choice in (packed, lists)]
    assert sizes[0] < 0.7 * sizes[1], sizes  # arrays that are long
    # nobody else is affected
    plain = chat(client)
    assert plain.choices[0].token_ids == choice.token_ids
    assert not hasattr(plain.choices[0], "attention_tokens")


@pytest.mark.parametrize(
    "extra", [{**ALL, **KEYS}, {**ASK, "attention_layers": [3, 20], "top_k_attention": 4, "stream_interval": 3}]
)
def test_streams_equal_replies(client: Any, extra: dict[str, Any]) -> None:
    whole = chat(client, new=9, **extra).choices[0]
    chunks = list(
        client.chat.completions.create(
            model="smol",
            messages=message("Name a colour."),
            max_tokens=9,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert entries_of(choices) == whole.attention_tokens
    assert entries_of(choices, "prompt_attention_tokens") == getattr(whole, "prompt_attention_tokens", [])
    # with the last chunk that has tokens
    masses = [choice.attention_key_mass for choice in choices if hasattr(choice, "attention_key_mass")]
    assert masses == ([whole.attention_key_mass] if "attention_key_mass" in extra else [])
    for choice in choices:  # each chunk brings the entries of its own tokens
        assert len(getattr(choice, "attention_tokens", [])) == len(getattr(choice, "token_ids", None) or [])


def test_text_completions(client: Any, smol: Any, tokenizer: Any) -> None:
    prompts = [tokenizer("The capital of France is")["input_ids"], tokenizer("One, two, three")["input_ids"]]
    body: dict[str, Any] = {"model": "smol", "prompt": prompts, "max_tokens": 6, "temperature": 0.7, "n": 2, "seed": 1}
    extra = {"return_token_ids": True, "ignore_eos": True, **ALL}
    reply = client.completions.create(**body, extra_body=extra)
    assert len(reply.choices) == 4
    for n, choice in enumerate(reply.choices):
        assert choice.index == n
        generated, prompt = rows(choice.attention_tokens), rows(choice.prompt_attention_tokens)
        check(smol, prompts[n // 2], choice.token_ids, generated, prompt)
    chunks = list(client.completions.create(**body, stream=True, extra_body=extra))
    for n, whole in enumerate(reply.choices):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == n]
        positions = [entry["query_position"] for entry in entries_of(mine)]
        assert positions == [entry["query_position"] for entry in whole.attention_tokens]


def test_a_mixed_crowd(client: Any, smol: Any) -> None:
    texts = [f"Count to {n} and say something about the number {n * 7}." for n in range(8)]
    extras: list[dict[str, Any]] = [
        ALL, {}, {**ASK, "top_k_attention": 32, "attention_layers": "all"}, {},
        ALL, {**ASK, "attention_layers": "auto"}, {}, ALL,
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: chat(client, texts[n], new=10, **extras[n]), range(8)))
    for reply, extra in zip(replies, extras, strict=True):
        choice = reply.choices[0]
        assert hasattr(choice, "attention_tokens") == bool(extra)
        assert len(choice.token_ids) == 10
        if extra:
            prompt = rows(choice.prompt_attention_tokens) if extra is ALL else None
            layers = 4 if extra.get("attention_layers") == "auto" else 30
            generated, k = rows(choice.attention_tokens), extra.get("top_k_attention", 32)
            check(smol, reply.prompt_token_ids, choice.token_ids, generated, prompt, top_k=k, layers=layers)


def test_a_prefix_hit(client: Any, smol: Any) -> None:
    text = "A long shared beginning. " * 60
    chat(client, text)
    reply = chat(client, text, **{**ALL, "attention_prompt": False})
    assert reply.usage.prompt_tokens_details.cached_tokens > 0
    check(smol, reply.prompt_token_ids, reply.choices[0].token_ids, rows(reply.choices[0].attention_tokens))


def test_the_same_json_from_every_server(server: Server, smol_replies: Path) -> None:
    compare_with_others("vllm", server, smol_replies)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"top_k_attention": 0}, "top_k_attention", "from 1 to 256"),
    ({"top_k_attention": 100_000}, "top_k_attention", "100000"),
    ({"top_k_attention": "eight"}, "top_k_attention", "'eight'"),
    ({"attention_layers": [99]}, "attention_layers", "0..29"),
    ({"attention_layers": "some"}, "attention_layers", "'some'"),
    ({"attention_heads": [-40]}, "attention_heads", "-40"),
    ({"attention_heads": [9]}, "attention_heads", "0..8"),
    ({"attention_spans": {"a": [5, 2]}}, "attention_spans", "[5, 2]"),
    ({"attention_spans": {"a": [0, 3], "b": [1500, 1501]}}, "attention_spans", "'b': [1500, 1501]"),
    ({"attention_mode": "all"}, "attention_mode", "raw, sketch, fingerprint"),
    ({"attention_self_check": "yes"}, "attention_self_check", "true or false"),
    ({"attention_layer": [1]}, "attention_layer", "attention_layers"),
    ({"return_attention_tokens": "yes"}, "return_attention_tokens", "true or false"),
    ({"use_beam_search": True, "n": 2}, "return_attention_tokens", "beam search"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_named(server: Server, stream: bool) -> None:
    paths: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": message("hi")},
        "/v1/completions": {"prompt": "hi"},
    }
    for fields, name, part in BAD:
        for path, prompt in paths.items():
            body = {"model": "smol", "max_tokens": 2, "stream": stream, **prompt, **ASK, **fields}
            status, reply = server.post(path, body)
            assert status == 400, (fields, reply)
            assert reply["error"]["param"] == name, (fields, reply)
            assert name in reply["error"]["message"] and part in reply["error"]["message"], (fields, reply)
    status, reply = server.post("/v1/responses", {"model": "smol", "input": "hi", "max_output_tokens": 2, **ASK})
    assert status == 400 and "return_attention_tokens" in reply["error"]["message"]
    assert server.post("/v1/completions", {"model": "smol", "prompt": "hi", "max_tokens": 2})[0] == 200


def test_a_fault_stays_in_its_request(client: Any) -> None:
    good = chat(client, **ALL)
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(chat, client, **{**ALL, "top_k_attention": FAULT})
        other = pool.submit(chat, client, "Say hello.", **ALL)
    choice = bad.result().choices[0]
    assert choice.attention_tokens == [] and "injected" in choice.attention_error
    assert choice.token_ids == good.choices[0].token_ids
    assert len(other.result().choices[0].attention_tokens) == 8
    assert not hasattr(other.result().choices[0], "attention_error")
    again = chat(client, **ALL)
    assert again.choices[0].attention_tokens == good.choices[0].attention_tokens
    assert not hasattr(again.choices[0], "attention_error")


def test_too_many_at_once(server: Server) -> None:
    body = {"model": "smol", "prompt": "hi", "max_tokens": 24, "ignore_eos": True, **ASK}
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: server.post("/v1/completions", body), range(40)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= LIMIT
    assert all(len(reply["choices"][0]["attention_tokens"]) == 24 for status, reply in found if status == 200)
    refused = next(reply for status, reply in found if status == 429)
    assert str(LIMIT) in refused["error"]["message"]
    assert server.post("/v1/completions", body)[0] == 200  # every place is free again


def test_an_abandoned_stream_frees_its_place(client: Any, server: Server) -> None:
    for _ in range(2 * LIMIT):
        stream = client.completions.create(model="smol", prompt="hi", max_tokens=400, stream=True, extra_body=ASK)
        next(iter(stream))
        stream.close()
        time.sleep(0.2)
    body = {"model": "smol", "prompt": "hi", "max_tokens": 2, **ASK}
    statuses = []
    while len(statuses) < 20 and 200 not in statuses:
        statuses.append(server.post("/v1/completions", body)[0])
        time.sleep(0.5)
    assert statuses[-1] == 200, "the places of abandoned streams are not free again"


def test_capabilities(server: Server) -> None:
    told = server.get("/v1/attention/capabilities")
    assert told["engine"]["name"] == "vllm" and told["model"] == "smol"
    assert told["layers"] == list(range(30)) and told["query_heads"] == 9
    assert told["dtype"] == "float32" and told["device"] == "cpu"
    assert told["limits"] == {
        "return_attention_tokens": True,
        "max_concurrent": LIMIT,
        "fingerprint_only": False,
        "api_key_required": False,
        "mask_prefix": 0,
        "span_width": 1,
        "max_bytes": 16 * 2**20,
        "max_bytes_in_flight": 128 * 2**20,
        "key_mass_bytes": 64 * 2**20,
    }
    assert told["generates"] is True
    assert told["top_k"] == {"default": 32, "max": 256}


def test_sinks_get_what_replies_get(client: Any, server: Server) -> None:
    """Token ids too, where a sink asks for them; the reply and the other sink have none."""
    reply = chat(client, "Something for the sink.", **ALL)
    choice = reply.choices[0]
    check_sinks(server.log.parent, reply, [*reply.prompt_token_ids, *choice.token_ids])


def test_flags(tmp_path: Path) -> None:
    def vllm(*arguments: str) -> tuple[int, str]:
        argv = ["vllm.entrypoints.cli.main", "serve", *arguments]
        return run(argv, engine_environment(), tmp_path / "log", ready=ready_for(engine_environment()))

    _, shown = vllm("--help=attnhook")
    for flag in ("--return-attention-tokens", "--attention-tokens-top-k", "--attention-tokens-api-key"):
        assert flag in shown, shown[-3000:]
    code, refused = vllm("m", "--attention-tokens-top-k", "1000")
    assert code == 2 and "from 1 to 256" in refused, refused[-2000:]


def test_a_server_that_forbids(smol_path: str, tmp_path: Path) -> None:
    flags = ["--attention-tokens-fingerprint-only", "--attention-tokens-api-key", "sesame"]
    sink = tmp_path / "all.jsonl"
    environ = {"ATTNHOOK_CAPTURE_ALL": "fingerprint", "ATTNHOOK_SINKS": f"jsonl:{sink}"}
    with serve(tmp_path, smol_path, *flags, **environ) as running:
        body = {"model": "smol", "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
        status, reply = running.post("/v1/completions", {**body, **ASK})
        assert status == 403 and "key" in reply["error"]["message"]
        key = {"X-Attention-Key": "sesame"}
        status, reply = running.post("/v1/completions", {**body, **ASK}, **key)
        assert status == 403 and reply["error"]["param"] == "attention_mode"
        status, reply = running.post("/v1/completions", {**body, **ASK, "attention_mode": "fingerprint"}, **key)
        entry = reply["choices"][0]["attention_tokens"][0]
        assert status == 200 and {"fingerprint", "manifold"} <= entry.keys() and "layers" not in entry
        status, reply = running.post("/v1/completions", body)  # monitored, and none the wiser
        assert status == 200 and "attention_tokens" not in reply["choices"][0]
        assert running.get("/v1/attention/capabilities")["modes"] == ["fingerprint"]
        for _ in range(300):  # vLLM kills its engine core as soon as it is asked to stop
            if len(list(read_jsonl(sink, tolerate_torn_tail=True))) == 6:
                break
            time.sleep(0.2)
    lines = list(read_jsonl(sink))
    # those of the two requests that were refused and computed nothing are not among them
    assert len(lines) == 6 and all(line["mode"] == "fingerprint" for line in lines)


@pytest.mark.long  # SGLang's with many front ends is not
def test_two_api_servers(smol: Any, smol_path: str, tmp_path: Path) -> None:
    """Everything that starts later than the flags: more front ends, each an interpreter of its own."""
    import openai

    with serve(tmp_path, smol_path, "--api-server-count", "2", fresh=True) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
        for n in range(6):  # the kernel deals connections out to both
            client.close()
            client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
            reply = chat(client, f"Say {n}.", **ALL)
            choice = reply.choices[0]
            generated, prompt = rows(choice.attention_tokens), rows(choice.prompt_attention_tokens)
            check(smol, reply.prompt_token_ids, choice.token_ids, generated, prompt)
