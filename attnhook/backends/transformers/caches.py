"""Finding the cache among a pass's arguments and results, and how many tokens it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnhook.errors import UnsupportedError

#: Names of a model's argument that holds the keys of earlier passes: up to Transformers 5.23, from 5.24, of old.
_CACHES = ("past_key_values", "cache", "cache_params")


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache that a pass was given, under whatever name: known by its type, else by a known name."""
    from transformers.cache_utils import Cache

    for value in arguments.values():
        if isinstance(value, Cache):
            return value
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a pass has made, in its output: a ModelOutput, a dict or a tuple."""
    from transformers.cache_utils import Cache

    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def cached_tokens(cache: Any) -> int:
    """Tokens that earlier passes left in the cache."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        if "Paged" in type(cache).__name__:
            raise continuous_batching()
        raise UnsupportedError(
            f"past_key_values is a {type(cache).__name__}, which does not tell its length; pass a Transformers Cache"
        )
    return int(cache.get_seq_length())


def continuous_batching() -> UnsupportedError:
    """Why passes over a paged cache are refused."""
    return UnsupportedError(
        "continuous batching (generate_batch, a ContinuousBatchingManager, cache_implementation='paged') cannot be "
        "captured in Transformers, whose passes mix pieces of many texts: call generate() with a padded batch"
    )
