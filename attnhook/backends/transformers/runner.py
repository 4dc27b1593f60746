"""Run a prompt through a Transformers model with capture on: what ``attnhook run`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnhook.backends.transformers import bos, model_files
from attnhook.backends.transformers.default_model import NAME, default_model_path
from attnhook.errors import OptionError, needs, require
from attnhook.process.capturing import capture
from attnhook.record.answer import SINK, Answer
from attnhook.record.pieces import pieces
from attnhook.record.without_sink import without_sink

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer; ``bos`` is the token that every text begins with by its GGUF file, if there is one.

    Make token ids with `encode_text` and `encode_chat`: the tokenizer by itself may leave that token out.
    """

    model: Any
    tokenizer: Any
    name: str
    bos: int | None = None
    limits: model_files.Limits | None = None  # what was known of the model before it was loaded

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer adds, and ``bos`` in front exactly once."""
        return bos.once(self.tokenizer(text)["input_ids"], self.bos)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """Token ids of a chat up to where the answer begins, likewise; None where the model has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return bos.once(ids["input_ids"], self.bos)

    @property
    def context(self) -> int | None:
        """Most tokens that prompt and answer may have together, where the model says so."""
        if self.model is None:
            return None if self.limits is None else self.limits.context
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load(
    model: str | None,
    dtype: str = "auto",
    device: str | None = None,
    *,
    before: Callable[[Loaded], object] = lambda loaded: None,
) -> Loaded:
    """Load a hub id, a folder, a ``.gguf`` file, or the default model (None).

    ``before`` is called before the weights are read, with a `Loaded` that has no model yet; what it raises ends the
    loading. Raises OptionError where ``model``, ``dtype`` or ``device`` cannot be used; the message says why.
    """
    check_dtype(dtype)
    require(model_files.WHAT, "transformers", "torch", "transformers")
    with needs(model_files.WHAT, "transformers"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _usable(device):
        torch.empty(0, device=where)
    place = model_files.find(default_model_path() if model is None else model)
    logging.disable_progress_bar()  # the command line draws its own
    with place.reading():
        tokenizer = AutoTokenizer.from_pretrained(place.where, **place.arguments)
    first = None if place.gguf is None else bos.token(bos.read_header(place.shown), tokenizer)
    name = NAME if model is None else os.path.basename(os.path.normpath(place.shown))
    loaded = Loaded(None, tokenizer, name, first, model_files.limits(place.shown))
    before(loaded)
    with place.reading():
        weights = AutoModelForCausalLM.from_pretrained(
            place.where, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **place.arguments
        )
    with _usable(device):
        return replace(loaded, model=weights.to(where).eval())


def check_dtype(dtype: str) -> None:
    """Raise OptionError unless it is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise OptionError("dtype", f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")


@contextmanager
def _usable(device: str | None) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        cause = " ".join(str(error).split())
        raise OptionError("device", f"device={device!r} cannot be used: {cause[:200]}; try --device cpu") from error


def encode(loaded: Loaded, prompt: str, *, chat: bool, max_new_tokens: int) -> list[int]:
    """Token ids of the prompt, in the model's chat template if it has one and ``chat`` is set.

    Raises OptionError for an empty prompt and for one that leaves no room in the context.
    """
    if not prompt.strip():
        raise OptionError("prompt", "the prompt is empty: give some text with --prompt or --file")
    ids = loaded.encode_chat([{"role": "user", "content": prompt}]) if chat else None
    if ids is None:
        ids = loaded.encode_text(prompt)
    if ids in ([], [loaded.bos]):
        raise OptionError(
            "prompt", f"the model's tokenizer makes no token of the prompt {prompt[:40]!r}: give other text"
        )
    context = loaded.context
    if context is not None and len(ids) + max_new_tokens > context:
        raise OptionError(
            "prompt",
            f"the prompt has {len(ids)} tokens; with {max_new_tokens} new ones that is more than the model's context "
            f"of {context}: shorten the prompt or lower --max-new-tokens",
        )
    return ids


def answer(
    loaded: Loaded,
    ids: list[int],
    *,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> Answer:
    """Generate greedily with capture on; ``progress`` is told the number of new tokens so far.

    Raises OptionError or UnsupportedError as `attnhook.capture` does.
    """
    with capture(model=loaded.model, spans={SINK: (0, 1)}, **options) as records:
        output = generate(loaded, ids, max_new_tokens, streamer=_Progress(progress))
    token_ids = output[0].tolist()
    return Answer(
        model=loaded.name,
        token_ids=token_ids,
        tokens=pieces(loaded.tokenizer, token_ids),
        prompt_length=len(ids),
        text=loaded.tokenizer.decode(token_ids[len(ids) :], skip_special_tokens=True),
        records=list(records),
        zones=without_sink(records, SINK),
        dropped=dict(records.dropped),
        key_mass=next(iter(records.key_mass.values()), None),
    )


def generate(loaded: Loaded, ids: list[int], max_new_tokens: int, **settings: Any) -> torch.Tensor:
    """Token ids int64 ``[1, n]`` of the prompt and its greedy continuation; ``settings`` go to ``generate``."""
    import torch

    inputs = torch.tensor([ids], device=loaded.model.device)
    output: torch.Tensor = loaded.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,  # a model's own settings may ask for more
        num_return_sequences=1,
        pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
        **settings,
    )
    return output


class _Progress:
    """A streamer (Transformers' interface: put, end) that only counts."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._count = -1  # the first put is the prompt

    def put(self, value: Any) -> None:
        self._count += 1
        self._report(self._count)

    def end(self) -> None:
        pass
