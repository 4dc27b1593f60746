"""Which rows a forward pass computes: requests, positions, prompt or generated, finished or not."""

from __future__ import annotations

import inspect
import os
import threading
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnhook import tokens
from attnhook.backends.transformers.tokens import History
from attnhook.capture import Row, Session, StepCapture, over_limit, wants_row
from attnhook.errors import UnsupportedError
from attnhook.options import check_heads, resolve_layers
from attnhook.records import TokenRecord
from attnhook.rowledger import RowLedger


class Local(threading.local):
    """What one thread is inside of: nested model calls, and a ``generate``."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.run: Run | None = None
        self.generating: Any = None  # the model whose generate() runs
        self.aside = 0  # inside code that generate() calls between its passes: their passes are not its own
        self.refused: str | None = None  # a decoding mode that cannot be captured


local = Local()


@dataclass
class Run:
    """One ``generate`` call that samples one token per sequence and forward pass."""

    choices: int  # sequences per prompt (num_return_sequences)
    prompt_length: int | None  # padded; None until the first forward pass shows it
    request: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    finished: torch.Tensor | None = None  # bool [B]: a stopping criterion has been met
    next_index: int = 0  # first padded index that no forward pass has computed yet
    sequences: torch.Tensor | None = None  # its token ids so far, int [B, n]: what the next pass goes on from
    given: int = 0  # n of its start; prompts given as embeddings have none
    produced: dict[int, int] = field(default_factory=dict)  # finished sequence -> tokens it got
    ledgers: dict[Session, RowLedger] = field(default_factory=dict)

    @property
    def so_far(self) -> int:
        """Tokens that every unfinished sequence has got."""
        return 0 if self.sequences is None else self.sequences.shape[1] - self.given

    def ledger(self, session: Session) -> RowLedger:
        """The account of one session; who is not there from the start has only rows from its first on."""
        if session not in self.ledgers:
            self.ledgers[session] = RowLedger(whole=False)
        return self.ledgers[session]

    def note_finished(self, done: torch.Tensor) -> None:
        """After a pass: which sequences have met a stopping criterion, bool [B]."""
        known = self.finished is not None and len(self.finished) == len(done)
        self.finished = self.finished | done if known and self.finished is not None else done
        if self.ledgers:
            for b, ended in enumerate(self.finished.tolist()):
                if ended:
                    self.produced.setdefault(b, self.so_far)

    def settle(self, model: Any, result: Any) -> None:
        """At the end: every token that ``generate()`` returns has its row. Refuses, with the numbers, where not."""
        sequences = getattr(result, "sequences", result)
        if not isinstance(sequences, torch.Tensor):
            return
        total = sequences.shape[1] - self.given
        tokens = {self.identity(b): self.produced.get(b, total) for b in range(len(sequences))}
        for session, ledger in self.ledgers.items():
            if not session.active or ledger.refused or not concerns(session, model, ledger):
                continue
            told, rows = ledger.check(tokens)
            if told:
                error = UnsupportedError(
                    f"{type(model).__name__}.generate(): the captured rows are not those of the tokens that it returned"
                    f" ({'; '.join(told[:3])}{', ...' if len(told) > 3 else ''}), so they cannot be relied on; please "
                    "report the model and how it was called"
                )
                session.refuse(error, rows)

    def identity(self, sequence: int) -> tuple[str, int]:
        """(request id, choice) of a sequence of the batch."""
        return f"{self.request}-{sequence // self.choices}", sequence % self.choices


@dataclass
class _Conversation:
    """Plain forward passes that share a cache: a hand-written decoding loop."""

    request: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    steps: int = 0
    history: History = field(default_factory=History)


_conversations: weakref.WeakKeyDictionary[Any, _Conversation] = weakref.WeakKeyDictionary()


class Frame:
    """One call of a PreTrainedModel (they nest: LlamaForCausalLM calls LlamaModel)."""

    def __init__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], listening: tuple[Session, ...]
    ) -> None:
        self.model = model
        self.listening = listening
        self.run = local.run
        arguments = dict(kwargs)
        if args:
            arguments.update(inspect.signature(model.forward).bind_partial(*args).arguments)
        self.attention_mask = arguments.get("attention_mask")
        self.position_ids = arguments.get("position_ids")
        self.input_ids = arguments.get("input_ids")
        self.cache = _cache_among(arguments)
        self.past = cached_tokens(self.cache)
        self.saw_attention = False
        self.saw_other = False  # attention that is not causal: an encoder's, a vision tower's
        self.steps: dict[Session, StepCapture | None] = {}  # None: refused, or nothing to capture
        self.plans: dict[Any, Any] = {}  # per session and distinct mask; see hooks
        self._conversation: _Conversation | None = None
        self.q_len = 0
        self._rows: list[tuple[Row, int]] | None = None
        self._starts: list[int] = []  # padded index of each sequence's first token
        self.accounted: set[Session] = set()  # whose rows of this pass are known

    def rows(self, batch: int, q_len: int) -> list[tuple[Row, int]]:
        """Every real row of this pass as (row, index among its sequence's queries)."""
        if self._rows is None:
            self.q_len = q_len
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
        total = self.past + q_len
        starts, ends = self._extent(batch, q_len)
        self._starts = starts
        self._compare_positions(starts, ends, total)
        done: list[bool] = [False] * batch
        if run is not None:
            if run.prompt_length is None:
                run.prompt_length = total - run.so_far  # a listener may come in the middle
            if run.finished is not None and len(run.finished) == batch:
                done = run.finished.tolist()
        conversation = self._conversation
        if run is None and conversation is None:
            # an empty cache begins a new sequence, even if it held another one before
            known = _conversations.get(self.cache) if self.past else None
            conversation = self._conversation = known or _Conversation()
        rows = []
        for b in range(batch):
            if done[b]:
                continue
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
        if self.run is not None:
            self.run.next_index = self.past + self.q_len
        elif self._conversation is not None:
            self._conversation.steps += 1
            cache = self.cache if self.cache is not None else _cache_of(output)
            if cache is not None:
                _conversations[cache] = self._conversation

    def _compare_positions(self, starts: list[int], ends: list[int], total: int) -> None:
        """Refuse where the model is told other positions than the cache's length says: keys were taken out of it."""
        given = self.position_ids
        if not self.past or not isinstance(given, torch.Tensor) or given.dim() != 2:
            return
        last = given[:, -1].tolist()
        for b, start in enumerate(starts):
            told = last[b % len(last)]
            if ends[b] >= total and told > total - 1 - start:
                raise _evicted(self.past, told + start + self.past + 1 - total)

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

    def _extent(self, batch: int, q_len: int) -> tuple[list[int], list[int]]:
        """First and one-past-last padded index of each sequence's real tokens."""
        mask = self.attention_mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            real = mask.to(torch.bool)
            starts = (real.to(torch.int64).cumsum(-1) == 0).sum(-1)
            ends = starts + real.sum(-1)
            holes = real.sum(-1) != real.shape[-1] - starts - (real.flip(-1).to(torch.int64).cumsum(-1) == 0).sum(-1)
            if bool(holes.any()):
                raise UnsupportedError(
                    "attention_mask has zeros between ones; only padding on the left or right of a prompt can be "
                    "captured: tokenize with padding_side='left'"
                )
            expand = batch // len(starts) if len(starts) else 1
            return starts.tolist() * expand, ends.tolist() * expand
        total = self.past + q_len
        if mask is None or self.position_ids is None or self.position_ids.dim() != 2:
            return [0] * batch, [total] * batch
        # a ready-made 4-D mask (static caches): positions tell the padding
        last = self.position_ids[:, -1].tolist()
        starts_list = [total - 1 - p for p in last]
        return starts_list * (batch // len(last)), [total] * batch

    def step(self, session: Session, batch: int, q_len: int, heads: int) -> StepCapture | None:
        """This session's capture of this pass, made on first use."""
        if session not in self.steps:
            self.steps[session] = None  # stays so if what follows raises
            if concerns(session, self.model):
                self.steps[session] = self._start(session, batch, q_len, heads)
        return self.steps[session]

    def _start(self, session: Session, batch: int, q_len: int, heads: int) -> StepCapture | None:
        if local.refused:
            raise UnsupportedError(
                f"{local.refused} cannot be captured: one forward pass does not yield one token per sequence; "
                "generate with num_beams=1 and without an assistant model or prompt_lookup_num_tokens"
            )
        layers = resolve_layers(session.options.layers, attention_layers(self.model))
        check_heads(session.options.heads, heads)
        rows = self.rows(batch, q_len)
        self.accounted.add(session)
        cut = sum(over_limit(session.options, row.decode_step) for row, _ in rows)
        if cut:
            limit = session.options.max_tokens
            session.drop("max_tokens", cut, f"more than max_tokens={limit} generated rows; raise max_tokens")
        wanted = [row for row, _ in rows if wants_row(session.options, row.decode_step)]
        return StepCapture(wanted, layers, session.options, model_name(self.model)) if wanted else None

    def query_index(self, step: StepCapture) -> list[int]:
        """Index among its sequence's queries of each row of ``step``."""
        index = {id(row): i for row, i in self._rows or ()}
        return [index[id(row)] for row in step.rows]


def _evicted(held: int, given: int) -> UnsupportedError:
    return UnsupportedError(
        f"the cache holds {held} tokens where {given} came before: keys were taken out of it (eviction, compression), "
        "so its slots are not positions; capture without that"
    )


def concerns(session: Session, model: Any, ledger: RowLedger | None = None) -> bool:
    """Whether a session wants passes of ``model``, or of a model that is calling it now.

    With a generation's ``ledger``: or has got some of them, as who wants a part of the model.
    """
    if session.model is None:
        return True
    wanted = session.model if isinstance(session.model, tuple) else (session.model,)
    around = [model, *(frame.model for frame in local.frames)]
    # a compiled model's own call is not seen, that of the model inside it is
    if any(id(other) in _parts(one) for one in wanted for other in around):
        return True
    return ledger is not None and not ledger.empty


def _parts(model: Any) -> frozenset[int]:
    """Ids of a model and of the modules in it; of anything else its own."""
    if not isinstance(model, torch.nn.Module):
        return frozenset([id(model)])
    known = _modules.get(model)
    if known is None:
        known = _modules[model] = frozenset(id(module) for module in model.modules())
    return known


_modules: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


def attention_layers(model: Any) -> list[int]:
    """Layer numbers of a model's causal self-attention modules. Raises UnsupportedError if it has none."""
    found = _layers.get(model)
    if found is None:
        config = getattr(model, "config", None)
        name = type(model).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise encoder_decoder(model)
        numbers = _numbered(model)
        found = sorted(set(numbers.values()))
        if not found:
            raise UnsupportedError(
                f"{name} has no causal attention that goes through Transformers' attention interface, so it cannot be "
                "captured; models of the Llama, Qwen, Gemma, Mistral, GPT-2, ... families can"
            )
        _layers[model], _numbers[model] = found, numbers
    return found


_layers: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
_numbers: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()  # id of a module -> its layer


def encoder_decoder(model: Any) -> UnsupportedError:
    """Why a model of two halves is refused."""
    return UnsupportedError(
        f"{type(model).__name__} is an encoder-decoder model; only decoder-only models can be captured"
    )


def layer_number(model: Any, module: Any) -> int:
    """The layer of a model's attention module; -1 for one that is none of its causal ones."""
    attention_layers(model)
    return _numbers[model].get(id(module), -1)


def _numbered(model: Any) -> dict[int, int]:
    """Each causal attention module's layer: its own number where these are distinct, else that of its place.

    Raises UnsupportedError where neither tells the layers apart.
    """
    places: dict[int, list[str]] = {}
    modules: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_causal_attention(module):
            modules[id(module)] = module
            places.setdefault(id(module), []).append(name)
    own = {key: int(module.layer_idx) for key, module in modules.items()}
    shared = [names for names in places.values() if len(names) > 1]
    if len(set(own.values())) == len(own) and min(own.values(), default=0) >= 0:
        return own
    if shared:
        raise UnsupportedError(
            f"{type(model).__name__} uses one attention module in several layers ({', '.join(shared[0][:3])}), whose "
            "records could not be told apart, so it cannot be captured"
        )
    by_place = {key: _first_number(names[0]) for key, names in places.items()}
    if None in by_place.values() or len(set(by_place.values())) < len(by_place):
        raise UnsupportedError(
            f"{type(model).__name__} gives several attention modules the same layer number "
            f"({sorted(own.values())[:6]}), and their places in the model do not tell them apart either, so it cannot "
            "be captured"
        )
    return {key: number for key, number in by_place.items() if number is not None}


def _first_number(name: str) -> int | None:
    """The 2 of "model.layers.2.shared_transformer.self_attn"."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_causal_attention(module: Any) -> bool:
    """Whether a module is a decoder layer's self-attention."""
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and bool(getattr(module, "is_causal", False))
        and not getattr(module, "is_cross_attention", False)
    )


def model_name(model: Any) -> str:
    """The model's name for records: a hub id as it is, a local path's last part only."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.exists(name) else name


#: Names of a model's argument that holds the keys of earlier passes: up to Transformers 5.23, from 5.24, of old.
_CACHES = ("past_key_values", "cache", "cache_params")


def _cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache that a pass was given, under whatever name: known by its type, else by a known name."""
    from transformers.cache_utils import Cache

    for value in arguments.values():
        if isinstance(value, Cache):
            return value
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def _cache_of(output: Any) -> Any:
    """The cache that a pass has made, in its output: a ModelOutput, a dict or a tuple."""
    from transformers.cache_utils import Cache

    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def cached_tokens(cache: Any) -> int:
    """Tokens that earlier passes left in the cache."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UnsupportedError(
            f"past_key_values is a {type(cache).__name__}, which does not tell its length; pass a Transformers Cache"
        )
    return int(cache.get_seq_length())
