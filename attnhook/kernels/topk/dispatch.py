"""Which kernel computes: by device, unless ``ATTNHOOK_KERNEL`` names one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

from attnhook.errors import OptionError
from attnhook.options import KERNELS

#: Where a kernel of ``ATTNHOOK_KERNEL`` lies: a folder per library.
_PLACES = {"compiled": "numba"}


def implementation(device: str) -> Any:
    """The module that computes on a kind of device. Raises OptionError where ATTNHOOK_KERNEL names none."""
    forced = os.environ.get("ATTNHOOK_KERNEL")
    if forced and forced not in KERNELS:
        raise OptionError("ATTNHOOK_KERNEL", f"ATTNHOOK_KERNEL={forced!r} is not one of {', '.join(KERNELS)}")
    return kernel(forced or _kernel_for(device))


@cache
def kernel(name: str) -> Any:
    """The module of one of `KERNELS`: it has ``topk_attention`` and ``attention_rows``, and whatever else it can."""
    return importlib.import_module(f"attnhook.kernels.topk.{_PLACES.get(name, name)}")


@cache
def _kernel_for(device: str) -> str:
    """The fastest kernel for a kind of device among those whose library is installed."""
    if device in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None:
        return "triton"
    if device == "cpu" and importlib.util.find_spec("numba") is not None:
        return "compiled"
    return "torch"
