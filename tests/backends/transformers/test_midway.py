"""A block that opens while ``generate`` runs, and no hook of ours was there when it began."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import attnhook
from attnhook import UnsupportedError
from attnhook.process import lifecycle
from tests import oracle
from tests.helpers import tiny_model

NEW, OPENS = 6, 2  # the block opens while the token of step 1 is chosen, so the first row inside is that of step 2
IDS = torch.arange(3, 13)[None]


class Opening(tf.LogitsProcessor):
    """Opens a block while the generation runs, once."""

    def __init__(self, act: Callable[[], None] = lambda: None, **options: Any) -> None:
        self.calls, self.act, self.block = 0, act, attnhook.capture(**options)
        self.records: Any = None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == OPENS:
            assert not lifecycle.installed(), "the hooks are there already"
            self.records = self.block.__enter__()
        self.act()
        return scores

    def close(self) -> None:
        self.block.__exit__(None, None, None)


def generate(model: Any, opening: Opening, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    more.setdefault("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}
    try:
        output: torch.Tensor = model.generate(ids, logits_processor=tf.LogitsProcessorList([opening]), **settings)
    finally:
        if opening.records is not None:
            opening.close()
    return output


def places(records: Any) -> list[tuple[int, int | None]]:
    return [(record.query_position, record.decode_step) for record in records]


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_steps_count_from_the_prompt(more: dict[str, Any]) -> None:
    """The first row in the block was called step 0."""
    model = tiny_model()
    opening = Opening(layers="all", top_k=8)
    output = generate(model, opening, **more)
    assert places(opening.records) == [(9 + step, step) for step in range(OPENS, NEW)]
    oracle.check(oracle.compare(opening.records, oracle.eager_attention(model, output[:, :-1]), top_k=8))


def test_a_batch_with_padding_choices_and_early_ends() -> None:
    model = tiny_model()
    ids = torch.stack([IDS[0], IDS[0].flip(0)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    more = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(3)
    plain = model.generate(ids, max_new_tokens=NEW, pad_token_id=0, **more)
    end = int(plain[1, 10 + 3])  # the second sequence ends with its fourth token
    torch.manual_seed(3)
    opening = Opening()
    output = generate(model, opening, ids, eos_token_id=end, **more)[:, 10:].tolist()
    assert len({record.request_id for record in opening.records}) == 2
    for b, row in enumerate(output):
        count = row.index(end) + 1 if end in row else len(row)
        mine = [
            r for r in opening.records if r.request_id.endswith(f"-{b // 2}") and r.choice == b % 2
        ]  # fmt: skip
        first = 9 - 3 * (b // 2)
        assert places(mine) == [(first + step, step) for step in range(OPENS, count)]


def test_a_generation_in_another_thread() -> None:
    model = tiny_model()
    reached, go = threading.Event(), threading.Event()

    class Waiting(tf.LogitsProcessor):
        calls = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            Waiting.calls += 1
            if Waiting.calls == OPENS:
                reached.set()
                assert go.wait(30)
            return scores

    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(IDS), "logits_processor": tf.LogitsProcessorList([Waiting()])}
    thread = threading.Thread(target=model.generate, args=(IDS,), kwargs=settings)
    thread.start()
    assert reached.wait(30)
    with attnhook.capture() as records:
        go.set()
        thread.join()
        model.generate(IDS, **{**settings, "logits_processor": None})
    assert places(records) == [(9 + step, step) for step in [*range(OPENS, NEW), *range(NEW)]]
    assert len({record.request_id for record in records}) == 2


def test_what_runs_between_its_passes_gives_no_rows() -> None:
    model = tiny_model()

    def act() -> None:
        with torch.no_grad():
            model(IDS.flip(1))

    opening = Opening(act)
    generate(model, opening)
    assert places(opening.records) == [(9 + step, step) for step in range(OPENS, NEW)]


def test_two_generations_one_after_the_other_are_two() -> None:
    model = tiny_model()
    first, second = Opening(), Opening()
    generate(model, first)
    generate(model, second)
    assert places(first.records) == places(second.records)
    assert first.records[0].request_id != second.records[0].request_id


def test_prompts_given_as_embeddings() -> None:
    model = tiny_model()
    opening = Opening()
    processors = tf.LogitsProcessorList([opening])
    model.generate(
        inputs_embeds=model.get_input_embeddings()(IDS).detach(), attention_mask=torch.ones_like(IDS),
        max_new_tokens=NEW, do_sample=False, pad_token_id=0, logits_processor=processors,
    )  # fmt: skip
    opening.close()
    assert places(opening.records) == [(9 + step, step) for step in range(OPENS, NEW)]


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_decoding_that_is_refused_is_refused_midway_too(more: dict[str, Any]) -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedError, match=r"beam search|speculative"):
        generate(model, Opening(), IDS.repeat(1, 2), **more)


def test_nothing_of_the_generation_is_kept() -> None:
    model = tiny_model()
    cache = tf.DynamicCache(config=model.config)
    gone = weakref.ref(cache)
    generate(model, Opening(), past_key_values=cache)
    del cache
    gc.collect()
    assert gone() is None
