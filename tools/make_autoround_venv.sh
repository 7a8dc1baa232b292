#!/bin/sh
# Make .venv-autoround for benchmarks/accuracy.py: tools/make_autoround_venv.sh [FOLDER], see peer_venv.sh.
set -eu

tools=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$tools/../.venv-autoround"}
"$tools/peer_venv.sh" "$venv" auto-round==0.16.1
echo "$venv is ready: python benchmarks/accuracy.py --tools auto-round --models demo"
