"""One forward pass of a serving engine's worker: which rows are captured, and their reduction after it.

Engine-free: a backend tells which rows the pass computes, hands each layer's queries and keys over, and sends
the packed `Share` of each request that asked along with its sampled tokens. What goes wrong in ours is told
to the requests that asked and never reaches the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import torch

from attnhook.capture.ranks import Ranks
from attnhook.capture.rebuild import KEYS_THAT_TELL, check_output
from attnhook.capture.rows import Row, wants_row
from attnhook.capture.step import StepCapture
from attnhook.errors import AttnhookError, UnsupportedError
from attnhook.kernels.topk import LayerRows, PagedKeys, TopKStep, topk_attention
from attnhook.kernels.topk.cpu import gather
from attnhook.options import RequestOptions, check_heads, resolve_layers
from attnhook.record.token_record import TokenRecord, join_layers
from attnhook.serving.wire import Share, reason, unpack_options, worse

logger = logging.getLogger("attnhook")

T = TypeVar("T")


class LayerView(NamedTuple):
    """One layer's keys and values in the cache, and its softmax."""

    keys: PagedKeys
    values: PagedKeys
    softmax: dict[str, Any]  # scale, softcap, window, sinks, alibi_slopes
    value_heads: torch.Tensor | None = None  # [Hq, L, Dv]: how heads read shared latent values of L numbers (MLA)


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


class Asked(NamedTuple):
    """A request's options, as one model takes them."""

    options: RequestOptions
    reply: bool
    layers: tuple[int, ...]  # of the whole model
    own: tuple[int, ...]  # those that this worker has


_ASKED = 256  # different options that a worker remembers
_KERNELS = 16  # batches whose kernels a worker keeps
_DECODING = 1024  # rows of a pass that is decoding; prompt rows come once
_KernelKey = tuple[str, int, tuple[int, ...]]


