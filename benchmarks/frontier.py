"""Predicted against measured: fit a model to many budgets, make every artifact, evaluate it.

    python benchmarks/frontier.py SOURCE SENSITIVITY CALIBRATION HELDOUT [--budgets 12] [--recipes int4-uniform int4] \
        [--folder DIR] [--draw docs/images/frontier.svg] [--beside "llm-compressor=BYTES:KL"]

SENSITIVITY is what `l4pack measure SOURCE` wrote. The budgets are spread evenly from the smallest artifact to `--most`
times its weights. Every artifact is calibrated and evaluated by the command line, as a user would do it; artifacts that
are in --folder already are not made again. Prints a table, the rank correlations, and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from l4pack.checkpoint.open import open_source
from l4pack.fit.budgets import Wish
from l4pack.fit.fit import Fitted, fit
from l4pack.measure.record import read_sensitivity


def main() -> None:
    """Fit, make and evaluate everything; print and draw."""
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="frontier-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [of_budget(options, folder, size) for size in budgets(options)]
    rows += [of_recipe(options, folder, name, {"name": name}) for name in options.recipes]
    report(options, rows)
    if options.draw:
        options.draw.parent.mkdir(parents=True, exist_ok=True)
        draw(options, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "sensitivity", "calibration", "heldout"):
        parser.add_argument(name)
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--most", type=float, default=1.5, help="largest budget over the smallest artifact's weights")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="more budgets, in bytes of tensors")
    parser.add_argument("--recipes", nargs="*", default=["int4-uniform", "int4"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--draw", type=Path, default=None)
    parser.add_argument("--beside", default=None, help="NAME=BYTES:KL of an artifact made by something else")
    return parser.parse_args()


def fitted(options: argparse.Namespace, size: int) -> Fitted:
    """The best artifact whose tensors take at most `size` bytes."""
    source, record = open_source(options.source), read_sensitivity(Path(options.sensitivity))
    numel = sum(unit.numel for unit in fit(source, record, Wish(bits=15.9)).units)
    kept = source.weight_bytes - 2 * numel
    return fit(source, record, Wish(bits=8 * (size - kept) / numel))


def budgets(options: argparse.Namespace) -> list[int]:
    """Bytes of tensors, evenly from the smallest artifact up, and those asked for."""
    source, record = open_source(options.source), read_sensitivity(Path(options.sensitivity))
    first = fit(source, record, Wish(bits=15.9)).frontier[0].nbytes
    step = first * (options.most - 1) / max(1, options.budgets - 1)
    return sorted([*(first + round(number * step) for number in range(options.budgets)), *options.sizes])


def of_budget(options: argparse.Namespace, folder: Path, size: int) -> dict[str, Any]:
    """Fit to a size, then make and evaluate."""
    found = fitted(options, size)
    recipe = folder / f"{size}.yaml"
    recipe.write_text(found.recipe_text)
    first = {"name": f"fit {size}", "budget": size, "predicted": found.solution.loss, "combined": found.combined}
    return of_recipe(options, folder, str(recipe), first)


def of_recipe(options: argparse.Namespace, folder: Path, recipe: str, first: dict[str, Any]) -> dict[str, Any]:
    """Make one artifact and evaluate it."""
    out = folder / Path(recipe).stem
    if not out.exists():
        calibrated = ["--calibration", options.calibration, "--calibration-samples", str(options.samples)]
        calibrated += ["--sequence-length", str(options.length)]
        needs = "calibration:" in Path(recipe).read_text() if recipe.endswith(".yaml") else True
        tool("quantize", options.source, "--recipe", recipe, "--out", str(out), *(calibrated if needs else []))
    accuracy = out / "accuracy.json"
    if not accuracy.exists():
        text = ["--text", options.heldout, "--samples", "1000000", "--sequence-length", str(options.length)]
        tool("evaluate", str(out), "--against", options.source, *text)
    record = json.loads(accuracy.read_text())
    row = {**first, "bytes": record["artifact_weight_bytes"], "measured": record["kl_mean"]}
    row["standard_error"] = record["kl_standard_error"]
    print(line(row), flush=True)
    return row


def tool(*words: str) -> None:
    """Run a command of l4pack's."""
    done = subprocess.run([sys.executable, "-m", "l4pack", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"l4pack {' '.join(words)}\n{done.stderr[-2000:]}")


def line(row: dict[str, Any]) -> str:
    predicted = f"{row['predicted']:.6f}" if "predicted" in row else f"{'':8}"
    combined = f"{row['combined']:.6f}" if row.get("combined") is not None else f"{'':8}"
    return (
        f"{row['name']:24} {row['bytes']:>12,} bytes  predicted {predicted} or {combined}  "
        f"measured {row['measured']:.6f} +- {row['standard_error']:.6f}"
    )


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Rank correlations, and everything as JSON."""
    from scipy.stats import kendalltau, spearmanr

    both = [row for row in rows if "predicted" in row]
    record: dict[str, Any] = {"source": options.source, "samples": options.samples, "length": options.length}
    for key in ("predicted", "combined"):
        pairs = [(row[key], row["measured"]) for row in both if row[key] is not None]
        if len(pairs) > 2:
            ours, theirs = zip(*pairs, strict=True)
            record[key] = {
                "spearman": float(spearmanr(ours, theirs).statistic),
                "kendall": float(kendalltau(ours, theirs).statistic),
                "measured_over_predicted": [round(after / before, 3) for before, after in pairs],
            }
            print(key, record[key])
    print(json.dumps({**record, "rows": rows}))


def draw(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Bytes against KL, and predicted against measured, side by side."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    fits = [row for row in rows if "predicted" in row]
    with rc_context({"svg.hashsalt": "l4pack", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        sizes = [row["bytes"] / 1e6 for row in fits]
        left.plot(sizes, [row["predicted"] for row in fits], "--", color="#8b8a84", label="fit, predicted")
        spread = [2 * row["standard_error"] for row in fits]
        left.errorbar(
            sizes, [row["measured"] for row in fits], yerr=spread, fmt="o-", color="#2a78d6", label="fit, measured"
        )
        for name, size, kl in uniform(options, rows):
            left.plot([size / 1e6], [kl], "s", color="#eb6834")
            left.annotate(name, (size / 1e6, kl), xytext=(5, 4), textcoords="offset points", fontsize=8)
        left.set(xlabel="weights, MB", ylabel="mean KL to the original, nats", yscale="log")
        left.legend()
        right.errorbar(
            [row["predicted"] for row in fits], [row["measured"] for row in fits], yerr=spread, fmt="o", color="#2a78d6"
        )
        ends = [min(row["measured"] for row in fits), max(row["predicted"] for row in fits)]
        right.plot(ends, ends, "--", color="#8b8a84")
        right.set(xlabel="predicted KL", ylabel="measured KL", xscale="log", yscale="log")
        right.xaxis.set_minor_formatter(NullFormatter())
        for axes in (left, right):
            axes.grid(visible=True, alpha=0.3)
        figure.savefig(options.draw, metadata={"Date": None})


def uniform(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    """What is drawn beside the frontier."""
    found = [(row["name"], row["bytes"], row["measured"]) for row in rows if "predicted" not in row]
    if options.beside:
        name, _, numbers = options.beside.partition("=")
        size, _, kl = numbers.partition(":")
        found.append((name, int(size), float(kl)))
    return found


if __name__ == "__main__":
    main()
