"""The engine-neutral core: who wants records, which rows and layers, the kernel call, delivery.

A backend asks `sessions()` whether anybody listens, makes one `StepCapture` per session and forward
step, feeds it each captured layer's q and keys, and hands the finished records to the session.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnhook import fingerprint
from attnhook.errors import AttnhookError, OptionError
from attnhook.options import CaptureOptions, RequestOptions
from attnhook.records import TokenRecord

if TYPE_CHECKING:
    import torch

    from attnhook.kernels.topk import LayerRows, PagedKeys, TopK, TopKStep
    from attnhook.kernels.topk.split import SplitStep
    from attnhook.serving.ranks import Ranks

logger = logging.getLogger("attnhook")

_sessions: tuple[Session, ...] = ()  # replaced whole, so that an engine thread reads it without a lock
_lock = threading.Lock()


class Spent:
    """What capture took of this process's time, counted over all sessions (on a GPU: of the host's time)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0  # forward steps whose records were made
        self._lock = threading.Lock()

    @contextmanager
    def count(self, steps: int = 0) -> Iterator[None]:
        """Around a piece of work."""
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            with self._lock:
                self.seconds += taken
                self.steps += steps


spent = Spent()


class Session:
    """One listener: a `capture()` block, or the process's sinks.

    ``strict`` sessions raise what cannot be captured into the caller; the others drop the rows, count them
    by reason in ``dropped`` and log each reason once.
    """

    def __init__(
        self,
        options: RequestOptions,
        deliver: Callable[[Sequence[TokenRecord]], object],
        *,
        strict: bool,
        model: object = None,
        dropped: Counter[str] | None = None,
    ) -> None:
        self.options = options
        self.deliver = deliver
        self.strict = strict
        self.model = model
        self.dropped: Counter[str] = Counter() if dropped is None else dropped
        self.active = False
        self._logged: set[str] = set()

    def drop(self, reason: str, rows: int, why: str | Exception) -> None:
        """Count ``rows`` dropped rows; the first time a reason occurs, log why."""
        self.dropped[reason] += rows
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning(
                "dropping attention records (%s): %s", reason, why, exc_info=why if isinstance(why, Exception) else None
            )

    def refuse(self, error: Exception, rows: int) -> None:
        """Raise ``error`` in a strict session, else drop ``rows`` rows because of it."""
        if self.strict:
            raise error
        reason = "unsupported" if isinstance(error, AttnhookError) else "capture_failed"
        self.drop(reason, rows, error)

    def __enter__(self) -> Session:
        global _sessions
        with _lock:
            _sessions = (*_sessions, self)
            self.active = True
        return self

    def __exit__(self, *_: object) -> None:
        global _sessions
        with _lock:
            _sessions = tuple(s for s in _sessions if s is not self)
            self.active = False


def sessions() -> tuple[Session, ...]:
    """Sessions that listen now; empty means that nothing needs to be captured."""
    return _sessions


@dataclass(frozen=True)
class Row:
    """One query row to capture."""

    request_id: str
    choice: int
    position: int  # in the request's full sequence
    decode_step: int | None  # None: a prompt row
    source: int  # row of the page table (the request's place in the batch)


def wants_row(options: RequestOptions, decode_step: int | None) -> bool:
    """Whether the options keep this row: prompt rows if asked for, generated rows by stride and limit."""
    if decode_step is None:
        return options.prompt
    return decode_step % options.stride == 0 and decode_step // options.stride < options.max_tokens


def over_limit(options: RequestOptions, decode_step: int | None) -> bool:
    """Whether only ``max_tokens`` keeps this row out, so that the cut can be counted."""
    return (
        decode_step is not None
        and decode_step % options.stride == 0
        and decode_step // options.stride >= options.max_tokens
    )


