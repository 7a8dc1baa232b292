"""A unit's weights as a scheme leaves them: quantized, and turned back into what a runtime multiplies with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from l4pack.calibration.attention import Attention, solve_attention
from l4pack.calibration.mlp import Inputs, Matrices, solve_mlp, solved_weights
from l4pack.calibration.rows import Block, UnitRows, blocks, expert_rows
from l4pack.errors import SourceError
from l4pack.formats.configuration import Activations
from l4pack.quant.dequantize import dequantize
from l4pack.quant.dtypes import FLOATS, FloatName
from l4pack.quant.grid import E4M3, ScaleDtype
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import NonFiniteError, quantize_block
from l4pack.recipe import Method, RecipeScheme
from l4pack.stream.activations import RoundedInputs
from l4pack.stream.layer import LayerPass
from l4pack.stream.units import Part, Unit, UnitWeights, module_names
from l4pack.stream.weights import LinearWeight, Weights


def altered(
    weights: Weights,
    unit: Unit,
    original: UnitWeights,
    scheme: RecipeScheme,
    activation: str,
    calibration: Solving | None,
) -> UnitWeights:
    """The unit with all its matrices given `scheme`. A calibrated one is solved for what is seen in `calibration`.

    Weight-only schemes give weights rounded to the model's dtype; where inputs are rounded too, weights are the exact
    products of code and scale and inputs are rounded as they come (as `stream.weights` reads an artifact). Raises
    SourceError for a weight that is not finite.
    """
    names = module_names(weights.checkpoint.config, unit)
    dtypes = {local: weights.float_name(module) for local, module in names.items()}
    try:
        if scheme.method is Method.GPTQ:
            assert calibration is not None
            made = _solved(unit, original, scheme, dtypes, activation, weights.model_dtype, calibration)
        else:
            made = {name: rounded(linear.weight, scheme, dtypes[name]) for name, linear in original.linears.items()}
    except NonFiniteError as error:
        raise SourceError(
            f"{unit}: a weight at output {error.row}, input {error.column} is infinite or NaN",
            hint="the checkpoint is damaged: download it again",
        ) from error
    rounding = _rounding(scheme)
    linears = {}
    for name, linear in original.linears.items():
        value = made[name] if rounding is not None else made[name].to(weights.model_dtype)
        linears[name] = LinearWeight(value.to(linear.weight.device, linear.weight.dtype), rounding)
    return UnitWeights(linears, original.tensors)


def rounded(weight: Tensor, scheme: RecipeScheme, dtype: FloatName) -> Tensor:
    """A matrix [out, in] rounded to nearest, as float32; `dtype` is the checkpoint's."""
    if scheme.scale_dtype is ScaleDtype.SOURCE:
        scheme = scheme.model_copy(update={"scale_dtype": ScaleDtype(FLOATS[dtype].word)})
    quantized = quantize_block(weight.float().cpu().numpy(), Layout.OUT_IN, "F32", scheme)
    return torch.from_numpy(dequantize(quantized, scheme, *weight.shape))


@dataclass(frozen=True)
class Solving:
    """A layer of the calibration text on its way, and to how many tokens a thin expert borrows."""

    seen: LayerPass
    min_tokens: int


def calibration_inputs(unit: Unit, solving: Solving) -> Inputs:
    """An MLP's inputs on the calibration text.

    Nothing before the unit is changed, so the original's inputs are the unit's own: only the down projection, which
    sees what quantized gate and up make of them, has something to make up for.
    """
    one = solving.seen
    taken = UnitRows(one.tokens)
    if unit.part is Part.EXPERT and unit.expert is not None and one.routing is not None:
        taken = expert_rows(unit.expert, one.routing, one.routing, solving.min_tokens)

    def generate() -> Iterator[Block]:
        for block in blocks(taken, one, one):
            original = None if block.original is None else block.original.float()
            yield Block(block.inputs.float(), original, block.weights, block.kept)

    return generate


def _solved(
    unit: Unit,
    original: UnitWeights,
    scheme: RecipeScheme,
    dtypes: dict[str, FloatName],
    activation: str,
    model_dtype: torch.dtype,
    calibration: Solving,
) -> dict[str, Tensor]:
    if unit.part is Part.ATTENTION:
        attention = Attention(original, calibration.seen, calibration.seen, model_dtype)
        solved = solve_attention(attention, scheme, dtypes)
        return {name: solved_weights(solution) for name, solution in solved.items()}
    matrices = {name: linear.weight.float() for name, linear in original.linears.items()}
    function: Any = ACT2FN[activation]
    inputs = calibration_inputs(unit, calibration)
    solutions = solve_mlp(Matrices(matrices, function, model_dtype), inputs, scheme, dtypes)
    return {name: solved_weights(solution) for name, solution in solutions.items()}


def _rounding(scheme: RecipeScheme) -> RoundedInputs | None:
    """What a runtime does to the inputs of a matrix; only FP8 schemes round them."""
    if scheme.activations is Activations.DYNAMIC_TOKEN:
        return RoundedInputs(E4M3, "token")
    if scheme.activations is Activations.DYNAMIC_GROUP and scheme.block_structure is not None:
        return RoundedInputs(E4M3, "group", scheme.block_structure[1])
    return None
