"""What only the Triton kernels promise: memory, reads, static shapes, padding, CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnhook.kernels.topk import LayerRows, Selection, Softmax, TopK, split
from attnhook.kernels.topk.torch.reduce import empty_result
from attnhook.kernels.topk.triton import kernel
from attnhook.kernels.topk.types import PagedKeys, PerHead
from tests.kernels.cases import (
    TOLERANCE,
    Case,
    assert_close,
    assert_equals_oracle,
    assert_matches,
    assert_same,
    build,
    oracle,
    run,
    to_device,
)
from tests.kernels.test_topk import FEATURES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
META = torch.device("meta")


def empty_call(
    rows: int, requests: int, keys: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, PagedKeys]:
    """Queries and keys of some shape, without memory."""
    q = torch.empty(rows, heads[0], head_dim, dtype=BF16, device=META)
    cache = torch.empty(1, 16, heads[1], head_dim, dtype=dtype, device=META)
    table = torch.empty(requests, math.ceil(keys / 16), dtype=torch.int32, device=META)
    return q, PagedKeys(cache, table, 16, cache.stride(), heads[1])  # type: ignore[arg-type]


def scratch_bytes(q: torch.Tensor, keys: PagedKeys, window: int = -1, *, lse: bool = False) -> int:
    plan = kernel.make_plan(q, keys, window, lse=lse)
    scratch, work = kernel.allocate(plan, q.shape[1] // keys.num_kv_heads, META, lse=lse)
    return sum(x.numel() * x.element_size() for x in (*scratch, *work))


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("length", [512, 4096, 131_072])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((8, 8), 64, BF16), ((8, 8), 128, BF16), ((32, 8), 64, BF16), ((32, 8), 128, BF16), ((32, 8), 128, FP8),
        ((16, 1), 576, BF16), ((128, 1), 576, BF16), ((128, 1), 576, FP8), ((9, 3), 64, torch.float32),
    ],
)  # fmt: skip
def test_decoding_takes_a_sixteenth_of_the_key_bytes(
    rows: int, length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    q, keys = empty_call(rows, rows, length, heads, head_dim, dtype)
    key_bytes = rows * length * heads[1] * head_dim * dtype.itemsize
    assert scratch_bytes(q, keys) <= key_bytes / 16
    # the engine's normaliser leaves one float a key, and tiles
    assert scratch_bytes(q, keys, lse=True) <= min(4.5 * rows * length, 256 << 20)


@pytest.mark.parametrize(("heads", "window"), [((32, 8), -1), ((128, 1), -1), ((9, 3), -1), ((32, 8), 4096)])
def test_scratch_is_bounded(heads: tuple[int, int], window: int) -> None:
    for length in (100, 8192, 163_840):
        visible = length if window < 0 else min(length, window)
        for rows, requests in ((1, 1), (512, 512), (4096, 1), (4096, 64)):
            q, keys = empty_call(rows, requests, length, heads, 128, BF16)
            used = scratch_bytes(q, keys, window)
            plan = kernel.make_plan(q, keys, window)
            # one row or tile of them may take more than the bound
            least = 4.6 * (visible + 256) * (1 + (heads[0] if plan.one_pass else 0)) * plan.tile_rows + 2**20
            assert used <= max((256 if rows <= requests else 64) << 20, least), (plan, used)
            assert plan.rows == rows or plan.rows % plan.tile_rows == 0


def count_reads(monkeypatch: pytest.MonkeyPatch, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """How often the interpreter loads each element, counted from now on."""
    from triton.runtime.interpreter import interpreter_builder

    reads = [torch.zeros(x.numel(), dtype=torch.int64) for x in tensors]
    load = interpreter_builder.create_masked_load

    def counting(pointers: Any, shown: Any, *rest: Any) -> Any:
        addresses = torch.from_numpy(pointers.data[shown.data.astype(bool)].astype("int64"))
        for tensor, counts in zip(tensors, reads, strict=True):
            index = (addresses - tensor.data_ptr()) // tensor.element_size()
            index = index[(index >= 0) & (index < counts.numel())]
            counts += torch.bincount(index, minlength=counts.numel())
        return load(pointers, shown, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counting)
    return reads


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's loads")
@pytest.mark.parametrize("way", ["triton", "triton, one pass", "triton, recompute", "lse"])
def test_each_visible_key_is_read_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[True] * 4, [False, False, True, False], [True] * 4])
    rows = [(0, 140), (1, 33), (2, 3)]
    case = build(rows, heads=(4, 2), page_size=8, window=60, head_mask=mask)
    if way == "lse":
        case = case.with_options(lse=torch.zeros(3, 4))
    cache, table = case.keys.cache, case.keys.page_table
    reads, table_reads = count_reads(monkeypatch, cache, table)
    if way == "lse":
        run("triton", case)
    else:
        assert_matches(way, case)
    expected = torch.zeros_like(cache, dtype=torch.int64)
    needed = torch.zeros_like(table, dtype=torch.bool)
    for r, p in rows:
        for s in range(max(0, p - 59), p + 1):
            selected = [1] if r == 1 else [0, 1]  # request 1 selects no head of kv head 0
            expected[table[r, s // 8], s % 8, selected] += 2 if "recompute" in way else 1
            needed[r, s // 8] = True
    assert torch.equal(reads.view_as(cache), expected)
    assert torch.equal(table_reads.view_as(table) > 0, needed)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's loads")
def test_the_rows_of_a_prompt_share_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build([(0, p) for p in range(40, 72)], heads=(8, 2), page_size=8)
    [reads] = count_reads(monkeypatch, case.keys.cache)
    assert_matches("triton", case)
    tiles = math.ceil(32 / kernel.make_plan(case.q, case.keys, -1).tile_rows)
    assert tiles == 2
    assert int(reads.max()) == 2 * tiles  # once for the normaliser and once for the average


class Recorder:
    """Stands where a kernel is and launches nothing: grids, and arguments that are numbers."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def put(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("logits", "average", "norms", "merge", "direct", "masses", "tiles", "select"):
            monkeypatch.setattr(kernel, f"{name}_kernel", _Recorded(name, self.launches))


