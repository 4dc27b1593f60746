"""Adapters, one per engine: the only modules of attnhook that import an engine."""

from __future__ import annotations

from attnhook.plugins.hookspecs import RegisterBackend, hookimpl
from attnhook.system import moved


@hookimpl(tryfirst=True)  # built-ins are listed first
def attnhook_register_backends(register: RegisterBackend) -> None:
    from attnhook.backends.sglang import SglangBackend
    from attnhook.backends.transformers import TransformersBackend
    from attnhook.backends.vllm import VllmBackend

    register(TransformersBackend())
    register(VllmBackend())
    register(SglangBackend())


__getattr__ = moved.names(__name__, {"Backend": "plugins.contracts", "Installation": "plugins.contracts"})
