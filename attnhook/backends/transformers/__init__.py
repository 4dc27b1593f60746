"""Hugging Face Transformers: capture through its own attention interface registry.

sdpa, flash attention and flex attention stay in use; eager attention is never needed. `hooks` holds the
patched functions, `frames` knows which rows a forward pass computes, `masks` which keys they see.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from importlib import import_module, metadata
from types import ModuleType

from attnhook.options import CaptureOptions
from attnhook.plugins.patching import EngineInstallation


class TransformersBackend:
    """The backend object that the plugin registers."""

    name = "transformers"

    def available(self) -> bool:
        """Whether transformers and torch can be imported, found out without importing them."""
        return all(importlib.util.find_spec(module) is not None for module in ("transformers", "torch"))

    def version(self) -> str | None:
        """Installed version of transformers, or None."""
        try:
            return metadata.version("transformers")
        except metadata.PackageNotFoundError:
            return None

    def models_in(self, target: object) -> tuple[object, ...]:
        """The models of Transformers that an object is or wraps."""
        from attnhook.backends.transformers.wrappers import models_in

        return models_in(target)

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """Patch Transformers now if it is imported, else when it is. Raises UnsupportedError."""
        installation = EngineInstallation(
            self.name,
            self.version(),
            _PATCHERS,
            "transformers 5.16 to 5.24: pip install 'transformers>=5.16,<5.25'",
        )
        installation.start()
        return installation


def _patch_modeling(installation: EngineInstallation, module: ModuleType) -> None:
    hooks = import_module("attnhook.backends.transformers.hooks")
    installation.wrap(installation.need(module, "AttentionInterface"), "get_interface", hooks.observing_interface)
    installation.wrap(installation.need(module, "PreTrainedModel"), "__call__", hooks.observing_call)
    hooks.forget_compiled_code()


def _patch_generation(installation: EngineInstallation, module: ModuleType) -> None:
    hooks = import_module("attnhook.backends.transformers.hooks")
    mixin = installation.need(module, "GenerationMixin")
    installation.wrap(mixin, "generate", hooks.observing_generate)
    installation.wrap(mixin, "_sample", hooks.observing_sample)
    if hasattr(mixin, "generate_batch"):
        installation.wrap(mixin, "generate_batch", hooks.refusing_batches)
    installation.wrap(mixin, "_valid_auto_compile_criteria", hooks.eager_while_capturing)
    for name, mode in _REFUSED_DECODING.items():
        if hasattr(mixin, name):
            installation.wrap(mixin, name, partial(hooks.refusing_decoding, mode=mode))


def _patch_stopping(installation: EngineInstallation, module: ModuleType) -> None:
    hooks = import_module("attnhook.backends.transformers.hooks")
    installation.wrap(installation.need(module, "StoppingCriteriaList"), "__call__", hooks.observing_stop)


def _patch_processors(installation: EngineInstallation, module: ModuleType) -> None:
    hooks = import_module("attnhook.backends.transformers.hooks")
    installation.wrap(installation.need(module, "LogitsProcessorList"), "__call__", hooks.observing_processors)


def _patch_caches(installation: EngineInstallation, module: ModuleType) -> None:
    hooks = import_module("attnhook.backends.transformers.hooks")
    cache = installation.need(module, "Cache")
    for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"):
        if hasattr(cache, name):
            installation.wrap(cache, name, hooks.observing_rearrangement)


def _patch_peft(installation: EngineInstallation, module: ModuleType) -> None:
    hooks = import_module("attnhook.backends.transformers.hooks")
    model = getattr(module, "PeftModel", None)
    if hasattr(model, "get_prompt"):  # what other releases do without it is told by their masks and lengths
        installation.wrap(model, "get_prompt", hooks.observing_prompt)


_PATCHERS = {
    "transformers.modeling_utils": _patch_modeling,
    "transformers.generation.utils": _patch_generation,
    "transformers.generation.stopping_criteria": _patch_stopping,
    "transformers.generation.logits_process": _patch_processors,
    "transformers.cache_utils": _patch_caches,
    "peft.peft_model": _patch_peft,
}
_REFUSED_DECODING = {
    "_beam_search": "beam search",
    "_assisted_decoding": "assisted (speculative) decoding",
}