class StepCapture:
    """The rows of one forward step that one session wants, layer by layer."""

    def __init__(
        self,
        rows: Sequence[Row],
        layers: Sequence[int],
        options: RequestOptions,
        model: str,
        ranks: Ranks | None = None,
    ) -> None:
        self.rows = rows
        self.wanted = frozenset(layers)
        self.options = options
        self.model = model
        self._ranks = ranks  # of a model whose heads are divided; the first one's records hold them all
        self._order = sorted(self.wanted)
        self._results: TopK | None = None  # [L, T, ...] of all wanted layers, in one piece
        self._done: set[int] = set()
        # by the identity of the shift, which is kept with it
        self._shared: dict[int, tuple[torch.Tensor, TopKStep | SplitStep, torch.Tensor | None]] = {}

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
        from attnhook.kernels.topk import LayerRows

        self.add_layers([layer], [LayerRows(q, keys, row_slot, **softmax)], shift)

    def add_layers(self, layers: Sequence[int], rows: Sequence[LayerRows], shift: torch.Tensor) -> None:
        """`add` of several layers at once, for engines whose keys stay where they are until the pass ends."""
        with spent.count():
            self._reduce(layers, rows, shift)

    def _reduce(self, layers: Sequence[int], rows: Sequence[LayerRows], shift: torch.Tensor) -> None:
        import torch

        # layers with different windows, or on other devices, come with a shift of their own
        known = self._shared.get(id(shift))
        if known is None:
            known = self._shared[id(shift)] = self._start(rows[0].q, shift)
        _, step, offset = known
        for layer, result in zip(layers, step(rows), strict=True):
            if offset is not None:
                positions = torch.where(result.positions >= 0, result.positions - offset, -1)
                result = result._replace(positions=positions)
            self._keep(layer, result)

    def _keep(self, layer: int, result: TopK) -> None:
        import torch

        if self._results is None:
            # at once: small results between the model's own allocations fragment the heap
            whole = [torch.empty((len(self._order), *x.shape), dtype=x.dtype, device=x.device) for x in result]
            self._results = type(result)(*whole)
        for kept, x in zip(self._results, result, strict=True):
            kept[self._order.index(layer)].copy_(x)
        self._done.add(layer)

    def _start(
        self, q: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, TopKStep | SplitStep, torch.Tensor | None]:
        """What all layers with this shift share: the shift, the kernel, slots to take off each row's positions."""
        import torch

        from attnhook.kernels.topk import TopKStep

        options, device = self.options, q.device
        ranks = self._ranks if self._ranks is not None and self._ranks.size > 1 else None
        heads = q.shape[1] * (1 if ranks is None else ranks.size)
        source = torch.tensor([row.source for row in self.rows], dtype=torch.int32, device=device)
        arguments: dict[str, Any] = {"top_k": 1 if options.mode == "fingerprint" else options.top_k}
        if options.heads is not None:
            mask = torch.zeros(heads, dtype=torch.bool)
            mask[list(options.heads)] = True
            heads = len(set(options.heads))
            if ranks is not None:
                mask = mask.view(ranks.size, -1)[ranks.rank]
            arguments["head_mask"] = mask.to(device)
        if options.spans:
            bounds = torch.tensor(list(options.spans.values()), dtype=torch.int64, device=device)
            arguments["spans"] = bounds[None] + shift[:, None, None]
        if options.mask_prefix:
            arguments["first_reported"] = shift + options.mask_prefix
        offset = shift[source.long()][:, None] if bool(shift.any()) else None
        if ranks is None:
            return shift, TopKStep(source, **arguments), offset
        from attnhook.kernels.topk.split import SplitStep

        width = max(row.position for row in self.rows) + 1 + int(shift.max())
        return shift, SplitStep(source, total=ranks.total, heads=heads, width=width, **arguments), offset

    def records(self, dropped: Callable[[str, int, str], None]) -> list[TokenRecord]:
        """The finished records; rows with a NaN or an infinity are dropped and reported instead."""
        with spent.count(steps=1):
            return self._finished(dropped)

    def _finished(self, dropped: Callable[[str, int, str], None]) -> list[TokenRecord]:
        import numpy as np

        results = self._results
        if results is None or not self.rows:
            return []
        layers = tuple(layer for layer in self._order if layer in self._done)
        places = [self._order.index(layer) for layer in layers]

        def stacked(name: str) -> np.ndarray:  # [T, L, ...]
            array: np.ndarray = getattr(results, name).cpu().numpy()
            return np.ascontiguousarray(np.moveaxis(array if len(places) == len(array) else array[places], 0, 1))

        histogram, entropy = stacked("histogram"), stacked("entropy")
        finite = (np.isfinite(entropy) & np.isfinite(histogram).all(-1)).all(-1)
        if not finite.all():
            dropped("nan", int((~finite).sum()), "a query or key holds NaN or infinity")
        fingerprints = fingerprint.assemble(histogram, entropy)
        positions, scores = stacked("positions"), stacked("scores").astype(np.float32, copy=False)
        spans = stacked("span_mass").astype(np.float32, copy=False)
        if self.options.mode == "fingerprint":
            positions, scores = positions[..., :0], scores[..., :0]
        names = tuple(self.options.spans)
        return [
            TokenRecord(
                request_id=row.request_id,
                query_position=row.position,
                layers=layers,
                token_positions=positions[t],
                attention_scores=scores[t],
                fingerprints=fingerprints[t],
                decode_step=row.decode_step,
                choice=row.choice,
                mode=self.options.mode,
                model=self.model,
                span_names=names,
                span_mass=spans[t],
            )
            for t, row in enumerate(self.rows)
            if finite[t]
        ]


