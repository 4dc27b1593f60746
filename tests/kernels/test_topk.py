"""The torch and the Triton kernel against the float64 oracle over awkward sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnhook.errors import OptionError
from attnhook.kernels import topk
from attnhook.kernels.topk.dispatch import kernel as kernel_module
from attnhook.kernels.topk.numba import again, jobs
from attnhook.kernels.topk.numba import kernel as compiled
from attnhook.kernels.topk.torch import attention as torch_attention
from attnhook.kernels.topk.triton import kernel as triton_kernel
from attnhook.kernels.topk.triton import plan as triton_plan
from attnhook.kernels.topk.types import PagedKeys, PerHead, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS
from tests.kernels.cases import (
    LAYOUTS,
    TOLERANCE,
    Case,
    assert_close,
    assert_equals_oracle,
    assert_matches,
    assert_same,
    build,
    oracle,
    run,
)

KERNELS = ("compiled", "compiled, products", "torch", "triton")
WAYS = (*KERNELS[:3], "triton, one pass", "triton, recompute")
SCATTERED = [(0, 40), (1, 130), (0, 0)]
PROMPT = [(0, 15), (0, 16), (0, 17), (1, 31), (1, 32)]

# the interpreter computes with numpy, which warns where the kernels mean to overflow or to keep a NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def rand(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


FEATURES: dict[str, Any] = {
    "sinks": rand(4),
    "alibi_slopes": torch.tensor([0.5, 0.25, 0.06, 0.004]),
    "softcap": 3.0,
    "spans": torch.tensor([[[0, 10], [5, 41]], [[100, 200], [7, 7]]]),
    "first_reported": torch.tensor([2, 50]),
    "head_mask": torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool),
}

LONGEST = "1,200 keys and many rows"
# name: (rows, arguments of build)
CASES: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "one key": ([(0, 0)], {}),
    "two keys": ([(0, 1)], {"top_k": 1}),
    "page boundary": ([(0, 15), (0, 16), (1, 31), (1, 32)], {}),
    "one slot per page": (SCATTERED, {"page_size": 1}),
    "odd page size": (SCATTERED, {"page_size": 7}),
    "k above the keys": ([(0, 4), (1, 19)], {"top_k": 32}),
    "unit and tile boundaries": ([(0, 31), (0, 32), (0, 127), (0, 128), (0, 256)], {"heads": (2, 1)}),
    "gqa 9:3": (SCATTERED, {"heads": (9, 3), "head_dim": 64}),
    "mqa": (SCATTERED, {"heads": (4, 1), "head_dim": 64}),
    "mha": (SCATTERED, {"heads": (4, 4), "head_dim": 64}),
    "group of 32": ([(0, 20), (0, 140)], {"heads": (32, 1), "head_dim": 16}),
    "dim 80": (SCATTERED, {"head_dim": 80}),
    "dim 128": (SCATTERED, {"head_dim": 128}),
    "dim 256": (SCATTERED, {"head_dim": 256, "heads": (2, 1)}),
    "mla 576": (SCATTERED, {"head_dim": 576, "heads": (16, 1), "page_size": 64}),
    "window 1": (SCATTERED, {"window": 1}),
    "window 7": (SCATTERED, {"window": 7}),
    "window over a unit's edge": ([(0, 300), (0, 129), (0, 90)], {"window": 100, "heads": (2, 1)}),
    "window above the keys": (SCATTERED, {"window": 10**9}),
    "window per row": (
        [(0, 40), (1, 130), (1, 131), (0, 41)],
        {"window": torch.tensor([5, 64, -1, 1], dtype=torch.int32)},
    ),
    "window per row in a prompt": (PROMPT, {"window": torch.tensor([3, -1, 9, 32, 2], dtype=torch.int32)}),
    "prompt": (PROMPT, {}),
    "long prompts between single rows": (
        [(1, 90), *((0, p) for p in range(30, 61)), (1, 12), (1, 7), *((1, p) for p in range(131, 140)), (0, 2)],
        {"window": 50, **FEATURES},
    ),
    LONGEST: ([(0, p) for p in range(1150, 1200)], {"top_k": 32, "heads": (9, 3), "head_dim": 64}),
    "prompt with a window": (PROMPT, {"window": 5, "page_size": 4}),
    "prompt, everything": (PROMPT, FEATURES),
    "sinks": (SCATTERED, {"sinks": FEATURES["sinks"]}),
    "heavy sinks": (SCATTERED, {"sinks": 8 + rand(4)}),
    "sinks that take everything": (SCATTERED, {"sinks": 1e4 + rand(4)}),
    "softcap": (SCATTERED, {"softcap": 2.0}),
    "wide softcap": (SCATTERED, {"softcap": 50.0, "spread": 8.0}),
    "alibi": (SCATTERED, {"alibi_slopes": FEATURES["alibi_slopes"]}),
    "k_scale float": (SCATTERED, {"k_scale": 0.37}),
    "k_scale tensor": (SCATTERED, {"k_scale": torch.tensor(0.37)}),
    "k_scale of one": (SCATTERED, {"k_scale": torch.tensor([0.37])}),
    "k_scale per head": (SCATTERED, {"k_scale": torch.tensor([0.37, 1.9])}),
    "heads": (SCATTERED, {"head_mask": torch.tensor([True, False, False, True])}),
    "heads of one kv head": (SCATTERED, {"head_mask": torch.tensor([False, False, False, True])}),
    "heads per request": (SCATTERED, {"head_mask": FEATURES["head_mask"]}),
    "spans": (
        SCATTERED,
        {"spans": torch.tensor([[[0, 1], [30, 41], [3, 3], [9, 4]], [[64, 128], [0, 2**40], [31, 97], [500, 600]]])},
    ),
    "many spans": ([(0, 90)], {"spans": torch.arange(20)[None, :, None] + torch.tensor([0, 40]), "window": 60}),
    "first_reported": (SCATTERED, {"first_reported": torch.tensor([3, 1000], dtype=torch.int32)}),
    "more tiles than k": ([(0, 250)], {"top_k": 2, "heads": (2, 1)}),
    "first_reported above more tiles than k": (
        [(0, 250)],
        {"top_k": 2, "heads": (2, 1), "first_reported": torch.tensor([200])},
    ),
    "first_reported under the window": (SCATTERED, {"first_reported": torch.tensor([2, 125]), "window": 20}),
    "everything": (SCATTERED, {**FEATURES, "window": 70, "k_scale": torch.tensor([0.5, 1.5]), "page_size": 8}),
    "int64 indices": (SCATTERED, {"index_dtype": torch.int64}),
    "peaked": (SCATTERED, {"spread": 30.0}),
    "k 256": ([(0, 300)], {"top_k": 256, "heads": (2, 1)}),
    "k 33": ([(0, 150)], {"top_k": 33, "heads": (2, 1)}),
    "fused queries": (SCATTERED, {"q_layout": "fused"}),
    "heads-first queries": (SCATTERED, {"q_layout": "heads_first"}),
    **{f"layout {name}": (SCATTERED, {"layout": name}) for name in LAYOUTS},
    **{
        f"{kind}, {group} queries a key, {layout}": (
            SCATTERED,
            {"dtype": dtype, "heads": (2 * group, 2), "layout": layout, "page_size": 48},
        )
        for kind, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
        for group, layout in ((1, "nhd"), (3, "k_transposed"), (6, "hnd"), (7, "k_transposed"))
    },
    "bf16": (SCATTERED, {"dtype": torch.bfloat16}),
    "bf16, everything": (SCATTERED, {"dtype": torch.bfloat16, **FEATURES}),
    "bf16 mla": (SCATTERED, {"dtype": torch.bfloat16, "head_dim": 576, "heads": (8, 1)}),
    "fp16": (SCATTERED, {"dtype": torch.float16}),
    "fp16 queries, bf16 keys": (SCATTERED, {"dtype": torch.bfloat16, "q_dtype": torch.float16}),
    "float32 queries, bf16 keys": (SCATTERED, {"dtype": torch.bfloat16, "q_dtype": torch.float32}),
    "fp8": (SCATTERED, {"dtype": torch.float8_e4m3fn, "k_scale": torch.tensor([0.5, 1.5])}),
    "fp8, one scale": (SCATTERED, {"dtype": torch.float8_e4m3fn, "k_scale": torch.tensor(0.25)}),
    "fp8 mla": (
        [(0, 40), (1, 90)],
        {"dtype": torch.float8_e4m3fn, "k_scale": 0.5, "head_dim": 576, "heads": (16, 1), "page_size": 64},
    ),
    "fp8 e5m2, fp16 queries": (SCATTERED, {"dtype": torch.float8_e5m2, "q_dtype": torch.float16}),
}


def in_every_way() -> Iterator[Any]:
    """Every case in every way; slow and long are what the interpreter of Triton takes long for.

    The quick tests have every other case in one of the two Triton ways, ``make test`` each case in one of them in turn,
    ``make test-all`` each in both; cases for which both ways have branches of their own are quick in both.
    """
    both = {"everything", "prompt, everything", "window per row", "bf16 mla", "unit and tile boundaries", "gqa 9:3"}
    assert both <= CASES.keys()
    for turn, name in enumerate(CASES):
        for kernel in WAYS:
            its_turn = name in both or kernel == ("triton, one pass", "triton, recompute")[turn // 2 % 2]
            quick = name in both or (its_turn and turn % 2 == 0)
            if name in (LONGEST, "long prompts between single rows"):
                its_turn, quick = True, False
            marks = [pytest.mark.slow] * (not quick) + [pytest.mark.long] * (not its_turn)
            yield pytest.param(kernel, name, id=f"{kernel}-{name}", marks=marks if "triton" in kernel else [])


@pytest.mark.parametrize(("kernel", "name"), in_every_way())
def test_matches_the_oracle(kernel: str, name: str) -> None:
    rows, arguments = CASES[name]
    if name == LONGEST and "triton" in kernel and not torch.cuda.is_available():
        rows = rows[-18:] if "recompute" in kernel else rows[-3:]  # up to a second a row in the interpreter
    got = assert_matches(kernel, build(rows, **arguments))
    assert got.scores.dtype == got.entropy.dtype == torch.float32


@pytest.mark.parametrize("rows", [SCATTERED, PROMPT])
def test_float64_is_computed_in_float64(rows: list[tuple[int, int]]) -> None:
    got = assert_matches("torch", build(rows, dtype=torch.float64, **FEATURES), 1e-13)
    assert got.scores.dtype == torch.float64


@pytest.mark.parametrize("kernel", ("naive", *KERNELS))
def test_by_hand(kernel: str) -> None:
    # one head, logits 0 and ln 3: probabilities 1/4 and 3/4
    k = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 2, 1)
    spans = torch.tensor([[[0, 1], [1, 2], [0, 2]]])
    case = Case(
        torch.ones(1, 1, 1), PagedKeys.from_dense(k), torch.tensor([0]), torch.tensor([1]),
        {"top_k": 3, "scale": 1.0, "spans": spans},
    )  # fmt: skip
    got = run(kernel, case)
    assert got.positions.tolist() == [[1, 0, -1]]
    assert_close("scores", got.scores, torch.tensor([[0.75, 0.25, 0]]), 1e-6)
    assert_close("histogram", got.histogram, torch.tensor([[1.0] + [0] * (BINS - 1)]), 1e-6)
    assert_close("entropy", got.entropy, torch.tensor([0.8112781245]), 1e-6)
    assert_close("spans", got.span_mass, torch.tensor([[0.25, 0.75, 1.0]]), 1e-6)
    sunk = run(kernel, case.with_options(sinks=torch.tensor([math.log(4.0)])))
    assert_close("scores", sunk.scores, torch.tensor([[3 / 8, 1 / 8, 0]]), 1e-6)
    assert_close("entropy", sunk.entropy, torch.tensor([0.8112781245]), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_keys_of_any_strides(kernel: str) -> None:
    k = rand(2, 40, 2, 32)  # [requests, slots, heads, dim] memory, seen heads first
    rows = {"row_request": torch.tensor([0, 1]), "row_position": torch.tensor([39, 17])}
    case = Case(
        rand(2, 4, 32, seed=1), PagedKeys.from_dense(k.transpose(1, 2)), **rows, options={"top_k": 8, "scale": 0.3}
    )
    assert_matches(kernel, case)
    shared = k[:1].transpose(1, 2).expand(2, -1, -1, -1)  # one prefix for both requests, page stride 0
    assert_matches(kernel, replace(case, keys=PagedKeys.from_dense(shared)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_tables_and_options(kernel: str) -> None:
    case = build(SCATTERED, index_dtype=torch.int64, **FEATURES)

    def stretched(x: torch.Tensor) -> torch.Tensor:
        out = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77, dtype=x.dtype)
        out[..., ::2] = x
        return out[..., ::2]

    names = ("sinks", "alibi_slopes", "spans", "first_reported", "head_mask")
    strided = replace(
        case,
        keys=replace(case.keys, page_table=stretched(case.keys.page_table)),
        row_request=stretched(case.row_request),
        row_position=stretched(case.row_position),
    ).with_options(**{name: stretched(case.options[name]) for name in names})
    assert_matches(kernel, strided)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("top_k", [5, 20])
def test_ties_go_to_the_lower_position(kernel: str, top_k: int) -> None:
    case = build([(0, 149), (1, 33), (1, 34)], integers=True, head_dim=16, top_k=top_k, page_size=8)
    view, table = case.keys.cache, case.keys.page_table
    for s in range(150):  # three different keys, repeated: only few distinct scores
        source = table[0, 0], s % 3
        view[table[0, s // 8], s % 8] = view[source].clone()
    full = oracle(case)
    got = assert_matches(kernel, case)
    for t in range(3):
        pairs = [(round(a, 9), s) for a, s in zip(full.scores[t].tolist(), full.positions[t].tolist(), strict=True)]
        best = sorted((p for p in pairs if p[1] >= 0), key=lambda pair: (-pair[0], pair[1]))[:top_k]
        assert got.positions[t, : len(best)].tolist() == [s for _, s in best], t


@pytest.mark.parametrize("kernel", KERNELS)
def test_uniform_attention_reports_the_first_positions(kernel: str) -> None:
    case = build([(0, 139), (0, 11), (0, 12)], top_k=16, first_reported=torch.tensor([3]))
    got = run(kernel, replace(case, q=torch.zeros_like(case.q)))
    assert got.positions[0].tolist() == list(range(3, 19))
    assert got.positions[1].tolist() == [*range(3, 12), *[-1] * 7]
    assert got.positions[2].tolist() == [*range(3, 13), *[-1] * 6]
    assert_close("entropy", got.entropy, torch.ones(3), 1e-6)
    expected = torch.tensor(
        [
            float(max(min(BIN_STARTS[i + 1] if i < 15 else 140, 140) - start, 0)) / 140
            for i, start in enumerate(BIN_STARTS)
        ]
    )
    assert_close("histogram", got.histogram[0], expected, 1e-6)


@pytest.mark.parametrize("kernel", (*KERNELS[:3], pytest.param("triton", marks=pytest.mark.slow)))
def test_long_context_fills_every_bin(kernel: str) -> None:
    # more tiles than the selection reads at once, and distances beyond the last edge
    length = 33_000
    k = rand(1, 1, length, 16) * 3
    spans = torch.tensor([[[0, length], [1000, 32_001]]])
    case = Case(
        rand(1, 1, 16, seed=1), PagedKeys.from_dense(k), torch.tensor([0]), torch.tensor([length - 1]),
        {"top_k": 40, "scale": 0.5, "spans": spans, "first_reported": torch.tensor([100])},
    )  # fmt: skip
    got = assert_matches(kernel, case)
    assert (got.histogram > 0).all()


def assert_only_broken(kernel: str, case: Case, clean: Case, broken: list[int]) -> None:
    """The rows ``broken`` say so, all others are what they are without the poison."""
    got = run(kernel, case)
    assert got.entropy.isnan().nonzero().flatten().tolist() == broken
    others = ~got.entropy.isnan()
    rows, truth = (TopK(*(x[others] for x in result)) for result in (got, oracle(clean)))
    assert_equals_oracle(rows, truth, case.options["top_k"], TOLERANCE)


POISON = [(math.nan, {}), (math.inf, {}), (-math.inf, {"softcap": 5.0}), (math.inf, {"softcap": 5.0})]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("naive", *KERNELS))
@pytest.mark.parametrize(("bad", "options"), POISON)
def test_poison_in_a_query_stays_in_its_row(kernel: str, bad: float, options: dict[str, Any]) -> None:
    clean = build([(0, 20), (0, 21), (0, 22), (1, 5)], sinks=rand(4), **options)
    q = clean.q.clone()
    q[1, 2, 3] = bad
    assert_only_broken(kernel, replace(clean, q=q), clean, [1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("naive", *KERNELS))
@pytest.mark.parametrize(("bad", "options"), [*POISON, (-math.inf, {"window": 4})])
def test_poison_in_a_key_stays_with_the_rows_that_see_it(kernel: str, bad: float, options: dict[str, Any]) -> None:
    clean = build([(0, 4), (0, 5), (0, 6), (0, 30), (1, 9)], page_size=4, **options)
    cache = clean.keys.cache.clone()
    cache[clean.keys.page_table[0, 1], 1, 1, 7] = bad  # position 5, one kv head
    case = replace(clean, keys=replace(clean.keys, cache=cache))
    assert_only_broken(kernel, case, clean, [1, 2] if "window" in options else [1, 2, 3])


@pytest.mark.parametrize("kernel", ("naive", *KERNELS))
def test_poison_in_a_single_key(kernel: str) -> None:
    case = build([(0, 0), (1, 0)])
    case.keys.cache[case.keys.page_table[0, 0], 0] = math.nan
    assert run(kernel, case).entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("kernel", ("naive", *KERNELS))
def test_no_rows(kernel: str) -> None:
    case = build([(0, 3)], spans=torch.tensor([[[0, 2], [2, 4]]]), top_k=5)
    got = run(kernel, replace(case, q=case.q[:0], row_request=case.row_request[:0], row_position=case.row_position[:0]))
    assert [tuple(x.shape) for x in got[:5]] == [(0, 5), (0, 5), (0, BINS), (0,), (0, 2)]
    assert all(x.numel() == 0 for x in got)
    asked = replace(case, q=case.q[:0], row_request=case.row_request[:0], row_position=case.row_position[:0])
    told = run(kernel, asked.with_options(per_head=PerHead(3, True, True, True)))
    assert told.head_positions.shape == (0, 4, 3) and told.head_span_mass.shape == (0, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [SCATTERED, PROMPT])
@pytest.mark.parametrize("kernel", WAYS)
def test_chunks_of_rows_change_nothing(
    kernel: str, rows: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(rows, window=20, **FEATURES)
    calls: list[int] = []
    limit = 4 if "recompute" in kernel else 2  # a tile of rows

    def recording(function: Any, rows_of: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(rows_of(*arguments[:2]))
            return function(*arguments, **options)

        return call

    if "triton" in kernel:
        width = triton_plan.scratch_keys(case.keys.max_keys, 20)
        monkeypatch.setattr(triton_plan, "SCRATCH_BYTES", 2 * triton_plan.row_bytes(4, width))
        monkeypatch.setattr(triton_plan, "_PROMPT_BYTES", 5 * triton_plan.direct_row_bytes(4, width))
        monkeypatch.setattr(triton_kernel, "allocate", recording(triton_kernel.allocate, lambda plan, _: plan.rows))
    else:
        budget = 200  # of which one row may take more

        def excess(rows: int, logits: int) -> int:
            return 0 if rows == 1 or logits <= budget else 3

        if kernel == "torch":
            monkeypatch.setattr(torch_attention, "_SCRATCH_ELEMENTS", budget)
            rows_of = lambda q, k: excess(q.shape[1], q.shape[0] * q.shape[1] * len(k))  # noqa: E731
            monkeypatch.setattr(torch_attention, "_attention", recording(torch_attention._attention, rows_of))
        else:
            for module, name in (
                (compiled, "_BLOCK_ELEMENTS"),
                (compiled, "SINGLE_ELEMENTS"),
                (again, "SINGLE_ELEMENTS"),
            ):
                monkeypatch.setattr(module, name, budget)
            whole = jobs.Call.reduce

            def reduce(call: Any, z: torch.Tensor, table: Any, result: Any) -> None:
                calls.append(excess(len(table), z.numel()))
                whole(call, z, table, result)

            aimed = again.Again._aim

            def aim(jobs: Any, layers: Any, place: Any) -> bool:
                done = aimed(jobs, layers, place)
                if done:
                    _, seen = place
                    calls.append(excess(len(seen), int(seen.sum()) * layers[0].q.shape[1] * len(layers)))
                return done

            monkeypatch.setattr(jobs.Call, "reduce", reduce)
            monkeypatch.setattr(again.Again, "_aim", aim)
    assert_matches(kernel, case)
    assert calls and max(calls) <= limit, "the budget did not bound what is computed at once"


def test_triton_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(ValueError, match=r"float64.*ATTNHOOK_KERNEL=torch"):
        run("triton", build([(0, 3)], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"keys are torch\.float64"):
        run("triton", build([(0, 3)], dtype=torch.float64, q_dtype=torch.float32))
    with pytest.raises(ValueError, match="top_k=1025"):
        run("triton", build([(0, 3)], top_k=1025))
    with pytest.raises(ValueError, match="k_scale must hold 1 or 2 values"):
        run("triton", build([(0, 3)], k_scale=torch.ones(3)))


def call(case: Case, **changes: Any) -> TopK:
    arguments: dict[str, Any] = {
        "q": case.q,
        "keys": case.keys,
        "row_request": case.row_request,
        "row_position": case.row_position,
        **case.options,
    }
    return topk.topk_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q must be \[rows, query heads, head_dim\], got shape \(2, 4\)"),
        ({"q": torch.zeros(2, 5, 32)}, "5 query heads do not divide into 2 kv heads"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"row_request": torch.zeros(3)}, r"row_request must have shape \[2\], got \[3\]"),
        ({"row_position": torch.zeros(2, 1)}, r"row_position must have shape \[2\], got \[2, 1\]"),
        ({"window": torch.zeros(1)}, r"window must have shape \[2\], got \[1\]"),
        ({"sinks": torch.zeros(2)}, r"sinks must have shape \[4\], got \[2\]"),
        ({"alibi_slopes": torch.zeros(4, 1)}, r"alibi_slopes must have shape \[4\], got \[4, 1\]"),
        ({"head_mask": torch.ones(3, 4)}, r"head_mask must have shape \[4\] or \[2, 4\], got \[3, 4\]"),
        ({"spans": torch.zeros(2, 2)}, r"spans must have shape \[2, 0, 2\], got \[2, 2\]"),
        ({"spans": torch.zeros(2, 3, 3)}, r"spans must have shape \[2, 3, 2\], got \[2, 3, 3\]"),
        ({"first_reported": torch.zeros(1)}, r"first_reported must have shape \[2\], got \[1\]"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta, q is on cpu: move it there"),
    ],
)
def test_bad_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build([(0, 3), (1, 4)]), **changes)


def test_a_flat_page_table_is_refused() -> None:
    case = build([(0, 3), (1, 4)])
    flat = replace(case.keys, page_table=case.keys.page_table.flatten())
    with pytest.raises(ValueError, match=r"page_table must be \[requests, pages\]"):
        call(case, keys=flat)


@pytest.mark.parametrize("name", ["compiled", "naive", "torch", "triton", None])
def test_the_dispatcher_picks_the_kernel(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("the Triton kernel needs CUDA tensors here")
    case = build([(0, 3), (1, 20)])
    expected = run("torch", case)
    module = kernel_module(name or "compiled")
    original, called = module.topk_attention, []

    def spy(*arguments: Any, **options: Any) -> TopK:
        called.append(options)
        result: TopK = original(*arguments, **options)
        return result

    monkeypatch.setattr(module, "topk_attention", spy)
    if name is None:
        monkeypatch.delenv("ATTNHOOK_KERNEL", raising=False)
    else:
        monkeypatch.setenv("ATTNHOOK_KERNEL", name)
    assert_same(call(case), expected)
    assert len(called) == 1


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNHOOK_KERNEL", "cuda")
    with pytest.raises(OptionError, match="ATTNHOOK_KERNEL='cuda' is not one of compiled, naive, torch, triton"):
        call(build([(0, 3)]))
