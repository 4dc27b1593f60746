"""Transformers models inside what people wrap them in: PEFT, torch.compile, DataParallel, own modules, pipelines."""

from __future__ import annotations

import sys
from typing import Any


def models_in(target: Any) -> tuple[Any, ...]:
    """The outermost PreTrainedModels that ``target`` is or holds; empty where it holds none. Imports nothing."""
    torch, modeling = sys.modules.get("torch"), sys.modules.get("transformers.modeling_utils")
    if torch is None or modeling is None:
        return ()
    if not isinstance(target, torch.nn.Module):
        inner = getattr(target, "model", None)  # a pipeline's
        return models_in(inner) if isinstance(inner, torch.nn.Module) else ()
    found: list[Any] = []
    inside: set[int] = set()
    for module in target.modules():  # what is around comes before what is in it
        if isinstance(module, modeling.PreTrainedModel) and id(module) not in inside:
            found.append(module)
            inside.update(id(part) for part in module.modules())
    return tuple(found)
