"""The check that needs no oracle: rebuild one row's attention output and compare it with the engine's.

Every softmax that a model may hide in its attention function (a cap, a sink, a bias, another scale)
changes the output. So the first captured pass of each attention module rebuilds one row from q, k and v by
the formula that the kernels use; where the engine's output differs, the model is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch

from attnhook.errors import UnsupportedError

# largest |rebuilt - engine| / largest |engine|: float32 kernels differ by about 1e-6, bf16 ones by 1e-2
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# an engine's kernels multiply float32 in TF32 on a GPU, as Triton does by default: it has the mantissa of float16
_TF32 = _TOLERANCE[torch.float16]

#: A row of one key has probability 1 whatever the formula.
KEYS_THAT_TELL = 8


def tolerance(dtype: torch.dtype, device: str) -> float:
    """How far an engine's output of a dtype on a kind of device ("cpu", "cuda") may be from the rebuilt one."""
    if dtype == torch.float32 and device == "cuda":
        return _TF32
    return _TOLERANCE.get(dtype, max(_TOLERANCE.values()))


def check_output(
    what: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    value_heads: torch.Tensor | None = None,
    **softmax: Any,
) -> float | None:
    """How far one row's ``output`` [Hq, Dv] is from softmax attention of q [Hq, D] over k and v [Hkv, S, D].

    Where the values are latent [1, S, L], ``value_heads`` [Hq, L, Dv] makes each head's output of their sum.

    Returns the largest difference over the largest output; None where the row holds NaN or infinity, which
    drops it anyway. ``softmax``: scale, softcap, sinks and alibi_slopes.
    Raises UnsupportedError where the engine computes something else than the formula.
    """
    rebuilt = _rebuild(q, k, v, **softmax)
    if value_heads is not None:
        rebuilt = torch.einsum("hl,hlv->hv", rebuilt, value_heads.float())
    if not bool(torch.isfinite(rebuilt).all()):
        return None
    engine = output.float()
    error = float((rebuilt - engine).abs().max() / engine.abs().max().clamp_min(1e-12))
    if error > tolerance(output.dtype, output.device.type):
        raise UnsupportedError(
            f"{what}: its output differs from softmax attention over its own q, k and v by {error:.1e} of its size, "
            "so it computes something that attnhook does not know; please report the model"
        )
    return error


def _rebuild(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output float32 [Hq, Dv] of one row over keys [Hkv, S, D]; one kv head at a time to stay small."""
    group, count = q.shape[0] // k.shape[0], k.shape[1]
    out = []
    for h in range(k.shape[0]):
        heads = slice(h * group, (h + 1) * group)
        z = scale * (q[heads].float() @ k[h].detach().float().T)  # [G, S]
        if alibi_slopes is not None:
            z += alibi_slopes[heads, None].float() * torch.arange(1 - count, 1, device=z.device)
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        total = torch.logsumexp(z, -1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[heads].detach().float())
        out.append(torch.exp(z - total[:, None]) @ v[h].detach().float())
    return torch.cat(out)
