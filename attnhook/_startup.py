"""Run by ``attnhook.pth`` at interpreter start when ``ATTNHOOK`` is set: hook every engine found."""

from __future__ import annotations

import sys

from attnhook.errors import AttnhookError
from attnhook.lifecycle import any_engine, install
from attnhook.options import enabled

try:
    if enabled() and any_engine():
        install()
except AttnhookError as error:
    # site.py would print a traceback and go on without us; a wrong setting must not pass for a working one
    print(f"attnhook: {error}", file=sys.stderr)
    raise SystemExit(2) from error
