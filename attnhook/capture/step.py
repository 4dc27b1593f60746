"""One forward step reduced to records.

A backend makes one `StepCapture` per listener and forward step, gives it each captured layer's queries and keys, and
takes the finished records (or packed rows) out of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from attnhook.capture.rows import Row
from attnhook.capture.session import spent
from attnhook.errors import OptionError, UnsupportedError
from attnhook.options import RequestOptions, check_heads
from attnhook.record import fingerprint
from attnhook.record.packing import pack_rows
from attnhook.record.row import RowName
from attnhook.record.token_record import TokenRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from attnhook.capture.key_mass import Added
    from attnhook.capture.ranks import Ranks
    from attnhook.kernels.topk import LayerRows, PagedKeys, TopK, TopKStep
    from attnhook.kernels.topk.split import SplitStep
    from attnhook.kernels.topk.types import Arrays


_Shared = tuple[int, tuple[int, ...] | None]

_SINK = (0, 1)  # the attention sink's span, behind those that are asked for


_Slot = tuple[str, int, int | None]  # request id, choice, position of a row that gives a token


def _slot(row: Row) -> _Slot:
    """Which rows are added up together: those of a prompt are, a row that gives a token may be that of a draft."""
    return row.request_id, row.choice, None if row.decode_step is None else row.position


class StepCapture:
    """The rows of one forward step that one session wants, layer by layer."""

    def __init__(
        self,
        rows: Sequence[Row],
        layers: Sequence[int],
        options: RequestOptions,
        model: str,
        ranks: Ranks | None = None,
        kernel: TopKStep | None = None,
        hidden: bool = False,
        kv_heads: int | None = None,
    ) -> None:
        self.rows = rows
        self.wanted = frozenset(layers)
        self.options = options
        self.model = model
        self._hidden = hidden  # keys lie before position 0, which are part of the row and never reported
        self._kv_heads = kv_heads  # of all ranks, where it is known
        self._ranks = ranks  # of a model whose heads are divided; the first one's records hold them all
        #: kernel of an earlier step, reused while options and the rows' ``source`` are unchanged
        self.kernel = kernel
        self._order = sorted(self.wanted)
        self._results: TopK | Arrays | None = None  # [T, L, ...] of all wanted layers, in one piece
        self._lent = False  # the results are the kernel's own arrays, which its next call fills anew
        self._done: set[int] = set()
        self._heads: dict[int, int] = {}  # query heads of layers whose heads are asked for
        # where sums of keys are asked for: layers, [L, slots, G, keys], and how far keys lie behind their positions
        self._sums: list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor | None]] = []
        self._slots = list(dict.fromkeys(map(_slot, rows))) if options.key_mass else []
        self._dropped: set[_Slot] = set()  # of which a row was dropped
        self._widths: dict[int, int] = {}  # by the identity of the shift: keys that a row can see
        # by the identity of the shift, which is kept with it, and the heads
        self._shared: dict[_Shared, tuple[torch.Tensor | None, TopKStep | SplitStep, torch.Tensor | None]] = {}
        # other layers are those of another pipeline stage
        if isinstance(options.heads, Mapping) and min(options.heads) < 0:
            raise OptionError(
                "heads", f"heads: layer {min(options.heads)} is no number yet: see options.resolve_choice"
            )

    @property
    def missing(self) -> list[int]:
        """Layers that were wanted and have not been added."""
        return sorted(self.wanted - self._done)

    def add(
        self,
        layer: int,
        q: torch.Tensor,
        keys: PagedKeys,
        row_slot: torch.Tensor,
        shift: torch.Tensor,
        **softmax: Any,
    ) -> None:
        """Reduce one layer: q ``[T, Hq, D]`` for the step's T rows.

        ``row_slot`` int32 [T] is each row's own place in the paged view and ``shift`` int32 [R] how far a
        request's positions lie behind its slots there (left padding, evicted keys). ``softmax`` goes to
        `topk_attention`: scale, softcap, window, sinks, alibi_slopes.
        """
        from attnhook.kernels.topk import LayerRows, Softmax

        self.add_layers([layer], [LayerRows(q, keys, row_slot, Softmax(**softmax))], shift)

    def add_layers(self, layers: Sequence[int], rows: Sequence[LayerRows], shift: torch.Tensor | None = None) -> None:
        """`add` of several layers at once, for engines whose keys stay where they are until the pass ends."""
        began = time.perf_counter()
        try:
            self._reduce(layers, rows, shift)
        finally:
            spent.add(began)

    def _reduce(self, layers: Sequence[int], rows: Sequence[LayerRows], shift: torch.Tensor | None) -> None:
        if self.options.per_head:
            self._heads.update({layer: one.q.shape[1] for layer, one in zip(layers, rows, strict=True)})
            if len(set(self._heads.values())) > 1:
                raise UnsupportedError(
                    f"per_head of layers with different numbers of query heads, {self._heads} by layer: a record has "
                    "the same of each; choose layers that are alike, or capture without per_head"
                )
        by_layer = self.options.heads
        if isinstance(by_layer, Mapping):
            for heads, chosen in groupby(zip(layers, rows, strict=True), lambda one: by_layer.get(one[0])):
                alike = list(chosen)
                self._reduce_alike([layer for layer, _ in alike], [one for _, one in alike], shift, heads)
        else:
            self._reduce_alike(layers, rows, shift, by_layer)

    def _reduce_alike(
        self,
        layers: Sequence[int],
        rows: Sequence[LayerRows],
        shift: torch.Tensor | None,
        heads: tuple[int, ...] | None,
    ) -> None:
        """Layers of which the mean over the same heads is wanted."""
        import torch

        from attnhook.kernels.topk import TopKStep

        # layers with different windows, or on other devices, come with a shift of their own
        known = self._shared.get((id(shift), heads))
        if known is None:
            known = self._shared[id(shift), heads] = self._start(rows[0], shift, heads)
        _, step, offset = known
        if self.options.key_mass:
            rows = self._with_sums(layers, rows, shift)
        if shift is None and [*layers] == self._order and isinstance(step, TopKStep):
            lent = step.again(rows)
            self._lent = lent is not None
            self._results = lent or step.stacked(rows)
            self._done.update(layers)
            return
        for layer, result in zip(layers, step(rows), strict=True):
            if offset is not None:
                moved = (result.positions, offset), (result.head_positions, offset[:, None])
                positions, of_heads = (torch.where(found >= 0, found - by, -1) for found, by in moved)
                result = result._replace(positions=positions, head_positions=of_heads)
            self._keep(layer, result)

    def _with_sums(
        self, layers: Sequence[int], rows: Sequence[LayerRows], shift: torch.Tensor | None
    ) -> list[LayerRows]:
        """Layers with room for the sums of their keys."""
        import torch

        width = self._widths.get(id(shift))
        if width is None:
            furthest = 0 if shift is None else int(shift.max())
            width = self._widths[id(shift)] = max(row.position for row in self.rows) + 1 + furthest
        groups = 1
        if self.options.key_mass == "kv_head":
            counts = {self._groups(one.keys.num_kv_heads) for one in rows} | {x.shape[2] for _, x, _ in self._sums}
            if len(counts) > 1:
                raise UnsupportedError(
                    f"key_mass='kv_head' of layers with different numbers of kv heads, {sorted(counts)}: choose layers "
                    "that are alike, or ask for 'mean'"
                )
            (groups,) = counts
        whole = torch.zeros((len(layers), len(self._slots), groups, width), device=rows[0].q.device)
        self._sums.append((tuple(layers), whole, shift))
        return [one._replace(key_mass=sums) for one, sums in zip(rows, whole, strict=True)]

    def _groups(self, own: int) -> int:
        """kv heads of the whole model, of which this rank has ``own``: some of its own, or a copy of one."""
        size = 1 if self._ranks is None else self._ranks.size
        if size == 1:
            return own
        if self._kv_heads is None or own * size % self._kv_heads:
            raise UnsupportedError(
                f"key_mass='kv_head' with tensor parallelism: {size} ranks of {own} kv heads each, and the model has "
                f"{self._kv_heads or 'an unknown number'}; ask for 'mean'"
            )
        return self._kv_heads

    def key_mass(self) -> list[Added]:
        """After `records` or `packed`: what the rows add to the sums of keys.

        The prompt's rows of a sequence together, and each row that gives a token by itself.
        """
        import numpy as np

        from attnhook.capture.key_mass import Added

        if not self._sums:
            return []
        parts = [(layers, whole.cpu().numpy(), shift) for layers, whole, shift in self._sums]
        order = np.argsort([layer for layers, _, _ in parts for layer in layers])
        own: dict[_Slot, list[Row]] = {}
        for row in self.rows:
            own.setdefault(_slot(row), []).append(row)
        found = []
        for n, slot in enumerate(self._slots):
            source, end = own[slot][0].source, max(row.position for row in own[slot]) + 1
            masses = []
            for _, whole, shift in parts:
                behind = 0 if shift is None else int(shift[source])
                gone = max(-behind, 0)  # keys that a cache has let go of
                mass = whole[:, n, :, max(behind, 0) : behind + end]
                masses.append(np.pad(mass, ((0, 0), (0, 0), (gone, 0))) if gone else mass)
            mass = masses[0] if len(masses) == 1 else np.concatenate(masses)[order]
            whole_row = slot not in self._dropped and math.isfinite(float(mass.sum()))
            found.append(Added(slot[:2], len(own[slot]), tuple(self._order), mass if whole_row else None, slot[2]))
        return found

    def _keep(self, layer: int, result: TopK) -> None:
        import torch

        self._done.add(layer)
        if len(self._order) == 1:
            self._results = type(result)(*(x.unsqueeze(1) for x in result))
            return
        if self._results is None:
            # at once: small results between the model's own allocations fragment the heap
            shapes = [(len(x), len(self._order), *x.shape[1:]) for x in result]
            whole = [torch.empty(at, dtype=x.dtype, device=x.device) for at, x in zip(shapes, result, strict=True)]
            self._results = type(result)(*whole)
        kept: Any
        for kept, x in zip(self._results, result, strict=True):
            kept[:, self._order.index(layer)].copy_(x)

    def _start(
        self, layer: LayerRows, shift: torch.Tensor | None, chosen: tuple[int, ...] | None
    ) -> tuple[torch.Tensor | None, TopKStep | SplitStep, torch.Tensor | None]:
        """What layers with this shift and mean over the ``chosen`` heads share: the shift, the kernel, slots to take
        off each row's positions."""
        import torch

        from attnhook.kernels.topk import PerHead, PerKey, Selection, TopKStep

        alike = shift is None and not isinstance(self.options.heads, Mapping)
        if alike and self.kernel is not None:
            return None, self.kernel, None
        options, q = self.options, layer.q
        device = q.device
        ranks = self._ranks if self._ranks is not None and self._ranks.size > 1 else None
        heads = q.shape[1] * (1 if ranks is None else ranks.size)
        source = torch.tensor([row.source for row in self.rows], dtype=torch.int32, device=device)
        arguments: dict[str, Any] = {"top_k": 1 if options.mode == "fingerprint" else options.top_k}
        if chosen is not None:
            check_heads(chosen, heads)
            mask = torch.zeros(heads, dtype=torch.bool)
            mask[list(chosen)] = True
            heads = len(set(chosen))
            if ranks is not None:
                mask = mask.view(ranks.size, -1)[ranks.rank]
            arguments["head_mask"] = mask.to(device)
        behind = shift
        if behind is None:
            behind = torch.zeros(layer.keys.page_table.shape[0], dtype=torch.int32, device=device)
        bounds = torch.tensor([*options.spans.values(), _SINK], dtype=torch.int64, device=device)
        arguments["spans"] = bounds[None] + behind[:, None, None]
        told = options.per_head
        if told:
            arguments["per_head"] = PerHead(
                options.top_k_per_head if "top" in told else 0,
                fingerprint="fingerprint" in told,
                spans="spans" in told or "sink" in told,  # the sink's span is the last
                lse="lse" in told,
            )
        if options.key_mass:
            place = {slot: n for n, slot in enumerate(self._slots)}
            slots = torch.tensor([place[_slot(row)] for row in self.rows], device=device)
            arguments["per_key"] = PerKey(slots, options.key_mass == "kv_head")
        if options.mask_prefix or self._hidden:
            arguments["first_reported"] = behind + options.mask_prefix
        offset = None
        if shift is not None and bool(shift.any()):
            offset = shift[source.long()][:, None]
        if ranks is None:
            step = TopKStep(source, Selection(**arguments))
            if alike:
                self.kernel = step
            return shift, step, offset
        from attnhook.kernels.topk.split import SplitStep

        width = max(row.position for row in self.rows) + 1 + (0 if shift is None else int(shift.max()))
        split = SplitStep(
            source, Selection(**arguments), total=ranks.total, heads=heads, width=width, place=(ranks.rank, ranks.size)
        )
        return shift, split, offset

    def records(self, dropped: Callable[[str, int, str], None]) -> list[TokenRecord]:
        """The finished records; rows with a NaN or an infinity are dropped and reported instead."""
        began = time.perf_counter()
        try:
            return self._records(dropped)
        finally:
            spent.add(began, steps=1)

    def packed(self, dropped: Callable[[str, int, str], None]) -> list[bytes | None]:
        """What `TokenRecord.to_bytes` makes of each row's record, in the order of the rows; None where it is dropped.

        Raises RecordError as that does.
        """
        began = time.perf_counter()
        try:
            return self._packed(dropped)
        finally:
            spent.add(began, steps=1)

    def _records(self, dropped: Callable[[str, int, str], None]) -> list[TokenRecord]:
        found = self._finished(dropped)
        if found is None:
            return []
        if self._lent:
            positions, scores, span_mass = (x.copy() for x in (found.positions, found.scores, found.span_mass))
            sink = None if found.sink_mass is None else found.sink_mass.copy()
            heads = {name: array.copy() for name, array in found.heads.items()}
            found = found._replace(positions=positions, scores=scores, span_mass=span_mass, sink_mass=sink, heads=heads)
        return [
            TokenRecord(
                request_id=row.request_id,
                query_position=row.position,
                layers=found.layers,
                token_positions=found.positions[t],
                attention_scores=found.scores[t],
                fingerprints=found.fingerprints[t],
                decode_step=row.decode_step,
                choice=row.choice,
                mode=self.options.mode,
                model=self.model,
                span_names=found.span_names,
                span_mass=found.span_mass[t],
                sink_mass=None if found.sink_mass is None else found.sink_mass[t],
                **{name: array[t] for name, array in found.heads.items()},
            )
            for t, row in enumerate(self.rows)
            if found.finite is None or found.finite[t]
        ]

    def _packed(self, dropped: Callable[[str, int, str], None]) -> list[bytes | None]:
        found = self._finished(dropped)
        if found is None:
            return [None] * len(self.rows)
        rows = pack_rows(
            [RowName(row.request_id, row.choice, row.decode_step, row.position) for row in self.rows],
            found.layers,
            found.positions,
            found.scores,
            found.fingerprints,
            found.span_mass,
            found.sink_mass,
            found.heads,
            mode=self.options.mode,
            model=self.model,
            span_names=found.span_names,
        )
        if found.finite is None:
            return [*rows]
        return [row if good else None for row, good in zip(rows, found.finite.tolist(), strict=True)]

    def _finished(self, dropped: Callable[[str, int, str], None]) -> _Finished | None:
        import numpy as np

        results: Any = self._results
        if results is None or not self.rows:
            return None
        layers = tuple(layer for layer in self._order if layer in self._done)
        places = None if len(layers) == len(self._order) else [self._order.index(layer) for layer in layers]

        def array(whole: Any, dtype: str = "float32") -> np.ndarray:  # [T, L, ...]
            whole = whole if isinstance(whole, np.ndarray) else whole.cpu().numpy()
            return np.ascontiguousarray(whole if places is None else whole[:, places], dtype)

        positions, scores, histogram, entropy, span_mass, *_ = results
        if not self._lent or places is not None:
            positions = array(positions, "int32")
            scores, histogram, entropy, span_mass = (array(x) for x in (scores, histogram, entropy, span_mass))
        fingerprints = fingerprint.assemble(histogram, entropy)
        heads = {}
        if self.options.per_head:
            from attnhook.kernels.topk.types import INTEGERS

            found = {name: x for name, x in results._asdict().items() if name.startswith("head_")}
            heads = self._told(
                {name: array(x, "int32" if name in INTEGERS else "float32") for name, x in found.items()}
            )
        finite = None
        if not math.isfinite(float(fingerprints.sum() + sum(x.sum() for x in heads.values()))):  # as a rule all are
            finite = (np.isfinite(entropy) & np.isfinite(histogram).all(-1)).all(-1)
            for numbers in heads.values():
                finite &= np.isfinite(numbers).reshape(len(numbers), -1).all(-1)
            if not finite.all():
                dropped("nan", int((~finite).sum()), "a query or key holds NaN or infinity")
                bad = [row for row, good in zip(self.rows, finite.tolist(), strict=True) if not good]
                self._dropped = {_slot(row) for row in bad}
        if self.options.mode == "fingerprint":
            positions, scores = positions[..., :0], scores[..., :0]
        return _Finished(
            layers,
            finite,
            positions,
            scores,
            fingerprints,
            tuple(self.options.spans),
            span_mass[..., :-1],
            # keys before position 0 are visible too, so that nothing can be told of the row without the sink
            None if self._hidden else span_mass[..., -1],
            heads,
        )

    def _told(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The fields of `RowData` per head that the options want, [T, L, H, ...], from those of `TopK`."""
        told, heads = self.options.per_head, dict[str, Any]()
        if "top" in told:
            heads["head_positions"], heads["head_scores"] = found["head_positions"], found["head_scores"]
        if "fingerprint" in told:
            heads["head_fingerprints"] = fingerprint.assemble(found["head_histogram"], found["head_entropy"])
        if "spans" in told and self.options.spans:
            heads["head_span_mass"] = found["head_span_mass"][..., :-1]
        if "sink" in told and not self._hidden:
            heads["head_sink_mass"] = found["head_span_mass"][..., -1]
        if "lse" in told:
            heads["head_lse"] = found["head_lse"]
        return heads


class _Finished(NamedTuple):
    """The arrays [T, L, ...] of a step's records."""

    layers: tuple[int, ...]
    finite: np.ndarray | None  # bool [T]: rows without NaN and infinity; None where all are
    positions: np.ndarray
    scores: np.ndarray
    fingerprints: np.ndarray
    span_names: tuple[str, ...]
    span_mass: np.ndarray
    sink_mass: np.ndarray | None
    heads: dict[str, np.ndarray]  # by the field of `RowData`, [T, L, H, ...]
