"""Which rows a forward pass computes: requests, positions, prompt or generated, finished or not."""

from __future__ import annotations

import inspect
import os
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnhook.backends.transformers import places, reasons, virtual
from attnhook.backends.transformers.caches import cache_among, cache_of, cached_tokens
from attnhook.backends.transformers.layers import attention_layers
from attnhook.backends.transformers.runs import concerns, local
from attnhook.backends.transformers.tokens import History
from attnhook.capture.rows import Row, over_limit, wants_row
from attnhook.capture.session import Session
from attnhook.capture.step import StepCapture
from attnhook.errors import OptionError, UnsupportedError
from attnhook.options import check_heads, check_rows, resolve_choice
from attnhook.record import tokens
from attnhook.record.token_record import TokenRecord


@dataclass
class _Conversation:
    """Plain forward passes that share a cache: a hand-written decoding loop."""

    request: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    steps: int = 0
    first_position: int = 0  # what the model calls the position of the first token: 1 in PaliGemma
    reach: int = 0  # tokens that its cache held after the last pass
    starts: list[int] | None = None  # padded index of each sequence's first token
    history: History = field(default_factory=History)


_conversations: weakref.WeakKeyDictionary[Any, _Conversation] = weakref.WeakKeyDictionary()


def forget_conversation(cache: Any) -> None:
    """What a cache holds now are other texts: sequences were reordered, chosen or repeated, or tokens taken back."""
    _conversations.pop(cache, None)


