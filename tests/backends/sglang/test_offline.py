"""SGLang's scheduler in all its moods, against Transformers' eager attention on the same token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from attnhook.sinks.jsonl import read_jsonl
from tests import oracle
from tests.backends.sglang.engine import check, needs_sglang, offline
from tests.backends.token_ids import check_line
from tests.backends.vllm.engine import ALL, KEYS, OF_HEADS, from_entry
from tests.helpers import tiny_model

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_sglang]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, long_text: str) -> list[list[int]]:
    ids = tokenizer(long_text)["input_ids"]
    return [ids[:37], ids[100:163], ids[200:201], ids[:400], ids[300:420]]


def sampling(new: int, asks: bool = True, **fields: Any) -> dict[str, Any]:
    custom = {"custom_params": {**ALL, **KEYS, **fields}} if asks else {}
    return {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True, **custom}


def whole(smol: Any, ids: list[int], result: dict[str, Any], **options: Any) -> Any:
    meta = result["meta_info"]
    assert meta.get("attention_error") is None
    generated = [from_entry(entry) for entry in meta["attention_tokens"]]
    prompt = [from_entry(entry) for entry in meta.get("prompt_attention_tokens", [])]
    mass = meta["attention_key_mass"]
    return check(smol, ids, result["output_ids"], generated, prompt, key_mass=mass, **options)


def test_chunks_mixed_batches_pages_and_retraction(
    smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    new = [12, 9, 20, 8, 16]
    asks = [True, True, True, True, False]
    together = {"input_ids": prompts, "sampling_params": [sampling(*each) for each in zip(new, asks, strict=True)]}
    late = {"input_ids": prompts[3], "sampling_params": sampling(5, attention_prompt=False)}
    found = offline(
        tmp_path, smol_path, [together, late, late],
        chunked_prefill_size=64, enable_mixed_chunk=True, page_size=16, disable_overlap_schedule=True,
        environ={"SGLANG_TEST_RETRACT": "1", "ATTNHOOK_SINKS": f"jsonl:{tmp_path}/ids.jsonl?tokens=1"},
    )  # fmt: skip
    results = found[0]
    told = [result["meta_info"] for result in results]
    # older versions call it otherwise
    retracted = sum(meta.get("num_retractions", meta.get("total_retractions")) for meta in told)
    assert retracted, "no request was retracted, so this shows nothing"
    for ids, result, asked in zip(prompts, results, asks, strict=True):
        if asked:
            print(len(ids), whole(smol, ids, result))
        else:
            assert not any("attention" in name or name == "attnhook" for name in result["meta_info"])
    # the second finds its prefix in the cache
    for result in found[1:]:
        assert result["meta_info"]["cached_tokens"] >= 300
        generated = [from_entry(entry) for entry in result["meta_info"]["attention_tokens"]]
        mass = result["meta_info"]["attention_key_mass"]
        print("cached", check(smol, prompts[3], result["output_ids"], generated, key_mass=mass))
    # a sink that asks has the ids of each request's own tokens, the replies have none
    lines = list(read_jsonl(tmp_path / "ids.jsonl"))
    requests = [*zip(prompts[:4], results, strict=False), *((prompts[3], result) for result in found[1:])]
    for ids, result in requests:
        meta = result["meta_info"]
        entries = [*meta.get("prompt_attention_tokens", []), *meta["attention_tokens"]]
        assert not any("query_token" in entry for entry in entries)
        own = [line for line in lines if line["request_id"] == meta["id"]]
        wanted, there = ({entry["query_position"] for entry in some} for some in (entries, own))
        # the engine kills its scheduler when it ends: of the last request some may still have been in the sink's queue
        assert there <= wanted if result is found[-1] else there == wanted
        for line in own:
            check_line(line, [*ids, *result["output_ids"]])


def test_tensor_parallel_ranks_with_overlap(
    smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    fields = {"attention_heads": [1, 5], "attention_mask_prefix": 3, "attention_spans": {"head": [0, 5]}}
    batches = [
        {"input_ids": prompts, "sampling_params": [sampling(6) for _ in prompts]},
        {"input_ids": prompts[0], "sampling_params": sampling(3, attention_self_check=True)},
        {"input_ids": prompts[0], "sampling_params": sampling(3, attention_prompt=False, **fields)},
        {"input_ids": prompts[1], "sampling_params": sampling(3, **OF_HEADS)},
        {
            "input_ids": prompts[1],
            "sampling_params": sampling(
                3,
                attention_prompt=False,
                attention_rows=[[30, 34], [50, 51]],
                attention_layers=[5, 12, -1],
                attention_heads={"-1": [0], "12": [5, 3]},
            ),
        },
    ]
    environ = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    results, checked, some, told, chosen = offline(tmp_path, smol_path, batches, tp_size=3, environ=environ)
    for ids, result in zip(prompts, results, strict=True):
        print(len(ids), whole(smol, ids, result))
    assert checked["meta_info"]["attention_self_check"]["max_error"] < 1e-4
    entry = some["meta_info"]["attention_tokens"][0]
    assert 0 < entry["spans"]["head"] < 1
    assert all(min(layer["token_positions"]) >= 3 for layer in entry["layers"].values())
    # what each rank tells of its own heads
    whole(smol, prompts[1], told)
    entries = [*told["meta_info"]["prompt_attention_tokens"], *told["meta_info"]["attention_tokens"]]
    rows = [from_entry(entry) for entry in entries]
    oracle.check_heads(smol, [*prompts[1], *told["output_ids"]][:-1], rows, top_k=4, heads=range(9))
    # chosen rows of the prompt, whose others come from the cache, and of each layer other heads
    meta = chosen["meta_info"]
    rows = [from_entry(entry) for entry in (*meta["prompt_attention_tokens"], *meta["attention_tokens"])]
    assert meta.get("attention_error") is None and 0 < meta["cached_tokens"] <= 30
    assert [r.query_position for r in rows] == [30, 31, 32, 33, 50, 62, 63, 64]
    ids = [*prompts[1], *chosen["output_ids"]][:-1]
    oracle.check_heads_by_layer(smol, ids, rows, {12: (3, 5), 29: (0,)}, top_k=8)


def test_pipeline_stages(tmp_path: Path) -> None:
    """A tiny model of its own head: SGLang's own stages do not work where the head is tied to the embedding."""
    model = tiny_model(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, tie_word_embeddings=False
    )
    model.save_pretrained(tmp_path / "model")
    prompts = [list(range(3, 40)), list(range(200, 60, -1)), [7]]
    batches = [
        {"input_ids": prompts, "sampling_params": [sampling(9), sampling(12), sampling(5, asks=False)]},
        {"input_ids": prompts[1], "sampling_params": sampling(4, attention_layers=[3], attention_prompt=False)},
    ]
    results, last = offline(
        tmp_path, str(tmp_path / "model"), batches,
        pp_size=2, skip_tokenizer_init=True, chunked_prefill_size=64, context_length=256,
        # 0.5.18 and older want one entry per tensor-parallel rank, not per process
        environ={"SGLANG_CPU_OMP_THREADS_BIND": os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "0|1")},
    )  # fmt: skip
    for ids, result in zip(prompts[:2], results, strict=False):
        print(len(ids), whole(model, ids, result, layers=4))
    assert not any("attention" in name for name in results[2]["meta_info"])
    generated = [from_entry(entry) for entry in last["meta_info"]["attention_tokens"]]
    check(model, prompts[1], last["output_ids"], generated, layers=1)


