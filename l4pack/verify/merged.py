"""Global scales of matrices that runtimes hold in one: vLLM takes that of the first, or the largest, for all of them."""

from __future__ import annotations

from collections import defaultdict

from l4pack.checkpoint.reader import Reader
from l4pack.model.parts import merged_with
from l4pack.quant.suffixes import Suffix
from l4pack.verify.checks_tensors import FoundTensors
from l4pack.verify.findings import Findings


def check_global_scales(contents: FoundTensors, reader: Reader, found: Findings) -> None:
    """Gate and up, and query, key and value, have one global scale."""
    together: dict[object, list[tuple[str, float]]] = defaultdict(list)
    for matrix in contents.matrices:
        linear, entry = matrix.linear, matrix.parts.get(Suffix.GLOBAL_SCALE)
        merged = merged_with(linear.projection)
        if entry is not None and len(merged) > 1:
            scale = float(reader.tensor(entry.name)[0])
            together[linear.role, linear.layer, linear.expert, merged].append((entry.name, scale))
    for scales in together.values():
        for name, scale in scales[1:]:
            if scale != scales[0][1]:
                message = f"is {scale:g}, {scales[0][0]} is {scales[0][1]:g}: runtimes take one for both"
                found.error("scale", name, message)
