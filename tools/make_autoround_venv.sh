#!/bin/sh
# Make .venv-autoround: auto-round in an environment of its own, for benchmarks/accuracy.py.
#
# Usage: tools/make_autoround_venv.sh [FOLDER]     (PYTHON names the interpreter, 3.11 or newer)
#
# PyPI's torch for Linux brings CUDA along, which is not needed; set PIP_EXTRA_INDEX_URL to
# https://download.pytorch.org/whl/cpu for the small one.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$here/../.venv-autoround"}
python=${PYTHON:-python3}

rm -rf "$venv"
"$python" -m venv "$venv"
# One call, so that the resolver can't take another torch for auto-round's sake.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 auto-round==0.16.1 transformers==5.17.0 compressed-tensors==0.19.0
echo "$venv is ready: python benchmarks/accuracy.py --tools auto-round --models demo"
