"""Top-k attention on the CPU at compiled speed: numba's loops on the threads that torch computes with.

A prompt's rows share a matrix product of torch, block by block; single rows (decoding) read their keys in
place, whatever the paging, all layers of a step in one call. Softmax, mean over heads, features and
selection are one pass over a row's logits while they are in the core's cache.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attnhook.kernels.topk import cpu, dots, loops
from attnhook.kernels.topk.types import LayerRows, PagedKeys, TopK

_BLOCK_ELEMENTS = 3 << 18  # logits of a block of prompt rows: 3 MiB, about the cores' caches
_SINGLE_ELEMENTS = 1 << 22  # logits of single rows computed together: 16 MiB, unless one row needs more
_PROMPT_ROWS = 8  # consecutive rows that are worth a matrix product
_SERIAL = 1 << 15  # logits that are not worth waking threads for
_MADV_PAGEOUT = 21  # linux/mman.h; takes nothing away that cannot be read again
_IN_PLACE = (torch.float32, torch.bfloat16)  # keys that the loops read where they lie

# columns of the table of rows that the jobs take
_OFFSET, _STRIDE, _KEYS, _FIRST, _REQUEST, _LAYER, _RESULT = range(7)


def _pool() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch runs on; None where there is none.

    Its threads are torch's own, so an engine's thread count and core binding hold, and no second pool
    fights the first for the cores.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, TypeError, AttributeError):  # Windows knows no CDLL(None), other libraries no such symbol
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


_parallel = _pool()
_SERIAL_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _release_compiler() -> None:
    """Give the pages of LLVM back to the system, where Linux lets us.

    numba loads its compiler to load what it compiled before: about 70 MB of code that nothing runs again. Should
    something compile after all, the pages come back from the file.
    """
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            span, access, *_ = line.split()
            if "libllvmlite" in line and "w" not in access:
                start, end = (int(part, 16) for part in span.split("-"))
                madvise(start, end - start, _MADV_PAGEOUT)  # a hint: a kernel that does not know it does nothing


_release_compiler()


def _threads(work: int) -> int:
    return 1 if _parallel is None or work <= _SERIAL else torch.get_num_threads()


class _Job:
    """A job of `loops` with its words, before which two counters go; it may run more than once."""

    def __init__(self, job: Any, threads: int, words: list[int]) -> None:
        self.words = np.array([0, 0, *words], dtype=np.int64)
        words_at = self.words.ctypes.data
        self._call: tuple[Any, tuple[int, ...]]
        if threads > 1:
            self._call = _parallel, (job.address, words_at, threads, 0)
        else:
            self._call = _SERIAL_CALL(job.address), (words_at,)

    def run(self) -> None:
        self.words[:2] = 0
        function, arguments = self._call
        function(*arguments)


def computes(q: torch.Tensor, keys: PagedKeys) -> bool:
    """Whether the loops compute these types; float64 is the torch path's."""
    return torch.float64 not in (q.dtype, keys.cache.dtype)


def _numpy(x: torch.Tensor, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray((x.float() if x.is_floating_point() else x).numpy(), dtype=dtype)


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
) -> TopK:
    """See `attnhook.kernels.topk.topk_attention`; float64 is computed by the torch path."""
    if not computes(q, keys):
        return cpu.topk_attention(
            q, keys, row_request, row_position, top_k=top_k, scale=scale, softcap=softcap, window=window, sinks=sinks,
            alibi_slopes=alibi_slopes, head_mask=head_mask, spans=spans, first_reported=first_reported,
        )  # fmt: skip
    step = Step(row_request, top_k=top_k, head_mask=head_mask, spans=spans, first_reported=first_reported)
    return step([LayerRows(q, keys, row_position, scale, softcap, window, sinks, alibi_slopes)])[0]


def attention_rows(
    q: torch.Tensor,
    keys: PagedKeys,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    width: int,
    head_mask: torch.Tensor | None = None,
    **softmax: Any,
) -> torch.Tensor:
    """See `attnhook.kernels.topk.split.attention_rows`; float64 is computed by the torch path."""
    if not computes(q, keys):
        return cpu.attention_rows(q, keys, row_request, row_position, width=width, head_mask=head_mask, **softmax)
    dense = torch.zeros((q.shape[0], width))
    step = Step(row_request, top_k=1, head_mask=head_mask)
    step.dense = dense
    step([LayerRows(q, keys, row_position, **softmax)])
    return dense


