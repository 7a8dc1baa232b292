"""A study of accuracy: what each tool does to a model's answers, at how many bytes, by one evaluator for all.

    python benchmarks/accuracy.py --models demo --tools l4pack llm-compressor --seeds 0 1 2
    python benchmarks/accuracy.py --models mine=MODEL:CALIBRATION:HELDOUT --methods int4-uniform W4A16
    python benchmarks/accuracy.py --report      # tables and drawing from the record alone

A cell is one model quantized by one method on one draw of the calibration text. Each tool makes its artifact in a process
of its own from the same tokens; llama.cpp's files are decoded to float32 by gguf's library. All that a call made is
then evaluated beside the original in one pass, as `l4pack compare` does it, on the same held-out tokens. A cell that is
in --record is not made again, and an artifact in --work not either, so a study goes on where it was left, and grows by
other people's cells: name only what is to be added.

The environments of the other tools: `tools/make_llmc_venv.sh`, `tools/make_autoround_venv.sh`, and a libllama.so as
`llama_cpp_types.py` tells. A tool is left out unless it is named.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accuracy_page import draw, write_tables
from accuracy_record import Cell, Record, by_sequence, percentile_error, read_record
from accuracy_tools import TOOLS, Job, Made, Model, Setting, known
from outliers import outliers
from paired import Measured, measure

from l4pack.artifact.contents import measured_digest
from l4pack.checkpoint.open import open_source
from l4pack.demo import calibration_path, heldout_path, model_path
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "accuracy.json", HERE.parent / "docs" / "explanation" / "accuracy.md"
DRAWING = HERE.parent / "docs" / "images" / "accuracy.svg"
OUTLIER_SEQUENCES = 16
KEPT = ("kl_mean", "kl_standard_error", "kl_p99", "top1_agreement", "top1_agreement_standard_error", "tokens")


def main() -> None:
    """Make and evaluate what is missing, model by model, then write tables and drawing."""
    options = arguments()
    settings = {
        "calibration_samples": options.samples, "sequence_length": options.length, "heldout_samples": options.heldout_samples,
    }  # fmt: skip
    record = read_record(options.record, settings)
    for model in options.models:
        describe(record, model)
        missing = [cell for cell in wanted(options, model) if record.find(*cell) is None]
        for batch in batches(missing, options.together):
            add(options, record, model, batch)
            record.write(options.record)
    if options.report or options.models:
        write_tables(record, PAGE)
        draw(record, DRAWING)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", type=model_of, default=[], help="demo, or NAME=MODEL:CALIBRATION:HELDOUT"
    )
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=["l4pack"])
    parser.add_argument("--methods", nargs="*", help="some of a tool's: " + "; ".join(map(words_of, TOOLS)))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="draws of the calibration text")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each, and of each held-out one")
    parser.add_argument("--heldout-samples", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", type=int, default=6, help="most artifacts evaluated in one pass")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".bench" / "accuracy")
    parser.add_argument("--llmcompressor", type=Path, default=".venv-llmc/bin/python", help="its interpreter")
    parser.add_argument("--autoround", type=Path, default=".venv-autoround/bin/python", help="its interpreter")
    parser.add_argument("--iterations", type=int, default=200, help="auto-round's")
    parser.add_argument("--libllama", type=Path)
    parser.add_argument(
        "--report", action="store_true", help="write tables and drawing, whether cells were added or not"
    )
    return parser.parse_args()


def model_of(text: str) -> Model:
    """A model as it is named at the command line."""
    if text == "demo":
        return Model("demo", str(model_path()), str(calibration_path()), str(heldout_path()))
    name, _, places = text.partition("=")
    parts = places.split(":")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is neither demo nor NAME=MODEL:CALIBRATION:HELDOUT")
    return Model(name, *parts)


def words_of(tool: str) -> str:
    return f"{tool}: {', '.join(TOOLS[tool])}"


def wanted(options: argparse.Namespace, model: Model) -> Iterator[tuple[str, str, str, int]]:
    """Cells that were asked for, cheap seeds last."""
    for seed in options.seeds:
        for tool in options.tools:
            for method in TOOLS[tool]:
                if options.methods is None or method in options.methods:
                    yield model.name, tool, method, seed


def batches(cells: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """So many at once."""
    for first in range(0, len(cells), size):
        yield cells[first : first + size]


def add(options: argparse.Namespace, record: Record, model: Model, cells: Sequence[tuple[str, str, str, int]]) -> None:
    """Make a few cells' artifacts, evaluate them in one pass and keep what was found."""
    setting = Setting(
        options.work, options.samples, options.length, options.threads, options.llmcompressor, options.autoround,
        options.iterations, options.libllama,
    )  # fmt: skip
    made, folders = [], []
    for _, tool, method, seed in cells:
        job = Job(setting, model, method, seed, options.work / model.name / f"{tool}-{method}-{seed}")
        made.append(make(tool, job))
        folders.append(job.folder / made[-1].checkpoint)
    text = TextChoice(model.heldout, options.heldout_samples, options.length)
    found = measure(folders, open_source(model.source), text, options.work / model.name / "hidden")
    for cell, one, measured in zip(cells, made, found, strict=True):
        record.cells.append(cell_of(cell, one, measured))
        print(line(record.cells[-1]), flush=True)
    add_original(record, model, found[0])


