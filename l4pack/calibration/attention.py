"""Solving a layer's attention: queries, keys and values for its inputs, then the output projection for what the solved
ones make of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.calibration.mlp import solved_weights
from l4pack.calibration.problems import given_for, moments_of, problem_of
from l4pack.calibration.rows import Block
from l4pack.model import parts
from l4pack.quant import gptq
from l4pack.quant.dtypes import FloatName
from l4pack.quant.solution import Solution
from l4pack.recipe import RecipeScheme
from l4pack.stream.layer import LayerPass
from l4pack.stream.units import UnitWeights
from l4pack.stream.weights import LinearWeight

PROJECTIONS = tuple(f"{parts.ATTENTION}.{name}" for name in (parts.QUERY, parts.KEY, parts.VALUE))
OUTPUT = f"{parts.ATTENTION}.{parts.OUTPUT}"


@dataclass(frozen=True)
class Attention:
    """A layer's attention with the source's weights, where its tokens are: those of the model as quantized so far, and of
    the original (None: their mismatch is not made up for); and the dtype that runtimes round weights to."""

    weights: UnitWeights
    quantized: LayerPass
    original: LayerPass | None
    model_dtype: torch.dtype

    def matrix(self, name: str) -> Tensor:
        """One of its matrices, float32 [out, in]."""
        linear = self.weights.linears[name]
        assert isinstance(linear, LinearWeight)
        return linear.weight.float()

    def inputs(self) -> Iterator[Block]:
        """What queries, keys and values see."""
        original = None if self.original is None else self.original.attention_inputs(self.weights)
        return _paired(self.quantized.attention_inputs(self.weights), original)

    def heads(self, solved: Mapping[str, Tensor]) -> Iterator[Block]:
        """What the output projection sees, once some of the others are `solved`."""
        given = self.weights.linears
        linears = {**given, **{name: LinearWeight(weight) for name, weight in solved.items()}}
        original = None if self.original is None else self.original.attention_heads(self.weights)
        return _paired(self.quantized.attention_heads(UnitWeights(linears, self.weights.tensors)), original)


def solve_attention(attention: Attention, scheme: RecipeScheme, dtypes: Mapping[str, FloatName]) -> dict[str, Solution]:
    """Solutions by the matrices' names in the unit; those to be solved have their dtypes in the source in `dtypes`.

    Raises NonFiniteError for a weight that is not finite.
    """
    assert scheme.gptq is not None
    solutions: dict[str, Solution] = {}
    names = [name for name in PROJECTIONS if name in dtypes]
    if names:
        solutions = _solve(attention, names, attention.inputs(), scheme, dtypes)
    if OUTPUT in dtypes:
        solved = {name: solved_weights(one, attention.model_dtype) for name, one in solutions.items()}
        solutions |= _solve(attention, [OUTPUT], attention.heads(solved), scheme, dtypes)
    return solutions


def _solve(
    attention: Attention,
    names: list[str],
    inputs: Iterable[Block],
    scheme: RecipeScheme,
    dtypes: Mapping[str, FloatName],
) -> dict[str, Solution]:
    """Solve matrices that see the same inputs."""
    assert scheme.gptq is not None
    matrices = {name: attention.matrix(name) for name in names}
    width, fused = matrices[names[0]].shape[1], list(matrices.values())
    moments = moments_of(inputs, width, scheme.gptq, attention.quantized.tokens)
    problem = problem_of(moments, scheme.gptq, outputs=sum(map(len, fused)))
    del moments
    return {
        name: gptq.solve_problem(problem, weight, scheme, **given_for(weight, scheme, dtypes[name], fused))
        for name, weight in matrices.items()
    }


def _paired(quantized: Iterable[Tensor], original: Iterable[Tensor] | None) -> Iterator[Block]:
    """The same rows of both models."""
    if original is None:
        for inputs in quantized:
            yield Block(inputs.float(), None, None, None)
        return
    for inputs, before in zip(quantized, original, strict=True):
        yield Block(inputs.float(), before.float(), None, None)
