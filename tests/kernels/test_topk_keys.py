"""The sums of attention by key, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from attnhook.kernels.topk import naive, topk_attention
from attnhook.kernels.topk.step import TopKStep
from attnhook.kernels.topk.types import LayerRows, PerHead, PerKey, Selection, Softmax, TopK
from tests.kernels.cases import TOLERANCE, Case, assert_close, build, run
from tests.kernels.test_topk import CASES, PROMPT, SCATTERED, WAYS

# the interpreter computes with numpy, which warns where the kernels mean to overflow or to keep a NaN
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

BEFORE = 0.25  # what the sums were


def summed(kernel: str, case: Case, slot: Sequence[int] | None = None, *, kv_heads: bool) -> tuple[TopK, torch.Tensor]:
    """A kernel's results, and what it has added to the sums [S, G, keys]; each request has sums unless told else."""
    slots = case.row_request.long() if slot is None else torch.tensor(slot)
    groups = case.keys.num_kv_heads if kv_heads else 1
    dtype = torch.float64 if kernel == "naive" else torch.float32
    mass = torch.full((int(slots.max()) + 2, groups, case.keys.max_keys), BEFORE, dtype=dtype)
    asked = case.with_options(per_key=PerKey(slots, kv_heads), key_mass=mass)
    return run(kernel, asked), mass.double() - BEFORE


def assert_sums(kernel: str, case: Case, slot: Sequence[int] | None = None, *, kv_heads: bool) -> torch.Tensor:
    """The oracle's sums, and nothing where no row looks."""
    _, mass = summed(kernel, case, slot, kv_heads=kv_heads)
    _, wanted = summed("naive", case, slot, kv_heads=kv_heads)
    rows = len(case.row_request)
    assert_close("sums by key", mass / rows**0.5, wanted / rows**0.5, 2 * TOLERANCE)
    assert bool((mass[wanted == 0] == 0).all())
    return mass


# of the cases of the heads, those in which rows share sums or see other keys than the first ones
CHOSEN = (
    "unit and tile boundaries", "gqa 9:3", "mqa", "mla 576", "window over a unit's edge", "window per row in a prompt",
    "prompt, everything", "heavy sinks", "sinks that take everything", "heads per request", "everything",
    "bf16, everything", "fp8, one scale", "layout k_transposed", "k_scale per head",
)  # fmt: skip


@pytest.mark.parametrize("kv_heads", [False, True], ids=["mean", "kv heads"])
@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("name", CHOSEN)
def test_the_sums_are_the_oracles(kernel: str, name: str, kv_heads: bool) -> None:
    rows, arguments = CASES[name]
    assert_sums(kernel, build(rows, **arguments), kv_heads=kv_heads)


@pytest.mark.parametrize("kernel", WAYS)
def test_sums_of_each_row_by_itself(kernel: str) -> None:
    """As where a draft may be refused."""
    for rows in (SCATTERED, PROMPT[:9]):
        alone = assert_sums(kernel, build(rows), range(len(rows)), kv_heads=False)
        _, together = summed(kernel, build(rows), kv_heads=False)
        assert_close("one by one", alone.sum(0), together.sum(0), 1e-5)


