"""Answers with their attention from a server that has attnhook: what ``--url`` does.

Needs no engine and no HTTP library: the server (``ATTNHOOK=1 vllm serve MODEL``) runs the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from attnhook.errors import OptionError, ServerError
from attnhook.options import REQUEST_FIELDS
from attnhook.record.answer import SINK, Answer
from attnhook.record.key_mass import KeyMass
from attnhook.record.pieces import pieces, window_start
from attnhook.record.token_record import TokenRecord
from attnhook.record.without_sink import without_sink
from attnhook.system import untrusted
from attnhook.system.addresses import masked
from attnhook.system.web import Site, StatusError, UnreachableError, is_address, is_header

_TIMEOUT = 600.0  # seconds; an answer comes in one piece, so its first byte may take long
_AT_ONCE = 4  # requests for the text of tokens


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer as token ids, and their records."""

    token_ids: list[int]  # prompt and answer
    prompt_length: int
    text: str  # the answer
    records: list[TokenRecord]
    key_mass: KeyMass | None = None  # where it was asked for


@dataclass(frozen=True)
class Reply(Answer):
    """A server's answer and its records."""

    engine: str = ""  # for example "vllm 0.32.0"


class Client:
    """Asks one server. ``url`` is its OpenAI-compatible address, such as ``http://127.0.0.1:8000/v1``.

    ``api_key`` (default: ``OPENAI_API_KEY``) is sent as the bearer token and ``attention_key`` (default:
    ``ATTNHOOK_API_KEY``) in the header X-Attention-Key. Raises OptionError for a bad address or key.
    """

    def __init__(self, url: str, *, api_key: str | None = None, attention_key: str | None = None) -> None:
        if not is_address(url):
            raise OptionError("url", f"url={masked(url)!r} must be an address such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.shown = masked(self.url)  #: for messages
        headers = {"Content-Type": "application/json"}
        for name, header, prefix, variable, key in (
            ("api_key", "Authorization", "Bearer ", "OPENAI_API_KEY", api_key),
            ("attention_key", "X-Attention-Key", "", "ATTNHOOK_API_KEY", attention_key),
        ):
            key = os.environ.get(variable) if key is None else key
            if key and not is_header(key):
                raise OptionError(name, f"{name} (or {variable}) must be printable ASCII, as HTTP headers are")
            if key:
                headers[header] = prefix + key
        self._site = Site(self.url, headers, timeout=_TIMEOUT)

    def capabilities(self) -> dict[str, Any]:
        """What the server can capture. Raises ServerError, also where it has no attnhook."""
        try:
            return self.get("/v1/attention/capabilities")
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(
                f"{self.shown} has no attnhook: GET /v1/attention/capabilities gives HTTP 404; install attnhook there "
                "and start it with ATTNHOOK=1 vllm serve MODEL",
                404,
            ) from error

    def model(self, wanted: str | None = None) -> str:
        """The name of the model to ask: ``wanted`` if it is served, by default the first one served."""
        names = [str(entry.get("id")) for entry in _entries(self.get("/v1/models"), "data")]
        if not names or (wanted is not None and wanted not in names):
            raise OptionError(
                "model",
                f"model {wanted!r} is not served by {self.shown}, which serves {', '.join(names) or 'none'}: with "
                "--url, give one of these names or leave --model out",
            )
        return names[0] if wanted is None else wanted

    def ask(
        self, text: str, *, model: str | None = None, max_new_tokens: int = 64, chat: bool = True, **options: Any
    ) -> Reply:
        """Answer ``text`` greedily with capture on; ``options`` are those of a capture (layers, top_k, ...).

        A model without a chat template gets the bare text, as with ``chat=False``. What no option says, the
        server decides. Raises OptionError, ServerError or RecordError.
        """
        capabilities = self.capabilities()
        name = self.model(model)
        messages = [{"role": "user", "content": text}] if chat else None
        said = self.exchange(name, text, messages, max_new_tokens=max_new_tokens, **options)
        return Reply(
            model=name,
            token_ids=said.token_ids,
            tokens=self.pieces(name, said.token_ids),
            prompt_length=said.prompt_length,
            text=said.text,
            records=said.records,
            zones=without_sink(said.records, SINK),
            key_mass=said.key_mass,
            engine=engine_of(capabilities),
        )

    def exchange(
        self,
        name: str,
        prompt: str,
        messages: Sequence[Mapping[str, str]] | None = None,
        /,
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> Exchange:
        """Let the served model ``name`` answer greedily with capture on: the messages, or the bare prompt.

        The prompt also stands in for the messages where the model has no chat template. The span of the attention
        sink is captured beside those that the options name. Raises OptionError, ServerError or RecordError.
        """
        spans = {SINK: (0, 1), **options.pop("spans", {})}
        fields = {REQUEST_FIELDS[option]: value for option, value in options.items()}
        body = {
            "model": name,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "return_attention_tokens": True,
            "attention_mode": "raw",
            "attention_spans": spans,
            **fields,
        }
        return self._exchange(name, self._complete(body, prompt, messages))

    def _exchange(self, name: str, reply: Mapping[str, Any]) -> Exchange:
        """What a completion's reply holds."""
        choice, *_ = [*_entries(reply, "choices"), {}]
        entries = self._rows(choice)
        prompt_ids = reply.get("prompt_token_ids") or choice.get("prompt_token_ids")
        new_ids = choice.get("token_ids") or choice.get("response_token_ids")  # vLLM's name, SGLang's in chats
        if not _are_ids(prompt_ids) or not _are_ids(new_ids):
            raise ServerError(
                f"{self.shown} answered without token ids: upgrade the server to one with return_token_ids"
            )
        ids = [*prompt_ids, *new_ids]
        request = str(reply.get("id", ""))
        records = [TokenRecord.from_dict(entry, request_id=request, model=name) for entry in entries]
        mass = None if "attention_key_mass" not in choice else KeyMass.from_list(choice["attention_key_mass"])
        self._check_positions(records, len(ids), mass)
        message = choice.get("message") or {}
        return Exchange(
            token_ids=ids,
            prompt_length=len(prompt_ids),
            text=str(message.get("content") or choice.get("text") or ""),
            records=records,
            key_mass=mass,
        )

    def _rows(self, choice: Mapping[str, Any]) -> list[Any]:
        """The records of a choice, the prompt's first, as JSON values."""
        entries = choice.get("attention_tokens")
        if choice.get("attention_error"):
            raise ServerError(
                f"{self.shown} could not capture: {choice['attention_error']}; the server's log says more"
            )
        if entries is None:
            raise ServerError(
                f"{self.shown} answered without attention_tokens (it gave {', '.join(choice) or 'no choice'}): is "
                "there a proxy that drops unknown fields? Ask the server itself"
            )
        return [*(choice.get("prompt_attention_tokens") or []), *entries]

    def _check_positions(self, records: Sequence[TokenRecord], tokens: int, mass: KeyMass | None) -> None:
        for layer, own in (mass or {}).items():
            if own.shape[-1] >= tokens or mass is None or mass.rows != len(records):
                raise ServerError(
                    f"{self.shown} gave a key mass of {own.shape[-1]} keys in layer {layer} for {tokens} tokens and "
                    f"{len(records)} records: use the same attnhook on both sides"
                )
        for record in records:
            if record.query_position + 1 >= tokens or record.token_positions.max(initial=0) >= tokens:
                raise ServerError(
                    f"{self.shown} gave a record of query position {record.query_position} for {tokens} tokens: use "
                    "the same attnhook on both sides"
                )

    def pieces(self, model: str, ids: list[int]) -> list[str]:
        """Text of each token such that the pieces, joined, are the decoded text; see `runner.pieces`."""
        server = _Tokenizer(self, model)
        # nearly all that pieces() asks for, asked for at once: one by one, a long prompt takes long
        windows = set()
        for end in range(1, len(ids) + 1):
            start = window_start(end)
            windows.add(tuple(ids[start:end]))
            if start != window_start(end - 1):
                windows.add(tuple(ids[start : end - 1]))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(server.decode, windows - {()}))
        return pieces(server, ids)

    def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        reply = self.post("/detokenize", {"model": model, "tokens": list(ids), "skip_special_tokens": False})
        text = reply.get("prompt", reply.get("text"))  # vLLM's name, and SGLang's
        if not isinstance(text, str):
            raise ServerError(f"{self.shown}/detokenize answered without the text: upgrade the server")
        return text

    def count(self, model: str, text: str) -> int:
        """Tokens of a text, with those that the tokenizer adds before it."""
        count = self.post("/tokenize", {"model": model, "prompt": text}).get("count")
        if not isinstance(count, int):
            raise ServerError(f"{self.shown}/tokenize answered without a count: upgrade the server")
        return count

    def context(self, model: str) -> int | None:
        """Most tokens that prompt and answer may have together, where the server tells."""
        served = {entry.get("id"): entry.get("max_model_len") for entry in _entries(self.get("/v1/models"), "data")}
        most = served.get(model)
        return most if isinstance(most, int) else None

    def _complete(
        self, body: dict[str, Any], prompt: str, messages: Sequence[Mapping[str, str]] | None
    ) -> dict[str, Any]:
        if messages is not None:
            try:
                return self.post("/v1/chat/completions", {**body, "messages": list(messages)})
            except ServerError as error:
                if error.status != 400 or "chat template" not in str(error):
                    raise
        return self.post("/v1/completions", {**body, "prompt": prompt})

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path. Raises ServerError."""
        with self._open(path, None) as reply:
            return self._object(path, untrusted.loads(reply.read()))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a JSON body. Raises ServerError."""
        with self._open(path, body) as reply:
            return self._object(path, untrusted.loads(reply.read()))

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks that answer a body with ``stream``. Raises ServerError, also for an error amid the stream."""
        with self._open(path, body) as reply:
            for line in reply:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]" or not line.startswith(b"data:"):
                    continue
                chunk = self._object(path, untrusted.loads(data))
                if "error" in chunk:
                    raise ServerError(
                        f"{self.shown}{path} ends its stream: {_reason(data)}; the server's log says more"
                    )
                yield chunk

    def _object(self, path: str, answer: Any) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise ServerError(f"{self.shown}{path} answers {str(answer)[:80]!r}: is this an OpenAI-compatible server?")
        return answer

    @contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[Any]:
        """The open reply; what goes wrong until it is closed becomes a ServerError."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._site.open(path, data) as reply:
                yield reply
        except StatusError as error:
            raise ServerError(
                f"{self.shown}{path} gives HTTP {error.status}: {_reason(error.body)}; {_remedy(error.status)}",
                error.status,
            ) from error
        except UnreachableError as error:
            raise ServerError(
                f"{self.shown} cannot be reached: {error}; start a server (ATTNHOOK=1 vllm serve MODEL) or mend --url"
            ) from error
        except ValueError as error:
            raise ServerError(
                f"{self.shown}{path} does not answer in JSON: is this an OpenAI-compatible server?"
            ) from error


class _Tokenizer:
    """The server's tokenizer, as far as `pieces` needs it; remembers what it was asked."""

    def __init__(self, client: Client, model: str) -> None:
        self._client, self._model = client, model
        self._known: dict[tuple[int, ...], str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self._client.detokenize(self._model, key)
        return self._known[key]


def engine_of(capabilities: Mapping[str, Any]) -> str:
    """The name and version of a server's engine, as its capabilities tell them."""
    engine = capabilities.get("engine")
    return " ".join(str(part) for part in engine.values() if part) if isinstance(engine, dict) else ""


def _entries(reply: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    entries = reply.get(name)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _are_ids(ids: Any) -> TypeGuard[list[int]]:
    return isinstance(ids, list) and bool(ids) and all(isinstance(number, int) for number in ids)


def _reason(body: bytes) -> str:
    """The message of an error reply, on one line."""
    text = body.decode(errors="replace")
    try:
        reply = untrusted.loads(text)
        inner = reply.get("error", reply)
        text = str(inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else str(inner)
    except (ValueError, AttributeError):
        pass  # not JSON, or no object: the text itself is the message
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:400] or "no message"


def _remedy(status: int) -> str:
    remedies = {
        400: "change what is asked for",
        401: "give the server's key with --api-key or OPENAI_API_KEY",
        403: "ask for what this server allows, with its key (--attention-key or ATTNHOOK_API_KEY)",
        404: "check --url",
        429: "try again later",
    }
    return remedies.get(status, "the server's log says more")
