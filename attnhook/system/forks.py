"""What a forked child does first: locks that another thread of its parent held are nobody's there."""

from __future__ import annotations

import os
from collections.abc import Callable


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function called in every child that this process forks, where the system has forks; a decorator."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function