class Step:
    """`topk_attention` of the same rows in any number of layers; see `attnhook.kernels.topk.TopKStep`.

    What the layers share is looked at once. No argument may change while the step lasts.
    """

    def __init__(
        self,
        row_request: torch.Tensor,
        *,
        top_k: int,
        head_mask: torch.Tensor | None = None,
        spans: torch.Tensor | None = None,
        first_reported: torch.Tensor | None = None,
    ) -> None:
        self.request = _numpy(row_request, np.int64)
        self.top_k = top_k
        self.lanes = max(128, 1 << (4 * top_k - 1).bit_length())
        self.spans = None if spans is None else _numpy(spans, np.int64)
        self.report_from = None if first_reported is None else _numpy(first_reported, np.int64)
        self.masks = None if head_mask is None else _numpy(head_mask, np.uint8)
        #: float32 [T, width] where the rows' attention itself is wanted, of one layer; the results then mean nothing
        self.dense: torch.Tensor | None = None
        self._again: dict[tuple[torch.Size, int], _Again] = {}
        # layers under one mask share positions and windows; the tensors are kept so that an id stays theirs
        self._placed: dict[tuple[int, int], tuple[LayerRows, np.ndarray, list[tuple[int, int]]]] = {}

    def __call__(self, layers: Sequence[LayerRows]) -> list[TopK]:
        """Results of layers with as many query heads, kv heads, dimensions and requests, computed together."""
        rows = len(self.request)
        kind = layers[0].q.shape, layers[0].keys.num_kv_heads
        if len(layers) == 1 and kind in self._again and self._again[kind].fits(layers[0]):
            spans = 0 if self.spans is None else self.spans.shape[1]
            result = cpu.empty_result(rows, self.top_k, spans, layers[0].q.device)
            self._again[kind].run(layers[0], result)
            return [result]
        call = _Call(self, layers)
        single = []  # pieces of the table, of rows that read their keys in place
        for number, layer in enumerate(layers):
            key = id(layer.row_position), id(layer.window)
            if key not in self._placed:
                self._placed[key] = layer, *_place(layer, self.request)
            _, template, prompts = self._placed[key]
            table = template.copy()
            table[_LAYER], table[_RESULT] = number, np.arange(number * rows, (number + 1) * rows)
            if not _reads_in_place(layer.keys):
                prompts = list(cpu.runs(self.request.tolist(), (table[_FIRST] + table[_KEYS]).tolist()))
            for start, stop in prompts:
                _prompt_rows(call, layer, table[:, start:stop], start, stop)
            if prompts:
                keep = np.ones(rows, bool)
                for start, stop in prompts:
                    keep[start:stop] = False
                table = table[:, keep]
            single.append(table)
        again = _single_rows(call, single[0] if len(single) == 1 else np.concatenate(single, axis=1))
        if len(layers) == 1:
            if again is not None:
                self._again[kind] = again
            return [call.result]
        return [TopK(*(x[n * rows : (n + 1) * rows] for x in call.result)) for n in range(len(layers))]


