"""Nothing of ours may end an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger("attnhook")

T = TypeVar("T")


def safely(function: Callable[..., T], *arguments: Any) -> T | None:
    """The result, or None where it raises, which is logged. Who asked is told that no records came."""
    try:
        return function(*arguments)
    except Exception:
        logger.exception("attention capture failed in this step")
        return None