@pytest.mark.parametrize("kernel", ["compiled", "torch"])
@pytest.mark.parametrize("kv_heads", [False, True])
def test_they_are_the_same_to_the_bit_each_time(kernel: str, kv_heads: bool) -> None:
    case = build([(0, p) for p in range(700, 790)] + [(1, p) for p in range(3)], heads=(9, 3))
    first, second = (summed(kernel, case, kv_heads=kv_heads)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", WAYS)
def test_the_mean_over_kv_heads_is_the_mean_over_heads(kernel: str) -> None:
    case = build(PROMPT, heads=(9, 3))
    (_, mean), (_, each) = (summed(kernel, case, kv_heads=kv_heads) for kv_heads in (False, True))
    assert_close("mean", each.mean(1, keepdim=True), mean, 1e-5)
    # a row's attention adds up to 1
    assert mean.sum().item() == pytest.approx(len(PROMPT), rel=1e-5)


@pytest.mark.parametrize("kernel", WAYS)
def test_together_with_numbers_of_each_head(kernel: str) -> None:
    case = build(SCATTERED, heads=(6, 2), head_mask=torch.tensor([True, False] * 3))
    asked = case.with_options(per_head=PerHead(top_k=3, fingerprint=True, lse=True))
    for kv_heads in (False, True):
        got, mass = summed(kernel, asked, kv_heads=kv_heads)
        _, wanted = summed("naive", case, kv_heads=kv_heads)
        assert_close("sums by key", mass, wanted, 1e-5)
        alone = run(kernel, asked)
        for name in alone._fields:
            assert torch.equal(getattr(alone, name), getattr(got, name)), name


@pytest.mark.parametrize("kv_heads", [False, True])
@pytest.mark.parametrize("kernel", WAYS)
def test_a_row_that_is_no_number_shows_in_the_sums_of_its_slot_alone(kernel: str, kv_heads: bool) -> None:
    case = build(SCATTERED)
    case.q[1, 3, 0] = float("inf")
    got, mass = summed(kernel, case, range(len(SCATTERED)), kv_heads=kv_heads)
    assert not torch.isfinite(got.entropy[1])
    last = SCATTERED[1][1]
    broken = torch.isnan(mass[1, -1, : last + 1])
    assert bool(broken.all())
    assert torch.isfinite(mass[[n for n in range(len(SCATTERED)) if n != 1]]).all()


@pytest.mark.parametrize("kv_heads", [False, True], ids=["mean", "kv heads"])
@pytest.mark.parametrize("slot", [[2, 0, 1], [0, 1, 1]], ids=["apart", "shared"])
def test_passes_of_a_step_add_to_sums_of_their_own(slot: list[int], kv_heads: bool) -> None:
    """Decoding: the kernel of a step is used again, by layers and passes that bring other sums."""
    case = build([(0, 60), (1, 33), (2, 47)])
    keys = [replace(case.keys, cache=case.keys.cache * factor) for factor in (1, 0.5)]
    selection = Selection(4, per_key=PerKey(torch.tensor(slot), kv_heads))
    step, softmax = TopKStep(case.row_request, selection), Softmax(case.options["scale"])
    shape = 3, 2 if kv_heads else 1, 70
    again = 0
    for back in (3, 2, 2, 0):
        position = case.row_position.long() - back
        rows = [LayerRows(case.q, own, position, softmax, torch.zeros(shape)) for own in keys]
        if step.again(rows) is None:
            step.stacked(rows)
        else:
            again += 1
        for row in rows:
            wanted = torch.zeros(shape, dtype=torch.float64)
            naive.topk_attention(row._replace(key_mass=wanted), case.row_request, selection)
            assert row.key_mass is not None
            assert_close("sums by key", row.key_mass.double(), wanted, 1e-5)
    assert again == (3 if slot == [2, 0, 1] else 0)


@pytest.mark.parametrize(
    ("slot", "shape", "message"),
    [
        ([0, 0, 2], (2, 1, 128), r"key_mass has 2 slots of 128 keys, and rows are of slots 0 to 2"),
        ([0, -1, 1], (2, 1, 128), "rows are of slots -1 to 1"),
        ([0, 0, 1], (2, 1, 40), "2 slots of 40 keys, and rows are of slots 0 to 1 and see keys up to"),
        ([0, 0, 1], (2, 2, 128), r"key_mass must be contiguous \[slots, 1, keys\], got shape \[2, 2, 128\]"),
        ([0, 0], (2, 1, 128), r"per_key\.slot must have shape \[3\], got \[2\]"),
    ],
)
@pytest.mark.parametrize("kernel", ["compiled", "torch"])
def test_sums_that_do_not_fit_are_refused(
    kernel: str, slot: list[int], shape: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNHOOK_KERNEL", kernel)
    case = build([(0, 60), (0, 61), (1, 90)])
    asked = {"per_key": PerKey(torch.tensor(slot)), "key_mass": torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        topk_attention(case.q, case.keys, case.row_request, case.row_position, top_k=1, scale=1.0, **asked)


def test_both_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build([(0, 3)])
    with pytest.raises(ValueError, match="per_key and key_mass come together"):
        topk_attention(
            case.q, case.keys, case.row_request, case.row_position, top_k=1, scale=1.0, key_mass=torch.zeros(1, 1, 16)
        )
