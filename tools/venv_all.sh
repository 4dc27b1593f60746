#!/usr/bin/env bash
# What `make test-all` needs beside the virtual environment $1: other releases, each in a folder that its tests put on
# the path.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# the newest and the oldest Transformers that we support
grep '^transformers==' tools/transformers-other-requirements.txt | while read -r wanted; do
  folder="$venv/transformers-${wanted#transformers==}"
  hub=$([ "$wanted" = transformers==5.16.0 ] && echo huggingface_hub==1.33.0 || true)  # what that one wants
  [ -d "$folder" ] || pip install -q --no-deps --target "$folder" "$wanted" ${hub:+"$hub"}
done
# the oldest SGLang that we support and one between
for version in 0.5.11 0.5.21; do
  [ -d "$venv/sglang-$version/sglang" ] || tools/sglang_other.sh "$venv/bin/python" "$version" "$venv/sglang-$version"
done
