"""In an engine's processes: write down where queries came out of the buffers that graphs fill (GPU_CHECK_NOTES).

A record is the same whether a graph ran its pass or not, so this is how the check knows that graphs did.
"""

from __future__ import annotations

import os
from typing import Any

import wrapt

from tools.gpu.stage import KEPT, RECORDED


@wrapt.when_imported("attnhook.serving.graphs")
def observe(module: Any) -> None:
    """Put a note around `KeptQueries.get` and `keep`."""
    path = os.environ["GPU_CHECK_NOTES"]
    get, keep = module.KeptQueries.get, module.KeptQueries.keep

    def note(line: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def noted_get(self: Any, number: int, count: int) -> Any:
        found = get(self, number, count)
        if found is not None:
            note(KEPT)
        return found

    def noted_keep(self: Any, number: int, q: Any) -> None:
        note(RECORDED)
        keep(self, number, q)

    module.KeptQueries.get, module.KeptQueries.keep = noted_get, noted_keep
