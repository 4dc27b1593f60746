"""Tiny random models whose attention SGLang computes in other ways: windows, sinks, latent keys.

SGLang wants a GPU for some of them; their kernels are Triton's, which its interpreter runs on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.backends.sglang.engine import needs_sglang, offline
from tests.backends.sglang.test_offline import sampling
from tests.backends.vllm.engine import from_entry

pytestmark = [pytest.mark.slow, needs_sglang]

PROMPTS = [list(range(3, 90)), list(range(200, 160, -1))]
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "sliding_window": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
INTERPRETED = {"attention_backend": "triton", "environ": {"TRITON_INTERPRET": "1"}}


def ask(tmp_path: Path, model: Any, new: int, batches: int = 1, **engine: Any) -> list[Any]:
    """What the engine answers to `PROMPTS`, ``batches`` times over; every row is rebuilt from its probabilities."""
    model.save_pretrained(tmp_path / "model")
    batch = {"input_ids": PROMPTS, "sampling_params": sampling(new, attention_self_check=True)}
    settings = {"skip_tokenizer_init": True, "context_length": 256, **engine}
    results = offline(tmp_path, str(tmp_path / "model"), [batch] * batches, **settings)
    for result in (result for found in results for result in found):
        meta = result["meta_info"]
        assert meta.get("attention_error") is None, meta["attention_error"]
        print(meta["attention_self_check"])
        assert 0 < meta["attention_self_check"]["max_error"] < 1e-4
    return results


def rows(ids: list[int], result: dict[str, Any], new: int) -> list[Any]:
    meta = result["meta_info"]
    found = [from_entry(entry) for entry in (*meta["prompt_attention_tokens"], *meta["attention_tokens"])]
    assert [row.query_position for row in found] == list(range(len(ids) - 1 + new))
    return found


def compare(model: Any, results: list[Any], new: int, *, rows_of: slice = slice(None), **options: Any) -> None:
    """Rows against Transformers' eager attention on the same token ids."""
    for ids, result in zip(PROMPTS, results, strict=True):
        attention = oracle.eager_attention(model, torch.tensor([[*ids, *result["output_ids"]][:-1]]))
        worst = oracle.compare(rows(ids, result, new)[rows_of], attention, top_k=8, windows={0: 16, 2: 16}, **options)
        print(len(ids), worst)
        oracle.check(worst)


def test_sliding_windows(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_hidden_layers=3, layer_types=KINDS)).eval()
    (results,) = ask(tmp_path, model, 20, chunked_prefill_size=48)
    compare(model, results, 20)


def test_a_pool_of_windows(tmp_path: Path) -> None:
    """Layers with a window have slots of their own, which are given away when the window has passed."""
    from transformers import MellumConfig, MellumForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = MellumForCausalLM(MellumConfig(**SIZES, num_hidden_layers=3, layer_types=KINDS, **experts)).eval()
    notes = tmp_path / "notes"
    (results,) = ask(tmp_path, model, 20, chunked_prefill_size=48, environ={"SGLANG_TEST_NOTES": str(notes)})
    compare(model, results, 20)
    assert set(notes.read_text().splitlines()) == {"pool SWAKVPool"}


def test_learned_sinks(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_hidden_layers=3, layer_types=KINDS, **experts)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([0.5, -1.0, 2.0, 0.25]))  # bfloat16 in SGLang
    (results,) = ask(tmp_path, model, 4, **INTERPRETED)
    # SGLang's own decoding with Triton sees one key less than its prompts, and Transformers, do
    compare(model, results, 4, sinks=True, rows_of=slice(0, -3))
    for ids, result in zip(PROMPTS, results, strict=True):
        last = rows(ids, result, 4)[-1]
        for n, layer in enumerate(last.layers):
            seen = last.token_positions[n][last.token_positions[n] >= 0]
            assert len(seen) == 8 and (KINDS[layer] == "full_attention" or min(seen) > last.query_position - 15)


def test_latent_keys(tmp_path: Path) -> None:
    """MLA: prompts go through expanded keys, what follows a cached prefix or decodes through the latent ones."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256,
        "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    }  # fmt: skip
    sizes = {name: value for name, value in SIZES.items() if name not in ("head_dim", "sliding_window")}
    config = DeepseekV2Config(
        **{**sizes, "num_key_value_heads": 4}, num_hidden_layers=2, kv_lora_rank=512, q_lora_rank=None,
        qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2, moe_layer_freq=1,
        n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=32,
        initializer_range=0.1, rope_parameters=rope,
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).eval()
    (results,) = ask(tmp_path, model, 5, chunked_prefill_size=64, **INTERPRETED)
    for ids, result in zip(PROMPTS, results, strict=True):
        for row in rows(ids, result, 5):
            assert row.layers == (0, 1)
            assert abs(row.fingerprints[:, 4:20].sum(1) - 1).max() < 1e-5
        attention = oracle.eager_attention(model, torch.tensor([[*ids, *result["output_ids"]][:-1]]))
        worst = oracle.compare(rows(ids, result, 5), attention, top_k=8)
        print(len(ids), worst)
        oracle.check(worst)
