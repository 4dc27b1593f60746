"""Several layers of one step give what each of them gives alone, whether they come together or in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attnhook.kernels import topk
from attnhook.kernels.topk import PerHead, Selection, TopK, TopKStep
from attnhook.kernels.topk.numba import again
from tests.kernels.cases import Case, assert_close, assert_same, build, heads_as_rows

ROWS = [(0, 40), (1, 130), (0, 0)]
PROMPT = [(0, p) for p in range(20, 40)]
SHARED: dict[str, Any] = {
    "top_k": 6,
    "spans": torch.tensor([[[0, 10], [5, 41]], [[100, 200], [7, 7]]]),
    "first_reported": torch.tensor([2, 50]),
    "head_mask": torch.tensor([True, False, True, True]),
}


def cases(rows: list[tuple[int, int]], **shared: Any) -> list[Case]:
    """Layers that differ in their keys, and some in what else a layer may have of its own."""
    own: list[dict[str, Any]] = [
        {}, {"scale": 0.4}, {"softcap": 3.0}, {"window": 7}, {"sinks": torch.linspace(-1, 1, 4)},
        {"alibi_slopes": torch.linspace(0.01, 0.5, 4)}, {"k_scale": torch.tensor([0.5, 1.5])},
        {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"page_size": 8}, {"layout": "k_transposed"},
        {"heads": (8, 2)} if "head_mask" not in shared else {}, {},
    ]  # fmt: skip
    return [build(rows, seed=n, **{**shared, **options}) for n, options in enumerate(own)]


def alone(case: Case) -> TopK:
    return topk.topk_attention(case.q, case.keys, case.row_request, case.row_position, **case.options)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("shared", [{}, SHARED])
@pytest.mark.parametrize("kernel", ["compiled", "torch", "naive"])
@pytest.mark.parametrize("rows", [ROWS, PROMPT, ROWS + PROMPT])
def test_layers_of_a_step(
    rows: list[tuple[int, int]], kernel: str, shared: dict[str, Any], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNHOOK_KERNEL", kernel)
    if rows is PROMPT:  # one request
        shared = {name: x[:1] if name in ("spans", "first_reported") else x for name, x in shared.items()}
    layers = cases(rows, **shared)
    step = TopKStep(layers[0].row_request, layers[0].selection)
    if together:
        got = step([case.layer for case in layers])
    else:
        got = [result for case in layers for result in step([case.layer])]
    for case, result in zip(layers, got, strict=True):
        assert_same(result, alone(case), 2e-6)


def test_a_decoding_step_prepares_its_jobs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_KERNEL", "compiled")
    made: list[int] = []
    whole = again.Again.__init__

    def prepare(self: Any, shared: Any, layers: Any) -> None:
        made.append(len(shared.request))
        whole(self, shared, layers)

    first = build(ROWS, seed=1)
    # layers of a model: other keys and queries, the same positions, windows and page table
    layers = [replace(first, q=build(ROWS, seed=n).q) for n in range(4)]
    layers = [replace(case, keys=replace(case.keys, cache=case.keys.cache + 0.01 * n)) for n, case in enumerate(layers)]
    step = TopKStep(first.row_request, Selection(8))
    monkeypatch.setattr(again.Again, "__init__", prepare)
    got = [step([case.layer])[0] for case in layers]
    assert made == [len(ROWS)]
    for case, result in zip(layers, got, strict=True):
        assert_same(result, alone(case), 1e-7)


@pytest.mark.parametrize("per_head", [PerHead(), PerHead(12, True, True, True)], ids=["mean", "heads"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_serves_later_passes_of_the_same_requests(
    count: int, per_head: PerHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in decoding: other positions, pages and queries; the scratch has to grow on the way."""
    monkeypatch.setenv("ATTNHOOK_KERNEL", "compiled")
    made: list[Any] = []
    whole = again.Again.__init__
    monkeypatch.setattr(again.Again, "__init__", lambda self, *args: (made.append(args), whole(self, *args))[1])
    spans = torch.tensor([[[0, 1], [20, 60]], [[0, 1], [0, 3]]])
    step = TopKStep(torch.tensor([0, 1]), Selection(8, spans=spans, per_head=per_head))
    for turn, positions in enumerate([[30, 90], [31, 91], [1500, 2], [1501, 2030]]):
        # as many pages in every pass
        first = build([(0, 2040), (1, 2040)], seed=7 + turn, spans=spans, per_head=per_head)
        place = torch.tensor(positions)
        layers = [
            replace(first, q=first.q + n, keys=replace(first.keys, cache=first.keys.cache + 0.01 * n))
            for n in range(count)
        ]
        layers = [replace(case, row_position=place) for case in layers]
        rows = [case.layer for case in layers]
        lent = step.again(rows)
        assert (lent is None) == (turn == 0)
        if lent is not None:
            lent = TopK(*(torch.from_numpy(x.copy()) for x in lent))
        got = step.stacked(rows)
        assert lent is None or all(torch.equal(x, y) for x, y in zip(lent, got, strict=True))
        for n, case in enumerate(layers):
            found, wanted = TopK(*(x[:, n] for x in got)), alone(case)
            assert_same(found, wanted, 1e-7)
            if per_head.scores:
                assert_same(heads_as_rows(found), heads_as_rows(wanted), 1e-7)
                assert_close("log-sum-exp", found.head_lse, wanted.head_lse, 1e-5)
    assert sum(shared is step._step for shared, _ in made) == 1


@pytest.mark.parametrize("kernel", ["compiled", "torch"])
def test_layers_with_windows_of_their_own_at_the_same_positions(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Gemma, layer after layer and all at once."""
    monkeypatch.setenv("ATTNHOOK_KERNEL", kernel)
    first = build(ROWS, seed=3)
    windows: list[Any] = [-1, 7, -1, torch.tensor([5, 9, -1]), 7, 3]
    layers = [replace(first, options={**first.options, "window": window}) for window in windows]
    step = TopKStep(first.row_request, Selection(8))
    expected = [alone(case) for case in layers]
    in_turn = [result for case in layers for result in step([case.layer])]
    for got in (in_turn, step([case.layer for case in layers]), in_turn):
        for one, wanted in zip(got, expected, strict=True):
            assert_same(one, wanted, 1e-7)
