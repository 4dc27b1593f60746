"""The kernels' benchmark measures what it says, at a size that costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from attnhook.kernels.topk import LayerRows, Selection, Softmax, TopK, naive
from benchmarks import kernels
from benchmarks.kernel_rivals import Size, log_sum_exp, make_inputs, probabilities
from tests.helpers import ROOT, environment

CPU = torch.device("cpu")
SMALL = Size(2, 256, 8, 2, 32)


def test_methods_are_timed_and_told() -> None:
    results = kernels.measure(SMALL, CPU, top_k=8, rounds=2)
    assert [x.method for x in results] == [
        kernels.OURS, "chunk maxima, mean logits (inexact)", kernels.NAIVE, "torch.topk alone, probabilities given",
    ]  # fmt: skip
    assert all(0 < x.fastest <= x.seconds <= x.slowest for x in results)
    assert all(x.key_bytes == 2 * 256 * 2 * 32 * 2 for x in results)
    text = kernels.table(results, {"device": "here"}, ["a size: no time left"], 8)
    assert "| 2 x 256 keys, 8/2 heads, D 32 | attnhook |" in text and "Not measured: a size" in text
    json.dumps([asdict(x) for x in results])


def test_the_inputs_are_one_batch_in_two_forms() -> None:
    inputs = kernels.in_order(make_inputs(SMALL, CPU))
    layer = LayerRows(inputs.q, inputs.paged, inputs.positions, Softmax(32**-0.5))
    exact = naive.topk_attention(layer, inputs.rows, Selection(256))
    dense = torch.zeros(2, 256, dtype=torch.float64).scatter_(1, exact.positions.long(), exact.scores)
    assert float((probabilities(inputs) - dense).abs().max()) < 2e-2  # its logits are bfloat16
    layer = layer._replace(softmax=Softmax(32**-0.5, lse=log_sum_exp(inputs)))
    told = naive.topk_attention(layer, inputs.rows, Selection(8))
    assert float((told.scores - exact.scores[:, :8]).abs().max()) < 1e-5


@pytest.mark.parametrize("spoil", ["histogram", "scores"])
def test_a_wrong_kernel_is_not_timed(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import kernel_rivals

    whole: Any = kernel_rivals.topk_attention

    def wrong(*arguments: Any, **options: Any) -> TopK:
        result = whole(*arguments, **options)
        return result._replace(**{spoil: getattr(result, spoil) * 0.8})

    monkeypatch.setattr(kernel_rivals, "topk_attention", wrong)
    with pytest.raises(AssertionError, match=r"mass is missing|not the naive answer"):
        kernels.measure(SMALL, CPU, top_k=8, rounds=1)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kernels.plot({"keys": [(1, 0.5), (2, 1.0)], "k": [(1, 0.5), (8, 0.5)]}, "a size", tmp_path)
    assert (tmp_path / "kernels.svg").read_text(encoding="utf-8").count("<path") > 4


def test_what_the_bars_are_about_comes_first() -> None:
    order = kernels.sizes(torch.device("cuda"), [8, 1, 64], None)
    assert order[0] == Size(8, 4096, 32, 8, 128) and len(order) == len(set(order)) == 4 * 3 * 6


BARE = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))  # as if they were not installed
from pathlib import Path
import torch
from benchmarks import kernels
print([x.method for x in kernels.measure(kernels.Size(1, 64, 4, 2, 16), torch.device("cpu"), top_k=4, rounds=1)])
"""


@pytest.mark.slow
def test_it_needs_no_package_but_torch() -> None:
    missing = ["pluggy", "wrapt", "rich", "typer", "numba", "matplotlib", "transformers"]
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(missing=missing)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and kernels.OURS in done.stdout, done.stderr
