"""What cannot be captured is refused for the true reason; what is no decoder is left alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf

import attnhook
from attnhook import UnsupportedError
from tests import oracle
from tests.backends.transformers.test_padding import SPANS, TEXT, batch, compare, many, qwen25_vl
from tests.helpers import generate, tiny_model

IDS = torch.arange(5, 25)[None]
SMALL = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
}  # fmt: skip
HALVES = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
T5 = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MLA = {
    **TEXT, "num_key_value_heads": 6, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 2, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip


def paligemma() -> Any:
    text, vision = tf.GemmaConfig(**TEXT, head_dim=8), tf.SiglipVisionConfig(**VISION)
    config = tf.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=295, projection_dim=48)
    return many(config)


def deepseek_v4() -> Any:
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    config = tf.DeepseekV4Config(
        vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        q_lora_rank=24, qk_rope_head_dim=8, o_groups=2, o_lora_rank=8, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, index_topk=2, index_n_heads=2, index_head_dim=16, sliding_window=8, layer_types=kinds,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return tf.DeepseekV4ForCausalLM._from_config(config).eval()


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "BERT": (lambda: tf.BertModel(tf.BertConfig(**SMALL)), "a vision tower .BertSelfAttention attends in both"),
    "CLIP's text encoder": (
        lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**SMALL)),
        r"does not generate text, and its attention \(CLIPAttention\) does not say of which layer",
    ),
    "T5's encoder": (lambda: tf.T5EncoderModel(tf.T5Config(**T5)), "a vision tower .T5Attention attends in both"),
    "BART's encoder": (lambda: tf.BartModel(tf.BartConfig(**HALVES)).get_encoder(), "BartEncoder made no causal .* an"),
    "BART": (lambda: tf.BartModel(tf.BartConfig(**HALVES)), "BartModel is an encoder-decoder model, whose decoder"),
    "T5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), "T5ForConditionalGeneration is an encoder-dec"),
    "BLOOM": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=6)),
        r"BloomForCausalLM computes its attention in its own code \(BloomAttention\)",
    ),
    "BLOOM without a head": (
        lambda: tf.BloomModel(tf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=6)),
        r"BloomModel computes its attention in its own code \(BloomAttention\)",
    ),
    "GIT": (
        lambda: tf.GitForCausalLM(tf.GitConfig(**SMALL, vision_config=VISION)),
        r"GitForCausalLM computes its attention in its own code \(GitSelfAttention\).*only that of GitVisionAttention",
    ),
    "Doge": (
        lambda: tf.DogeForCausalLM._from_config(tf.DogeConfig(**TEXT)),
        r"DogeForCausalLM generates text, but its attention \(DogeAttention\) does not say that it is causal",
    ),
    "Mamba": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=300, hidden_size=48, num_hidden_layers=2)),
        "MambaForCausalLM has no attention",
    ),
    "DeepSeek V3.2": (
        lambda: tf.DeepseekV32ForCausalLM._from_config(tf.DeepseekV32Config(**MLA, index_topk=6)),
        r"DeepseekV32Attention \(layer 0\) is sparse: an indexer picks the keys .* at most 6 \(index_topk\)",
    ),
    "GLM": (
        lambda: tf.GlmMoeDsaForCausalLM._from_config(tf.GlmMoeDsaConfig(**MLA, index_topk=6)),
        r"GlmMoeDsaAttention \(layer 0\) is sparse: an indexer picks the keys",
    ),
    "DeepSeek V4": (deepseek_v4, r"DeepseekV4Attention \(layer 1\) attends to compressed keys"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_reason_is_true_of_the_model(name: str, strict: bool) -> None:
    make, reason = MODELS[name]
    model = make().eval()
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder and "encoder" not in name:
        inputs["decoder_input_ids"] = IDS
    if name == "GIT":
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        if strict:
            with pytest.raises(UnsupportedError, match=reason), attnhook.capture(layers="all"):
                model(**inputs)
        else:
            with attnhook.capture(layers="all", on_error="drop") as records:
                model(**inputs)
            assert not records and records.dropped["unsupported"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["BERT", "T5's encoder", "CLIP's text encoder", "ResNet"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_decoder_is_left_alone_beside_one(
    beside: str, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An encoder that finds the documents for an answer ended the whole block."""
    inputs: dict[str, Any] = {"input_ids": IDS}
    if beside == "ResNet":
        config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3)
        other, inputs = tf.ResNetModel(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    else:
        other = MODELS[beside][0]().eval()
    model = tiny_model()
    with caplog.at_level(logging.INFO, "attnhook"), attnhook.capture() as records, torch.no_grad():
        for _ in range(3):
            if first:
                other(**inputs)
            generate(model)
            other(**inputs)
    assert len(records) == 15 and not records.dropped
    (line,) = [record for record in caplog.records if record.name == "attnhook"]  # noted, once
    assert line.levelno == logging.INFO and type(other).__name__ in line.getMessage()


@pytest.mark.parametrize("installed", [False, True])
def test_usual_runs_log_nothing(installed: bool, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = batch()
    ids, settings = ids % 90, {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    window = tf.MistralForCausalLM(tf.MistralConfig(**TEXT, sliding_window=5)).eval()
    runs = [
        (tiny_model(), {}), (tiny_model(), {"cache_implementation": "static"}), (window, {}), (many(qwen25_vl()), {}),
        (tiny_model(), {"prefill_chunk_size": 4}), (tiny_model(), {"do_sample": True, "num_return_sequences": 2}),
    ]  # fmt: skip
    with caplog.at_level(logging.DEBUG, "attnhook"):
        if installed:
            attnhook.install(sinks=["memory:"])
        try:
            for model, more in runs:
                with nullcontext() if installed else attnhook.capture(layers="all"):
                    model.generate(ids, **{**settings, **more})
        finally:
            attnhook.uninstall()
    assert not [record.getMessage() for record in caplog.records]


def test_a_refusal_is_logged_once_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["T5"][0]().eval()
    with caplog.at_level(logging.DEBUG, "attnhook"), attnhook.capture(on_error="drop"), torch.no_grad():
        for _ in range(3):
            model(IDS, decoder_input_ids=IDS)
    (line,) = caplog.records
    assert line.levelno == logging.WARNING and line.exc_info is None and "encoder-decoder" in line.getMessage()


def test_a_decoder_of_its_own_code_is_refused_beside_another() -> None:
    """Its rows would be missing without a word."""
    model, other = tiny_model(), MODELS["BLOOM without a head"][0]().eval()
    with pytest.raises(UnsupportedError, match="BloomModel"), attnhook.capture(), torch.no_grad():
        generate(model)
        other(IDS)


@pytest.mark.parametrize("pads", [[2, 0], [0, 0]])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_rows_of_a_model_with_a_bidirectional_prefix(cache: str, pads: list[int]) -> None:
    """PaliGemma was refused as an encoder; its generated rows are causal, its prompt's are not."""
    model = paligemma()
    first = [0, 0, *[295] * 4, *range(5, 15)] if any(pads) else [*[295] * 4, *range(5, 17)]
    ids = torch.tensor([first, [*[295] * 4, *range(20, 32)]])
    mask = (ids != 0).long()
    inputs = {
        "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8), "max_new_tokens": 3,
        "do_sample": False, "pad_token_id": 0, "token_type_ids": torch.zeros_like(ids),
    }  # fmt: skip
    with attnhook.capture(layers="all", top_k=5, spans=SPANS) as records:
        model.generate(**inputs, cache_implementation=cache)
    compare(records, model, inputs, pads, 3)
    with pytest.raises(UnsupportedError, match="bidirectional"), attnhook.capture(prompt=True):
        model.generate(**inputs)


@pytest.mark.parametrize("kind", ["not itself", "a later one"])
def test_a_mask_that_is_one_off_is_refused(kind: str) -> None:
    """Its rows are as consecutive as causal ones, so all positions were one off."""
    seen = torch.ones(20, 20, dtype=torch.bool).tril(-1 if kind == "not itself" else 1)
    seen[0, 0] = True
    inputs = {"input_ids": IDS, "attention_mask": seen[None, None], "use_cache": False}
    refused = pytest.raises(UnsupportedError, match=r"last key that a row sees is number .* and its own is|later ones")
    with refused, attnhook.capture(prompt=kind != "not itself"), torch.no_grad():
        tiny_model()(**inputs)


def test_a_prefix_without_any_mask_has_no_causal_prompt_rows() -> None:
    """Without a mask such a model attends in both directions, where others are causal."""
    ids = torch.tensor([[*[295] * 4, *range(5, 17)]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "max_new_tokens": 2, "do_sample": False}
    with attnhook.capture(top_k=5, spans=SPANS) as records:
        paligemma().generate(**inputs, pad_token_id=0)
    assert [record.query_position for record in records] == [15, 16]
    refused = pytest.raises(UnsupportedError, match=r"sees later tokens .bidirectional attention.")
    with refused, attnhook.capture(prompt=True):
        paligemma().generate(**inputs, pad_token_id=0)


def test_an_encoder_of_a_decoders_class_is_none() -> None:
    """Embedding models of Gemma's classes attend in both directions, and nothing is generated."""
    model = tf.Gemma3TextModel(tf.Gemma3TextConfig(**TEXT, head_dim=8, use_bidirectional_attention=True)).eval()
    with pytest.raises(UnsupportedError, match="an encoder or a vision tower"), attnhook.capture(), torch.no_grad():
        model(IDS)


def test_sparse_attention_that_sees_all_keys_is_captured() -> None:
    model = tf.DeepseekV32ForCausalLM._from_config(tf.DeepseekV32Config(**MLA, index_topk=20)).eval()
    with attnhook.capture(layers="all", prompt=True, top_k=4) as records, torch.no_grad():
        model(IDS)
    assert len(records) == 20
    oracle.check(oracle.compare(records, oracle.eager_attention(model, IDS), top_k=4))


def test_layers_without_compressed_keys_are_captured() -> None:
    torch.manual_seed(0)
    model = deepseek_v4()
    model.set_attn_implementation("eager")
    with attnhook.capture(layers=[0], prompt=True, top_k=4) as records, torch.no_grad():
        model(IDS)
    assert len(records) == 20
    attention = {0: oracle.eager_attention(model, IDS)[0][:, :, :20]}
    oracle.check(oracle.compare(records, attention, top_k=4, windows={0: 8}, sinks=True))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_continuous_batching_is_refused_where_it_is_called(strict: bool) -> None:
    """In the thread of its passes a refusal ended up in a log, and the caller got nothing."""
    model = tiny_model()
    small = tf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)
    settings = tf.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    call: dict[str, Any] = {"inputs": [[3, 4, 5]], "generation_config": settings, "continuous_batching_config": small}
    if strict:
        with pytest.raises(UnsupportedError, match=r"continuous batching \(generate_batch"), attnhook.capture():
            model.generate_batch(**call)
        return
    plain = [result.generated_tokens for result in model.generate_batch(**call).values()]
    with attnhook.capture(on_error="drop") as records:
        output = [result.generated_tokens for result in model.generate_batch(**call).values()]
    assert output == plain and not records and records.dropped["unsupported"] >= 1
