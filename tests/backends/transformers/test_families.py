"""The Transformers backend on tiny random models of other families, against eager attention."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import attnhook
from attnhook import OptionError, UnsupportedError
from tests import oracle

NEW = 5
TINY = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 12


def build(config: Any, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for module in model.modules():  # larger weights than at initialisation: attention with some contrast
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D) and module.weight.shape[0] < 290:
            module.weight.data.mul_(9)
    return model.eval()


def gemma(kind: str, **extra: Any) -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    settings = {**TINY, "head_dim": 16, "sliding_window": WINDOW, "layer_types": layers, **extra}
    return getattr(transformers, kind)(**settings)


# 5.24 refuses it (the class that says so would bring Triton in, which tests/kernels must import first)
GEMMA_2_TAKES_SDPA = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)

FAMILIES: dict[str, tuple[Callable[[], Any], str, dict[int, int]]] = {
    # name: config, attention implementation, window by layer
    "llama": (lambda: transformers.LlamaConfig(**TINY), "sdpa", {}),
    "llama-mqa": (lambda: transformers.LlamaConfig(**{**TINY, "num_key_value_heads": 1}), "sdpa", {}),
    "qwen3": (lambda: transformers.Qwen3Config(**TINY, head_dim=16), "sdpa", {}),
    "gpt2-mha": (
        lambda: transformers.GPT2Config(
            vocab_size=300, n_embd=48, n_layer=4, n_head=6, n_positions=512, bos_token_id=1, eos_token_id=None
        ),
        "sdpa",
        {},
    ),
    "mistral-window": (
        lambda: transformers.MistralConfig(**TINY, sliding_window=WINDOW), "sdpa", dict.fromkeys(range(4), WINDOW)
    ),
    # sdpa ignores Gemma 2's soft-cap, so only eager attention computes what the oracle does
    "gemma2-cap-window": (
        lambda: gemma("Gemma2Config", attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
        "eager",
        {0: WINDOW, 2: WINDOW},
    ),
    "gemma2-window": (
        lambda: gemma("Gemma2Config", attn_logit_softcapping=None, query_pre_attn_scalar=16),
        "sdpa" if GEMMA_2_TAKES_SDPA else "eager",
        {0: WINDOW, 2: WINDOW},
    ),
    "gemma3-window": (lambda: gemma("Gemma3TextConfig", query_pre_attn_scalar=16), "sdpa", {0: WINDOW, 2: WINDOW}),
    # Transformers 5.19 reads this cap and hands it to no attention function: eager and sdpa agree without it
    "gemma3-cap-window": (
        lambda: gemma("Gemma3TextConfig", attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
        "sdpa",
        {0: WINDOW, 2: WINDOW},
    ),
    "gpt-oss-sinks": (
        lambda: gemma("GptOssConfig", num_local_experts=4, num_experts_per_tok=2), "eager", {0: WINDOW, 2: WINDOW}
    ),
    "deepseek-mla": (
        lambda: transformers.DeepseekV3Config(
            **{**TINY, "num_key_value_heads": 6}, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, v_head_dim=12,
            qk_nope_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=4,
        ),
        "sdpa",
        {},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str, cache: str) -> None:
    make, implementation, windows = FAMILIES[family]
    model = build(make(), implementation)
    ids = torch.randint(2, 290, (3, 30), generator=torch.Generator().manual_seed(1))
    pads = [0, 11, 29]
    mask = torch.stack([(torch.arange(30) >= pad).long() for pad in pads])
    ids = ids * mask
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask, "cache_implementation": cache}
    plain = model.generate(ids, **options)
    with attnhook.capture(top_k=6, layers="all", prompt=True) as records:
        output = model.generate(ids, **options)
    assert torch.equal(plain, output)

    full = torch.cat([mask, torch.ones(3, NEW - 1, dtype=torch.long)], dim=1)
    attention = oracle.eager_attention(model, output[:, :-1], full)
    assert len(records) == sum(30 - pad for pad in pads) + 3 * (NEW - 1)
    for b, pad in enumerate(pads):
        mine = [r for r in records if r.request_id.endswith(f"-{b}")]
        assert [r.query_position for r in mine] == list(range(30 - pad + NEW - 1))
        worst = oracle.compare(mine, attention, sequence=b, pad=pad, top_k=6, windows=windows, sinks="sinks" in family)
        oracle.check(worst)
    contrast = max(float(r.attention_scores[0, 0]) for r in records if r.query_position > 20)
    assert contrast > 0.1, "attention is nearly uniform, so this test shows little"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles flex attention for the CPU with g++")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_flex_attention_equals_eager(family: str) -> None:
    """flex gives its mask as a function, and it honours Gemma 2's soft-cap and window."""
    if family == "llama":
        model = build(transformers.LlamaConfig(**{**TINY, "num_attention_heads": 4}, head_dim=16), "flex_attention")
        windows = {}
    else:
        config = gemma("Gemma2Config", attn_logit_softcapping=2.0, query_pre_attn_scalar=16, num_attention_heads=4)
        model, windows = build(config, "flex_attention"), {0: WINDOW, 2: WINDOW}
    ids = torch.randint(2, 290, (1, 40), generator=torch.Generator().manual_seed(1))
    with attnhook.capture(top_k=6, layers="all", prompt=True) as records, torch.no_grad():
        model(ids)
    assert len(records) == 40
    oracle.check(oracle.compare(records, oracle.eager_attention(model, ids), top_k=6, windows=windows))


