"""`topk_attention` and, for the same rows in several layers, `TopKStep`: checked here, computed by a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnhook.kernels.topk.dispatch import implementation
from attnhook.kernels.topk.types import (
    NO_HEADS,
    Arrays,
    LayerRows,
    PagedKeys,
    PerHead,
    PerKey,
    Selection,
    Softmax,
    TopK,
    check_inputs,
)


def topk_attention(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    top_k: int,
    scale: float,
    softcap: float = 0.0,
    window: int | torch.Tensor = -1,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    first_reported: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    per_head: PerHead = NO_HEADS,
    per_key: PerKey | None = None,
    key_mass: torch.Tensor | None = None,
) -> TopK:
    """Head-averaged attention of each query row over its visible keys, reduced to what a record keeps.

    For row t of request r at position p the visible keys are ``max(0, p - W + 1) .. p``. With
    ``z_h(s) = softcap(scale * <q_h, k(s)> + slope_h * (s - p))`` and
    ``p_h = exp(z_h) / (sum exp(z_h) + exp(sink_h))``, the row's attention is the mean of ``p_h`` over
    the selected heads. Everything is accumulated in float32 (float64 inputs: float64).

    Parameters
    ----------
    q : [T, Hq, D] float
        Queries as the engine's attention sees them (after rotary embedding). T may be 0.
    keys : PagedKeys
        Paged view of the key cache, Hkv heads; Hq must be a multiple of Hkv.
    row_request : [T] int32 or int64
        Row of ``keys.page_table`` that each query belongs to.
    row_position : [T] int32 or int64
        Position p of each query in its request, counted from 0. The page table must cover 0..p,
        except positions that the window hides, whose entries are never read.
    top_k : int
        Entries to keep per row, >= 1.
    scale : float
        Factor on the dot product.
    softcap : float
        ``c`` of ``c * tanh(z / c)``; 0 turns it off.
    window : int or [T] int32
        Number of visible keys, the row's own included; < 0 means all of 0..p. One value per row
        expresses chunked attention and left padding too.
    sinks : [Hq] float, optional
        Learned logit per head that takes part in the softmax and belongs to no key.
    alibi_slopes : [Hq] float, optional
        ALiBi slope per head.
    head_mask : [Hq] or [R, Hq] bool, optional
        Heads to average over (per request); every row needs at least one. Default: all.
    spans : [R, n, 2] int32 or int64, optional
        Half-open position ranges per request whose attention mass is wanted.
    first_reported : [R] int32 or int64, optional
        Positions below this are left out of the top k (and of nothing else).
    lse : [T, Hq] float32 or float64, optional
        The engine's own log-sum-exp: the natural logarithm of the whole denominator above, over the row's
        visible keys and with the sink where there is one (which ``sinks`` must still tell). Probabilities are
        then ``exp(z_h(s) - lse_h)``, as true as the engine's number is; it saves the Triton kernel all scratch
        for logits and a pass. The torch and the compiled path, which have the logits at hand, find the
        normaliser themselves and only look at the shape. FlashInfer's is a base-2 logarithm: times ln 2.
    per_head : PerHead
        What is wanted of every query head by itself, of ``p_h`` in place of the mean, whatever ``head_mask`` says:
        the ``top_k`` largest, the fingerprint (histogram and entropy), the mass of ``spans``, the log-sum-exp.

    per_key, key_mass : PerKey, float32 [S, G, W]
        Add the attention that each row t gives the keys 0..W-1 to the sums ``key_mass[per_key.slot[t]]``. G is 1: the
        mean over the selected heads; with ``per_key.kv_heads`` Hkv: the mean over the query heads of each kv head. W
        covers every visible key. A row whose entropy becomes NaN makes NaN of the sums of its visible keys.

    Returns
    -------
    TopK
        ``positions`` and ``scores`` are sorted by descending score, ties to the lower position; rows
        with fewer than ``top_k`` reportable keys end in position -1, score 0. A NaN or infinity in a
        row's q or visible keys makes that row's entropy NaN: the caller must drop it.
        ``head_...`` are [T, Hq, ...] where ``per_head`` asks for them, else [T, 0, ...].

    Raises
    ------
    ValueError
        Shapes, dtypes or devices do not fit together.
    """
    layer = LayerRows(q, keys, row_position, Softmax(scale, softcap, window, sinks, alibi_slopes, lse), key_mass)
    selection = Selection(top_k, head_mask, spans, first_reported, per_head, per_key)
    check_inputs(layer, row_request, selection)
    result: TopK = implementation(q.device.type).topk_attention(layer, row_request, selection)
    return result


class TopKStep:
    """`topk_attention` of the same rows in several layers: what the layers share is looked at once.

    What the arguments hold, and the errors, are those of `topk_attention`. No tensor may change while the step lasts.
    """

    def __init__(self, row_request: torch.Tensor, selection: Selection) -> None:
        self._request, self._selection = row_request, selection
        self._impl = implementation(row_request.device.type)
        self._step = self._impl.Step(row_request, selection) if hasattr(self._impl, "Step") else None

    def stacked(self, layers: Sequence[LayerRows]) -> TopK:
        """Results ``[T, L, ...]`` of all layers in one piece."""
        alike = self._checked(layers)
        if self._step is not None and [*alike.values()] == [[*range(len(layers))]]:
            whole: TopK = self._step.stacked(layers)
            return whole
        return TopK(*(torch.stack(x, dim=1) for x in zip(*self._results(layers, alike), strict=True)))

    def again(self, layers: Sequence[LayerRows]) -> Arrays | None:
        """`stacked` of a later pass over the same requests, in arrays that the next call fills anew.

        None where `stacked` has prepared no such pass. The fastest way where rows are few, as in decoding on a CPU.
        """
        if self._step is None:
            return None
        lent: Arrays | None = self._step.again(layers)
        return lent

    def __call__(self, layers: Sequence[LayerRows]) -> list[TopK]:
        """One result per layer; computed in one call where the implementation can and the layers are alike."""
        return self._results(layers, self._checked(layers))

    def _checked(self, layers: Sequence[LayerRows]) -> dict[tuple[Any, ...], list[int]]:
        """Places of the layers that one call can compute together, by what makes them alike."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for n, layer in enumerate(layers):
            check_inputs(layer, self._request, self._selection)
            if self._step is not None and self._impl.computes(layer.q, layer.keys):
                kind = layer.q.shape[1:], layer.keys.num_kv_heads, layer.keys.page_table.shape[0]
                alike.setdefault(kind, []).append(n)
        return alike

    def _results(self, layers: Sequence[LayerRows], alike: dict[tuple[Any, ...], list[int]]) -> list[TopK]:
        found: list[TopK | None] = [None] * len(layers)
        for numbers in alike.values():
            assert self._step is not None
            for n, result in zip(numbers, self._step([layers[n] for n in numbers]), strict=True):
                found[n] = result
        for n, layer in enumerate(layers):
            if found[n] is None:
                found[n] = self._impl.topk_attention(layer, self._request, self._selection)
        return [result for result in found if result is not None]
