"""The process's own choice of coarse float32 products does not reach ours."""

from __future__ import annotations

import pytest
import torch

from attnhook.kernels.topk import LayerRows, PagedKeys, Selection, Softmax, naive
from attnhook.kernels.topk import torch as torch_kernel


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_matmul_precision_changes_nothing(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(64, 6, 64, generator=generator)
    keys = PagedKeys.from_dense(torch.randn(1, 2, 256, 64, generator=generator))
    layer = LayerRows(q, keys, torch.arange(192, 256), Softmax(0.125))
    rows = layer, torch.zeros(64, dtype=torch.int32), Selection(8)
    used = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = torch_kernel.topk_attention(*rows)
    finally:
        torch.set_float32_matmul_precision(used)
    expected = naive.topk_attention(*rows)
    assert torch.allclose(got.scores.double(), expected.scores, rtol=0, atol=2e-6)
    assert torch.allclose(got.histogram.double(), expected.histogram, rtol=0, atol=2e-6)
