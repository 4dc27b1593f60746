"""The hooks that a plugin may implement: this page is all that a plugin author needs to read.

A plugin is a module (or object) that an entry point of the group ``attnhook`` names. It marks its
functions with `hookimpl` and takes only the arguments it wants. docs/plugins.md has whole examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from attnhook.plugins.contracts import Backend, Sink
    from attnhook.record.token_record import TokenRecord

PROJECT = "attnhook"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegisterBackend(Protocol):
    """Callback that takes one backend; its ``name`` must be new."""

    def __call__(self, backend: Backend) -> None: ...


class RegisterSink(Protocol):
    """Callback that binds a URL scheme (``jsonl`` in ``jsonl:path``) to a sink class; it must be new."""

    def __call__(self, scheme: str, sink: type[Sink]) -> None: ...


class RegisterVariable(Protocol):
    """Callback that takes the name of an environment variable; it must begin with ``ATTNHOOK_<PLUGIN>_``."""

    def __call__(self, name: str) -> None: ...


@hookspec
def attnhook_register_variables(register: RegisterVariable) -> None:
    """Call ``register(name)`` once for each environment variable that this plugin reads.

    A name begins with ``ATTNHOOK_<PLUGIN>_``, where ``<PLUGIN>`` is the plugin's name in capital letters, with ``_``
    for each other sign. What nobody has registered is refused as misspelt. The plugin reads and checks the value
    itself: raise OptionError, with the variable as its field, where it is used first.
    """


@hookspec
def attnhook_register_backends(register: RegisterBackend) -> None:
    """Call ``register(backend)`` once for each engine that this plugin adds."""


@hookspec
def attnhook_register_sinks(register: RegisterSink) -> None:
    """Call ``register(scheme, sink_class)`` once for each sink that this plugin adds."""


@hookspec
def attnhook_token(record: TokenRecord) -> None:
    """See every token record that is captured, whether or not there are sinks.

    An installed observer makes ``attnhook.install()`` capture everything, as a sink would.
    Runs on the delivery thread, never inside an engine step. An exception is logged and counted; it does
    not keep the record from the sinks.
    """
