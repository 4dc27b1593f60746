"""Every token that `generate()` returns has its row, once, in order; what cannot be so is refused, never left out."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
import transformers as tf

import attnhook
from attnhook import OptionError, UnsupportedError
from attnhook.backends.transformers import frames, layers
from tests import oracle
from tests.helpers import tiny_model

PROMPT, NEW = 10, 4
IDS = torch.arange(3, 3 + PROMPT)[None]
WANTED = [(PROMPT - 1 + step, step) for step in range(NEW)]


def settings(ids: torch.Tensor = IDS, new: int = NEW) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip


def places(records: Any) -> list[tuple[int, int | None]]:
    return [(record.query_position, record.decode_step) for record in records]


class Guide(tf.LogitsProcessor):
    """Calls a model of its own for each token, and generates with it."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            self.model(torch.cat([IDS.flip(1), ids], 1))
            other: torch.Tensor = self.model(ids).logits[:, -1]
        return scores + 0 * other


@pytest.mark.parametrize("guided", ["no", "negative prompt", "no cache", "a processor", "a stopping criterion"])
def test_what_runs_between_the_passes_gives_no_rows(guided: str) -> None:
    model = tiny_model()
    more: dict[str, Any] = {}
    if guided == "negative prompt":
        more = {"guidance_scale": 1.5, "negative_prompt_ids": torch.arange(20, 45)[None]}
    elif guided == "no cache":
        more = {"guidance_scale": 1.5, "use_cache": False}
    elif guided == "a processor":
        more = {"logits_processor": tf.LogitsProcessorList([Guide(model)])}
    elif guided == "a stopping criterion":

        class Never(tf.StoppingCriteria):
            def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                model(ids.flip(1))
                return torch.zeros(len(ids), dtype=torch.bool)

        more = {"stopping_criteria": tf.StoppingCriteriaList([Never()])}
    with attnhook.capture(layers="all", prompt=True) as records:
        output = model.generate(IDS, **settings(), **more)
    assert places(records.generated) == WANTED and [p for p, _ in places(records.prompt)] == list(range(PROMPT - 1))
    assert len({record.request_id for record in records}) == 1
    attention = oracle.eager_attention(model, output[:, :-1])
    worst = oracle.compare(records, attention, top_k=32)
    oracle.check(worst)


