"""Which rows the loops take, and how many at once.

A prompt's rows share a matrix product of torch, block by block; single rows (decoding) read their keys in
place, whatever the paging, all layers of a step in one call. Softmax, mean over heads, features and
selection are one pass over a row's logits while they are in the core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from attnhook.kernels.topk import torch as torch_kernel
from attnhook.kernels.topk.numba import dots, per_key
from attnhook.kernels.topk.numba.again import SINGLE_ELEMENTS, Again, alike
from attnhook.kernels.topk.numba.blocks import PART, ROW, DotWords
from attnhook.kernels.topk.numba.jobs import (
    Call,
    Job,
    Shared,
    as_numpy,
    pools_of,
    reads_in_place,
    scales_of,
    threads_for,
)
from attnhook.kernels.topk.torch.attention import block_rows, buffer, logits, queries, runs
from attnhook.kernels.topk.types import Arrays, LayerRows, PagedKeys, Selection, TopK, gather

_BLOCK_ELEMENTS = 3 << 18  # logits of a block of prompt rows: 3 MiB, about the cores' caches
_PROMPT_ROWS = 8  # consecutive rows that are worth a matrix product
_PLACES = 16  # different positions and windows that a step remembers


def computes(q: torch.Tensor, keys: PagedKeys) -> bool:
    """Whether the loops compute these types; float64 is the torch path's."""
    return torch.float64 not in (q.dtype, keys.cache.dtype)


