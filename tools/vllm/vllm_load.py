"""Load a Llama 4 checkpoint with vLLM's own weight loader, on a machine without a GPU, and say whether it loads right.

    .venv-vllm/bin/python tools/vllm/vllm_load.py ARTIFACT [--against BF16_SOURCE [--exact]] [--json]

Fails when the model can't be built, a tensor is refused, or a parameter keeps a value that did not come from the files.
With `--against`, what vLLM then holds (q and k rows permuted, experts stacked) is dequantized and compared with the
source loaded by vLLM's BF16 path: unquantized tensors must be the same bits; quantized ones must be as close as their
bits allow, or with `--exact` the same bits too (for a source that holds the artifact's own dequantized values).
Exit status: 0 loads right, 1 something was found, 2 usage.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_environment import VLLM_VERSION, prepare, skip_kernel_selection
from vllm_load_dequantize import Matrix, matrices
from vllm_load_model import Finding, Loaded, load, start_single_rank

ERROR_LIMITS = {4: 0.3, 8: 0.08}
"""Largest ||dequantized - source|| / ||source|| of one matrix, by bits: several times what rounding costs, a fraction of
what a misplaced row, column or zero point does."""


@dataclass
class ClassReport:
    """The worst over all matrices of one kind, such as `self_attn.q_proj`."""

    matrices: int = 0
    num_bits: int | None = None  # the fewest of any layer, None where no layer is quantized
    max_relative_error: float = 0.0  # largest |difference| over largest |source|
    max_rms_error: float = 0.0  # ||difference|| over ||source||
    exact: bool = True
    worst: str = ""


def compare(artifact: Loaded, source: Loaded, exact: bool) -> dict[str, ClassReport]:
    """Compare every matrix of two loaded models; differences become findings of `artifact`."""
    assert artifact.model is not None
    assert source.model is not None
    reports: dict[str, ClassReport] = {}
    reference = {matrix.name: matrix for matrix in matrices(source.model)}
    for matrix in matrices(artifact.model):
        report = reports.setdefault(matrix.kind, ClassReport())
        expected = reference.pop(matrix.name, None)
        if expected is None or expected.values.shape != matrix.values.shape:
            artifact.findings.append(Finding("differs", matrix.name, "the source has no such matrix of this shape"))
            continue
        finding = _measure(matrix, expected.values, report, exact)
        if finding is not None:
            artifact.findings.append(finding)
    artifact.findings += [Finding("differs", name, "only in the source") for name in reference]
    return reports


def _measure(matrix: Matrix, expected: torch.Tensor, report: ClassReport, exact: bool) -> Finding | None:
    # The source's values are BF16, so an exact product has to be rounded to that before it can be the same.
    same = torch.equal(matrix.values.to(torch.bfloat16), expected.to(torch.bfloat16))
    difference = matrix.values - expected
    rms = float(difference.norm() / expected.norm().clamp_min(1e-30))
    relative = float(difference.abs().max() / expected.abs().max().clamp_min(1e-30))
    report.matrices += 1
    if matrix.num_bits is not None:
        report.num_bits = min(matrix.num_bits, report.num_bits or matrix.num_bits)
    report.exact &= same
    report.max_relative_error = max(report.max_relative_error, relative)
    if rms >= report.max_rms_error:
        report.max_rms_error, report.worst = rms, matrix.name
    if same:
        return None
    if exact or matrix.num_bits is None:
        return Finding("differs", matrix.name, f"not the same values as the source (relative RMS error {rms:.3g})")
    if not rms <= ERROR_LIMITS[matrix.num_bits]:  # also true of NaN
        limit = ERROR_LIMITS[matrix.num_bits]
        return Finding("differs", matrix.name, f"relative RMS error {rms:.3g}, more than {limit} for its bits")
    return None


def start() -> None:
    """Make this process able to build vLLM models."""
    prepare()
    skip_kernel_selection()
    start_single_rank()


def _compare(artifact: Loaded, source: Loaded, exact: bool) -> dict[str, ClassReport]:
    try:
        return compare(artifact, source, exact)
    except NotImplementedError as error:
        artifact.findings.append(Finding("unsupported", "config.json", str(error)))
        return {}


def check(artifact: Path, against: Path | None, exact: bool) -> dict[str, Any]:
    """Load `artifact`, compare it with `against` if given, and report as plain data.

    Needs `start` first.
    """
    started = time.monotonic()
    loaded = load(artifact)
    classes: dict[str, ClassReport] = {}
    if against is not None and not loaded.findings:
        source = load(against)
        loaded.findings += [Finding("source", finding.where, finding.message) for finding in source.findings]
        if not source.findings:
            classes = _compare(loaded, source, exact)
    model = loaded.model
    return {
        "ok": not loaded.findings,
        "vllm": VLLM_VERSION,
        "artifact": str(artifact),
        "against": str(against) if against else None,
        "exact": exact,
        "architecture": type(model).__name__ if model is not None else None,
        "parameters": sum(1 for _ in model.parameters()) if model is not None else 0,
        "tensors_read": loaded.tensors_read,
        "kv_scales": loaded.kv_scales,
        "findings": [asdict(finding) for finding in loaded.findings],
        "classes": {kind: asdict(report) for kind, report in sorted(classes.items())},
        "seconds": round(time.monotonic() - started, 2),
    }


def summary(report: dict[str, Any]) -> str:
    """One line for people."""
    if not report["ok"]:
        first = report["findings"][0]
        more = len(report["findings"]) - 1
        rest = f" (and {more} more)" if more else ""
        return f"FAIL {report['artifact']}: {first['rule']}: {first['where']}: {first['message']}{rest}"
    line = f"ok {report['artifact']}: vLLM {report['vllm']} {report['architecture']} filled"
    line += f" {report['parameters']} parameters from {report['tensors_read']} tensors"
    if not report["classes"]:
        return f"{line}; not compared with a source"
    quantized = {kind: entry for kind, entry in report["classes"].items() if entry["num_bits"] is not None}
    if all(entry["exact"] for entry in report["classes"].values()):
        return f"{line}; all values equal to the source's"
    kind, worst = max(quantized.items(), key=lambda item: item[1]["max_rms_error"])
    return f"{line}; largest relative RMS error {worst['max_rms_error']:.4f} ({kind}, {worst['num_bits']} bits)"


def main() -> int:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--against", type=Path, metavar="SOURCE", help="BF16 checkpoint to compare values with")
    parser.add_argument("--exact", action="store_true", help="demand the source's very values (needs --against)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of one line")
    options = parser.parse_args()
    if options.exact and options.against is None:
        parser.error("--exact needs --against")
    for folder in [options.artifact, *([options.against] if options.against else [])]:
        if not (folder / "config.json").is_file():
            parser.error(f"{folder} has no config.json")
    start()
    report = check(options.artifact, options.against, options.exact)
    print(json.dumps(report, indent=1) if options.json else summary(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
