"""What a page that holds all of itself puts into its HTML: data as a script block, hashes for its security policy."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any


def script_json(value: Any, *, sort_keys: bool = False) -> str:
    """JSON in plain ASCII that neither ends its script element nor opens a comment in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, sort_keys=sort_keys)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy_hash(inline: str) -> str:
    """The content security policy's name of one inline script or style, which must not change after."""
    return base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode("ascii")
