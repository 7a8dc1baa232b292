"""MLPs solved by both sides: what carries a layer's gradients back against autograd, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import gelu, silu

from l4pack.calibration import batch, batch_units
from l4pack.calibration.carried import Ends
from l4pack.calibration.mlp import Matrices, result_of, solve_mlp, solved_weights
from l4pack.calibration.rows import Block
from l4pack.model.parts import DOWN, GATE, MLP_MATRICES, UP
from l4pack.quant.two_sided_gptq import NOT_SOLVED
from l4pack.recipe import GptqOptions, Method, RecipeScheme

HIDDEN, INNER = 64, 96
SCHEME = RecipeScheme(
    format="pack-quantized", num_bits=4, group_size=32, method=Method.GPTQ, gptq=GptqOptions(sweeps=2, two_sided=True)
)
DTYPES = dict.fromkeys(MLP_MATRICES, "BF16")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, torch.Tensor]:
    shapes = {GATE: (INNER, HIDDEN), UP: (INNER, HIDDEN), DOWN: (HIDDEN, INNER)}
    return {name: random(*shape, seed=k) * 0.2 for k, (name, shape) in enumerate(shapes.items(), 1)}


def blocks(tokens: int = 60) -> list[Block]:
    """Some rows whose last ones are borrowed, in two pieces."""
    rows, counts = random(tokens, HIDDEN, seed=5), torch.linspace(1, 0.25, tokens)
    halves = slice(0, tokens // 2), slice(tokens // 2, tokens)
    return [Block(rows[half], rows[half].roll(1, 1), counts[half], None) for half in halves]


def end() -> torch.Tensor:
    gradients = random(100, HIDDEN, seed=6) * torch.linspace(0.1, 3, HIDDEN)
    return gradients.T @ gradients


@pytest.mark.parametrize("activation", [silu, gelu])
def test_gradients_are_carried_back_as_autograd_does(activation):
    gradient, mlp = random(HIDDEN, seed=7), weights()
    ends = Ends(torch.outer(gradient, gradient), mlp, activation, blocks)
    inner, total = ends.before_down(), sum(float(block.weights.sum()) for block in blocks())
    expected = {name: torch.zeros(INNER, INNER) for name in (GATE, UP)}
    for block in blocks():
        gate, up = ((block.inputs @ mlp[name].T).requires_grad_() for name in (GATE, UP))
        ((activation(gate) * up) @ mlp[DOWN].T @ gradient).sum().backward()
        for name, outputs in ((GATE, gate), (UP, up)):
            expected[name] += (outputs.grad.T * block.weights) @ outputs.grad / total
    with torch.inference_mode():
        for name, one in expected.items():
            torch.testing.assert_close(ends.moments(name, inner), one, rtol=1e-3, atol=1e-4)
        assert torch.equal(ends.moments(DOWN), torch.outer(gradient, gradient))


@torch.inference_mode()
def test_an_mlp_solved_by_both_sides_does_less_harm_at_its_end():
    mlp = Matrices(weights(), silu, torch.bfloat16)
    both = solve_mlp(mlp, blocks, SCHEME, DTYPES, end())
    one = solve_mlp(mlp, blocks, SCHEME, DTYPES)
    harm = []
    for solutions in (both, one):
        solved = {name: solved_weights(solution, torch.bfloat16) for name, solution in solutions.items()}
        off = torch.cat([
            mlp.inner(block.original) @ mlp.weights[DOWN].T
            - Matrices(solved, silu, torch.bfloat16).inner(block.inputs) @ solved[DOWN].T
            for block in blocks()
        ])  # fmt: skip
        harm.append(float(((off @ end()) * off).sum()))
    assert harm[0] < 0.8 * harm[1]
    assert all(solution.two_sided is None for solution in one.values())


@torch.inference_mode()
def test_losses_by_both_sides_are_recorded_beside_those_by_inputs():
    mlp = Matrices(weights(), silu, torch.bfloat16)
    for name, solution in solve_mlp(mlp, blocks, SCHEME, DTYPES, end()).items():
        found = json.loads(json.dumps(result_of(solution, 30, 30)))
        sides = found["two_sided"]
        assert sides["kept"] == "nested", name
        assert sides["error"] < sides["gptq_error"] < sides["rtn_error"]
        assert (sides["dampening"], sides["reason"]) == (0.05, "")
        assert found["error"] < found["rtn_error"]


@torch.inference_mode()
@pytest.mark.parametrize("gradients", [torch.zeros(HIDDEN, HIDDEN), torch.full((HIDDEN, HIDDEN), torch.nan)])
def test_gradients_that_say_nothing_leave_what_inputs_say(gradients):
    mlp = Matrices(weights(), silu, torch.bfloat16)
    both = solve_mlp(mlp, blocks, SCHEME, DTYPES, gradients)
    assert all(solution.error < solution.rtn_error for solution in both.values())
    assert all(solution.two_sided is not None for solution in both.values())


@torch.inference_mode()
def test_an_expert_that_no_token_reached_is_rounded():
    empty = [Block(torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN), torch.zeros(0), None)]
    both = solve_mlp(Matrices(weights(), silu, torch.bfloat16), lambda: empty, SCHEME, DTYPES, end())
    nearest = solve_mlp(Matrices(weights(), silu, torch.bfloat16), lambda: empty, SCHEME, DTYPES)
    for name in (GATE, UP):
        assert torch.equal(both[name].levels, nearest[name].levels)


def stacked(units: int, end: torch.Tensor | None = None) -> batch_units.Batch:
    """MLPs of the same tokens and different weights."""
    given = [{name: one * (1 + 0.1 * unit) for name, one in weights().items()} for unit in range(units)]
    counts = torch.cat([block.weights for block in blocks()])

    def inputs() -> Iterator[batch_units.Block]:
        for block in blocks():
            rows = [one.expand(units, -1, -1) for one in (block.inputs, block.original)]
            yield batch_units.Block(*rows, block.weights.expand(units, -1), None)

    return batch_units.Batch(
        batch_units.Stacked.of(given), inputs, counts.sum().expand(units), silu, torch.bfloat16, end
    )


@torch.inference_mode()
def test_together_mlps_are_solved_as_one_by_one():
    one = stacked(2, end())
    found = batch.solve(one, SCHEME, "BF16")
    for unit, own in enumerate(one.matrices.weights()):
        theirs = solve_mlp(Matrices(own, silu, torch.bfloat16), blocks, SCHEME, DTYPES, end())
        for name, solution in theirs.items():
            ours, by_both, expected = found[unit][name], found[unit][name].two_sided, solution.two_sided
            assert (ours.levels != solution.levels).float().mean() < 0.15, (unit, name)  # one tie moves those after it
            assert ours.error == pytest.approx(solution.error, rel=0.05)
            assert ours.rtn_error == pytest.approx(solution.rtn_error, rel=0.02)
            assert (by_both.kept, by_both.dampening, by_both.reason) == (expected.kept, expected.dampening, "")
            assert by_both.error == pytest.approx(expected.error, rel=0.05)
            assert by_both.gptq_error == pytest.approx(expected.gptq_error, rel=0.02)
            assert by_both.rtn_error == pytest.approx(expected.rtn_error, rel=0.02)
            assert result_of(ours, 30, 30).keys() == result_of(solution, 30, 30).keys()


@torch.inference_mode()
def test_together_too_gradients_that_are_no_numbers_leave_what_inputs_say():
    alone = batch.solve(stacked(1), SCHEME.model_copy(update={"gptq": GptqOptions(sweeps=2)}), "BF16")
    both = batch.solve(stacked(1, torch.full((HIDDEN, HIDDEN), torch.nan)), SCHEME, "BF16")
    for name, solution in both[0].items():
        assert solution.two_sided.reason == NOT_SOLVED
        assert json.loads(json.dumps(result_of(solution, 30, 30)))["two_sided"]["error"] is None
        assert torch.equal(solution.levels, alone[0][name].levels)


@torch.inference_mode()
def test_a_batch_climbs_the_ladder_of_its_outputs():
    """Gradients whose moments take more dampening than what was asked for."""
    direction = torch.ones(HIDDEN) / HIDDEN**0.5
    sides = torch.eye(HIDDEN) - 1.2 * torch.outer(direction, direction)
    found = batch.solve(stacked(1, sides), SCHEME, "BF16")
    expected = solve_mlp(Matrices(weights(), silu, torch.bfloat16), blocks, SCHEME, DTYPES, sides)
    for name, solution in expected.items():
        assert found[0][name].two_sided.dampening == solution.two_sided.dampening
    assert expected[DOWN].two_sided.dampening > SCHEME.gptq.output_dampening
