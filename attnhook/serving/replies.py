"""Records in OpenAI-compatible replies: fields of a choice, and of the chunks of a stream."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from attnhook.record.key_mass import KeyMass
from attnhook.record.token_record import TokenRecord, fill_zones
from attnhook.serving.key_mass import received
from attnhook.serving.pieces import Layer, pieces
from attnhook.serving.wire import Share, worse

T = TypeVar("T")

NOTHING_CAME = "the engine sent no records for this request; the server's log may say why"


@dataclass
class Attention:
    """What was captured for one choice, so far or since it was last sent."""

    generated: list[TokenRecord] = field(default_factory=list)
    prompt: list[TokenRecord] = field(default_factory=list)
    error: str | None = None
    check: float | None = None  # self_check: largest relative difference of a rebuilt attention output
    key_mass: KeyMass | None = None  # with the last records
    encoding_format: str = "float"  # in which arrays are written

    @classmethod
    def of(cls, share: Share, request: str, choice: int) -> Attention:
        """What a `Share` brings, under the names that the client knows."""

        def records(rows: list[bytes]) -> list[TokenRecord]:
            return [replace(TokenRecord.from_bytes(row), request_id=request, choice=choice) for row in rows]

        mass = None if share.key_mass is None else received(share.key_mass)
        return cls(records(share.generated), records(share.prompt), share.error, share.check, mass)

    def extend(self, other: Attention) -> None:
        """Append what came later."""
        self.generated += other.generated
        self.prompt += other.prompt
        self.error = self.error or other.error
        self.check = worse(self.check, other.check)
        self.key_mass = other.key_mass or self.key_mass
        if other.encoding_format != "float":
            self.encoding_format = other.encoding_format

    def take(self) -> Attention:
        """What is here now; nothing is left."""
        taken = replace(self)
        self.generated, self.prompt, self.error, self.check, self.key_mass = [], [], None, None, None
        return taken

    def copy(self) -> Attention:
        """The same records in lists of their own."""
        return replace(self, generated=[*self.generated], prompt=[*self.prompt])

    def __bool__(self) -> bool:
        return bool(self.generated or self.prompt or self.error or self.key_mass)

    def checked(self, tokens: int) -> Attention:
        """Itself; with an error where ``tokens`` were generated and nothing at all was captured.

        Every request that asks has a row of its prompt's last token at least, or one before it.
        """
        if tokens and not self:
            return Attention(error=NOTHING_CAME)
        return self

    def fields(self, *, again: bool = False) -> dict[str, Any]:
        """The JSON fields of a choice; ``attention_tokens`` is always there, the others where they hold something.

        ``again``: the same records come in later fields too, so what is written of them is kept.
        """
        how: Any = {"again": again, "encoding_format": self.encoding_format}
        fields: dict[str, Any] = {"attention_tokens": entries(self.generated, **how)}
        if self.prompt:
            fields["prompt_attention_tokens"] = entries(self.prompt, **how)
        if self.error:
            fields["attention_error"] = self.error
        if self.check is not None:
            # JSON has no NaN and no infinity: null is a check that failed
            fields["attention_self_check"] = {"max_error": self.check if math.isfinite(self.check) else None}
        if self.key_mass is not None:
            fields["attention_key_mass"] = entries_of_keys(self.key_mass, **how)
        return fields


def entries_of_keys(mass: KeyMass, *, again: bool = False, encoding_format: str = "float") -> Any:
    """The JSON of a key mass, likewise."""
    reply = pieces.get()
    if reply is not None and mass:
        return reply.mark([Layer(mass, layer) for layer in mass], again=again, encoding_format=encoding_format)
    return mass.to_list(encoding_format)


def entries(records: list[TokenRecord], *, again: bool = False, encoding_format: str = "float") -> Any:
    """The JSON of records; in an HTTP reply a mark that stands for it, until it is sent."""
    reply = pieces.get()
    if reply is not None and records:
        return reply.mark([*records], again=again, encoding_format=encoding_format)
    fill_zones(records)
    return [record.to_dict(encoding_format) for record in records]


class Stream:
    """Puts records into the chunks of one streamed reply.

    ``choices`` tells the (choice index, records) pairs that one result of the engine brings. Records wait for
    the next chunk of their choice that carries tokens; a chunk that only names the role does not.
    """

    def __init__(self, choices: Callable[[Any], list[tuple[int, Attention]]] = lambda _: []) -> None:
        self._choices = choices
        self._waiting: dict[int, Attention] = {}
        self._served: set[int] = set()  # choices that have got something

    async def watch(self, results: AsyncIterator[T]) -> AsyncIterator[T]:
        """The engine's results, looked at as they pass."""
        async for result in results:
            for index, attention in self._choices(result):
                self.add(index, attention)
            yield result

    def add(self, index: int, attention: Attention) -> None:
        """Records of a choice that have come, where nobody is watched."""
        self._waiting.setdefault(index, Attention()).extend(attention)

    def line(self, text: str) -> str:
        """One server-sent event, with the fields of the records that it is due."""
        head, data = text[: len("data: ")], text[len("data: ") :].strip()
        if head != "data: " or not data.startswith("{"):
            return text
        chunk = json.loads(data)
        changed = False
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            waiting = self._waiting.get(index, Attention())
            if choice.get("finish_reason") is not None and index not in self._served:
                waiting = waiting.checked(1)
            if waiting and not _only_role(choice):
                choice.update(waiting.take().fields())
                self._served.add(index)
                changed = True
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n" if changed else text


def _only_role(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    return bool(
        isinstance(delta, dict)
        and delta.get("role")
        and not any(value for name, value in delta.items() if name != "role")
        and choice.get("finish_reason") is None
    )