class _Recorded:
    def __init__(self, name: str, launches: list[tuple[Any, ...]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in arguments]
            self.launches.append((self.name, grid, *shapes, constants))

        return launch


@pytest.mark.parametrize("heads", [(4, 2), (32, 1)])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("lse", [False, True])
def test_launches_depend_on_shapes_alone(
    heads: tuple[int, int], rows: int, lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values: whatever looked at one, or waited for one, would raise."""
    recorder = Recorder()
    recorder.put(monkeypatch)
    q, keys = empty_call(rows, 3, 1000, heads, 64, BF16)
    keys = replace(keys, k_scale=torch.empty(heads[1], device=META))
    index = torch.empty(rows, dtype=torch.int32, device=META)
    layer = LayerRows(q, keys, index, Softmax(
        scale=0.1, softcap=3.0, window=index, sinks=torch.empty(heads[0], device=META),
        alibi_slopes=torch.empty(heads[0], device=META),
        lse=torch.empty(rows, heads[0], device=META) if lse else None,
    ))  # fmt: skip
    selection = Selection(
        32, torch.empty(3, heads[0], dtype=torch.bool, device=META),
        torch.empty(3, 20, 2, dtype=torch.int64, device=META), torch.empty(3, dtype=torch.int32, device=META),
    )  # fmt: skip
    out = kernel.topk_attention(layer, index, selection)
    assert {x.device.type for x in out} == {"meta"}
    names = [name for name, *_ in recorder.launches]
    if lse:
        assert names == ["direct", "masses", "select"]
    elif rows > 3 or heads == (32, 1):
        assert names == ["norms", "merge", "direct", "masses", "select"]
    else:
        assert names == ["logits", "average"] * (len(names) // 2 - 1) + ["masses", "select"]
    assert kernel.attention_rows(layer, index, width=900, head_mask=selection.head_mask).shape == (rows, 900)
    long = index.long()
    kernel.reduce_rows(torch.empty(rows, 900, device=META), long, long, Selection(32), out, normalise=True)
    assert [name for name, *_ in recorder.launches][-3:] == ["tiles", "masses", "select"]
    before = len(recorder.launches)
    told = kernel.topk_attention(layer, index, selection._replace(per_head=PerHead(4, True, True, True)))
    assert {x.device.type for x in told} == {"meta"} and told.head_positions.shape == (rows, heads[0], 4)
    every = [name for name, *_ in recorder.launches[before:]]
    # what reads keys runs as often as without, and the heads' own numbers come behind it
    assert [name for name in every if name in {"logits", "average", "norms", "merge", "direct"}] == names[:-2]
    assert every.count("tiles") == (1 if "direct" in names else names.count("logits"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one pass", "recompute"])
def test_padding_and_misplaced_rows(way: str) -> None:
    case = build([(0, 20), (1, 7)])
    request = torch.tensor([0, 0, -1, 1, 0, 5, -3], dtype=torch.int32)
    position = torch.tensor([20, -1, -1, 7, 10**6, 3, 3], dtype=torch.int32)
    pick = torch.tensor([0, 0, 0, 1, 0, 0, 0])
    padded = replace(case, q=case.q[pick], row_request=request, row_position=position)
    got, alone = run(f"triton, {way}", padded), run("triton", case)
    assert_same(TopK(*(x[[0, 3]] for x in got)), alone)
    empty = [1, 2, 4, 5, 6]
    assert (got.positions[empty] == -1).all()
    assert not got.scores[empty].any() and not got.histogram[empty].any()
    assert got.entropy[[1, 2]].tolist() == [0, 0]  # padding
    assert got.entropy[[4, 5, 6]].isnan().all()  # rows that the page table cannot hold


def shuffled(case: Case, seed: int) -> Case:
    """The same keys in other pages."""
    pages = len(case.keys.cache)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    table = case.keys.page_table
    moved = torch.where(table >= 0, order.argsort()[table.long()].to(table.dtype), table)
    return replace(case, keys=replace(case.keys, cache=case.keys.cache[order], page_table=moved))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[(0, 40), (1, 130)], [(0, 40), (1, 130), (1, 131), (0, 3)]])
@pytest.mark.parametrize("replay", ["call", pytest.param("CUDA graph", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a GPU; the call shows the same on static buffers")
)])  # fmt: skip
def test_static_buffers(rows: list[tuple[int, int]], replay: str) -> None:
    """Lengths, page tables and queries change under launches that were made once."""
    before = to_device(build(rows, **FEATURES), DEVICE)
    shorter = build([(r, p // 2 + 1) for r, p in rows], seed=0, **FEATURES)
    after = build(rows, **FEATURES)
    after = shuffled(replace(after, q=shorter.q, row_position=shorter.row_position), seed=5)

    def launch() -> TopK:
        return kernel.topk_attention(*before.arguments)

    first = launch()  # compiles
    graph = None
    if replay == "CUDA graph":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = launch()
    before.q.copy_(after.q)
    before.row_position.copy_(after.row_position)
    before.keys.page_table.copy_(after.keys.page_table)
    before.keys.cache.copy_(after.keys.cache)
    if graph is None:
        got = launch()
    else:
        graph.replay()
    assert_equals_oracle(TopK(*(x.cpu() for x in got)), oracle(after), after.options["top_k"], TOLERANCE)
    assert not torch.equal(got.positions, first.positions)


@pytest.mark.slow
@pytest.mark.parametrize("width", [97, 131, 640])
@pytest.mark.parametrize("normalise", [False, True])
def test_reduction_of_summed_attention(width: int, normalise: bool) -> None:
    """The tensor-parallel half equals the torch path's, ties and broken rows included."""
    gen = torch.Generator().manual_seed(width)
    rows = 6
    last = torch.tensor([width - 1, width // 2, 0, width - 1, 33, width - 2])
    first = torch.tensor([0, 7, 0, width - 40, 33, 1])
    s = torch.arange(width)
    seen = (s >= first[:, None]) & (s <= last[:, None])
    attention = torch.where(seen, torch.rand(rows, width, generator=gen) ** 8, 0)
    attention[3] = torch.where(seen[3], 0.5, 0)  # ties
    attention /= attention.sum(1, keepdim=True) * (2 if normalise else 1)
    attention[5, 5] = math.nan
    spans = torch.tensor([[[0, 10], [5, 2**40], [9, 4]]]).expand(rows, -1, -1).clone()
    report_from = torch.tensor([0, 9, 0, 0, 90, 3])
    results = []
    for reduce, device in ((split.reduce_rows, "cpu"), (kernel.reduce_rows, DEVICE)):
        out = empty_result((rows, 0), Selection(20, spans=spans), torch.device(device))
        first_, last_, attention_, spans_, from_ = (
            x.clone().to(device) for x in (first, last, attention, spans, report_from)
        )
        reduce(attention_, first_, last_, Selection(20, None, spans_, from_), out, normalise=normalise)
        results.append(TopK(*(x.cpu() for x in out)))
    plain, got = (TopK(*(x[:5] for x in result)) for result in results)
    assert_same(got, plain, 1e-6)
    assert torch.equal(got.positions, plain.positions) and torch.equal(got.scores, plain.scores)
    assert got.positions[3, :20].tolist() == list(range(width - 40, width - 20))
    assert all(result.entropy[5].isnan() for result in results)


def test_reduction_of_more_than_the_registers_hold() -> None:
    attention = torch.rand(1, 1500, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    place = torch.tensor([0], device=DEVICE), torch.tensor([1499], device=DEVICE)
    out = empty_result((1, 0), Selection(1100), torch.device(DEVICE))
    kernel.reduce_rows(attention.clone(), *place, Selection(1100), out)
    assert_close("scores", out.scores, attention.sort(descending=True).values[:, :1100], 0)


def test_a_rank_adds_up_with_the_kernel_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    whole = kernel.reduce_rows

    def spy(attention: torch.Tensor, *arguments: Any, **options: Any) -> None:
        called.append(len(attention))
        whole(attention, *arguments, **options)

    monkeypatch.setattr("attnhook.kernels.topk.triton.reduce_rows", spy)
    monkeypatch.setenv("ATTNHOOK_KERNEL", "triton")
    case = to_device(build([(0, 40), (1, 130)], heads=(4, 2), window=20), DEVICE)
    step = split.SplitStep(case.row_request, case.selection, total=lambda x: True, heads=4, width=131)
    got = TopK(*(x.cpu() for x in step([case.layer])[0]))
    assert called == [2]
    assert_equals_oracle(got, oracle(build([(0, 40), (1, 130)], heads=(4, 2), window=20)), 8, TOLERANCE)