def test_queries_that_graphs_keep(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    """Without a GPU every decode pass plays a replay: the attention call only writes into the fixed buffers."""
    some = {"attention_layers": [3, 29], "attention_prompt": False}
    every, plain = sampling(7, attention_prompt=False), sampling(12, asks=False)
    asked = [sampling(9, **some), plain, every, sampling(4, **some), sampling(3, **some)]
    batches = [
        {"input_ids": prompts[0], "sampling_params": sampling(2, asks=False)},  # its decode pass is the capture
        {"input_ids": prompts, "sampling_params": asked},
        {"input_ids": prompts[0], "sampling_params": sampling(5, **some)},
        {"input_ids": prompts[0], "sampling_params": sampling(5, **some, attention_self_check=True)},
    ]
    notes = tmp_path / "notes"
    environ = {"ATTNHOOK_GRAPH_LAYERS": "3,29", "SGLANG_TEST_NOTES": str(notes)}
    _, mixed, alone, checked = offline(tmp_path, smol_path, batches, environ=environ)
    # not the passes of a prompt, nor those in which somebody wants another layer or the self-check
    assert notes.read_text().splitlines().count("kept [3, 29]") >= 2 + 4
    found = [*zip(prompts, mixed, asked, strict=True), (prompts[0], alone, asked[0]), (prompts[0], checked, asked[0])]
    for ids, result, params in found:
        meta = result["meta_info"]
        if params is plain:
            assert not any("attention" in name for name in meta)
            continue
        assert meta.get("attention_error") is None
        generated = [from_entry(entry) for entry in meta["attention_tokens"]]
        layers = 30 if params is every else 2
        print(len(ids), check(smol, ids, result["output_ids"], generated, layers=layers))
    assert checked["meta_info"]["attention_self_check"]["max_error"] < 1e-4


def test_bfloat16(smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path) -> None:
    """The engine's own rounding, against eager attention in float32; the bound is that of docs/numerics.md."""
    batch = {"input_ids": prompts[0], "sampling_params": sampling(6)}
    (result,) = offline(tmp_path, smol_path, [batch], dtype="bfloat16")
    meta = result["meta_info"]
    assert meta.get("attention_error") is None
    rows = [from_entry(entry) for entry in (*meta["prompt_attention_tokens"], *meta["attention_tokens"])]
    attention = oracle.eager_attention(smol, torch.tensor([[*prompts[0], *result["output_ids"]][:-1]]))
    worst = oracle.compare(rows, attention, top_k=8)
    print(worst)
    assert worst.rows == 30 * (36 + 6)
    assert 1e-4 < worst.probability < 6e-2 and worst.feature < 6e-2
