"""Imported by the process that SGLang's test engines are forked from: its own processes are forks too.

SGLang asks for spawned ones, which import everything again (sglang/srt/entrypoints/engine.py); tests with ``fresh``
run it so.
"""

from __future__ import annotations

import multiprocessing
from typing import Any


def _fork(method: str | None, force: bool = False) -> Any:
    return None


multiprocessing.set_start_method("fork", force=True)
multiprocessing.set_start_method = _fork  # type: ignore[assignment]
