"""Where a model is, and what it can be asked for, known before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnhook.backends.transformers import bos, default_model
from attnhook.errors import AttnhookError, OptionError, needs, require
from attnhook.options import Heads, LayerSpec, check_heads, resolve_choice

WHAT = "a model in this process"  # what needs the extra


@dataclass(frozen=True)
class Place:
    """A model as Transformers is to be asked for it."""

    shown: str  # as messages name it
    where: str  # a folder or a hub id
    gguf: str | None = None  # name of the .gguf file in that folder

    @property
    def arguments(self) -> dict[str, str]:
        """What ``from_pretrained`` takes beside ``where``."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what damaged and missing files make Transformers raise into OptionError with the remedy."""
        try:
            yield
        except AttnhookError:
            raise
        except Exception as error:  # Transformers, safetensors and tokenizers raise anything
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise OptionError(
                "model",
                f"model {self.shown!r} cannot be loaded: {cause[:300]}; give a folder in Transformers' format, a .gguf "
                "file, or the id of a model that is on the hub or in its local cache",
            ) from error


def find(model: str | Path) -> Place:
    """The place that a person named. Raises OptionError where a path is given and no model is there."""
    place = os.path.expanduser(model)
    if place.startswith((".", os.path.sep)) and not os.path.exists(place):
        raise OptionError("model", f"model {place!r} does not exist: give a folder, a .gguf file or a hub id")
    if place.endswith(".gguf"):
        return Place(place, str(Path(place).parent), Path(place).name)
    if os.path.isdir(place) and not os.path.isfile(os.path.join(place, "config.json")):
        raise OptionError("model", f"model {place!r} has no config.json, so it is not a folder in Transformers' format")
    return Place(place, place)


def work(model: str | None) -> str:
    """What loading the model is, for a person who waits: the default model is converted the first time."""
    if model is None and default_model.source().suffix == ".gguf":
        return "converting the default model, which is done once, and loading it"
    return "loading the model"


@dataclass(frozen=True)
class Limits:
    """What a model's config says of its size; None where it says nothing."""

    layers: int | None  # all of them, those without attention too
    heads: int | None  # query heads of the layer that has most
    context: int | None  # tokens of prompt and answer

    def check(self, layers: LayerSpec, heads: Heads, max_new_tokens: int) -> None:
        """Raise OptionError for what this model cannot have, whatever its weights are.

        A layer without attention, or a head of a layer that has fewer, only shows when the model runs.
        """
        if isinstance(layers, tuple) and self.layers is not None:
            resolve_choice(layers, heads, range(self.layers), ("--layers", "--heads"))
        if self.heads is not None:
            check_heads(heads, self.heads, "--heads")
        if self.context is not None and max_new_tokens >= self.context:
            raise OptionError(
                "max_new_tokens",
                f"{max_new_tokens} new tokens and a prompt are more than the model's context of {self.context}: "
                f"ask for fewer than {self.context}",
            )


def limits(model: str | None) -> Limits:
    """The limits of a hub id, a folder, a ``.gguf`` file or the default model (None), which is not converted for it.

    Reads the config, or the header of the GGUF file, and no weights. Raises OptionError where it cannot be read,
    PluginError where Transformers or the default model is not installed.
    """
    place = find(default_model.source() if model is None else model)
    if place.gguf is not None:
        return _of_header(bos.read_header(os.path.join(place.where, place.gguf)))
    require(WHAT, "transformers", "torch", "transformers")  # without torch, Transformers prints a page before it fails
    with needs(WHAT, "transformers"):
        from transformers import AutoConfig
    with place.reading():
        config = AutoConfig.from_pretrained(place.where)
    return of_config(config)


def of_config(config: Any) -> Limits:
    """The limits that a Transformers config tells."""
    text = config.get_text_config()
    # some models name other heads for some of their layers
    heads = [_most(value) for name, value in text.to_dict().items() if "attention_heads" in name]
    return Limits(
        layers=_most(getattr(text, "num_hidden_layers", None)),
        heads=max([_most(getattr(text, "num_attention_heads", None)) or 0, *(count or 0 for count in heads)]) or None,
        context=_most(getattr(text, "max_position_embeddings", None)),
    )


def _of_header(header: dict[str, Any]) -> Limits:
    kind = header.get("general.architecture")
    return Limits(
        layers=_most(header.get(f"{kind}.block_count")),
        heads=_most(header.get(f"{kind}.attention.head_count")),
        context=_most(header.get(f"{kind}.context_length")),
    )


def _most(value: Any) -> int | None:
    """The largest whole number above 0 in ``value``, a number or a list of one for each layer."""
    numbers = value if isinstance(value, list | tuple) else [value]
    found = [one for one in numbers if isinstance(one, int) and not isinstance(one, bool) and one > 0]
    return max(found, default=None)
