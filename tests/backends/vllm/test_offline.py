"""vLLM's scheduler in all its moods, against Transformers' eager attention on the same token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attnhook.record.key_mass import KeyMass
from attnhook.sinks.jsonl import read_jsonl
from tests import oracle
from tests.backends.token_ids import check_line
from tests.backends.vllm.engine import ALL, CHOSEN, KEYS, OF_HEADS, check, needs_vllm, offline, records

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, long_text: str) -> list[list[int]]:
    ids = tokenizer(long_text)["input_ids"]
    return [ids[:37], ids[100:163], ids[200:201], ids[:700], ids[300:420]]


def ask(ids: list[int], new: int = 8, **fields: Any) -> dict[str, Any]:
    return {"ids": ids, "sampling": {"max_tokens": new, "ignore_eos": True}, "fields": {**ALL, **KEYS, **fields}}


def whole(smol: Any, request: dict[str, Any], choice: dict[str, Any], **options: Any) -> Any:
    assert choice["error"] is None and bool(choice["key_mass"]) == bool(request["fields"].get("attention_key_mass"))
    rows = records(choice["generated"]), records(choice["prompt"])
    return check(smol, request["ids"], choice["ids"], *rows, key_mass=choice["key_mass"], **options)


def asking_sink(folder: Path) -> dict[str, str]:
    return {"ATTNHOOK_SINKS": f"jsonl:{folder}/ids.jsonl?tokens=1"}


def check_ids(folder: Path, requests: list[dict[str, Any]], replies: list[dict[str, Any]]) -> None:
    """Every record is in the sink with the ids of its request's tokens, and in the reply without."""
    lines = list(read_jsonl(folder / "ids.jsonl"))
    (folder / "ids.jsonl").unlink()
    total = 0
    for request, reply in zip(requests, replies, strict=True):
        (choice,) = reply["choices"]
        replied = [*records(choice["prompt"]), *records(choice["generated"])]
        assert all(record.token_ids is None for record in replied)
        name = replied[0].request_id
        own = [line for line in lines if line["request_id"].split("-")[0] == name.split("-")[0]]
        assert sorted(line["query_position"] for line in own) == sorted(record.query_position for record in replied)
        for line in own:
            check_line(line, [*request["ids"], *choice["ids"]])
        total += len(own)
    assert total == len(lines)


