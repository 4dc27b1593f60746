#!/usr/bin/env bash
# Check attnhook on a machine with a GPU and no network, in stages: tools/gpu_check.sh [--help] [STAGE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tools.gpu.check "$@"
