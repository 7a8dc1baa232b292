#!/bin/sh
# Make .venv-llmc: llm-compressor in an environment of its own, for benchmarks/against_llmcompressor.py. It wants other
# versions of transformers and compressed-tensors than l4pack does.
#
# Usage: tools/make_llmc_venv.sh [FOLDER]     (PYTHON names the interpreter, 3.11 or newer)
#
# PyPI's torch for Linux brings CUDA along, which is not needed; set PIP_EXTRA_INDEX_URL to
# https://download.pytorch.org/whl/cpu for the small one.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$here/../.venv-llmc"}
python=${PYTHON:-python3}

rm -rf "$venv"
"$python" -m venv "$venv"
# One call, so that the resolver can't take another torch for llm-compressor's sake.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 llmcompressor==0.14.0 transformers==5.17.0 compressed-tensors==0.19.0
echo "$venv is ready: python benchmarks/against_llmcompressor.py SOURCE CALIBRATION HELDOUT"
