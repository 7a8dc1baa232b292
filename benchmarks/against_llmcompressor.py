"""llm-compressor's GPTQ and l4pack's side by side: same checkpoint, same tokens, same modules left alone.

    tools/make_llmc_venv.sh
    python benchmarks/against_llmcompressor.py SOURCE CALIBRATION HELDOUT [--samples 128] [--length 512] [--folder DIR]
    python benchmarks/against_llmcompressor.py .bench/midsize CALIBRATION --cost-only --samples 4   # benchmarks/midsize.py

Each side is one process (its interpreter's start, loading, solving and saving included) on the same number of threads, one
after the other. Wall time ends when the artifact is on disk; peak RSS is the process's own and its children's. Both
artifacts are then evaluated as `l4pack evaluate` does, on all of the held-out text. `--keep` takes an artifact that is in
--folder already instead of making it again, and times nothing. Recipe `int4-uniform` quantizes what llm-compressor's recipe does, to as many bits; for other
`--recipes`, sizes are printed beside the KL.

llm-compressor loads the checkpoint in `--dtype`: bfloat16, as its example has it, or float32, which is the faster one on
CPUs without bfloat16 products.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from paired import measure

from l4pack import __version__
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.evaluate.statistics import clusters, mean_and_error
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

SIDE = Path(__file__).with_name("llmcompressor_side.py")
THEIRS = "llm-compressor"
VERSIONS = "VERSIONS "


@dataclass
class Side:
    """What one side took and made."""

    seconds: float | None = None
    peak_rss_bytes: int | None = None
    peak_anonymous_bytes: int = 0
    cpu_seconds: float | None = None
    weight_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    kl: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)


def main() -> None:
    """Run both sides, evaluate both artifacts, print a table and one JSON object."""
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="against-"))
    folder.mkdir(parents=True, exist_ok=True)
    sides = {
        THEIRS: llmcompressor(options, folder),
        **{name: l4pack(options, folder, name) for name in options.recipes},
    }
    for name, side in sides.items():
        side.weight_bytes = open_folder(folder / name).weight_bytes
        if not options.cost_only:
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
    parser.add_argument(
        "--scheme", default="W4A16", help="llm-compressor's: W4A16 by GPTQ, NVFP4A16 and others rounded"
    )
    parser.add_argument("--recipes", nargs="+", default=["int4-uniform"], help="l4pack's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=None, help="keep the artifacts here")
    parser.add_argument("--keep", nargs="*", default=[], help="artifacts not to make again")
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
    command = [options.python, "-P", str(SIDE), options.source, str(tokens), str(folder / THEIRS)]
    command += [options.dtype, options.scheme]
    return measured(options, folder, THEIRS, command)


def l4pack(options: argparse.Namespace, folder: Path, recipe: str) -> Side:
    """`l4pack quantize`."""
    command = [
        sys.executable, "-m", "l4pack", "quantize", options.source, "--recipe", recipe, "--calibration", options.calibration,
        "--calibration-samples", str(options.samples), "--sequence-length", str(options.length), "--out", str(folder / recipe),
        "--compute", "cpu", "--restart", "--json",
    ]  # fmt: skip
    side = measured(options, folder, recipe, command)
    side.versions = {"l4pack": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return side


def measured(options: argparse.Namespace, folder: Path, name: str, command: list[str]) -> Side:
    """Run one side to its end, with what it wrote on disk; its output goes to NAME.log."""
    side = Side()
    if name in options.keep:
        return side
    shutil.rmtree(folder / name, ignore_errors=True)  # an artifact that is done would not be made again
    log = folder / f"{name}.log"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(options.threads))
    with log.open("wb") as stream:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **threads})
        status, usage = waited(process, side)
        os.sync()
    side.seconds, side.peak_rss_bytes = time.monotonic() - started, usage.ru_maxrss * 1024
    side.cpu_seconds = usage.ru_utime + usage.ru_stime
    lines = log.read_text(errors="replace").splitlines()
    if status:
        sys.exit("\n".join([f"{name} ended with status {status}", *lines[-20:]]))
    stated = [line.removeprefix(VERSIONS) for line in lines if line.startswith(VERSIONS)]
    side.versions = json.loads(stated[-1]) if stated else {}
    return side


def waited(process: subprocess.Popen[bytes], side: Side) -> tuple[int, resource.struct_rusage]:
    """Wait for the end, watching the memory that is no file's."""
    status = Path(f"/proc/{process.pid}/status")
    while True:
        with suppress(OSError, IndexError):
            kilobytes = int(status.read_text().split("RssAnon:")[1].split()[0])
            side.peak_anonymous_bytes = max(side.peak_anonymous_bytes, kilobytes * 1024)
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            return code, usage
        time.sleep(0.1)


def evaluate(options: argparse.Namespace, folder: Path, name: str, side: Side) -> None:
    """Mean KL to the original with its standard error, and every token's KL for the paired difference."""
    text = TextChoice(options.heldout, samples=10**6, sequence_length=options.length)
    [found] = measure([folder / name], open_source(options.source), text, folder / f"{name}.work")
    side.accuracy = {key: found.record[key] for key in ("kl_mean", "kl_standard_error", "top1_agreement", "tokens")}
    side.kl, side.lengths = found.kl, found.lengths


def report(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    """A line a side, each recipe's ratios to llm-compressor, and everything as JSON."""
    settings = {key: getattr(options, key) for key in ("samples", "length", "threads", "dtype")}
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    record: dict[str, Any] = {**settings, "sides": {}}
    for name, side in sides.items():
        print(f"{name:15} {side.weight_bytes / 1e6:.2f} MB" + accuracy_words(side) + cost_words(side))
        print(f"{'':15} {side.versions}")
        record["sides"][name] = {**vars(side), "kl": None, "lengths": None}
    for name in options.recipes:
        found = ratios(sides[THEIRS], sides[name])
        print(f"{name} over {THEIRS}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
        record["sides"][name] |= {"ratios": found, "difference": difference(sides[THEIRS], sides[name])}
    print(json.dumps(record))


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
    return (
        f"  {side.seconds:.0f} s ({side.cpu_seconds:.0f} s of CPU)  {side.peak_rss_bytes / 1e9:.2f} GB"
        f" ({side.peak_anonymous_bytes / 1e9:.2f} GB no file's)"
    )


def ratios(theirs: Side, ours: Side) -> dict[str, float]:
    """Ours over theirs, of what was measured on both sides."""
    found = {"size": ours.weight_bytes / theirs.weight_bytes}
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
    mean, error = mean_and_error(ours.kl - theirs.kl, clusters(ours.lengths))
    print(f"  paired difference of KL: {mean:.6f}" + (f" +- {error:.6f}" if error else ""))
    return {"mean": mean, "standard_error": error}


if __name__ == "__main__":
    main()
