"""Who listens, when, and to which model: the Transformers backend's corner cases, on a tiny model."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

import attnhook
from attnhook import UnsupportedError
from tests import oracle
from tests.backends.transformers.test_families import TINY, build


def llama() -> torch.nn.Module:
    return build(transformers.LlamaConfig(**TINY))


def test_a_block_may_end_during_a_pass_of_another_thread() -> None:
    model = llama()
    inside, leave = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def wait(*_: object) -> None:
        inside.set()
        assert leave.wait(20)

    def run() -> None:
        try:
            with torch.no_grad():
                model(torch.arange(2, 12)[None])
        except BaseException as error:
            failures.append(error)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    with attnhook.capture(layers="all") as before:
        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(20)
    with attnhook.capture(layers="all") as after:  # joins in the middle of the pass: gets nothing of it
        leave.set()
        thread.join()
        handle.remove()
        with torch.no_grad():
            model(torch.arange(2, 12)[None])
    assert not failures and not before
    assert [r.layers for r in after] == [(0, 1, 2, 3)]


def test_capture_of_one_model_does_not_mind_another() -> None:
    mine = llama()
    bloom = transformers.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=6)
    other = transformers.AutoModelForCausalLM.from_config(bloom).eval()
    ids = torch.arange(2, 12)[None]
    with attnhook.capture(model=mine) as records, torch.no_grad():
        other(ids)
        mine(ids)
    assert len(records) == 1 and not records.dropped


def test_a_cache_used_again_is_a_new_request() -> None:
    model = llama()
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    ids = torch.arange(2, 12)[None]
    with attnhook.capture() as records, torch.no_grad():
        for _ in range(2):
            cache.reset()
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
    assert [r.decode_step for r in records] == [0, 1, 0, 1]
    assert len({r.request_id for r in records}) == 2
    assert len({r.key for r in records}) == 4


@pytest.mark.parametrize("how", ["chosen", "sliced", "repeated", "reordered", "taken back", "cut off"])
def test_a_cache_that_holds_other_texts_now_is_of_new_requests(how: str) -> None:
    """The second sequence of two went on as the first, and a position came twice in one request."""
    model = llama()
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.stack([torch.arange(2, 12), torch.arange(22, 32)])
    more = ids[:, :1]
    with attnhook.capture(prompt=True) as records, torch.no_grad():
        model(ids, past_key_values=cache)
        if how == "chosen":
            cache.batch_select_indices(torch.tensor([1]))
            more = more[:1]
        elif how == "sliced":
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[1:], layer.values[1:]
            more = more[:1]
        elif how == "repeated":
            cache.batch_repeat_interleave(2)
            more = ids[:, :2].reshape(-1, 1)
        elif how == "reordered":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif how == "taken back":
            cache.crop(-4)
        else:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :6], layer.values[:, :, :6]
        first = {record.request_id for record in records}
        model(more, past_key_values=cache)
    later = records[20:]
    assert len(first) == 2 and len(later) == len(more)
    assert not first & {record.request_id for record in later}
    assert {record.query_position for record in later} == {6 if how in ("taken back", "cut off") else 10}
    assert len({record.key for record in records}) == len(records)


def test_a_pass_of_one_token_does_not_vouch_for_a_model() -> None:
    """With one key every formula gives probability 1, so the rebuilt output proves nothing yet."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def halved(
        module: torch.nn.Module, query: object, key: object, value: object, mask: object, **kw: object
    ) -> object:
        return sdpa_attention_forward(module, query, key, value, mask, **{**kw, "scaling": kw["scaling"] / 2})

    registry = transformers.AttentionInterface
    original = registry._global_mapping["sdpa"]
    registry.register("sdpa", halved)
    try:
        model = llama()
        with attnhook.capture() as records, torch.no_grad():
            model(torch.tensor([[5]]))
        assert len(records) == 1
        with pytest.raises(UnsupportedError, match="differs from softmax"), attnhook.capture(), torch.no_grad():
            model(torch.arange(2, 32)[None])
    finally:
        registry.register("sdpa", original)


@pytest.mark.slow
def test_only_the_inner_forward_is_compiled() -> None:
    model = llama()
    ids = torch.arange(2, 32)[None]
    with torch.no_grad():
        expected = model(ids).logits
        model.forward = torch.compile(model.forward, backend="eager")
        model(ids)  # compiled before attnhook is there
        with attnhook.capture(layers="all", prompt=True) as records:
            got = model(ids).logits
    assert torch.equal(expected, got)
    oracle.check(oracle.compare(records, oracle.eager_attention(model, ids), top_k=32))
