"""Runs ``sglang.Engine`` in this process: `python -m tests.backends.sglang.offline JOB OUT`.

JOB is JSON: ``engine`` (arguments of Engine) and ``batches`` (arguments of one generate call each). OUT gets a list
of what they return.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> list[Any]:
    import sglang

    engine = sglang.Engine(**job["engine"])
    try:
        return [engine.generate(**batch) for batch in job["batches"]]
    finally:
        engine.shutdown()


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
