"""How the Triton kernels divide a call: which path, how much scratch, how many launches. Shapes alone decide.

*One pass* keeps the logits of some kv heads in scratch, float32 per query head and key, so that every key is read
once. *Recompute* keeps none: it finds each head's maximum and sum first and computes the logits again for the
average, which is what a prompt wants (many rows share each key that is loaded) and a kv head with so many query
heads that their logits weigh as much as its keys (MLA, MQA). Where the caller knows the normaliser, the first of
these two passes falls away.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from attnhook.kernels.topk.types import PagedKeys

UNIT = 128  # keys that a split is a multiple of; a whole number of tiles and of key blocks
TILE = 32  # keys whose sums and best key are kept; 128 bytes of scores, one cache line
MAX_SPLITS = 64
SCRATCH_BYTES = 256 << 20  # of decoding rows together; one row may need more
_PROMPT_BYTES = 64 << 20  # of prompt rows together; one tile of rows may need more
_KEY_SHARE = 16  # scratch of decoding rows is at most this part of the key bytes that the page table addresses
MASS_BLOCK = 128  # tiles whose masses one program adds up at once
_FEW_SPLITS = 8
_FEW_TILES_BITS = 6  # a selection over no more than 64 tiles looks at 64 at once
_BLOCK_BITS = 10  # candidates of a selection that are sorted at once; they live in registers
_LANES = 64  # rows x query heads of a kv head that one program computes, unless a single row has more


class Plan(NamedTuple):
    """What is launched together: ``rows`` rows, ``kv_heads`` kv heads at a time."""

    one_pass: bool
    rows: int  # query rows whose attention is in scratch at once
    kv_heads: int  # kv heads whose logits are in scratch at once; all of them where no logits are kept
    splits: int  # key splits per row, or per tile of rows
    tile_rows: int  # consecutive rows that one program computes; 1 while one pass
    width: int  # keys per row that scratch holds


def make_plan(
    q: torch.Tensor, keys: PagedKeys, window: int | torch.Tensor, *, lse: bool = False, per_head: bool = False
) -> Plan:
    """The plan of a call with at least one row; looks at shapes and dtypes only.

    ``lse``: the caller brings the normaliser. ``per_head``: each head's probabilities are reduced by themselves.
    """
    width = scratch_keys(keys.max_keys, window)
    decoding = len(q) <= keys.page_table.shape[0]  # as a rule each row has keys of its own
    plan = one_pass(q, keys, width, per_head=per_head) if decoding and not lse else None
    return plan or recompute(q, keys, width, lse=lse, per_head=per_head)


def one_pass(
    q: torch.Tensor, keys: PagedKeys, width: int, share: float = 1 / _KEY_SHARE, *, per_head: bool = False
) -> Plan | None:
    """As many kv heads, then rows, at once as keep the scratch at a share of the rows' key bytes.

    At least one row and one kv head. None where writing and reading its logits would be more than half the traffic
    of reading its keys: then it is as cheap to read these twice.
    """
    rows, heads, head_dim = q.shape
    kv_heads, key_bytes = keys.num_kv_heads, head_dim * keys.cache.element_size()
    group = heads // kv_heads
    if 2 * 2 * 4 * group > key_bytes and share < 1:
        return None
    budget = int(kv_heads * key_bytes * width * share)  # of one row
    rest = row_bytes(0, width)
    each = row_bytes(group, width) - rest + per_head * group * head_tile_bytes(width)
    at_once = min(max(1, (budget - rest) // each), kv_heads)
    at_once = math.ceil(kv_heads / math.ceil(kv_heads / at_once))  # in parts of about one size
    chunk = max(1, min(rows * budget, SCRATCH_BYTES) // (rest + at_once * each))
    chunk = math.ceil(rows / math.ceil(rows / min(chunk, rows)))
    return Plan(True, chunk, at_once, split_count(chunk * at_once, width), 1, width)


def recompute(q: torch.Tensor, keys: PagedKeys, width: int, *, lse: bool = False, per_head: bool = False) -> Plan:
    """Tiles of as many rows as a request brings on average, up to `_LANES` query heads."""
    rows, heads, _ = q.shape
    kv_heads, requests = keys.num_kv_heads, keys.page_table.shape[0]
    tile = min(max(1, _LANES // padded(heads // kv_heads)), padded(math.ceil(rows / requests)))
    budget = SCRATCH_BYTES if rows <= requests else _PROMPT_BYTES
    each = direct_row_bytes(heads, width) + per_head * heads * (4 * width + head_tile_bytes(width))
    chunk = min(rows, max(1, budget // each // tile) * tile)
    splits = split_count(math.ceil(chunk / tile) * (1 if lse else kv_heads), width)
    return Plan(False, chunk, kv_heads, splits, tile, width)


def scratch_keys(max_keys: int, window: int | torch.Tensor) -> int:
    """Keys per row that scratch must hold: whole units from the one that holds the first visible key."""
    unbounded = isinstance(window, torch.Tensor) or window < 0
    most = max_keys if unbounded else min(max_keys, window + UNIT - 1)
    return max(1, math.ceil(most / UNIT)) * UNIT


def split_count(groups: int, width: int) -> int:
    """Key splits per row: enough programs for the device, more than one each for a long row in a batch."""
    wanted = min(max(4096 // groups, 8), MAX_SPLITS)
    return min(wanted, width // UNIT)


def row_bytes(heads: int, width: int) -> int:
    """Scratch of one row with the logits of ``heads`` query heads, at most."""
    return 4 * heads * (width + 2 * min(MAX_SPLITS, width // UNIT)) + 4 * width + 16 * (width // TILE)


def direct_row_bytes(heads: int, width: int) -> int:
    """Scratch of one row without logits, at most: the normalisers take the place of the splits."""
    return row_bytes(0, width) + 8 * heads * (1 + min(MAX_SPLITS, width // UNIT))


def head_tile_bytes(width: int) -> int:
    """Scratch of the tiles of one head of one row, whose probabilities are reduced by themselves."""
    return 16 * (width // TILE)


def padded(n: int) -> int:
    """The next power of two; n >= 1."""
    return 1 << (n - 1).bit_length()


def split_block(splits: int) -> int:
    """Splits of a row that are merged at once: few or all, so that two kernels are compiled and not one per number."""
    return _FEW_SPLITS if splits <= _FEW_SPLITS else MAX_SPLITS


def select_shape(top_k: int, tiles: int) -> dict[str, int]:
    """Logarithms of the selection's block sizes: results, tiles looked at at once, keys of each tile at once."""
    k_bits = max(1, _bits(top_k))
    tile_bits = _FEW_TILES_BITS if tiles <= 1 << _FEW_TILES_BITS else _BLOCK_BITS
    return {
        "K_BITS": k_bits,
        "T_BITS": max(k_bits, tile_bits),
        "W_BITS": min(_bits(TILE), max(0, _BLOCK_BITS - k_bits)),
    }


def _bits(n: int) -> int:
    """log2 of the next power of two; n >= 1."""
    return (n - 1).bit_length()


def launch_shape(group: int, tile_rows: int, head_dim: int, key_bytes: int) -> dict[str, Any]:
    """Block sizes of the kernels that read keys: the key block in shared memory stays at 32 KiB or less."""
    block_d = max(16, padded(head_dim))
    if head_dim > 128:
        block_d = 128 if head_dim % 128 == 0 else 64  # 576 = 9 x 64
    lanes = max(16, padded(group) * tile_rows)
    if lanes > 128:
        block_d = min(block_d, 64)  # the queries take shared memory too
    return {
        "ROWS": tile_rows,
        "LANES": lanes,
        "BLOCK_D": block_d,
        "BLOCK_N": 32 if lanes > 64 or key_bytes > 2 else 64,
        "num_warps": 8 if lanes >= 64 else 4,
        "num_stages": 3 if key_bytes <= 2 else 2,
    }
