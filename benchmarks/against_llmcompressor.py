"""llm-compressor's GPTQ and l4pack's int4 side by side: same checkpoint, same tokens, same modules left alone.

    tools/make_llmc_venv.sh
    python benchmarks/against_llmcompressor.py SOURCE CALIBRATION HELDOUT [--samples 128] [--length 512] [--folder DIR]
    python benchmarks/against_llmcompressor.py .bench/midsize CALIBRATION --cost-only --samples 4   # benchmarks/midsize.py

Each side is one process (its interpreter's start, loading, solving and saving included) on the same number of threads, one
after the other. Wall time ends when the artifact is on disk; peak RSS is the process's own and its children's. Both
artifacts are then evaluated as `l4pack evaluate` does, on all of the held-out text. `--keep` takes an artifact that is in
--folder already instead of making it again, and times nothing.

llm-compressor loads the checkpoint in `--dtype`: bfloat16, as its example has it, or float32, which is the faster one on
CPUs without bfloat16 products.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from l4pack import __version__
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.evaluate import evaluate as evaluation
from l4pack.evaluate.scoring import PairedScores, score_pair
from l4pack.evaluate.statistics import clusters, mean_and_error
from l4pack.stream.text import TextChoice, load_text, load_tokenizer

SIDE = Path(__file__).with_name("llmcompressor_side.py")
THEIRS, OURS = "llm-compressor", "l4pack"
VERSIONS = "VERSIONS "


@dataclass
class Side:
    """What one side took and made."""

    seconds: float | None = None
    peak_rss_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    kl: torch.Tensor | None = None


def main() -> None:
    """Run both sides, evaluate both artifacts, print a table and one JSON object."""
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="against-"))
    folder.mkdir(parents=True, exist_ok=True)
    sides = {THEIRS: llmcompressor(options, folder), OURS: l4pack(options, folder)}
    if not options.cost_only:
        for name, side in sides.items():
            evaluate(options, folder, name, side)
    report(options, sides)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("heldout", nargs="?")
    parser.add_argument("--cost-only", action="store_true", help="for made-up weights: no evaluation")
    parser.add_argument("--python", default=".venv-llmc/bin/python", help="the interpreter that has llm-compressor")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="llm-compressor's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=None, help="keep the artifacts here")
    parser.add_argument("--keep", nargs="*", choices=(THEIRS, OURS), default=[], help="artifacts not to make again")
    options = parser.parse_args()
    if not options.cost_only and options.heldout is None:
        parser.error("HELDOUT is needed, or --cost-only")
    return options


def llmcompressor(options: argparse.Namespace, folder: Path) -> Side:
    """Its own recipe on the tokens that l4pack takes."""
    source = open_source(options.source)
    choice = TextChoice(options.calibration, options.samples, options.length)
    text = load_text(choice, load_tokenizer(source), source.config.text.max_position_embeddings)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps([list(item.tokens) for item in text.sequences]))
    # -P: this folder has a kernels.py, which transformers would take for the package of that name.
    command = [options.python, "-P", str(SIDE), options.source, str(tokens), str(folder / THEIRS), options.dtype]
    return measured(options, folder, THEIRS, command)


def l4pack(options: argparse.Namespace, folder: Path) -> Side:
    """`l4pack quantize` with the shipped recipe."""
    command = [
        sys.executable, "-m", "l4pack", "quantize", options.source, "--recipe", "int4", "--text", options.calibration,
        "--samples", str(options.samples), "--sequence-length", str(options.length), "--out", str(folder / OURS),
        "--compute", "cpu", "--restart", "--json",
    ]  # fmt: skip
    side = measured(options, folder, OURS, command)
    side.versions = {"l4pack": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return side


def measured(options: argparse.Namespace, folder: Path, name: str, command: list[str]) -> Side:
    """Run one side to its end, with what it wrote on disk; its output goes to NAME.log."""
    side = Side()
    if name in options.keep:
        return side
    log = folder / f"{name}.log"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(options.threads))
    with log.open("wb") as stream:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **threads})
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
    side.seconds, side.peak_rss_bytes = time.monotonic() - started, usage.ru_maxrss * 1024
    lines = log.read_text(errors="replace").splitlines()
    if status:
        sys.exit("\n".join([f"{name} ended with status {status}", *lines[-20:]]))
    stated = [line.removeprefix(VERSIONS) for line in lines if line.startswith(VERSIONS)]
    side.versions = json.loads(stated[-1]) if stated else {}
    return side


def evaluate(options: argparse.Namespace, folder: Path, name: str, side: Side) -> None:
    """Mean KL to the original with its standard error, and every token's KL for the paired difference."""
    found: list[PairedScores] = []

    def keep(*inputs: Any) -> PairedScores:
        found.append(score_pair(*inputs))
        return found[-1]

    text = TextChoice(options.heldout, samples=10**6, sequence_length=options.length)
    settings = evaluation.Settings(work=folder / f"{name}.work", text=text, compute="cpu", restart=True)
    with mock.patch.object(evaluation, "score_pair", keep):
        record = evaluation.evaluate(open_folder(folder / name), open_source(options.source), settings)
    side.accuracy = {key: record[key] for key in ("kl_mean", "kl_standard_error", "top1_agreement", "tokens")}
    side.accuracy["sequences"] = record["text"]["sequences"]
    side.kl = found[0].kl


