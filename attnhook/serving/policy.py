"""What a server allows its clients to capture: guard rails from ``ATTNHOOK_*``, which engine flags set too."""

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnhook.errors import OptionError
from attnhook.options import RequestOptions, graph_layers
from attnhook.serving.wire import ASK


@dataclass(frozen=True)
class Flag:
    """One server option: its command-line flag, variable, kind and help."""

    flag: str
    variable: str
    kind: type
    help: str


FLAGS = (
    Flag(
        "--return-attention-tokens",
        "ATTNHOOK_RETURN_ATTENTION_TOKENS",
        bool,
        "Allow requests to ask for attention (return_attention_tokens=true). On by default with ATTNHOOK=1.",
    ),
    Flag("--attention-tokens-top-k", "ATTNHOOK_TOP_K", int, "Positions per layer where a request names no k (1..256)."),
    Flag(
        "--attention-tokens-max-concurrent",
        "ATTNHOOK_MAX_CONCURRENT",
        int,
        "Requests that may capture at the same time per API server process; more get HTTP 429. Default: no limit.",
    ),
    Flag(
        "--attention-tokens-fingerprint-only",
        "ATTNHOOK_FINGERPRINT_ONLY",
        bool,
        "Refuse modes that tell positions: only fingerprints leave the server.",
    ),
    Flag(
        "--attention-tokens-graph-layers",
        "ATTNHOOK_GRAPH_LAYERS",
        str,
        "Layers that can be captured while CUDA graphs run the whole model: last, auto (default), all, or 0,14,29.",
    ),
    Flag(
        "--attention-tokens-api-key",
        "ATTNHOOK_API_KEY",
        str,
        "Key that a capturing request must bring in the header X-Attention-Key. Default: none is needed.",
    ),
)

KEY_HEADER = "x-attention-key"


class Refusal(Exception):
    """A request that this server does not serve; ``status`` is the HTTP status."""

    def __init__(self, status: int, field: str, message: str) -> None:
        super().__init__(message)
        self.status, self.field = status, field


@dataclass(frozen=True)
class Policy:
    """The guard rails of one server process."""

    allowed: bool = True
    max_concurrent: int | None = None
    fingerprint_only: bool = False
    api_key: str | None = None
    capture_all: bool = False  # every request, fingerprints only, to the sinks

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Policy:
        """Read the variables. Raises OptionError naming a bad one."""
        environ = os.environ if environ is None else environ
        limit = environ.get("ATTNHOOK_MAX_CONCURRENT", "")
        if limit and not (limit.isdecimal() and 1 <= int(limit) <= 10**6):
            raise OptionError(
                "ATTNHOOK_MAX_CONCURRENT", f"ATTNHOOK_MAX_CONCURRENT={limit!r} must be a whole number from 1 to 1000000"
            )
        everything = environ.get("ATTNHOOK_CAPTURE_ALL", "")
        if everything not in ("", "0", "fingerprint"):
            raise OptionError(
                "ATTNHOOK_CAPTURE_ALL", f"ATTNHOOK_CAPTURE_ALL={everything!r} must be 'fingerprint', or unset"
            )
        graph_layers(environ)
        return cls(
            allowed=_switch(environ, "ATTNHOOK_RETURN_ATTENTION_TOKENS", True),
            max_concurrent=int(limit) if limit else None,
            fingerprint_only=_switch(environ, "ATTNHOOK_FINGERPRINT_ONLY", False),
            api_key=environ.get("ATTNHOOK_API_KEY") or None,
            capture_all=everything == "fingerprint",
        )

    def check(self, options: RequestOptions, headers: Mapping[str, str]) -> None:
        """Raise Refusal (403) where this server does not serve these options to this client."""
        if not self.allowed:
            raise Refusal(403, ASK, f"{ASK}=true: this server forbids capture (--no-return-attention-tokens)")
        # compared in constant time, as bytes: a header may hold any character
        key = headers.get(KEY_HEADER, "")
        if self.api_key is not None and not hmac.compare_digest(key.encode(), self.api_key.encode()):
            raise Refusal(403, ASK, f"{ASK}=true: this server wants its capture key in the header X-Attention-Key")
        if self.fingerprint_only and options.mode != "fingerprint":
            raise Refusal(
                403,
                "attention_mode",
                f"attention_mode={options.mode!r}: this server gives fingerprints only; ask for 'fingerprint'",
            )

    def capabilities(self) -> dict[str, Any]:
        """The guard rails as ``GET /v1/attention/capabilities`` tells them."""
        return {
            ASK: self.allowed,
            "max_concurrent": self.max_concurrent,
            "fingerprint_only": self.fingerprint_only,
            "api_key_required": self.api_key is not None,
        }


class Gate:
    """Counts the requests that are capturing now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def enter(self, limit: int | None) -> None:
        """Take a place. Raises Refusal (429) where ``limit`` are taken."""
        with self._lock:
            if limit is not None and self.count >= limit:
                raise Refusal(
                    429, ASK, f"{ASK}=true: {limit} requests are capturing already, which is the limit; try again later"
                )
            self.count += 1

    def leave(self) -> None:
        """Give the place back."""
        with self._lock:
            self.count -= 1


def _switch(environ: Mapping[str, str], name: str, default: bool) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise OptionError(name, f"{name}={value!r} must be 0 or 1")
    return default if value == "" else value == "1"
