"""Once per attention module and kind of attention: does the model compute the formula that we report?"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from attnhook.backends.transformers.masks import Visible
from attnhook.capture.rebuild import KEYS_THAT_TELL, check_output

_checked: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def check_layer(
    module: Any,
    kind: str,
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence: int,
    seen: Visible,
    softmax: dict[str, Any],
    output: torch.Tensor,
) -> None:
    """Check one row of ``module`` once per kind of attention function.

    ``q`` [Hq, D] and ``output`` [Hq, Dv] belong to the last row of ``seen``, a row of sequence ``sequence``;
    ``key`` and ``value`` are [B, Hkv, N, D].
    Raises UnsupportedError where the engine computes something else than the formula.
    """
    done = _checked.setdefault(module, set())
    if kind in done or module.training:  # dropout
        return
    slot, count = int(seen.last[-1]), int(seen.count[-1])
    keys = slice(slot + 1 - count, slot + 1)
    what = f"{type(module).__name__} (layer {module.layer_idx}, {kind} attention)"
    error = check_output(what, q, key[sequence, :, keys], value[sequence, :, keys], output, **softmax)
    if error is not None and count >= KEYS_THAT_TELL:
        done.add(kind)
