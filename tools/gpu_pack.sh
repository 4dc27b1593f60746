#!/usr/bin/env bash
# Pack what a GPU machine without a network needs into parts that can be carried: tools/gpu_pack.sh [--help]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tools.gpu.pack "$@"