def report(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    """A line a side, the ratios, and everything as JSON."""
    for name, side in sides.items():
        print(f"{name:15}" + accuracy_words(side) + cost_words(side))
    theirs, ours = sides[THEIRS], sides[OURS]
    print(f"{options.samples} samples of {options.length} tokens, {options.threads} threads, "
          f"llm-compressor in {options.dtype}, {theirs.versions}, {ours.versions}")  # fmt: skip
    found = ratios(theirs, ours)
    print("l4pack over llm-compressor: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    record = {name: {**vars(side), "kl": None} for name, side in sides.items()}
    settings = {key: getattr(options, key) for key in ("samples", "length", "threads", "dtype")}
    print(json.dumps({**record, "ratios": found, "difference": difference(theirs, ours), **settings}))


def accuracy_words(side: Side) -> str:
    if not side.accuracy:
        return ""
    found = side.accuracy
    return (
        f" KL {found['kl_mean']:.6f} +- {found['kl_standard_error']:.6f} on {found['tokens']:,} tokens"
        f"  agreement {found['top1_agreement']:.4f}"
    )


def cost_words(side: Side) -> str:
    if side.seconds is None or side.peak_rss_bytes is None:
        return "  (made before)"
    return f"  {side.seconds:.0f} s  {side.peak_rss_bytes / 1e9:.2f} GB"


def ratios(theirs: Side, ours: Side) -> dict[str, float]:
    """Ours over theirs, of what was measured on both sides."""
    found = {}
    if theirs.accuracy:
        found["KL"] = ours.accuracy["kl_mean"] / theirs.accuracy["kl_mean"]
    if theirs.seconds and ours.seconds:
        found["wall"] = ours.seconds / theirs.seconds
    if theirs.peak_rss_bytes and ours.peak_rss_bytes:
        found["peak RSS"] = ours.peak_rss_bytes / theirs.peak_rss_bytes
    return found


def difference(theirs: Side, ours: Side) -> dict[str, float | None] | None:
    """Mean of ours minus theirs, token by token, with its standard error over sequences."""
    if theirs.kl is None or ours.kl is None:
        return None
    sequences = ours.accuracy["sequences"]
    mean, error = mean_and_error(ours.kl - theirs.kl, clusters([len(ours.kl) // sequences] * sequences))
    print(f"paired difference of KL: {mean:.6f}" + (f" +- {error:.6f}" if error else ""))
    return {"mean": mean, "standard_error": error}


if __name__ == "__main__":
    main()
