"""What a thread is inside of: nested model calls and the ``generate`` that they serve; which sessions want them."""

from __future__ import annotations

import threading
import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from attnhook.capture.ledger import RowLedger
from attnhook.capture.session import Session
from attnhook.errors import UnsupportedError


class Local(threading.local):
    """What one thread is inside of: nested model calls, and a ``generate``."""

    def __init__(self) -> None:
        self.frames: list[Any] = []  # a Frame of each model that is being called, the outermost first
        self.run: Run | None = None
        self.generating: Any = None  # the model whose generate() runs
        self.aside = 0  # inside code that generate() calls between its passes: their passes are not its own
        self.refused: str | None = None  # a decoding mode that cannot be captured
        self.refusal: Exception | None = None  # what a strict session has raised out of the generate() that runs


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
    virtual: int = 0  # tokens that come before the prompt and are none of it (prefix and prompt tuning)
    starts: list[int] = field(default_factory=list)  # each sequence's padding at its left; empty: none has any
    wrong: str | None = None  # why no row of it can be captured
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
        ends = (self.prompt_length or 0) - self.virtual - 1
        starts = self.starts or [0] * len(sequences)
        known = self.prompt_length is not None and len(starts) == len(sequences)
        first = {self.identity(b): ends - start for b, start in enumerate(starts)} if known else None
        for session, ledger in self.ledgers.items():
            if not session.active or ledger.refused or not concerns(session, model, ledger):
                continue
            told, rows = ledger.check(tokens, first)
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


def refuse(session: Session, error: Exception, rows: int = 1) -> None:
    """Refuse a pass, or rows of it; the generation around it then lacks them, and that has been said."""
    if local.run is not None:
        local.run.ledger(session).refused = True
    local.refusal = error if session.strict else local.refusal
    session.refuse(error, rows)


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