class Frame:
    """One call of a PreTrainedModel (they nest: LlamaForCausalLM calls LlamaModel)."""

    def __init__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], listening: tuple[Session, ...]
    ) -> None:
        self.model = model
        self.listening = listening
        self.run = local.run
        self.outer = tuple(local.frames)  # the models that call this one
        arguments = dict(kwargs)
        if args:
            arguments.update(inspect.signature(model.forward).bind_partial(*args).arguments)
        self.attention_mask = arguments.get("attention_mask")
        self.position_ids = arguments.get("position_ids")
        self.input_ids = arguments.get("input_ids")
        self.cache = cache_among(arguments)
        self.past = cached_tokens(self.cache)
        self.virtual = self._virtual(arguments)  # tokens before the text, padded indices 0 to virtual - 1
        self.saw_attention = False
        # classes of modules whose attention is no decoder layer's (an encoder's, a tower's), and whether it is causal
        self.others: dict[type, bool] = {}
        self.steps: dict[Session, StepCapture | None] = {}  # None: refused, or nothing to capture
        self.plans: dict[Any, Any] = {}  # per session and distinct mask; see hooks
        self._conversation: _Conversation | None = None
        self.q_len = 0
        self._rows: list[tuple[Row, int]] | None = None
        self.layer_mask: Any = None  # what the first layer's attention function got as its mask
        self._starts: list[int] = []  # padded index of each sequence's first token
        self.accounted: set[Session] = set()  # whose rows of this pass are known

    def _virtual(self, arguments: dict[str, Any]) -> int:
        if self.outer:
            outermost: Frame = self.outer[0]
            return outermost.virtual
        count = virtual.before(arguments, self.cache)
        run = self.run
        if run is not None and count and not run.so_far:
            run.virtual = count
        return count if run is None else run.virtual

    def rows(self, batch: int, q_len: int, mask: Any) -> list[tuple[Row, int]]:
        """Every real row of this pass as (row, index among its sequence's queries).

        ``mask`` is what a layer's attention function got; see `_extent`.
        """
        if self._rows is None:
            self.q_len = q_len
            self.layer_mask = mask
            self._rows = self._find_rows(batch, q_len)
        return self._rows

    def _find_rows(self, batch: int, q_len: int) -> list[tuple[Row, int]]:
        run = self.run
        if run is not None and run.prompt_length is not None and run.so_far:
            behind = run.prompt_length + run.so_far - q_len
            if self.past == 0:
                self.past = behind  # a cache of states (RecurrentGemma) tells no length; generate's own tokens do
            elif self.past != behind:
                raise _evicted(self.past, behind)
        if run is not None and run.wrong:
            raise UnsupportedError(run.wrong)
        total = self.past + q_len
        if run is None and self._conversation is None:
            # an empty cache begins a new sequence, even if it held another one before
            known = _conversations.get(self.cache) if self.past else None
            if known is not None and (len(known.starts or ()) != batch or self.past < known.reach):
                known = None  # its sequences, or the last of their tokens, were taken out of it
            self._conversation = known or _Conversation()
        starts, ends = self._extent(batch, q_len, self.layer_mask)
        self._starts = starts
        self._compare_positions(starts, ends, total)
        done: list[bool] = [False] * batch
        if run is not None:
            if run.prompt_length is None:
                run.prompt_length = total - run.so_far  # a listener may come in the middle
            # without a cache a pass computes all rows again
            run.next_index = max(run.next_index, run.prompt_length + run.so_far - 1 if run.so_far else 0)
            if run.finished is not None and len(run.finished) == batch:
                done = run.finished.tolist()
        conversation = self._conversation
        rows = []
        for b in range(batch):
            if done[b]:
                continue
            if run is not None and starts[b] >= (run.prompt_length or 0) <= total:
                raise UnsupportedError(
                    f"sequence {b} of the batch is padding alone (its attention_mask is 0 everywhere), so its first "
                    "token comes from no row: leave it out of the batch"
                )
            first = max(starts[b], self.past, run.next_index if run else 0)
            last = min(ends[b], total) - 1
            for index in range(first, last + 1):
                if run is not None:
                    request, choice = run.identity(b)
                    step = index - (run.prompt_length or 0) + 1
                else:
                    assert conversation is not None
                    request, choice = f"{conversation.request}-{b}", 0
                    step = conversation.steps if index == last else -1
                row = Row(request, choice, index - starts[b], step if step >= 0 else None, b)
                rows.append((row, index - self.past))
        return rows

    def finish_rows(self, output: Any) -> None:
        """Remember how far this pass came, for the next one."""
        cache = self.cache if self.cache is not None else cache_of(output)
        if self.virtual:
            virtual.remember((*self.outer, self)[0].model, cache, self.virtual)
        if self.run is not None:
            self.run.next_index = self.past + self.q_len
        elif self._conversation is not None:
            self._conversation.steps += 1
            self._conversation.reach = self.past + self.q_len
            self._conversation.starts = [start - self.virtual for start in self._starts]
            if cache is not None:
                _conversations[cache] = self._conversation

    def _compare_positions(self, starts: list[int], ends: list[int], total: int) -> None:
        """Refuse where the model is told other positions than the cache's length says: keys were taken out of it."""
        given = places.text_positions(self.position_ids)
        conversation = self._conversation
        if given is None or (self.run is not None and self.run.so_far):  # there the tokens are counted
            return
        last = given[:, -1].tolist()
        for b, start in enumerate(starts):
            ahead = last[b % len(last)] - (total - 1 - start + self.virtual)
            if not start < total <= ends[b]:
                continue
            if self.past == 0 and conversation is not None:
                conversation.first_position = min(conversation.first_position, ahead) if b else ahead
            elif self.past and ahead > (0 if conversation is None else conversation.first_position):
                raise _evicted(self.past, self.past + ahead)

    def account(self, session: Session) -> None:
        """Enter this pass's rows into the generation's account of a session."""
        if self.run is not None:
            self.run.ledger(session).note(row for row, _ in self._rows or ())

    def note_tokens(self, outer: Sequence[Frame]) -> None:
        """Remember the ids that this pass was given, directly or through the model around it."""
        if self._conversation is not None:
            for frame in (self, *reversed(outer)):
                if self._conversation.history.add(self.past, frame.input_ids, len(self._starts), self.q_len):
                    return

    def with_tokens(self, records: Sequence[TokenRecord], step: StepCapture) -> Sequence[TokenRecord]:
        """The records of ``step`` with their token ids; those that nobody knows are -1."""
        run, history = self.run, History()
        if run is not None and run.sequences is not None:
            history = History.whole(run.sequences, (run.prompt_length or 0) - run.given)
        elif self._conversation is not None:
            history = self._conversation.history
        sources = {(row.request_id, row.choice): row.source for row in step.rows}
        found: list[TokenRecord] = []
        for record in records:
            source = sources[record.request_id, record.choice]
            found += tokens.fill([record], history.of(source, self._starts[source]), step.options.mask_prefix)
        return found

    def _extent(self, batch: int, q_len: int, mask: Any) -> places.Extent:
        """First and one-past-last padded index of each sequence's real tokens."""
        total = self.past + q_len
        masks = [frame.attention_mask for frame in (self, *reversed(self.outer))]
        told = places.of_masks(masks, batch, total, self.virtual)
        if told is not None:
            return told
        run = self.run
        if run is not None and len(run.starts) == batch:
            starts = run.starts
        elif run is not None or all(given is None for given in masks) or mask is None:
            starts = [0] * batch
        else:
            known = None if self._conversation is None else self._conversation.starts
            positions = places.text_positions(self.position_ids)
            starts = places.of_layer_mask(mask, positions, known, batch, q_len, self.past)
        return places.behind(starts, self.virtual), [total] * batch

    def step(self, session: Session, batch: int, q_len: int, heads: int, mask: Any) -> StepCapture | None:
        """This session's capture of this pass, made on first use; ``mask`` is the layer's."""
        if session not in self.steps:
            self.steps[session] = None  # stays so if what follows raises
            if concerns(session, self.model):
                self.steps[session] = self._start(session, batch, q_len, heads, mask)
        return self.steps[session]

    def _start(self, session: Session, batch: int, q_len: int, heads: int, mask: Any) -> StepCapture | None:
        if local.refused:
            raise UnsupportedError(
                f"{local.refused} cannot be captured: one forward pass does not yield one token per sequence; "
                "generate with num_beams=1 and without an assistant model or prompt_lookup_num_tokens"
            )
        whole = (*self.outer, self)[0].model
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise reasons.encoder_decoder(whole)
        options = session.options
        layers, chosen = resolve_choice(options.layers, options.heads, attention_layers(self.model))
        check_heads(chosen, heads)
        options = options if chosen is options.heads else replace(options, heads=chosen)
        rows = self.rows(batch, q_len, mask)
        self.accounted.add(session)
        cut = sum(over_limit(session.options, row.decode_step) for row, _ in rows)
        if cut:
            limit = session.options.max_tokens
            session.drop("max_tokens", cut, f"more than max_tokens={limit} generated rows; raise max_tokens")
        if options.rows:
            self._check_rows(options.rows)
        wanted = [row for row, _ in rows if wants_row(options, row.decode_step, row.position)]
        return (
            StepCapture(wanted, layers, options, model_name(self.model), hidden=bool(self.virtual)) if wanted else None
        )

    def _check_rows(self, rows: tuple[tuple[int, int], ...]) -> None:
        """Raise OptionError where chosen rows lie beyond the prompt of a sequence of this pass."""
        begins, run = self._starts, self.run
        if run is not None and run.prompt_length is not None:
            check_rows(rows, run.prompt_length - max(begins))
        elif self.past <= self.virtual:
            # a loop of one's own does not tell how long its prompt is, so that the first pass has to bring all of it
            try:
                check_rows(rows, self.past + self.q_len - max(begins))
            except OptionError as error:
                raise OptionError(
                    error.field, f"{error}; in a decoding loop of your own the prompt is what the first pass computes"
                ) from None

    def query_index(self, step: StepCapture) -> list[int]:
        """Index among its sequence's queries of each row of ``step``."""
        index = {id(row): i for row, i in self._rows or ()}
        return [index[id(row)] for row in step.rows]


def _evicted(held: int, given: int) -> UnsupportedError:
    why = (
        "keys were taken out of it (eviction, compression), so its slots are not positions; capture without that"
        if held < given
        else "some tokens were computed twice, or are of another text, so its slots are not positions; begin with an "
        "empty cache"
    )
    return UnsupportedError(f"the cache holds {held} tokens where {given} came before: {why}")


def model_name(model: Any) -> str:
    """The model's name for records: a hub id as it is, a local path's last part only."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.exists(name) else name
