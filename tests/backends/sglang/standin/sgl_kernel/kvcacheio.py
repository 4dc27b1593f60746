"""Imported at start by SGLang before 0.5.13; nothing of it is called on the CPU."""

from sgl_kernel import __getattr__  # noqa: F401
