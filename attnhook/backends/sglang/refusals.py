"""Ways to run SGLang in which capture would be wrong or silent: refused by name before the server is up."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from attnhook.errors import UnsupportedError

# server argument: (what it makes of the engine, whether a value is refused, remedy)
_ARGUMENTS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "attn_cp_size": ("context parallelism", lambda size: size > 1, "--attn-cp-size 1"),
    "dcp_size": ("context parallelism in decoding", lambda size: size > 1, "--dcp-size 1"),
    "enable_dp_attention": ("data-parallel attention", bool, "no --enable-dp-attention (plain --dp-size works)"),
    "attn_dp_size": ("data-parallel attention", lambda size: size > 1, "--attn-dp-size 1 (plain --dp-size works)"),
    "speculative_algorithm": (
        "speculative decoding",
        lambda name: name not in (None, "", "NONE"),
        "no --speculative-algorithm",
    ),
    "disaggregation_mode": (
        "prefill/decode disaggregation",
        lambda mode: mode not in (None, "null"),
        "--disaggregation-mode null",
    ),
    "enable_two_batch_overlap": ("two-batch overlap", bool, "no --enable-two-batch-overlap"),
    "enable_pdmux": ("prefill and decode side by side", bool, "no --enable-pdmux"),
    "enable_hisparse": ("hierarchical sparse attention", bool, "no --enable-hisparse"),
    "enable_encoder_swa_bounded_replay": ("replayed rows", bool, "no --enable-encoder-swa-bounded-replay"),
    "enable_decoder_swa_bounded_replay": ("replayed rows", bool, "no --enable-decoder-swa-bounded-replay"),
    "dllm_algorithm": ("a diffusion language model", bool, "no --dllm-algorithm"),
    "grpc_mode": ("a gRPC front end", bool, "the HTTP server"),
    "smg_grpc_mode": ("a gRPC front end", bool, "the HTTP server"),
}


def check(arguments: Any) -> None:
    """Raise UnsupportedError naming a server argument that does not go with capture, its value and the remedy."""
    for name, (what, refused, remedy) in _ARGUMENTS.items():
        value = getattr(arguments, name, None)
        if value is not None and refused(value):
            raise UnsupportedError(
                f"SGLang with {what} ({name}={value!r}) cannot be captured: start with {remedy}, or without ATTNHOOK=1"
            )
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        raise UnsupportedError(
            "SGLang's Rust front end (SGLANG_RUST_SERVER) cannot carry attention: unset it, or start without ATTNHOOK=1"
        )
    workers = getattr(arguments, "tokenizer_worker_num", 1) or 1
    if workers > 1 and "attnhook.process.startup" not in sys.modules:
        raise UnsupportedError(
            f"tokenizer_worker_num={workers}: SGLang loads no plugins in its extra HTTP workers, and attnhook.pth, "
            "which would, is not in this environment's site-packages: reinstall attnhook there, or start with "
            "--tokenizer-worker-num 1"
        )
