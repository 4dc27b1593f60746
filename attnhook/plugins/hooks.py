"""The table of an adapter's hooks: which of its functions goes around which place of the engine.

Releases of an engine move things, so a hook may have several places, the newest first, of which the first that is there
is taken. No version is asked for its number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from importlib import import_module
from types import ModuleType
from typing import Any

from attnhook.errors import UnsupportedError
from attnhook.plugins.patching import EngineInstallation

#: Attribute of what is put in place, so that `Hooks.check_in_place` knows it.
MARK = "_attnhook_hook"


@dataclass(frozen=True)
class Hook:
    """One wrapper and its place.

    ``wrapper`` is ``file.function`` of the adapter's package; the function takes the engine's attribute and gives what
    takes its place. A place is ``module:attribute`` or ``module:Class.attribute``.
    """

    wrapper: str
    places: tuple[str, ...]
    #: A name in the same module by which a newer release shows that it needs this hook no more.
    unless: str = ""
    #: Whether it is an error where none of the places is there.
    needed: bool = True


class Hooks:
    """All hooks of one adapter, which is the package ``package``.

    ``what`` names the engine and its version for errors, ``wanted`` what attnhook needs of it.
    """

    def __init__(self, package: str, hooks: Iterable[Hook], what: Callable[[], str], wanted: str) -> None:
        self.package, self.hooks, self.what, self.wanted = package, tuple(hooks), what, wanted

    def patchers(self) -> Mapping[str, Callable[[EngineInstallation, ModuleType], None]]:
        """For `EngineInstallation`: what to do when a module of the engine is imported."""
        return dict.fromkeys((_split(place)[0] for hook in self.hooks for place in hook.places), self._patch)

    def check_modules(self) -> None:
        """Raise UnsupportedError for a hook none of whose modules this release has, since it would never be put in."""
        for hook in self.hooks:
            modules = [_split(place)[0] for place in hook.places]
            if hook.needed and not any(map(_exists, modules)):
                raise UnsupportedError(self._missing("its module " + " or ".join(modules)))

    def check_in_place(self, prefixes: tuple[str, ...]) -> None:
        """Raise UnsupportedError naming the first hook that is not in place, of those whose wrappers begin so.

        Imports the engine's modules.
        """
        for hook in self.hooks:
            if (
                hook.needed
                and hook.wrapper.startswith(prefixes)
                and not any(map(partial(_in_place, hook), hook.places))
            ):
                raise UnsupportedError(self._missing(" or ".join(place.replace(":", ".") for place in hook.places)))

    def _missing(self, what: str) -> str:
        return f"{self.what()}: {what} was not found, so its attention cannot be captured; attnhook needs {self.wanted}"

    def _patch(self, installation: EngineInstallation, module: ModuleType) -> None:
        """Put the hooks of one of the engine's modules in place; ours is imported now, when the engine's is.

        A module may have moved altogether, so the checks look for all of them when the engine starts.
        """
        for hook in self.hooks:
            here = [path for where, path in map(_split, hook.places) if where == module.__name__]
            if here and not (hook.unless and _has(module, hook.unless)):
                path = next((path for path in here if _has(module, path)), here[0])
                if hook.needed or _has(module, path):
                    self._put(installation, module, hook, path)

    def _put(self, installation: EngineInstallation, module: ModuleType, hook: Hook, path: str) -> None:
        owner, _, attribute = path.rpartition(".")
        holder: object = module
        for part in owner.split(".") if owner else ():
            holder = installation.need(holder, part)
        installation.wrap(holder, attribute, partial(self._wrapped, hook))

    def _wrapped(self, hook: Hook, original: Any) -> Any:
        file, function = hook.wrapper.split(".")
        wrapped = getattr(import_module(f"{self.package}.{file}"), function)(original)
        setattr(wrapped, MARK, hook.wrapper)
        return wrapped


def _split(place: str) -> tuple[str, str]:
    module, _, path = place.partition(":")
    return module, path


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _in_place(hook: Hook, place: str) -> bool:
    module, path = _split(place)
    try:
        found = reduce(getattr, path.split("."), import_module(module))
    except (ImportError, AttributeError):
        return False
    return getattr(found, MARK, None) == hook.wrapper


def _has(module: ModuleType, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        holder = reduce(getattr, owner.split("."), module) if owner else module
    except AttributeError:
        return False
    # a dataclass's fields without a plain default are annotations only
    return hasattr(holder, name) or name in getattr(holder, "__annotations__", ())
