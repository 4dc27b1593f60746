"""Reversible patches on an engine's classes and modules."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import wrapt

from attnhook.errors import AttnhookError, UnsupportedError
from attnhook.system import forks, switch

_ABSENT = object()


class Patches:
    """A stack of attribute replacements that `undo` takes back in reverse order."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace ``owner.name``; what a class inherits is restored by deleting our override."""
        self._saved.append((owner, name, owner.__dict__.get(name, _ABSENT), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restore every attribute, unless somebody else has wrapped ours since: then it stays, inert."""
        while self._saved:
            owner, name, old, new = self._saved.pop()
            if owner.__dict__.get(name) is not new:
                continue
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

    def names(self) -> list[str]:
        """``Owner.attribute`` of each patch in place."""
        return [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _, _ in self._saved]


class ObjectPatches:
    """What is put on an engine's live objects (layers, backends, runners), as long as they live."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[weakref.ref[Any], str, weakref.ref[Any], Any]] = []
        self._own: list[tuple[weakref.ref[Any], str]] = []

    def wrap(self, owner: Any, name: str, wrapper: Any) -> None:
        """Replace ``owner.name``, of this object alone, by a function."""
        old = owner.__dict__.get(name, _ABSENT)
        self._wrapped = [entry for entry in self._wrapped if entry[0]() is not None]
        self._wrapped.append((weakref.ref(owner), name, weakref.ref(wrapper), old))
        setattr(owner, name, wrapper)

    def note(self, owner: Any, name: str, value: Any) -> Any:
        """Set an attribute whose name is ours alone; the value."""
        self._own = [entry for entry in self._own if entry[0]() is not None]
        self._own.append((weakref.ref(owner), name))
        setattr(owner, name, value)
        return value

    def undo(self) -> None:
        """Restore every object that lives, unless somebody else has wrapped ours since: then it stays, inert."""
        while self._wrapped:
            reference, name, wrapper, old = self._wrapped.pop()
            owner = reference()
            if owner is None or owner.__dict__.get(name) is not wrapper():
                continue
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        while self._own:
            reference, name = self._own.pop()
            owner = reference()
            if owner is not None and name in owner.__dict__:
                delattr(owner, name)


#: By engine.
objects: defaultdict[str, ObjectPatches] = defaultdict(ObjectPatches)


class EngineInstallation:
    """Patches of one engine's modules, put in place when each module is imported, or now where it is already.

    ``patchers`` maps a module's name to a function that takes this installation and the module. ``wanted`` names for
    errors the releases of the engine that attnhook knows. A backend that makes something of the options of its
    ``install`` says ``any_options=False``: where ``attnhook.install`` comes with others, this installation is
    uninstalled and the backend installed with those. Otherwise options are read per request, and others change nothing.
    """

    def __init__(
        self,
        engine: str,
        version: str | None,
        patchers: Mapping[str, Callable[[EngineInstallation, ModuleType], None]],
        wanted: str,
        *,
        any_options: bool = True,
    ) -> None:
        self.engine, self.version, self.any_options = engine, version, any_options
        self.patches = Patches()
        self._patchers, self._wanted = patchers, wanted
        self._patched: set[str] = set()
        self._by_switch = switch.starting
        #: Why a later import could not be patched, where nobody could be told by an exception.
        self.refused: AttnhookError | None = None

    def start(self) -> None:
        """Patch what is imported and watch for the rest; undone again where something is missing.

        Raises UnsupportedError.
        """
        with _lock:
            try:
                for module in self._patchers:
                    if module in sys.modules:
                        self.patch(sys.modules[module])
                _live.add(self)
                for module in self._patchers.keys() - _watched:
                    # wrapt keeps such a hook for good; it does nothing once no installation is live
                    _watched.add(module)
                    wrapt.register_post_import_hook(_imported, module)
            except BaseException:
                self.uninstall()
                raise

    @property
    def active(self) -> bool:
        """Whether a module of the engine has been imported and patched."""
        return bool(self._patched)

    def describe(self) -> dict[str, str]:
        """Hook point -> state."""
        if not self.active:
            return {module: "waits for the import" for module in self._patchers}
        return dict.fromkeys(self.patches.names(), "patched")

    def uninstall(self) -> None:
        """Undo every patch."""
        with _lock:
            _live.discard(self)
            self.patches.undo()
            self._patched.clear()
            if not any(other.engine == self.engine for other in _live):
                objects[self.engine].undo()

    def patch(self, module: ModuleType) -> None:
        """Patch one module of the engine, once."""
        name = module.__name__
        if name in self._patchers and name not in self._patched:
            self._patchers[name](self, module)
            self._patched.add(name)

    def imported(self, module: ModuleType) -> None:
        """`patch` at the module's import, out of which a fault is raised unless ``ATTNHOOK=1`` alone asked for us."""
        try:
            self.patch(module)
        except Exception as error:
            if not self._by_switch:
                raise
            self.uninstall()
            known = error if isinstance(error, AttnhookError) else None
            self.refused = known or UnsupportedError(
                f"{self.engine} {self.version} could not be hooked: {type(error).__name__}: {error}"
            )
            switch.refuse(error)

    def need(self, owner: Any, name: str) -> Any:
        """``owner.name``; raises UnsupportedError naming the engine and its version where it is missing."""
        if not hasattr(owner, name):
            where = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
            raise UnsupportedError(
                f"{self.engine} {self.version}: {where}.{name} was not found, so its attention cannot be captured; "
                f"attnhook needs {self._wanted}"
            )
        return getattr(owner, name)

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        """Replace ``owner.name`` by ``wrapper(owner.name)``; a static method stays one."""
        wrapped = wrapper(self.need(owner, name))
        static = isinstance(owner.__dict__.get(name), staticmethod)
        self.patches.set(owner, name, staticmethod(wrapped) if static else wrapped)


_lock = threading.RLock()
_live: set[EngineInstallation] = set()
_watched: set[str] = set()  # modules whose import wrapt reports to us


def _imported(module: ModuleType) -> None:
    with _lock:
        for installation in list(_live):
            installation.imported(module)


@forks.in_child
def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
