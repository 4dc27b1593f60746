"""A toy engine: one layer of attention with two heads; its next token is the one that it attends to most.

It knows nothing of attnhook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__version__ = "0.1"
HEADS, DIM, VOCABULARY = 2, 8, 32
SCALE = DIM**-0.5

_tables = torch.randn(2, HEADS, VOCABULARY, DIM, generator=torch.Generator().manual_seed(0))


def attend(request: str, step: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention float32 [HEADS, N] of one query [HEADS, DIM] over all keys [HEADS, N, DIM]."""
    return torch.softmax(SCALE * torch.einsum("hd,hnd->hn", q, k), dim=-1)


def generate(prompt: Sequence[int], new_tokens: int, request: str = "echo-0") -> list[int]:
    """The prompt and ``new_tokens`` more."""
    tokens = list(prompt)
    for step in range(new_tokens):
        queries, keys = _tables[:, :, tokens]
        attention = attend(request, step, queries[:, -1], keys)
        tokens.append(tokens[int(attention.mean(0).argmax())])
    return tokens
