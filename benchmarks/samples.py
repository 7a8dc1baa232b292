"""Held-out KL against the number of calibration samples, drawn.

    python benchmarks/samples.py measure POINTS.json NAME SOURCE CALIBRATION HELDOUT [--samples 4 16 64 256]
    python benchmarks/samples.py draw docs/images/kl-by-samples.svg POINTS.json

`measure` makes `int4-uniform` artifacts with that many sequences each (0: rounding, which needs none) and adds what it finds, under
NAME, to POINTS.json; a text with fewer sequences gives as many as it has. `draw` makes a panel a model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptq_ingredients import VARIANTS, measure, recipe_of

from l4pack.checkpoint.open import open_source
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

SHIPPED = "gptq mse act asym, 4 sweeps"
ROUNDING = "rtn"


def main() -> None:
    """Measure or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.set_defaults(run=measure_points)
    one.add_argument("points", type=Path)
    for name in ("name", "source", "calibration", "heldout"):
        one.add_argument(name)
    one.add_argument("--samples", type=int, nargs="+", default=[0, 4, 16, 64, 256])
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--threads", type=int, default=2)
    other = commands.add_parser("draw")
    other.set_defaults(run=draw)
    other.add_argument("drawing", type=Path)
    other.add_argument("points", type=Path)
    options = parser.parse_args()
    options.run(options)


def measure_points(options: argparse.Namespace) -> None:
    """One artifact for each number of samples; every point is written as soon as it is known."""
    torch.set_num_threads(options.threads)
    known = json.loads(options.points.read_text()) if options.points.exists() else {}
    found = {point["samples"]: point for point in known.get(options.name, [])}
    most = sequences_in(options)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for samples in sorted({min(wanted, most) for wanted in options.samples}):
            variant = VARIANTS[SHIPPED if samples else ROUNDING]
            row = measure(recipe_of(variant, max(samples, 1), options.length, None), options, Path(folder))
            found[samples] = {"samples": samples, "length": options.length, **row}
            print(f"{samples:5} samples: KL {row['kl_mean']:.6f} +- {row['kl_standard_error']:.6f}", flush=True)
            known[options.name] = [found[key] for key in sorted(found)]
            options.points.write_text(json.dumps(known, indent=1) + "\n")


def sequences_in(options: argparse.Namespace) -> int:
    """How many sequences the calibration text is cut into."""
    source = open_source(options.source)
    choice = TextChoice(options.calibration, 10**6, options.length)
    return len(load_text(choice, load_tokenizer(source), source.config.text.max_position_embeddings).sequences)


def draw(options: argparse.Namespace) -> None:
    """The points of every model in a panel of its own, as SVG; the same points give the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "l4pack", "svg.fonttype": "none"}
    from matplotlib import pyplot

    known: dict[str, list[dict[str, Any]]] = json.loads(options.points.read_text())
    figure, panels = pyplot.subplots(
        1, len(known), figsize=(4.2 * len(known), 3.4), squeeze=False, layout="constrained"
    )
    for panel, (name, points) in zip(panels[0], known.items(), strict=True):
        draw_panel(panel, name, points)
    options.drawing.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.drawing, metadata={"Date": None})


def draw_panel(panel: Any, name: str, points: list[dict[str, Any]]) -> None:
    """KL with its standard error, the number of samples on a logarithmic axis, rounding as a dashed line."""
    solved = [point for point in points if point["samples"]]
    counts = [point["samples"] for point in solved]
    values, errors = ([point[key] for point in solved] for key in ("kl_mean", "kl_standard_error"))
    panel.errorbar(counts, values, yerr=errors, marker="o", capsize=3, color="#1f5fa8", label="int4-uniform")
    for point in points:
        if point["samples"] == 0:
            panel.axhline(point["kl_mean"], linestyle="--", color="#777777", label="rounding, no text (int4-rtn)")
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_title(name)
    panel.set_xlabel(f"calibration samples of {solved[0]['length']} tokens")
    panel.set_ylabel("mean KL on held-out text, nats")
    panel.legend(frameon=False, loc="lower left")
    panel.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    main()
