"""The plugin manager: built-ins are registered like any third party, then entry points are loaded."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Sequence
from importlib import metadata
from traceback import walk_tb
from typing import Any

import pluggy

from attnhook import options
from attnhook.errors import OptionError, PluginError
from attnhook.plugins import hookspecs, versions
from attnhook.plugins.contracts import Backend, Sink
from attnhook.system import forks

GROUP = "attnhook"
BUILT_INS = ("attnhook.backends", "attnhook.sinks")

_lock = threading.RLock()  # a plugin may ask for the manager while it is imported
_manager: pluggy.PluginManager | None = None


@forks.in_child
def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


def manager() -> pluggy.PluginManager:
    """The process's plugin manager, made and filled on first use.

    Raises PluginError naming the plugin, where an installed one cannot be loaded.
    """
    global _manager
    with _lock:
        if _manager is None:
            pm = pluggy.PluginManager(hookspecs.PROJECT)
            pm.add_hookspecs(hookspecs)
            for name in BUILT_INS:
                pm.register(importlib.import_module(name), name=name)
            _load_entry_points(pm)
            _manager = pm
        return _manager


def _load_entry_points(pm: pluggy.PluginManager) -> None:
    # pluggy calls the last that is registered first; names are to be listed in the order of the plugins' own
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name, reverse=True):
        name = f"{entry.name!r} ({entry.value}{f', from {entry.dist.name}' if entry.dist else ''})"
        if pm.has_plugin(entry.name):
            raise PluginError(f"attnhook plugin {name}: another plugin has that name. Uninstall or rename one.")
        try:
            pm.register(entry.load(), name=entry.name)
            pm.check_pending()
        except Exception as error:
            raise PluginError(
                f"attnhook plugin {name} cannot be loaded: {type(error).__name__}: {error}. Mend it or uninstall it."
            ) from error


def backends() -> dict[str, Backend]:
    """Registered backends by name, built-ins first.

    Raises PluginError naming the plugin: for what is no backend, a name that is taken, a version of the contract that
    is not known here, and whatever else a plugin raises.
    """
    found: dict[str, Backend] = {}

    def register(backend: Backend) -> None:
        versions.check("backend", backend, f"backend {getattr(backend, 'name', backend)!r}")
        if not isinstance(backend, Backend):
            raise PluginError(
                f"{backend!r} was registered as a backend but lacks one of name, available, version, install"
            )
        if isinstance(servers := getattr(backend, "servers", ()), str):
            raise PluginError(f"backend {backend.name!r}: servers={servers!r} is one text: write ({servers!r},)")
        if backend.name in found:
            raise PluginError(
                f"two backends are called {backend.name!r}: {found[backend.name]!r} and {backend!r}. Rename one."
            )
        found[backend.name] = backend

    _call("attnhook_register_backends", register=register)
    return found


def model_in(target: object) -> object:
    """What ``capture(model=target)`` listens to: the model that ``target`` is or wraps, or a tuple of several.

    A backend may tell by a method ``models_in(target)``; where one has no such method, what no other knows is left as
    it is. Raises OptionError where no backend finds a model in it.
    """
    asked = [getattr(backend, "models_in", None) for backend in backends().values()]
    found = [model for models_in in asked if models_in is not None for model in models_in(target)]
    if found:
        return found[0] if len(found) == 1 else tuple(found)
    if None in asked:
        return target
    raise OptionError(
        "model",
        f"model={str(target)[:60]!r} ({type(target).__name__}) is no model of Transformers and holds none (as PEFT's, "
        "torch.compile's, DataParallel's and your own modules and pipelines do), so nothing could be captured: pass "
        "the model, or leave model= out to capture every model",
    )


def sink_classes() -> dict[str, type[Sink]]:
    """Registered sink classes by URL scheme, built-ins first. Raises PluginError as `backends` does."""
    found: dict[str, type[Sink]] = {}

    def register(scheme: str, sink: type[Sink]) -> None:
        if not (isinstance(sink, type) and issubclass(sink, Sink)):
            raise PluginError(f"{sink!r} was registered as sink {scheme!r} but is no subclass of attnhook.plugins.Sink")
        versions.check("sink", sink, f"sink {scheme!r}")
        if scheme in found:
            raise PluginError(f"two sinks are called {scheme!r}: {found[scheme]!r} and {sink!r}. Rename one.")
        found[scheme] = sink

    _call("attnhook_register_sinks", register=register)
    return found


def variables() -> set[str]:
    """Names of the environment variables that plugins read.

    Raises PluginError naming the plugin, for a name that is none of a plugin's and for whatever else a plugin raises.
    """
    found: set[str] = set()
    prefixes = [f"ATTNHOOK_{re.sub('[^A-Z0-9]', '_', name.upper())}_" for name, _ in manager().list_name_plugin()]

    def register(name: str) -> None:
        if not name.startswith(tuple(prefixes)) or name in prefixes or name in options.variables():
            raise PluginError(
                f"variable {name!r} must begin with ATTNHOOK_, the plugin's name in capital letters and _, and be none "
                "of attnhook's own. Rename it."
            )
        found.add(name)

    _call("attnhook_register_variables", register=register)
    return found


def has_observers() -> bool:
    """Whether a plugin wants to see every record (`attnhook_token`)."""
    return bool(manager().hook.attnhook_token.get_hookimpls())


def _call(name: str, **arguments: Any) -> Any:
    """pluggy's own call of a hook, with its order and its wrappers. Raises PluginError naming the plugin at fault."""
    hook = getattr(manager().hook, name)
    try:
        return hook(**arguments)
    except Exception as error:
        why = str(error)
        if not isinstance(error, PluginError):
            why = f"{name} failed: {type(error).__name__}: {error}. Mend it or uninstall it."
        raise PluginError(f"attnhook plugin {_at_fault(error, hook.get_hookimpls())}: {why}") from error


def _at_fault(error: Exception, implementations: Sequence[pluggy.HookImpl]) -> str:
    """Name of the plugin whose code is the innermost on the way to the error."""
    names = {getattr(one.function, "__code__", None): one.plugin_name for one in implementations}
    passed = [names[frame.f_code] for frame, _ in walk_tb(error.__traceback__) if frame.f_code in names]
    return repr(passed[-1]) if passed else f"(one of {', '.join(repr(one.plugin_name) for one in implementations)})"
