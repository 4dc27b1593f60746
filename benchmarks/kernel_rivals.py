"""What `benchmarks.kernels` compares with: other ways from queries and keys to the keys attended to most.

Each is a function without arguments over inputs that are in place. They get dense keys, a matrix per kv head, so that
no gathering from pages counts against them, and return (scores, positions) or positions alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnhook.kernels.topk import PagedKeys, topk_attention

PAGE = 16
CHUNK = 64  # keys of which the two-phase method keeps the maximum

Method = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """One decoding step: ``batch`` requests with as many keys each."""

    batch: int
    keys: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def key_bytes(self) -> int:
        return self.batch * self.keys * self.kv_heads * self.dim * 2

    def __str__(self) -> str:
        return f"{self.batch} x {self.keys:,} keys, {self.heads}/{self.kv_heads} heads, D {self.dim}"


@dataclass(frozen=True)
class Inputs:
    """Random bfloat16 queries and keys, the keys once in shuffled pages and once as matrix products want them."""

    size: Size
    q: torch.Tensor  # [B, Hq, D]
    paged: PagedKeys
    dense: torch.Tensor  # [B, Hkv, N, D], contiguous: the pages in their own order
    rows: torch.Tensor
    positions: torch.Tensor

    def ours(self, top_k: int, **options: Any) -> Any:
        scale = self.size.dim**-0.5
        return topk_attention(self.q, self.paged, self.rows, self.positions, top_k=top_k, scale=scale, **options)


def make_inputs(size: Size, device: torch.device) -> Inputs:
    """Queries scaled so that attention is peaked as in models: logits with standard deviation 3."""
    generator = torch.Generator(device).manual_seed(0)
    pages = size.batch * size.keys // PAGE
    cache = torch.empty(pages, PAGE, size.kv_heads, size.dim, dtype=torch.bfloat16, device=device)
    step = max(1, (1 << 26) // cache[0].numel())
    for start in range(0, pages, step):
        part = cache[start : start + step]
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    q = 3 * torch.randn(size.batch, size.heads, size.dim, generator=generator, device=device)
    table = torch.randperm(pages, generator=generator, device=device).view(size.batch, -1).int()
    page, slot, head, dim = cache.stride()
    return Inputs(
        size, q.to(torch.bfloat16), PagedKeys(cache, table, PAGE, (page, slot, head, dim), size.kv_heads),
        cache.view(size.batch, size.keys, size.kv_heads, size.dim).transpose(1, 2).contiguous(),
        torch.arange(size.batch, dtype=torch.int32, device=device),
        torch.full((size.batch,), size.keys - 1, dtype=torch.int32, device=device),
    )  # fmt: skip


def probabilities(inputs: Inputs) -> torch.Tensor:
    """[B, N]: softmax of every head's logits, averaged; everything in memory at once."""
    size = inputs.size
    q = inputs.q.view(size.batch, size.kv_heads, -1, size.dim)
    logits: torch.Tensor = (q @ inputs.dense.transpose(2, 3)).float() * size.dim**-0.5
    return logits.softmax(-1).mean((1, 2))


def log_sum_exp(inputs: Inputs) -> torch.Tensor:
    """float32 [B, Hq]: what an engine's attention has at hand."""
    size = inputs.size
    rows = []
    for row in range(size.batch):
        q = inputs.q[row].view(size.kv_heads, -1, size.dim).float() * size.dim**-0.5
        step = 1 << 14
        blocks = (inputs.dense[row, :, start : start + step] for start in range(0, size.keys, step))
        parts = [torch.logsumexp(q @ k.float().transpose(1, 2), -1) for k in blocks]
        rows.append(torch.logsumexp(torch.stack(parts), 0).flatten())
    return torch.stack(rows)


def chunk_maxima(inputs: Inputs, top_k: int) -> torch.Tensor:
    """Positions by mean logits: maximum of every chunk of keys, the best chunks, their keys once more.

    Not exact: the mean of logits is not the mean of probabilities.
    """
    size = inputs.size
    mean = inputs.q.view(size.batch, size.kv_heads, -1, size.dim).mean(2, keepdim=True)
    logits = (mean @ inputs.dense.transpose(2, 3)).mean((1, 2))
    chunks = logits.view(size.batch, -1, CHUNK)
    best = chunks.amax(-1).topk(min(top_k, chunks.shape[1])).indices
    columns = (best[:, :, None] * CHUNK + torch.arange(CHUNK, device=best.device)).flatten(1)
    keys = inputs.dense.gather(2, columns[:, None, :, None].expand(-1, size.kv_heads, -1, size.dim))
    again: torch.Tensor = (mean @ keys.transpose(2, 3)).mean((1, 2))
    return columns.gather(1, again.topk(top_k).indices)


def rivals(inputs: Inputs, top_k: int, materialised: bool = True) -> dict[str, Method]:
    """Methods by name; those that hold all probabilities only where ``materialised``."""
    found: dict[str, Method] = {"chunk maxima, mean logits (inexact)": lambda: chunk_maxima(inputs, top_k)}
    if not materialised:
        return found
    scores = probabilities(inputs)
    found["naive torch: softmax(QK^T), topk"] = lambda: probabilities(inputs).topk(top_k)
    found["torch.topk alone, probabilities given"] = lambda: scores.topk(top_k)
    if inputs.q.device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None:
        import flashinfer  # type: ignore[import-not-found]

        select = getattr(flashinfer, "top_k", None)
        if select is not None:
            found["flashinfer.top_k alone, probabilities given"] = lambda: select(scores, top_k)
    return found
