"""What is told of each query head by itself, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnhook.kernels.topk import naive, topk_attention
from attnhook.kernels.topk.types import PerHead
from tests.kernels.cases import (
    TOLERANCE,
    Case,
    assert_close,
    assert_equals_oracle,
    assert_same,
    build,
    heads_as_rows,
    run,
)
from tests.kernels.test_topk import CASES, FEATURES, PROMPT, SCATTERED, WAYS

ALL = PerHead(top_k=3, fingerprint=True, spans=True, lse=True)
# the interpreter computes with numpy, which warns where the kernels mean to overflow or to keep a NaN
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

AWKWARD = (
    "one key", "two keys", "k above the keys", "unit and tile boundaries", "gqa 9:3", "mqa", "mla 576", "window 1",
    "window over a unit's edge", "window per row", "window per row in a prompt", "prompt, everything",
    "heavy sinks", "sinks that take everything", "softcap", "heads of one kv head",
    "heads per request", "many spans", "first_reported under the window", "everything", "peaked", "bf16, everything",
    "fp8, one scale", "layout k_transposed", "fused queries", "k_scale per head",
)  # fmt: skip


def assert_heads(kernel: str, case: Case, asked: PerHead = ALL, tolerance: float = TOLERANCE) -> Any:
    """Every number of every head against the oracle's, and the mean as if no head had been asked for."""
    got = run(kernel, case.with_options(per_head=asked))
    whole = naive.topk_attention(*case.with_options(per_head=ALL._replace(top_k=case.keys.max_keys)).arguments)
    assert_equals_oracle(heads_as_rows(got), heads_as_rows(whole), asked.top_k, tolerance)
    assert got.head_positions.shape[:2] == case.q.shape[:2]
    scale = whole.head_lse.abs().clamp(min=1)
    assert_close("log-sum-exp", got.head_lse / scale, whole.head_lse / scale, tolerance)
    assert_same(got, run(kernel, case))
    return got


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("name", AWKWARD)
def test_each_head_is_the_oracles(kernel: str, name: str) -> None:
    rows, arguments = CASES[name]
    assert_heads(kernel, build(rows, **arguments))


@pytest.mark.parametrize(
    "kernel", [pytest.param(way, marks=[pytest.mark.long] * way.startswith("triton")) for way in WAYS]
)
def test_each_head_of_long_prompts_between_single_rows(kernel: str) -> None:
    rows, arguments = CASES["long prompts between single rows"]
    assert_heads(kernel, build(rows, **arguments))


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("rows", [SCATTERED, PROMPT], ids=["decoding", "prompt"])
def test_what_is_asked_for_alone_is_what_it_is_among_others(kernel: str, rows: list[tuple[int, int]]) -> None:
    case = build(rows, **FEATURES)
    together = run(kernel, case.with_options(per_head=ALL))
    for asked, names in (
        (PerHead(top_k=3), {"head_positions", "head_scores"}),
        (PerHead(fingerprint=True), {"head_histogram", "head_entropy"}),
        (PerHead(spans=True), {"head_span_mass"}),
        (PerHead(lse=True), {"head_lse"}),
        (PerHead(), set()),
    ):
        alone = run(kernel, case.with_options(per_head=asked))
        for name in alone._fields:
            if name.startswith("head_") and name not in names:
                assert alone._asdict()[name].numel() == 0, name
            else:
                assert torch.equal(alone._asdict()[name], together._asdict()[name]), name


@pytest.mark.parametrize("kernel", WAYS)
def test_equal_keys_go_to_the_lower_position(kernel: str) -> None:
    case = build(SCATTERED, integers=True)
    got, want = (
        heads_as_rows(found)
        for found in (
            run(kernel, case.with_options(per_head=PerHead(top_k=16))),
            naive.topk_attention(*case.with_options(per_head=PerHead(top_k=16)).arguments),
        )
    )
    assert torch.equal(got.positions, want.positions)


@pytest.mark.parametrize("kernel", WAYS)
def test_the_mean_over_heads_is_the_mean(kernel: str) -> None:
    case = build(SCATTERED, heads=(9, 3), spans=torch.tensor([[[0, 1], [3, 40]], [[0, 1], [100, 120]]]))
    got = run(kernel, case.with_options(per_head=ALL))
    assert_close("spans", got.head_span_mass.mean(1), got.span_mass, TOLERANCE)
    assert_close("histogram", got.head_histogram.mean(1), got.histogram, TOLERANCE)


@pytest.mark.parametrize("kernel", WAYS)
def test_a_logit_is_rebuilt_from_a_probability(kernel: str) -> None:
    case = build([(0, 40)], heads=(4, 2), head_dim=16, page_size=64)
    got = run(kernel, case.with_options(per_head=PerHead(top_k=1, lse=True)))
    k = case.keys.pages(16)[int(case.keys.page_table[0, 0])].repeat_interleave(2, dim=1)  # [64, Hq, D]
    for h in range(4):
        logit = got.head_scores[0, h, 0].log() + got.head_lse[0, h]
        wanted = case.q[0, h] @ k[int(got.head_positions[0, h, 0]), h] * case.options["scale"]
        assert float(logit) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("kernel", WAYS)
def test_a_head_that_nobody_averages_over_can_break_a_row(kernel: str) -> None:
    """Its numbers are told, so they must be numbers."""
    case = build(SCATTERED, head_mask=torch.tensor([True, True, False, False]))
    case.q[1, 3, 0] = float("inf")
    got = run(kernel, case.with_options(per_head=ALL))
    told = torch.stack([got.head_entropy.sum(1), got.head_lse.sum(1), got.head_span_mass.sum((1, 2))])
    assert not torch.isfinite(got.entropy + told.sum(0))[1]
    assert torch.isfinite(got.entropy + told.sum(0))[[0, 2]].all()


@pytest.mark.parametrize("kernel", ["compiled", "torch", "triton"])
def test_a_negative_number_of_keys_is_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_KERNEL", kernel)
    case = build(SCATTERED)
    with pytest.raises(ValueError, match=r"per_head\.top_k must be at least 0, got -1"):
        topk_attention(
            case.q, case.keys, case.row_request, case.row_position, top_k=1, scale=1.0, per_head=PerHead(top_k=-1)
        )
