"""The check that needs no oracle: rebuild one row's attention output and compare it with the engine's.

Every softmax that a model may hide in its attention function (a cap, a sink, a bias, another scale)
changes the output. So the first captured pass of each attention module rebuilds one row from q, k and v by
the formula that the kernels use; where the engine's output differs, the model is refused by name.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from attnhook.backends.transformers.masks import Visible
from attnhook.errors import UnsupportedError

# largest |rebuilt - engine| / largest |engine|: float32 kernels differ by about 1e-6, bf16 ones by 1e-2
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}

_KEYS_THAT_TELL = 8  # a row of one key has probability 1 whatever the formula

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
    rebuilt = _rebuild(q, key[sequence, :, keys], value[sequence, :, keys], **softmax)
    if not bool(torch.isfinite(rebuilt).all()):
        return  # the rows with NaN are dropped one by one
    error = float((rebuilt - output.float()).abs().max() / output.float().abs().max().clamp_min(1e-12))
    if error > _TOLERANCE.get(output.dtype, 4e-2):
        raise UnsupportedError(
            f"{type(module).__name__} (layer {module.layer_idx}, {kind} attention): its output differs from "
            f"softmax attention over its own q, k and v by {error:.1e} of its size, so it computes something that "
            "attnhook does not know; please report the model"
        )
    if count >= _KEYS_THAT_TELL:
        done.add(kind)


def _rebuild(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention output float32 [Hq, Dv] of one row over keys [Hkv, S, D]; one kv head at a time to stay small."""
    group = q.shape[0] // k.shape[0]
    out = []
    for h in range(k.shape[0]):
        heads = slice(h * group, (h + 1) * group)
        z = scale * (q[heads].float() @ k[h].detach().float().T)  # [G, S]
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        total = torch.logsumexp(z, -1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[heads].detach().float())
        out.append(torch.exp(z - total[:, None]) @ v[h].detach().float())
    return torch.cat(out)
