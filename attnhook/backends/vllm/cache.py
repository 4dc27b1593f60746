"""vLLM's key caches as `PagedKeys`, and what each attention backend adds to the softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import PagedKeys
from attnhook.plugins.engine import LayerView
from attnhook.plugins.patching import objects


def view(layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor) -> LayerView:
    """What a captured row of this layer attends to; ``block_table`` is int32 [R, blocks] of the cache.

    Raises UnsupportedError for a cache that is not known.
    """
    impl = layer.impl
    if is_mla(layer):
        return _latent(layer, impl, kv_cache, block_table)
    name = type(impl).__name__
    if name not in _READERS:
        raise UnsupportedError(
            f"vLLM's attention implementation {name} keeps its keys in a layout that attnhook does not read; it reads "
            f"those of {', '.join(_READERS)} and MLA: choose one with --attention-backend"
        )
    if getattr(impl, "attn_type", "decoder") != "decoder":
        raise UnsupportedError(f"{name}: {impl.attn_type} attention is not causal self-attention")
    return _READERS[name](layer, impl, kv_cache, block_table)


def is_mla(layer: Any) -> bool:
    """Whether a layer is multi-head latent attention: one latent vector per position serves all heads."""
    return hasattr(layer, "kv_lora_rank")


def queries(layer: Any, q: torch.Tensor) -> torch.Tensor:
    """Queries [U, Hq, D] that meet the stored keys: MLA's take the step from keys to latents into themselves."""
    if not is_mla(layer):
        return q
    nope, rope = q[..., : layer.qk_nope_head_dim], q[..., layer.qk_nope_head_dim :]
    latent = torch.bmm(nope.transpose(0, 1).float(), layer.W_UK_T.float()).transpose(0, 1)  # [U, Hq, L]
    return torch.cat([latent, rope.float()], dim=-1)


def _latent(layer: Any, impl: Any, kv_cache: torch.Tensor, table: torch.Tensor) -> LayerView:
    """``[blocks, slots, latent | rope]``: the latent part is key and value at once."""
    name = f"{type(impl).__name__} (MLA)"
    if kv_cache.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedError(f"{name}: a cache of {kv_cache.dtype} is not read yet: use --kv-cache-dtype auto")
    if getattr(impl, "is_sparse", False):
        raise UnsupportedError(f"{name}: sparse attention sees keys of its own choice, which attnhook does not know")
    if not isinstance(getattr(layer, "W_UK_T", None), torch.Tensor) or layer.W_UK_T.dtype.itemsize < 2:
        raise UnsupportedError(f"{name}: its projection W_UK_T is missing or quantised, so keys cannot be read")
    cache = kv_cache.view(-1, *kv_cache.shape[-2:])
    block, slot, step = cache.stride()
    paged = PagedKeys(cache, table, cache.shape[1], (block, slot, 0, step), 1)
    softmax = {"scale": impl.scale, "softcap": 0.0, "window": -1, "sinks": None, "alibi_slopes": None}
    return LayerView(paged, paged, softmax, layer.W_UV)


def _softmax(impl: Any) -> dict[str, Any]:
    """What an attention implementation adds to the softmax; a window counts the row's own key."""
    window = impl.sliding_window
    if isinstance(window, tuple):  # keys to the left and to the right of the row's own
        window = window[0] + 1 if window[0] >= 0 else -1
    return {
        "scale": impl.scale,
        "softcap": getattr(impl, "logits_soft_cap", 0) or 0.0,
        "window": -1 if window is None else window,
        "sinks": getattr(impl, "sinks", None),
        "alibi_slopes": impl.alibi_slopes,
    }


def _cpu(layer: Any, impl: Any, kv_cache: torch.Tensor, table: torch.Tensor) -> LayerView:
    if impl.is_fp8_kv_cache:
        raise UnsupportedError("the CPU backend's FP8 key cache is not read yet: start with --kv-cache-dtype auto")
    known = layer.__dict__.get("_attnhook_places")
    if known is None or known[0] is not kv_cache:  # the engine hands over the same tensor in every pass
        blocks, heads, size, double = kv_cache.shape
        dim = double // 2
        k, v = kv_cache.view(blocks, heads, 2 * size, dim).chunk(2, dim=2)
        key_steps, value_steps = _cpu_packing(_isa(layer, impl), kv_cache.dtype, size, dim, impl.kv_cache_dtype)
        block, head = k.stride(0), k.stride(1)
        steps = (block, key_steps[0], head, key_steps[1]), (block, value_steps[0], head, value_steps[1])
        if known is None:
            objects["vllm"].note(layer, "_attnhook_places", None)  # uninstall() takes it away
        known = layer.__dict__["_attnhook_places"] = kv_cache, k, v, *steps, size, heads, _softmax(impl)
    _, k, v, key_strides, value_strides, size, heads, softmax = known
    return LayerView(
        PagedKeys(k, table, size, key_strides, heads), PagedKeys(v, table, size, value_strides, heads), softmax
    )


