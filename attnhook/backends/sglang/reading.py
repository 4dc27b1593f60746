"""Our elements in SGLang's results, as the records of each choice."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from attnhook.options import RequestOptions
from attnhook.serving.account import ChoiceAccount
from attnhook.serving.pieces import pieces
from attnhook.serving.replies import Attention, Stream
from attnhook.serving.wire import KEY, Share, reason

logger = logging.getLogger("attnhook")


@dataclass
class Reader:
    """Takes our elements out of the results of one request, whose choices it tells apart by their ids."""

    incremental: bool
    stream: Stream | None = None  # of an OpenAI reply, which gets what is new
    choices: dict[int, Attention] = field(default_factory=dict)  # all so far
    _accounts: dict[int, ChoiceAccount] = field(default_factory=dict)
    _tokens: dict[int, int] = field(default_factory=dict)  # per choice, so far
    _seen: dict[str, int] = field(default_factory=dict)  # elements per id
    _native_sofar: dict[str, Attention] = field(default_factory=dict)  # of native HTTP replies, by id
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same in Python, as JSON

    def read(self, result: dict[str, Any], index: int, options: RequestOptions, *, native: bool) -> None:
        """One result: its records go to ``choices`` and ``stream``, in native replies into ``meta_info``."""
        meta = result.get("meta_info") or {}
        elements = meta.pop(KEY, None) or []
        request = str(meta.get("id", ""))
        try:
            new = self._new(elements, request, index)
            if "output_ids" in result:
                # counted here: with streams, completion_tokens may be behind the tokens that a result has by now
                count = len(result["output_ids"])
                tokens = self._tokens[index] = count + (self._tokens.get(index, 0) if self.incremental else 0)
                account = self._accounts.setdefault(index, ChoiceAccount(options, meta.get("prompt_tokens")))
                new = account.settle(new, tokens, finished=meta.get("finish_reason") is not None)
        except Exception as error:
            logger.exception("attention of one request is lost")
            new = Attention(error=reason(error))
        self.choices.setdefault(index, Attention()).extend(new)
        if self.stream is not None:
            self.stream.add(index, new)
        elif native:
            meta.update(self._native(request, new))

    def _new(self, elements: list[Any], request: str, index: int) -> Attention:
        if not self.incremental:
            done, self._seen[request] = self._seen.get(request, 0), len(elements)
            elements = elements[done:]
        new = Attention()
        for element in elements:
            if element is not None:
                new.extend(Attention.of(Share.unpack(element), request, index))
        return new

    def _native(self, request: str, new: Attention) -> dict[str, Any]:
        """Fields for ``meta_info``: what is new, or all so far, as the engine does with its own lists.

        What is sent again with every event is written once.
        """
        if self.incremental:
            return new.fields()
        if pieces.get() is not None:
            whole = self._native_sofar.setdefault(request, Attention())
            whole.extend(new)
            return whole.fields(again=True)
        sofar = self._entries.setdefault(request, {})
        for name, value in new.fields().items():
            sofar[name] = sofar.get(name, []) + value if isinstance(value, list) else sofar.get(name, value)
        return dict(sofar)