def _place(layer: LayerRows, request: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The table of a layer's rows, as far as it is the same for all layers, and the runs that are prompts."""
    position = _numpy(layer.row_position, np.int64)
    if isinstance(layer.window, torch.Tensor):
        width = _numpy(layer.window, np.int64)
        first = np.where(width < 0, 0, np.maximum(position - width + 1, 0))
    else:
        first = np.zeros_like(position) if layer.window < 0 else np.maximum(position - layer.window + 1, 0)
    table = np.zeros((7, len(request)), np.int64)
    table[_KEYS], table[_FIRST], table[_REQUEST] = position - first + 1, first, request
    runs = cpu.runs(request.tolist(), position.tolist()) if len(request) >= _PROMPT_ROWS else ()
    return table, [(start, stop) for start, stop in runs if stop - start >= _PROMPT_ROWS]


def _reads_in_place(keys: PagedKeys) -> bool:
    return keys.cache.dtype in _IN_PLACE and (keys.strides[3] == 1 or keys.strides[1] == 1)


class _Call:
    """Layers that are computed together, in the form that the jobs take."""

    def __init__(self, step: Step, layers: Sequence[LayerRows]) -> None:
        rows, self.heads, _ = layers[0].q.shape
        self.layers, self.top_k, self.lanes, self.dense = layers, step.top_k, step.lanes, step.dense
        self.requests = requests = layers[0].keys.page_table.shape[0]
        self.spans = np.zeros((requests, 0, 2), np.int64) if step.spans is None else step.spans
        self.report_from = np.zeros(requests, np.int64) if step.report_from is None else step.report_from
        if step.masks is None:
            self.masks = np.ones((requests, self.heads), np.uint8)
        else:
            self.masks = np.ascontiguousarray(np.broadcast_to(step.masks, (requests, self.heads)))
        self.sinks = self._per_head([layer.sinks for layer in layers], -math.inf)
        self.slopes = self._per_head([layer.alibi_slopes for layer in layers], 0.0)
        self.softcaps = np.array([layer.softcap for layer in layers], np.float32)
        device = layers[0].q.device
        self.result = cpu.empty_result(rows * len(layers), self.top_k, self.spans.shape[1], device)

    def _per_head(self, values: list[torch.Tensor | None], neutral: float) -> np.ndarray:
        """float32 [L, Hq], or [L, 0] where no layer has any; ``neutral`` changes nothing."""
        if all(value is None for value in values):
            return np.zeros((len(values), 0), np.float32)
        absent = torch.full((self.heads,), neutral)
        return np.stack([_numpy(absent if value is None else value, np.float32) for value in values])

    def reduction(self, z: torch.Tensor, table: np.ndarray) -> _Job:
        """The job that fills the results of a table's rows from their logits z, which it overwrites."""
        threads = _threads(int(table[_KEYS].sum()) * self.heads)
        width = -(-int(table[_KEYS].max()) // 16) * 16
        # whole cache lines, so that no two threads write to one
        part = -(-(4 * (width + 2 * self.top_k + self.lanes) + 8 * 2 * self.lanes) // 64) * 64
        self.scratch = np.empty(threads * part, np.uint8)
        words = [
            table.shape[1], self.heads, self.top_k, self.spans.shape[1], self.requests, len(self.layers),
            len(self.result.entropy), z.data_ptr(), z.numel(), table.ctypes.data,
            *(x.data_ptr() for x in self.result),
            self.spans.ctypes.data, self.masks.ctypes.data, self.report_from.ctypes.data,
            self.sinks.ctypes.data, self.sinks.shape[1], self.slopes.ctypes.data, self.slopes.shape[1],
            self.softcaps.ctypes.data, self.scratch.ctypes.data, part, width, self.lanes,
            0 if self.dense is None else self.dense.data_ptr(), 0 if self.dense is None else self.dense.shape[1],
        ]  # fmt: skip
        return _Job(loops.row_job, threads, words)


def _single_rows(call: _Call, table: np.ndarray) -> _Again | None:
    """Rows that read their keys in place, as many at once as the scratch holds."""
    if not table.size:
        return None
    layers, heads = call.layers, call.heads
    kv_heads, dim = layers[0].keys.num_kv_heads, layers[0].q.shape[2]
    pages = {id(x.keys.page_table): _numpy(x.keys.page_table, np.int64) for x in layers}
    pools = np.array([_pool_of(x.keys, pages[id(x.keys.page_table)]) for x in layers], np.int64)
    scales = np.stack([_scales(x) for x in layers])
    q = layers[0].q if len(layers) == 1 else torch.stack([x.q for x in layers]).flatten(0, 1)
    q = q.to(torch.float32).contiguous()
    if len(q) > table.shape[1]:  # the others were prompt rows
        q = q[torch.from_numpy(table[_RESULT])]
    ends = np.cumsum(table[_KEYS]) * heads
    parts = (table[_FIRST] + table[_KEYS] - 1) // dots.PART - table[_FIRST] // dots.PART + 1
    start = 0
    again = None
    while start < len(ends):
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + _SINGLE_ELEMENTS, side="right")))
        part = np.ascontiguousarray(table[:, start:stop])
        part[_STRIDE] = part[_KEYS]
        part[_OFFSET] = ends[start:stop] - base - part[_KEYS] * heads
        z = cpu.buffer("logits", int(ends[stop - 1]) - base, q, torch.float32)
        products = _Job(
            dots.dot_job,
            _threads(z.numel()),
            [
                stop - start, heads, kv_heads, dim, z.data_ptr(), z.numel(), part.ctypes.data, q[start:].data_ptr(),
                pools.ctypes.data, len(pools), scales.ctypes.data, int(parts[start:stop].max()),
            ],
        )  # fmt: skip
        reduction = call.reduction(z, part)
        products.run()
        reduction.run()
        if len(layers) == 1 and stop - start == len(call.result.entropy):
            again = _Again(layers[0], products, reduction, pools, (call, z, part, pages, scales))
        start = stop
    return again


