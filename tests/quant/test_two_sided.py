"""Two-sided rounding against oracles that take one weight at a time, and its promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from pretend_device import pretend_device

from l4pack.quant import gptq, triangular, two_sided, two_sided_gptq, two_sided_tiles
from l4pack.quant.factor import factorize
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Kept, Rounded, Solution, SolvedBy, TwoSided
from l4pack.quant.two_sided_gptq import OutputMoments

OUT, IN = 40, 64
SCHEMES = {
    "int4-g32": Scheme(num_bits=4, group_size=32, scale_dtype="bfloat16"),
    "int4-g16-asym-mse": Scheme(num_bits=4, group_size=16, symmetric=False, observer="mse", scale_dtype="bfloat16"),
    "int8-channel": Scheme(num_bits=8, strategy="channel", scale_dtype="bfloat16"),
    "fp8-channel": Scheme(num_bits=8, type="float", strategy="channel", scale_dtype="bfloat16"),
    "mxfp4": Scheme(num_bits=4, type="float", group_size=32),
    "nvfp4-mse": Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, observer="mse"),
}


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Tiles that divide neither rows nor columns into whole ones, shared between threads."""
    monkeypatch.setattr(two_sided, "TILE", 24)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 24
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(size: int, seed: int) -> torch.Tensor:
    """Those of correlated numbers of which some are loud, one is dead."""
    mixed = random(400, size, seed=seed) @ (random(size, size, seed=seed + 1) / size**0.5 + 0.3 * torch.eye(size))
    mixed *= 1 + 4 * (torch.arange(size) % 13 == 0)
    mixed[:, 5] = 0
    return mixed.T @ mixed / len(mixed)


def hessian() -> torch.Tensor:
    return moments(IN, seed=1)


def output_moments() -> torch.Tensor:
    return moments(OUT, seed=7)


def weight() -> torch.Tensor:
    return random(OUT, IN, seed=3) * 0.02


def over(scheme: Scheme) -> float | None:
    return global_scale(float(weight().abs().max())) if scheme.globally_scaled else None