def topk_attention(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`; float64 is computed by the torch path."""
    if not computes(layer.q, layer.keys):
        return torch_kernel.topk_attention(layer, row_request, selection)
    return Step(row_request, selection)([layer])[0]


def attention_rows(
    layer: LayerRows, row_request: torch.Tensor, *, width: int, head_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`; float64 is computed by the torch path."""
    if not computes(layer.q, layer.keys):
        return torch_kernel.attention_rows(layer, row_request, width=width, head_mask=head_mask)
    dense = torch.zeros((layer.q.shape[0], width))
    step = Step(row_request, Selection(1, head_mask))
    step.dense = dense
    step([layer])
    return dense


class Step(Shared):
    """`topk_attention` of the same rows in any number of layers; see `attnhook.kernels.topk.TopKStep`.

    What the layers share is looked at once. No argument may change while the step lasts. Further calls may bring the
    positions of a later pass, in a tensor of its own.
    """

    def __init__(self, row_request: torch.Tensor, selection: Selection) -> None:
        super().__init__(row_request, selection)
        self._again: dict[tuple[Any, ...], Again] = {}
        # layers under one mask share positions and windows; both are kept so that an id stays theirs
        self._placed: dict[tuple[int, int], tuple[Any, _Place]] = {}

    def __call__(self, layers: Sequence[LayerRows]) -> list[TopK]:
        """Results of layers with as many query heads, kv heads, dimensions and requests, computed together."""
        whole = self.stacked(layers)
        return [TopK(*(x[:, n] for x in whole)) for n in range(len(layers))]

    def stacked(self, layers: Sequence[LayerRows]) -> TopK:
        """The same in one piece, ``[T, L, ...]``."""
        lent = self._prepared(layers)
        if lent is not None:
            return TopK(*(torch.from_numpy(x.copy()) for x in lent))
        call = Call(self, layers)
        result = call.empty()
        _single_rows(call, self._apart(call, result), result)
        return TopK(*(x.view(len(self.request), len(layers), *x.shape[1:]) for x in result))

    def _place(self, layer: LayerRows) -> _Place:
        window = layer.softmax.window
        key = id(layer.row_position), id(window)
        known = self._placed.get(key)
        if known is None:
            if len(self._placed) >= _PLACES:
                self._placed.clear()
            known = self._placed[key] = (layer.row_position, window), _place(layer, self.request)
        return known[1]

    def _prepared(self, layers: Sequence[LayerRows]) -> Arrays | None:
        """`Again.lend` of layers that one call computes, as in decoding; None where none can."""
        first, seen, prompts = self._place(layers[0])
        if prompts or self.dense is not None or not alike(layers):
            return None
        kind = len(layers), layers[0].keys.num_kv_heads
        again = self._again.get(kind)
        if again is None or not again.fits(layers):
            again = self._again[kind] = Again(self, layers)
        return again.lend(layers, (first, seen))

    def again(self, layers: Sequence[LayerRows]) -> Arrays | None:
        """See `attnhook.kernels.topk.TopKStep.again`; ``row_position`` is int64 there."""
        one = layers[0]
        again = self._again.get((len(layers), one.keys.num_kv_heads))
        if again is None or not isinstance(one.softmax.window, int) or one.row_position.dtype != torch.int64:
            return None
        if not again.fits(layers):
            return None
        return again.lend(layers)

    def _apart(self, call: Call, result: TopK) -> np.ndarray:
        """The table of rows that read their keys in place; those of prompts are computed here."""
        rows, count = len(self.request), len(call.layers)
        single = []
        for number, layer in enumerate(call.layers):
            first, seen, prompts = self._place(layer)
            table = np.zeros(rows, ROW)
            table["keys"], table["first"], table["request"], table["layer"] = seen, first, self.request, number
            table["result"] = np.arange(rows) * count + number
            if not reads_in_place(layer.keys):
                prompts = list(runs(self.request.tolist(), (first + seen).tolist()))
            for start, stop in prompts:
                _prompt_rows(call, layer, table[start:stop], start, stop, result)
            if prompts:
                keep = np.ones(rows, bool)
                for start, stop in prompts:
                    keep[start:stop] = False
                table = table[keep]
            single.append(table)
        return single[0] if count == 1 else np.concatenate(single)


class _Place(NamedTuple):
    """Where the rows of a layer lie."""

    first: np.ndarray  # int64 [T]: the first position that a row sees
    seen: np.ndarray  # int64 [T]: how many it sees
    prompts: list[tuple[int, int]]  # runs of rows that are prompts


def _place(layer: LayerRows, request: np.ndarray) -> _Place:
    position, window = as_numpy(layer.row_position, np.int64), layer.softmax.window
    if isinstance(window, torch.Tensor):
        width = as_numpy(window, np.int64)
        first = np.where(width < 0, 0, np.maximum(position - width + 1, 0))
    else:
        first = np.zeros_like(position) if window < 0 else np.maximum(position - window + 1, 0)
    found = runs(request.tolist(), position.tolist()) if len(request) >= _PROMPT_ROWS else ()
    return _Place(first, position - first + 1, [run for run in found if run[1] - run[0] >= _PROMPT_ROWS])


def _single_rows(call: Call, table: np.ndarray, result: TopK) -> None:
    """Rows that read their keys in place, as many at once as the scratch holds."""
    if not table.size:
        return
    layers, heads = call.layers, call.heads
    kv_heads, dim = layers[0].keys.num_kv_heads, layers[0].q.shape[2]
    pages = {id(x.keys.page_table): as_numpy(x.keys.page_table, np.int64) for x in layers}
    pools = pools_of(layers, [pages[id(x.keys.page_table)] for x in layers])
    scales = scales_of(layers)
    q = layers[0].q if len(layers) == 1 else torch.cat([x.q for x in layers])
    q = q.to(torch.float32).contiguous()
    if len(q) > len(table):  # the others were prompt rows
        row, layer = np.divmod(table["result"], len(layers))
        q = q[torch.from_numpy(layer * call.rows + row)]
    keys, first = table["keys"], table["first"]
    slot = None if call.slot is None else call.slot[table["result"] // len(layers)]
    apart = slot is not None and not per_key.aim(table, layers, slot)
    ends = np.cumsum(keys) * heads
    parts = (first + keys - 1) // PART - first // PART + 1
    start = 0
    while start < len(ends):
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + SINGLE_ELEMENTS, side="right")))
        part = table[start:stop]
        part["stride"] = part["keys"]
        part["offset"] = ends[start:stop] - base - part["keys"] * heads
        z = buffer("logits", int(ends[stop - 1]) - base, q, torch.float32)
        products = Job(
            dots.dot_job,
            DotWords(
                rows=stop - start, heads=heads, kv_heads=kv_heads, dim=dim, layers=len(pools),
                parts=int(parts[start:stop].max()), table=part.ctypes.data, queries=q[start:].data_ptr(),
                pools=pools.ctypes.data, scales=scales.ctypes.data, logits=z.data_ptr(), logit_count=z.numel(),
            ),
        )  # fmt: skip
        products.run(threads_for(z.numel()))
        sums = per_key.Apart(part, call.key_groups) if apart else None
        call.reduce(z, part, result)
        if sums is not None and slot is not None:
            sums.add(layers, slot[start:stop])
        start = stop


def _prompt_rows(call: Call, layer: LayerRows, table: np.ndarray, start: int, stop: int, result: TopK) -> None:
    """Rows start..stop of a layer: one request at consecutive positions, which share matrix products."""
    heads, keys = call.heads, layer.keys
    seen, first = table["keys"], table["first"]
    position = first + seen - 1
    low = int(first.min())
    k = gather(keys.pages(layer.q.shape[2]), keys, int(table["request"][0]), low, int(position[-1]) + 1)
    scaled = queries(layer.q[start:stop], keys, layer.softmax.scale, torch.float32).transpose(0, 1)  # [Hq, R, D]
    t = 0
    while t < len(seen):
        end = min(t + block_rows(int(seen[t]), heads, _BLOCK_ELEMENTS), len(seen))
        lowest = int(first[t:end].min())
        z = logits(scaled[:, t:end], k[lowest - low : int(position[end - 1]) + 1 - low])
        part = table[t:end]
        part["offset"] = np.arange(end - t) * z.shape[2] + first[t:end] - lowest
        part["stride"] = z.shape[1] * z.shape[2]
        sums = None if call.slot is None else per_key.Block(part, call.key_groups, lowest, z.shape[2])
        call.reduce(z, part, result)
        if sums is not None and call.slot is not None:
            sums.add(layer, call.slot[start + t : start + end])
        t = end
