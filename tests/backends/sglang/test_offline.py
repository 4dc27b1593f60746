"""SGLang's scheduler in all its moods, against Transformers' eager attention on the same token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.backends.sglang.engine import needs_sglang, offline
from tests.backends.vllm.engine import ALL, check, from_entry
from tests.helpers import tiny_model

pytestmark = [pytest.mark.model, pytest.mark.slow, needs_sglang]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, long_text: str) -> list[list[int]]:
    ids = tokenizer(long_text)["input_ids"]
    return [ids[:37], ids[100:163], ids[200:201], ids[:400], ids[300:420]]


def sampling(new: int, asks: bool = True, **fields: Any) -> dict[str, Any]:
    custom = {"custom_params": {**ALL, **fields}} if asks else {}
    return {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True, **custom}


def whole(smol: Any, ids: list[int], result: dict[str, Any], **options: Any) -> Any:
    meta = result["meta_info"]
    assert meta.get("attention_error") is None
    generated = [from_entry(entry) for entry in meta["attention_tokens"]]
    prompt = [from_entry(entry) for entry in meta.get("prompt_attention_tokens", [])]
    return check(smol, ids, result["output_ids"], generated, prompt, **options)


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
        environ={"SGLANG_TEST_RETRACT": "1"},
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
        print("cached", check(smol, prompts[3], result["output_ids"], generated))


def test_tensor_parallel_ranks_with_overlap(
    smol: Any, smol_path: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    fields = {"attention_heads": [1, 5], "attention_mask_prefix": 3, "attention_spans": {"head": [0, 5]}}
    batches = [
        {"input_ids": prompts, "sampling_params": [sampling(6) for _ in prompts]},
        {"input_ids": prompts[0], "sampling_params": sampling(3, attention_self_check=True)},
        {"input_ids": prompts[0], "sampling_params": sampling(3, attention_prompt=False, **fields)},
    ]
    environ = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    results, checked, some = offline(tmp_path, smol_path, batches, tp_size=3, environ=environ)
    for ids, result in zip(prompts, results, strict=True):
        print(len(ids), whole(smol, ids, result))
    assert checked["meta_info"]["attention_self_check"]["max_error"] < 1e-4
    entry = some["meta_info"]["attention_tokens"][0]
    assert 0 < entry["spans"]["head"] < 1
    assert all(min(layer["token_positions"]) >= 3 for layer in entry["layers"].values())


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


def test_sliding_windows(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, layer_types=kinds, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    prompts = [list(range(3, 90)), list(range(200, 160, -1))]
    batch = {"input_ids": prompts, "sampling_params": sampling(20, attention_self_check=True)}
    (results,) = offline(
        tmp_path, str(tmp_path / "model"), [batch],
        skip_tokenizer_init=True, chunked_prefill_size=48, context_length=256,
    )  # fmt: skip
    for ids, result in zip(prompts, results, strict=True):
        meta = result["meta_info"]
        assert meta.get("attention_error") is None and meta["attention_self_check"]["max_error"] < 1e-4
        rows = [from_entry(entry) for entry in (*meta["prompt_attention_tokens"], *meta["attention_tokens"])]
        assert len(rows) == len(ids) - 1 + 20
        attention = oracle.eager_attention(model, torch.tensor([[*ids, *result["output_ids"]][:-1]]))
        worst = oracle.compare(rows, attention, top_k=8, windows={0: 16, 2: 16})
        print(len(ids), worst)
        oracle.check(worst)
