#!/usr/bin/env bash
# The SGLang backend with other versions of SGLang, in more ways than `make test` does: tools/sglang_versions.sh 0.5.14
# Each version is another download and four starts. What it cannot do is seen in the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: $0 VERSION ..." >&2; exit 2; }
for version in "$@"; do
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  tools/sglang_other.sh .venv/bin/python "$version" "$folder"
  echo "== SGLang $version"
  case $version in 0.5.1[1-8]*) export SGLANG_CPU_OMP_THREADS_BIND=0 ;; *) unset SGLANG_CPU_OMP_THREADS_BIND ;; esac
  # what allocates pages in 0.5.11 and 0.5.21 is written in Triton, for the CPU too
  TRITON_INTERPRET=1 SGLANG_UNDER_TEST=$folder SGLANG_UNDER_TEST_FLAGS="--page-size 16" .venv/bin/python -m pytest -q \
    tests/backends/sglang/test_versions.py tests/backends/sglang/test_offline.py
  rm -rf "$folder"
done
