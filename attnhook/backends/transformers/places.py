"""Where each sequence of a batch begins and ends: padding, whatever says so, and virtual tokens before the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from attnhook.backends.transformers.masks import leading_padding
from attnhook.errors import UnsupportedError

Extent = tuple[list[int], list[int]]  # padded index of each sequence's first token, and of the one behind its last


def of_masks(masks: Iterable[Any], batch: int, total: int, virtual: int) -> Extent | None:
    """By the first of a pass's attention masks that is one of padding, int or bool ``[B, n]``; None where none is.

    ``masks`` are those of the model itself and of the models around it, in this order. One of another model counts
    where it covers all ``total`` tokens. Raises UnsupportedError for zeros between ones.
    """
    for place, mask in enumerate(masks):
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and (place == 0 or mask.shape[1] == total):
            starts, ends = of_padding(mask, virtual)
            times = batch // len(starts) if starts else 1
            return starts * times, ends * times
    return None


def of_padding(mask: torch.Tensor, virtual: int = 0) -> Extent:
    """By a mask ``[B, n]`` of ones and zeros; a sequence of zeros alone begins and ends behind it.

    The first ``virtual`` columns are virtual tokens, which are none of the text. Raises UnsupportedError.
    """
    real = mask.to(torch.bool)[:, virtual:]
    width = real.shape[1]
    some = real.any(-1)
    starts = torch.where(some, real.to(torch.uint8).argmax(-1), width)
    ends = torch.where(some, width - real.flip(-1).to(torch.uint8).argmax(-1), width)
    holes = real.sum(-1) != ends - starts
    if bool(holes.any()):
        b = int(holes.nonzero()[0])
        inside = real[b, int(starts[b]) : int(ends[b])]
        at = int(starts[b]) + int((~inside).nonzero()[0]) + virtual
        raise UnsupportedError(
            f"attention_mask of sequence {b} has zeros between ones (the first is column {at}); only padding on the "
            "left or right of a prompt can be captured: tokenize with padding_side='left'"
        )
    return behind(starts.tolist(), virtual, some.tolist()), (ends + virtual).tolist()


def behind(starts: list[int], virtual: int, some: list[bool] | None = None) -> list[int]:
    """The padded indices ``starts`` of texts behind ``virtual`` tokens that are none of them.

    ``some`` tells which sequences have tokens; default: all. Raises UnsupportedError where padding lies between.
    """
    if virtual and any(start and (some is None or some[b]) for b, start in enumerate(starts)):
        raise UnsupportedError(
            f"padding stands between {virtual} virtual tokens (prefix or prompt tuning) and the text, so the keys have "
            "a gap, which cannot be captured: run prompts of one length together, or one at a time"
        )
    return [start + virtual for start in starts]


def prompts(mask: Any) -> tuple[list[int], str | None]:
    """Padding at the left of each prompt by ``generate``'s own mask, and what is wrong with it, if anything.

    The list is empty where the mask is none of padding. Passes of the ``generate`` may get another kind of mask.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return [], None
    real = mask.to(torch.bool)
    starts = torch.where(real.any(-1), real.to(torch.uint8).argmax(-1), real.shape[1])
    behind_ones = ~real & (real.to(torch.int64).cumsum(-1) > 0)
    if not bool(behind_ones.any()):
        return starts.tolist(), None
    b, column = behind_ones.nonzero()[0].tolist()
    return starts.tolist(), (
        f"attention_mask of sequence {b} has zeros behind ones (the first is column {column}), and generate() goes on "
        "from the last column, so a row of padding makes the first token: tokenize with padding_side='left'"
    )


def text_positions(given: Any) -> torch.Tensor | None:
    """Positions ``[B, q_len]`` in the text of what a model got as ``position_ids``; None where they tell none.

    Models with three-dimensional positions (M-RoPE) may give the text's as the first of four rows. The three of images
    and videos alone are no places in the text.
    """
    if not isinstance(given, torch.Tensor):
        return None
    if given.dim() == 3 and given.shape[0] == 4:
        given = given[0]
    return given if given.dim() == 2 else None


def of_layer_mask(
    mask: Any, positions: torch.Tensor | None, known: list[int] | None, batch: int, q_len: int, past: int
) -> list[int]:
    """First padded index by the ready-made mask that a layer was given, where there is no mask of padding.

    ``known`` is what the first pass of a conversation found. Raises UnsupportedError where nothing tells.
    """
    if past == 0:
        return leading_padding(mask, batch, q_len)
    if known is not None and len(known) == batch:
        return known
    if positions is not None:
        total = past + q_len
        starts = [total - 1 - place for place in positions[:, -1].tolist()]
        return starts * (batch // len(starts))
    raise UnsupportedError(
        f"a ready-made attention mask and no text positions came with a pass behind {past} cached tokens, so nothing "
        "tells where a prompt's padding ends: pass a 2-D attention_mask, or position_ids of the text"
    )
