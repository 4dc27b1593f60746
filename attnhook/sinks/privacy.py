"""What leaves a record before any sink sees it: one place, the same for every sink.

A record holds numbers, the names of spans and models, and the request id; never the prompt's text. It has token
ids while some sink asks for them with ``tokens=1``; those of all others do not get them. Positions below
``attention_mask_prefix`` are not in it either, nor the ids there: the capture leaves them out.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from attnhook.errors import PluginError
from attnhook.plugins.contracts import Sink
from attnhook.record.columns import Columns, is_lean
from attnhook.record.packing import has_tokens, row_without_tokens
from attnhook.record.token_record import TokenRecord, without_tokens
from attnhook.sinks import config

KEY_VARIABLE = "ATTNHOOK_HASH_KEY"
_KEY_BYTES = 32
#: Schemes whose path is a place on this machine, so that a key can lie beside it.
_WITH_PATH = ("jsonl", "parquet", "sqlite")
_KNOWN: Mapping[str, config.Parser] = {"fingerprints": config.flag, "hash_ids": config.flag, "tokens": config.flag}


@dataclass(frozen=True)
class Rules:
    """What to take out of every record."""

    fingerprints: bool = False  # keep fingerprints only: no positions, scores or spans
    key: bytes = b""  # replace request ids by a hash under this key; empty: keep them
    tokens: bool = False  # keep token ids

    def apply(self, records: Sequence[TokenRecord]) -> Sequence[TokenRecord]:
        """The records without what the rules take out; the given ones stay as they are."""
        if self.key or self.fingerprints:
            return [self._apply(record) for record in records]
        if self.tokens or all(record.token_ids is None for record in records):
            return records
        return [without_tokens(record) for record in records]

    def apply_columns(self, columns: Columns) -> Columns:
        """The same for rows that are columns; their times stay."""
        if not self.tokens:
            columns = columns_without_tokens(columns)
        if not (self.key or self.fingerprints):
            return columns
        records = [None if data is None else self._apply(TokenRecord.from_bytes(data)) for data in columns.record]
        lean = [record is not None and is_lean(record) for record in records]
        kept = list(zip(records, lean, strict=True))
        return replace(
            columns,
            request_id=[hashed(name, self.key) for name in columns.request_id] if self.key else columns.request_id,
            mode=[old if record is None else record.mode for record, old in zip(records, columns.mode, strict=True)],
            layer=[
                record.layers[0] if record is not None and bare else old
                for (record, bare), old in zip(kept, columns.layer, strict=True)
            ],
            record=[None if record is None or bare else record.to_bytes() for record, bare in kept],
        )

    def _apply(self, record: TokenRecord) -> TokenRecord:
        changes: dict[str, Any] = {}
        if self.key:
            changes["request_id"] = hashed(record.request_id, self.key)
        if not self.tokens:
            record = without_tokens(record)
        if self.fingerprints:
            layers = len(record.layers)
            changes |= {
                "mode": "fingerprint",
                "token_positions": np.zeros((layers, 0), np.int32),
                "attention_scores": np.zeros((layers, 0), np.float32),
                "span_names": (),
                "span_mass": np.zeros((layers, 0), np.float32),
                **dict.fromkeys(("head_positions", "head_scores", "head_span_mass", "head_lse")),
            }
            record = without_tokens(record)
        return replace(record, **changes)


class PrivateSink(Sink):
    """A sink behind `Rules`; everything else is the sink's own."""

    def __init__(self, inner: Sink, rules: Rules) -> None:
        self.inner = inner
        self.rules = rules
        self.tokens_left_out = 0  #: records whose token ids were taken out

    def open(self, config: str) -> None:
        """Open the sink."""
        self.inner.open(config)

    def write(self, batch: Sequence[TokenRecord]) -> None:
        """Write what the rules leave of the records."""
        kept = self.rules.apply(batch)
        if kept is not batch and not self.rules.tokens:
            self.tokens_left_out += sum(record.token_ids is not None for record in batch)
        self.inner.write(kept)

    def write_columns(self, columns: Columns) -> None:
        """`write` for rows that are columns already; only for stores."""
        if not self.rules.tokens:
            self.tokens_left_out += sum(token is not None for token in columns.query_token)
        self.inner.write_columns(self.rules.apply_columns(columns))  # type: ignore[attr-defined]

    def flush(self) -> None:
        """Flush the sink."""
        self.inner.flush()

    def close(self) -> None:
        """Close the sink."""
        self.inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def take(scheme: str, sink_config: str) -> tuple[str, Rules]:
    """The rules that ``fingerprints=1``, ``hash_ids=1`` and ``tokens=1`` in a sink's URL ask for, and its other part.

    Raises PluginError for a bad value, a key that is missing or cannot be kept, and for two rules that contradict.
    """
    path, given = config.split(sink_config)
    ours = {name: text for name, text in given.items() if name in _KNOWN}
    if not ours:
        return sink_config, Rules()
    rest = config.join(path, {name: text for name, text in given.items() if name not in _KNOWN})
    _, values = config.parse(scheme, config.join(path, ours), _KNOWN)
    fingerprints, tokens = values.get("fingerprints", False), values.get("tokens", False)
    if fingerprints and tokens:
        raise PluginError(
            f"sink {scheme}:{sink_config}: fingerprints=1 keeps fingerprints only, tokens=1 token ids too: drop one"
        )
    key = _key(scheme, path) if values.get("hash_ids") else b""
    return rest, Rules(fingerprints=fingerprints, key=key, tokens=tokens)


