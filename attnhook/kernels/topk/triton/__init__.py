"""Top-k attention as Triton kernels: the path for GPUs."""

from attnhook.kernels.topk.triton.kernel import attention_rows, reduce_rows, topk_attention

__all__ = ["attention_rows", "reduce_rows", "topk_attention"]