@dataclass
class Served:
    """What outlasts a pass in one worker."""

    model: str
    layers: dict[int, int]  # number in the model -> query heads, of this worker's layers that can be captured
    ranks: Ranks = field(default_factory=Ranks)
    whole: dict[int, int] = field(init=False)  # the same of the whole model
    if_missing: str = ""  # what to do where a layer's queries do not come
    prompt_rows: dict[str, int] = field(default_factory=dict)  # request -> prompt rows it has got, for recomputation
    checked: set[int] = field(default_factory=set)  # layers whose output was rebuilt from our probabilities
    kernels: dict[_KernelKey, TopKStep] = field(default_factory=dict)
    _asked: dict[str, Asked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.ranks.everywhere(self.layers)

    def asked(self, packed: str) -> Asked:
        """What packed options mean for this model; every token of a request asks the same.

        Raises OptionError for layers or heads that the model does not have.
        """
        known = self._asked.get(packed)
        if known is None:
            options, reply = unpack_options(packed)
            layers = resolve_layers(options.layers, list(self.whole), "attention_layers")
            check_heads(options.heads, self.whole[layers[0]], "attention_heads")
            if len(self._asked) >= _ASKED:
                self._asked.clear()
            own = tuple(layer for layer in layers if layer in self.layers)
            known = self._asked[packed] = Asked(options, reply, layers, own)
        return known

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what is kept of requests that ended."""
        if self.prompt_rows:
            for request in requests:
                self.prompt_rows.pop(request, None)


@dataclass
class _Group:
    """Rows of the requests that ask for the same, which are reduced together."""

    packed: str
    options: RequestOptions
    layers: tuple[int, ...]  # of the whole model
    own: tuple[int, ...]  # those that this worker has
    rows: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # each row's place among the pass's tokens
    kernel: TopKStep | None = None  # of an earlier pass

    @property
    def requests(self) -> set[str]:
        return {row.request_id for row in self.rows}


_Key = tuple[str, int]  # request, position
_Said = tuple[dict[_Key, bytes], dict[str, str], dict[str, float]]  # rows, errors and checks of one stage


class ServedStep:
    """One forward pass in which somebody asks: `add` each such request, `take` each wanted layer, `finish`."""

    def __init__(self, served: Served, device: torch.device) -> None:
        self.served = served
        self._device = device
        self._groups: dict[str, _Group] = {}
        self._errors: dict[str, str] = {}
        self._checks: dict[str, float] = {}
        self._reply: dict[str, bool] = {}
        self._sampled: dict[str, list[int]] = {}  # request -> positions of the rows that are sampled from
        self._taken: dict[int, tuple[torch.Tensor, LayerView]] = {}
        self._index: torch.Tensor | None = None
        self._wanted: frozenset[int] | None = None

    @property
    def wanted(self) -> frozenset[int]:
        """Layers of this worker that somebody wants; every attention call asks."""
        if self._wanted is None:
            self._wanted = frozenset(layer for group in self._groups.values() for layer in group.own)
        return self._wanted

    @property
    def index(self) -> torch.Tensor:
        """int64 [U]: places of the captured rows among the pass's tokens, in the order in which `take` wants them."""
        if self._index is None:
            places = [place for group in self._groups.values() for place in group.places]
            self._index = torch.tensor(places, dtype=torch.int64, device=self._device)
        return self._index

    @property
    def missing(self) -> frozenset[int]:
        """Wanted layers that have not been taken."""
        return self.wanted - self._taken.keys()

    @property
    def self_checks(self) -> bool:
        """Whether somebody asks for the self-check, which takes the engine's output of every row."""
        return any(group.options.self_check for group in self._groups.values())

    def needs_output(self, number: int) -> bool:
        """Whether `take` wants to see the engine's output of a layer."""
        return number not in self.served.checked or self.self_checks

    def add(self, computed: Computed) -> None:
        """Plan the rows of one request that asks; what is wrong with it is told to it alone."""
        self._sampled[computed.request] = []
        self._index = self._wanted = None
        try:
            self._add(computed)
        except Exception as error:
            self._fail(error, [computed.request])

    def take(self, number: int, q: torch.Tensor, view: LayerView, output: torch.Tensor | None = None) -> None:
        """A layer's queries [U, Hq, D] at `index` (the step's to keep) and keys that stay until `finish`.

        ``output`` [U, Hq, Dv], where it `needs_output`, is what the engine's own attention made of these rows: the
        first time that a layer is captured one row of it is rebuilt, and every row of a request that asks for the
        self-check. Raises UnsupportedError where it differs.
        """
        self._taken[number] = q, view
        if output is None or not self.needs_output(number):
            return
        at = 0
        for group in self._groups.values():
            for i, row in enumerate(group.rows):
                first = number not in self.served.checked and i == len(group.rows) - 1
                if number in group.own and (group.options.self_check or first):
                    self._check(number, q[at + i], view, output[at + i], row, group.options.self_check)
            at += len(group.rows)

    def give_up(self, error: Exception) -> None:
        """Capture nothing in this pass, and say why."""
        self._fail(error, self._sampled)
        self._groups.clear()
        self._index = self._wanted = None

    def finish(self) -> dict[str, dict[str, Any]]:
        """The packed `Share` of every request that was added; empty on ranks that do not answer.

        All workers of a model call it for the same passes.
        """
        ranks = self.served.ranks
        try:
            said = self._said()
        except UnsupportedError as error:  # the ranks have lost each other
            self._fail(error, self._sampled)
            said = [({}, self._errors, {})] if ranks.answers else []
        return self._shares(said) if said else {}

    def _said(self) -> list[_Said]:
        """What every stage has to say, on the rank that answers; empty on the others."""
        ranks = self.served.ranks
        ready = self._prepared()
        rows: dict[_Key, bytes] = {}
        agreed = ranks.size == 1 or ranks.agree(
            crc32(repr([(group.options, len(group.rows)) for group, _, _ in ready]).encode())
        )
        for group, capture, layers in ready if agreed else ():
            try:
                rows.update(self._reduce(group, capture, layers))
            except Exception as error:
                self._fail(error, group.requests)
        errors: dict[str, str] = {}
        checks: dict[str, float] = {}
        for theirs, worst in ranks.collect((self._errors, self._checks)):
            errors |= theirs  # another rank knows the cause of the NaN that it has added
            checks = {request: _worse(checks, worst, request) for request in {**checks, **worst}}
        if not agreed:
            why = "the tensor-parallel ranks did not capture the same rows of this pass; their logs may say why"
            errors = {**dict.fromkeys(self._sampled, why), **errors}
        return [] if ranks.rank else ranks.join((rows, errors, checks))

    def _fail(self, error: Exception, requests: Iterable[str]) -> None:
        """Tell these requests why there are no records; the first reason stands."""
        known = isinstance(error, AttnhookError)
        logger.warning("attention capture failed in this step: %s", error, exc_info=not known)
        for request in requests:
            self._errors.setdefault(request, reason(error))

    def _add(self, new: Computed) -> None:
        asked = self.served.asked(new.packed)
        options, self._reply[new.request] = asked.options, asked.reply
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
            group = self._groups[new.packed] = _Group(new.packed, options, asked.layers, asked.own)
        for position, decode_step in rows:
            group.rows.append(Row(new.request, 0, position, decode_step, new.source))
            group.places.append(new.start + position - new.first)

    def _check(
        self, number: int, q: torch.Tensor, view: LayerView, output: torch.Tensor, row: Row, asked: bool
    ) -> None:
        """Rebuild the attention output of one row, [Hq, Dv], from its query [Hq, D]."""
        window = view.softmax["window"]
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
            self.served.checked.add(number)
        if asked:
            self._checks[row.request_id] = _worse(self._checks, {row.request_id: error}, row.request_id)

    def _prepared(self) -> list[tuple[_Group, StepCapture, list[LayerRows]]]:
        """Everything that can go wrong before the ranks must keep in step."""
        ready = []
        start = 0
        for group in self._groups.values():
            part = slice(start, start + len(group.rows))
            start = part.stop
            try:
                missing = [layer for layer in group.own if layer not in self._taken]
                if missing:
                    what = f"layers {missing} made no attention call in this forward pass"
                    raise UnsupportedError(what + self.served.if_missing)
                group.kernel = self.served.kernels.get(self._kernel_key(group))
                capture = StepCapture(
                    group.rows, group.own, group.options, self.served.model, self.served.ranks, group.kernel
                )
                slots = torch.tensor([row.position for row in group.rows], device=self._device)
                taken = [self._taken[layer] for layer in group.own]
                whole = len(self._groups) == 1
                layers = [LayerRows(q if whole else q[part], view.keys, slots, **view.softmax) for q, view in taken]
                ready.append((group, capture, layers))
            except Exception as error:
                self._fail(error, group.requests)
        return ready

    def _reduce(self, group: _Group, capture: StepCapture, layers: list[LayerRows]) -> dict[_Key, bytes]:
        if not layers:
            return {}
        capture.add_layers(group.own, layers)
        self._keep_kernel(group, capture)
        if self.served.ranks.rank:
            return {}
        bad: list[str] = []
        rows = {}
        packed = capture.packed(lambda why, count, message: bad.append(f"{count} rows dropped: {message}"))
        for row, data in zip(group.rows, packed, strict=True):
            if data is not None:
                rows[row.request_id, row.position] = data
            else:
                self._errors.setdefault(row.request_id, "; ".join(bad))
        return rows

    def _kernel_key(self, group: _Group) -> _KernelKey:
        """What a kernel of `StepCapture` rests on: options, page tables, rows of them."""
        packed, (_, view) = group.packed, self._taken[group.own[0]]
        return packed, view.keys.page_table.shape[0], tuple(row.source for row in group.rows)

    def _keep_kernel(self, group: _Group, capture: StepCapture) -> None:
        """For the next pass, which in decoding has the same requests one position further."""
        kernels, kernel = self.served.kernels, capture.kernel
        if kernel is not None and kernel is not group.kernel and len(group.rows) <= _DECODING:
            if len(kernels) >= _KERNELS:
                kernels.clear()
            kernels[self._kernel_key(group)] = kernel

    def _shares(self, said: list[_Said]) -> dict[str, dict[str, Any]]:
        """What goes to the requests, from what every stage has of them."""
        shares = {request: Share(reply=self._reply.get(request, True)) for request in self._sampled}
        rows: dict[_Key, bytes] = {}
        for group in self._groups.values():
            for row in group.rows:
                key = row.request_id, row.position
                parts = [found[key] for found, _, _ in said if key in found]
                if len(said) > 1:
                    parts = _joined(parts, group.layers)
                if parts:
                    rows[key] = parts[0]
                    if row.decode_step is None:
                        shares[row.request_id].prompt.append(parts[0])
        for request, share in shares.items():
            # one place per token that may be sampled; the empty ones were not wanted
            share.generated = [rows.get((request, position), b"") for position in self._sampled[request]]
            for _, errors, checks in said:
                share.error = share.error or errors.get(request)
                share.check = worse(share.check, checks.get(request))
        return {request: share.pack() for request, share in shares.items()}


def _joined(parts: list[bytes], layers: tuple[int, ...]) -> list[bytes]:
    """The row of all layers from its parts; nothing where a stage has dropped it."""
    records = [TokenRecord.from_bytes(part) for part in parts]
    if sorted(layer for record in records for layer in record.layers) != list(layers):
        return []
    return [join_layers(records).to_bytes()]


def _worse(one: dict[str, float], other: dict[str, float], request: str) -> float:
    error = worse(one.get(request), other.get(request))
    assert error is not None
    return error


def safely(function: Callable[..., T], *arguments: Any) -> T | None:
    """The result, or None: nothing of ours may end the engine. Who asked is told that no records came."""
    try:
        return function(*arguments)
    except Exception:
        logger.exception("attention capture failed in this step")
        return None


def warm_up() -> None:
    """Compile the kernel before the first request needs it."""
    keys = PagedKeys.from_dense(torch.zeros(1, 1, 64, 16))
    for rows in (1, 16):
        place = torch.arange(64 - rows, 64)
        topk_attention(torch.zeros(rows, 1, 16), keys, torch.zeros(rows, dtype=torch.int32), place, top_k=1, scale=1.0)
