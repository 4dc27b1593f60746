"""Where the engine hands its log-sum-exp over, the answers are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnhook.kernels import topk
from attnhook.kernels.topk import TopKStep, naive
from tests.kernels.cases import TOLERANCE, Case, assert_equals_oracle, assert_same, build, first_visible, oracle, run
from tests.kernels.test_topk import CASES, PROMPT, SCATTERED, rand

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

KERNELS = ("naive", "compiled", "torch", "triton")
NAMES = (
    "one key", "unit and tile boundaries", "gqa 9:3", "mla 576", "window 7", "window over a unit's edge",
    "window per row", "window per row in a prompt", "prompt, everything", "sinks", "sinks that take everything",
    "wide softcap", "alibi", "k_scale per head", "heads per request", "everything", "int64 indices", "bf16, everything",
    "fp8", "fp8 mla",
)  # fmt: skip


def log_sum_exp(case: Case) -> torch.Tensor:
    """float64 [T, Hq]: what an engine's attention would return, by the definition."""
    softmax = case.layer.softmax
    # exp(z - 0) is what the oracle gives for a normaliser of 0: its logarithm is the logit
    logits = softmax._replace(sinks=None, lse=torch.zeros(case.q.shape[1]))
    sinks, window = softmax.sinks, softmax.window
    rows = []
    for t, (request, p) in enumerate(zip(case.row_request.tolist(), case.row_position.tolist(), strict=True)):
        first = first_visible(p, int(window[t]) if isinstance(window, torch.Tensor) else window)
        z = naive.head_probabilities(case.q[t], case.keys, request, p, first, logits)[0].log()
        if sinks is not None:
            z = torch.cat([z, sinks.double()[:, None]], dim=1)
        rows.append(torch.logsumexp(z, dim=1))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_engines_normaliser_gives_the_same(kernel: str, name: str) -> None:
    rows, arguments = CASES[name]
    case = build(rows, **arguments)
    lse = log_sum_exp(case)
    # a float32 near 1e4, as heavy sinks make it, says nothing closer than this
    tolerance = TOLERANCE + float(lse.abs().max()) * 2**-24
    got = run(kernel, case.with_options(lse=lse.float()))
    assert_equals_oracle(got, oracle(case), case.options["top_k"], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["naive", "triton"])
@pytest.mark.parametrize("rows", [SCATTERED, PROMPT])
def test_probabilities_are_as_true_as_the_normaliser(kernel: str, rows: list[tuple[int, int]]) -> None:
    case = build(rows)
    lse = log_sum_exp(case).float()
    plain = run(kernel, case.with_options(lse=lse))
    halved = run(kernel, case.with_options(lse=lse + math.log(2)))
    assert_same(halved._replace(entropy=plain.entropy), plain._replace(
        scores=plain.scores / 2, histogram=plain.histogram / 2
    ))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["naive", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_normaliser_breaks_its_row(kernel: str, bad: float) -> None:
    case = build(SCATTERED)
    lse = log_sum_exp(case).float()
    lse[1, 2] = bad
    assert run(kernel, case.with_options(lse=lse)).entropy.isnan().tolist() == [False, True, False]
    # of a head that nobody averages over it is not looked at
    mask = torch.tensor([True, True, False, True])
    got = run(kernel, case.with_options(lse=lse, head_mask=mask))
    assert_equals_oracle(got, oracle(case.with_options(head_mask=mask)), case.options["top_k"], TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU")
@pytest.mark.parametrize("kernel", ["triton", "compiled", "torch"])
def test_layers_of_a_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_KERNEL", kernel)
    case = build(SCATTERED, sinks=rand(4))
    lse = log_sum_exp(case).float()
    wide = torch.zeros(3, 8)
    wide[:, ::2] = lse  # strided, as engines return it
    step = TopKStep(case.row_request, case.selection)
    for result in step([case.with_options(lse=given).layer for given in (None, lse, wide[:, ::2])]):
        assert_equals_oracle(result, oracle(case), 8, TOLERANCE)


@pytest.mark.parametrize(
    ("lse", "message"),
    [
        (torch.zeros(2, 2), r"lse must have shape \[2, 4\], got \[2, 2\]"),
        (torch.zeros(4, 2), r"lse must have shape \[2, 4\], got \[4, 2\]"),
        (torch.zeros(2, 4, device="meta"), "lse is on meta, q is on cpu: move it there"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), "lse is torch.bfloat16: a normaliser in less than float32"),
    ],
)
def test_a_normaliser_of_another_shape_is_refused(lse: torch.Tensor, message: str) -> None:
    case: Any = build([(0, 3), (1, 4)])
    with pytest.raises(ValueError, match=message):
        topk.topk_attention(case.q, case.keys, case.row_request, case.row_position, lse=lse, **case.options)
