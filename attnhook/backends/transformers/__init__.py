"""Hugging Face Transformers: capture through its own attention interface registry.

sdpa, flash attention and flex attention stay in use; eager attention is never needed. `hooks` holds the
patched functions, `frames` knows which rows a forward pass computes, `masks` which keys they see.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import wrapt

from attnhook.backends.patching import Patches
from attnhook.errors import UnsupportedError
from attnhook.options import CaptureOptions

_lock = threading.RLock()
_live: set[Any] = set()
_watched: set[str] = set()  # modules whose import wrapt reports to us


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

    def install(self, options: CaptureOptions) -> TransformersInstallation:
        """Patch Transformers now if it is imported, else when it is. Raises UnsupportedError."""
        installation = TransformersInstallation(self.version())
        with _lock:
            try:
                installation.catch_up()
                _live.add(installation)
                for module in _PATCHERS.keys() - _watched:
                    # wrapt keeps such a hook for good; it does nothing once no installation is live
                    _watched.add(module)
                    wrapt.register_post_import_hook(_imported, module)
            except BaseException:
                installation.uninstall()
                raise
        return installation


class TransformersInstallation:
    """Patches of one `TransformersBackend.install`."""

    def __init__(self, version: str | None) -> None:
        self.version = version
        self.patches = Patches()
        self._patched: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether transformers has been imported and patched."""
        return bool(self._patched)

    def describe(self) -> dict[str, str]:
        """Hook point -> state."""
        if not self.active:
            return {module: "waits for the import" for module in _PATCHERS}
        return dict.fromkeys(self.patches.names(), "patched")

    def uninstall(self) -> None:
        """Undo every patch."""
        with _lock:
            _live.discard(self)
            self.patches.undo()
            self._patched.clear()

    def catch_up(self) -> None:
        """Patch the modules that are imported already."""
        import sys

        for module in _PATCHERS:
            if module in sys.modules:
                self.patch(sys.modules[module])

    def patch(self, module: ModuleType) -> None:
        """Patch one module of transformers, once."""
        name = module.__name__
        if name not in self._patched:
            _PATCHERS[name](self, module)
            self._patched.add(name)

    def _need(self, owner: Any, name: str) -> Any:
        if not hasattr(owner, name):
            where = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
            raise UnsupportedError(
                f"transformers {self.version}: {where}.{name} was not found, so its attention cannot be captured; "
                "attnhook needs transformers 5.x (tested with 5.19): pip install 'transformers>=5.16,<5.20'"
            )
        return getattr(owner, name)

    def _patch_modeling(self, module: ModuleType) -> None:
        hooks = import_module("attnhook.backends.transformers.hooks")
        model = self._need(module, "PreTrainedModel")
        interface = self._need(module, "AttentionInterface")
        self.patches.set(interface, "get_interface", hooks.observing_interface(self._need(interface, "get_interface")))
        self.patches.set(model, "__call__", hooks.observing_call(model.__call__))
        hooks.forget_compiled_code()

    def _patch_generation(self, module: ModuleType) -> None:
        hooks = import_module("attnhook.backends.transformers.hooks")
        mixin = self._need(module, "GenerationMixin")
        self.patches.set(mixin, "_sample", hooks.observing_sample(self._need(mixin, "_sample")))
        self.patches.set(
            mixin,
            "_valid_auto_compile_criteria",
            hooks.eager_while_capturing(self._need(mixin, "_valid_auto_compile_criteria")),
        )
        for name, mode in _REFUSED_DECODING.items():
            if hasattr(mixin, name):
                self.patches.set(mixin, name, hooks.refusing_decoding(getattr(mixin, name), mode))

    def _patch_stopping(self, module: ModuleType) -> None:
        hooks = import_module("attnhook.backends.transformers.hooks")
        criteria = self._need(module, "StoppingCriteriaList")
        self.patches.set(criteria, "__call__", hooks.observing_stop(criteria.__call__))


_PATCHERS: dict[str, Callable[[TransformersInstallation, ModuleType], None]] = {
    "transformers.modeling_utils": TransformersInstallation._patch_modeling,
    "transformers.generation.utils": TransformersInstallation._patch_generation,
    "transformers.generation.stopping_criteria": TransformersInstallation._patch_stopping,
}
_REFUSED_DECODING = {
    "_beam_search": "beam search",
    "_assisted_decoding": "assisted (speculative) decoding",
}


def _imported(module: ModuleType) -> None:
    with _lock:
        for installation in list(_live):
            installation.patch(module)
