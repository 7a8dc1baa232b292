#!/usr/bin/env bash
# Run tests/clients where llama.cpp and MLX are: an environment beside the one given (its bin folder), kept by version.
# A client that can't be installed here is named, and its tests are skipped; a test that fails fails.
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
wanted=tools/clients/requirements.txt
key=$({ cat "$wanted"; echo "$bin"; "$bin/python" --version; } | sha256sum | cut -c1-12)
folder="${XDG_CACHE_HOME:-$HOME/.cache}/l4pack/clients-$key"
if [ ! -e "$folder/complete" ]; then
    "$bin/python" -m venv --clear "$folder"
    # What the tests need besides comes from the environment given.
    paths='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$bin/python" -c "$paths" > "$("$folder/bin/python" -c "$paths")/borrowed.pth"
    missing=
    while read -r client; do
        "$folder/bin/python" -m pip --retries 1 --timeout 60 install --quiet --no-deps "$client" || missing="$missing $client"
    done < "$wanted"
    if [ -n "$missing" ]; then echo "clients that can't be installed here:$missing" >&2; else touch "$folder/complete"; fi
fi
code=0
# A client that waits for itself is ended: the run then fails with 124.
PYTHONPATH=$PWD OMP_NUM_THREADS=1 timeout --kill-after=10 1200 "$folder/bin/python" -m pytest -rs tests/clients || code=$?
if [ "$code" = 5 ]; then echo "no client could be installed: nothing was tried" >&2; code=0; fi
exit "$code"
