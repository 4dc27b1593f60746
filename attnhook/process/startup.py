"""Run by ``attnhook.pth`` at interpreter start when ``ATTNHOOK`` is set: wait for an engine, and hook it then.

Every Python process of that environment comes by here, pip's too. So this imports next to nothing; the rest of
attnhook is imported when an engine is, or when the process itself uses `attnhook.process.lifecycle`.
"""

from __future__ import annotations

import _thread
import os
import sys

from attnhook.system import switch

ENGINES = ("transformers", "vllm", "sglang")
_OURS = ("attnhook", "sitecustomize", "usercustomize")
_PATIENCE = 60.0  # seconds that an import waits for another thread that hooks the engines

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class Watch:
    """The finder that sees an engine's import coming: `complete` runs before the engine's first line does."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self.done = False
        self._runs_in = 0  # the thread
        self._plugins: bool | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with a loader that calls `complete`: who only looks sets nothing off."""
        if self.done or "." in name or self._runs_in == _thread.get_ident() or not self._may_be_engine(name):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "create_module"):
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def complete(self, *, wait: bool = True) -> None:
        """Do once what ``ATTNHOOK=1`` asks; another thread that comes by meanwhile waits for it, or goes on."""
        if self.done or self._runs_in == _thread.get_ident():  # the latter: what hooking itself imports
            return
        if not (self._lock.acquire(True, _PATIENCE) if wait else self._lock.acquire(False)):
            return
        try:
            if self.done:  # by the thread that it waited for
                return  # type: ignore[unreachable]
            self._runs_in = _thread.get_ident()
            try:
                from attnhook.process import lifecycle

                lifecycle.start()
            except Exception as error:
                switch.refuse(error)
            finally:
                self.done, self._runs_in = True, 0
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
        finally:
            self._lock.release()

    def after_fork(self) -> None:
        """In a child: a lock that another thread of the parent held is nobody's here."""
        self._lock = _thread.allocate_lock()

    def _may_be_engine(self, name: str) -> bool:
        if name in ENGINES:
            return True
        if name.startswith("_") or name in sys.stdlib_module_names or name in _OURS:
            return False
        if self._plugins is None:
            self._plugins = _has_plugins()
        return self._plugins  # a plugin's engine may have any name


class _Loader:
    """The loader of what may be an engine; out of the way as soon as the import begins."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        self._inner, self._watch = inner, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        spec.loader = self._inner
        self._watch.complete()
        module = sys.modules.get(spec.name)
        if module is None:
            found: ModuleType | None = self._inner.create_module(spec)
            return found
        # a plugin, or attnhook itself, needed it meanwhile: it is not to be run twice
        spec.loader = _Loaded(spec.loader, module.__spec__)  # type: ignore[assignment]
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Loaded:
    """The loader of a module that is there already."""

    def __init__(self, inner: Any, spec: ModuleSpec | None) -> None:
        self._inner, self._spec = inner, spec

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _has_plugins() -> bool:
    """Whether a plugin of attnhook may be installed; importlib.metadata knows too, and takes ten times as long."""
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:  # a zip file, or nothing
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                try:
                    with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                        if b"[attnhook]" in file.read():
                            return True
                except OSError:  # most have none
                    continue
    return False


watch = Watch()


def _arm() -> None:
    fault, serving = switch.fault(), switch.serving()
    if serving:
        os.environ[switch.SERVING] = "1"
    elif fault is not None:
        print(f"attnhook: {fault}. This process runs without it", file=sys.stderr, flush=True)
        switch.told.add(fault)
        watch.done = True
        return
    sys.meta_path.insert(0, watch)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=watch.after_fork)


_arm()
