"""Top-k attention where each rank of a group has a part of the heads (tensor parallelism).

The mean over heads is what features and selection start from, so the ranks' sums of attention are added up
before either: a top k of one rank's heads says nothing about the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from attnhook.kernels.topk.dispatch import implementation
from attnhook.kernels.topk.torch.kernel import add_rows
from attnhook.kernels.topk.torch.reduce import empty_result, select
from attnhook.kernels.topk.types import NO_HEADS, LayerRows, PerKey, Selection, TopK
from attnhook.record.fingerprint import BIN_STARTS, BINS

_SCRATCH_ELEMENTS = 1 << 22  # attention of the rows that are added up together: 16 MiB, unless one row needs more


class SplitStep:
    """`TopKStep` over the heads of all ranks; every rank calls it with the same rows and layers.

    Parameters
    ----------
    total
        Adds a float32 tensor up over the ranks, in place; returns whether this rank is to go on. All ranks
        call it equally often with the same shapes.
    heads
        Selected query heads of all ranks together.
    width
        More than the largest position of a row.
    place
        This rank and how many there are: its query heads are those of that place, in order.

    Sums by key, [S, 1, W] or those of all kv heads of the model, are there on the rank that goes on. ``selection`` is
    the same for all ranks but for its head mask, [Hq] bool over this rank's heads; it may select
    none. Ranks that do not go on get empty results. A rank on which something goes wrong adds NaN, so that no rank
    takes the sum for whole, and raises when all is added up.
    """

    def __init__(
        self,
        row_request: torch.Tensor,
        selection: Selection,
        *,
        total: Callable[[torch.Tensor], bool],
        heads: int,
        width: int,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self._request, self._total, self._heads, self._width = row_request, total, heads, width
        self._rank, self._ranks = place
        self._selection, mask = selection, selection.head_mask
        self._selected = None if mask is None else int(mask.sum())

    def __call__(self, layers: Sequence[LayerRows]) -> list[TopK]:
        """One result per layer."""
        rows, count = len(self._request), len(layers)
        found = [
            empty_result((rows, layer.q.shape[1] * self._ranks), self._selection, layer.q.device) for layer in layers
        ]
        step = max(1, _SCRATCH_ELEMENTS // (count * self._width))
        failure: Exception | None = None
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            try:
                attention = torch.stack([self._sum(layer, part) for layer in layers])
            except Exception as error:  # raised below; the other ranks wait for this one's part
                failure = failure or error
                shape = count, part.stop - start, self._width
                attention = torch.full(shape, torch.nan, device=layers[0].q.device)
            if not self._total(attention):
                continue
            for layer, a, out in zip(layers, attention, found, strict=True):
                per_key = self._selection.per_key
                if per_key is not None and not per_key.kv_heads and layer.key_mass is not None:
                    add_rows(a[None], per_key.slot[part], layer.key_mass)
                self._reduce(layer, a, part, TopK(*(x[part] for x in out)))
        if self._selection.per_head != NO_HEADS and rows:
            failure = self._gather_heads(layers, found) or failure
        if self._selection.per_key is not None and self._selection.per_key.kv_heads and rows:
            failure = self._gather_sums(layers, self._selection.per_key) or failure
        if failure is not None:
            raise failure
        return found

    def _gather_heads(self, layers: Sequence[LayerRows], found: list[TopK]) -> Exception | None:
        """Fill in what each rank tells of its own heads; what went wrong on this one, which adds NaN then."""
        names = [name for name, x in found[0]._asdict().items() if name.startswith("head_") and x.numel()]
        shapes = [(name, found[0]._asdict()[name].shape[2:]) for name in names]
        rows, own = layers[0].q.shape[:2]
        size = sum(math.prod(shape) for _, shape in shapes)
        # positions are whole numbers below 2**24, which float32 has
        whole = torch.zeros((len(layers), rows, own * self._ranks, size), device=layers[0].q.device)
        mine, failure = whole[:, :, own * self._rank : own * (self._rank + 1)], None
        try:
            kernel = implementation(whole.device.type)
            selection = self._selection._replace(head_mask=None, top_k=1, per_key=None)
            for n, layer in enumerate(layers):
                got = kernel.topk_attention(layer._replace(key_mass=None), self._request, selection)._asdict()
                mine[n] = torch.cat([got[name].reshape(rows, own, -1).float() for name in names], dim=-1)
        except Exception as error:  # raised by who called; the other ranks wait for this one's part
            failure = error
            mine.fill_(torch.nan)
        if self._total(whole):
            for out, numbers in zip(found, whole, strict=True):
                at = 0
                for name, shape in shapes:
                    end = at + math.prod(shape)
                    out._asdict()[name].copy_(numbers[..., at:end].reshape(rows, -1, *shape))
                    at = end
        return failure

    def _gather_sums(self, layers: Sequence[LayerRows], per_key: PerKey) -> Exception | None:
        """Add what each rank tells of its own kv heads to `LayerRows.key_mass`, which is of the whole model's.

        Ranks that have a copy of one kv head each tell the mean over their query heads, of which there are as many.
        """
        failure: Exception | None = None
        for layer in layers:
            assert layer.key_mass is not None
            (slots, groups, width), own = layer.key_mass.shape, layer.keys.num_kv_heads
            whole = torch.zeros((slots, own * self._ranks, width), device=layer.q.device)
            try:
                sums = torch.zeros((slots, own, width), device=layer.q.device)
                kernel = implementation(whole.device.type)
                kernel.topk_attention(layer._replace(key_mass=sums), self._request, Selection(1, per_key=per_key))
                whole[:, own * self._rank : own * (self._rank + 1)] = sums
            except Exception as error:  # raised by who called; the other ranks wait for this one's part
                failure = failure or error
                whole.fill_(torch.nan)
            if self._total(whole):
                layer.key_mass.add_(whole.view(slots, groups, -1, width).mean(2))
        return failure

    def _sum(self, layer: LayerRows, part: slice) -> torch.Tensor:
        """This rank's share [R, width] of the mean over all ranks' heads."""
        selected = layer.q.shape[1] if self._selected is None else self._selected
        if not selected:
            return torch.zeros((part.stop - part.start, self._width), device=layer.q.device)
        own = LayerRows(layer.q[part], layer.keys, layer.row_position[part], layer.softmax.rows(part))
        mean = attention_rows(own, self._request[part], width=self._width, head_mask=self._selection.head_mask)
        return mean.mul_(selected / self._heads).float()

    def _reduce(self, layer: LayerRows, attention: torch.Tensor, part: slice, out: TopK) -> None:
        own, last = self._selection.requests(self._request[part].long()), layer.row_position[part].long()
        window = layer.softmax.rows(part).window
        window = window if isinstance(window, torch.Tensor) else torch.tensor(window)
        first = torch.where(window < 0, 0, (last - window + 1).clamp(min=0))
        reduce = getattr(implementation(attention.device.type), "reduce_rows", reduce_rows)
        reduce(attention, first, last, own, out, normalise=layer.softmax.sinks is not None)


def attention_rows(
    layer: LayerRows, row_request: torch.Tensor, *, width: int, head_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The attention itself, float32 [T, width]: the mean over the selected heads at each position, 0 where unseen.

    A row whose q or visible keys hold NaN or infinity is NaN where it sees. Arguments as for
    `attnhook.kernels.topk.topk_attention`.
    """
    dense: torch.Tensor = implementation(layer.q.device.type).attention_rows(
        layer, row_request, width=width, head_mask=head_mask
    )
    return dense


