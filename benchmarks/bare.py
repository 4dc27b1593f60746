"""Import this before `attnhook.kernels` where attnhook itself is not installed, as on a borrowed GPU machine.

The kernels need torch, numpy and on a GPU triton; the package around them needs more (pluggy, wrapt), which is left
out here if it is missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_NEEDS = ("pluggy", "wrapt")


def _missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ValueError:  # None in sys.modules
        return True


if "attnhook" not in sys.modules and any(_missing(name) for name in _NEEDS):
    package = ModuleType("attnhook")
    package.__path__ = [str(Path(__file__).parents[1] / "attnhook")]
    sys.modules["attnhook"] = package
