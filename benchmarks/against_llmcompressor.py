"""llm-compressor's GPTQ and l4pack's int4 side by side: same checkpoint, same tokens, same modules left alone.

    python benchmarks/against_llmcompressor.py SOURCE CALIBRATION HELDOUT --python .venv-llmc/bin/python
        [--samples 128] [--length 512] [--folder DIR]

llm-compressor runs in an environment of its own, because it wants other versions of transformers and compressed-tensors:

    python -m venv .venv-llmc && .venv-llmc/bin/pip install llmcompressor==0.14.0 --extra-index-url \
        https://download.pytorch.org/whl/cpu

Both artifacts are evaluated by `l4pack evaluate`'s engine on the same held-out text. Each side runs in a process of its
own; wall time includes loading and saving.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.evaluate.evaluate import Settings, evaluate
from l4pack.stream.text import TextChoice, load_text, load_tokenizer

SIDE = Path(__file__).with_name("llmcompressor_side.py")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--python", default=".venv-llmc/bin/python", help="the interpreter that has llm-compressor")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None, help="keep the artifacts here")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="against-"))
    folder.mkdir(parents=True, exist_ok=True)
    theirs, ours = llmcompressor(options, folder), l4pack(options, folder)
    for name, side in (("llm-compressor", theirs), ("l4pack", ours)):
        side |= accuracy(options, folder / name)
        print(f"{name:15} KL {side['kl_mean']:.6f} +- {side['kl_standard_error']:.6f}  agreement "
              f"{side['top1_agreement']:.4f}  {side['seconds']:.0f} s  {side['peak_rss_bytes'] / 1e9:.2f} GB")  # fmt: skip
    ratios = {key: ours[key] / theirs[key] for key in ("kl_mean", "seconds", "peak_rss_bytes")}
    print("l4pack over llm-compressor: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    print(json.dumps({"llm-compressor": theirs, "l4pack": ours}))


def llmcompressor(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = open_source(options.source)
    choice = TextChoice(options.calibration, options.samples, options.length)
    text = load_text(choice, load_tokenizer(source), source.config.text.max_position_embeddings)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps([list(item.tokens) for item in text.sequences]))
    # -P: this folder has a kernels.py, which transformers would take for the package of that name.
    command = [options.python, "-P", str(SIDE), options.source, str(tokens), str(folder / "llm-compressor")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def l4pack(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "l4pack", "quantize", options.source, "--recipe", "int4", "--text", options.calibration,
        "--samples", str(options.samples), "--sequence-length", str(options.length), "--out", str(folder / "l4pack"),
        "--json",
    ]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
    record = json.loads(done.stdout)
    return {"seconds": time.monotonic() - started, "peak_rss_bytes": record["peak_rss_bytes"]}


def accuracy(options: argparse.Namespace, artifact: Path) -> dict[str, float]:
    text = TextChoice(options.heldout, samples=10**6, sequence_length=options.length)
    settings = Settings(work=artifact.with_suffix(".work"), text=text, compute="cpu")
    found = evaluate(open_folder(artifact), open_source(options.source), settings)
    return {key: found[key] for key in ("kl_mean", "kl_standard_error", "top1_agreement")}


if __name__ == "__main__":
    main()
