"""Token ids that a sink asks for, on the real SmolLM2 weights: they are the prompt's and the answer's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnhook
from attnhook.store import open_store
from tests.backends.token_ids import check

pytestmark = pytest.mark.model
PROMPT = "The capital of France is Paris. The capital of Italy is"
NEW = 4


def encode(tokenizer: Any, text: str = PROMPT) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt")["input_ids"]


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, **given)


def test_ids_are_the_real_ones_and_decode_to_the_words(smol: Any, tokenizer: Any, tmp_path: Path) -> None:
    """One sink asks and one does not, in the same pass; the words are the prompt's."""
    asks, other = f"sqlite:{tmp_path}/ids.db?tokens=1", f"jsonl:{tmp_path}/plain.jsonl"
    with attnhook.capture(sinks=[asks, other], top_k=8, layers=[0, 29], prompt=True) as records:
        output = generate(smol, encode(tokenizer))
    sequence = output[0].tolist()
    with open_store(asks) as store:
        stored = list(store.records())
        columns = [token for batch in store.fingerprints(columns=["query_token"]) for token in batch[0].to_pylist()]
    assert len(stored) == len(records) == len(sequence) - 1
    for record in stored:
        check(record, sequence)
    assert columns == sequence[:-1]
    assert tokenizer.decode([record.query_token for record in stored]) == tokenizer.decode(sequence[:-1])
    assert tokenizer.decode(columns).startswith(PROMPT)
    seen = {tokenizer.decode([token]).strip() for record in stored for token in record.token_ids.ravel() if token >= 0}
    assert {"France", "Italy", "capital"} <= seen
    text = (tmp_path / "plain.jsonl").read_text()
    assert "query_token" not in text and "token_ids" not in text and '"schema_version":2' not in text


def test_nothing_is_filled_in_where_no_sink_asks(smol: Any, tokenizer: Any) -> None:
    with attnhook.capture(sinks="memory:", prompt=True) as records:
        generate(smol, encode(tokenizer))
    assert records and all(record.token_ids is None and record.query_token == -1 for record in records)


@pytest.mark.parametrize(
    "option", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"use_cache": False}]
)
def test_caches_and_chunks(smol: Any, tokenizer: Any, option: dict[str, Any]) -> None:
    with attnhook.capture(sinks="memory:?tokens=1", top_k=4, prompt=True) as records:
        output = generate(smol, encode(tokenizer), **option)
    assert len(records) == output.shape[1] - 1
    for record in records:
        check(record, output[0].tolist())


def test_a_padded_batch_of_choices_and_a_masked_prefix(smol: Any, tokenizer: Any) -> None:
    texts = [PROMPT, "Water boils at"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    given = tokenizer(texts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    options = {"top_k": 8, "prompt": True, "mask_prefix": 3}
    with attnhook.capture(sinks="memory:?tokens=1", **options) as records:
        output = smol.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, num_return_sequences=2)
    starts = (given["attention_mask"] == 0).sum(1).tolist()
    assert starts[1] > starts[0] == 0
    for record in records:
        b = int(record.request_id.rpartition("-")[2])
        check(record, output[2 * b + record.choice, starts[b] :].tolist(), masked=3)
    assert {record.query_token == -1 for record in records} == {True, False}


def test_a_hand_written_loop_and_a_cache_that_was_there_before(smol: Any, tokenizer: Any) -> None:
    ids = encode(tokenizer)
    sequence = ids[0].tolist()
    with torch.no_grad(), attnhook.capture(sinks="memory:?tokens=1", top_k=4) as records:
        step = smol(ids, use_cache=True)
        for _ in range(3):
            token = step.logits[:, -1:].argmax(-1)
            sequence.append(int(token))
            step = smol(token, past_key_values=step.past_key_values, use_cache=True)
    assert len(records) == 4
    for record in records:
        check(record, sequence)

    with torch.no_grad():
        cache = smol(ids, use_cache=True).past_key_values
        with attnhook.capture(sinks="memory:?tokens=1", top_k=4) as late:
            smol(token, past_key_values=cache)
    (record,) = late  # nobody asked when the earlier ones were given
    assert record.query_token == int(token)
    known = record.token_positions == len(ids[0])
    assert (record.token_ids[known] == int(token)).all() and (record.token_ids[~known] == -1).all()

    with torch.no_grad():
        cache = smol(ids[:, :-2], use_cache=True).past_key_values
    with attnhook.capture(sinks="memory:?tokens=1", top_k=4) as going_on:
        output = smol.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    for record in going_on:
        check(record, output[0].tolist())  # generate is given the whole prompt


def test_embeddings_have_no_ids(smol: Any, tokenizer: Any) -> None:
    ids = encode(tokenizer)
    embeddings = smol.get_input_embeddings()(ids).detach()
    with attnhook.capture(sinks="memory:?tokens=1", top_k=4) as records:
        output = smol.generate(inputs_embeds=embeddings, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert output.shape[1] == NEW and len(records) == NEW
    prompt = [-1] * ids.shape[1]
    for record in records:
        check(record, [*prompt, *output[0].tolist()])


def test_server_wide_fingerprints_have_the_query_token(smol: Any, tokenizer: Any) -> None:
    with attnhook.capture(sinks="memory:?tokens=1", mode="fingerprint") as records:
        output = generate(smol, encode(tokenizer))
    for record in records:
        check(record, output[0].tolist())
        assert record.query_token >= 0


def test_guidance_by_a_second_prompt(smol: Any, tokenizer: Any) -> None:
    """Its passes run inside ``generate`` with tokens of their own, which are not the answer's."""
    with attnhook.capture(sinks="memory:?tokens=1", top_k=4) as records:
        output = generate(smol, encode(tokenizer), guidance_scale=1.5, negative_prompt_ids=encode(tokenizer, "No, no"))
    assert len(records) == NEW
    for record in records:
        check(record, output[0].tolist())


def test_who_joins_a_generation_knows_what_went_before(smol: Any, tokenizer: Any) -> None:
    from transformers import LogitsProcessorList

    blocks: list[Any] = []

    def join(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == encode(tokenizer).shape[1] + 1:
            block = attnhook.capture(sinks="memory:?tokens=1", top_k=4)
            blocks.append((block, block.__enter__()))
        return scores

    with attnhook.capture():  # so that the engine is hooked when the generation begins
        output = generate(smol, encode(tokenizer), logits_processor=LogitsProcessorList([join]))
    ((block, records),) = blocks
    block.__exit__(None, None, None)
    assert len(records) == NEW - 2
    for record in records:
        check(record, output[0].tolist())


def test_a_whole_process(smol: Any, tokenizer: Any, tmp_path: Path) -> None:
    attnhook.install(sinks=[f"sqlite:{tmp_path}/ids.db?tokens=1"])
    try:
        output = generate(smol, encode(tokenizer))
    finally:
        attnhook.uninstall()
    with open_store(f"sqlite:{tmp_path}/ids.db") as store:
        stored = list(store.records())
    assert len(stored) == NEW
    for record in stored:
        check(record, output[0].tolist())
