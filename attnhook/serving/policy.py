"""What a server allows its clients to capture: guard rails from ``ATTNHOOK_*``, which engine flags set too."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnhook.errors import OptionError
from attnhook.options import REQUEST_FIELDS, RequestOptions, graph_layers
from attnhook.serving.refusal import Refusal
from attnhook.serving.wire import ASK


@dataclass(frozen=True)
class Flag:
    """One server option: its command-line flag, variable, kind and help."""

    flag: str
    variable: str
    kind: type
    help: str
    secret: bool = False  # kept out of what an engine logs of its arguments


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
        "--attention-tokens-span-width",
        "ATTNHOOK_SPAN_WIDTH",
        int,
        "With fingerprints only, spans begin and end at multiples of so many positions. Default: 16.",
    ),
    Flag(
        "--attention-tokens-mask-prefix",
        "ATTNHOOK_MASK_PREFIX",
        int,
        "So many first positions are never reported, whatever a request asks for. Default: 0.",
    ),
    Flag(
        "--attention-tokens-max-bytes",
        "ATTNHOOK_MAX_BYTES",
        int,
        "Most bytes of attention that one request may be answered with; more is HTTP 400. Default: 16777216.",
    ),
    Flag(
        "--attention-tokens-max-bytes-in-flight",
        "ATTNHOOK_MAX_BYTES_IN_FLIGHT",
        int,
        "The same of all requests that an API server process answers now; more get HTTP 429. Default: 134217728.",
    ),
    Flag(
        "--attention-tokens-key-mass-bytes",
        "ATTNHOOK_KEY_MASS_BYTES",
        int,
        "Most bytes of memory that one request's key mass may take while it runs; more is HTTP 400. Default: 67108864.",
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
        "Key that a capturing request must bring in the header X-Attention-Key. Default: none is needed. Other users "
        "of the machine can read a command line; they cannot read the variable ATTNHOOK_API_KEY.",
        secret=True,
    ),
)

KEY_HEADER = "x-attention-key"

SPAN_WIDTH = 16  # positions
MAX_BYTES = 16 * 2**20  # of one reply
MAX_BYTES_IN_FLIGHT = 128 * 2**20
KEY_MASS_BYTES = 64 << 20


@dataclass(frozen=True)
class Policy:
    """The guard rails of one server process."""

    allowed: bool = True
    max_concurrent: int | None = None
    fingerprint_only: bool = False
    api_key: str | None = None
    capture_all: bool = False  # every request, fingerprints only, to the sinks
    mask_prefix: int = 0  # positions that are reported to nobody
    span_width: int = SPAN_WIDTH  # of which bounds of spans are multiples, with fingerprint_only
    max_bytes: int = MAX_BYTES  # JSON of one request's attention
    max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT  # of all requests that are answered now
    key_mass_bytes: int = KEY_MASS_BYTES  # of memory, of one request while it runs

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Policy:
        """Read the variables. Raises OptionError naming a bad one."""
        environ = os.environ if environ is None else environ
        everything = environ.get("ATTNHOOK_CAPTURE_ALL", "")
        if everything not in ("", "0", "fingerprint"):
            raise OptionError(
                "ATTNHOOK_CAPTURE_ALL", f"ATTNHOOK_CAPTURE_ALL={everything!r} must be 'fingerprint', or unset"
            )
        graph_layers(environ)
        return cls(
            allowed=_switch(environ, "ATTNHOOK_RETURN_ATTENTION_TOKENS", True),
            max_concurrent=_count(environ, "ATTNHOOK_MAX_CONCURRENT", 10**6, None),
            fingerprint_only=_switch(environ, "ATTNHOOK_FINGERPRINT_ONLY", False),
            api_key=environ.get("ATTNHOOK_API_KEY") or None,
            capture_all=everything == "fingerprint",
            mask_prefix=RequestOptions.resolve(environ=environ).mask_prefix,
            span_width=_count(environ, "ATTNHOOK_SPAN_WIDTH", 2**20, SPAN_WIDTH),
            max_bytes=_count(environ, "ATTNHOOK_MAX_BYTES", 2**40, MAX_BYTES),
            key_mass_bytes=_count(environ, "ATTNHOOK_KEY_MASS_BYTES", 2**40, KEY_MASS_BYTES),
            max_bytes_in_flight=_count(environ, "ATTNHOOK_MAX_BYTES_IN_FLIGHT", 2**44, MAX_BYTES_IN_FLIGHT),
        )

    def admit(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal (403) for a client that may not capture; nothing that it sent is looked at before."""
        if not self.allowed:
            raise Refusal(403, ASK, f"{ASK}=true: this server forbids capture (--no-return-attention-tokens)")
        # compared in constant time, as bytes: a header may hold any character, and servers read its bytes as Latin-1
        key = headers.get(KEY_HEADER, "")
        sent = (key.encode(), key.encode("latin-1", "replace"))
        if self.api_key is not None and not any([hmac.compare_digest(one, self.api_key.encode()) for one in sent]):
            raise Refusal(403, ASK, f"{ASK}=true: this server wants its capture key in the header X-Attention-Key")

    def apply(self, options: RequestOptions) -> RequestOptions:
        """These options as this server serves them: no position and no span lies below its prefix.

        Raises Refusal (403) for what it does not serve.
        """
        if self.fingerprint_only and options.mode != "fingerprint":
            raise Refusal(
                403,
                REQUEST_FIELDS["mode"],
                f"attention_mode={options.mode!r}: this server gives fingerprints only; ask for 'fingerprint'",
            )
        if self.fingerprint_only and options.key_mass:
            raise Refusal(
                403,
                REQUEST_FIELDS["key_mass"],
                f"attention_key_mass={options.key_mass!r}: this server gives fingerprints only, which tell of no key",
            )
        name, low = REQUEST_FIELDS["spans"], self._lowest
        spans = {}
        for label, (start, end) in options.spans.items():
            if end <= low:
                raise Refusal(
                    403,
                    name,
                    f"{name}: {label!r}: [{start}, {end}] lies below position {low}, where this server allows no span "
                    "(--attention-tokens-mask-prefix): drop it",
                )
            spans[label] = (max(start, low), end)
        return replace(options, spans=spans, mask_prefix=max(options.mask_prefix, low))

    def check_spans(self, options: RequestOptions, tokens: int | None) -> None:
        """Raise OptionError where only fingerprints may leave and spans would tell more than ``span_width`` allows.

        Bounds are multiples of it, so that neither one span nor sums of many, of one request or of several, tell the
        mass of fewer positions; the last one may be any that lies behind the request's ``tokens`` (None: not known).
        """
        width, name = self.span_width, REQUEST_FIELDS["spans"]
        if not self.fingerprint_only:
            return
        for label, (start, end) in options.spans.items():
            behind = tokens is not None and end >= tokens
            if start % width or (end % width and not behind):
                raise OptionError(
                    name,
                    f"{name}: {label!r}: [{start}, {end}]: this server gives fingerprints only: a span begins and ends "
                    f"at multiples of {width} positions (--attention-tokens-span-width), or ends behind the request's "
                    "last token",
                )

    @property
    def _lowest(self) -> int:
        """Where spans may begin: at the prefix, or where a bound that is allowed follows it."""
        width = self.span_width if self.fingerprint_only else 1
        return -(-self.mask_prefix // width) * width

    def capabilities(self) -> dict[str, Any]:
        """The guard rails as ``GET /v1/attention/capabilities`` tells them."""
        return {
            ASK: self.allowed,
            "max_concurrent": self.max_concurrent,
            "fingerprint_only": self.fingerprint_only,
            "api_key_required": self.api_key is not None,
            "mask_prefix": self.mask_prefix,
            "span_width": self.span_width if self.fingerprint_only else 1,
            "max_bytes": self.max_bytes,
            "max_bytes_in_flight": self.max_bytes_in_flight,
            "key_mass_bytes": self.key_mass_bytes,
        }


def _switch(environ: Mapping[str, str], name: str, default: bool) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise OptionError(name, f"{name}={value!r} must be 0 or 1")
    return default if value == "" else value == "1"


def _count(environ: Mapping[str, str], name: str, most: int, default: Any) -> Any:
    value = environ.get(name, "")
    if value and not (value.isascii() and value.isdecimal() and len(value) < 20 and 1 <= int(value) <= most):
        raise OptionError(name, f"{name}={value!r} must be a whole number from 1 to {most}")
    return int(value) if value else default
