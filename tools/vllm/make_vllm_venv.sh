#!/bin/sh
# Make .venv-vllm: vLLM's Python sources with what its weight loader imports, for tools/vllm/vllm_load.py and
# tools/vllm/vllm_kv_blocks.py. vLLM itself is unpacked, not installed: its dependencies are CUDA builds of several gigabytes,
# and neither tool runs a kernel.
#
# Usage: tools/vllm/make_vllm_venv.sh [FOLDER]     (PYTHON names the interpreter, 3.11 or newer)
#
# PyPI's torch for Linux brings CUDA along, which is not needed; set PIP_EXTRA_INDEX_URL to
# https://download.pytorch.org/whl/cpu for the small one.
set -eu

version=0.33.0
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$here/../../.venv-vllm"}
python=${PYTHON:-python3}

rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

pip install torch==2.13.0
pip install --requirement "$here/vllm-requirements.txt"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip download --no-deps --only-binary :all: --dest "$work" "vllm==$version"
"$venv/bin/python" - "$work" <<'PYTHON'
import sys
import sysconfig
import zipfile
from pathlib import Path

# Compiled parts, the Rust server and vendored CUDA sources are most of the wheel and are never imported here.
SKIPPED = ("vllm/vllm-rs", "vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/")
target = Path(sysconfig.get_path("purelib"))
(wheel,) = Path(sys.argv[1]).glob("vllm-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith("vllm/") and not name.startswith(SKIPPED) and not name.endswith(".so"):
            archive.extract(name, target)
PYTHON
echo "$venv is ready: $venv/bin/python tools/vllm/vllm_load.py ARTIFACT"
