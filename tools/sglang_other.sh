#!/usr/bin/env bash
# Put another version of SGLang into a folder: tools/sglang_other.sh PYTHON VERSION FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 version=$2 folder=$3
put() { "$python" -m pip --disable-pip-version-check install -q --no-deps --no-compile --target "$folder" "$@"; }
rm -rf "$folder"
put "sglang==$version"
case $version in
  0.5.1[1-9]*)
    # these register models whose names a newer Transformers has taken: the one that they pin, and what goes with it
    put "$(sed -n 's/^Requires-Dist: \(transformers==.*\)$/\1/p' "$folder"/sglang-*.dist-info/METADATA)" \
      -r tools/sglang-older-requirements.txt
    ;;
esac
