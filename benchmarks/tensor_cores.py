"""What rounding a GPU's factors to TF32 does to an artifact, without a GPU.

    python benchmarks/tensor_cores.py MODEL CALIBRATION HELDOUT [--recipe int4-uniform] [--samples 64] [--length 512]

The tests' pretended device computes both artifacts, in one with products that round their factors where torch is told to let
tensor cores do them, as a GPU's would. Both are evaluated on a CPU, on the same held-out tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

from paired import Measured, measure
from pretend_device import pretend_device

from l4pack.checkpoint.open import open_source
from l4pack.cli.app import app
from l4pack.evaluate.statistics import clusters, mean_and_error
from l4pack.text.choice import TextChoice


def main() -> None:
    """Make both, evaluate both, print both and their difference."""
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="tensor-cores-") as made:
        folders = [Path(made, name) for name in ("whole", "tf32")]
        for folder in folders:
            quantize(options, folder, tf32=folder.name == "tf32")
        text = TextChoice(options.heldout, options.heldout_samples, options.length)
        whole, rounded = measure(folders, open_source(options.model), text, Path(made, "work"))
    for name, one in (("whole factors", whole), ("TF32", rounded)):
        print(f"{name:14} KL {one.record['kl_mean']:.6f} +- {one.record['kl_standard_error']:.6f}")
    print_difference(whole, rounded)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--recipe", default="int4-uniform")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each, and of each held-out one")
    parser.add_argument("--heldout-samples", type=int, default=80)
    return parser.parse_args()


def quantize(options: argparse.Namespace, folder: Path, *, tf32: bool) -> None:
    """`l4pack quantize` on the pretended device."""
    words = ["quantize", options.model, "--recipe", options.recipe, "--out", folder, "--compute", "cuda", "--quiet"]
    words += ["--calibration", options.calibration, "--calibration-samples", options.samples]
    words += ["--sequence-length", options.length]
    with pretend_device(gradients=options.recipe.endswith("-best"), tf32=tf32):
        app([str(word) for word in words], standalone_mode=False)


def print_difference(whole: Measured, rounded: Measured) -> None:
    """Token by token."""
    mean, error = mean_and_error(rounded.kl - whole.kl, clusters(whole.lengths))
    assert error is not None
    print(f"{'difference':14}    {mean:+.6f} +- {error:.6f}")


if __name__ == "__main__":
    main()
