"""Turning attnhook on and off in a process: `install`, `uninstall` and the shared engine hooks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attnhook import forks, plugins, switch
from attnhook.backends import Installation
from attnhook.capture import Session
from attnhook.delivery import Delivery
from attnhook.errors import AttnhookError, PluginError
from attnhook.errors import install as how_to_install
from attnhook.options import CaptureOptions, enabled
from attnhook.records import TokenRecord

_lock = threading.RLock()
_installations: dict[str, Installation] = {}
_users = 0  # install() and every open capture() hold the hooks
_process: _Process | None = None


class _Process:
    """What `install` set up: the options and, where there are sinks, a session that feeds them."""

    def __init__(self, options: CaptureOptions) -> None:
        self.options = options
        self.delivery = open_delivery(options, process=True)
        self.session: Session | None = None

    def start(self) -> None:
        if self.delivery is not None:
            self.session = Session(self.options.request, self.delivery.put, strict=False, tokens=self.delivery.tokens)
            self.session.__enter__()

    def close(self) -> None:
        if self.session is not None:
            self.session.__exit__()
        if self.delivery is not None:
            self.delivery.close()  # interrupted, it goes on when the process ends


def open_delivery(options: CaptureOptions, *, process: bool = False) -> Delivery | None:
    """The queue to the options' sinks and the plugins' observers, or None where there are neither.

    While `install` shows observers every record, nobody else does, so that they see none twice.
    """
    observe = plugins.has_observers() and (process or _process is None or _process.session is None)
    if options.sinks or observe:
        return Delivery.from_urls(options.sinks, queue_size=options.queue_size, observe=observe, listen_later=process)
    return None


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
    global _process, _users
    resolved = CaptureOptions.resolve(options)
    with _lock:
        if _process is not None and _process.options == resolved:
            return dict(_installations)
        new = _Process(resolved)  # where a sink cannot be opened, what is on stays on
        try:
            if _process is None:
                _acquire(resolved)
            else:
                _switch(_process.options, resolved)
                _users += 1  # the hooks stay while the old sinks close
                try:
                    _turn_off()
                except BaseException:
                    _release()
                    raise
        except BaseException:
            new.close()
            raise
        _process = new
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
        with _lock:
            switch.starting = True
            try:
                install()
            finally:
                switch.starting = False


def any_engine() -> bool:
    """Whether an engine that a backend knows is installed here; imports none."""
    return any(backend.available() for backend in plugins.backends().values())


def installed() -> dict[str, Installation]:
    """Hooked engines by name; empty when attnhook is off."""
    with _lock:
        return dict(_installations)


def sink_stats() -> dict[str, Any]:
    """Per sink of `install`: queued, written and dropped counts, by reason."""
    with _lock:
        if _process is None or _process.delivery is None:
            return {}
        return _process.delivery.stats()


def publishes() -> bool:
    """Whether the process has sinks or observers, so that `publish` needs records."""
    process = _process
    return process is not None and process.delivery is not None


def publishes_tokens() -> bool:
    """Whether one of the process's sinks keeps token ids, so that `publish` needs them in the records."""
    process = _process
    return process is not None and process.delivery is not None and process.delivery.tokens


def publish(records: Sequence[TokenRecord]) -> None:
    """Hand records that an engine has captured for a reply to the process's sinks and observers too."""
    process = _process
    if process is not None and process.delivery is not None:
        process.delivery.put(records)


def flush(timeout: float) -> bool:
    """Wait until the process's sinks have what was handed to them; False if ``timeout`` seconds were too few."""
    process = _process
    return process is None or process.delivery is None or process.delivery.flush(timeout)


def dropped() -> dict[str, int]:
    """Rows that `install`'s capture could not turn into records, by reason (``unsupported``, ``nan``, ...)."""
    with _lock:
        return {} if _process is None or _process.session is None else dict(_process.session.dropped)


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
    global _process
    # first forgotten, then closed: where Ctrl-C ends the wait for a sink, nobody is to take it for one that listens
    process, _process = _process, None
    if process is not None:
        try:
            process.close()
        finally:
            _release()


def _acquire(options: CaptureOptions) -> None:
    global _users
    for installation in _installations.values():
        if isinstance(refused := getattr(installation, "refused", None), AttnhookError):
            raise refused
    if _users == 0:
        found = plugins.backends()
        usable = {name: backend for name, backend in found.items() if backend.available()}
        if not usable:
            raise PluginError(
                f"none of the engines {', '.join(found)} is installed here: {how_to_install('transformers')}; or "
                "install the engine that you want to watch"
            )
        try:
            for name, backend in usable.items():
                _installations[name] = backend.install(options)
        except BaseException:
            _remove()
            raise
    _users += 1


def _release() -> None:
    global _users
    _users -= 1
    if _users == 0:
        _remove()


def _remove() -> None:
    for name in list(_installations):
        _installations.pop(name).uninstall()


def _switch(before: CaptureOptions, options: CaptureOptions) -> None:
    """Tell the backends about other options; where one refuses them, all have the old ones again."""
    found = plugins.backends()
    told: list[str] = []
    try:
        for name, installation in list(_installations.items()):
            if getattr(installation, "any_options", False):
                continue
            told.append(name)
            installation.uninstall()
            _installations[name] = found[name].install(options)
    except BaseException:
        for name in told:
            _installations[name].uninstall()
            _installations[name] = found[name].install(before)
        raise


@forks.in_child
def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


# at interpreter start `ATTNHOOK=1` only made a note; who comes by here is to find it done
if (_startup := sys.modules.get("attnhook._startup")) is not None:
    _startup.watch.complete(wait=False)
