"""One forward pass of a serving engine's worker: which rows are captured, and their reduction after it.

Engine-free: a backend tells which rows the pass computes, hands each layer's queries and keys over, and sends
the packed `Share` of each request that asked along with its sampled tokens. What goes wrong in ours is told
to the requests that asked and never reaches the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from attnhook.backends.rebuild import KEYS_THAT_TELL, check_output
from attnhook.capture import Row, StepCapture, wants_row
from attnhook.errors import AttnhookError, UnsupportedError
from attnhook.kernels.topk import LayerRows, PagedKeys
from attnhook.kernels.topk.cpu import gather
from attnhook.options import RequestOptions, check_heads, resolve_layers
from attnhook.serving.wire import Share, reason, unpack_options

logger = logging.getLogger("attnhook")


class LayerView(NamedTuple):
    """One layer's keys and values in the cache, and its softmax."""

    keys: PagedKeys
    values: PagedKeys
    softmax: dict[str, Any]  # scale, softcap, window, sinks, alibi_slopes


class Computed(NamedTuple):
    """The tokens of one request that a pass computes."""

    request: str
    packed: str  # the request's options, as `wire.pack_options` made them
    source: int  # the request's row in the page tables
    start: int  # place of its first token among the pass's tokens
    first: int  # position of that token in the request
    tokens: int
    sampled: int  # of its last rows so many are sampled from: 0 in the middle of a prompt, more with drafts
    prompt_end: int  # position of the prompt's last token, whose row gives the first generated token


