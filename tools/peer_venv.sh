#!/bin/sh
# Make an environment of its own for another tool, whose torch, transformers and compressed-tensors are others than l4pack's.
#
# Usage: tools/peer_venv.sh FOLDER PACKAGE==VERSION     (PYTHON names the interpreter, 3.11 or newer)
#
# PyPI's torch for Linux brings CUDA along, which is not needed; set PIP_EXTRA_INDEX_URL to
# https://download.pytorch.org/whl/cpu for the small one.
set -eu

rm -rf "$1"
"${PYTHON:-python3}" -m venv "$1"
# One call, so that the resolver can't take another torch for the tool's sake.
"$1/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.17.0 compressed-tensors==0.19.0 "$2"
