"""SGLang's key pools as `PagedKeys`, and what an attention layer adds to the softmax."""

from __future__ import annotations

from typing import Any

import torch

from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import PagedKeys
from attnhook.plugins.engine import LayerView

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_POOLS = ("MHATokenToKVPool", "MLATokenToKVPool")

# these backends leave the soft-cap out, whatever the model says; what they compute is what we report
_NO_SOFTCAP = frozenset({"TorchNativeAttnBackend", "TorchFlexAttnBackend"})


class Slots:
    """Where the keys of a step's requests lie: rows of the request table, page size 1 whatever the engine's is."""

    def __init__(self, pool: Any, rows: torch.Tensor) -> None:
        self._pool, self._rows = pool, rows
        self._window: torch.Tensor | None = None

    def of(self, layer: int) -> torch.Tensor:
        """int32 [R, positions]: slots of a layer; a sliding-window pool has slots of its own."""
        if not _in_window_pool(self._pool, layer):
            return self._rows
        if self._window is None:
            # what has left the window has no slot any more, and is not read
            self._window = self._pool.translate_loc_from_full_to_swa(self._rows.long()).clamp_min(0).to(torch.int32)
        return self._window


# its decoding keeps this many keys, one less than its prompts and Transformers do (`update_sliding_window_buffer`)
_SHORT_WINDOW = frozenset({"TritonAttnBackend"})


def view(
    pool: Any, layer: Any, slots: Slots, backend: str, *, decodes: bool, sinks: torch.Tensor | None = None
) -> LayerView:
    """What a captured row of this layer, which `check` has let pass, attends to.

    ``backend`` is the name of the class that computes it, ``decodes`` whether the pass is one of decoding.
    """
    number = layer.layer_id
    table = slots.of(number)
    return LayerView(
        _paged(pool.get_key_buffer(number), table),
        _paged(pool.get_value_buffer(number), table),
        {
            "scale": float(layer.scaling),
            "softcap": 0.0 if backend in _NO_SOFTCAP else float(layer.logit_cap or 0.0),
            "window": _window(layer.sliding_window_size, backend in _SHORT_WINDOW and decodes),
            "sinks": sinks,
            "alibi_slopes": None,
        },
    )


def _window(before: int, short: bool) -> int:
    """Visible keys, the row's own included, where SGLang counts those before it; -1 where all are."""
    return -1 if before < 0 else before + (not short)


def check(pool: Any, layer: Any) -> None:
    """Raise UnsupportedError where a layer's keys or softmax are not those that `view` describes."""
    kinds = [type(pool).__name__]
    if kinds == ["SWAKVPool"]:
        kinds = [type(part).__name__ for part in (pool.full_kv_pool, pool.swa_kv_pool)]
    for kind in kinds:
        if kind not in _POOLS:
            raise UnsupportedError(
                f"SGLang keeps this model's keys in a {kind}, which attnhook does not read yet; it reads "
                f"{' and '.join(_POOLS)}, alone or in a SWAKVPool"
            )
    number = layer.layer_id
    keys = pool.get_key_buffer(number)
    if keys.dtype not in _DTYPES:
        raise UnsupportedError(
            f"layer {number}: with a key cache of {keys.dtype} SGLang's kernels round the queries as well, each in its "
            "own way: not captured. Start with --kv-cache-dtype auto"
        )
    layout = getattr(_part(pool, number), "kv_cache_layout", "nhd")
    if layout != "nhd" or keys.dim() != 3:
        raise UnsupportedError(
            f"layer {number}: keys in layout {layout!r} with shape {list(keys.shape)} are not read yet: unset "
            "SGLANG_USE_HND_KVCACHE and SGLANG_AITER_KV_CACHE_LAYOUT"
        )
    refused = {
        "attention that is not causal": getattr(layer.attn_type, "value", "decoder") != "decoder",
        "chunked attention (iRoPE)": bool(getattr(layer, "use_irope", False)),
        "a temperature by length": getattr(layer, "xai_temperature_len", -1) > 0,
        f"positions encoded as {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
        f"a cap by {layer.logit_capping_method}": bool(layer.logit_cap) and layer.logit_capping_method != "tanh",
    }
    for what, found in refused.items():
        if found:
            raise UnsupportedError(f"layer {number} computes {what}, which attnhook does not know")


def _paged(buffer: torch.Tensor, table: torch.Tensor) -> PagedKeys:
    slot, head, dim = buffer.stride()
    return PagedKeys(buffer, table, 1, (slot, slot, head, dim), buffer.shape[1])


def _in_window_pool(pool: Any, layer: int) -> bool:
    return type(pool).__name__ == "SWAKVPool" and bool(pool.layers_mapping[layer][1])


def _part(pool: Any, layer: int) -> Any:
    if type(pool).__name__ != "SWAKVPool":
        return pool
    return pool.swa_kv_pool if _in_window_pool(pool, layer) else pool.full_kv_pool