def columns_without_tokens(columns: Columns) -> Columns:
    """The columns without token ids: themselves, where they have none."""
    found = any(token is not None for token in columns.query_token)
    if not found and not any(data is not None and has_tokens(data) for data in columns.record):
        return columns
    return replace(
        columns,
        record=[None if data is None else row_without_tokens(data) for data in columns.record],
        query_token=[None] * len(columns),
    )


def wants_tokens(sink: Sink) -> bool:
    """Whether an open sink keeps token ids."""
    rules = getattr(sink, "rules", None)
    return isinstance(rules, Rules) and rules.tokens


@lru_cache(maxsize=4096)
def hashed(request_id: str, key: bytes) -> str:
    """A request id's stand-in: 32 hexadecimal digits, always the same under one key."""
    return blake2b(request_id.encode("utf-8", "surrogatepass"), key=key, digest_size=16).hexdigest()


def id_in(sink: Sink, request_id: str) -> str:
    """What a request id becomes in an open sink."""
    rules = getattr(sink, "rules", None)
    return hashed(request_id, rules.key) if rules is not None and rules.key else request_id


def _key(scheme: str, path: str) -> bytes:
    given = os.environ.get(KEY_VARIABLE, "")
    if given:
        if len(given) < 16:
            raise PluginError(f"{KEY_VARIABLE} has {len(given)} characters: a key needs 16 or more")
        return blake2b(given.encode(), digest_size=_KEY_BYTES).digest()
    if scheme not in _WITH_PATH or "://" in path or path in ("", "-"):
        raise PluginError(
            f"sink {scheme}:{path}: hash_ids=1 needs a key, and this sink has no place here to keep one: set "
            f"{KEY_VARIABLE} to 16 characters or more, the same wherever ids must come out the same"
        )
    # beside the store and not in it, so that a copy of the store tells nothing
    file = Path(os.path.expanduser(path).rstrip("/") + ".key")
    try:
        return _load(file) or _make(file)
    except OSError as error:
        raise PluginError(
            f"sink {scheme}:{path}: the key {file} of hash_ids=1 cannot be used: {error}; make its folder writable, or "
            f"set {KEY_VARIABLE}"
        ) from error


def _load(file: Path) -> bytes:
    try:
        key = file.read_bytes()
    except FileNotFoundError:
        return b""
    if len(key) != _KEY_BYTES:
        raise PluginError(f"{file} is no key: {len(key)} bytes in place of {_KEY_BYTES}; move it away, or restore it")
    return key


def _make(file: Path) -> bytes:
    """A new key, or the one that another process made in the same moment."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as sink:
            sink.write(secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(scratch, file)
    finally:
        scratch.unlink()
    return _load(file)
