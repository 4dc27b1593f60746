"""Stands in, for tests only, for SGLang's compiled kernel package, which no registry has for this CPU.

SGLang's CPU engine computes everything in its own torch code where the machine has no AMX; two functions of
``sgl_kernel`` move numbers about, and these are here in plain torch. Every other name can be imported, as SGLang
does at start, and raises NotImplementedError when it is called: nothing is made up.
"""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

import torch

__version__ = "0+attnhook.tests"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    row_length: int,
) -> None:
    """Write each request's new slots, which lie one after the other in ``out_cache_loc``, into its row."""
    assert row_length == req_to_token.shape[1]
    at = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[at : at + end - start].to(req_to_token.dtype)
        at += end - start


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy slots ``src_loc`` to ``tgt_loc`` in every buffer; ``strides`` are bytes per slot."""
    for address, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        moved = [ctypes.string_at(address + source * size, size) for source in src_loc.tolist()]
        for target, data in zip(tgt_loc.tolist(), moved, strict=True):
            ctypes.memmove(address + target * size, data, size)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: the tests' stand-in does not compute this")

    missing.__name__ = missing.__qualname__ = name
    return missing
