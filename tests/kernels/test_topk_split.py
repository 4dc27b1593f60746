"""Heads divided over real processes give what one process gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from attnhook.kernels.topk import PerHead, TopK
from attnhook.kernels.topk.split import SplitStep
from tests.kernels.cases import TOLERANCE, Case, assert_close, assert_equals_oracle, build, heads_as_rows, oracle

ROWS = [(0, 40), (1, 130), (0, 0)]
PROMPT = [(0, p) for p in range(20, 40)]
HEADS = {"heads": (12, 6)}
TOLD = PerHead(3, True, True, True)


def cases() -> Iterator[tuple[str, Case]]:
    """Batches whose 12 heads divide by 2 and 3, with everything that a layer may add."""
    spans = torch.tensor([[[0, 10], [5, 41]], [[100, 200], [7, 7]]])
    for name, rows, options in (
        ("plain", ROWS, HEADS),
        ("prompt", PROMPT, {**HEADS, "page_size": 7}),
        ("one kv head", ROWS, {"heads": (12, 1), "head_dim": 64}),
        ("window", ROWS, {**HEADS, "window": 7}),
        ("window per row", ROWS, {**HEADS, "window": torch.tensor([5, 64, -1], dtype=torch.int32)}),
        ("sinks", ROWS, {**HEADS, "sinks": torch.linspace(-2, 3, 12)}),
        ("cap and slopes", ROWS, {**HEADS, "softcap": 3.0, "alibi_slopes": torch.linspace(0.004, 0.5, 12)}),
        ("spans and a mask", ROWS, {**HEADS, "spans": spans, "first_reported": torch.tensor([2, 50])}),
        ("heads of one rank", ROWS, {**HEADS, "head_mask": torch.arange(12) == 7}),
        ("heads of some", ROWS, {**HEADS, "head_mask": torch.arange(12) % 5 == 1}),
        ("ties", [(0, 60), (0, 61)], {**HEADS, "integers": True, "top_k": 20}),
        ("bfloat16", ROWS, {**HEADS, "dtype": torch.bfloat16}),
    ):
        yield name, build(rows, seed=len(name), per_head=TOLD, **options)  # type: ignore[arg-type]


def part(case: Case, rank: int, ranks: int) -> Case:
    """One rank's heads: their queries, keys and numbers."""
    heads, kv_heads = case.q.shape[1], case.keys.num_kv_heads
    own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
    keys = case.keys
    if kv_heads > 1:
        stored = keys.cache
        start = stored.storage_offset() + rank * kv_heads // ranks * keys.strides[2]
        keys = replace(keys, cache=stored.as_strided((1,), (1,), start), num_kv_heads=kv_heads // ranks)
    options = dict(case.options)
    for name in ("sinks", "alibi_slopes", "head_mask"):
        if name in options:
            options[name] = options[name][own]
    return replace(case, q=case.q[:, own], keys=keys, options=options)


def split(case: Case, rank: int, ranks: int, layers: int = 2) -> list[TopK]:
    own = part(case, rank, ranks)
    whole = case.options.get("head_mask")

    def total(attention: torch.Tensor) -> bool:
        dist.reduce(attention, 0)
        return rank == 0

    step = SplitStep(
        case.row_request,
        own.selection,
        total=total,
        heads=case.q.shape[1] if whole is None else int(whole.sum()),
        width=int(case.row_position.max()) + 1,
        place=(rank, ranks),
    )
    return step([own.layer] * layers)


def work(rank: int, ranks: int, kernel: str, meeting: str) -> None:
    """One process of a group; only the first looks at the results."""
    os.environ["ATTNHOOK_KERNEL"] = kernel
    torch.set_num_threads(1)  # the ranks share the machine
    if kernel == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    for name, case in cases():
        results = split(case, rank, ranks)
        if rank:
            empty = [(x.positions == -1).all() and (x.head_positions == -1).all() for x in results]
            assert all(empty), f"{name}: a rank that was to stop went on"
            continue
        truth = oracle(case.with_options(per_head=TOLD._replace(top_k=case.keys.max_keys)))
        for result in results:
            try:
                assert_equals_oracle(result, truth, case.options["top_k"], TOLERANCE)
                assert_equals_oracle(heads_as_rows(result), heads_as_rows(truth), TOLD.top_k, TOLERANCE)
                assert_close("log-sum-exp", result.head_lse, truth.head_lse, 1e-5)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    broken = build(ROWS, seed=3, **HEADS)  # type: ignore[arg-type]
    poisoned = broken.q.clone()
    poisoned[1, 11] = float("nan")  # the last rank's only
    result = split(replace(broken, q=poisoned), rank, ranks)[0]
    if not rank:
        assert torch.isnan(result.entropy).tolist() == [False, True, False]
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "ranks"),
    [
        ("compiled", 3),
        ("compiled", 2),
        ("torch", 3),
        pytest.param("triton", 2, marks=pytest.mark.long),
    ],
)
def test_heads_over_ranks(kernel: str, ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(ranks, kernel, str(tmp_path / "meeting")), nprocs=ranks)  # type: ignore[no-untyped-call]


def test_rows_are_added_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnhook.kernels.topk.split._SCRATCH_ELEMENTS", 300)
    case = build(PROMPT, **HEADS)  # type: ignore[arg-type]
    pieces: list[Any] = []

    def total(attention: torch.Tensor) -> bool:
        pieces.append(attention.shape)
        return True

    step = SplitStep(case.row_request, case.selection, total=total, heads=12, width=40)
    result = step([case.layer])[0]
    assert len(pieces) == 3
    assert_equals_oracle(result, oracle(case), case.options["top_k"], TOLERANCE)
