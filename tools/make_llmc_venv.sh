#!/bin/sh
# Make .venv-llmc for benchmarks/against_llmcompressor.py and accuracy.py: tools/make_llmc_venv.sh [FOLDER], see peer_venv.sh.
set -eu

tools=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$tools/../.venv-llmc"}
"$tools/peer_venv.sh" "$venv" llmcompressor==0.14.0
echo "$venv is ready: python benchmarks/against_llmcompressor.py SOURCE CALIBRATION HELDOUT"
