"""Virtual tokens: what PEFT's prefix and prompt tuning have learnt and put before a text, and is none of it."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from attnhook.backends.transformers.caches import cached_tokens

logger = logging.getLogger("attnhook")


class _Made(threading.local):
    """What `PeftModel.get_prompt` gave last in this thread; the pass that gets it is the next one."""

    prompt: Any = None


_made = _Made()
_before: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # cache -> virtual tokens at its beginning
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # models of which it has been said


def note(prompt: Any) -> None:
    """Keep what PEFT has made for the next pass: embeddings ``[B, v, dim]``, or a cache of v tokens."""
    _made.prompt = prompt


def before(arguments: Mapping[str, Any], cache: Any) -> int:
    """Virtual tokens before the text of a pass with these arguments: those that it puts in, or that its cache holds."""
    prompt, _made.prompt = _made.prompt, None
    if prompt is not None and prompt is cache:
        return cached_tokens(cache)
    embeddings = arguments.get("inputs_embeds")
    if isinstance(prompt, torch.Tensor) and isinstance(embeddings, torch.Tensor):
        count = prompt.shape[1]
        begins = embeddings[:, :count]
        if begins.shape == prompt.shape and bool((begins == prompt.to(begins.dtype)).all()):
            return count
    return 0 if cache is None else _before.get(cache, 0)


def remember(model: Any, cache: Any, count: int) -> None:
    """After a pass: its cache begins with ``count`` virtual tokens. Tells so once per model."""
    if cache is not None:
        _before[cache] = count
    if model not in _told:
        _told.add(model)
        logger.warning(
            "%s: %d virtual tokens (prefix or prompt tuning) come before the text; positions are the text's own, and "
            "what goes to virtual tokens is part of fingerprints but never among the top k",
            type(model).__name__, count,
        )  # fmt: skip


def of_generation(model: Any) -> int:
    """Virtual tokens that a `generate` of ``model`` puts before its prompt, as the PeftModel that runs it says."""
    around = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    config = getattr(around, "active_peft_config", None)
    count: int = getattr(config, "num_virtual_tokens", 0) if getattr(config, "is_prompt_learning", False) else 0
    return count
