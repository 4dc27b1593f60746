"""What the top-k attention kernels take and return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from attnhook.record.fingerprint import BINS

#: Fields of `TopK` that are int32; the others are float32.
INTEGERS = ("positions", "head_positions")


class TopK(NamedTuple):
    """Result of `topk_attention` for T rows."""

    positions: torch.Tensor  # int32 [T, k]; -1 behind the last reportable key
    scores: torch.Tensor  # float32 [T, k]; attention probabilities, descending
    histogram: torch.Tensor  # float32 [T, 16]; fingerprint.BIN_STARTS gives the bins
    entropy: torch.Tensor  # float32 [T]; normalised to [0, 1]
    span_mass: torch.Tensor  # float32 [T, n]
    # of each query head by itself, selected or not: H is Hq where `PerHead` asks for them, else 0
    head_positions: torch.Tensor  # int32 [T, H, k_h]
    head_scores: torch.Tensor  # float32 [T, H, k_h]
    head_histogram: torch.Tensor  # float32 [T, H, 16]
    head_entropy: torch.Tensor  # float32 [T, H]
    head_span_mass: torch.Tensor  # float32 [T, H, n]
    head_lse: torch.Tensor  # float32 [T, H]; natural logarithm of the softmax's denominator, the learned sink included


class Arrays(NamedTuple):
    """`TopK` in numpy's arrays."""

    positions: np.ndarray
    scores: np.ndarray
    histogram: np.ndarray
    entropy: np.ndarray
    span_mass: np.ndarray
    head_positions: np.ndarray
    head_scores: np.ndarray
    head_histogram: np.ndarray
    head_entropy: np.ndarray
    head_span_mass: np.ndarray
    head_lse: np.ndarray


