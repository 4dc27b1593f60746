"""Padding, whatever tells of it: positions and spans count the text's own tokens, or the pass is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import attnhook
from attnhook import UnsupportedError
from tests import oracle
from tests.helpers import tiny_model

PADS, LENGTH, NEW = [0, 3, 8], 15, 3
SPANS = {"head": (0, 4), "next": (4, 7)}
TEXT = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOKENS = {"image_token_id": 295, "video_token_id": 296, "vision_start_token_id": 297, "vision_end_token_id": 298}


def qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1}
    return tf.Qwen2VLConfig(text_config=MROPE, vision_config=vision, **TOKENS)


def qwen25_vl() -> Any:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return tf.Qwen2_5_VLConfig(text_config=MROPE, vision_config=vision, **TOKENS)


def qwen3_vl() -> Any:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return tf.Qwen3VLConfig(text_config={**MROPE, "head_dim": 8}, vision_config=vision, **TOKENS)


def glm4v() -> Any:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
        "image_size": 16,
    }  # fmt: skip
    names = {"image_start_token_id": 297, "image_end_token_id": 298, "image_token_id": 295, "video_token_id": 296}
    return tf.Glm4vConfig(text_config={**MROPE, "partial_rotary_factor": 1.0}, vision_config=vision, **names)


def gemma3() -> Any:
    text = {**TEXT, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    return tf.Gemma3Config(text_config=text, vision_config=vision, image_token_index=295, mm_tokens_per_image=4)


def many(config: Any) -> Any:
    """A model with some contrast in its attention."""
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name or "qkv" in name:
            parameter.data *= 9
    model.generation_config.eos_token_id = None
    return model


def batch(pads: list[int] = PADS, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.stack([(torch.arange(length) >= pad).long() for pad in pads])
    ids = torch.randint(3, 290, (len(pads), length), generator=torch.Generator().manual_seed(1))
    return ids * mask, mask


def compare(records: Any, model: Any, inputs: dict[str, Any], pads: list[int], new: int) -> None:
    """Every generated row against the matrices that eager attention gives while it generates."""
    with oracle.eager(model):
        eager = model.generate(**inputs, output_attentions=True, return_dict_in_generate=True)
    assert len(records) == len(pads) * new
    for record in records:
        b, step = int(record.request_id.rpartition("-")[2]), record.decode_step
        row = eager.attentions[step]
        length = row[-1].shape[-1]
        assert record.query_position == length - 1 - pads[b]
        for n, layer in enumerate(record.layers):
            found = row[layer][b, :, -1].mean(0)
            full = torch.zeros(length)
            full[length - len(found) :] = found  # a sliding cache holds the last keys alone
            full = full[pads[b] :]
            kept = record.token_positions[n] >= 0
            best = full.topk(min(len(kept), int(kept.sum()))).values
            assert torch.allclose(torch.from_numpy(record.attention_scores[n][kept]), best, atol=2e-5)
            assert torch.allclose(full[record.token_positions[n][kept]], best, atol=2e-5)
            for k, (start, end) in enumerate(SPANS.values()):
                assert float(record.span_mass[n, k]) == pytest.approx(float(full[start:end].sum()), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [qwen2_vl, qwen25_vl, qwen3_vl, glm4v, gemma3])
def test_models_of_images_and_text_with_padding(make: Callable[[], Any], cache: str) -> None:
    """Three-dimensional positions tell no padding, and a static cache's mask is ready-made: all was shifted."""
    model = many(make())
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if make is gemma3:
        if cache == "static" and tf.__version__.startswith("5.16."):
            pytest.skip("5.16's own Gemma 3 fails with token types and a static cache")
        inputs["token_type_ids"] = torch.zeros_like(ids)
    with attnhook.capture(model=model, layers="all", top_k=3, spans=SPANS) as records:
        model.generate(**inputs, cache_implementation=cache)
    compare(records, model, inputs, PADS, NEW)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_image_between_padding_and_text(cache: str) -> None:
    """Four patches of an image take one place in time, so its positions fall behind its tokens."""
    model = many(qwen25_vl())
    ids, mask = batch([2], 14)
    ids[0, 4:10] = torch.tensor([297, 295, 295, 295, 295, 298])
    pixels = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    types = (ids == 295).long()
    inputs = {
        "input_ids": ids, "attention_mask": mask, **pixels, "mm_token_type_ids": types, "max_new_tokens": NEW,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    with attnhook.capture(layers="all", top_k=3, spans=SPANS) as records:
        model.generate(**inputs, cache_implementation=cache)
    compare(records, model, inputs, [2], NEW)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [4, 5, 20])
def test_a_prompt_in_chunks_some_of_which_are_padding(chunk: int, cache: str) -> None:
    """A chunk of padding was refused with "zeros between ones"."""
    model = tiny_model()
    ids, mask = batch()
    ids = ids % 90
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    with attnhook.capture(layers="all", top_k=3, spans=SPANS) as records:
        model.generate(**inputs, prefill_chunk_size=chunk, cache_implementation=cache)
    compare(records, model, inputs, PADS, NEW)


