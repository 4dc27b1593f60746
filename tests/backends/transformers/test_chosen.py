"""Chosen rows of the prompt, and heads chosen by layer, against eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import attnhook
from attnhook import OptionError, TokenRecord
from tests import oracle
from tests.backends.transformers.test_families import TINY, build

IDS = torch.randint(2, 290, (1, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return build(transformers.LlamaConfig(**TINY))


def generated(model: Any, ids: torch.Tensor = IDS, new: int = 3, *, settings: Any = None, **options: Any) -> Any:
    mask = torch.ones_like(ids)
    with attnhook.capture(**options) as records:
        output = model.generate(
            ids, **{"attention_mask": mask, "max_new_tokens": new, "do_sample": False, **(settings or {})}
        )
    return list(records), output


def same(one: TokenRecord, other: TokenRecord) -> None:
    assert one.query_position == other.query_position and one.decode_step == other.decode_step
    assert np.array_equal(one.token_positions, other.token_positions)
    assert np.allclose(one.attention_scores, other.attention_scores, atol=1e-6)
    assert np.allclose(one.fingerprints, other.fingerprints, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 6}, {"use_cache": False}], ids=str)
def test_chosen_rows_are_those_of_all_rows(llama: torch.nn.Module, settings: dict[str, Any]) -> None:
    spans = {"question": (12, 15)}
    chosen, output = generated(llama, settings=settings, rows=[(2, 4), "question", (14, 17)], spans=spans)
    every, _ = generated(llama, settings=settings, prompt=True, spans=spans)
    assert [row.query_position for row in chosen] == [2, 3, 12, 13, 14, 15, 16, 19, 20, 21]
    by_position = {row.query_position: row for row in every}
    assert len(by_position) == len(every) == 22
    for row in chosen:
        same(row, by_position[row.query_position])
    attention = oracle.eager_attention(llama, output[:, :-1])
    assert oracle.compare(generated(llama, rows=[(2, 4)])[0], attention, top_k=32).probability < 2e-5


def test_the_prompts_last_row_gives_the_first_token_and_is_there_once(llama: torch.nn.Module) -> None:
    rows, _ = generated(llama, rows=[(18, 20)])
    assert [(row.query_position, row.decode_step) for row in rows] == [(18, None), (19, 0), (20, 1), (21, 2)]


def test_in_a_padded_batch_positions_are_each_sequences_own(llama: torch.nn.Module) -> None:
    mask = torch.stack([torch.ones(20), (torch.arange(20) >= 8).float()]).long()
    ids = IDS.repeat(2, 1) * mask
    rows, _ = generated(llama, ids, settings={"attention_mask": mask}, rows=[(3, 5)])
    for b in range(2):
        own = [row for row in rows if row.request_id.endswith(f"-{b}")]
        assert [row.query_position for row in own if row.is_prompt] == [3, 4]
    with pytest.raises(OptionError, match=r"rows: \[3, 13\] reaches beyond the prompt, whose positions are 0..11"):
        generated(llama, ids, settings={"attention_mask": mask}, rows=[(3, 13)])


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 6}], ids=str)
def test_rows_beyond_the_prompt_are_refused_by_name(llama: torch.nn.Module, settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"rows: \[19, 21\] reaches beyond the prompt, whose positions are 0..19"):
        generated(llama, settings=settings, rows=[(0, 2), (19, 21)])
    with attnhook.capture(rows=[(19, 21)], on_error="drop") as records:
        llama.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)
    assert not records and records.dropped.keys() == {"unsupported"}


def test_in_a_loop_of_ones_own_the_first_pass_is_the_prompt(llama: torch.nn.Module) -> None:
    def loop(first: int, rows: list[tuple[int, int]]) -> list[TokenRecord]:
        with attnhook.capture(rows=rows) as records, torch.no_grad():
            cache = llama(IDS[:, :first]).past_key_values
            for at in range(first, 20):
                llama(IDS[:, at : at + 1], past_key_values=cache)
        return list(records)

    rows = loop(16, [(2, 4), (14, 16)])
    assert [(r.query_position, r.decode_step) for r in rows] == [
        *((p, None) for p in (2, 3, 14)), *((15 + n, n) for n in range(5)),
    ]  # fmt: skip
    with pytest.raises(
        OptionError, match=r"whose positions are 0\.\.7: .* in a decoding loop of your own the prompt is"
    ):
        loop(8, [(2, 4), (14, 16)])


def test_the_mean_over_other_heads_in_each_layer(llama: torch.nn.Module) -> None:
    heads = {0: [1, 4], -1: [5]}
    rows, output = generated(llama, heads=heads, layers="all", prompt=True, top_k=4)
    layers = rows[0].layers
    assert layers == tuple(range(TINY["num_hidden_layers"])) and len(rows) == 22
    oracle.check_heads_by_layer(llama, output[0, :-1].tolist(), rows, {0: (1, 4), layers[-1]: (5,)}, top_k=4)
    named, _ = generated(llama, heads=heads)  # the layers are those that have heads
    assert named[0].layers == (0, layers[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": {9: [0]}}, "heads: layer 9 does not exist"),
        ({"heads": {0: [0]}, "layers": "last"}, "heads: layer 0 is not captured: the captured layers are"),
        ({"heads": {0: [6]}}, "heads: head 6 of layer 0 does not exist: the model's query heads are 0..5"),
        ({"heads": {0: []}}, "must be a non-empty list of whole numbers from 0 up, or such lists by layer number"),
        ({"heads": {}}, "or such lists by layer number"),
        ({"rows": [(0, 4), "nothing"]}, "rows: 'nothing' is no span: there are no spans"),
    ],
)
def test_bad_choices_are_refused_by_name(llama: torch.nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generated(llama, **options)


@pytest.mark.slow
@pytest.mark.model
def test_smollm2(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = torch.tensor([tokenizer(long_text)["input_ids"][:90]])
    rows, output = generated(
        smol, ids, rows=[(4, 8), (60, 70)], layers="all", heads={3: [0, 8], 29: [4]}, top_k=8, per_head=["top"]
    )
    assert [row.query_position for row in rows] == [*range(4, 8), *range(60, 70), 89, 90, 91]
    oracle.check_heads_by_layer(smol, output[0, :-1].tolist(), rows, {3: (0, 8), 29: (4,)}, top_k=8)
    assert all(row.head_positions.shape == (30, 9, 1) for row in rows)
