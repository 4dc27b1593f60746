"""Exact top-k attention and full-distribution features of query rows over paged keys.

One operation, written four times with one signature: `naive` is its definition, ``torch/``, ``numba/`` and ``triton/``
are folders that bear the name of the library they compute with. `topk_attention` takes the fastest for the device:
Triton on GPUs, loops compiled by numba on CPUs, vectorised torch elsewhere and where numba is not installed.
``ATTNHOOK_KERNEL=compiled|naive|torch|triton`` forces one, which is how they are compared.
"""

# Here the names torch, numba and triton are the folders, as soon as one is imported: this module must not import the
# libraries. Elsewhere imports are absolute, so that they are the libraries.
from attnhook.kernels.topk.step import TopKStep, topk_attention
from attnhook.kernels.topk.types import LayerRows, PagedKeys, PerHead, PerKey, Selection, Softmax, TopK
from attnhook.options import KERNELS

__all__ = [
    "KERNELS",
    "LayerRows",
    "PagedKeys",
    "PerHead",
    "PerKey",
    "Selection",
    "Softmax",
    "TopK",
    "TopKStep",
    "topk_attention",
]
