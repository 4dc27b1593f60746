"""The reduction of one pass: each wanted layer's queries and keys become the packed rows of its requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attnhook.capture.rebuild import KEYS_THAT_TELL, check_output
from attnhook.capture.rows import Row
from attnhook.capture.step import StepCapture
from attnhook.errors import UnsupportedError
from attnhook.kernels.topk import LayerRows, PagedKeys, Softmax, TopKStep, topk_attention
from attnhook.kernels.topk.types import gather
from attnhook.plugins.engine import LayerView
from attnhook.serving.key_mass import PROMPT, Piece, pack
from attnhook.serving.plan import Group, Plan
from attnhook.serving.wire import worse

Key = tuple[str, int]  # request, position
_KernelKey = tuple[str, int, tuple[int, ...]]

_KERNELS = 16  # batches whose kernels a worker keeps
_DECODING = 1024  # rows of a pass that is decoding; prompt rows come once


@dataclass
class Memory:
    """What reductions of one worker keep from pass to pass."""

    checked: set[int] = field(default_factory=set)  # layers whose output was rebuilt from our probabilities
    kernels: dict[_KernelKey, TopKStep] = field(default_factory=dict)


class Prepared(NamedTuple):
    """A group of rows that is ready to be reduced."""

    group: Group
    capture: StepCapture
    layers: list[LayerRows]
    kernel: TopKStep | None  # of an earlier pass


class Reduction:
    """`take` each wanted layer while the pass runs, then `prepare` and `reduce`.

    ``if_missing`` is what to do where a layer's queries do not come, for the error that says so.
    """

    def __init__(self, plan: Plan, memory: Memory, if_missing: str = "") -> None:
        self.plan, self.memory, self._if_missing = plan, memory, if_missing
        self.checks: dict[str, float] = {}  # request -> largest error of its self-check
        self.masses: dict[str, list[Piece]] = {}  # request -> what its rows add to the sums of its keys
        self._taken: dict[int, tuple[torch.Tensor, LayerView]] = {}

    @property
    def missing(self) -> frozenset[int]:
        """Wanted layers that have not been taken."""
        return self.plan.wanted - self._taken.keys()

    def needs_output(self, number: int) -> bool:
        """Whether `take` wants to see the engine's output of a layer."""
        return number not in self.memory.checked or self.plan.self_checks

    def take(self, number: int, q: torch.Tensor, view: LayerView, output: torch.Tensor | None = None) -> None:
        """A layer's queries [U, Hq, D] at the plan's index (the reduction's to keep) and keys that stay until the end.

        ``output`` [U, Hq, Dv], where it `needs_output`, is what the engine's own attention made of these rows: the
        first time that a layer is captured one row of it is rebuilt, and every row of a request that asks for the
        self-check. Raises UnsupportedError where it differs.
        """
        self._taken[number] = q, view
        if output is None or not self.needs_output(number):
            return
        at = 0
        for group in self.plan.groups.values():
            for i, row in enumerate(group.rows):
                first = number not in self.memory.checked and i == len(group.rows) - 1
                if number in group.own and (group.options.self_check or first):
                    self._check(number, q[at + i], view, output[at + i], row, group.options.self_check)
            at += len(group.rows)

    def _check(
        self, number: int, q: torch.Tensor, view: LayerView, output: torch.Tensor, row: Row, asked: bool
    ) -> None:
        """Rebuild the attention output of one row, [Hq, Dv], from its query [Hq, D]."""
        window = view.softmax.get("window", -1)
        low = 0 if window < 0 else max(0, row.position - window + 1)
        latent = output.shape[-1] if view.value_heads is None else view.value_heads.shape[1]
        k, v = (
            gather(paged.pages(dim), paged, row.source, low, row.position + 1).transpose(0, 1)
            for paged, dim in ((view.keys, q.shape[-1]), (view.values, latent))
        )
        softmax = {name: value for name, value in view.softmax.items() if name != "window"}
        error = check_output(f"layer {number}", q, k, v, output, view.value_heads, **softmax)
        if error is None:
            return
        if row.position + 1 - low >= KEYS_THAT_TELL:
            self.memory.checked.add(number)
        if asked:
            self.checks[row.request_id] = worse(self.checks.get(row.request_id), error)

    def prepare(self) -> list[Prepared]:
        """Everything that can go wrong before the ranks must keep in step."""
        ready = []
        start = 0
        for group in self.plan.groups.values():
            part = slice(start, start + len(group.rows))
            start = part.stop
            try:
                ready.append(self._prepare(group, part))
            except Exception as error:
                self.plan.fail(error, group.requests)
        return ready

    def _prepare(self, group: Group, part: slice) -> Prepared:
        missing = [layer for layer in group.own if layer not in self._taken]
        if missing:
            what = f"layers {missing} made no attention call in this forward pass"
            raise UnsupportedError(what + self._if_missing)
        model = self.plan.model
        kernel = self.memory.kernels.get(self._kernel_key(group)) if group.own else None
        capture = StepCapture(
            group.rows, group.own, group.options, model.name, model.ranks, kernel, kv_heads=model.kv_heads
        )
        slots = torch.tensor([row.position for row in group.rows], device=self.plan.device)
        taken = [self._taken[layer] for layer in group.own]
        whole = len(self.plan.groups) == 1
        layers = [LayerRows(q if whole else q[part], view.keys, slots, Softmax(**view.softmax)) for q, view in taken]
        return Prepared(group, capture, layers, kernel)

    def reduce(self, ready: Prepared) -> dict[Key, bytes]:
        """The packed rows of one group, on the first rank of its stage; the others add their part and have none."""
        group, capture, layers, kernel = ready
        if not layers:
            return {}
        capture.add_layers(group.own, layers)
        self._keep_kernel(group, capture, kernel)
        if self.plan.model.ranks.rank:
            return {}
        bad: list[str] = []
        rows = {}
        packed = capture.packed(lambda why, count, message: bad.append(f"{count} rows dropped: {message}"))
        for row, data in zip(group.rows, packed, strict=True):
            if data is not None:
                rows[row.request_id, row.position] = data
            else:
                self.plan.errors.setdefault(row.request_id, "; ".join(bad))
        for added in capture.key_mass():
            request, position = added.sequence[0], added.position
            token = PROMPT if position is None else self.plan.sampled[request].index(position)
            self.masses.setdefault(request, []).append(pack(added, token))
        return rows

    def _kernel_key(self, group: Group) -> _KernelKey:
        """What a kernel of `StepCapture` rests on: options, page tables, rows of them."""
        _, view = self._taken[group.own[0]]
        return group.packed, view.keys.page_table.shape[0], tuple(row.source for row in group.rows)

    def _keep_kernel(self, group: Group, capture: StepCapture, before: TopKStep | None) -> None:
        """For the next pass, which in decoding has the same requests one position further."""
        kernels, kernel = self.memory.kernels, capture.kernel
        if kernel is not None and kernel is not before and len(group.rows) <= _DECODING:
            if len(kernels) >= _KERNELS:
                kernels.clear()
            kernels[self._kernel_key(group)] = kernel


def warm_up() -> None:
    """Compile the kernel before the first request needs it."""
    keys = PagedKeys.from_dense(torch.zeros(1, 1, 64, 16))
    for rows in (1, 16):
        place = torch.arange(64 - rows, 64)
        topk_attention(torch.zeros(rows, 1, 16), keys, torch.zeros(rows, dtype=torch.int32), place, top_k=1, scale=1.0)