def _isa(layer: Any, impl: Any) -> str:
    """The instruction set by which the CPU cache is packed; vLLM up to 0.28 keeps it on the implementation."""
    isa = getattr(layer, "isa", None) or getattr(impl, "isa", None)
    if not isinstance(isa, str):
        raise UnsupportedError("vLLM's CPU attention does not say for which instruction set it packs its keys (`isa`)")
    return isa


@lru_cache(maxsize=16)
def _cpu_packing(isa: str, dtype: torch.dtype, size: int, dim: int, kv_dtype: str) -> tuple[tuple[int, int], ...]:
    """(slot, dimension) strides of keys and of values within one block and head of the CPU cache.

    The packing depends on the instruction set, so the engine itself is asked: it stores numbers that tell
    where each element went. Raises UnsupportedError for a packing that strides cannot express (AMX tiles).
    """
    from vllm import _custom_ops as ops

    places = []
    # two digits of the element's number, each small enough for bfloat16
    code = torch.arange(size * dim).view(size, 1, dim)
    digits = [(code % 256), (code // 256)]
    found = [torch.zeros(2, size * dim, dtype=torch.int64) for _ in range(2)]
    for n, digit in enumerate(digits):
        block = torch.zeros(1, 1, 2 * size, dim, dtype=dtype)
        k, v = block.chunk(2, dim=2)
        rows = digit.to(dtype).contiguous()
        ops.cpu_attn_reshape_and_cache(
            rows, rows.clone(), k, v, torch.arange(size), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kv_dtype
        )
        for which, part in enumerate((k, v)):
            found[which][n] = part.flatten().to(torch.int64)
    for low, high in found:
        stored = low + 256 * high  # the number of the element at each place
        place = torch.empty_like(stored)
        place[stored] = torch.arange(size * dim)
        slot, step = (int(place[dim]) if size > 1 else dim), int(place[1])
        expected = torch.arange(size)[:, None] * slot + torch.arange(dim)[None, :] * step
        if not torch.equal(place.view(size, dim), expected):
            raise UnsupportedError(
                f"vLLM's CPU cache for {isa!r} packs keys in tiles, which attnhook does not read yet; "
                "float32 (--dtype float32) is not packed so"
            )
        places.append((slot, step))
    return tuple(places)


def _gpu(layer: Any, impl: Any, kv_cache: torch.Tensor, table: torch.Tensor) -> LayerView:
    """Keys and values of the GPU backends, by the number of the cache's dimensions.

    ``[blocks, kv heads, slots, K | V]`` in vLLM 0.29 and later, ``[blocks, 2, slots, kv heads, dim]`` before; the
    strides tell in which order they lie in memory.
    """
    if kv_cache.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedError(f"a key cache of {kv_cache.dtype} is not read yet: start with --kv-cache-dtype auto")
    if kv_cache.dim() == 4:
        dim = kv_cache.shape[3] // 2
        k, v = kv_cache[..., :dim], kv_cache[..., dim:]
    elif kv_cache.dim() == 5 and kv_cache.shape[1] == 2:
        k, v = (part.transpose(1, 2) for part in kv_cache.unbind(1))
    else:
        raise UnsupportedError(
            f"{type(impl).__name__} has a key cache of shape {list(kv_cache.shape)}, which attnhook does not know: it "
            "reads [blocks, kv heads, slots, 2 * dim] and [blocks, 2, slots, kv heads, dim]"
        )
    return LayerView(_paged(k, table), _paged(v, table), _softmax(impl))


def _paged(x: torch.Tensor, table: torch.Tensor) -> PagedKeys:
    """``x`` is [blocks, kv heads, slots, dim] in any order of memory."""
    block, head, slot, step = x.stride()
    return PagedKeys(x, table, x.shape[2], (block, slot, head, step), x.shape[1])


_READERS: dict[str, Callable[[Any, Any, torch.Tensor, torch.Tensor], LayerView]] = {
    "CPUAttentionBackendImpl": _cpu,
    "FlashAttentionImpl": _gpu,
    "TritonAttentionImpl": _gpu,
    "FlashInferImpl": _gpu,
}
