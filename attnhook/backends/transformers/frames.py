"""Which rows a forward pass computes: requests, positions, prompt or generated, finished or not."""

from __future__ import annotations

import inspect
import os
import threading
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnhook import tokens
from attnhook.backends.transformers.tokens import History
from attnhook.capture import Row, Session, StepCapture, over_limit, wants_row
from attnhook.errors import UnsupportedError
from attnhook.options import check_heads, resolve_layers
from attnhook.records import TokenRecord


class Local(threading.local):
    """What one thread is inside of: nested model calls, and a ``generate``."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.run: Run | None = None
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
        self.cache = arguments.get("past_key_values")
        self.past = _cached_tokens(self.cache)
        self.saw_attention = False
        self.steps: dict[Session, StepCapture | None] = {}  # None: refused, or nothing to capture
        self.plans: dict[Any, Any] = {}  # per session and distinct mask; see hooks
        self._conversation: _Conversation | None = None
        self.q_len = 0
        self._rows: list[tuple[Row, int]] | None = None
        self._starts: list[int] = []  # padded index of each sequence's first token

    def rows(self, batch: int, q_len: int) -> list[tuple[Row, int]]:
        """Every real row of this pass as (row, index among its sequence's queries)."""
        if self._rows is None:
            self.q_len = q_len
            self._rows = self._find_rows(batch, q_len)
        return self._rows

    def _find_rows(self, batch: int, q_len: int) -> list[tuple[Row, int]]:
        total = self.past + q_len
        starts, ends = self._extent(batch, q_len)
        self._starts = starts
        run = self.run
        done: list[bool] = [False] * batch
        if run is not None:
            if run.prompt_length is None:
                run.prompt_length = total
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
            cache = self.cache if self.cache is not None else getattr(output, "past_key_values", None)
            if cache is not None:
                _conversations[cache] = self._conversation

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


def concerns(session: Session, model: Any) -> bool:
    """Whether a session wants passes of ``model``, or of a model that is calling it now."""
    wanted = session.model
    return wanted is None or wanted is model or any(frame.model is wanted for frame in local.frames)


def attention_layers(model: Any) -> list[int]:
    """Layer numbers of a model's causal self-attention modules. Raises UnsupportedError if it has none."""
    found = _layers.get(model)
    if found is None:
        config = getattr(model, "config", None)
        name = type(model).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{name} is an encoder-decoder model; only decoder-only models can be captured")
        found = sorted({m.layer_idx for m in model.modules() if is_causal_attention(m)})
        if not found:
            raise UnsupportedError(
                f"{name} has no causal attention that goes through Transformers' attention interface, so it cannot be "
                "captured; models of the Llama, Qwen, Gemma, Mistral, GPT-2, ... families can"
            )
        _layers[model] = found
    return found


_layers: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()


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


def _cached_tokens(cache: Any) -> int:
    """Tokens that earlier passes left in the cache."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UnsupportedError(
            f"past_key_values is a {type(cache).__name__}, which does not tell its length; pass a Transformers Cache"
        )
    return int(cache.get_seq_length())
