"""Solving MLPs of equal shape together: for a device, on which starting an operation costs more than carrying it out.

The tokens of each unit stand side by side, `ROWS` of each at a time, filled up with rows that weigh nothing. Units with more
tokens come first, so that those that have none left are left out of what follows. What is summed for a unit, and in which
order, does not depend on the units beside it. The host waits once, for the record of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from l4pack.calibration.moments import COLUMNS
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.quant import gptq, gptq_batch
from l4pack.quant.dampening import fractions
from l4pack.quant.dtypes import FLOATS
from l4pack.quant.grid import ScaleDtype
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Rounded, Solution, SolvedBy
from l4pack.quant.torch_scales import global_scale

if TYPE_CHECKING:
    from l4pack.calibration.rows import UnitRows
    from l4pack.quant.dtypes import FloatName
    from l4pack.recipe import GptqOptions, RecipeScheme
    from l4pack.stream.layer import LayerPass

ROWS = 512  # tokens of each unit at once, on any device
FIGURES = 3, 6, 9, 11, 13, 15, 16  # where in a batch's record what is of matrices, of problems, and of all, begins anew
NEAREST_IS_BETTER = "rounding to nearest has the lower loss in every output row"
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """Some tokens of the units that have any left: inputs [units, ROWS, in], the original model's where there are any,
    their weights [units, ROWS], and whose original is kept [units, ROWS, 1], see `rows.UnitRows`."""

    inputs: Tensor
    original: Tensor | None
    weights: Tensor
    kept: Tensor | None


@dataclass(frozen=True)
class Stacked:
    """Gate over up [units, 2 inner, hidden] and down [units, hidden, inner] of several MLPs, float32."""

    pair: Tensor
    down: Tensor

    @classmethod
    def of(cls, matrices: Sequence[Mapping[str, Tensor]]) -> Stacked:
        """Copies of the MLPs' matrices [out, in], by their names."""
        pairs = torch.stack([one[name] for one in matrices for name in (GATE, UP)])
        return cls(pairs.view(len(matrices), -1, pairs.shape[-1]), torch.stack([one[DOWN] for one in matrices]))

    def weights(self) -> list[dict[str, Tensor]]:
        """Views of each MLP's matrices."""
        return [
            {GATE: pair[: len(pair) // 2], UP: pair[len(pair) // 2 :], DOWN: down}
            for pair, down in zip(self.pair, self.down, strict=True)
        ]


def blocks(taken: Sequence[UnitRows], quantized: LayerPass, original: LayerPass | None) -> Iterator[Block]:
    """The units' inputs; `taken` has those with more tokens first."""
    for start in range(0, taken[0].count, ROWS):
        part = slice(start, start + ROWS)
        yield _block([one for one in taken if one.count > start], part, quantized, original)
        quantized.let_go()
        if original is not None:
            original.let_go()


def _block(taken: Sequence[UnitRows], part: slice, quantized: LayerPass, original: LayerPass | None) -> Block:
    device = quantized.device
    rows = _filled([torch.arange(one.count)[part] if one.rows is None else one.rows[part] for one in taken])
    weights = _filled([(torch.ones(one.count) if one.weights is None else one.weights)[part] for one in taken])
    inputs = quantized.normed(rows.flatten()).view(*rows.shape, -1)
    before = None if original is None else original.normed(rows.flatten()).view(*rows.shape, -1)
    kept = None
    scores = [one.scores for one in taken if one.scores is not None]
    if scores:
        inputs = inputs * _filled([score[part] for score in scores]).to(device)
    if before is not None and scores:
        kept = _filled([one.kept[part, None] for one in taken if one.kept is not None]).to(device)
        own = _filled([one.original_scores[part] for one in taken if one.original_scores is not None]).to(device)
        before = torch.where(kept, before * own, inputs)
    return Block(inputs, before, weights.to(device), kept)


def _filled(parts: Sequence[Tensor]) -> Tensor:
    """[units, ROWS, ...] of parts [few, ...], zero beyond them."""
    return torch.stack([pad(part, (0, 0) * (part.dim() - 1) + (0, ROWS - len(part))) for part in parts])


class Moments:
    """See `moments.Moments`: those of several units' inputs, float32 [units, in, in] each."""

    def __init__(self, units: int, width: int, *, cross: bool, device: torch.device) -> None:
        self.hessian = torch.zeros(units, width, width, device=device)
        self.cross = torch.zeros(units, width, width, device=device) if cross else None

    def add(self, block: Block) -> None:
        """Add tokens of the first units."""
        count, width = len(block.inputs), self.hessian.shape[-1]
        root = block.weights.sqrt()[..., None]
        inputs = block.inputs * root
        for first in range(0, width, COLUMNS):
            last = min(first + COLUMNS, width)
            self.hessian[:count, first:last, first:].baddbmm_(inputs[..., first:last].mT, inputs[..., first:])
        if self.cross is not None and block.original is not None:
            self.cross[:count].baddbmm_(((block.original - block.inputs) * root).mT, inputs)

    def finish(self, weights: Tensor) -> None:
        """Divide by the weights [units] of all tokens, and fill in the other half of what is symmetric."""
        scale = 1 / weights.clamp(min=1e-30)[:, None, None]
        width = self.hessian.shape[-1]
        for first in range(0, width, COLUMNS):
            last = min(first + COLUMNS, width)
            self.hessian[:, last:, first:last] = self.hessian[:, first:last, last:].mT
        self.hessian.mul_(scale)
        if self.cross is not None:
            self.cross.mul_(scale)


@dataclass(frozen=True)
class Batch:
    """MLPs to solve together: their matrices, how often `inputs` gives their tokens anew, what all weigh [units]."""

    matrices: Stacked
    inputs: Callable[[], Iterable[Block]]
    weights: Tensor
    activation: Activation
    model_dtype: torch.dtype

    def inner(self, pair: Tensor, inputs: Tensor) -> Tensor:
        """What gate over up [units, 2 inner, hidden] make of the first units' inputs: [units, tokens, inner]."""
        gate, up = (inputs @ pair[: len(inputs)].mT).chunk(2, -1)
        return self.activation(gate) * up


def solve(batch: Batch, scheme: RecipeScheme, source_dtype: FloatName) -> list[dict[str, Solution]]:
    """Solutions by projection of each unit, on the device; `source_dtype` is that of all weights.

    Where the dampening was too little for a Hessian, the batch is solved again with the next fraction for that one.
    Raises UnitNotFiniteError for a weight that is not finite.
    """
    assert scheme.gptq is not None
    scales = (
        scheme.scale_dtype if scheme.scale_dtype is not ScaleDtype.SOURCE else ScaleDtype(FLOATS[source_dtype].word)
    )
    given = _Given(batch, scheme.model_copy(update={"scale_dtype": scales}), scheme.gptq)
    steps, units = fractions(scheme.gptq.dampening), len(batch.matrices.pair)
    climbed = np.zeros((2, units), np.intp)
    while True:
        chosen = torch.tensor(np.array(steps)[climbed], dtype=torch.float32).to(batch.weights.device)
        attempt = _attempt(given, chosen)
        found = attempt.record()
        again = ~found.definite & (climbed < len(steps) - 1)
        again[1] &= ~again[0]  # what down was given was wrong
        if not again.any():
            return [attempt.solutions(found, unit, [steps[k] for k in climbed[:, unit]]) for unit in range(units)]
        climbed += again


@dataclass(frozen=True)
class _Given:
    batch: Batch
    scheme: Scheme
    options: GptqOptions


class UnitNotFiniteError(ValueError):
    """A weight of the unit of this number is infinite or NaN."""

    def __init__(self, unit: int) -> None:
        super().__init__(unit)
        self.unit = unit


@dataclass(frozen=True)
class _Found:
    """Figures of a batch on the host, by matrix and unit: float64 [3, units], and of the two problems [2, units]; `over`
    are their global scales."""

    error: NDArray[np.float64]
    rtn_error: NDArray[np.float64]
    kept: NDArray[np.float64]
    finite: NDArray[np.bool_]
    definite: NDArray[np.bool_]
    dead: NDArray[np.float64]
    over: NDArray[np.float64]


@dataclass(frozen=True)
class _Attempt:
    """Gate over up, and down, solved with some dampening, all still on the device; `figures` are those of `_Found`."""

    pair: gptq_batch.Solutions
    down: gptq_batch.Solutions
    figures: Tensor
    scheme: Scheme

    def record(self) -> _Found:
        """Wait for the device. Raises UnitNotFiniteError."""
        error, rtn_error, kept, finite, definite, dead, sound, over = np.split(self.figures.cpu().numpy(), FIGURES)
        if not sound.all():
            raise UnitNotFiniteError(int(sound[0].argmin()))
        return _Found(error, rtn_error, kept, finite > 0, definite > 0, dead, over)

    def solutions(self, found: _Found, unit: int, dampening: Sequence[float]) -> dict[str, Solution]:
        """One unit's solutions by projection."""
        inner = self.pair.rounded.levels.shape[1] // 2
        first, second = self.pair.rounded, self.down.rounded
        parts = ((GATE, first, slice(inner)), (UP, first, slice(inner, None)), (DOWN, second, slice(None)))
        return {
            name: self._solution(found, unit, number, _part_of(rounded, unit, rows), dampening[number // 2])
            for number, (name, rounded, rows) in enumerate(parts)
        }

    def _solution(self, found: _Found, unit: int, number: int, rounded: Rounded, dampening: float) -> Solution:
        place = number // 2, unit
        kept, error, rtn_error = (float(one[number, unit]) for one in (found.kept, found.error, found.rtn_error))
        reason, dead = "", int(found.dead[place])
        if not found.finite[place]:
            reason, error, rtn_error, dead = gptq.NOT_FINITE, float("nan"), float("nan"), 0
        elif not found.definite[place]:
            reason = gptq.NOT_DEFINITE
        elif kept == len(rounded.levels):
            reason = NEAREST_IS_BETTER
        factored = bool(found.finite[place] and found.definite[place])
        return Solution(
            rounded.levels,
            rounded.scale,
            None if self.scheme.symmetric else rounded.zero_point.to(torch.int8),
            error,
            rtn_error,
            dampening if factored else 0.0,
            SolvedBy.RTN if reason else SolvedBy.GPTQ,
            reason,
            int(kept),
            dead,
            float(found.over[place]) if self.scheme.globally_scaled else None,
            rounded.headers,
        )


def _part_of(rounded: Rounded, unit: int, rows: slice) -> Rounded:
    headers = None if rounded.headers is None else rounded.headers[unit, rows]
    return Rounded(rounded.levels[unit, rows], rounded.scale[unit, rows], rounded.zero_point[unit, rows], headers)


@torch.inference_mode()
def _attempt(given: _Given, dampening: Tensor) -> _Attempt:
    """Solve with the fractions `dampening` [2, units]; the host need not wait for any of it."""
    batch, scheme, options, matrices = given.batch, given.scheme, given.options, given.batch.matrices
    moments = _moments(batch, matrices.pair, batch.inputs(), options)
    first = _problems(moments, options, dampening[0], outputs=matrices.pair.shape[1])
    del moments
    overs = torch.stack([global_scale(one.abs().amax((-2, -1))) for one in (matrices.pair, matrices.down)])
    pair = gptq_batch.solve_problems(first, matrices.pair, scheme, sweeps=options.sweeps, over=overs[0])
    of_first = _problem_figures(first)
    del first
    solved = pair.rounded.values().to(batch.model_dtype).float()
    moments = _moments(batch, matrices.down, (_inner(batch, block, solved) for block in batch.inputs()), options)
    del solved
    second = _problems(moments, options, dampening[1], outputs=matrices.down.shape[1])
    del moments
    down = gptq_batch.solve_problems(second, matrices.down, scheme, sweeps=options.sweeps, over=overs[1])
    problems = torch.stack((of_first, _problem_figures(second)), 1)
    figures = (_sums(pair, down), problems.flatten(0, 1), (pair.sound & down.sound)[None], overs)
    return _Attempt(pair, down, torch.cat([one.double() for one in figures]), scheme)


def _moments(batch: Batch, weight: Tensor, blocks: Iterable[Block], options: GptqOptions) -> Moments:
    moments: Moments | None = None
    for block in blocks:
        if moments is None:
            cross = block.original is not None and options.asymmetric > 0
            moments = Moments(len(weight), weight.shape[-1], cross=cross, device=weight.device)
        moments.add(block)
    found = moments or Moments(len(weight), weight.shape[-1], cross=False, device=weight.device)
    found.finish(batch.weights)
    return found


def _inner(batch: Batch, block: Block, solved: Tensor) -> Block:
    inputs = batch.inner(solved, block.inputs)
    original = None if block.original is None else batch.inner(batch.matrices.pair, block.original)
    if original is not None and block.kept is not None:
        original = torch.where(block.kept, original, inputs)
    return Block(inputs, original, block.weights, block.kept)


def _problems(moments: Moments, options: GptqOptions, dampening: Tensor, outputs: int) -> gptq_batch.Problems:
    if moments.cross is not None:
        moments.cross.mul_(options.asymmetric)
    return gptq_batch.prepare_problems(
        moments.hessian, moments.cross, dampening, act_order=options.act_order, outputs=outputs
    )


def _problem_figures(problems: gptq_batch.Problems) -> Tensor:
    """Whether moments are finite, whether they could be factored, and how many columns are dead: [3, units]."""
    return torch.stack((problems.finite, problems.definite, (problems.diagonal == 0).sum(1)))


def _sums(pair: gptq_batch.Solutions, down: gptq_batch.Solutions) -> Tensor:
    """Losses, those of rounding, and rows that are rounded, of gate, up and down: [9, units]."""
    figures = []
    for of_pair, of_down in ((pair.loss, down.loss), (pair.rtn_loss, down.rtn_loss), (pair.kept, down.kept)):
        halves = of_pair.double().view(len(of_pair), 2, -1).sum(-1)
        figures += [halves[:, 0], halves[:, 1], of_down.double().sum(-1)]
    return torch.stack(figures)
