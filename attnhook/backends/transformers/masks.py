"""Which keys a row sees, read from the mask that the attention function itself is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnhook.errors import UnsupportedError

SDPA, EAGER, FLASH, FLEX = "sdpa", "eager", "flash", "flex"


def family(implementation: str | None) -> str:
    """Kind of attention function behind a registered name. Raises UnsupportedError for an unknown one."""
    name = implementation or EAGER
    if name in (SDPA, EAGER):
        return name
    if name == "flex_attention":
        return FLEX
    if name.startswith("flash_attention_") or "flash-attn" in name:
        return FLASH
    raise UnsupportedError(
        f"attn_implementation={name!r}: what this attention function computes is unknown; load the model with "
        "'sdpa', 'flash_attention_2', 'flex_attention' or 'eager'"
    )


@dataclass(frozen=True)
class Visible:
    """Visible keys of T rows, in slots of the key tensor: the ``count`` slots that end at ``last``."""

    last: torch.Tensor  # int64 [T]; each row's own slot
    count: torch.Tensor  # int64 [T]


def visible(
    mask: Any,
    kind: str,
    batch: torch.Tensor,
    row: torch.Tensor,
    q_len: int,
    kv_len: int,
    window: int | None,
    causal: bool = True,
) -> Visible:
    """Visible keys of the rows ``row`` (int64 [T], index among q_len queries) of sequences ``batch``.

    ``mask`` is what the attention function got: None, a 2-D padding mask (flash), a 4-D bool or additive mask, or a
    BlockMask (flex). Without one a module that is not ``causal`` sees every key. Raises UnsupportedError where a row
    sees anything but one unbroken range.
    """
    if mask is None and not causal:
        return Visible(torch.full_like(row, kv_len - 1), torch.full_like(row, kv_len))
    if mask is None:
        return _unmasked(kind, row, q_len, kv_len, window)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and kind == FLASH:
        last = kv_len - q_len + row
        count = last + 1 - _leading_zeros(mask[:, :kv_len])[batch]
        return Visible(last, count if window is None else count.clamp(max=window))
    return _from_dense(mask, kind, batch, row, kv_len)


def _unmasked(kind: str, row: torch.Tensor, q_len: int, kv_len: int, window: int | None) -> Visible:
    if kind == FLASH:  # causal, aligned to the last key
        last = kv_len - q_len + row
        return Visible(last, last + 1 if window is None else (last + 1).clamp(max=window))
    if q_len == 1:  # one query and no mask: it sees every key
        return Visible(row + kv_len - 1, torch.full_like(row, kv_len))
    if kind == SDPA:  # is_causal, aligned to the first key; sdpa cuts the keys to q_len
        return Visible(row, row + 1)
    raise UnsupportedError(
        f"{kind} attention over {q_len} queries ran without a mask, so it is not causal; only causal attention "
        "can be captured"
    )


def _from_dense(mask: Any, kind: str, batch: torch.Tensor, row: torch.Tensor, kv_len: int) -> Visible:
    last, count = torch.empty_like(row), torch.empty_like(row)
    chunk = max(1, (1 << 22) // kv_len)  # rows of mask looked at together: 4 MiB of bools
    for t in range(0, len(row), chunk):
        part = slice(t, t + chunk)
        seen = _rows_of(mask, kind, batch[part], row[part], kv_len)
        total = seen.sum(-1)
        first = seen.to(torch.uint8).argmax(-1)
        end = kv_len - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)
        if bool(((end - first + 1) != total).any()):
            raise UnsupportedError(
                "the attention mask has holes (packed sequences, padding inside a prompt, or a custom 4-D mask); "
                "only causal attention over an unbroken range of keys can be captured"
            )
        last[part], count[part] = end, total
    same_sequence = batch[1:] == batch[:-1]
    if bool((same_sequence & ((last[1:] - last[:-1]) != (row[1:] - row[:-1]))).any()):
        raise UnsupportedError(
            "the attention mask lets tokens see later ones (bidirectional attention, as in a prefix or an image), and "
            "only causal attention can be captured; leave out the prompt's rows (prompt=False)"
        )
    return Visible(last, count)


def leading_padding(mask: Any, batch: int, q_len: int) -> list[int]:
    """Slots of padding at the left of each sequence, by the mask [*, 1, q_len, >= q_len] of a pass without cached keys.

    A real token sees itself and no later one, and no padding. A row of padding sees nothing, or everything. Where no
    slot fits, which is so in bidirectional attention, there is no padding. Raises UnsupportedError.
    """
    kind = FLEX if hasattr(mask, "mask_mod") else SDPA
    device = mask.device if isinstance(mask, torch.Tensor) else torch.device("cpu")
    if kind == FLEX:
        device = mask.kv_num_blocks.device
    rows = torch.arange(q_len, device=device)
    starts = []
    for b in range(batch):
        seen = _rows_of(mask, kind, torch.full_like(rows, b), rows, q_len)
        later = torch.zeros_like(rows, dtype=torch.bool)
        later[:-1] = seen.diagonal(1)
        first = int((seen.diagonal() & ~later).to(torch.uint8).argmax())
        starts.append(0 if bool(seen[first:, :first].any()) else first)
    return starts


def _rows_of(mask: Any, kind: str, batch: torch.Tensor, row: torch.Tensor, kv_len: int) -> torch.Tensor:
    """Bool [T, kv_len]: the mask's rows."""
    if kind == FLEX and hasattr(mask, "mask_mod"):
        columns = torch.arange(kv_len, device=batch.device)
        head = torch.zeros((), dtype=torch.int64, device=batch.device)
        seen: torch.Tensor = mask.mask_mod(batch[:, None], head, row[:, None], columns[None, :])
        return seen.expand(len(row), kv_len)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(f"attention mask of an unknown kind ({shape}); pass a 2-D attention_mask to the model")
    if mask.shape[1] != 1:
        raise UnsupportedError("the attention mask differs between heads; a record averages over heads under one mask")
    picked = mask[batch if mask.shape[0] > 1 else torch.zeros_like(batch), 0, row, :kv_len]
    if picked.shape[-1] != kv_len:
        raise UnsupportedError(f"the attention mask covers {picked.shape[-1]} of {kv_len} keys")
    if picked.dtype == torch.bool:
        return picked
    seen = picked == 0
    if bool((~seen & (picked > torch.finfo(picked.dtype).min / 2)).any()):
        raise UnsupportedError(
            "the additive attention mask holds values other than 0 and -inf (a position bias); such models cannot "
            "be captured"
        )
    return seen


def _leading_zeros(mask: torch.Tensor) -> torch.Tensor:
    return (mask.to(torch.int64).cumsum(-1) == 0).sum(-1)