def _scales(layer: LayerRows) -> np.ndarray:
    """float32 [Hkv]: what the product of a query and a stored key is multiplied by."""
    k_scale = layer.keys.k_scale
    factor = 1.0 if k_scale is None else _numpy(torch.as_tensor(k_scale), np.float32)
    return np.ascontiguousarray(np.broadcast_to(np.float32(layer.scale) * factor, layer.keys.num_kv_heads), np.float32)


class _Again:
    """The jobs of a layer whose rows read their keys in place, for the next layers of the same step.

    Preparing them costs more than running them where rows are few, as in decoding.
    """

    def __init__(self, layer: LayerRows, products: _Job, reduction: _Job, pools: np.ndarray, kept: Any) -> None:
        self._layer, self._products, self._reduction, self._pools, self._kept = layer, products, reduction, pools, kept

    def fits(self, layer: LayerRows) -> bool:
        """Whether nothing differs from the layer before but q, the keys' place and the results'."""
        old = self._layer
        return (
            layer.row_position is old.row_position
            and layer.window is old.window
            and layer.keys.page_table is old.keys.page_table
            and layer.sinks is None is old.sinks
            and layer.alibi_slopes is None is old.alibi_slopes
            and layer.keys.k_scale is None is old.keys.k_scale
            and (layer.scale, layer.softcap, layer.keys.page_size) == (old.scale, old.softcap, old.keys.page_size)
            and layer.keys.cache.dtype == old.keys.cache.dtype
            and _reads_in_place(layer.keys)
        )

    def run(self, layer: LayerRows, result: TopK) -> None:
        q = layer.q.to(torch.float32).contiguous()
        self._pools[0, 0] = layer.keys.cache.data_ptr()
        self._pools[0, 2:6] = layer.keys.strides
        self._products.words[9] = q.data_ptr()
        self._reduction.words[12:17] = [x.data_ptr() for x in result]
        self._products.run()
        self._reduction.run()


def _pool_of(keys: PagedKeys, pages: np.ndarray) -> tuple[int, ...]:
    cache = keys.cache
    return (
        cache.data_ptr(), cache.element_size(), *keys.strides, keys.page_size, pages.ctypes.data, pages.shape[1]
    )  # fmt: skip


def _prompt_rows(call: _Call, layer: LayerRows, table: np.ndarray, start: int, stop: int) -> None:
    """Rows start..stop of a layer: one request at consecutive positions, which share matrix products."""
    heads, keys = call.heads, layer.keys
    seen, first = table[_KEYS], table[_FIRST]
    position = first + seen - 1
    low = int(first.min())
    k = cpu.gather(keys.pages(layer.q.shape[2]), keys, int(table[_REQUEST, 0]), low, int(position[-1]) + 1)
    queries = cpu.queries(layer.q[start:stop], keys, layer.scale, torch.float32).transpose(0, 1)  # [Hq, R, D]
    t = 0
    while t < len(seen):
        end = min(t + cpu.block_rows(int(seen[t]), heads, _BLOCK_ELEMENTS), len(seen))
        lowest = int(first[t:end].min())
        z = cpu.logits(queries[:, t:end], k[lowest - low : int(position[end - 1]) + 1 - low])
        part = np.ascontiguousarray(table[:, t:end])
        part[_OFFSET] = np.arange(end - t) * z.shape[2] + first[t:end] - lowest
        part[_STRIDE] = z.shape[1] * z.shape[2]
        call.reduction(z, part).run()
        t = end