@dataclass
class Served:
    """What outlasts a pass in one worker."""

    model: str
    layers: dict[int, int]  # number in the model -> query heads, of the layers that can be captured
    prompt_rows: dict[str, int] = field(default_factory=dict)  # request -> prompt rows it has got, for recomputation
    checked: set[int] = field(default_factory=set)  # layers whose output was rebuilt from our probabilities

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what is kept of requests that ended."""
        if self.prompt_rows:
            for request in requests:
                self.prompt_rows.pop(request, None)


@dataclass
class _Group:
    """Rows of the requests that ask for the same, which are reduced together."""

    options: RequestOptions
    layers: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # each row's place among the pass's tokens


class ServedStep:
    """One forward pass in which somebody asks: `add` each such request, `take` each wanted layer, `finish`."""

    def __init__(self, served: Served, device: torch.device) -> None:
        self.served = served
        self._device = device
        self._groups: dict[str, _Group] = {}
        self._errors: dict[str, str] = {}
        self._reply: dict[str, bool] = {}
        self._sampled: dict[str, list[int]] = {}  # request -> positions of the rows that are sampled from
        self._taken: dict[int, tuple[torch.Tensor, LayerView]] = {}
        self._index: torch.Tensor | None = None

    @property
    def wanted(self) -> frozenset[int]:
        """Layers that somebody wants."""
        return frozenset(layer for group in self._groups.values() for layer in group.layers)

    @property
    def index(self) -> torch.Tensor:
        """int64 [U]: places of the captured rows among the pass's tokens, in the order in which `take` wants them."""
        if self._index is None:
            places = [place for group in self._groups.values() for place in group.places]
            self._index = torch.tensor(places, dtype=torch.int64, device=self._device)
        return self._index

    def add(self, computed: Computed) -> None:
        """Plan the rows of one request that asks; what is wrong with it is told to it alone."""
        self._sampled[computed.request] = []
        self._index = None
        try:
            self._add(computed)
        except Exception as error:
            self._fail(error, [computed.request])

    def take(self, number: int, q: torch.Tensor, view: LayerView, output: torch.Tensor | None = None) -> None:
        """A layer's queries [U, Hq, D] at `index` (the step's to keep) and keys that stay until `finish`.

        ``output`` [U, Hq, Dv], where given, is what the engine's own attention made of these rows: the first
        time that a layer is captured one row of it is rebuilt. Raises UnsupportedError where it differs.
        """
        self._taken[number] = q, view
        if output is not None and number not in self.served.checked and self._groups:
            self._check(number, q, view, output)

    def give_up(self, error: Exception) -> None:
        """Capture nothing in this pass, and say why."""
        self._fail(error, self._sampled)
        self._groups.clear()
        self._index = None

    def finish(self) -> dict[str, dict[str, Any]]:
        """The packed `Share` of every request that was added."""
        shares = {request: Share() for request in self._sampled}
        start = 0
        for group in self._groups.values():
            stop = start + len(group.places)
            try:
                self._reduce(group, slice(start, stop), shares)
            except Exception as error:
                requests = {row.request_id for row in group.rows}
                self._fail(error, requests)
                shares.update({request: Share() for request in requests})
            start = stop
        for request, why in self._errors.items():
            shares[request].error = why
        for request, share in shares.items():
            share.reply = self._reply.get(request, True)
        return {request: share.pack() for request, share in shares.items()}

    def _fail(self, error: Exception, requests: Iterable[str]) -> None:
        """Tell these requests why there are no records; the first reason stands."""
        known = isinstance(error, AttnhookError)
        logger.warning("attention capture failed in this step: %s", error, exc_info=not known)
        for request in requests:
            self._errors.setdefault(request, reason(error))

    def _add(self, new: Computed) -> None:
        options, self._reply[new.request] = unpack_options(new.packed)
        end = new.first + new.tokens
        rows: list[tuple[int, int | None]] = []  # position, decode step
        if options.prompt:
            seen = self.served.prompt_rows
            known = max(seen.get(new.request, 0), new.first)
            seen[new.request] = max(known, min(end, new.prompt_end))
            rows += [(position, None) for position in range(known, seen[new.request])]
        for position in range(end - new.sampled, end):
            self._sampled[new.request].append(position)
            if wants_row(options, position - new.prompt_end):
                rows.append((position, position - new.prompt_end))
        if not rows:
            return
        group = self._groups.get(new.packed)
        if group is None:
            layers = resolve_layers(options.layers, list(self.served.layers), "attention_layers")
            check_heads(options.heads, self.served.layers[layers[0]], "attention_heads")
            group = self._groups[new.packed] = _Group(options, layers)
        for position, decode_step in rows:
            group.rows.append(Row(new.request, 0, position, decode_step, new.source))
            group.places.append(new.start + position - new.first)

    def _check(self, number: int, q: torch.Tensor, view: LayerView, output: torch.Tensor) -> None:
        """Rebuild the attention output of one row."""
        group = next(iter(self._groups.values()))
        at, row = len(group.rows) - 1, group.rows[-1]
        window = view.softmax["window"]
        low = 0 if window < 0 else max(0, row.position - window + 1)
        k, v = (
            gather(paged.pages(dim), paged, row.source, low, row.position + 1).transpose(0, 1)
            for paged, dim in ((view.keys, q.shape[-1]), (view.values, output.shape[-1]))
        )
        softmax = {name: value for name, value in view.softmax.items() if name != "window"}
        error = check_output(f"layer {number}", q[at], k, v, output[at], **softmax)
        if error is not None and row.position + 1 - low >= KEYS_THAT_TELL:
            self.served.checked.add(number)

    def _reduce(self, group: _Group, part: slice, shares: dict[str, Share]) -> None:
        missing = [layer for layer in group.layers if layer not in self._taken]
        if missing:
            raise UnsupportedError(f"layers {missing} made no attention call in this forward pass")
        capture = StepCapture(group.rows, group.layers, group.options, self.served.model)
        slots = torch.tensor([row.position for row in group.rows], device=self._device)
        taken = [self._taken[layer] for layer in group.layers]
        shift = torch.zeros(taken[0][1].keys.page_table.shape[0], dtype=torch.int32, device=self._device)
        layers = [LayerRows(q[part], view.keys, slots, **view.softmax) for q, view in taken]
        capture.add_layers(group.layers, layers, shift)
        bad: list[str] = []
        records = capture.records(lambda why, count, message: bad.append(f"{count} rows dropped: {message}"))
        rows: dict[tuple[str, int], bytes] = {}
        for record in records:
            data = record.to_bytes()
            if record.is_prompt:
                shares[record.request_id].prompt.append(data)
            else:
                rows[record.request_id, record.query_position] = data
        kept = {(record.request_id, record.query_position) for record in records}
        for row in group.rows:
            if (row.request_id, row.position) not in kept:
                self._errors.setdefault(row.request_id, "; ".join(bad))
        for request in {row.request_id for row in group.rows}:
            # one place per token that may be sampled; the empty ones were not wanted
            shares[request].generated = [rows.get((request, position), b"") for position in self._sampled[request]]
