"""What holds for every batch: ranges, sums, and independence of batch order and of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attnhook.kernels.topk.types import TopK
from tests.kernels.cases import LAYOUTS, TOLERANCE, Case, assert_same, build, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# the interpreter takes up to a second per example, too long to look for smaller ones after a failure
EXAMPLES = {"compiled": 40, "compiled, products": 40, "torch": 40, "triton": 4}
PHASES = dict.fromkeys(EXAMPLES, tuple(Phase)) | {"triton": (Phase.explicit, Phase.generate)}

HEADS = [(1, 1), (2, 1), (4, 2), (6, 2), (9, 3)]


@st.composite
def batches(draw: st.DrawFn, *, alike: bool = False) -> dict[str, Any]:
    """Arguments of `build`; with ``alike``, options that do not depend on the request or the row."""
    rows = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 150)), min_size=1, max_size=3))
    heads = draw(st.sampled_from(HEADS))
    requests = max(r for r, _ in rows) + 1
    options: dict[str, Any] = {
        "rows": rows,
        "heads": heads,
        "head_dim": draw(st.sampled_from([8, 16, 24])),
        "page_size": draw(st.sampled_from([1, 3, 16])),
        "top_k": draw(st.integers(1, 12)),
        "window": draw(st.sampled_from([-1, 1, 10, 64])),
        "softcap": draw(st.sampled_from([0.0, 4.0])),
        "spread": draw(st.sampled_from([0.0, 1.0, 6.0])),
        "seed": draw(st.integers(0, 10_000)),
    }
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads[0], generator=torch.Generator().manual_seed(options["seed"]))
    if not alike:
        cut = draw(st.integers(0, 151))
        options["spans"] = torch.tensor([[[0, cut], [cut, 151]]] * requests)
        options["first_reported"] = torch.tensor(
            draw(st.lists(st.integers(0, 60), min_size=requests, max_size=requests))
        )
    return options


def for_each_kernel(test: Callable[[str, dict[str, Any]], None], **how: Any) -> Callable[[str], None]:
    """``test(kernel, batch)`` as a pytest test, with as many examples as the kernel has time for."""

    @pytest.mark.parametrize("kernel", EXAMPLES)
    def property_test(kernel: str) -> None:
        @settings(max_examples=EXAMPLES[kernel], phases=PHASES[kernel], deadline=None, derandomize=True, database=None)
        @given(batches(**how))
        def check(batch: dict[str, Any]) -> None:
            test(kernel, batch)

        check()

    property_test.__doc__ = test.__doc__
    return property_test


def ranges_and_sums(kernel: str, batch: dict[str, Any]) -> None:
    """Scores descend in [0, 1], no mass is lost or made, entropy is in [0, 1]."""
    got = run(kernel, build(**batch))
    assert (got.scores >= 0).all() and (got.scores <= 1 + TOLERANCE).all()
    assert (got.scores.diff(dim=1) <= 0).all()
    assert (got.histogram >= 0).all()
    total = got.histogram.sum(1)
    assert (got.scores.sum(1) <= total + TOLERANCE).all()
    if batch.get("sinks") is None:
        assert (total - 1).abs().max() <= TOLERANCE
    else:
        assert (total < 1).all() and (total > 0).all()
    # the two spans split all positions
    assert (got.span_mass.sum(1) - total).abs().max() <= TOLERANCE
    assert (got.entropy >= -TOLERANCE).all() and (got.entropy <= 1 + TOLERANCE).all()
    for t, (request, position) in enumerate(batch["rows"]):
        first = 0 if batch["window"] < 0 else max(0, position - batch["window"] + 1)
        first = max(first, int(batch["first_reported"][request]))
        reported = got.positions[t][got.positions[t] >= 0]
        assert len(reported) == min(batch["top_k"], max(0, position - first + 1))
        assert len(set(reported.tolist())) == len(reported)
        assert ((reported >= first) & (reported <= position)).all()


def order_of_the_batch(kernel: str, batch: dict[str, Any]) -> None:
    """Permuting the rows permutes the results."""
    case = build(**batch)
    order = torch.randperm(len(batch["rows"]), generator=torch.Generator().manual_seed(batch["seed"]))
    shuffled = replace(
        case, q=case.q[order], row_request=case.row_request[order], row_position=case.row_position[order]
    )
    assert_same(run(kernel, shuffled), TopK(*(x[order] for x in run(kernel, case))))


def pages_and_layouts(kernel: str, batch: dict[str, Any]) -> None:
    """Page size, page numbers and memory layout change nothing."""
    other: Case = build(**{**batch, "page_size": 5, "layout": LAYOUTS[batch["seed"] % len(LAYOUTS)]})
    assert_same(run(kernel, other), run(kernel, build(**batch)))


test_ranges_and_sums = for_each_kernel(ranges_and_sums)
test_order_of_the_batch = for_each_kernel(order_of_the_batch, alike=True)
test_pages_and_layouts = for_each_kernel(pages_and_layouts)
