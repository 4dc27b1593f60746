"""A real SGLang server, asked with the official client: replies, streams, bad input, faults."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnhook.errors import UnsupportedError
from attnhook.sinks.jsonl import read_jsonl
from tests.backends.same_json import compare_with_others
from tests.backends.servers import Server, run
from tests.backends.sglang.engine import check, engine_environment, needs_sglang, ready_for, serve
from tests.backends.token_ids import check_sinks
from tests.backends.vllm.engine import ALL, from_entry
from tests.helpers import ROOT
from tests.oracle import FEATURE

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_sglang]

ASK = {"return_attention_tokens": True}
FAULT = 13  # a top_k that makes standin/sitecustomize.py raise inside the capture step
LIMIT = 9


@pytest.fixture(scope="module")
def server(smol_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sglang")
    flags = ["--attention-tokens-max-concurrent", str(LIMIT), "--enable-cache-report"]
    sinks = f"jsonl:{folder}/sink.jsonl,jsonl:{folder}/ids.jsonl?tokens=1"
    with serve(folder, smol_path, *flags, fresh=True, ATTNHOOK_SINKS=sinks) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(client: Any, text: str = "Name a colour.", new: int = 8, **extra: Any) -> Any:
    body: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True, **extra}
    return client.chat.completions.create(
        model="smol", messages=message(text), max_tokens=new, temperature=0, extra_body=body
    )


def rows(entries: list[dict[str, Any]]) -> list[Any]:
    return [from_entry(entry) for entry in entries]


def entries_of(choices: list[Any], name: str = "attention_tokens") -> list[dict[str, Any]]:
    return [entry for choice in choices for entry in getattr(choice, name, [])]


def test_a_chat_reply(client: Any, smol: Any) -> None:
    reply = chat(client, **ALL)
    choice = reply.choices[0]
    entries, prompt = choice.attention_tokens, choice.prompt_attention_tokens
    print(check(smol, choice.prompt_token_ids, choice.response_token_ids, rows(entries), rows(prompt)))
    entry = entries[0]
    assert entry["schema_version"] == 1 and entry["mode"] == "raw" and entry["think_phase"] == "output"
    assert entry["manifold"] and len(entry["fingerprint"]) == 20
    # nobody else is affected
    plain = chat(client)
    assert plain.choices[0].response_token_ids == choice.response_token_ids
    assert not hasattr(plain.choices[0], "attention_tokens")
    # a prompt that is cached by now is computed again where its rows are asked for
    again = chat(client, **ALL)
    assert again.choices[0].prompt_attention_tokens == prompt
    assert not again.usage.prompt_tokens_details or not again.usage.prompt_tokens_details.cached_tokens


def test_chat_streams_equal_replies(client: Any) -> None:
    extra: dict[str, Any] = {**ASK, "attention_layers": [3, 20], "attention_prompt": True, "ignore_eos": True}
    body: dict[str, Any] = {"model": "smol", "messages": message("Name a colour."), "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**body, extra_body=extra).choices[0]
    chunks = list(client.chat.completions.create(**body, stream=True, extra_body=extra))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert entries_of(choices) == whole.attention_tokens
    assert entries_of(choices, "prompt_attention_tokens") == whole.prompt_attention_tokens
    assert len([choice for choice in choices if getattr(choice, "attention_tokens", None)]) > 3


def test_text_completions(client: Any, smol: Any, tokenizer: Any) -> None:
    prompts = [tokenizer("The capital of France is")["input_ids"], tokenizer("One, two, three")["input_ids"]]
    body: dict[str, Any] = {"model": "smol", "prompt": prompts, "max_tokens": 6, "temperature": 0.7, "n": 2}
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
        for choice in mine:  # each chunk brings the entries of its own tokens
            assert len(getattr(choice, "attention_tokens", [])) == len(choice.token_ids or [])


def test_a_mixed_crowd(client: Any, smol: Any) -> None:
    texts = [f"Count to {n} and say something about the number {n * 7}." for n in range(8)]
    extras: list[dict[str, Any]] = [
        ALL, {}, {**ASK, "top_k_attention": 32, "attention_layers": "all"}, {},
        ALL, {**ASK, "attention_layers": "auto"}, {}, ALL,
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: chat(client, texts[n], new=8 + n, **extras[n]), range(8)))
    for n, (reply, extra) in enumerate(zip(replies, extras, strict=True)):
        choice = reply.choices[0]
        assert hasattr(choice, "attention_tokens") == bool(extra)
        assert len(choice.response_token_ids) == 8 + n
        if extra:
            prompt = rows(choice.prompt_attention_tokens) if extra is ALL else None
            layers = 4 if extra.get("attention_layers") == "auto" else 30
            generated, k = rows(choice.attention_tokens), extra.get("top_k_attention", 32)
            print(
                check(
                    smol, choice.prompt_token_ids, choice.response_token_ids, generated, prompt, top_k=k, layers=layers
                )
            )


def test_a_prefix_hit(client: Any, smol: Any) -> None:
    text = "A long shared beginning. " * 60
    chat(client, text)
    reply = chat(client, text, **{**ALL, "attention_prompt": False})
    assert reply.usage.prompt_tokens_details.cached_tokens > 0
    choice = reply.choices[0]
    print(check(smol, choice.prompt_token_ids, choice.response_token_ids, rows(choice.attention_tokens)))


def test_the_same_json_from_every_server(server: Server, smol_replies: Path) -> None:
    compare_with_others("sglang", server, smol_replies)


def test_generate(server: Server, smol: Any, tokenizer: Any) -> None:
    ids = [tokenizer("The capital of France is")["input_ids"], tokenizer("One, two, three")["input_ids"]]
    params = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}
    status, reply = server.post("/generate", {"input_ids": ids, "sampling_params": params, **ALL})
    assert status == 200
    for prompt, result in zip(ids, reply, strict=True):
        meta = result["meta_info"]
        generated, before = rows(meta["attention_tokens"]), rows(meta["prompt_attention_tokens"])
        check(smol, prompt, result["output_ids"], generated, before)
    # a stream tells all so far, as it does of everything
    status, alone = server.post("/generate", {"input_ids": ids[0], "sampling_params": params, **ALL})
    *_, last = events = server.events("/generate", {"input_ids": ids[0], "sampling_params": params, **ALL})
    assert len(events) > 2
    for event in events:
        assert len(event["meta_info"]["attention_tokens"]) == len(event["output_ids"])
    assert last["meta_info"]["attention_tokens"] == alone["meta_info"]["attention_tokens"]
    # one of two asks, in the way of the offline engine
    each = [{**params, "custom_params": dict(ASK)}, params]
    status, (asked, quiet) = server.post("/generate", {"input_ids": ids, "sampling_params": each})
    assert status == 200 and len(asked["meta_info"]["attention_tokens"]) == 5
    assert not {"attention_tokens", "attnhook"} & quiet["meta_info"].keys()


def test_a_reply_without_a_token_is_refused(server: Server) -> None:
    status, reply = server.post("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 0}, **ASK})
    assert status == 400 and "max_new_tokens=0" in reply["error"]["message"], reply


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
    ({"attention_layer": [1]}, "attention_layer", "attention_layers"),
    ({"return_attention_tokens": "yes"}, "return_attention_tokens", "true or false"),
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
            assert reply["param"] == name, (fields, reply)
            assert name in reply["message"] and part in reply["message"], (fields, reply)
        native = {"text": "hi", "sampling_params": {"max_new_tokens": 2}, **ASK, **fields}
        status, reply = server.post("/generate", native)
        assert status == 400 and part in reply["error"]["message"], (fields, reply)
    beams = {"text": "hi", "sampling_params": {"max_new_tokens": 2, "beam_width": 2}, **ASK}
    status, reply = server.post("/generate", beams)
    assert status == 400 and "beam search" in reply["error"]["message"], reply
    # where records have no place, and where the name of ours is taken
    status, reply = server.post("/v1/messages", {"model": "smol", "messages": message("hi"), "max_tokens": 2, **ASK})
    assert status == 400 and "return_attention_tokens" in str(reply), reply
    custom = {"sampling_params": {"max_new_tokens": 2, "custom_params": {"attnhook": "{}"}}}
    status, reply = server.post("/generate", {"text": "hi", **custom})
    assert status == 400 and "attnhook" in reply["error"]["message"], reply
    status, reply = server.post(
        "/v1/completions", {"model": "smol", "prompt": "hi", "max_tokens": 2, "custom_params": ASK}
    )
    assert status == 400 and "top of a request" in reply["message"], reply
    assert server.post("/v1/completions", {"model": "smol", "prompt": "hi", "max_tokens": 2})[0] == 200


def test_a_fault_stays_in_its_request(client: Any) -> None:
    good = chat(client, **ALL)
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(chat, client, **{**ALL, "top_k_attention": FAULT})
        other = pool.submit(chat, client, "Say hello.", **ALL)
    choice = bad.result().choices[0]
    assert choice.attention_tokens == [] and "injected" in choice.attention_error
    assert choice.response_token_ids == good.choices[0].response_token_ids
    assert len(other.result().choices[0].attention_tokens) == 8
    assert not hasattr(other.result().choices[0], "attention_error")
    again = chat(client, **ALL)
    assert again.choices[0].attention_tokens == good.choices[0].attention_tokens
    assert not hasattr(again.choices[0], "attention_error")


def test_too_many_at_once(server: Server) -> None:
    body = {"model": "smol", "prompt": "hi", "max_tokens": 12, "ignore_eos": True, **ASK}
    native = {"text": "hi", "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}, **ASK}

    def ask(n: int) -> tuple[int, Any]:
        return server.post("/generate", native) if n % 3 == 0 else server.post("/v1/completions", body)

    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(ask, range(30)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= LIMIT
    whole = [reply["choices"][0] for status, reply in found if status == 200 and "choices" in reply]
    assert all(len(choice["attention_tokens"]) == 12 for choice in whole)
    assert all(str(LIMIT) in str(reply) for status, reply in found if status == 429)
    assert server.post("/v1/completions", body)[0] == 200  # every place is free again


def test_an_abandoned_stream_frees_its_place(client: Any, server: Server) -> None:
    for _ in range(LIMIT + 2):
        stream = client.completions.create(model="smol", prompt="hi", max_tokens=400, stream=True, extra_body=ASK)
        next(iter(stream))
        stream.close()
        time.sleep(0.1)
    body = {"model": "smol", "prompt": "hi", "max_tokens": 2, **ASK}
    statuses = []
    while len(statuses) < 40 and 200 not in statuses:
        statuses.append(server.post("/v1/completions", body)[0])
        time.sleep(0.5)
    assert statuses[-1] == 200, "the places of abandoned streams are not free again"


def test_capabilities(server: Server) -> None:
    told = server.get("/v1/attention/capabilities")
    assert told["engine"]["name"] == "sglang" and told["model"] == "smol"
    assert told["layers"] == list(range(30)) and told["query_heads"] == 9
    assert told["dtype"] == "float32" and told["device"] == "cpu"
    assert told["limits"]["max_concurrent"] == LIMIT and told["top_k"] == {"default": 32, "max": 256}


def test_sinks_get_what_replies_get(client: Any, server: Server) -> None:
    """Token ids too, where a sink asks for them; the reply and the other sink have none."""
    reply = chat(client, "Something for the sink.", **ALL)
    choice = reply.choices[0]
    check_sinks(server.log.parent, reply, [*choice.prompt_token_ids, *choice.response_token_ids])


def test_the_command_line_asks_and_verifies_a_server(server: Server, tmp_path: Path) -> None:
    def attnhook(*arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("attnhook")), *arguments, "--url", server.url + "/v1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = str(tmp_path / "records.jsonl")
    attnhook("run", "--prompt", "Name a colour.", "--max-new-tokens", "4", "--prompt-rows", "--out", out)
    assert sum(line["decode_step"] is not None for line in read_jsonl(Path(out))) == 4
    told = attnhook("verify")
    assert "sglang" in told, told


def test_asking_changes_no_token_and_no_logprob(server: Server, smol_path: str, tmp_path: Path) -> None:
    """One request after the other, to a server without attnhook, to one where nobody asks, and asking."""
    texts = ["The capital of France is", "Once upon a time there was a small", "Colours of the rainbow are"]
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}

    def answers(target: Server, **extra: Any) -> list[Any]:
        found = []
        for text in texts:
            with urllib.request.urlopen(target.url + "/flush_cache", data=b"", timeout=60) as flushed:
                assert flushed.status == 200
            body = {"text": text, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 3, **extra}
            status, reply = target.post("/generate", body)
            meta = reply["meta_info"]
            assert status == 200
            found.append((reply["output_ids"], meta["output_token_logprobs"], meta["output_top_logprobs"]))
        return found

    idle = answers(server)
    assert answers(server, **ALL) == idle
    with serve(tmp_path, smol_path, ATTNHOOK="0") as without:
        assert answers(without) == idle
        status, reply = without.post("/v1/completions", {"model": "smol", "prompt": "hi", "max_tokens": 2, **ASK})
        assert status == 200 and "attention_tokens" not in reply["choices"][0]


def test_flags(tmp_path: Path) -> None:
    def sglang(*arguments: str) -> tuple[int, str]:
        argv = ["sglang.launch_server", *arguments]
        return run(argv, engine_environment(), tmp_path / "log", ready=ready_for(engine_environment()))

    _, shown = sglang("--help")
    for flag in ("--return-attention-tokens", "--attention-tokens-top-k", "--attention-tokens-api-key"):
        assert flag in shown, shown[-3000:]
    code, refused = sglang("--model-path", "m", "--attention-tokens-top-k", "1000")
    assert code == 2 and "from 1 to 256" in refused, refused[-2000:]


def test_many_front_ends_and_engines_that_forbid(smol_path: str, tmp_path: Path) -> None:
    flags = [
        "--attention-tokens-fingerprint-only", "--attention-tokens-api-key", "sesame",
        "--tokenizer-worker-num", "2", "--dp-size", "2", "--incremental-streaming-output",
        "--reasoning-parser", "qwen3",
    ]  # fmt: skip
    sink = tmp_path / "all.jsonl"
    environ = {"ATTNHOOK_CAPTURE_ALL": "fingerprint", "ATTNHOOK_SINKS": f"jsonl:{sink}"}
    environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"  # one per engine
    key = {"X-Attention-Key": "sesame"}
    with serve(tmp_path, smol_path, *flags, **environ) as running:
        body = {"model": "smol", "prompt": "hi", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        native = {"text": "hi", "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}}
        print_only = {**ASK, "attention_mode": "fingerprint"}
        for _ in range(3):  # the kernel deals connections out to both front ends
            status, reply = running.post("/v1/completions", {**body, **ASK})
            assert status == 403 and "key" in reply["message"]
            status, reply = running.post("/generate", {**native, **ASK})
            assert status == 403 and "key" in reply["error"]["message"]
            status, reply = running.post("/v1/completions", {**body, **ASK}, **key)
            assert status == 403 and reply["param"] == "attention_mode"
            status, reply = running.post("/v1/completions", {**body, **print_only}, **key)
            entries = reply["choices"][0]["attention_tokens"]
            assert status == 200 and [entry["decode_step"] for entry in entries] == [0, 1, 2]
            assert {"fingerprint", "manifold"} <= entries[0].keys() and "layers" not in entries[0]
            events = running.events("/generate", {**native, **print_only}, **key)
            steps = [[entry["decode_step"] for entry in event["meta_info"]["attention_tokens"]] for event in events]
            assert [step for event in steps for step in event] == [0, 1, 2]  # what is new only
            chunks = running.events("/v1/completions", {**body, **print_only}, **key)
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            streamed = [entry for choice in choices for entry in choice.get("attention_tokens", [])]
            for one, two in zip(streamed, entries, strict=True):  # by two engines, one of which may have cached keys
                assert one["fingerprint"] == pytest.approx(two["fingerprint"], abs=FEATURE)
                assert one == {**two, "fingerprint": one["fingerprint"]}
            thinking = {**body, "prompt": "<think>", **print_only}
            status, reply = running.post("/v1/completions", thinking, **key)
            assert {entry["think_phase"] for entry in reply["choices"][0]["attention_tokens"]} == {"think"}
            assert {entry["think_phase"] for entry in entries} == {"output"}
            status, reply = running.post("/v1/completions", body)  # monitored, and none the wiser
            assert status == 200 and "attention_tokens" not in reply["choices"][0]
            assert running.get("/v1/attention/capabilities")["modes"] == ["fingerprint"]
        # those that were refused computed nothing; SGLang's own warm-up has a longer prompt
        wanted = 3 * 5 * 3
        lines: list[dict[str, Any]] = []
        for _ in range(50):
            found = read_jsonl(sink, tolerate_torn_tail=True)
            lines = [line for line in found if line["query_position"] < 5]
            if len(lines) >= wanted:
                break
            time.sleep(0.2)
    assert len(lines) == wanted and all(line["mode"] == "fingerprint" for line in lines)


def test_an_embedding_server(smol_path: str, tmp_path: Path) -> None:
    """It serves on, and who asks for rows of tokens that it does not generate is told so."""
    with serve(tmp_path, smol_path, "--is-embedding") as running:
        told = running.get("/v1/attention/capabilities")
        assert told["generates"] is False and told["layers"] == []
        for path, body in {
            "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 2}},
            "/v1/completions": {"model": "smol", "prompt": "hi", "max_tokens": 2},
            "/v1/embeddings": {"model": "smol", "input": "hi"},
            "/encode": {"text": "hi"},
        }.items():
            status, reply = running.post(path, {**body, **ASK})
            assert status == 400 and "generates no tokens" in str(reply), (path, status, reply)
        status, reply = running.post("/generate", {"text": "hi", "sampling_params": {"custom_params": ASK}})
        assert status == 400 and "return_attention_tokens" in str(reply), reply
        status, reply = running.post("/v1/embeddings", {"model": "smol", "input": "hi"})
        assert status == 200 and len(reply["data"][0]["embedding"]) == 576


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("speculative_algorithm", "EAGLE", "speculative decoding"),
        ("disaggregation_mode", "prefill", "disaggregation"),
        ("enable_dp_attention", True, "data-parallel attention"),
        ("attn_dp_size", 2, "data-parallel attention"),
        ("attn_cp_size", 2, "context parallelism"),
        ("smg_grpc_mode", True, "gRPC"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(argument: str, value: Any, named: str) -> None:
    from attnhook.backends.sglang import refusals

    refusals.check(
        SimpleNamespace(tp_size=2, pp_size=2, dp_size=2, speculative_algorithm=None, disaggregation_mode="null")
    )
    with pytest.raises(UnsupportedError, match=f"{named}.*{argument}={value!r}.*start with"):
        refusals.check(SimpleNamespace(**{argument: value}))