@pytest.mark.skipif(not GEMMA_2_TAKES_SDPA, reason="this Transformers refuses sdpa for Gemma 2")
def test_sdpa_without_the_cap_is_what_is_reported() -> None:
    """Transformers' sdpa ignores Gemma 2's soft-cap: what the engine computes is what we report."""
    model = build(gemma("Gemma2Config", attn_logit_softcapping=2.0, query_pre_attn_scalar=16), "sdpa")
    uncapped = build(gemma("Gemma2Config", attn_logit_softcapping=None, query_pre_attn_scalar=16), "eager")
    uncapped.load_state_dict(model.state_dict())
    ids = torch.arange(2, 32)[None]
    with attnhook.capture(top_k=6, layers="all", prompt=True) as records, torch.no_grad():
        model(ids)
    windows = {0: WINDOW, 2: WINDOW}
    oracle.check(oracle.compare(records, oracle.eager_attention(uncapped, ids), top_k=6, windows=windows))
    capped = oracle.compare(records, oracle.eager_attention(model, ids), top_k=6, windows=windows)
    assert capped.probability > 1e-3, "the cap makes no difference, so this test shows nothing"


def test_bfloat16_keys() -> None:
    model = build(transformers.LlamaConfig(**TINY)).to(torch.bfloat16)
    ids = torch.arange(2, 42)[None]
    with attnhook.capture(top_k=6, layers="all", prompt=True) as records, torch.no_grad():
        model(ids)
    worst = oracle.compare(records, oracle.eager_attention(model, ids), top_k=6)
    # eager rounds probabilities to bfloat16 (2**-8) and its activations differ from sdpa's by as much
    assert 0 < worst.probability < 0.05


def refused(model: Any, match: str, **inputs: Any) -> None:
    """The model is refused by name in strict mode; in drop mode it runs on and the rows are counted."""
    with torch.no_grad():
        expected = model(**inputs)
        with pytest.raises(UnsupportedError, match=match), attnhook.capture(layers="all", prompt=True):
            model(**inputs)
        with attnhook.capture(layers="all", prompt=True, on_error="drop") as records:
            got = model(**inputs)
    assert torch.equal(expected[0], got[0])
    assert not records and records.dropped["unsupported"] >= 1


