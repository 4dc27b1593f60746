"""Python runs this at start where this folder is on PYTHONPATH: engines of the check note what graphs kept."""

import os

if os.environ.get("GPU_CHECK_NOTES"):
    import tools.gpu.notes  # noqa: F401