@dataclass(frozen=True)
class PagedKeys:
    """A strided view of the key cache; one description serves every engine's layout.

    Element d of kv head h of slot j of page g lies at
    ``cache.data[offset + g * strides[0] + j * strides[1] + h * strides[2] + d * strides[3]]``, in
    elements from the start of ``cache``'s view. Position s of request r is slot ``s % page_size`` of page
    ``page_table[r, s // page_size]``.

    ``k_scale`` multiplies the stored keys (FP8 caches): one float, or one per kv head.
    """

    cache: torch.Tensor  # any shape; strides below describe it
    page_table: torch.Tensor  # int32 or int64 [R, pages]
    page_size: int
    strides: tuple[int, int, int, int]  # page, slot, kv head, dim; in elements
    num_kv_heads: int
    k_scale: torch.Tensor | float | None = None

    @classmethod
    def from_dense(cls, k: torch.Tensor, k_scale: torch.Tensor | float | None = None) -> PagedKeys:
        """One page per request for keys ``[R, Hkv, N, D]`` (any strides), as Transformers caches them."""
        requests, heads, slots, _ = k.shape
        table = _one_page_each(requests, k.device)
        strides = (k.stride(0), k.stride(2), k.stride(1), k.stride(3))
        return cls(k, table, slots, strides, heads, k_scale)

    @property
    def max_keys(self) -> int:
        """Most keys that the page table can address per request."""
        return self.page_table.shape[1] * self.page_size

    def pages(self, head_dim: int) -> torch.Tensor:
        """The cache as ``[pages, slot, kv head, dim]`` without a copy."""
        page, slot, head, dim = self.strides
        inner = (self.page_size - 1) * slot + (self.num_kv_heads - 1) * head + (head_dim - 1) * dim
        storage = self.cache.untyped_storage().nbytes() // self.cache.element_size()
        room = storage - self.cache.storage_offset() - inner
        # a stride of 0 makes every page number the same page
        count = 2**31 - 1 if page == 0 else max((room - 1) // page + 1, 0)
        return self.cache.as_strided((count, self.page_size, self.num_kv_heads, head_dim), self.strides)


@lru_cache(maxsize=64)
def _one_page_each(requests: int, device: torch.device) -> torch.Tensor:
    return torch.arange(requests, dtype=torch.int32, device=device).view(requests, 1)


def gather(view: torch.Tensor, keys: PagedKeys, request: int, low: int, high: int) -> torch.Tensor:
    """Stored keys ``[high - low, Hkv, D]`` of positions low..high-1: a view where one page holds them."""
    first, last = low // keys.page_size, (high - 1) // keys.page_size
    offset = low - first * keys.page_size
    if first == last:
        return view[int(keys.page_table[request, first])][offset : offset + high - low]
    pages = keys.page_table[request, first : last + 1].long()
    return view[pages].flatten(0, 1)[offset : offset + high - low]


class Softmax(NamedTuple):
    """The softmax of one layer's rows; see `topk_attention` for shapes and meaning."""

    scale: float
    softcap: float = 0.0
    window: int | torch.Tensor = -1
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def rows(self, part: slice | int) -> Softmax:
        """The same of some rows, or of one: what there is per row loses the others."""
        window = self.window[part] if isinstance(self.window, torch.Tensor) else self.window
        return self._replace(window=window, lse=None if self.lse is None else self.lse[part])


class LayerRows(NamedTuple):
    """What one layer brings: rows q [T, Hq, D] at positions [T], the keys that they see, and the softmax over these."""

    q: torch.Tensor
    keys: PagedKeys
    row_position: torch.Tensor
    softmax: Softmax
    key_mass: torch.Tensor | None = None  # float32 [S, G, W], to which the rows' attention is added; see `PerKey`


class PerHead(NamedTuple):
    """What is wanted of each query head beside the mean over the selected ones; see `topk_attention`."""

    top_k: int = 0
    fingerprint: bool = False  # histogram and entropy
    spans: bool = False
    lse: bool = False

    @property
    def scores(self) -> bool:
        """Whether the heads' probabilities are needed, and not their normalisers alone."""
        return bool(self.top_k or self.fingerprint or self.spans)


NO_HEADS = PerHead()


class PerKey(NamedTuple):
    """What is wanted of each key: the sum of the attention that rows give it, in `LayerRows.key_mass`.

    Row t is added to the sums ``slot[t]`` of S; rows of one slot belong to one request. G is 1, the mean over the
    selected heads, or with ``kv_heads`` Hkv: the mean over the query heads of each, selected or not.
    """

    slot: torch.Tensor  # int64 [T]
    kv_heads: bool = False


class Selection(NamedTuple):
    """What is wanted of each row, the same in all layers; see `topk_attention` for shapes and meaning.

    A result that is not always wanted belongs here as a field that asks for it, and in `TopK` as one that answers.
    """

    top_k: int
    head_mask: torch.Tensor | None = None
    spans: torch.Tensor | None = None
    first_reported: torch.Tensor | None = None
    per_head: PerHead = NO_HEADS
    per_key: PerKey | None = None

    @property
    def span_count(self) -> int:
        """Ranges per request whose mass is wanted."""
        return 0 if self.spans is None else self.spans.shape[1]

    def shapes(self, heads: int) -> dict[str, tuple[int, ...]]:
        """What a row has in each field of `TopK`, for so many query heads."""
        asked, n = self.per_head, self.span_count
        top, prints, spans, lse = (heads * bool(x) for x in (asked.top_k, asked.fingerprint, asked.spans, asked.lse))
        return {
            "positions": (self.top_k,),
            "scores": (self.top_k,),
            "histogram": (BINS,),
            "entropy": (),
            "span_mass": (n,),
            "head_positions": (top, asked.top_k),
            "head_scores": (top, asked.top_k),
            "head_histogram": (prints, BINS),
            "head_entropy": (prints,),
            "head_span_mass": (spans, n),
            "head_lse": (lse,),
        }

    def results(self, rows: int, heads: int, make: Callable[..., torch.Tensor], **how: Any) -> TopK:
        """Results of so many rows and query heads that ``make``, such as `torch.zeros`, makes of a shape.

        ``how``: device, and the dtype of what is no position (default: float32).
        """
        dtype = how.pop("dtype", torch.float32)
        shapes = self.shapes(heads).items()
        return TopK(
            *(make((rows, *own), dtype=torch.int32 if name in INTEGERS else dtype, **how) for name, own in shapes)
        )

    def requests(self, row_request: torch.Tensor) -> Selection:
        """What is wanted of rows of these requests, int64 [T], as if each row were a request of its own."""
        return self._replace(
            head_mask=self.head_mask[row_request] if self.head_mask is not None and self.head_mask.dim() == 2
            else self.head_mask,
            spans=None if self.spans is None else self.spans[row_request],
            first_reported=None if self.first_reported is None else self.first_reported[row_request],
        )  # fmt: skip


def check_inputs(layer: LayerRows, row_request: torch.Tensor, selection: Selection) -> None:
    """Raise ValueError where shapes disagree; reads no device value."""
    q, keys, row_position, softmax, key_mass = layer
    spans, window, lse = selection.spans, softmax.window, softmax.lse
    if q.dim() != 3:
        raise ValueError(f"q must be [rows, query heads, head_dim], got shape {tuple(q.shape)}")
    rows, heads, _ = q.shape
    requests = keys.page_table.shape[0]
    if keys.page_table.dim() != 2:
        raise ValueError(f"page_table must be [requests, pages], got shape {tuple(keys.page_table.shape)}")
    if keys.num_kv_heads < 1 or heads % keys.num_kv_heads:
        raise ValueError(f"{heads} query heads do not divide into {keys.num_kv_heads} kv heads")
    if selection.per_head.top_k < 0:
        raise ValueError(f"per_head.top_k must be at least 0, got {selection.per_head.top_k}")
    if selection.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {selection.top_k}")
    expected: list[tuple[str, torch.Tensor | None, tuple[tuple[int, ...], ...]]] = [
        ("row_request", row_request, ((rows,),)),
        ("row_position", row_position, ((rows,),)),
        ("window", window if isinstance(window, torch.Tensor) else None, ((rows,),)),
        ("sinks", softmax.sinks, ((heads,),)),
        ("alibi_slopes", softmax.alibi_slopes, ((heads,),)),
        ("head_mask", selection.head_mask, ((heads,), (requests, heads))),
        ("spans", spans, ((requests, spans.shape[1] if spans is not None and spans.dim() == 3 else 0, 2),)),
        ("first_reported", selection.first_reported, ((requests,),)),
        ("lse", lse, ((rows, heads),)),
        ("per_key.slot", None if selection.per_key is None else selection.per_key.slot, ((rows,),)),
    ]
    for name, tensor, shapes in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}: move it there")
    if (selection.per_key is None) != (key_mass is None):
        raise ValueError("per_key and key_mass come together: which sums a row is added to, and the sums")
    if selection.per_key is not None and key_mass is not None:
        groups = keys.num_kv_heads if selection.per_key.kv_heads else 1
        if key_mass.dim() != 3 or key_mass.shape[1] != groups or not key_mass.is_contiguous():
            raise ValueError(f"key_mass must be contiguous [slots, {groups}, keys], got shape {list(key_mass.shape)}")
        if key_mass.dtype != torch.float32 or key_mass.device != q.device:
            raise ValueError(f"key_mass must be float32 on {q.device}, got {key_mass.dtype} on {key_mass.device}")
        if q.device.type == "cpu" and rows:
            slots, last = selection.per_key.slot, int(row_position.max())
            if last >= key_mass.shape[2] or int(slots.min()) < 0 or int(slots.max()) >= key_mass.shape[0]:
                raise ValueError(
                    f"key_mass has {key_mass.shape[0]} slots of {key_mass.shape[2]} keys, and rows are of slots "
                    f"{int(slots.min())} to {int(slots.max())} and see keys up to {last}"
                )
    if lse is not None and lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse is {lse.dtype}: a normaliser in less than float32 moves every probability")
