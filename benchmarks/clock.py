"""A clock around functions, for `benchmarks.in_engine`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any


class Clock:
    """Seconds and calls of the functions that it was put around."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, clocked."""

        @wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return clocked
