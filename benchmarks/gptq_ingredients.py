"""Which ingredients of GPTQ earn their place: each alone and together, by KL on held-out text.

    python benchmarks/gptq_ingredients.py SOURCE CALIBRATION HELDOUT [--samples 128] [--length 512] [--only NAME ...]

Every variant is the shipped recipe int4-uniform with some of its numbers changed, calibrated with the same tokens, written as an
artifact and evaluated as `l4pack evaluate` does, against answers of the original that are computed once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.evaluate.evaluate import evaluate
from l4pack.evaluate.inputs import EvaluationSettings
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe
from l4pack.text.choice import TextChoice

RTN: dict[str, Any] = {"method": "rtn", "gptq": None}


def gptq(observer: str = "minmax", act_order: bool = False, asymmetric: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"observer": observer, "gptq": {"act_order": act_order, "asymmetric": asymmetric, **more}}


VARIANTS: dict[str, dict[str, Any]] = {
    "rtn": {**RTN, "observer": "minmax"},
    "rtn mse": {**RTN, "observer": "mse"},
    "gptq": gptq(),
    "gptq mse": gptq("mse"),
    "gptq act": gptq("minmax", True),
    "gptq asym": gptq("minmax", False, 1.0),
    "gptq mse act": gptq("mse", True),
    "gptq mse asym": gptq("mse", False, 1.0),
    "gptq act asym": gptq("minmax", True, 1.0),
    "gptq mse act asym": gptq("mse", True, 1.0),
    "gptq mse act asym 0.5": gptq("mse", True, 0.5),
    "gptq mse act asym 0.75": gptq("mse", True, 0.75),
    "gptq mse act asym, dampening 0.03": gptq("mse", True, 1.0, dampening=0.03),
    "gptq mse act asym, dampening 0.003": gptq("mse", True, 1.0, dampening=0.003),
    "gptq mse act, 2 sweeps": gptq("mse", True, 0.0, sweeps=2),
    "gptq mse act asym, 1 sweep": gptq("mse", True, 1.0, sweeps=1),
    "gptq mse act asym, 2 sweeps": gptq("mse", True, 1.0, sweeps=2),
    "gptq mse act asym, 4 sweeps": gptq("mse", True, 1.0, sweeps=4),
    "gptq mse act asym, 8 sweeps": gptq("mse", True, 1.0, sweeps=8),
    "gptq mse act asym, 16 sweeps": gptq("mse", True, 1.0, sweeps=16),
}


def recipe_of(changes: dict[str, Any], samples: int, length: int, min_tokens: int | None) -> Recipe:
    values = load_recipe("int4-uniform").model_dump()
    values["schemes"]["int4"].update(changes)
    if changes.get("method") == "rtn":
        values["calibration"] = None
    else:
        values["calibration"].update(samples=samples, sequence_length=length, max_fallbacks=1.0, max_cold_experts=1.0)
        if min_tokens is not None:
            values["calibration"]["min_tokens"] = min_tokens
    return Recipe.model_validate(values)


def measure(recipe: Recipe, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = open_source(options.source)
    plan = make_plan(source, recipe)
    if plan.calibrated:
        plan = with_text(plan, options.calibration)
    out, kept = folder / "artifact", folder / "reference"
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    run_plan(plan, out)
    seconds = time.monotonic() - started
    text = TextChoice(options.heldout, samples=10**6, sequence_length=options.length)
    first = not kept.exists()
    settings = EvaluationSettings(
        work=folder / "work",
        text=text,
        save_reference=kept if first else None,
        reference=None if first else kept,
        compute="cpu",
    )
    found = evaluate(open_folder(out), source, settings)
    return {
        "seconds": seconds,
        **{key: found[key] for key in ("kl_mean", "kl_standard_error", "top1_agreement", "tokens")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--min-tokens", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = {name: VARIANTS[name] for name in options.only} if options.only else VARIANTS
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print(f"{'variant':36} {'KL':>9} {'s.e.':>8} {'agree':>7} {'make s':>7}")
        for name, changes in chosen.items():
            recipe = recipe_of(changes, options.samples, options.length, options.min_tokens)
            row = measure(recipe, options, Path(folder))
            print(
                f"{name:36} {row['kl_mean']:9.6f} {row['kl_standard_error']:8.6f} {row['top1_agreement']:7.4f} "
                f"{row['seconds']:7.1f}",
                flush=True,
            )
    print(json.dumps({"tokens": row["tokens"], "torch": torch.__version__}))


if __name__ == "__main__":
    main()
