"""Solving MLPs of equal shape together: for a device, on which starting an operation costs more than carrying it out.

The tokens of each unit stand side by side, `ROWS` of each at a time, filled up with rows that weigh nothing. Units with more
tokens come first, so that those that have none left are left out of what follows. What is summed for a unit, and in which
order, does not depend on the units beside it. The host waits once, for the record of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from l4pack.calibration import batch_solved
from l4pack.calibration.batch_ends import Ends
from l4pack.calibration.batch_solved import SIDES, Solved, Solving
from l4pack.calibration.batch_units import Batch, Block, Moments
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
FIGURES = (
    3,
    6,
    9,
    11,
    13,
    15,
    16,
    18,
)  # where in a batch's record what is of matrices, of problems, of all, and by both sides begins anew
NEAREST_IS_BETTER = "rounding to nearest has the lower loss in every output row"


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
    ladder = _Ladder.of(scheme.gptq, len(batch.matrices.pair), two_sided=batch.end is not None)
    while True:
        attempt = _attempt(given, torch.tensor(ladder.fractions, dtype=torch.float32).to(batch.weights.device))
        found = attempt.record()
        if not ladder.climbs(found.definite):
            return [attempt.solutions(found, unit, one) for unit, one in enumerate(ladder.fractions.T.tolist())]


@dataclass
class _Ladder:
    """The fractions of dampening that a batch is solved with, [5, units]: of the inputs of gate and up, of those of down, and by
    both sides of the outputs of gate, up and down."""

    steps: list[NDArray[np.float64]]
    climbed: NDArray[np.intp]

    @classmethod
    def of(cls, options: GptqOptions, units: int, *, two_sided: bool) -> _Ladder:
        """The first ones."""
        wanted = [options.dampening] * 2 + [options.output_dampening] * 3 * two_sided
        return cls([np.array(fractions(one)) for one in wanted], np.zeros((len(wanted), units), np.intp))

    @property
    def fractions(self) -> NDArray[np.float64]:
        """Those to solve with."""
        return np.array([steps[climbed] for steps, climbed in zip(self.steps, self.climbed, strict=True)])

    def climbs(self, definite: NDArray[np.bool_]) -> bool:
        """Take the next one where that was too little, if there is one; whether any was."""
        most = np.array([len(steps) - 1 for steps in self.steps])[:, None]
        again = ~definite & (self.climbed < most)
        again[1] &= ~np.delete(again, 1, 0)[:3].any(0)  # what down was given was wrong
        self.climbed += again
        return bool(again.any())


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
    are their global scales. `definite` is as `_Ladder` has it; `sides` are [3, SIDES, units], or none."""

    error: NDArray[np.float64]
    rtn_error: NDArray[np.float64]
    kept: NDArray[np.float64]
    finite: NDArray[np.bool_]
    definite: NDArray[np.bool_]
    dead: NDArray[np.float64]
    over: NDArray[np.float64]
    sides: NDArray[np.float64]


@dataclass(frozen=True)
class _Attempt:
    """Gate over up, and down, solved with some dampening, all still on the device; `figures` are those of `_Found`."""

    pair: Solved
    down: Solved
    figures: Tensor
    scheme: Scheme

    def record(self) -> _Found:
        """Wait for the device. Raises UnitNotFiniteError."""
        parts = np.split(self.figures.cpu().numpy(), FIGURES)
        error, rtn_error, kept, finite, definite, dead, sound, over, sides = parts
        if not sound.all():
            raise UnitNotFiniteError(int(sound[0].argmin()))
        sides = sides.reshape(-1, SIDES, sides.shape[-1])
        definite = np.concatenate((definite, sides[:, -1]))
        return _Found(error, rtn_error, kept, finite > 0, definite > 0, dead, over, sides)

    def solutions(self, found: _Found, unit: int, dampening: Sequence[float]) -> dict[str, Solution]:
        """One unit's solutions by projection."""
        inner = self.pair.rounded.levels.shape[1] // 2
        first, second = self.pair.rounded, self.down.rounded
        parts = ((GATE, first, slice(inner)), (UP, first, slice(inner, None)), (DOWN, second, slice(None)))
        solutions = {}
        for number, (name, rounded, rows) in enumerate(parts):
            solution = self._solution(found, unit, number, _part_of(rounded, unit, rows), dampening[number // 2])
            if len(found.sides):
                solution = batch_solved.two_sided(solution, found.sides[number, :, unit], dampening[2 + number])
            solutions[name] = solution
        return solutions

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
    return rounded.mapped(lambda one: one[unit, rows])


@torch.inference_mode()
def _attempt(given: _Given, dampening: Tensor) -> _Attempt:
    """Solve with the fractions `dampening`, see `_Ladder`; the host need not wait for any of it."""
    batch, options, matrices = given.batch, given.options, given.batch.matrices
    moments = _moments(batch, matrices.pair, batch.inputs(), options)
    first = _problems(moments, options, dampening[0], outputs=matrices.pair.shape[1])
    del moments
    overs = torch.stack([global_scale(one.abs().amax((-2, -1))) for one in (matrices.pair, matrices.down)])
    pair = _solved(given, first, matrices.pair, overs[0], dict(zip((GATE, UP), dampening[2:4], strict=False)))
    of_first = _problem_figures(first)
    del first
    solved = pair.rounded.values().to(batch.model_dtype).float()
    moments = _moments(batch, matrices.down, (_inner(batch, block, solved) for block in batch.inputs()), options)
    del solved
    second = _problems(moments, options, dampening[1], outputs=matrices.down.shape[1])
    del moments
    down = _solved(given, second, matrices.down, overs[1], dict(zip((DOWN,), dampening[4:], strict=False)))
    problems = torch.stack((of_first, _problem_figures(second)), 1)
    figures = [*_sums(pair, down), problems.flatten(0, 1), (pair.sound & down.sound)[None], overs]
    figures += [one.sides.flatten(0, 1) for one in (pair, down) if one.sides is not None]
    return _Attempt(pair, down, torch.cat([one.double() for one in figures]), given.scheme)


def _solved(
    given: _Given, problems: gptq_batch.Problems, weight: Tensor, over: Tensor, outputs: Mapping[str, Tensor]
) -> Solved:
    """Gate over up, or down; `outputs` are the fractions of their dampening, by name, if they are solved by both sides."""
    solving = Solving(given.scheme, given.options, over)
    if given.batch.end is None:
        return solving.by_inputs(problems, weight, 1 if weight is given.batch.matrices.down else 2)
    return solving.by_sides(problems, weight, Ends(given.batch.end, given.batch), outputs)


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


def _sums(pair: Solved, down: Solved) -> list[Tensor]:
    """Losses, those of rounding, and rows that are rounded, of gate, up and down: [3, units] each."""
    parts = ((pair.error, down.error), (pair.rtn_error, down.rtn_error), (pair.kept, down.kept))
    return [torch.cat(part) for part in parts]
