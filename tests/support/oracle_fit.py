"""Plain references for `fit`: every combination tried, and constraints checked on a plan's tensors without fit's code."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict

UNIT = re.compile(r".*\blayers\.(\d+)\.(?:self_attn|feed_forward)\.")


def best_of_all(losses, limits):
    """The least total loss over all combinations within all limits (costs, bound), or None."""
    best = None
    for picks in itertools.product(*(range(len(row)) for row in losses)):
        if all(sum(row[pick] for row, pick in zip(costs, picks, strict=True)) <= bound for costs, bound in limits):
            loss = sum(row[pick] for row, pick in zip(losses, picks, strict=True))
            best = loss if best is None else min(best, loss)
    return best


def part_of(name):
    """The part of a layer that must have one scheme, from a tensor's name."""
    if "vision_model." in name:
        return None
    if ".self_attn." in name and re.search(r"\.(q|k|v|o)_proj\.", name):
        return "attention"
    if ".experts." in name:
        return "routed experts"
    if ".shared_expert." in name:
        return "shared expert"
    return "mlp" if re.search(r"\.feed_forward\.(gate|up|down)_proj\.", name) else None


def what(tensor):
    """What one stored weight says of its scheme: integers with their width and group, floats, or nothing."""
    suffix = tensor.name.rpartition(".")[2]
    if suffix == "weight_packed":
        return "packed"
    return tensor.dtype if suffix == "weight" else None


def broken_rules(plan, runtime, tp=1):
    """What of reference rules a planned artifact breaks, read off its tensors' names, dtypes and shapes alone."""
    found, seen = [], defaultdict(set)
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    for tensor in plan.tensors:
        part = part_of(tensor.name)
        kind = what(tensor)
        if kind is None:
            continue
        quantized = kind in ("packed", "F8_E4M3")
        if part is None:
            if quantized:
                found.append(f"{tensor.name} is quantized")
            continue
        layer = int(UNIT.match(tensor.name)[1])
        module = tensor.name.rpartition(".")[0]
        scale = shapes.get(f"{module}.weight_scale", ())
        asymmetric = f"{module}.weight_zero_point" in shapes
        columns = tensor.shape[1] * (32 // plan_bits(plan, tensor) if kind == "packed" else 1)
        group = columns // scale[1] if kind == "packed" else None
        block = kind == "F8_E4M3" and len(scale) == 2 and scale[0] != tensor.shape[0]
        seen[layer, part].add((tensor.scheme, kind, group, asymmetric, block))
        if quantized:
            found += _matrix_rules(tensor, part, runtime, tp, columns, group, asymmetric, block)
    found += [f"layer {layer} {part}: {kinds}" for (layer, part), kinds in seen.items() if len(kinds) > 1]
    return found


def plan_bits(plan, tensor):
    """Width of a packed tensor's levels, from its scheme."""
    return plan.recipe.schemes[tensor.scheme].num_bits


def _matrix_rules(tensor, part, runtime, tp, columns, group, asymmetric, block):
    """loaders.md, section by section: attention, zero points, weight-only FP8 experts, groups and blocks on each GPU."""
    name, rows = tensor.name, tensor.shape[0]
    runtimes = {"vllm", "sglang", "transformers"} if runtime == "any" else {runtime}
    split_in = ".down_proj." in name or ".o_proj." in name
    local_rows, local_columns = (rows, columns / tp) if split_in else (rows / tp, columns)
    broken = []
    if part == "attention" and "sglang" in runtimes:
        broken.append(f"{name}: sglang does not permute quantized q and k")
    if part == "attention" and "vllm" in runtimes and (asymmetric or block):
        broken.append(f"{name}: vllm reads no zero points and no blocks in q and k")
    if asymmetric and {"transformers", "sglang"} & runtimes:
        broken.append(f"{name}: zero points")
    if {"vllm", "sglang"} & runtimes:
        if group and local_columns % group:
            broken.append(f"{name}: groups are cut")
        if block and (local_rows % 128 or local_columns % 128):
            broken.append(f"{name}: blocks are cut")
    return broken