def test_models_that_cannot_be_captured_are_refused_by_name() -> None:
    ids = torch.arange(2, 12)[None]
    bloom = transformers.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=6)
    refused(transformers.AutoModelForCausalLM.from_config(bloom).eval(), "BloomForCausalLM", input_ids=ids)
    t5 = transformers.T5Config(vocab_size=300, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6)
    model = transformers.T5ForConditionalGeneration(t5).eval()
    refused(model, "encoder-decoder", input_ids=ids, decoder_input_ids=ids)
    bert = transformers.BertConfig(vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=6)
    refused(transformers.BertModel(bert).eval(), "BertModel", input_ids=ids)


def test_inputs_that_cannot_be_captured_are_refused_by_name() -> None:
    model = build(transformers.LlamaConfig(**TINY))
    ids = torch.arange(2, 12)[None]
    holes = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1, 1]])
    refused(model, "zeros between ones", input_ids=ids, attention_mask=holes)
    both_ways = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    refused(model, "bidirectional", input_ids=ids, attention_mask=both_ways)


def test_packed_sequences_see_only_their_own_keys() -> None:
    model = build(transformers.LlamaConfig(**TINY))
    ids = torch.arange(2, 12)[None]
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]), "use_cache": False}
    with attnhook.capture(layers="all", prompt=True) as records, torch.no_grad():
        model(ids, **packed)
    with oracle.eager(model), torch.no_grad():
        attentions = model(ids, **packed, output_attentions=True).attentions
    assert len(records) == 10
    for record in records:
        for i, layer in enumerate(record.layers):
            row = attentions[layer][0, :, record.query_position].mean(0)
            kept = record.token_positions[i] >= 0
            assert kept.sum() == (row > 0).sum() == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6][record.query_position]
            expected = row[record.token_positions[i][kept]].numpy()
            assert abs(expected - record.attention_scores[i][kept]).max() <= oracle.PROBABILITY


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_decoding_modes_that_cannot_be_captured_are_refused(options: dict[str, Any]) -> None:
    model = build(transformers.LlamaConfig(**TINY))
    ids = torch.arange(2, 32).repeat(1, 2)
    run = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    plain = model.generate(ids, **run)
    with pytest.raises(UnsupportedError, match=r"beam search|speculative"), attnhook.capture():
        model.generate(ids, **run)
    with attnhook.capture(on_error="drop") as records:
        output = model.generate(ids, **run)
    assert torch.equal(plain, output) and not records and records.dropped["unsupported"] > 0


def test_an_attention_function_with_its_own_formula_is_refused() -> None:
    """The rebuilt-output check catches what no list of model names could."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def halved(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, mask, **{**kwargs, "scaling": kwargs["scaling"] / 2})

    registry = transformers.AttentionInterface
    original = registry._global_mapping["sdpa"]
    registry.register("sdpa", halved)
    try:
        refused(build(transformers.LlamaConfig(**TINY)), "differs from softmax", input_ids=torch.arange(2, 32)[None])
    finally:
        registry.register("sdpa", original)


def test_an_unknown_attention_function_is_refused() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register("my_attention", sdpa_attention_forward)
    model = build(transformers.LlamaConfig(**TINY))
    model.config._attn_implementation = "my_attention"
    refused(model, "my_attention", input_ids=torch.arange(2, 32)[None])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k=0 must be a whole number from 1 to 256"),
        ({"top_k": 257}, "from 1 to 256"),
        ({"layers": [4]}, "layer 4 does not exist: the model's attention layers are 0..3"),
        ({"layers": [-5]}, "layer -5 does not exist"),
        ({"heads": [6]}, "head 6 does not exist: the model's query heads are 0..5"),
        ({"heads": [-1]}, "from 0 up"),
        ({"topk": 3}, "did you mean 'top_k'"),
        ({"mode": "matrix"}, "raw, sketch, fingerprint"),
        ({"on_error": "ignore"}, "'raise' or 'drop'"),
    ],
)
def test_bad_options_say_what_is_allowed(options: dict[str, Any], words: str) -> None:
    model = build(transformers.LlamaConfig(**TINY))
    with pytest.raises(OptionError, match=words), attnhook.capture(**options):
        model.generate(torch.arange(2, 12)[None], max_new_tokens=2)
