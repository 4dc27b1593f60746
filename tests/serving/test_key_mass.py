"""Key mass from a fake engine's passes to what a reply holds: pieces, drafts, preemption, ranks, stages, limits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attnhook import OptionError, RecordError
from attnhook.capture.key_mass import Added
from attnhook.options import RequestOptions
from attnhook.record.key_mass import KeyMass
from attnhook.serving.budget import reply_bytes
from attnhook.serving.frontend import FrontEnd, ServedModel
from attnhook.serving.key_mass import PROMPT, Gathered, join, pack, received
from attnhook.serving.refusal import Refusal
from attnhook.serving.replies import Attention
from attnhook.serving.wire import Share
from tests.serving.fake import HEADS, KV_HEADS, LAYERS, Engine, Part, Request, on_ranks, probabilities
from tests.serving.test_worker import a_request, generate

ASKED = RequestOptions(layers="all", top_k=3, prompt=True, key_mass="mean")


def mass_of(options: RequestOptions, shares: Iterable[Share], tokens: int = 1) -> KeyMass | None:
    """What an engine that accepts so many tokens of each pass sends with the last record."""
    gathered = Gathered(options)
    for share in shares:
        gathered.add(share.pieces, tokens)
    packed = gathered.leave()
    return None if packed is None else received(packed)


def check(mass: KeyMass | None, tokens: list[int], rows: list[int], *, kv_heads: bool = False) -> None:
    assert mass is not None and mass.rows == len(rows)
    assert list(mass) == list(range(LAYERS))
    size = HEADS // KV_HEADS
    groups = [slice(g * size, (g + 1) * size) for g in range(KV_HEADS)] if kv_heads else [slice(None)]
    for layer, own in mass.items():
        wanted = torch.stack([probabilities(tokens, layer, heads)[rows].sum(0) for heads in groups])[:, : max(rows) + 1]
        assert own.shape == (wanted.shape if kv_heads else wanted.shape[1:])
        assert np.allclose(own, wanted if kv_heads else wanted[0], atol=1e-5)


@pytest.mark.parametrize("asked", ["mean", "kv_head"])
@pytest.mark.parametrize("chunks", [(), (2,), (1, 1, 3)])
def test_a_prompt_in_pieces_and_its_answer(asked: str, chunks: tuple[int, ...]) -> None:
    options = replace(ASKED, key_mass=asked)
    request = a_request(options=options)
    shares = generate(Engine(), request, chunks=chunks)
    check(mass_of(options, shares), request.tokens, list(range(12)), kv_heads=asked == "kv_head")


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"prompt": False}, [5, 6, 7, 8, 9, 10, 11]),
        ({"prompt": False, "rows": ((1, 3),), "max_tokens": 0}, [1, 2]),
        ({"prompt": False, "stride": 3}, [5, 8, 11]),
        ({"max_tokens": 2}, [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_the_rows_that_are_captured(change: dict[str, Any], rows: list[int]) -> None:
    options = replace(ASKED, **change)
    request = a_request(options=options)
    check(mass_of(options, generate(Engine(), request)), request.tokens, rows)


def test_rows_that_are_computed_again_are_added_once() -> None:
    request, engine = a_request(options=ASKED), Engine()
    shares = [engine.run((request, tokens))["r0"] for tokens in (4, 2, 1)]
    request.computed = 0  # preempted: prompt and answer so far are computed again
    request.pages.clear()
    shares += [engine.run((request, tokens))["r0"] for tokens in (8, 1)]
    check(mass_of(ASKED, shares), request.tokens, list(range(9)))


def test_rows_from_a_cache_are_not_there_and_that_is_said() -> None:
    request, engine = a_request(options=ASKED), Engine()
    warm = Request("warm", request.tokens, 6)
    engine.run((warm, 4))
    request.computed, request.pages = 3, [*warm.pages]
    share = engine.run((request, 3))["r0"]
    assert share.error is not None and "rows 0 to 2 of the prompt came from a cache" in share.error
    check(mass_of(ASKED, [share]), request.tokens, [3, 4, 5])


@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_of_drafts_the_accepted_ones(accepted: int) -> None:
    request, engine = a_request(options=ASKED), Engine()
    first = engine.run((request, 6))["r0"]
    share = engine.run(Part(request, 4, drafts=3))["r0"]
    assert [piece["token"] for piece in first.pieces] == [PROMPT, 0]
    assert [piece["token"] for piece in share.pieces] == [0, 1, 2, 3]
    check(mass_of(ASKED, [first, share], accepted), request.tokens, list(range(6 + accepted)))


@pytest.mark.parametrize("asked", ["mean", "kv_head"])
@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_stages_together(size: int, stages: int, asked: str) -> None:
    options = replace(ASKED, key_mass=asked)

    def work(engine: Engine) -> dict[str, Share]:
        request = a_request(options=options)
        passes = [engine.run((request, tokens)) for tokens in (4, 2, 1)]
        return {f"{n}": share["r0"] for n, share in enumerate(passes) if share}

    request = a_request(options=options)
    shares = on_ranks(size, stages, work)
    assert [share.error for share in shares.values()] == [None] * 3
    check(mass_of(options, shares.values()), request.tokens, list(range(7)), kv_heads=asked == "kv_head")


@pytest.mark.parametrize("known", [None, 3])
def test_kv_heads_that_ranks_do_not_divide_are_refused_by_name(known: int | None) -> None:
    options = replace(ASKED, key_mass="kv_head")

    def work(engine: Engine) -> dict[str, Share]:
        engine.worker.model.kv_heads = known
        return engine.run((a_request(options=options), 6))

    share = on_ranks(2, 1, work)["r0"]
    assert share.error is not None and "key_mass='kv_head' with tensor parallelism: 2 ranks of 1 kv" in share.error


def test_ranks_with_a_copy_of_a_kv_head_each() -> None:
    """As where there are more ranks than kv heads: those of one tell the mean over their own query heads."""
    options = replace(ASKED, key_mass="kv_head")

    def work(engine: Engine) -> dict[str, Share]:
        engine.worker.model.kv_heads = 1  # as if both ranks had the same
        return engine.run((a_request(options=options), 6))

    mass = mass_of(options, [on_ranks(2, 1, work)["r0"]])
    alone = mass_of(ASKED, [Engine().run((a_request(options=ASKED), 6))["r0"]])
    assert mass is not None and alone is not None
    for layer, own in mass.items():
        assert own.shape == (1, 6) and np.allclose(own[0], alone[layer], atol=1e-5)


def test_a_row_that_is_dropped_takes_the_key_mass_with_it() -> None:
    request, engine = a_request(options=ASKED), Engine()
    honest = engine.adapter.queries

    def queries(call: Any) -> torch.Tensor:
        q = honest(call).clone()
        q[3, 0, 0] = torch.nan
        return q

    engine.adapter.queries = queries  # type: ignore[method-assign]
    first = engine.run((request, 6))["r0"]
    engine.adapter.queries = honest  # type: ignore[method-assign]
    second = engine.run((request, 1))["r0"]
    assert first.error is not None and "NaN" in first.error
    assert mass_of(ASKED, [first, second]) is None


def test_a_stage_without_its_layers_leaves_none() -> None:
    first = pack(Added(("r", 0), 2, (0,), np.array([[[0.5, 0.5]]])), PROMPT)
    second = pack(Added(("r", 0), 2, (1,), np.array([[[0.25, 1]]])), PROMPT)
    (both,) = join([[first], [second]], [0, 1])
    assert both == pack(Added(("r", 0), 2, (0, 1), np.array([[[0.5, 0.5]], [[0.25, 1]]])), PROMPT)
    for other in ([], [pack(Added(("r", 0), 2, (1,), None), PROMPT)], [{**second, "layers": [2]}]):
        assert [piece["data"] for piece in join([[first], other], [0, 1])] == [None]


def test_positions_below_the_prefix_are_null_in_json_and_come_back() -> None:
    options = replace(ASKED, mask_prefix=4)
    mass = mass_of(options, generate(Engine(), a_request(options=options)))
    assert mass is not None
    entries = mass.to_list()
    assert entries[2]["mass"][:4] == [None] * 4 and min(entries[2]["mass"][4:]) > 0
    for form, tolerance in (("float", 1e-6), ("base64", 0)):
        again = KeyMass.from_list(json.loads(json.dumps(mass.to_list(form))))
        assert again.rows == mass.rows and list(again) == list(mass)
        for layer, own in mass.items():
            assert np.allclose(again[layer], own, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(
    "entries", [[{}], [{"layer": 0, "rows": 1, "mass": "x"}], [{"layer": 0, "rows": 1, "mass": 3}]]
)
def test_json_that_is_none_is_refused(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(RecordError, match="damaged attention_key_mass"):
        KeyMass.from_list(entries)


def test_a_reply_brings_it_with_the_last_records() -> None:
    request = a_request(options=ASKED)
    gathered = Gathered(ASKED)
    for share in generate(Engine(), request):
        gathered.add(share.pieces, 1)
    share = Share(key_mass=gathered.leave())
    assert share and Share.unpack(share.pack()).key_mass == share.key_mass
    fields = Attention.of(share, "r0", 0).fields()
    assert [entry["layer"] for entry in fields["attention_key_mass"]] == list(range(LAYERS))
    assert {entry["rows"] for entry in fields["attention_key_mass"]} == {12}


def front(**options: Any) -> FrontEnd:
    return FrontEnd("fake", lambda: "1", lambda: ServedModel("m", range(4), 4), ("/v1/completions",), **options)


ASK = {"return_attention_tokens": True, "attention_key_mass": "mean"}


def test_a_plugin_that_tells_none_refuses_by_name() -> None:
    with pytest.raises(OptionError, match="attention_key_mass='mean': the plugin of fake tells no key mass"):
        front().options(ASK)
    assert front(key_mass=True).options(ASK).key_mass == "mean"  # type: ignore[union-attr]


def test_a_server_that_gives_fingerprints_only_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_FINGERPRINT_ONLY", "1")
    with pytest.raises(Refusal, match="this server gives fingerprints only, which tell of no key") as caught:
        front(key_mass=True).admit([{**ASK, "attention_mode": "fingerprint"}], {})
    assert caught.value.status == 403


def test_more_memory_than_a_server_allows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_KEY_MASS_BYTES", "16000")
    served = front(key_mass=True)
    (options,), place = served.admit([{**ASK, "attention_layers": "all"}], {})
    assert options is not None and place is not None
    served.measure(options, place, 400, 100, 1)
    with pytest.raises(OptionError, match=r"4 sums of up to 501 keys take 16032 bytes .* allows 16000 \(--attention-"):
        served.measure(options, place, 400, 101, 1)
    with pytest.raises(OptionError, match="8 sums of up to 500 keys"):
        served.measure(options, place, 400, 100, 2)
    place.leave()


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("asked", ["mean", "kv_head"])
def test_its_bytes_are_counted(asked: str, encoding: str) -> None:
    options = RequestOptions(top_k=1, key_mass=asked, encoding_format=encoding)
    plain = reply_bytes(replace(options, key_mass=None), 6, 300, 20, 9)
    sums = np.full((9, 320) if asked == "kv_head" else 320, 1234.1234567, np.float32)
    entries = KeyMass(dict.fromkeys(range(6), sums), 319).to_list(encoding)
    true = len(json.dumps(entries, separators=(",", ":")))
    estimate = reply_bytes(options, 6, 300, 20, 9) - plain
    assert true <= estimate <= 1.3 * true + 400
