"""Continuous batching: every pass takes one token of each request that answers, and pieces of waiting prompts."""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tinyserve import parallel
from tinyserve.model import PAGE, Batch, Model, Part

logger = logging.getLogger("tinyserve")


@dataclass(frozen=True)
class Output:
    """One token of an answer."""

    token: int
    finished: bool
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Request:
    """A prompt and its answer so far. ``deliver`` gets each `Output`, or the exception that ended the engine."""

    prompt: list[int]
    max_tokens: int
    deliver: Callable[[Output | Exception], object]
    stop: frozenset[int] = frozenset()
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)  # goes to all ranks with each pass
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys are in the cache
    pages: list[int] = field(default_factory=list)
    aborted: bool = False


class Engine:
    """One model and its scheduler, which has a thread of its own once `run` is started in one."""

    def __init__(self, model: Model, pages: int, budget: int = 64) -> None:
        self.model, self.budget = model, budget  # most tokens of one pass
        self.pages = list(range(pages))  # that are free
        self.total = pages
        self.inbox: queue.Queue[Request] = queue.Queue()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ended: list[str] = []

    def submit(self, request: Request) -> None:
        """Let a request be answered, from any thread. Raises ValueError where it can never be."""
        length = len(request.prompt) + request.max_tokens
        limit = min(self.total * PAGE, self.model.config.max_position_embeddings)
        if not request.prompt or request.max_tokens < 1 or length > limit:
            raise ValueError(
                f"{len(request.prompt)} tokens and {request.max_tokens} more: 1 each, at most {limit} in all"
            )
        if not 0 <= request.temperature <= 10:
            raise ValueError(f"temperature={request.temperature!r} must be from 0 to 10")
        self.inbox.put(request)

    def run(self) -> None:
        """Answer requests for ever; an error of a pass ends those that it concerned, and the engine."""
        try:
            while True:
                while not self.inbox.empty() or not (self.waiting or self.running):
                    self.waiting.append(self.inbox.get())
                self.step()
        except Exception as error:
            logger.exception("the engine has ended")
            for request in (*self.running, *self.waiting):
                request.deliver(error)

    def step(self) -> None:
        """One pass, where there is anything to compute."""
        for request in [one for one in (*self.running, *self.waiting) if one.aborted]:
            self.end(request)
        self.admit()
        batch = self.schedule()
        if not batch.parts:
            return
        parallel.send(batch)
        logits = self.model.forward(batch)
        by_id = {request.id: request for request in self.running}
        for part, row in zip(batch.parts, logits, strict=True):
            request = by_id[part.request]
            request.computed += len(part.tokens)
            if part.samples:
                output = self.accept(request, _sample(row, request.temperature))
                request.deliver(output)
                if output.finished:
                    self.end(request)

    def admit(self) -> None:
        """Give pages to those who wait, in their order: as many as they may come to need."""
        while self.waiting:
            request = self.waiting[0]
            count = -(-(len(request.prompt) + request.max_tokens) // PAGE)
            if count > len(self.pages):
                return
            request.pages, self.pages = self.pages[:count], self.pages[count:]
            self.running.append(self.waiting.pop(0))

    def schedule(self) -> Batch:
        """Those that answer first; what is left of the budget goes to prompts."""
        batch, left = Batch([], self.ended), self.budget
        self.ended = []
        for request in sorted(self.running, key=lambda one: not one.output):
            tokens = [*request.prompt, *request.output][request.computed :][:left]
            left -= len(tokens)
            if tokens:
                start, extra = request.computed, request.extra
                batch.parts.append(Part(request.id, tokens, start, len(request.prompt), request.pages, extra))
        return batch

    def accept(self, request: Request, token: int) -> Output:
        """A token becomes part of the answer."""
        request.output.append(token)
        return Output(token, token in request.stop or len(request.output) == request.max_tokens)

    def end(self, request: Request) -> None:
        """Free what a request has."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.pages += request.pages
        self.ended.append(request.id)


def start(model: Model, pages: int, budget: int) -> Engine:
    """An engine that runs in a thread."""
    engine = Engine(model, pages, budget)
    threading.Thread(target=engine.run, name="tinyserve", daemon=True).start()
    return engine


def _sample(logits: torch.Tensor, temperature: float) -> int:
    if temperature < 1e-3:  # by which logits are not to be divided
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
