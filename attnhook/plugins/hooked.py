"""A backend whose engine is captured through a table of hooks."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from attnhook.options import CaptureOptions
from attnhook.plugins.hooks import Hooks
from attnhook.plugins.patching import EngineInstallation


class HookedBackend:
    """What the built-in backends share; see `attnhook.plugins.contracts.Backend`."""

    name: str
    modules: tuple[str, ...]  #: that must be there to capture
    distributions: tuple[str, ...]  #: that tell the engine's version, the first that is installed
    hooks: Hooks

    def available(self) -> bool:
        """Whether the engine can be imported, found out without importing it."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def version(self) -> str | None:
        """Version of the installed engine, or None."""
        for distribution in self.distributions:
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return None

    def models_in(self, target: object) -> tuple[object, ...]:
        """None: a server engine captures by request, not by model."""
        return ()

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """Patch the engine's modules now if they are imported, else when they are. Raises UnsupportedError."""
        installation = EngineInstallation(self.name, self.version(), self.hooks.patchers(), self.hooks.wanted)
        installation.start()
        return installation
