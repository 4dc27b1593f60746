"""Where probes are run: a Transformers model in this process, or a server with attnhook."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attnhook.analysis.probes import Prompt
from attnhook.client.client import Client, engine_of
from attnhook.errors import OptionError, ServerError
from attnhook.record.answer import SINK
from attnhook.record.token_record import TokenRecord

_PATIENCE = 60.0  # seconds that a server may say "too many captures" before the run ends
_BUSY = 429


@dataclass(frozen=True)
class Outcome:
    """What one prompt brought."""

    records: list[TokenRecord]
    text: str  # the answer
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows that could not be captured, by reason


class Target(ABC):
    """Something that answers prompts with capture on."""

    model: str
    context: int | None  # most tokens of prompt and answer, where it is known
    at_once: int = 1  # most prompts that it takes at a time

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it continues, as JSON."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Tokens of a text, with those that the tokenizer adds before it."""

    @abstractmethod
    def run(self, prompt: Prompt, new_tokens: int, options: Mapping[str, Any]) -> Outcome:
        """Answer a prompt greedily; the records have the probe's request id. Raises AttnhookError."""


class LocalTarget(Target):
    """A model that Transformers runs in this process; see `runner.load` for the arguments."""

    def __init__(self, model: str | None, dtype: str = "auto", device: str | None = None) -> None:
        from attnhook.backends.transformers import runner

        self._loaded = runner.load(model, dtype, device)
        self.model = self._loaded.name
        self.context = self._loaded.context
        # two folders may have the same last name
        self._source = os.path.realpath(model) if model is not None and os.path.exists(model) else model

    @property
    def identity(self) -> dict[str, Any]:
        from attnhook.backends.transformers import TransformersBackend

        dtype = str(self._loaded.model.dtype).removeprefix("torch.")
        return {
            "model": self.model,
            "source": self._source,
            "dtype": dtype,
            "engine": f"transformers {TransformersBackend().version()}",
            **({} if self._loaded.bos is None else {"bos": self._loaded.bos}),  # with it, all else is seen otherwise
        }

    def count(self, text: str) -> int:
        return len(self._loaded.encode_text(text))

    def run(self, prompt: Prompt, new_tokens: int, options: Mapping[str, Any]) -> Outcome:
        from attnhook.backends.transformers import runner
        from attnhook.process.capturing import capture

        loaded = self._loaded
        ids = None if prompt.messages is None else loaded.encode_chat(prompt.messages)
        if ids is None:
            ids = loaded.encode_text(prompt.transcript)
        spans = {SINK: (0, 1), **prompt.spans}
        with capture(model=loaded.model, spans=spans, **options) as records:
            output = runner.generate(loaded, ids, new_tokens)[0].tolist()
        text = loaded.tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
        return Outcome(_named(prompt, records, self.model), text, dict(records.dropped))


class ServerTarget(Target):
    """A server with attnhook, asked over HTTP; see `Client` for the arguments."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        concurrency: int = 4,
        api_key: str | None = None,
        attention_key: str | None = None,
    ) -> None:
        self._client = Client(url, api_key=api_key, attention_key=attention_key)
        capabilities = self._client.capabilities()
        self._engine = engine_of(capabilities)
        self.model = self._client.model(model)
        self.context = self._client.context(self.model)
        most = capabilities.get("max_concurrent")
        self.at_once = min(concurrency, most) if isinstance(most, int) else concurrency

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": self.model, "engine": self._engine}  # not its address: a server may move

    def count(self, text: str) -> int:
        return self._client.count(self.model, text)

    def run(self, prompt: Prompt, new_tokens: int, options: Mapping[str, Any]) -> Outcome:
        said = self._patiently(prompt, new_tokens, {**options, "spans": prompt.spans})
        if prompt.tokens is not None and said.prompt_length != prompt.tokens:
            raise ServerError(
                f"the server read probe {prompt.probe.request_id} as {said.prompt_length} tokens, where its /tokenize "
                f"counted {prompt.tokens}: distances and spans would be wrong; use one tokenizer for both"
            )
        return Outcome(_named(prompt, said.records, self.model), said.text)

    def _patiently(self, prompt: Prompt, new_tokens: int, options: Mapping[str, Any]) -> Any:
        """Ask, and wait where others take the server's places for capture."""
        begin, wait = time.monotonic(), 0.2
        while True:
            try:
                return self._client.exchange(
                    self.model, prompt.transcript, prompt.messages, max_new_tokens=new_tokens, **options
                )
            except ServerError as error:
                if error.status != _BUSY or time.monotonic() - begin > _PATIENCE:
                    raise
            time.sleep(wait)
            wait = min(2 * wait, 5.0)


def check_concurrency(concurrency: int) -> None:
    """Raise OptionError unless so many prompts may be asked at once."""
    if not 1 <= concurrency <= 256:
        raise OptionError("concurrency", f"concurrency={concurrency} must be a whole number from 1 to 256")


def _named(prompt: Prompt, records: list[TokenRecord], model: str) -> list[TokenRecord]:
    return [replace(record, request_id=prompt.probe.request_id, choice=0, model=model) for record in records]