def test_a_sequence_that_is_padding_alone() -> None:
    """It has no rows; a generation that goes on from it has no row for its first token."""
    model = tiny_model()
    ids, mask = batch([0, LENGTH])
    ids = ids % 90
    with attnhook.capture(layers="all", prompt=True) as records, torch.no_grad():
        model(ids, attention_mask=mask)
    assert [record.query_position for record in records] == list(range(LENGTH))
    assert {record.request_id[-2:] for record in records} == {"-0"}
    for more in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        refused = pytest.raises(UnsupportedError, match="sequence 1 of the batch is padding alone")
        with refused, attnhook.capture():
            model.generate(ids, attention_mask=mask, max_new_tokens=2, **more)


def test_zeros_between_ones_are_told_with_their_place() -> None:
    model = tiny_model()
    ids, mask = batch([0, 4])
    mask[1, 9] = 0
    refused = pytest.raises(UnsupportedError, match=r"of sequence 1 has zeros between ones \(the first is column 9\)")
    with refused, attnhook.capture(), torch.no_grad():
        model(ids % 90, attention_mask=mask)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_padding_on_the_right_of_a_prompt_is_refused_for_what_it_does(more: dict[str, Any], new: int) -> None:
    model = tiny_model()
    ids, mask = batch([0, 0])
    mask[1, 9:] = 0
    said = r"of sequence 1 has zeros behind ones \(the first is column 9\).*padding_side='left'"
    with pytest.raises(UnsupportedError, match=said), attnhook.capture():
        model.generate(ids % 90, attention_mask=mask, max_new_tokens=new, **more)


def ready_made(mask: torch.Tensor, kind: str) -> torch.Tensor:
    """The 4-D mask of a padded batch: causal, no row sees padding."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None] & mask.bool()[:, None]
    if kind == "padding sees all":  # as Transformers makes it for sdpa
        seen |= ~seen.any(-1, keepdim=True)
    seen = seen[:, None]
    return seen if kind != "additive" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("positions", ["given", "not given"])
@pytest.mark.parametrize("kind", ["bool", "additive", "padding sees all"])
def test_a_ready_made_mask_tells_the_padding_itself(kind: str, positions: str) -> None:
    """Without position_ids it was read as a mask without padding: positions and spans were shifted."""
    model = tiny_model()
    ids, mask = batch()
    ids = ids % 90
    more = {} if positions == "not given" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    inputs = {"attention_mask": ready_made(mask, kind), **more, "use_cache": False}
    with attnhook.capture(layers="all", prompt=True, top_k=3, spans=SPANS) as records, torch.no_grad():
        model(ids, **inputs)
    inputs["attention_mask"] = ready_made(mask, "additive")  # eager attention takes no other
    with oracle.eager(model), torch.no_grad():
        attentions = model(ids, **inputs, output_attentions=True).attentions
    for b, pad in enumerate(PADS):
        mine = [record for record in records if record.request_id.endswith(f"-{b}")]
        assert [record.query_position for record in mine] == list(range(LENGTH - pad))
        for record in mine:
            row = attentions[1][b, :, pad + record.query_position, pad:].mean(0)
            assert float(record.span_mass[1, 0]) == pytest.approx(float(row[:4].sum()), abs=2e-5)


def test_packed_sequences_under_a_ready_made_mask_lose_no_row() -> None:
    """The positions of the last one were taken for those of the batch, and the rows before it left out."""
    model = tiny_model()
    ids, _ = batch([0], 10)
    document = torch.tensor([0] * 4 + [1] * 6)
    seen = torch.ones(10, 10, dtype=torch.bool).tril() & (document[:, None] == document)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    inputs = {"attention_mask": seen[None, None], "position_ids": places, "use_cache": False}
    with attnhook.capture(layers="all", prompt=True) as records, torch.no_grad():
        model(ids % 90, **inputs)
    assert [record.query_position for record in records] == list(range(10))
    assert [int((record.token_positions[0] >= 0).sum()) for record in records] == (places[0] + 1).tolist()


def test_a_loop_of_ones_own_with_a_ready_made_mask() -> None:
    """The first pass says where the padding ends; without it, and without positions, nothing does."""
    model = tiny_model()
    ids, mask = batch([3], LENGTH + 2)
    ids = ids % 90
    full = ready_made(mask, "bool")
    cache = tf.DynamicCache(config=model.config)
    with attnhook.capture(layers="all", spans=SPANS) as records, torch.no_grad():
        model(ids[:, :LENGTH], attention_mask=full[:, :, :LENGTH, :LENGTH], past_key_values=cache)
        for n in (LENGTH, LENGTH + 1):
            one = full[:, :, n : n + 1, : n + 1]
            model(ids[:, n : n + 1], attention_mask=one, past_key_values=cache)
    assert [(record.query_position, record.decode_step) for record in records] == [(11, 0), (12, 1), (13, 2)]
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :LENGTH], attention_mask=full[:, :, :LENGTH, :LENGTH], past_key_values=cache)
    one = full[:, :, LENGTH : LENGTH + 1, : LENGTH + 1]
    refused = pytest.raises(UnsupportedError, match="nothing tells where a prompt's padding ends")
    with refused, attnhook.capture(), torch.no_grad():
        model(ids[:, LENGTH : LENGTH + 1], attention_mask=one, past_key_values=cache)
