"""Adapters, one per engine: the only modules of attnhook that import an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from attnhook.hookspecs import RegisterBackend, hookimpl

if TYPE_CHECKING:
    from attnhook.options import CaptureOptions


class Installation(Protocol):
    """What `Backend.install` hands back."""

    @property
    def active(self) -> bool:
        """Whether the engine is patched now (false while it has not been imported yet)."""
        ...

    def describe(self) -> dict[str, str]:
        """What is hooked, for ``attnhook verify``: hook point -> state."""
        ...

    def uninstall(self) -> None:
        """Undo every patch; calling it twice is harmless."""
        ...


@runtime_checkable
class Backend(Protocol):
    """One engine. Installing is idempotent and reversible, and imports nothing by itself."""

    name: str

    def available(self) -> bool:
        """Whether the engine can be imported, found out without importing it."""
        ...

    def version(self) -> str | None:
        """Version of the installed engine, or None."""
        ...

    def install(self, options: CaptureOptions) -> Installation:
        """Patch the engine now if it is imported, else as soon as it is.

        Raises UnsupportedError, naming the engine, its version, what was looked for and what to do, where a
        hook point is missing.
        """
        ...


@hookimpl
def attnhook_register_backends(register: RegisterBackend) -> None:
    from attnhook.backends.sglang import SglangBackend
    from attnhook.backends.transformers import TransformersBackend
    from attnhook.backends.vllm import VllmBackend

    register(TransformersBackend())
    register(VllmBackend())
    register(SglangBackend())
