"""SGLang's attention layers: which ones a model has, and what a call of one tells of its queries and output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnhook.errors import UnsupportedError

#: What an attention call may be given beside queries, keys and values: it is in the queries, or in the softmax.
_KNOWN = ("sinks", "q_rope", "k_rope", "key_value_num_tokens")


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    With multi-head latent attention ``module`` works on latent keys as they lie in the pool, and its twin, which has
    the same number, on keys that were expanded from them: ``around`` is the module that has both.
    """

    module: Any  # SGLang's RadixAttention
    around: Any = None

    @property
    def heads(self) -> int:
        """Query heads of this rank."""
        return int(self.module.tp_q_head_num)

    @property
    def query_shape(self) -> tuple[int, int]:
        """Heads and dimensions of a query that fits the pool's keys."""
        return self.heads, int(self.module.qk_head_dim)

    def is_twin(self, module: Any) -> bool:
        """Whether a module is the one that expands its keys."""
        return self.around is not None and module is self.around.attn_mha

    def has(self, module: Any) -> bool:
        """Whether a call of this module is one of this layer; a draft model's layers have the same numbers."""
        return module is self.module or self.is_twin(module)

    def queries(self, module: Any, q: torch.Tensor, extra: Mapping[str, Any]) -> torch.Tensor:
        """A call's queries as [N, Hq, D], in one piece. Raises UnsupportedError where it was given what we ignore."""
        unknown = [name for name, value in extra.items() if value is not None and name not in _KNOWN]
        if unknown:
            raise UnsupportedError(
                f"layer {module.layer_id}: attention with {', '.join(unknown)}, which attnhook ignores"
            )
        rope = extra.get("q_rope")
        if rope is not None:
            parts = (q.reshape(len(q), self.heads, -1), rope.reshape(len(rope), self.heads, -1))
            return torch.cat(parts, dim=-1)
        return q.reshape(-1, self.heads, module.qk_head_dim)

    def for_pool(self, module: Any, rows: torch.Tensor) -> torch.Tensor:
        """Queries [U, Hq, D] of a call as they meet the pool's keys: those of the twin are absorbed.

        q_nope W_UK in the place of q_nope: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
        """
        if not self.is_twin(module):
            return rows
        weight = self.around.w_kc  # [Hq, nope, latent]
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UnsupportedError(f"layer {module.layer_id}: projections of {weight.dtype} are not read yet")
        nope, rope = rows[..., : weight.shape[1]], rows[..., weight.shape[1] :]
        absorbed = torch.einsum("uhn,hnl->uhl", nope.float(), weight.float())
        return torch.cat([absorbed, rope.float()], dim=-1).to(rows.dtype)

    def output(self, module: Any, output: Any, batch: Any) -> torch.Tensor | None:
        """A call's output as [N, Hq, Dv]; None where it is only a part, which the engine adds others to."""
        if isinstance(output, tuple):
            output = output[0]
        if getattr(batch, "mha_return_lse", None):
            return None
        whole: torch.Tensor = output.reshape(-1, self.heads, module.v_head_dim)
        return whole

    def value_heads(self, module: Any) -> torch.Tensor | None:
        """[Hq, latent, Dv]: how the twin's output comes of the latent values; None where the pool's values are read."""
        return self.around.w_vc if self.is_twin(module) else None


def attention_layers(model: Any) -> dict[int, Attention]:
    """The model's causal attention layers by their number. Raises UnsupportedError."""
    from sglang.srt.layers.radix_attention import RadixAttention

    latent = {
        id(module.attn_mha): module
        for module in model.modules()
        if hasattr(module, "attn_mqa") and hasattr(module, "attn_mha") and hasattr(module, "w_kc")
    }
    around = {id(module.attn_mqa): module for module in latent.values()}
    found: dict[int, Attention] = {}
    for module in model.modules():
        if not isinstance(module, RadixAttention) or id(module) in latent:
            continue
        if module.is_cross_attention:
            raise UnsupportedError("SGLang's model has cross-attention, whose keys lie among its own: not captured")
        if module.layer_id in found:
            raise UnsupportedError(f"the model has two attention layers of number {module.layer_id}")
        found[module.layer_id] = Attention(module, around.get(id(module)))
    return dict(sorted(found.items()))


def live_backends(runner: Any) -> list[Any]:
    """A runner's attention backends, each once; wrappers such as the hybrid ones, not what is in them."""
    group = getattr(runner, "decode_attn_backend_group", None) or ()
    found = [runner.attn_backend, getattr(runner, "decode_attn_backend", None), *group]
    return list({id(backend): backend for backend in found if backend is not None}.values())


def computing(backend: Any, decodes: bool) -> Any:
    """The backend that computes, inside SGLang's wrappers for linear attention and for one backend per phase."""
    for name in ("full_attn_backend", "decode_backend" if decodes else "prefill_backend"):
        backend = getattr(backend, name, backend)
    return backend
