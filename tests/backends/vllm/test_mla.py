"""Multi-head latent attention: a tiny random DeepSeek-V2 on vLLM's own CPU implementation.

vLLM's answer for such a model differs from Transformers' (its tokens too, with the plugin absent as well), so the
engine's own output is the judge here: every row's is rebuilt from our probabilities and the cached latents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backends.vllm.engine import ALL, needs_vllm, offline, records

pytestmark = [pytest.mark.slow, needs_vllm]

LAYERS = 2


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,
        q_lora_rank=None, first_k_dense_replace=LAYERS, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, max_position_embeddings=1024, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("deepseek")
    model.save_pretrained(folder)
    return str(folder)


def test_rows_of_a_latent_cache(deepseek: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 128, (3, 150), generator=torch.Generator().manual_seed(1)).tolist()
    fields = {**ALL, "attention_self_check": True}
    requests = [
        {"ids": prompt, "sampling": {"max_tokens": 5, "ignore_eos": True}, "fields": fields}
        for prompt in (ids[0], ids[1][:3], ids[2][:40])
    ]
    replies = offline(
        tmp_path, deepseek, requests, skip_tokenizer_init=True, max_model_len=512, max_num_batched_tokens=64
    )["replies"]  # fmt: skip
    for request, reply in zip(requests, replies, strict=True):
        choice = reply["choices"][0]
        assert choice["error"] is None
        rows = [*records(choice["prompt"]), *records(choice["generated"])]
        assert [row.query_position for row in rows] == list(range(len(request["ids"]) + 4))
        assert all(row.layers == (0, 1) for row in rows)
        print(choice["check"])
        assert 0 < choice["check"] < 1e-4
        for row in rows:
            first = min(8, row.query_position + 1)
            assert (row.token_positions[:, :first] >= 0).all()
            assert np.allclose(row.fingerprints[:, 4:20].sum(1), 1, atol=1e-5)