def test_batches_prefix_hits_and_choices(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    quiet = {"ids": prompts[1], "sampling": {"max_tokens": 8, "ignore_eos": True, "logprobs": 2}}
    loud = {**quiet, "fields": dict(ALL)}
    several = {
        **ask(prompts[4]),
        "sampling": {"max_tokens": 6, "ignore_eos": True, "n": 2, "temperature": 0.8, "seed": 3},
    }
    late = ask(prompts[3], attention_prompt=False, top_k_attention=32)
    requests = [ask(p) for p in prompts] + [quiet, loud, several]
    result = offline(tmp_path, smol_path, requests)
    replies = result["replies"]
    for request, reply in zip(requests[: len(prompts)], replies, strict=False):
        print(len(request["ids"]), whole(smol, request, reply["choices"][0]))
    # who does not ask gets nothing, and the same tokens and logprobs to the bit
    assert not replies[5]["choices"][0]["asked"] and not replies[5]["choices"][0]["generated"]
    assert replies[5]["choices"][0]["ids"] == replies[6]["choices"][0]["ids"]
    assert replies[5]["choices"][0]["logprobs"] == replies[6]["choices"][0]["logprobs"]
    whole(smol, loud, replies[6]["choices"][0])
    choices = replies[7]["choices"]
    assert len(choices) == 2 and choices[0]["ids"] != choices[1]["ids"]
    for n, choice in enumerate(choices):
        whole(smol, several, choice)
        assert {r.choice for r in records(choice["generated"])} == {n}
    assert len({r.request_id for c in choices for r in records(c["generated"])}) == 1

    # one after the other: the second finds its prefix in the cache, and computes one row of the prompt
    again = offline(tmp_path, smol_path, [late, late], together=False, environ=asking_sink(tmp_path))["replies"]
    check_ids(tmp_path, [late, late], again)
    assert again[0]["cached"] == 0 and again[1]["cached"] >= 600
    for reply in again:
        choice = reply["choices"][0]
        assert choice["error"] is None and not choice["prompt"]
        check(smol, prompts[3], choice["ids"], records(choice["generated"]), top_k=32, key_mass=choice["key_mass"])


def test_chunked_prefill_and_preemption(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    requests = [ask(p, new=40) for p in (prompts[4], prompts[1], prompts[0], prompts[4][5:])]
    requests[3]["fields"] |= {"attention_prompt": False, "attention_rows": [[50, 70], [90, 115]]}
    result = offline(
        tmp_path, smol_path, requests,
        max_num_batched_tokens=64, enable_chunked_prefill=True, block_size=32, num_gpu_blocks_override=14,
        enable_prefix_caching=False, max_model_len=256, environ=asking_sink(tmp_path),
    )  # fmt: skip
    check_ids(tmp_path, requests, result["replies"])
    assert result["preempted"], "no request was preempted, so this shows nothing"
    *replies, last = [reply["choices"][0] for reply in result["replies"]]
    for request, choice in zip(requests, replies, strict=False):
        print(len(request["ids"]), whole(smol, request, choice))
    before, after = records(last["prompt"]), records(last["generated"])
    assert last["error"] is None
    assert [r.query_position for r in before] == [*range(50, 70), *range(90, 114)]  # the last gives the first token
    attention = oracle.eager_attention(smol, torch.tensor([[*requests[3]["ids"], *last["ids"]][:-1]]))
    oracle.check(oracle.compare([*before, *after], attention, top_k=8))
    assert len(after) == 40
    oracle.check_key_mass(attention, KeyMass.from_list(last["key_mass"]), [*before, *after])


def test_speculated_tokens(smol: Any, smol_path: str, tokenizer: Any, tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten " * 6
    request = ask(tokenizer(text)["input_ids"], new=24)
    speculating = offline(
        tmp_path, smol_path, [request],
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        environ=asking_sink(tmp_path),
    )  # fmt: skip
    check_ids(tmp_path, [request], speculating["replies"])
    print(whole(smol, request, speculating["replies"][0]["choices"][0]))


def test_stop_strings_among_speculated_tokens(smol: Any, smol_path: str, tokenizer: Any, tmp_path: Path) -> None:
    """Tokens that were accepted together with the one that ends the text are dropped, and so are their rows."""
    ids = tokenizer("one two three four five six seven eight nine ten " * 6 + "one two")["input_ids"]
    sampling: list[dict[str, Any]] = [
        {"stop": [" four"]},
        {"stop": [" five", " eight"], "include_stop_str_in_output": True},
        {"stop": [" three"], "min_tokens": 5},
        {"stop": ["never"]},
    ]
    requests = [{**ask(ids, new=24), "sampling": {"max_tokens": 24, "ignore_eos": True, **one}} for one in sampling]
    replies = offline(
        tmp_path, smol_path, requests,
        speculative_config={"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
        environ=asking_sink(tmp_path),
    )["replies"]  # fmt: skip
    lengths = [len(reply["choices"][0]["ids"]) for reply in replies]
    assert max(lengths[:3]) < 24 == lengths[3], lengths
    for request, reply in zip(requests, replies, strict=True):
        print(whole(smol, request, reply["choices"][0]))
    check_ids(tmp_path, requests, replies)


def test_strides_limits_modes_heads_and_spans(
    smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    base = {"return_attention_tokens": True}
    asked = [
        {**base, "attention_stride": 3},
        {**base, "attention_max_tokens": 2, "attention_layers": [0, -1]},
        {**base, "attention_mode": "fingerprint"},
        {**base, "attention_heads": [1, 5], "attention_spans": {"head": [0, 5]}, "attention_mask_prefix": 3},
        {**ALL, **OF_HEADS},
        {
            **base, **CHOSEN, "top_k_attention": 8, "attention_layers": [5, 12, -1],
            "attention_heads": {"-1": [0], "12": [5, 3]},
        },
    ]  # fmt: skip
    requests = [{**ask(prompts[0], new=7), "fields": fields} for fields in asked]
    result = offline(tmp_path, smol_path, requests, uninstall=True)
    replies = result["replies"]
    found = [records(reply["choices"][0]["generated"]) for reply in replies]
    assert [r.decode_step for r in found[0]] == [0, 3, 6]
    assert [r.decode_step for r in found[1]] == [0, 1] and found[1][0].layers == (0, 29)
    assert len(found[2]) == 7 and found[2][0].mode == "fingerprint" and found[2][0].layers == (29,)
    first = found[3][0]
    assert first.span_names == ("head",) and 0 < first.spans["head"] < 1
    assert first.token_positions.min() >= 3
    # every head by itself, as eager attention has it
    choice = replies[4]["choices"][0]
    rows = [*records(choice["prompt"]), *records(choice["generated"])]
    oracle.check_heads(smol, [*prompts[0], *choice["ids"]][:-1], rows, top_k=4, heads=range(9))
    whole(smol, requests[4], choice)
    # chosen rows of the prompt, and of each layer other heads
    choice = replies[5]["choices"][0]
    before, after = records(choice["prompt"]), records(choice["generated"])
    assert choice["error"] is None and [r.query_position for r in before] == [0, 1, 2, 3, 4, 30, 31, 32, 33]
    assert [r.query_position for r in after] == list(range(36, 43))
    ids = [*prompts[0], *choice["ids"]][:-1]
    oracle.check_heads_by_layer(smol, ids, [*before, *after], {12: (3, 5), 29: (0,)}, top_k=8)
    assert all(reply["choices"][0]["ids"] == replies[0]["choices"][0]["ids"] for reply in replies)
    # and nothing of ours is left in the engine after uninstall(), which generates on
    assert result["left"] == []
    assert result["afterwards"] == {"ids": replies[0]["choices"][0]["ids"][:4], "asked": False}


def test_kept_queries(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    """What CUDA graphs would have copied in their replay: buffers and an index instead of Python in the pass."""
    environ = {"ATTNHOOK_GRAPH_LAYERS": "0,7,29"}
    plain = {"ids": prompts[1], "sampling": {"max_tokens": 8, "ignore_eos": True}}
    few = {**ask(prompts[2], attention_prompt=False), "sampling": {"max_tokens": 20, "ignore_eos": True}}
    requests = [few, plain, ask(prompts[0], attention_prompt=False), ask(prompts[3])]
    result = offline(tmp_path, smol_path, requests, together=False, environ=environ, max_num_seqs=4)["replies"]
    for n in (0, 2):
        check(smol, requests[n]["ids"], result[n]["choices"][0]["ids"], records(result[n]["choices"][0]["generated"]))
    assert not result[1]["choices"][0]["asked"]
    # more prompt rows in one pass than the buffers have room for
    error = result[3]["choices"][0]["error"]
    assert "[0, 7, 29]" in error and "--attention-tokens-graph-layers" in error, error


def test_bfloat16(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    request = ask(prompts[1])
    choice = offline(tmp_path, smol_path, [request], dtype="bfloat16")["replies"][0]["choices"][0]
    assert choice["error"] is None
    import torch

    rows = [*records(choice["prompt"]), *records(choice["generated"])]
    attention = oracle.eager_attention(smol, torch.tensor([[*request["ids"], *choice["ids"]][:-1]]))
    worst = oracle.compare(rows, attention, top_k=8)
    print(worst)
    assert worst.probability < 6e-2  # the engine's own rounding; docs/numerics.md


def test_the_plugin_changes_no_token(smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    plain = [{"ids": p, "sampling": {"max_tokens": 12, "ignore_eos": True, "logprobs": 3}} for p in prompts[:3]]
    asking = [{**request, "fields": dict(ALL)} for request in plain]
    options: dict[str, Any] = {"enable_prefix_caching": False}  # or the second batch would compute less
    without = offline(tmp_path, smol_path, plain, environ={"ATTNHOOK": "0"}, **options)["replies"]
    found = offline(tmp_path, smol_path, batches=[plain, asking], **options)["replies"]
    for a, b, c in zip(without, found[:3], found[3:], strict=True):
        for name in ("ids", "logprobs"):
            assert a["choices"][0][name] == b["choices"][0][name] == c["choices"][0][name]
        assert len(c["choices"][0]["generated"]) == 12


def test_model_runner_v2(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    """vLLM's default on GPUs, here with its Triton kernels interpreted: a mixed batch whose prompts come in chunks."""
    environ = {
        "PYTHONPATH": str(Path(__file__).parent / "interpreted"),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    plain = {"ids": prompts[1], "sampling": {"max_tokens": 4, "ignore_eos": True}}
    requests = [ask(prompts[2], new=4), plain, ask(prompts[0], new=4), ask(prompts[4], new=4, attention_prompt=False)]
    result = offline(tmp_path, smol_path, requests, fresh=True, environ=environ, max_num_batched_tokens=64)["replies"]
    for n in (0, 2):
        print(whole(smol, requests[n], result[n]["choices"][0]))
    assert not result[1]["choices"][0]["asked"]
    choice = result[3]["choices"][0]
    check(smol, requests[3]["ids"], choice["ids"], records(choice["generated"]))