class Captured(list[TokenRecord]):
    """Records of a `capture()` block, in the order in which their rows were computed.

    ``dropped`` counts rows that were left out, by reason: ``nan``, ``max_tokens``, ...
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()

    @property
    def generated(self) -> list[TokenRecord]:
        """Records of generated tokens, in order."""
        return [record for record in self if not record.is_prompt]

    @property
    def prompt(self) -> list[TokenRecord]:
        """Records of prompt rows, in order."""
        return [record for record in self if record.is_prompt]


@contextmanager
def capture(
    *, model: object = None, sinks: str | Sequence[str] = (), on_error: str = "raise", **options: Any
) -> Iterator[Captured]:
    """Capture every forward pass that runs inside the block, in any thread of this process.

    Parameters
    ----------
    model
        Only forward passes of this model; default: all.
    sinks
        Sink URLs (``"jsonl:records.jsonl"``) that get the records too.
    on_error
        ``"raise"`` (default): what cannot be captured exactly raises UnsupportedError out of the model
        call. ``"drop"``: the model runs on, ``records.dropped`` counts the rows by reason.
    **options
        ``top_k`` (1..256, default 32), ``layers`` (``"last"``, ``"auto"``, ``"all"`` or ints), ``heads``
        (ints), ``mode``, ``prompt`` (bool), ``stride``, ``max_tokens``, ``spans`` ({name: (start, end)}),
        ``mask_prefix``; unset ones come from ``ATTNHOOK_*`` or the defaults.

    Yields
    ------
    Captured
        A list of `TokenRecord` that fills as tokens are generated.

    Raises
    ------
    OptionError, UnsupportedError, PluginError
    """
    from attnhook import lifecycle

    if on_error not in ("raise", "drop"):
        raise OptionError("on_error", f"on_error={on_error!r} must be 'raise' or 'drop'")
    resolved = CaptureOptions.resolve({**options, "sinks": sinks})
    records = Captured()
    delivery = lifecycle.open_delivery(resolved)  # observers too, unless install() shows them everything

    def deliver(batch: Sequence[TokenRecord]) -> None:
        records.extend(batch)
        if delivery is not None:
            delivery.put(batch)

    session = Session(resolved.request, deliver, strict=on_error == "raise", model=model, dropped=records.dropped)
    try:
        with lifecycle.hooks(resolved), session:
            yield records
    finally:
        if delivery is not None:
            delivery.close()
