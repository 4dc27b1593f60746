"""Names that a package gives out and that live in modules: found when they are asked for, so that importing the
package stays light."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from attnhook.system import moved


def names(package: str, homes: Mapping[str, str], older: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """``__getattr__`` of a package that gives out names: name -> module below ``attnhook.``, or ``module:its_name``.

    ``older`` are names that go in the next release: they work, with a DeprecationWarning.
    """

    def __getattr__(name: str) -> Any:
        if name in homes:
            home, _, own = homes[name].partition(":")
            return getattr(import_module(f"attnhook.{home}"), own or name)
        if older is None or name not in older:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        moved.warn(f"{package}.{name}", f"attnhook.{older[name]}.{name}")
        return getattr(import_module(f"attnhook.{older[name]}"), name)

    return __getattr__
