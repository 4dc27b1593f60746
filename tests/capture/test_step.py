"""One forward step of an engine, without one."""

from __future__ import annotations

from typing import Any

import pytest

from attnhook import UnsupportedError
from attnhook.capture.rows import Row
from attnhook.capture.step import StepCapture
from attnhook.options import RequestOptions


def step_of(**options: Any) -> StepCapture:
    rows = [Row("r", 0, 40, 0, 0)]
    return StepCapture(rows, [3, 7], RequestOptions(**options), "model")


@pytest.mark.parametrize("together", [True, False])
def test_layers_with_other_numbers_of_heads_are_refused_where_heads_are_asked_for(together: bool) -> None:
    from tests.kernels.cases import build  # which brings Triton in: tests/kernels must import it first

    layers = [build([(0, 40)], heads=heads, top_k=4).layer for heads in ((6, 2), (4, 2))]

    def add(step: StepCapture) -> None:
        if together:
            step.add_layers([3, 7], layers)
        else:
            for number, layer in zip([3, 7], layers, strict=True):
                step.add_layers([number], [layer])

    with pytest.raises(UnsupportedError, match=r"different numbers of query heads, \{3: 6, 7: 4\} by layer.*alike"):
        add(step_of(per_head=("top",)))
    mean = step_of()
    add(mean)
    (record,) = mean.records(lambda *_: None)
    assert record.layers == (3, 7) and record.head_positions is None


@pytest.mark.parametrize("together", [True, False])
def test_layers_with_other_numbers_of_kv_heads_are_refused_where_their_sums_are_asked_for(together: bool) -> None:
    from tests.kernels.cases import build

    layers = [build([(0, 40)], heads=heads, top_k=4).layer for heads in ((6, 2), (6, 3))]

    def add(step: StepCapture) -> None:
        if together:
            step.add_layers([3, 7], layers)
        else:
            for number, layer in zip([3, 7], layers, strict=True):
                step.add_layers([number], [layer])

    with pytest.raises(
        UnsupportedError, match=r"different numbers of kv heads, \[2, 3\]: choose layers that are alike"
    ):
        add(step_of(key_mass="kv_head"))
    mean = step_of(key_mass="mean")
    add(mean)
    (record,) = mean.records(lambda *_: None)
    (added,) = mean.key_mass()
    assert record.layers == added.layers == (3, 7) and added.mass is not None and added.mass.shape == (2, 1, 41)
    assert added.mass.sum(axis=2) == pytest.approx(1, abs=1e-5)
