"""Clocks around attnhook's hooks in SGLang's schedulers, for `benchmarks.in_engine --engine sglang`.

Every process of that engine imports it.

After each pass the sums go into the memory-mapped file IDLE_CLOCKS: seconds within, seconds without, the
calls of both, and the seconds in the innermost clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import wrapt

from benchmarks.clock import Clock

PER_STEP = (
    "worker.wrap_model_forward",
    "worker.wrap_forward_batch_generation",
    "worker.wrap_compute_max_prefix_len",
    "results.wrap_maybe_collect_customized_info",
)

innermost, within, without = Clock(), Clock(), Clock()


@wrapt.when_imported("attnhook.plugins.hooks")
def clock_hooks(module: Any) -> None:
    """Every hook of the schedulers between two clocks."""
    wrapped = module.Hooks._wrapped
    shared = np.memmap(os.environ["IDLE_CLOCKS"], dtype=np.float64, mode="r+", shape=(5,))

    def clocked(self: Any, hook: Any, original: Callable[..., Any]) -> Any:
        if hook.wrapper not in PER_STEP:
            return wrapped(self, hook, original)
        hooked = without.around(wrapped(self, hook, within.around(innermost.around(original))))
        return told(hooked) if hook.wrapper == "worker.wrap_forward_batch_generation" else hooked

    def told(hooked: Callable[..., Any]) -> Any:
        @wraps(hooked)
        def forward_batch_generation(*args: Any, **kwargs: Any) -> Any:
            result = hooked(*args, **kwargs)
            shared[:] = within.seconds, without.seconds, within.calls, without.calls, innermost.seconds
            return result

        return forward_batch_generation

    module.Hooks._wrapped = clocked


@wrapt.when_imported("attnhook.backends.sglang.worker")
def clock_attention(module: Any) -> None:
    """The attention backends' ``forward`` between two clocks."""
    observed = module._wrap_forward

    def _wrap_forward(original: Callable[..., Any], backend: Any) -> Any:
        return without.around(observed(within.around(innermost.around(original)), backend))

    module._wrap_forward = _wrap_forward
