"""PEFT's prefix and prompt tuning: positions are those of the text, whatever virtual tokens come before it."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import attnhook
from attnhook import UnsupportedError
from attnhook.record.fingerprint import HISTOGRAM
from tests import oracle
from tests.helpers import tiny_model

# run by test_transformers_peft, in a process that has peft: it brings Triton in, which tests/kernels must import first
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="pip install --no-deps peft: it is in none of attnhook's extras"
)

VIRTUAL, PROMPT, NEW = 6, 10, 4
IDS = torch.arange(3, 3 + PROMPT)[None]
SETTINGS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WANTED = [(PROMPT - 1 + step, step) for step in range(NEW)]
KINDS = {"prefix": "PrefixTuningConfig", "prompt": "PromptTuningConfig", "p-tuning": "PromptEncoderConfig"}


def tuned(kind: str) -> Any:
    import peft

    base = tiny_model()
    torch.manual_seed(0)
    config = getattr(peft, KINDS[kind])(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_()
    return model


def places(records: Any) -> list[tuple[int, int | None]]:
    return [(record.query_position, record.decode_step) for record in records]


def eager_rows(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Head-averaged eager attention [q, virtual + text keys] by layer, of one pass through the PeftModel."""
    with oracle.eager(model.base_model), torch.no_grad():
        attentions = model(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
    return [attention[0].mean(0)[-ids.shape[1] :] for attention in attentions]


def compare(records: Any, rows: list[torch.Tensor]) -> None:
    assert records
    for record in records:
        p = record.query_position
        for n, layer in enumerate(record.layers):
            whole = rows[layer][p, : VIRTUAL + p + 1]
            text = whole[VIRTUAL:]
            best = text.topk(min(8, p + 1))
            kept = record.token_positions[n] >= 0
            assert kept.sum() == len(best.indices)
            assert np.abs(record.attention_scores[n][kept] - best.values.numpy()).max() <= 2e-5
            assert (
                np.abs(record.attention_scores[n][kept] - text[record.token_positions[n][kept]].numpy()).max() <= 2e-5
            )
            assert float(record.span_mass[n, 0]) == pytest.approx(float(text[:4].sum()), abs=2e-5)
            # the whole row, virtual tokens too
            assert float(record.fingerprints[n][HISTOGRAM].sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("kind", "more"), [*((kind, {}) for kind in KINDS), ("prompt", {"use_cache": False})])
def test_positions_are_those_of_the_text(kind: str, more: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = tuned(kind)
    with caplog.at_level(logging.WARNING, "attnhook"):
        for _ in range(2):
            with attnhook.capture(layers="all", top_k=8, prompt=True, spans={"head": (0, 4)}) as records:
                output = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **SETTINGS, **more)
    assert places(records.generated) == WANTED
    assert [record.query_position for record in records.prompt] == list(range(PROMPT - 1))
    compare(records, eager_rows(model, output[:, :-1]))
    (line,) = [record.getMessage() for record in caplog.records]  # once
    assert f"{VIRTUAL} virtual tokens" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own(kind: str) -> None:
    model = tuned(kind)
    with attnhook.capture(layers="all", top_k=8, prompt=True, spans={"head": (0, 4)}) as records, torch.no_grad():
        model(IDS, attention_mask=torch.ones_like(IDS))
        model(IDS)
    assert [record.query_position for record in records] == [*range(PROMPT), *range(PROMPT)]
    compare(records, eager_rows(model, IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_begins_with_them_says_so(kind: str) -> None:
    """A second turn puts none in: they are in the cache."""
    model = tuned(kind)
    cache = tf.DynamicCache(config=model.base_model.config)
    with attnhook.capture(layers="all", top_k=8, spans={"head": (0, 4)}) as records:
        first = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, return_dict_in_generate=True,
            **SETTINGS,
        )  # fmt: skip
        ids = torch.cat([first.sequences, torch.tensor([[50]])], 1)
        with torch.no_grad():
            model.base_model(ids[:, -2:], past_key_values=first.past_key_values)
    assert places(records) == [*WANTED, (PROMPT + NEW, 0)]


def test_padding_behind_them_is_refused_by_name() -> None:
    model = tuned("prompt")
    ids, mask = IDS.repeat(2, 1), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :3] = 0
    refused = pytest.raises(UnsupportedError, match="padding stands between 6 virtual tokens")
    with refused, attnhook.capture():
        model.generate(input_ids=ids, attention_mask=mask, **SETTINGS)


def test_what_peft_loses_of_a_prompt_in_chunks_is_refused() -> None:
    """PEFT 0.21 passes on one token of each chunk after the first."""
    refused = pytest.raises(UnsupportedError, match=r"the cache holds 12 tokens where 16 came before")
    with refused, attnhook.capture():
        tuned("prompt").generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), prefill_chunk_size=4, **SETTINGS)


def test_a_prefix_without_a_cache_is_refused() -> None:
    """PEFT's prefix is a cache, which PEFT 0.21 hands on while `generate` passes the whole text again."""
    refused = pytest.raises(
        UnsupportedError, match="the cache holds 16 tokens where 6 came before: some tokens were comp"
    )
    with refused, attnhook.capture():
        tuned("prefix").generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **SETTINGS)


def test_lora_has_none() -> None:
    import peft

    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.eval()
    with attnhook.capture(model=model) as records:
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)
    assert places(records) == WANTED
