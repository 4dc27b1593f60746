"""Run by ``attnhook.pth`` at interpreter start when ``ATTNHOOK`` is set: hook every engine found."""

from __future__ import annotations

import os
import sys

from attnhook.errors import AttnhookError
from attnhook.lifecycle import any_engine, install
from attnhook.options import enabled

try:
    if enabled() and any_engine():
        install()
except AttnhookError as error:
    # a wrong setting must not pass for a working one; site.py prints a traceback of an exception and goes on,
    # and makes a fatal error of SystemExit
    print(f"attnhook: {error}", file=sys.stderr, flush=True)
    os._exit(2)
