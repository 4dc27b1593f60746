"""Triton's interpreter stands in for a GPU; the choice must be made before Triton is first imported."""

from __future__ import annotations

import os
import sys

import pytest
import torch

_INTERPRET = "TRITON_INTERPRET"

if not torch.cuda.is_available():
    if "triton" in sys.modules and _INTERPRET not in os.environ:
        raise RuntimeError(
            "triton was imported before tests/kernels/conftest.py, so its library is not interpreted: "
            f"set {_INTERPRET}=1 for this test run, or run tests/kernels on its own"
        )
    before = os.environ.get(_INTERPRET)
    os.environ[_INTERPRET] = "1"
    # read while kernels are decorated, ours and Triton's own
    import attnhook.kernels.topk.triton  # noqa: F401

    if before is None:
        del os.environ[_INTERPRET]
    else:
        os.environ[_INTERPRET] = before


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton imports parts of itself late; engines that other tests start must not inherit the variable."""
    if not torch.cuda.is_available():
        monkeypatch.setenv(_INTERPRET, "1")
