"""Key mass: the columns of eager attention, summed up over the rows that were captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import attnhook
from attnhook import OptionError, TokenRecord, UnsupportedError
from attnhook.capture.key_mass import KeyMass, KeySums
from tests import oracle
from tests.backends.transformers.test_families import FAMILIES, NEW, TINY, build

IDS = torch.randint(2, 290, (1, 20), generator=torch.Generator().manual_seed(3))
ATOL = 5e-5  # of a sum over tens of rows, each within the numerics contract


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return build(transformers.LlamaConfig(**TINY))


def generated(model: Any, ids: torch.Tensor = IDS, new: int = 4, *, settings: Any = None, **options: Any) -> Any:
    with attnhook.capture(**options) as records:
        output = model.generate(
            ids,
            **{"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, **(settings or {})},
        )
    return records, output


def check(
    mass: KeyMass, attention: dict[int, torch.Tensor], positions: Sequence[int], *, sequence: int = 0, pad: int = 0
) -> None:
    """Sums [keys] of each layer against the columns of ``attention`` [B, q, kv], over these rows."""
    assert mass.rows == len(positions) > 0 and mass
    rows = torch.tensor(positions)
    for layer, own in mass.items():
        wanted = attention[layer][sequence, pad + rows, pad : pad + max(positions) + 1].double().sum(0).numpy()
        assert own.dtype == np.float32 and own.shape == wanted.shape
        assert np.allclose(own, wanted, atol=ATOL), np.abs(own - wanted).max()


def positions_of(records: Sequence[TokenRecord]) -> list[int]:
    return [record.query_position for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    make, implementation, _ = FAMILIES[family]
    model = build(make(), implementation)
    ids = torch.randint(2, 290, (2, 30), generator=torch.Generator().manual_seed(1))
    pads = [0, 11]
    mask = torch.stack([(torch.arange(30) >= pad).long() for pad in pads])
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    plain = model.generate(ids * mask, **options)
    full = torch.cat([mask, torch.ones(2, NEW - 1, dtype=torch.long)], dim=1)
    heads = TINY["num_attention_heads"]
    for asked in ("mean", "kv_head"):
        with attnhook.capture(layers="all", prompt=True, key_mass=asked) as records:
            output = model.generate(ids * mask, **options)
        assert torch.equal(plain, output) and len(records.key_mass) == 2
        for b, pad in enumerate(pads):
            mine = [record for record in records if record.request_id.endswith(f"-{b}")]
            mass = records.key_mass[mine[0].request_id]
            assert list(mass) == list(range(4))
            groups = 1 if asked == "mean" else mass[0].shape[0]
            each = [tuple(range(g * heads // groups, (g + 1) * heads // groups)) for g in range(groups)]
            attention = oracle.eager_attention_of(model, output[:, :-1], full, selections=each)
            for g, own in enumerate(each):
                part = mass if asked == "mean" else KeyMass({n: m[g] for n, m in mass.items()}, mass.rows)
                check(part, attention[own], positions_of(mine), sequence=b, pad=pad)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk_size": 6},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("options", "positions"),
    [
        ({"prompt": True}, list(range(23))),
        ({}, [19, 20, 21, 22]),
        ({"stride": 2}, [19, 21]),
        ({"rows": [(3, 6), (17, 20)]}, [3, 4, 5, 17, 18, 19, 20, 21, 22]),
        ({"rows": [(3, 6), (17, 20)], "max_tokens": 0}, [3, 4, 5, 17, 18, 19]),
        ({"rows": [(3, 6)], "max_tokens": 0}, [3, 4, 5]),
        ({"prompt": True, "max_tokens": 0}, list(range(20))),
        ({"prompt": True, "heads": [1, 4]}, list(range(23))),
    ],
    ids=str,
)
def test_the_rows_that_are_captured_are_added_up(
    llama: torch.nn.Module, settings: dict[str, Any], options: dict[str, Any], positions: list[int]
) -> None:
    records, output = generated(llama, settings=settings, layers="all", key_mass="mean", **options)
    assert positions_of(records) == positions
    selection = tuple(options["heads"]) if "heads" in options else None
    attention = oracle.eager_attention_of(llama, output[:, :-1], selections=[selection])[selection]
    check(records.key_mass[records[0].request_id], attention, positions)


def test_each_choice_has_its_own(llama: torch.nn.Module) -> None:
    torch.manual_seed(0)
    records, output = generated(
        llama, settings={"do_sample": True, "num_return_sequences": 3}, layers=[1], key_mass="mean"
    )
    attention = oracle.eager_attention(llama, output[:, :-1])
    request = records[0].request_id
    assert list(records.key_mass) == [(request, choice) for choice in range(3)]
    for choice in range(3):
        check(records.key_mass[request, choice], attention, [19, 20, 21, 22], sequence=choice)
    with pytest.raises(KeyError, match=r"has the choices \[0, 1, 2\]: ask for"):
        records.key_mass[request]


def test_a_loop_of_ones_own(llama: torch.nn.Module) -> None:
    with attnhook.capture(layers="all", prompt=True, key_mass="kv_head") as records, torch.no_grad():
        cache = llama(IDS[:, :12]).past_key_values
        for at in range(12, 20):
            llama(IDS[:, at : at + 1], past_key_values=cache)
    assert [*records.key_mass] == [records[0].request_id]
    (mass,) = records.key_mass.values()
    assert {own.shape for own in mass.values()} == {(2, 20)}
    attention = oracle.eager_attention(llama, IDS)
    mean = KeyMass({layer: own.mean(0) for layer, own in mass.items()}, mass.rows)
    check(mean, attention, list(range(20)))


def test_positions_that_are_never_reported_are_told_of_no_key(llama: torch.nn.Module) -> None:
    records, _ = generated(llama, key_mass="mean", mask_prefix=7)
    (mass,) = records.key_mass.values()
    (own,) = mass.values()
    assert np.isnan(own[:7]).all() and np.isfinite(own[7:]).all() and own.shape == (23,)


def test_other_heads_in_each_layer(llama: torch.nn.Module) -> None:
    records, output = generated(llama, heads={1: [0], 3: [2, 5]}, layers="all", key_mass="mean", prompt=True)
    found = oracle.eager_attention_of(llama, output[:, :-1], selections=[None, (0,), (2, 5)])
    attention = {layer: found[{1: (0,), 3: (2, 5)}.get(layer)][layer] for layer in range(4)}
    check(records.key_mass[records[0].request_id], attention, list(range(23)))


def test_records_are_what_they_are_without(llama: torch.nn.Module) -> None:
    asked, _ = generated(llama, layers="all", prompt=True, key_mass="kv_head", per_head=["top", "spans"])
    plain, _ = generated(llama, layers="all", prompt=True, per_head=["top", "spans"])
    assert len(asked) == len(plain) == 23
    for one, other in zip(asked, plain, strict=True):
        assert np.array_equal(one.token_positions, other.token_positions)
        assert np.array_equal(one.attention_scores, other.attention_scores)
        assert np.array_equal(one.fingerprints, other.fingerprints)


def test_a_request_of_which_a_row_is_dropped_has_none(llama: torch.nn.Module) -> None:
    def poison(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1, 4] = torch.nan  # the fifth row of the second sequence
        return output

    handle = llama.model.layers[2].self_attn.q_proj.register_forward_hook(poison)
    try:
        with attnhook.capture(layers=[1, 2], prompt=True, key_mass="mean") as records, torch.no_grad():
            llama(IDS.repeat(2, 1))
    finally:
        handle.remove()
    assert records.dropped == {"nan": 1, "key_mass": 1}
    first = [record for record in records if record.request_id.endswith("-0")]
    assert list(records.key_mass) == [first[0].request_id] and len(records) == 39
    check(records.key_mass[first[0].request_id], oracle.eager_attention(llama, IDS), list(range(20)))


def test_who_did_not_ask_is_told_so(llama: torch.nn.Module) -> None:
    records, _ = generated(llama)
    assert not records.key_mass and list(records.key_mass) == []
    with pytest.raises(KeyError, match=r"no key mass was asked for: capture\(key_mass='mean'\)"):
        records.key_mass[records[0].request_id]
    records, _ = generated(llama, key_mass="mean")
    with pytest.raises(KeyError, match="'other' has no key mass; there is one of"):
        records.key_mass["other"]


@pytest.mark.parametrize("value", ["max", "", 1, True, ["mean"]])
def test_bad_values_are_refused_by_name(llama: torch.nn.Module, value: Any) -> None:
    with pytest.raises(OptionError, match=r"key_mass=.* must be one of mean, kv_head, or false"):
        generated(llama, key_mass=value)


def test_sinks_alone_hold_none(tmp_path: Any) -> None:
    with pytest.raises(OptionError, match="key_mass='mean': sinks and observers get records, which have no key mass"):
        attnhook.install(sinks=f"jsonl:{tmp_path}/a.jsonl", key_mass="mean")
    assert not attnhook.process.lifecycle.installed()


def test_a_backend_that_tells_none_is_refused() -> None:
    sums = KeySums(kv_heads=False)
    sums.check({})
    with pytest.raises(UnsupportedError, match="key_mass of request a, choice 0: 0 rows were added up and 3 were cap"):
        sums.check({("a", 0): 3})


@pytest.mark.slow
@pytest.mark.model
def test_smollm2(smol: Any, tokenizer: Any, long_text: str) -> None:
    ids = torch.tensor([tokenizer(long_text)["input_ids"][:600]])
    records, output = generated(smol, ids, layers="all", prompt=True, key_mass="mean")
    attention = oracle.eager_attention(smol, output[:, :-1])
    mass = records.key_mass[records[0].request_id]
    assert len(mass) == 30
    check(mass, attention, list(range(603)))
    by_group, _ = generated(smol, ids, layers=[3, 29], rows=[(580, 600)], key_mass="kv_head")
    found = by_group.key_mass[by_group[0].request_id]
    each = [tuple(range(3 * g, 3 * g + 3)) for g in range(3)]
    attention = oracle.eager_attention_of(smol, output[:, :-1], selections=each)
    for g, own in enumerate(each):
        part = KeyMass({layer: mass[g] for layer, mass in found.items()}, found.rows)
        check(part, attention[own], list(range(580, 603)))
