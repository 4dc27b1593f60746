"""Top-k attention as vectorised torch: the path for devices without Triton, and for CPUs without numba."""

from attnhook.kernels.topk.torch.kernel import attention_rows, topk_attention
from attnhook.kernels.topk.types import gather  # was here as ``attnhook.kernels.topk.cpu.gather``; goes in 0.3

__all__ = ["attention_rows", "gather", "topk_attention"]
