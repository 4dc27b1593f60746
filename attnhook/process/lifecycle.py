"""Turning attnhook on and off in a process: `install`, `uninstall` and the shared engine hooks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from attnhook.errors import AttnhookError, PluginError, naming
from attnhook.errors import install as how_to_install
from attnhook.options import CaptureOptions, enabled
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Backend, Installation
from attnhook.sinks import outlet
from attnhook.sinks.outlet import Outlet, dropped, flush, publish, publishes, publishes_tokens, sink_stats
from attnhook.system import forks, switch

__all__ = [
    "any_engine",
    "dropped",
    "flush",
    "hooks",
    "install",
    "installed",
    "load",
    "publish",
    "publishes",
    "publishes_tokens",
    "sink_stats",
    "start",
    "uninstall",
]

_lock = threading.RLock()
_installations: dict[str, Installation] = {}
_users = 0  # install() and every open capture() hold the hooks
_told = CaptureOptions()  # what the backends were installed with


def install(**options: Any) -> dict[str, Installation]:
    """Hook every engine that is installed here, now or when it is imported; return them by name.

    With ``sinks=["jsonl:records.jsonl"]`` (or ``ATTNHOOK_SINKS``), or with an observer plugin, every forward
    pass is captured into them; without them nothing is captured until `capture` asks. The other options are
    those of `capture`.
    Calling it again with the same options changes nothing; with others it switches to them.

    Raises
    ------
    OptionError
        An option or ``ATTNHOOK_*`` variable is unknown or out of range.
    PluginError
        A plugin or sink cannot be loaded or opened, or no supported engine is installed.
    UnsupportedError
        An installed engine lacks a hook point; the message names it, its version and the remedy.
    """
    global _users
    resolved = CaptureOptions.resolve(options, plugins=plugins.variables)
    with _lock:
        before = outlet.current()
        if before is not None and before.options == resolved:
            return dict(_installations)
        new = Outlet(resolved)  # where a sink cannot be opened, what is on stays on
        try:
            if before is None:
                _acquire(resolved)
                try:
                    _switch(resolved)  # an open capture() has installed the backends with options of its own
                except BaseException:
                    _release()
                    raise
            else:
                _switch(resolved)
                _users += 1  # the hooks stay while the old sinks close
                try:
                    _turn_off()
                except BaseException:
                    _release()
                    raise
        except BaseException:
            new.close()
            raise
        outlet.replace(new)
        new.start()
        return dict(_installations)


def uninstall() -> None:
    """Undo `install`: close the sinks (everything queued is written first) and unhook the engines.

    Engines stay hooked while a `capture` block is open. Harmless when nothing is installed.
    """
    with _lock:
        _turn_off()


def start() -> None:
    """`install` as ``ATTNHOOK=1`` asks for it, where an engine is installed here at all.

    Raises as `install` does. What an engine lacks when it is imported later goes to `switch.refuse`, since nobody is
    there to catch it.
    """
    if enabled() and any_engine():
        for backend in plugins.backends().values():
            switch.plugins_commands.update(getattr(backend, "servers", ()))
        if switch.serving():
            os.environ[switch.SERVING] = "1"  # for the workers that it starts
        with _lock:
            switch.starting = True
            try:
                install()
            finally:
                switch.starting = False


def load() -> None:
    """Entry point of ``vllm.general_plugins`` and ``sglang.srt.plugins``: does nothing unless ``ATTNHOOK=1``.

    SGLang logs a plugin's exception and goes on without it; a server that was asked to capture must not. So what cannot
    be done ends a server; a script that runs an engine itself goes on, and its log tells.
    """
    try:
        start()
    except AttnhookError as error:
        switch.refuse(error)


def any_engine() -> bool:
    """Whether an engine that a backend knows is installed here; imports none."""
    return bool(_usable(plugins.backends()))


def installed() -> dict[str, Installation]:
    """Hooked engines by name; empty when attnhook is off."""
    with _lock:
        return dict(_installations)


@contextmanager
def hooks(options: CaptureOptions) -> Iterator[None]:
    """Keep the engines hooked inside the block."""
    with _lock:
        _acquire(options)
    try:
        yield
    finally:
        with _lock:
            _release()


def _turn_off() -> None:
    # first forgotten, then closed: where Ctrl-C ends the wait for a sink, nobody is to take it for one that listens
    old = outlet.current()
    outlet.replace(None)
    if old is not None:
        try:
            old.close()
        finally:
            _release()


def _acquire(options: CaptureOptions) -> None:
    global _users, _told
    for installation in _installations.values():
        if isinstance(refused := getattr(installation, "refused", None), AttnhookError):
            raise refused
    if _users == 0:
        found = plugins.backends()
        usable = _usable(found)
        if not usable:
            raise PluginError(
                f"none of the engines {', '.join(found)} is installed here: {how_to_install('transformers')}; or "
                "install the engine that you want to watch"
            )
        try:
            for name, backend in usable.items():
                _installations[name] = _install(name, backend, options)
        except BaseException:
            _remove()
            raise
        _told = options
    _users += 1


def _release() -> None:
    global _users
    _users -= 1
    if _users == 0:
        _remove()


def _remove() -> None:
    """Unhook every engine; one whose backend fails keeps no other hooked."""
    faults: list[AttnhookError] = []
    for name in list(_installations):
        try:
            with _naming(name, "uninstall"):
                _installations.pop(name).uninstall()
        except AttnhookError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def _naming(name: str, method: str) -> AbstractContextManager[None]:
    """Around a backend's own code: what it raises by mistake becomes a PluginError that names it."""
    return naming(f"backend {name!r}: {method} failed", ". Mend its plugin or uninstall it.")


def _usable(backends: Mapping[str, Backend]) -> dict[str, Backend]:
    """Those whose engine is installed here."""
    found = {}
    for name, backend in backends.items():
        with _naming(name, "available"):
            if backend.available():
                found[name] = backend
    return found


def _install(name: str, backend: Backend, options: CaptureOptions) -> Installation:
    with _naming(name, "install"):
        installation = backend.install(options)
    if not hasattr(installation, "uninstall"):  # it could never be taken back
        raise PluginError(
            f"backend {name!r}: install gave {installation!r}, which has no uninstall. Mend its plugin: give an "
            "attnhook.plugins.Installation."
        )
    return installation


def _switch(options: CaptureOptions) -> None:
    """Tell the backends about other options; where one refuses them, all have the old ones again."""
    global _told
    before = _told
    if options == before:
        return
    found = plugins.backends()
    told: list[str] = []
    try:
        for name, installation in list(_installations.items()):
            if getattr(installation, "any_options", False):
                continue
            told.append(name)
            with _naming(name, "uninstall"):
                installation.uninstall()
            _installations[name] = _install(name, found[name], options)
    except BaseException:
        for name in told:
            _installations[name].uninstall()
            _installations[name] = found[name].install(before)
        raise
    _told = options


@forks.in_child
def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


# at interpreter start `ATTNHOOK=1` only made a note; who comes by here is to find it done
if (_startup := sys.modules.get("attnhook.process.startup")) is not None:
    _startup.watch.complete(wait=False)
