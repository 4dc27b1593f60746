"""What else an engine may run: adapters, and layers that are no attention."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.backends.vllm.engine import ALL, check, needs_vllm, offline, records
from tests.helpers import tiny_model

pytestmark = [pytest.mark.slow, needs_vllm]

RANK, ALPHA = 8, 16


def ask(ids: list[int], new: int = 8, **fields: Any) -> dict[str, Any]:
    return {"ids": ids, "sampling": {"max_tokens": new, "ignore_eos": True}, "fields": {**ALL, **fields}}


def random_adapter(model: Any, folder: Path) -> Any:
    """A LoRA adapter for every linear layer in PEFT's file format, and a copy of the model with it merged in."""
    from safetensors.torch import save_file

    merged, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    weights, targets = {}, set()
    for name, module in merged.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            a = torch.randn(RANK, module.in_features, generator=draw) / module.in_features**0.5
            b = torch.randn(module.out_features, RANK, generator=draw) * 0.05
            weights[f"base_model.model.model.{name}.lora_A.weight"] = a
            weights[f"base_model.model.model.{name}.lora_B.weight"] = b
            module.weight.data += ALPHA / RANK * b @ a
            targets.add(name.rsplit(".", 1)[-1])
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return merged


@pytest.mark.model
def test_lora(smol: Any, smol_path: str, tokenizer: Any, tmp_path: Path) -> None:
    """Base and adapted requests in one batch: each has the attention of its own weights."""
    merged = random_adapter(smol, tmp_path / "adapter")
    texts = ["The capital of France is", "One two three four five six seven", "To be or not to be, that is the"]
    plain = [ask(tokenizer(text)["input_ids"]) for text in texts]
    adapted = [{**request, "adapter": str(tmp_path / "adapter")} for request in plain]
    requests = [request for pair in zip(plain, adapted, strict=True) for request in pair]
    # vLLM's CPU kernels give a base request the last slot's adapter (an index of -1): leave that slot empty
    result = offline(tmp_path, smol_path, requests, enable_lora=True, max_loras=2, max_lora_rank=RANK)
    for request, reply in zip(requests, result["replies"], strict=True):
        choice = reply["choices"][0]
        assert choice["error"] is None
        rows = records(choice["generated"]), records(choice["prompt"])
        print(
            "adapter" in request, check(merged if "adapter" in request else smol, request["ids"], choice["ids"], *rows)
        )
        if "adapter" in request:  # it would not pass for the other
            attention = oracle.eager_attention(smol, torch.tensor([[*request["ids"], *choice["ids"]][:-1]]))
            assert oracle.compare(rows[0], attention, top_k=8).probability > 1e-2


def test_a_hybrid_model(tmp_path: Path) -> None:
    """State-space layers have no attention to report; the others keep their numbers in the model."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        vocab_size=256, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, layer_types=["mamba", "attention"] * 2,
        mamba_n_heads=4, mamba_d_head=64, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=32,
        num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=96, position_embedding_type="rope",
        attention_multiplier=32**-0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GraniteMoeHybridForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:  # as they come, attention would be all but uniform
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path / "model")
    ids = [(37 * i) % 250 + 3 for i in range(150)]
    quiet = {"detokenize": False, "max_tokens": 8, "ignore_eos": True}
    requests = [{**ask(part), "sampling": quiet} for part in (ids[:40], ids[20:23], ids)]
    requests += [{**ask(ids[:9], attention_layers=layers), "sampling": quiet} for layers in ("last", [-2])]
    result = offline(
        tmp_path, str(tmp_path / "model"), requests,
        skip_tokenizer_init=True, max_model_len=256, max_num_batched_tokens=64, enable_chunked_prefill=True,
    )  # fmt: skip
    choices = [reply["choices"][0] for reply in result["replies"]]
    for request, choice in zip(requests[:3], choices, strict=False):
        assert choice["error"] is None
        rows = records(choice["generated"]), records(choice["prompt"])
        assert rows[0][0].layers == (1, 3)
        print(check(model, request["ids"], choice["ids"], *rows, layers=2))
    assert [records(choice["generated"])[0].layers for choice in choices[3:5]] == [(3,), (1,)]
    # a layer without attention is refused before anything is computed
    bad = {**ask(ids[:9], attention_layers=[0]), "sampling": quiet}
    (told,) = offline(tmp_path, str(tmp_path / "model"), [bad], skip_tokenizer_init=True, max_model_len=256)["replies"]
    assert "layer 0 does not exist: the model's attention layers are 1, 3" in told["refused"]


def test_a_model_without_attention(tmp_path: Path) -> None:
    """It starts with attnhook on, generates, and who asks is told that there is nothing to capture."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=256, hidden_size=128, state_size=16, num_hidden_layers=2, num_heads=4, head_dim=64, n_groups=1,
        chunk_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Mamba2ForCausalLM(config).save_pretrained(tmp_path / "mamba")
    ids = list(range(5, 30))
    plain = {"ids": ids, "sampling": {"max_tokens": 4, "ignore_eos": True}, "fields": {}}
    replies = offline(tmp_path, str(tmp_path / "mamba"), [ask(ids), plain], together=False, skip_tokenizer_init=True)
    refused, answered = replies["replies"]
    assert "has no attention layer, so there is nothing to capture" in refused["refused"]
    assert len(answered["choices"][0]["ids"]) == 4


def test_compiled_code(tmp_path: Path) -> None:
    """vLLM's default: the model is compiled, and attention with our hook is called from inductor's code."""
    model = tiny_model(hidden_size=128, num_hidden_layers=3)  # heads of 32, the least that vLLM's CPU kernels take
    model.save_pretrained(tmp_path / "model")
    ids = [(37 * i) % 90 + 3 for i in range(60)]
    quiet = {"detokenize": False, "max_tokens": 8, "ignore_eos": True}
    requests = [{**ask(part), "sampling": quiet} for part in (ids, ids[20:23])]
    environ = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    result = offline(
        tmp_path, str(tmp_path / "model"), requests,
        environ=environ, skip_tokenizer_init=True, max_model_len=256, enforce_eager=False,
    )  # fmt: skip
    log = (tmp_path / "log").read_text(errors="replace")
    assert "saved AOT compiled function" in log, f"nothing was compiled, so this shows nothing:\n{log}"
    for request, reply in zip(requests, result["replies"], strict=True):
        choice = reply["choices"][0]
        assert choice["error"] is None
        rows = records(choice["generated"]), records(choice["prompt"])
        print(check(model, request["ids"], choice["ids"], *rows, layers=3))
