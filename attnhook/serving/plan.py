"""The plan of one forward pass: which of its rows are captured, for whom, and what went wrong for whom."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from attnhook.capture.ranks import Ranks
from attnhook.capture.rows import Row, prompt_rows, wants_prompt, wants_row
from attnhook.errors import AttnhookError
from attnhook.options import RequestOptions, check_heads, check_rows, resolve_choice
from attnhook.plugins.engine import Computed
from attnhook.serving.wire import reason, unpack_options

logger = logging.getLogger("attnhook")

_ASKED = 256  # different options that a worker remembers


class Asked(NamedTuple):
    """A request's options, as one model takes them."""

    options: RequestOptions
    reply: bool
    layers: tuple[int, ...]  # of the whole model
    own: tuple[int, ...]  # those that this worker has


class Model:
    """The model of one worker, and what of its requests outlasts a pass.

    ``layers`` are the query heads of this worker's layers by their number in the model. All workers make it at the
    same time.
    """

    def __init__(
        self, name: str, layers: dict[int, int], ranks: Ranks | None = None, kv_heads: int | None = None
    ) -> None:
        self.name, self.layers, self.kv_heads = name, layers, kv_heads
        self.ranks = Ranks() if ranks is None else ranks
        self.whole = self.ranks.everywhere(layers)  # the same of the whole model
        self.prompt_rows: dict[str, int] = {}  # request -> prompt rows it has got, for recomputation
        self._asked: dict[str, Asked] = {}

    def asked(self, packed: str) -> Asked:
        """What packed options mean for this model; every token of a request asks the same.

        Raises OptionError for layers or heads that the model does not have.
        """
        known = self._asked.get(packed)
        if known is None:
            options, reply = unpack_options(packed)
            names = "attention_layers", "attention_heads"
            layers, heads = resolve_choice(options.layers, options.heads, list(self.whole), names)
            check_heads(heads, self.whole[layers[0]], "attention_heads")
            options = options if heads is options.heads else replace(options, heads=heads)
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
class Group:
    """Rows of the requests that ask for the same, which are reduced together."""

    packed: str
    options: RequestOptions
    layers: tuple[int, ...]  # of the whole model
    own: tuple[int, ...]  # those that this worker has
    rows: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # each row's place among the pass's tokens

    @property
    def requests(self) -> set[str]:
        """Ids of the requests that these rows belong to."""
        return {row.request_id for row in self.rows}


class Plan:
    """One pass in which somebody asks: `add` each such request."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = model, device
        self.groups: dict[str, Group] = {}  # by packed options
        self.sampled: dict[str, list[int]] = {}  # request -> positions of the rows that are sampled from
        self.reply: dict[str, bool] = {}
        self.errors: dict[str, str] = {}  # request -> why it gets no records
        self._index: torch.Tensor | None = None
        self._wanted: frozenset[int] | None = None

    @property
    def wanted(self) -> frozenset[int]:
        """Layers of this worker that somebody wants; every attention call asks."""
        if self._wanted is None:
            self._wanted = frozenset(layer for group in self.groups.values() for layer in group.own)
        return self._wanted

    @property
    def index(self) -> torch.Tensor:
        """int64 [U]: places of the captured rows among the pass's tokens, group by group."""
        if self._index is None:
            places = [place for group in self.groups.values() for place in group.places]
            self._index = torch.tensor(places, dtype=torch.int64, device=self.device)
        return self._index

    @property
    def self_checks(self) -> bool:
        """Whether somebody asks for the self-check, which takes the engine's output of every row."""
        return any(group.options.self_check for group in self.groups.values())

    def add(self, computed: Computed) -> None:
        """Plan the rows of one request that asks; what is wrong with it is told to it alone."""
        self.sampled[computed.request] = []
        self._index = self._wanted = None
        try:
            self._add(computed)
        except Exception as error:
            self.fail(error, [computed.request])

    def fail(self, error: Exception, requests: Iterable[str]) -> None:
        """Tell these requests why there are no records; the first reason stands."""
        known = isinstance(error, AttnhookError)
        logger.warning("attention capture failed in this step: %s", error, exc_info=not known)
        for request in requests:
            self.errors.setdefault(request, reason(error))

    def give_up(self, error: Exception, asking: Iterable[str] = ()) -> None:
        """Capture nothing in this pass, and say why to its requests and to those that are ``asking`` too."""
        for request in asking:
            self.sampled.setdefault(request, [])
        self.fail(error, self.sampled)
        self.groups.clear()
        self._index = self._wanted = None

    def _add(self, new: Computed) -> None:
        asked = self.model.asked(new.packed)
        options, self.reply[new.request] = asked.options, asked.reply
        rows = [*self._prompt_rows(new, options), *self._generated_rows(new, options)]
        if not rows:
            return
        group = self.groups.get(new.packed)
        if group is None:
            group = self.groups[new.packed] = Group(new.packed, options, asked.layers, asked.own)
        for position, decode_step in rows:
            group.rows.append(Row(new.request, 0, position, decode_step, new.source))
            group.places.append(new.start + position - new.first)

    def _prompt_rows(self, new: Computed, options: RequestOptions) -> list[tuple[int, int | None]]:
        """Position and decode step, which is None, of the prompt's rows that come for the first time."""
        if not wants_prompt(options):
            return []
        check_rows(options.rows, new.prompt_end + 1, "attention_rows")
        seen = self.model.prompt_rows
        had = seen.get(new.request, 0)
        reused = min(new.first, new.prompt_end)
        if lacking := prompt_rows(options, had, reused):
            self.errors.setdefault(
                new.request,
                f"{'attention_prompt' if options.prompt else 'attention_rows'}: rows {lacking[0]} to {lacking[-1]} of "
                "the prompt came from a cache and were not computed",
            )
        known = max(had, new.first)
        seen[new.request] = max(known, min(new.first + new.tokens, new.prompt_end))
        return [(position, None) for position in prompt_rows(options, known, seen[new.request])]

    def _generated_rows(self, new: Computed, options: RequestOptions) -> list[tuple[int, int | None]]:
        rows: list[tuple[int, int | None]] = []
        end = new.first + new.tokens
        for position in range(end - new.sampled, end):
            self.sampled[new.request].append(position)
            if wants_row(options, position - new.prompt_end, position):
                rows.append((position, position - new.prompt_end))
        return rows
