"""What matrices with the same inputs are solved for: the moments of those, factored once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

from torch import Tensor

from l4pack.calibration.moments import Moments
from l4pack.calibration.rows import Block
from l4pack.quant import gptq
from l4pack.quant.dtypes import FloatName
from l4pack.quant.scales import global_scale
from l4pack.recipe import GptqOptions, RecipeScheme
from l4pack.stream.rows import rows_at_once


def moments_of(
    blocks: Iterable[Block], width: int, options: GptqOptions, tokens: int = 0, *, thin: bool = True
) -> Moments:
    """Those of inputs [tokens, width]; how many come, 0 if that is not known, spares keeping any that will be too many."""
    moments: Moments | None = None
    for block in blocks:
        if moments is None:
            cross = block.original is not None and options.asymmetric > 0
            moments = Moments(width, cross=cross, device=block.inputs.device, expected=tokens, thin=thin)
        moments.add(block.inputs, block.original, block.weights)
    assert moments is not None
    return moments


def problem_of(moments: Moments, options: GptqOptions, outputs: int) -> gptq.Problem:
    """The problem of all matrices that see these inputs, which have so many `outputs` together; the sums are used up."""
    gathered = moments.finish()
    for aim in (gathered.cross, gathered.difference):
        if aim is not None:
            aim *= options.asymmetric
    return gptq.prepare_problem(
        gathered.hessian,
        cross=gathered.cross,
        inputs=gathered.inputs,
        difference=gathered.difference,
        act_order=options.act_order,
        dampening=options.dampening,
        outputs=outputs,
    )


class Given(TypedDict):
    """What a matrix is solved with beside its problem and scheme."""

    sweeps: int
    source_dtype: FloatName
    rows_at_once: int
    global_scale: float | None


def given_for(weight: Tensor, scheme: RecipeScheme, dtype: FloatName, fused: Sequence[Tensor]) -> Given:
    """For one matrix [out, in]; `dtype` is the source's, `fused` are those that runtimes hold in one with it, itself
    included."""
    assert scheme.gptq is not None
    return {
        "sweeps": scheme.gptq.sweeps,
        "source_dtype": dtype,
        "rows_at_once": rows_at_once(weight.device.type, weight.shape[1]),
        "global_scale": _global_scale(fused) if scheme.globally_scaled else None,
    }


def _global_scale(weights: Iterable[Tensor]) -> float:
    """That of matrices which runtimes hold in one."""
    amax = max(float(end.abs()) for weight in weights for end in weight.aminmax())
    return global_scale(amax if math.isfinite(amax) else 1.0)  # solving tells which weight is not finite