def spread(values: torch.Tensor) -> np.ndarray:
    return values.double().repeat_interleave(IN // values.shape[1], 1).numpy()


def values(levels: np.ndarray, rounded: Rounded) -> np.ndarray:
    return (levels - spread(rounded.zero_point)) * spread(rounded.scale)


def nested(name: str, *, outputs: torch.Tensor | None = None):
    scheme = SCHEMES[name]
    start = gptq.round_to_nearest(weight().float(), scheme, hessian().diagonal().float(), over(scheme))
    factor = factorize(hessian(), act_order=True, dampening=0.02)
    sides = two_sided.prepare_outputs(output_moments() if outputs is None else outputs, dampening=0.05)
    assert factor is not None
    assert sides is not None
    solved, errors = two_sided.solve_nested(weight(), factor, sides, start, scheme.grid)
    return scheme, factor, sides, start, solved, errors


def damped_inputs(factor) -> np.ndarray:
    return (hessian() + torch.diag(factor.added)).numpy()


@pytest.mark.parametrize("name", SCHEMES)
def test_levels_losses_and_pulls_are_those_of_nested_optimal_brain_quantization(name):
    scheme, factor, sides, start, solved, errors = nested(name)
    outputs, inputs = sides.damped.numpy(), damped_inputs(factor)
    order = sides.factor.order.numpy(), factor.order.numpy()
    scale, zero = spread(start.scale), spread(start.zero_point)
    expected = oracle.two_sided_gptq(weight().numpy(), outputs, inputs, scale, zero, scheme, order)
    np.testing.assert_array_equal(solved.levels.double().numpy(), expected)
    residual = weight().numpy() - values(expected, start)
    assert float(errors.square().sum()) == pytest.approx(oracle.two_sided_loss(residual, outputs, inputs), rel=1e-9)
    pull = two_sided.pull_of_errors(errors, factor, sides.factor)
    np.testing.assert_allclose(pull.numpy(), outputs @ residual @ inputs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SCHEMES)
def test_sweeps_are_those_of_the_oracle_and_never_raise_the_loss(name, tiles):
    scheme, factor, sides, start, _, _ = nested(name)
    outputs, inputs = sides.damped.numpy(), damped_inputs(factor)
    scale, zero = spread(start.scale), spread(start.zero_point)
    expected, losses = start.levels.double().numpy(), []
    for sweeps in (1, 2, 3):
        expected = oracle.two_sided_sweep(expected, weight().numpy(), outputs, inputs, scale, zero, scheme, tiles)
        pull = sides.damped @ (weight() - start.values().double()) @ torch.from_numpy(inputs)
        found = two_sided.descend(pull, hessian(), factor.added, sides.damped, start, scheme.grid, sweeps=sweeps)
        np.testing.assert_array_equal(found.levels.double().numpy(), expected)
        residual = weight().numpy() - values(expected, start)
        np.testing.assert_allclose(pull.numpy(), outputs @ residual @ inputs, rtol=1e-8, atol=1e-10)
        losses.append(oracle.two_sided_loss(residual, outputs, inputs))
    before = oracle.two_sided_loss(weight().numpy() - start.values().double().numpy(), outputs, inputs)
    assert before > losses[0] > losses[-1]


def test_sweeps_end_where_nothing_moves():
    scheme, factor, sides, start, _, _ = nested("int4-g32")
    pull = sides.damped @ (weight() - start.values().double()) @ torch.from_numpy(damped_inputs(factor))
    found = two_sided.descend(pull, hessian(), factor.added, sides.damped, start, scheme.grid, sweeps=10_000)
    again = two_sided.descend(pull, hessian(), factor.added, sides.damped, found, scheme.grid, sweeps=1)
    assert torch.equal(again.levels, found.levels)


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_that_all_count_alike_give_one_sided_gptq(name):
    scheme, factor, sides, start, solved, errors = nested(name, outputs=torch.eye(OUT, dtype=torch.float64))
    expected, _ = gptq.solve_columns(weight(), factor, start, scheme, 16)
    assert torch.equal(solved.levels, expected.levels)
    pull = two_sided.pull_of_errors(errors, factor, sides.factor)
    found = two_sided.descend(pull, hessian(), factor.added, sides.damped, solved, scheme.grid, sweeps=2)
    expected, _ = gptq.descend(weight(), hessian(), factor.added, expected, scheme, 16, sweeps=2)
    assert torch.equal(found.levels, expected.levels)


def test_loss_is_that_of_the_definition(monkeypatch):
    monkeypatch.setattr(triangular, "TILE", 24)
    _, factor, sides, start, _, _ = nested("int4-g32")
    residual = weight() - start.values().double()
    expected = oracle.two_sided_loss(residual.numpy(), sides.damped.numpy(), damped_inputs(factor))
    assert two_sided.loss_of(residual, factor, sides.factor) == pytest.approx(expected, rel=1e-9)


def test_gradients_that_are_nothing_or_no_numbers():
    nothing = two_sided.prepare_outputs(torch.zeros(OUT, OUT), dampening=0.05)
    assert nothing is not None
    assert torch.equal(nothing.damped, torch.eye(OUT))
    assert two_sided.prepare_outputs(torch.full((OUT, OUT), torch.nan), dampening=0.05) is None


def solved(name: str, *, outputs: torch.Tensor | None = None, **options):
    """A matrix solved by both sides for an asymmetric target, and what it was solved with."""
    scheme, h = SCHEMES[name], hessian()
    cross = 0.05 * h.roll(1, 0)
    problem = gptq.prepare_problem(h.float(), cross=cross.float())
    sides = OutputMoments((output_moments() if outputs is None else outputs).float(), dampening=0.05)
    found = two_sided_gptq.solve_two_sided(
        problem, sides, weight().float(), scheme,
        **{"sweeps": 2, "rows_at_once": 16, "global_scale": over(scheme), **options},
    )  # fmt: skip
    return problem, found


def losses_of(problem, found: Solution) -> tuple[float, float]:
    """By both sides, damped, and by inputs alone."""
    target = gptq.asymmetric_target(weight().float(), problem)
    residual = (target - found.rounded().values()).double().numpy()
    sides = two_sided.prepare_outputs(output_moments(), dampening=0.05)
    assert sides is not None
    by_both = oracle.two_sided_loss(residual, sides.damped.numpy(), damped_inputs(problem.factor))
    return by_both, float(oracle.two_sided_loss(residual, np.eye(OUT), hessian().numpy()))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix_ends_with_less_loss_than_rounding_or_solving_by_its_inputs(name):
    problem, found = solved(name)
    assert found.two_sided is not None
    by_both, by_inputs = losses_of(problem, found)
    assert found.two_sided.error == pytest.approx(by_both, rel=1e-3)
    assert found.error == pytest.approx(by_inputs, rel=1e-3)
    plain = gptq.solve_problem(problem, weight().float(), SCHEMES[name], sweeps=2, global_scale=over(SCHEMES[name]))
    assert found.two_sided.gptq_error == pytest.approx(losses_of(problem, plain)[0], rel=1e-3)
    assert found.two_sided.kept is Kept.NESTED
    assert found.two_sided.error < found.two_sided.gptq_error < found.two_sided.rtn_error
    assert (found.method, found.reason, found.rtn_rows) == (SolvedBy.GPTQ, "", 0)
    assert found.rtn_error == pytest.approx(plain.rtn_error)
    assert torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4-mse"])
def test_a_matrix_whose_outputs_count_alike_is_solved_as_by_its_inputs(name):
    problem, found = solved(name, outputs=torch.eye(OUT))
    plain = gptq.solve_problem(problem, weight().float(), SCHEMES[name], sweeps=2, global_scale=over(SCHEMES[name]))
    assert torch.equal(found.levels, plain.levels)


def test_gradients_that_are_no_numbers_leave_the_solve_by_inputs_and_say_so():
    problem, found = solved("int4-g32", outputs=torch.full((OUT, OUT), torch.inf))
    plain = gptq.solve_problem(problem, weight().float(), SCHEMES["int4-g32"], sweeps=2)
    assert torch.equal(found.levels, plain.levels)
    assert found.two_sided is not None
    assert (found.two_sided.kept, found.two_sided.reason) == (Kept.GPTQ, two_sided_gptq.NOT_SOLVED)


def test_rounding_to_nearest_is_kept_where_it_is_better(monkeypatch):
    def worse(matrix, inputs, outputs, start, sweeps):
        return replace(start, levels=start.levels * 0), 1e9

    monkeypatch.setattr(two_sided_gptq, "_nested", worse)
    monkeypatch.setattr(two_sided_gptq, "loss_of", lambda residual, *_: next(losses))
    losses = iter([2.0, 1.0])
    _, found = solved("int4-g16-asym-mse")
    assert found.two_sided == TwoSided(Kept.RTN, 1.0, 2.0, 1.0, 0.05)
    nearest = gptq.round_to_nearest(weight().float(), SCHEMES["int4-g16-asym-mse"], hessian().diagonal().float())
    assert torch.equal(found.rounded().values(), nearest.values())
    assert (found.method, found.rtn_rows, found.error) == (SolvedBy.RTN, OUT, found.rtn_error)
    losses = iter([1.0, 2.0])
    problem, found = solved("int4-g32")
    plain = gptq.solve_problem(problem, weight().float(), SCHEMES["int4-g32"], sweeps=2)
    assert torch.equal(found.levels, plain.levels)


def test_a_device_finds_the_levels_of_the_cpu_and_asks_it_for_none(monkeypatch):
    """A matrix by itself: as a batch of one."""
    scheme, rows, columns = SCHEMES["int4-g16-asym-mse"], 30, 32
    given = weight()[:rows, :columns], hessian()[:columns, :columns], output_moments()[:rows, :rows]

    def found(matrix: torch.Tensor, h: torch.Tensor, outputs: torch.Tensor) -> Solution:
        sides = OutputMoments(outputs.clone(), dampening=0.05)
        return two_sided_gptq.solve_two_sided(gptq.prepare_problem(h), sides, matrix, scheme, sweeps=1)

    expected = found(*given)
    with pretend_device() as done, monkeypatch.context() as context:
        for one in ("solve_tile", "descend_tile"):
            context.setattr(two_sided_tiles, one, lambda *_: pytest.fail("a tile was solved on the CPU"))
        there = found(*(part.to("cuda:0") for part in given))
        assert done
        assert there.levels.device.type == "cuda"
        assert torch.equal(there.levels.cpu(), expected.levels)
        assert there.two_sided is not None
        assert expected.two_sided is not None
        assert there.two_sided.kept is Kept.NESTED
        assert there.two_sided.error == pytest.approx(expected.two_sided.error, rel=1e-6)


def test_super_blocks_are_solved_by_both_sides():
    scheme = Scheme(num_bits=4, group_size=32, symmetric=False, observer="mse", scale_dtype="q4_k")
    matrix, h = random(OUT, 256, seed=4).float() * 0.02 + 0.01, moments(256, seed=9).float()
    problem, outputs = gptq.prepare_problem(h), OutputMoments(output_moments().float(), dampening=0.05)
    found = two_sided_gptq.solve_two_sided(problem, outputs, matrix, scheme, sweeps=2)
    assert found.two_sided is not None
    sides = two_sided.prepare_outputs(output_moments(), dampening=0.05)
    assert sides is not None
    residual = (matrix - found.rounded().values()).double().numpy()
    damped = (h + torch.diag(problem.factor.added)).double().numpy()
    loss = oracle.two_sided_loss(residual, sides.damped.numpy(), damped)
    assert found.two_sided.error == pytest.approx(loss, rel=1e-3)
    assert found.two_sided.error < 0.95 * found.two_sided.gptq_error
    assert found.headers is not None
