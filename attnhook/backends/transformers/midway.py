"""A ``generate`` that had begun before the hooks were in place: what its own frames on the stack tell about it."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch

from attnhook.backends.transformers.places import prompts
from attnhook.backends.transformers.runs import Run
from attnhook.backends.transformers.virtual import of_generation
from attnhook.errors import UnsupportedError

#: Methods of `GenerationMixin` that decode, and what those are called whose passes cannot be captured.
DECODING = {"_sample": None, "_beam_search": "beam search", "_assisted_decoding": "assisted (speculative) decoding"}


class _Known(threading.local):
    """The generation that this thread was last found inside of, told apart by its own settings."""

    settings: weakref.ref[Any] | None = None
    run: Run | None = None


_known = _Known()


class Between(Exception):
    """A pass that a logits processor or a stopping criterion makes gives no token of the generation around it."""


def running() -> tuple[Run | None, str | None]:
    """The generation on this thread's stack, as far as it has come, or a decoding mode that cannot be captured.

    (None, None) outside of any. Raises Between, and UnsupportedError where the generation does not tell its prompt.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _between():
            raise Between
        if frame.f_code.co_name in DECODING and hasattr(frame.f_locals.get("self"), "generate"):
            mode = DECODING[frame.f_code.co_name]
            return (_run(frame), None) if mode is None else (None, mode)
        frame = frame.f_back
    return None, None


def _run(sample: FrameType) -> Run:
    """The run of a ``_sample`` call; the same one for all of its passes."""
    names = sample.f_locals
    settings, ids = names.get("generation_config"), names.get("input_ids")
    run = _known.run if _known.settings is not None and _known.settings() is settings else None
    if run is None:
        given = _prompt_length(sample)
        if given is None or not isinstance(ids, torch.Tensor):
            raise UnsupportedError(
                "generate() had begun before attnhook was on, and does not tell how long its prompt was, so its decode "
                "steps are unknown: open capture() before generate(), or call attnhook.install() first"
            )
        before = of_generation(names["self"])
        starts, wrong = prompts(names.get("model_kwargs", {}).get("attention_mask"))
        run = Run(
            choices=getattr(settings, "num_return_sequences", None) or 1,
            prompt_length=before + given if getattr(settings, "prefill_chunk_size", None) is not None else None,
            given=given,
            virtual=before,
            starts=starts,
            wrong=wrong,
        )
        _known.settings, _known.run = weakref.ref(settings), run
    run.sequences = ids
    unfinished = names.get("unfinished_sequences")
    if isinstance(unfinished, torch.Tensor):
        run.finished = unfinished == 0
    return run


def _prompt_length(frame: FrameType | None) -> int | None:
    """The length of the prompt as the ``generate`` around a ``_sample`` call knows it."""
    while frame is not None:
        if frame.f_code.co_name == "generate" and "input_ids_length" in frame.f_code.co_varnames:
            length = frame.f_locals.get("input_ids_length")
            return length if isinstance(length, int) else None
        frame = frame.f_back
    return None


@cache
def _between() -> frozenset[CodeType]:
    """The code of what calls logits processors and stopping criteria, under our hooks."""
    from transformers.generation.logits_process import LogitsProcessorList
    from transformers.generation.stopping_criteria import StoppingCriteriaList

    lists: tuple[Any, ...] = (LogitsProcessorList, StoppingCriteriaList)
    return frozenset(inspect.unwrap(one.__call__).__code__ for one in lists)
