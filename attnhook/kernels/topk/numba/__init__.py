"""Top-k attention on the CPU at compiled speed: loops that numba compiles, on the threads that torch computes with."""

from attnhook.kernels.topk.numba.kernel import Step, attention_rows, computes, topk_attention

__all__ = ["Step", "attention_rows", "computes", "topk_attention"]
