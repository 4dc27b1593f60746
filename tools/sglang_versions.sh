#!/usr/bin/env bash
# The main tests of the SGLang backend with other versions of SGLang: tools/sglang_versions.sh 0.5.21
# By hand, not in `make test`: each version is another download and start. What it cannot do is seen in the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: $0 VERSION ..." >&2; exit 2; }
for version in "$@"; do
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  .venv/bin/python -m pip install -q --no-deps --target "$folder" "sglang==$version"
  echo "== SGLang $version"
  SGLANG_UNDER_TEST=$folder .venv/bin/python -m pytest -q tests/backends/sglang/test_server.py \
    -k "chat_reply or streams or text_completions or crowd or prefix_hit or generate or fault or capabilities"
  rm -rf "$folder"
done
