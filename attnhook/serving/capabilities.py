"""What ``GET /v1/attention/capabilities`` answers."""

from __future__ import annotations

from typing import Any

from attnhook import __version__
from attnhook.options import KEY_MASS, PER_HEAD, TOP_K_MAX, RequestOptions
from attnhook.record.fingerprint import BIN_STARTS, NAMES
from attnhook.record.fingerprint import SCHEMA_VERSION as FINGERPRINT_VERSION
from attnhook.record.row import MODES, SCHEMA_VERSION, TOP_K_PER_HEAD_MAX
from attnhook.serving.policy import Policy


def attention_layers(config: Any) -> list[int] | None:
    """Numbers of the attention layers, from a text model's Hugging Face configuration; None where it does not tell."""
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None)
    if kinds:
        # "hybrid" layers have both, as in Zamba2
        return [n for n, kind in enumerate(kinds) if kind == "hybrid" or ("attention" in kind and "linear" not in kind)]
    count = getattr(config, "num_hidden_layers", None)
    mixed = getattr(config, "full_attention_interval", None)  # and no list of which is which
    return None if count is None or mixed else list(range(count))


def capabilities(
    engine: str,
    version: str | None,
    model: str,
    layers: list[int] | None,
    heads: int | None,
    policy: Policy,
    *,
    dtype: str | None = None,
    device: str | None = None,
    generates: bool = True,
    key_mass: bool = False,
) -> dict[str, Any]:
    """The answer, with plain JSON values; ``layers``, ``heads``, ``dtype`` (of the model, such as "bfloat16")
    and ``device`` ("cpu", "cuda") are None where the front end can't tell. A model that ``generates`` no tokens has no
    rows to capture, and one without attention no layers."""
    defaults = RequestOptions.resolve()
    return {
        "attnhook": __version__,
        "engine": {"name": engine, "version": version},
        "model": model,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": {"schema_version": FINGERPRINT_VERSION, "names": list(NAMES), "bin_starts": list(BIN_STARTS)},
        "generates": generates,
        "modes": ["fingerprint"] if policy.fingerprint_only else list(MODES),
        "layers": layers if generates else [],
        "query_heads": heads,
        "dtype": dtype,
        "device": device,
        "top_k": {"default": defaults.top_k, "max": TOP_K_MAX},
        "per_head": [] if policy.fingerprint_only else list(PER_HEAD),
        "key_mass": [] if policy.fingerprint_only or not key_mass else list(KEY_MASS),
        "top_k_per_head": {"default": defaults.top_k_per_head, "max": TOP_K_PER_HEAD_MAX},
        "default_layers": defaults.layers if isinstance(defaults.layers, str) else list(defaults.layers),
        "limits": policy.capabilities(),
    }
