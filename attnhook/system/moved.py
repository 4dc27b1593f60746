"""Names that modules had before they were put into rooms: they work until 0.2, with a DeprecationWarning.

Imported with the package itself, so it imports next to nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

#: Old name -> new name, both below ``attnhook.``.
MODULES: Mapping[str, str] = {
    "addresses": "system.addresses",
    "analysis.periodicity": "record.periodicity",
    "backends.patching": "plugins.patching",
    "backends.rebuild": "capture.rebuild",
    "delivery": "sinks.delivery",
    "fingerprint": "record.fingerprint",
    "frames": "sinks.frames",
    "hookspecs": "plugins.hookspecs",
    "kernels.topk.compiled": "kernels.topk.numba",
    "kernels.topk.cpu": "kernels.topk.torch",
    "lifecycle": "process.lifecycle",
    "metrics": "sinks.metrics",
    "monitor": "collector.monitor",
    "records": "record.token_record",
    "rowblock": "record.block",
    "rowledger": "capture.ledger",
    "servercheck": "verify.server",
    "serving.ranks": "capture.ranks",
    "sinks.columns": "record.columns",
    "switch": "system.switch",
    "tally": "record.tally",
    "tokens": "record.tokens",
}


class _Finder:
    """Behind Python's own finders, which find everything that is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != "attnhook" or rest not in MODULES:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, _Loader(f"attnhook.{MODULES[rest]}"))  # type: ignore[arg-type]


class _Loader:
    """Gives the module that has the new name, as it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from importlib import import_module

        warn(spec.name, self._name)
        module = import_module(self._name)
        self._own = module.__spec__  # which Python is about to replace
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


def names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a module that had these names: name -> the module below ``attnhook.`` where it is now.

    ``module:new`` where its name is another one too.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        home, _, new = homes[name].partition(":")
        warn(f"{package}.{name}", f"attnhook.{home}.{new or name}")
        return getattr(import_module(f"attnhook.{home}"), new or name)

    return __getattr__


def warn(old: str, new: str) -> None:
    """Tell whoever uses an old name, two calls up from here, what it is called now."""
    import warnings

    # level 3: whoever imports it, since Python passes over the frames of its import system
    warnings.warn(f"{old} is {new} now; the old name goes in attnhook 0.2", DeprecationWarning, stacklevel=3)


def watch() -> None:
    """Find modules by their old names from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
