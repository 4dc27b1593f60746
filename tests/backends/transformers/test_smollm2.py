"""The Transformers backend against eager attention, on the real SmolLM2-135M-Instruct weights."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import attnhook
from tests import oracle
from tests.helpers import tiny_model

pytestmark = pytest.mark.model
NEW = 6


def prompt_of(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :length]
    assert ids.shape[1] == length
    return ids


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=kwargs.pop("attention_mask", torch.ones_like(ids)), **kwargs)


def test_oracle_is_output_attentions(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 37)
    with oracle.eager(smol), torch.no_grad():
        attentions = smol(ids, output_attentions=True).attentions
    ours = oracle.eager_attention(smol, ids)
    assert sorted(ours) == list(range(30))
    for layer, weights in enumerate(attentions):
        assert torch.equal(ours[layer], weights.mean(1, dtype=torch.float64).float())


@pytest.mark.parametrize("length", [1, 2, 37, 700, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_every_layer_and_head_selection_equals_eager(smol: Any, tokenizer: Any, long_text: str, length: int) -> None:
    ids = prompt_of(tokenizer, long_text, length)
    plain = generate(smol, ids)
    common: dict[str, Any] = {"top_k": 8, "layers": "all", "prompt": True, "spans": oracle.SPANS}
    selections: list[oracle.Heads] = [None, (4,), (0, 5, 8)]
    # three listeners at once: each gets its own records of the same forward passes
    with ExitStack() as stack:
        captured = [stack.enter_context(attnhook.capture(heads=heads, **common)) for heads in selections]
        output = generate(smol, ids)

    assert torch.equal(output, plain), "capture changed the generated text"
    attention = oracle.eager_attention_of(smol, output[:, :-1], selections=selections)
    for heads, records in zip(selections, captured, strict=True):
        assert not records.dropped
        assert [r.query_position for r in records] == list(range(length - 1 + NEW))
        assert [r.decode_step for r in records.generated] == list(range(NEW))
        assert [r.query_position for r in records.prompt] == list(range(length - 1))
        assert len({r.request_id for r in records}) == 1
        worst = oracle.compare(records, attention[heads], top_k=8)
        print(f"prompt {length}, heads {heads}: {worst}")
        assert worst.rows == 30 * (length - 1 + NEW)
        oracle.check(worst)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_implementations_and_caches(
    smol: Any, tokenizer: Any, long_text: str, implementation: str, cache: str | None
) -> None:
    ids = prompt_of(tokenizer, long_text, 50)
    smol.set_attn_implementation(implementation)
    try:
        with attnhook.capture(top_k=8, layers=[0, 14, -1], prompt=True) as records:
            output = generate(smol, ids, **({} if cache is None else {"cache_implementation": cache}))
    finally:
        smol.set_attn_implementation("sdpa")
    assert records[0].layers == (0, 14, 29)
    assert len(records) == 49 + NEW
    oracle.check(oracle.compare(records, oracle.eager_attention(smol, output[:, :-1]), top_k=8))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 16}])
def test_other_ways_through_generate(smol: Any, tokenizer: Any, long_text: str, options: dict[str, Any]) -> None:
    ids = prompt_of(tokenizer, long_text, 50)
    with attnhook.capture(top_k=8, layers="auto", prompt=True) as records:
        output = generate(smol, ids, **options)
    assert [r.query_position for r in records] == list(range(49 + NEW))
    assert [r.decode_step for r in records] == [None] * 49 + list(range(NEW))
    oracle.check(oracle.compare(records, oracle.eager_attention(smol, output[:, :-1]), top_k=8))


def test_batch_of_four_with_left_padding(smol: Any, tokenizer: Any, long_text: str) -> None:
    lengths = [5, 90, 33, 1]
    pads = [max(lengths) - length for length in lengths]
    singles = [prompt_of(tokenizer, long_text[i * 200 :], length) for i, length in enumerate(lengths)]
    ids = torch.cat([torch.nn.functional.pad(s, (pad, 0), value=2) for s, pad in zip(singles, pads, strict=True)])
    mask = torch.cat([(torch.arange(90) >= pad).long()[None] for pad in pads])
    plain = generate(smol, ids, attention_mask=mask)
    with attnhook.capture(top_k=8, layers="all", prompt=True, spans=oracle.SPANS) as records:
        output = generate(smol, ids, attention_mask=mask)
    assert torch.equal(output, plain)

    full = torch.cat([mask, torch.ones(4, NEW - 1, dtype=torch.long)], dim=1)
    attention = oracle.eager_attention(smol, output[:, :-1], full)
    ids_seen = []
    for b, (length, pad) in enumerate(zip(lengths, pads, strict=True)):
        mine = [r for r in records if r.request_id.endswith(f"-{b}")]
        ids_seen += mine
        assert [r.query_position for r in mine] == list(range(length - 1 + NEW))
        assert [r.decode_step for r in mine] == [None] * (length - 1) + list(range(NEW))
        worst = oracle.compare(mine, attention, sequence=b, pad=pad, top_k=8)
        oracle.check(worst)
    assert len(ids_seen) == len(records)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_plain_forward(smol: Any, tokenizer: Any, long_text: str, padding: str) -> None:
    length, total = (40, 60) if padding != "none" else (60, 60)
    ids = torch.full((2, total), 2)
    mask = torch.ones(2, total, dtype=torch.long)
    short = prompt_of(tokenizer, long_text, length)
    pad = total - length if padding == "left" else 0
    ids[0, pad : pad + length] = short
    mask[0] = 0
    mask[0, pad : pad + length] = 1
    ids[1] = prompt_of(tokenizer, long_text[300:], total)
    with attnhook.capture(top_k=8, layers="all", prompt=True) as records, torch.no_grad():
        smol(ids, attention_mask=None if padding == "none" else mask)
    attention = oracle.eager_attention(smol, ids, mask)
    for b, (start, count) in enumerate([(pad, length), (0, total)]):
        mine = [r for r in records if r.request_id.endswith(f"-{b}")]
        assert [r.decode_step for r in mine] == [None] * (count - 1) + [0]
        oracle.check(oracle.compare(mine, attention, sequence=b, pad=start, top_k=8))


def test_hand_written_decoding_loop(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 30)
    tokens, cache = ids, None
    with attnhook.capture(top_k=4, layers="all") as records, torch.no_grad():
        for _ in range(4):
            out = smol(tokens if cache is None else tokens[:, -1:], past_key_values=cache)
            cache = out.past_key_values
            tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
    assert [r.decode_step for r in records] == [0, 1, 2, 3]
    assert [r.query_position for r in records] == [29, 30, 31, 32]
    assert len({r.request_id for r in records}) == 1
    oracle.check(oracle.compare(records, oracle.eager_attention(smol, tokens[:, :-1]), top_k=4))


def test_sampled_sequences_are_choices(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 20)
    torch.manual_seed(0)
    with attnhook.capture(top_k=4, layers="all") as records:
        output = generate(smol, ids, do_sample=True, num_return_sequences=3, temperature=1.5)
    assert not torch.equal(output[0], output[1])
    assert {r.choice for r in records} == {0, 1, 2} and len({r.request_id for r in records}) == 1
    attention = oracle.eager_attention(smol, output[:, :-1])
    for choice in range(3):
        mine = [r for r in records if r.choice == choice]
        assert [r.decode_step for r in mine] == list(range(NEW))
        oracle.check(oracle.compare(mine, attention, sequence=choice, top_k=4))


def test_nothing_is_recorded_behind_the_end_of_a_sequence(smol: Any, tokenizer: Any) -> None:
    prompts = ["What is 2 + 2? Answer with one number.", "Tell a long story about a fox and a river."]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    inputs = tokenizer(chats, return_tensors="pt", padding=True)
    with attnhook.capture(top_k=4) as records:
        output = smol.generate(**inputs, max_new_tokens=40, do_sample=False)
    width = inputs["input_ids"].shape[1]
    lengths = []
    for b in range(2):
        answer = output[b, width:].tolist()
        end = answer.index(2) + 1 if 2 in answer else len(answer)
        lengths.append(end)
        steps = [r.decode_step for r in records if r.request_id.endswith(f"-{b}")]
        assert steps == list(range(end))
    assert lengths[0] != lengths[1], "both answers are of one length, so this test shows nothing"


def test_stride_limit_prefix_and_modes(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 20)
    with attnhook.capture(top_k=4, stride=2, max_tokens=2, mask_prefix=10) as records:
        output = generate(smol, ids)
    assert [r.decode_step for r in records] == [0, 2]
    assert records.dropped == {"max_tokens": 1}
    row = oracle.eager_attention(smol, output[:, :-1])[29][0, 19, :20]
    assert records[0].top()[0][0] == 10 + int(row[10:].argmax())
    assert min(p for r in records for p, _ in r.top()) >= 10
    with attnhook.capture(mode="fingerprint") as records:
        generate(smol, ids)
    assert records[0].token_positions.shape == (1, 0)
    assert records[0].to_dict().keys() >= {"fingerprint", "manifold"}


def test_capture_in_another_thread_and_of_one_model(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 10)
    with attnhook.capture(top_k=4) as records:
        thread = threading.Thread(target=generate, args=(smol, ids))
        thread.start()
        thread.join()
    assert len(records) == NEW
    with attnhook.capture(top_k=4, model=tiny_model()) as nothing, attnhook.capture(top_k=4, model=smol) as mine:
        generate(smol, ids)
    assert (len(nothing), len(mine)) == (0, NEW)


def test_capture_leaves_no_trace(smol: Any, tokenizer: Any, long_text: str) -> None:
    from transformers.generation.stopping_criteria import StoppingCriteriaList
    from transformers.generation.utils import GenerationMixin
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    owners = (AttentionInterface, PreTrainedModel, GenerationMixin, StoppingCriteriaList)
    before = [dict(vars(owner)) for owner in owners]
    for _ in range(2):
        with attnhook.capture(), attnhook.capture():
            assert [dict(vars(owner)) for owner in owners] != before
        assert [dict(vars(owner)) for owner in owners] == before


def test_nan_rows_are_dropped_and_counted(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 12)
    embeddings = smol.get_input_embeddings()(ids).detach().clone()
    embeddings[0, 7] = float("nan")  # in layer 0 every later row attends to it
    with attnhook.capture(prompt=True, layers=[0]) as records, torch.no_grad():
        smol(inputs_embeds=embeddings)
    assert [r.query_position for r in records] == list(range(7))
    assert records.dropped == {"nan": 5}
    # sdpa spreads the NaN over earlier rows (0 * NaN), so from layer 1 on no row is sound
    with attnhook.capture(prompt=True, layers="all") as records, torch.no_grad():
        smol(inputs_embeds=embeddings)
    assert not records and records.dropped == {"nan": 12}


def test_torch_compile_keeps_working(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = prompt_of(tokenizer, long_text, 16)
    compiled = torch.compile(smol, backend="eager")
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        with attnhook.capture(layers="all", prompt=True) as records:
            during = compiled(ids, use_cache=False).logits
        after = compiled(ids, use_cache=False).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    oracle.check(oracle.compare(records, oracle.eager_attention(smol, ids), top_k=32))
