"""Scales that calibration fixed, held against its own record of what it saw: the largest magnitude over that of E4M3.

A wrong one saturates or wastes the range of every token, and nothing in the weights shows it. The record has six digits,
and a stored scale those of its dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from l4pack.artifact.calibration_record import RECORD_NAME, read_calibration
from l4pack.artifact.kv_cache import scale_names
from l4pack.checkpoint.reader import Reader
from l4pack.errors import UsageError
from l4pack.quant.floats import widen
from l4pack.quant.grid import E4M3
from l4pack.quant.scales import input_global_scale
from l4pack.quant.suffixes import INPUT_SCALES, Suffix
from l4pack.verify.checks_tensors import FoundTensors
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact

_DIGITS = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 1e-5}  # more than rounding can move a scale
_CACHE = ("key_amax", "value_amax")


def check_recorded(artifact: OpenedArtifact, contents: FoundTensors, reader: Reader, found: Findings) -> None:
    """Input scales and KV-cache scales are those of the calibration record, where the artifact has one."""
    if RECORD_NAME not in artifact.files:
        return
    try:
        record = read_calibration(artifact.folder) or {}
    except UsageError as error:
        found.error("companion", RECORD_NAME, error.message)
        return
    for rule, name, amax in (*_inputs(contents, record), *_cache(artifact, contents, record)):
        seen = _numbers(amax)
        scale = widen(reader.tensor(name)).reshape(-1)
        of_fp4 = name.endswith(Suffix.INPUT_GLOBAL_SCALE)
        if of_fp4 and seen is None and (scale == 1).all():
            continue  # inputs that are not rounded
        wanted = None if seen is None or len(seen) != len(scale) else _scales(seen, of_fp4=of_fp4)
        if wanted is None:
            found.error(rule, name, f"{RECORD_NAME} does not say what it was made of")
            continue
        room = _DIGITS.get(artifact.entries[name].dtype, 0.0) * wanted
        sound = np.isfinite(scale) & (scale > 0) & (wanted > 0)  # what is not is told where values are checked
        wrong = np.flatnonzero(sound & (np.abs(scale - wanted) > room))
        if wrong.size:
            number = int(wrong[0])
            message = f"is {scale[number]:.6g}, {RECORD_NAME} makes it {wanted[number]:.6g}"
            found.error(rule, name, message)


def _inputs(contents: FoundTensors, record: Any) -> Iterator[tuple[str, str, Any]]:
    matrices = record["matrices"]
    for matrix in contents.matrices:
        for suffix in INPUT_SCALES:
            if suffix in matrix.parts:
                seen = matrices.get(matrix.linear.module)
                amax = seen.get("input_amax") if isinstance(seen, dict) else None
                yield "scale", matrix.parts[suffix].name, amax


def _scales(seen: np.ndarray[Any, np.dtype[np.float64]], *, of_fp4: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What is stored for magnitudes that were seen."""
    return np.array([input_global_scale(float(amax)) for amax in seen]) if of_fp4 else seen / E4M3.highest


def _cache(artifact: OpenedArtifact, contents: FoundTensors, record: Any) -> Iterator[tuple[str, str, Any]]:
    layers = record.get("kv_cache")
    for layer in range(artifact.config.text.num_hidden_layers):
        seen = layers.get(str(layer)) if isinstance(layers, dict) else None
        for name, key in zip(scale_names(artifact.layout.naming, layer), _CACHE, strict=True):
            if name in contents.kv_scales:
                yield "kv-scale", name, seen.get(key) if isinstance(seen, dict) else None


def _numbers(amax: Any) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """One number or a list of them; None for anything else."""
    values = amax if isinstance(amax, list) else [amax]
    if not values or any(not isinstance(value, int | float) or isinstance(value, bool) for value in values):
        return None
    return np.array(values, np.float64)
