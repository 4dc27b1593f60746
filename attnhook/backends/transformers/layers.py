"""A model's attention modules: which are a decoder's, and their layer numbers."""

from __future__ import annotations

import weakref
from typing import Any

from attnhook.errors import UnsupportedError


def attention_layers(model: Any) -> list[int]:
    """Layer numbers of a model's causal self-attention modules. Raises UnsupportedError if it has none."""
    found = _layers.get(model)
    if found is None:
        name = type(model).__name__
        numbers = _numbered(model)
        found = sorted(set(numbers.values()))
        if not found:
            raise UnsupportedError(
                f"{name} has no causal attention that goes through Transformers' attention interface, so it cannot be "
                "captured; models of the Llama, Qwen, Gemma, Mistral, GPT-2, ... families can"
            )
        _layers[model], _numbers[model] = found, numbers
    return found


_layers: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
_numbers: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()  # id of a module -> its layer


def layer_number(model: Any, module: Any) -> int:
    """The layer of a model's attention module; -1 for one that is none of its causal ones."""
    attention_layers(model)
    return _numbers[model].get(id(module), -1)


def _numbered(model: Any) -> dict[int, int]:
    """Each causal attention module's layer: its own number where these are distinct, else that of its place.

    Raises UnsupportedError where neither tells the layers apart.
    """
    places: dict[int, list[str]] = {}
    modules: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_causal_attention(module):
            modules[id(module)] = module
            places.setdefault(id(module), []).append(name)
    own = {key: int(module.layer_idx) for key, module in modules.items()}
    shared = [names for names in places.values() if len(names) > 1]
    if len(set(own.values())) == len(own) and min(own.values(), default=0) >= 0:
        return own
    if shared:
        raise UnsupportedError(
            f"{type(model).__name__} uses one attention module in several layers ({', '.join(shared[0][:3])}), whose "
            "records could not be told apart, so it cannot be captured"
        )
    by_place = {key: _first_number(names[0]) for key, names in places.items()}
    if None in by_place.values() or len(set(by_place.values())) < len(by_place):
        raise UnsupportedError(
            f"{type(model).__name__} gives several attention modules the same layer number "
            f"({sorted(own.values())[:6]}), and their places in the model do not tell them apart either, so it cannot "
            "be captured"
        )
    return {key: number for key, number in by_place.items() if number is not None}


def _first_number(name: str) -> int | None:
    """The 2 of "model.layers.2.shared_transformer.self_attn"."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_causal_attention(module: Any) -> bool:
    """Whether a module is a decoder layer's self-attention, of a prefix language model too (PaliGemma).

    There tokens of a prefix see later ones, and generated rows are causal. Encoders may be of the same classes: who
    asks must know that the model generates.
    """
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and (bool(getattr(module, "is_causal", False)) or sees_a_prefix(module))
        and not getattr(module, "is_cross_attention", False)
    )


def sees_a_prefix(module: Any) -> bool:
    """Whether an attention module that is not causal by itself is of a kind that decoders with a prefix have."""
    bidirectional = getattr(getattr(module, "config", None), "use_bidirectional_attention", None)
    return bidirectional is True and not getattr(module, "is_causal", False)
