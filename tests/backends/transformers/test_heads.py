"""What is told of each query head by itself, against eager attention head by head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import attnhook
from attnhook import OptionError, TokenRecord
from attnhook.options import PER_HEAD
from tests import oracle
from tests.backends.transformers.test_families import FAMILIES, NEW, TINY, build


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_head_equals_eager(family: str) -> None:
    make, implementation, windows = FAMILIES[family]
    model = build(make(), implementation)
    ids = torch.randint(2, 290, (2, 30), generator=torch.Generator().manual_seed(1))
    pads = [0, 11]
    mask = torch.stack([(torch.arange(30) >= pad).long() for pad in pads])
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    plain = model.generate(ids * mask, **options)
    asked = {"layers": "all", "prompt": True, "spans": oracle.SPANS, "top_k": 4}
    with attnhook.capture(per_head=PER_HEAD, top_k_per_head=5, **asked) as records:
        output = model.generate(ids * mask, **options)
    with attnhook.capture(**asked) as bare:
        model.generate(ids * mask, **options)
    assert torch.equal(plain, output)

    count = records[0].head_positions.shape[1]
    full = torch.cat([mask, torch.ones(2, NEW - 1, dtype=torch.long)], dim=1)
    attention = oracle.eager_attention_of(model, output[:, :-1], full, selections=[(h,) for h in range(count)])
    assert count == TINY["num_attention_heads"] and len(records) == len(bare) > 50
    for b, pad in enumerate(pads):
        mine = [r for r in records if r.request_id.endswith(f"-{b}")]
        for h in range(count):
            worst = oracle.compare(
                oracle.of_head(mine, h),
                attention[(h,)],
                sequence=b,
                pad=pad,
                top_k=5,
                windows=windows,
                sinks="sinks" in family,
            )
            oracle.check(worst)
    for one, other in zip(records, bare, strict=True):  # and the mean is what it is without
        assert np.allclose(one.attention_scores, other.attention_scores, atol=2e-6)
        assert np.allclose(one.fingerprints, other.fingerprints, atol=1e-5)
        assert np.isfinite(one.head_lse).all() and other.head_lse is None


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return build(transformers.LlamaConfig(**TINY))


IDS = torch.randint(2, 290, (1, 20), generator=torch.Generator().manual_seed(3))


def captured(model: torch.nn.Module, **options: object) -> list[TokenRecord]:
    with attnhook.capture(**options) as records, torch.no_grad():
        model(IDS)
    return list(records)


def test_only_what_is_asked_for_is_told(llama: torch.nn.Module) -> None:
    fields = {
        "spans": {"head_span_mass"},
        "fingerprint": {"head_fingerprints"},
        "sink": {"head_sink_mass"},
        "top": {"head_positions", "head_scores"},
        "lse": {"head_lse"},
    }
    assert list(fields) == list(PER_HEAD)
    for told, names in fields.items():
        (record,) = captured(llama, per_head=[told], spans={"a": (0, 4), "b": (4, 9)}, layers=[0, 2])
        there = {name for name, value in vars(record).items() if name.startswith("head_") and value is not None}
        assert there == names
        assert all(getattr(record, name).shape[:2] == (2, 6) for name in names)
    (record,) = captured(llama, per_head=["top"])
    assert record.head_positions.shape == (1, 6, 1)  # one position of each unless more are asked for
    (record,) = captured(llama, per_head=["spans"])
    assert record.head_span_mass is None  # no span was named


def test_positions_that_are_never_reported_are_not_reported_of_a_head(llama: torch.nn.Module) -> None:
    (record,) = captured(llama, per_head=["top"], top_k_per_head=16, mask_prefix=15)
    kept = record.head_positions[record.head_positions >= 0]
    assert kept.size == 6 * 5 and kept.min() == 15


def test_heads_of_the_mean_do_not_change_what_is_told_of_each(llama: torch.nn.Module) -> None:
    (whole,), (some,) = (captured(llama, per_head=PER_HEAD, heads=heads) for heads in (None, [1, 4]))
    assert np.allclose(whole.head_fingerprints, some.head_fingerprints, atol=1e-6)
    assert np.allclose(some.head_fingerprints[0, [1, 4]].mean(axis=0)[4:], some.fingerprints[0, 4:], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_head": ["span"]}, r"per_head=\['span'\] must be a list of spans, fingerprint, sink, top, lse"),
        ({"per_head": "spans"}, "per_head='spans' must be a list"),
        ({"per_head": [1]}, "must be a list"),
        ({"per_head": ["top"], "top_k_per_head": 0}, "top_k_per_head=0 must be a whole number from 1 to 16"),
        ({"per_head": ["top"], "top_k_per_head": 17}, "top_k_per_head=17 must be a whole number from 1 to 16"),
        ({"per_head": ["top"], "top_k_per_head": True}, "top_k_per_head=True must be"),
        ({"per_head": ["lse"], "mode": "fingerprint"}, r"per_head=\['lse'\] with mode='fingerprint'.*mode='raw'"),
    ],
)
def test_bad_options_are_refused_by_name(llama: torch.nn.Module, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        captured(llama, **options)


def test_a_default_gives_way_to_who_asks_for_fingerprints(
    llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNHOOK_PER_HEAD", "top,sink")
    monkeypatch.setenv("ATTNHOOK_TOP_K_PER_HEAD", "3")
    (record,) = captured(llama)
    assert record.head_positions.shape == (1, 6, 3) and record.head_sink_mass is not None
    (record,) = captured(llama, mode="fingerprint")
    assert record.head_positions is None
    monkeypatch.setenv("ATTNHOOK_MODE", "fingerprint")
    with pytest.raises(OptionError, match=r"ATTNHOOK_PER_HEAD=.* with ATTNHOOK_MODE='fingerprint'"):
        captured(llama)