def make(tool: str, job: Job) -> Made:
    """The artifact, unless it is there."""
    done = job.folder / "made.json"
    if done.exists():
        return known(json.loads(done.read_text()))
    job.folder.mkdir(parents=True, exist_ok=True)
    made = TOOLS[tool][job.method](job)
    done.write_text(json.dumps(asdict(made)))
    print(f"{job.model.name} {tool} {job.method} {job.seed}: {made.cpu_seconds:.0f} s of processor time", flush=True)
    return made


def cell_of(cell: tuple[str, str, str, int], made: Made, measured: Measured) -> Cell:
    """All that is kept of one artifact."""
    model, tool, method, seed = cell
    return {
        "model": model, "tool": tool, "method": method, "seed": seed, "bytes": made.weight_bytes,
        **{key: measured.record[key] for key in KEPT},
        "kl_p99_standard_error": percentile_error(measured.kl, measured.lengths, 0.99),
        "kl_by_sequence": by_sequence(measured.kl, measured.lengths),
        "cpu_seconds": made.cpu_seconds and round(made.cpu_seconds), "versions": made.versions,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def line(cell: Cell) -> str:
    return (
        f"{cell['model']:10} {cell['tool']:14} {cell['method']:18} {cell['seed']} {cell['bytes'] / 1e6:8.3f} MB  KL "
        f"{cell['kl_mean']:.6f} +- {cell['kl_standard_error']:.6f}  99 % {cell['kl_p99']:.5f}  "
        f"agreement {cell['top1_agreement']:.4f}"
    )


def describe(record: Record, model: Model) -> None:
    """What the model is; leaves the program where a model of that name is another one."""
    source = open_source(model.source)
    text = source.config.text
    found = {
        "digest": measured_digest(source, lambda: None),
        "bytes": source.weight_bytes,
        "layers": text.num_hidden_layers,
        "experts": text.num_local_experts,
        "moe_every": text.interleave_moe_layer_step,
        "hidden": text.hidden_size,
    }
    before = record.models.setdefault(model.name, found)
    if before["digest"] != found["digest"]:
        raise SystemExit(f"the {model.name} in the record is another model: give this one another name")


def add_original(record: Record, model: Model, measured: Measured) -> None:
    """Of the original on the held-out tokens: bits per byte, from its perplexity, and how far activations stick out."""
    about = record.models[model.name]
    if "activations" in about:
        return
    source = open_source(model.source)
    tokenizer = load_tokenizer(source)
    choice = TextChoice(model.heldout, record.settings["heldout_samples"], record.settings["sequence_length"])
    text = load_text(choice, tokenizer, source.config.text.max_position_embeddings)
    tokens = [one.tokens for one in text.sequences]
    size = sum(len(part.encode()) for part in tokenizer.batch_decode(tokens, skip_special_tokens=True))
    nats = math.log(measured.record["perplexity_reference"]) * measured.record["tokens"]
    about["bits_per_byte"] = round(nats / math.log(2) / size, 4)
    about["activations"] = outliers(Path(model.source), tokens[:OUTLIER_SEQUENCES])


if __name__ == "__main__":
    main()
