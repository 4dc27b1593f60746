"""Why a model, or a row of it, cannot be captured: what is true of it, found in the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attnhook.errors import UnsupportedError


def generates(model: Any) -> bool:
    """Whether tokens are sampled from a model: it has a head for it."""
    return bool(getattr(model, "can_generate", bool)())


def encoder_decoder(model: Any) -> UnsupportedError:
    """Why a model of two halves is refused."""
    return UnsupportedError(
        f"{type(model).__name__} is an encoder-decoder model, whose decoder attends to two sequences, and only "
        "decoder-only models can be captured: where one runs too, name it with capture(model=...)"
    )


def unseen(model: Any, seen: Mapping[type, bool]) -> tuple[UnsupportedError, bool]:
    """Why a pass of ``model`` had nothing to capture, and whether it is a decoder, whose rows are missing then.

    ``seen`` are the classes of the modules whose attention was seen, and whether it was causal: it is no decoder
    layer's. What is no decoder - an encoder, a vision tower, a network without attention - has no rows of ours.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and (generates(model) or not seen):
        return encoder_decoder(model), True
    own = _own_attention(model, seen)
    if own and (not seen or generates(model)):
        beside = f"; only that of {_names(seen)}, beside it, goes through it" if seen else ""
        return UnsupportedError(
            f"{name} computes its attention in its own code ({_names(own)}), not through Transformers' attention "
            f"interface, so it cannot be captured{beside}"
        ), generates(model) or _predicts_tokens(config)
    if seen and generates(model):
        return UnsupportedError(
            f"{name} generates text, but its attention ({_names(seen)}) does not say that it is causal (is_causal), or "
            "of which layer it is (layer_idx), so it cannot be captured"
        ), True
    if any(seen.values()):
        return UnsupportedError(
            f"{name} does not generate text, and its attention ({_names(seen)}) does not say of which layer it is: it "
            "is an encoder, and only decoders can be captured; where it runs beside one, it is left alone"
        ), False
    if seen:
        return UnsupportedError(
            f"{name} made no causal attention call: it is an encoder or a vision tower ({_names(seen)} attends in both "
            "directions), and only decoders can be captured; where it runs beside one, it is left alone"
        ), False
    return UnsupportedError(f"{name} has no attention, so there is nothing to capture"), False


def refuse_compressed(module: Any) -> None:
    """Refuse an attention module whose keys are not one per token. Raises UnsupportedError."""
    if getattr(module, "compressor", None) is not None:
        raise UnsupportedError(
            f"{type(module).__name__} (layer {module.layer_idx}) attends to compressed keys, each of which stands for "
            "several tokens, so there is no probability per token; capture layers without them (layers=[...])"
        )


def sparse(module: Any) -> str | None:
    """Why an attention module's rows see keys with holes between them, where the module tells; else None."""
    limit = getattr(getattr(module, "config", None), "index_topk", None)
    if limit is None and not hasattr(module, "indexer"):
        return None
    most = "" if limit is None else f", as long as they are at most {limit} (index_topk)"
    return (
        f"{type(module).__name__} (layer {module.layer_idx}) is sparse: an indexer picks the keys that each row sees, "
        f"so they are no unbroken range; rows that see all of their keys can be captured{most}"
    )


def _names(classes: Iterable[type]) -> str:
    return ", ".join(sorted(found.__name__ for found in classes)[:3])


def _own_attention(model: Any, seen: Mapping[type, bool]) -> set[type]:
    """Classes of a model's innermost modules that are called attention, without those that were seen."""
    modules = [module for module in model.modules() if _called_attention(module)]
    inner = [m for m in modules if not any(part is not m and _called_attention(part) for part in m.modules())]
    return {type(module) for module in inner} - seen.keys()


def _called_attention(module: Any) -> bool:
    return "attention" in type(module).__name__.lower()


def _predicts_tokens(config: Any) -> bool:
    """Whether Transformers knows this kind of model as a language model that predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(config, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