def reduce_rows(
    attention: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    selection: Selection,
    out: TopK,
    *,
    normalise: bool = False,
) -> None:
    """Features and selection of rows from their attention [R, N], which is overwritten; see `topk_attention`.

    ``first`` and ``last`` int64 [R] bound what a row sees; in ``selection`` each row is a request of its own.
    ``normalise``: the attention is not all that there is, because a sink has taken some.
    """
    spans, report_from = selection.spans, selection.first_reported
    count = attention.shape[1]
    sums = torch.zeros((len(last), count + 1), dtype=torch.float64, device=attention.device)
    torch.cumsum(attention, -1, dtype=torch.float64, out=sums[:, 1:])

    def mass(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        low, high = low.clamp(0, count), high.clamp(0, count)
        return sums.gather(1, torch.maximum(low, high)) - sums.gather(1, low)

    starts = torch.tensor([*BIN_STARTS, 2**62], device=attention.device)  # the last bin has no end
    edges = last[:, None] + 1 - starts
    out.histogram[:] = mass(edges[:, 1 : BINS + 1], edges[:, :BINS])
    if spans is not None:
        out.span_mass[:] = mass(spans[..., 0].long(), spans[..., 1].long())
    a = attention.double()
    entropy = torch.special.entr(a).sum(-1)
    if normalise:  # H(a / S) = H(a) / S + ln S; a sink that takes everything leaves 0
        whole = sums[:, -1]
        entropy = torch.where(whole == 0, 0.0, entropy / whole + whole.log())
    visible = last - first + 1
    spread = entropy / visible.clamp(min=2).double().log()
    out.entropy[:] = torch.where((visible == 1) & torch.isfinite(entropy), 0.0, spread)
    s = torch.arange(count, device=attention.device)
    if report_from is not None:
        attention.masked_fill_(s < report_from.long()[:, None], -1.0)
    select(attention, lambda rows: (s > last[rows][:, None]) | (s < first[rows][:, None]), 0, out)