def test_a_generation_inside_another_is_its_own() -> None:
    model, inner = tiny_model(), tiny_model()
    found: list[torch.Tensor] = []

    class Asking(tf.LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not found:
                found.append(inner.generate(IDS[:, :6], **settings(IDS[:, :6], 2)))
            return scores

    with attnhook.capture() as records:
        model.generate(IDS, **settings(), logits_processor=tf.LogitsProcessorList([Asking()]))
    by: dict[str, list[Any]] = {}
    for record in records:
        by.setdefault(record.request_id, []).append(record)
    assert sorted(map(places, by.values())) == sorted([WANTED, [(5, 0), (6, 1)]])


def test_generations_in_threads_do_not_mix() -> None:
    models = [tiny_model() for _ in range(3)]
    lengths = [2, 5, 8]

    def run(n: int) -> None:
        ids = IDS[:, : n + 4]
        models[n].generate(ids, **settings(ids, lengths[n]))

    with attnhook.capture() as records:
        threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = sorted(len([r for r in records if r.request_id == name]) for name in {r.request_id for r in records})
    assert counts == lengths


def test_who_comes_in_the_middle_gets_the_right_steps() -> None:
    """Where the hooks were in place when the generation began, as with `attnhook.install()` or another block."""
    model, unrelated = tiny_model(), tiny_model()
    late: list[Any] = []

    class Opening(tf.LogitsProcessor):
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                late.append(attnhook.capture())
                late.append(late[0].__enter__())
            return scores

    with attnhook.capture(model=unrelated):
        model.generate(IDS, **settings(new=6), logits_processor=tf.LogitsProcessorList([Opening()]))
        late[0].__exit__(None, None, None)
    assert places(late[1]) == [(PROMPT - 1 + step, step) for step in range(2, 6)]


def test_a_batch_whose_sequences_end_early() -> None:
    model = tiny_model()
    ids = torch.stack([IDS[0], IDS[0].flip(0), IDS[0] + 40])
    plain = model.generate(ids, **settings(ids, 12))[:, PROMPT:]
    end = int(plain[0, 3])  # the first sequence ends with its fourth token
    with attnhook.capture(layers="all") as records:
        output = model.generate(ids, **settings(ids, 12), eos_token_id=end)[:, PROMPT:]
    for b, row in enumerate(output.tolist()):
        count = row.index(end) + 1 if end in row else len(row)
        mine = [record for record in records if record.request_id.endswith(f"-{b}")]
        assert places(mine) == [(PROMPT - 1 + step, step) for step in range(count)]


@pytest.mark.parametrize("fault", ["a row less", "a row twice", "another step", "another position"])
@pytest.mark.parametrize("strict", [True, False])
def test_rows_that_are_not_those_of_the_tokens_are_refused(
    fault: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a misread cache does: rows of one pass are not those that the pass computed."""
    whole = frames.Frame._find_rows

    def spoilt(self: Any, batch: int, q_len: int) -> Any:
        rows = whole(self, batch, q_len)
        if q_len > 1 or rows[0][0].decode_step != 2:
            return rows
        row, index = rows[0]
        return {
            "a row less": [],
            "a row twice": [rows[0], rows[0]],
            "another step": [(row._replace(decode_step=1), index)],
            "another position": [(row._replace(position=row.position - 1), index)],
        }[fault]

    monkeypatch.setattr(frames.Frame, "_find_rows", spoilt)
    model = tiny_model()
    if strict:
        # a position that is too low is seen at once: the row has more keys than that
        said = "more keys than" if fault == "another position" else r"LlamaForCausalLM\.generate\(\).*4 tokens"
        with pytest.raises(UnsupportedError, match=said), attnhook.capture():
            model.generate(IDS, **settings())
    else:
        with attnhook.capture(on_error="drop") as records:
            output = model.generate(IDS, **settings())
        assert output.shape[1] == PROMPT + NEW and sum(records.dropped.values()) >= 1


def test_a_model_whose_cache_tells_no_length() -> None:
    """RecurrentGemma: one row of six arrived."""
    config = tf.RecurrentGemmaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=1,
        num_hidden_layers=3, lru_width=48, attention_window_size=64, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.RecurrentGemmaForCausalLM._from_config(config).eval()
    with attnhook.capture(layers="all", prompt=True, top_k=8) as records:
        output = model.generate(IDS, **settings(new=6))
    assert places(records.generated) == [(PROMPT - 1 + step, step) for step in range(6)]
    worst = oracle.compare(records, oracle.eager_attention(model, output[:, :-1]), top_k=8)
    oracle.check(worst)


def test_keys_that_were_taken_out_of_the_cache_are_refused() -> None:
    model = tiny_model()
    ids, keep = torch.arange(3, 44)[None], torch.tensor([0, 1, 2, 10, 11, 25, 26, 36, 37, 38, 39])
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    refused = pytest.raises(UnsupportedError, match="the cache holds 11 tokens where 40 came before")
    with refused, attnhook.capture(), torch.no_grad():
        model(ids[:, 40:], past_key_values=cache, position_ids=torch.tensor([[40]]))


def test_keys_that_are_taken_out_while_it_generates_are_refused() -> None:
    """As kvpress does after the prompt: `generate` itself knows of no positions but those of the cache."""
    model = tiny_model()
    cache = tf.DynamicCache(config=model.config)

    class Press(tf.LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] == PROMPT:
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
            return scores

    pressed = {**settings(), "logits_processor": tf.LogitsProcessorList([Press()])}
    with pytest.raises(UnsupportedError, match="the cache holds 6 tokens where 10 came before"), attnhook.capture():
        model.generate(IDS, past_key_values=cache, **pressed)


def test_layers_that_all_have_one_number_are_told_apart_by_their_places() -> None:
    linear, hybrid = "linear_attention", "hybrid"
    config = tf.Zamba2Config(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_attention_heads=6, num_hidden_layers=6,
        layers_block_type=[linear, linear, hybrid, linear, hybrid, linear], n_mamba_heads=6, mamba_d_state=8,
        chunk_size=16, adapter_rank=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Zamba2ForCausalLM(config).eval()
    ids = torch.randint(3, 290, (1, 20), generator=torch.Generator().manual_seed(0))
    with attnhook.capture(layers="all", top_k=3) as records, torch.no_grad():
        model(ids)
    with attnhook.capture(layers=[4], top_k=3) as last, torch.no_grad():
        model(ids)
    assert records[0].layers == (2, 4) and last[0].layers == (4,)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    eager = [a for a in attentions if a is not None][-2:]
    for n, attention in enumerate(eager):
        best = attention[0].mean(0)[-1].topk(3)
        assert records[0].token_positions[n].tolist() == best.indices.tolist()
        assert torch.allclose(torch.from_numpy(records[0].attention_scores[n]), best.values, atol=1e-5)
    assert last[0].token_positions[0].tolist() == records[0].token_positions[1].tolist()


def test_one_module_in_several_layers_is_refused() -> None:
    class Twice(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            attention = model.model.layers[0].self_attn
            attention.layer_idx = -1
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": attention}) for _ in range(2)])

    with pytest.raises(
        UnsupportedError, match=r"one attention module in several layers \(layers\.0\.self_attn, layers\.1"
    ):
        layers._numbered(Twice(tiny_model()))


class Around(torch.nn.Module):
    """A module of somebody's own around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleDict({"model": model})

    def forward(self, ids: torch.Tensor) -> Any:
        return self.inner["model"](ids)


@pytest.mark.parametrize(
    "kind", ["compiled", "compiled, the model itself", "DataParallel", "a module", "with a .model"]
)
def test_the_model_inside_a_wrapper(kind: str) -> None:
    base, other = tiny_model(), tiny_model()
    target: Any = base
    call = base
    if kind.startswith("compiled"):
        call = torch.compile(base, backend="eager")
        target = base if "itself" in kind else call
    elif kind == "DataParallel":
        target = torch.nn.DataParallel(base)
    elif kind == "a module":
        target = call = Around(base)
    else:
        target = type("Pipeline", (), {"model": base})()
    with attnhook.capture(model=target) as records, torch.no_grad():
        call(IDS)
        other(IDS)
    assert places(records) == [(PROMPT - 1, 0)]
    with attnhook.capture(model=target) as records:
        base.generate(IDS, **settings())
    assert places(records) == WANTED


@pytest.mark.parametrize("target", ["smollm2", 3, torch.nn.Linear(2, 2), object()])
def test_what_holds_no_model_is_refused(target: Any) -> None:
    refused = pytest.raises(OptionError, match=r"model=.*is no model of Transformers and holds none")
    with refused, attnhook.capture(model=target):
        pass


def test_a_block_that_captured_nothing_says_why(caplog: pytest.LogCaptureFixture) -> None:
    mine, other = tiny_model(), tiny_model()
    with caplog.at_level(logging.WARNING, "attnhook"), attnhook.capture(model=mine) as records, torch.no_grad():
        other(IDS)
        other(IDS)
    assert not records
    (line,) = [record.getMessage() for record in caplog.records]
    assert "ended without a record" in line and "LlamaForCausalLM (2 forward passes)" in line and "model=" in line
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "attnhook"):
        with attnhook.capture(model=mine):
            mine.generate(IDS, **settings())
        with attnhook.capture():
            pass  # nothing ran
    assert not caplog.records


@pytest.mark.parametrize("target", ["all models", "the model", "its language model"])
def test_a_vision_tower_beside_the_decoder_is_left_alone(target: str) -> None:
    """LLaVA's generate() was refused because of its tower."""
    text = tf.LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=295)
    model = tf.LlavaForConditionalGeneration._from_config(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[5] * 6 + [295] * 9 + [7] * 5])
    pixels = torch.randn(1, 3, 12, 12)
    wanted = {"all models": None, "the model": model, "its language model": model.model.language_model}[target]
    with attnhook.capture(model=wanted, layers="all", spans={"image": (6, 15)}, top_k=8) as records:
        output = model.generate(ids, pixel_values=pixels, **settings(ids, 3))
    assert places(records) == [(19 + step, step) for step in range(3)]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=output[:, :-1], pixel_values=pixels, output_attentions=True).attentions
    for record in records:
        for n, attention in enumerate(attentions):
            row = attention[0].mean(0)[record.query_position]
            assert float(record.span_mass[n, 0]) == pytest.approx(float(row[6:15].sum()), abs=1e-5)
            assert record.token_positions[n].tolist() == row.topk(8).indices.tolist()


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HALVES = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tf.BertModel(tf.BertConfig(**SMALL)), "made no causal attention call: it is an encoder"),
        (lambda: tf.BartModel(tf.BartConfig(**HALVES)), "is an encoder-decoder model"),
        (
            lambda: tf.T5Model(tf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)),
            "is an encoder-decoder model",
        ),
        (
            lambda: tf.BloomModel(tf.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)),
            "in its own code",
        ),
    ],
)
def test_what_is_refused_is_refused_with_the_true_reason(make: Any, reason: str) -> None:
    model = make().eval()
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with pytest.raises(UnsupportedError, match=reason), attnhook.capture(), torch.no_grad():
        model(IDS, **more)


@pytest.mark.slow
def test_a_model_compiled_in_one_graph_is_refused_and_runs_on() -> None:
    """Transformers' own guide compiles so; it crashed, with on_error="drop" too."""
    model = tiny_model()
    wanted = model.generate(IDS, **settings())
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(model.generate(IDS, **settings()), wanted)
    with pytest.raises(UnsupportedError, match="compiled with fullgraph=True"), attnhook.capture():
        model.generate(IDS, **settings())
    with attnhook.capture(on_error="drop") as records:
        output = model.generate(IDS, **settings())
    assert torch.equal(output, wanted) and not records and dict(records.dropped) == {"unsupported": NEW}
    assert torch.equal(model.generate(IDS, **settings()), wanted)
    del model.forward  # no longer compiled
    with attnhook.capture() as records:
        model.generate(IDS, **settings())
    assert places(records) == WANTED
