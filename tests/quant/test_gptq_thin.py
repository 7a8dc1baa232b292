"""GPTQ through few inputs against the column-at-a-time oracle and against the way through the Hessian."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from l4pack.quant import gptq, gptq_thin
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import SolvedBy

OUT, IN, ROWS = 48, 192, 50
SCHEMES = {
    "int4-g32": Scheme(num_bits=4, group_size=32, scale_dtype="bfloat16"),
    "int4-g64-asym-mse": Scheme(num_bits=4, group_size=64, symmetric=False, observer="mse", scale_dtype="bfloat16"),
    "mxfp4-mse": Scheme(num_bits=4, type="float", group_size=32, observer="mse"),
    "fp8-block": Scheme(num_bits=8, type="float", strategy="block", block_structure=(16, 128), scale_dtype="bfloat16"),
    "int8-channel": Scheme(num_bits=8, strategy="channel", scale_dtype="bfloat16"),
}


@pytest.fixture(autouse=True, params=[128, 40])
def blocks(request, monkeypatch):
    """Blocks that divide the columns into whole ones, and that do not."""
    monkeypatch.setattr(gptq_thin, "BLOCK", request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs() -> torch.Tensor:
    """Few inputs of which their sum of products is the Hessian: some channels loud, some dead."""
    mixed = random(ROWS, IN, seed=1) @ (random(IN, IN, seed=2) / IN**0.5 + 0.3 * torch.eye(IN)) / ROWS**0.5
    mixed *= 1 + 9 * (torch.arange(IN) % 37 == 0)
    return mixed * (torch.arange(IN) % 71 != 5)


def weight() -> torch.Tensor:
    return random(OUT, IN, seed=3) * 0.02


def difference() -> torch.Tensor:
    return 0.1 * inputs().roll(1, 1)


def prepared(*, act_order: bool = True, aim: bool = True, dtype: torch.dtype = torch.float64) -> gptq.Problem:
    x = inputs().to(dtype)
    aimed = difference().to(dtype) if aim else None
    return gptq.prepare_problem(x.T @ x, inputs=x, difference=aimed, act_order=act_order)


def values(levels: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> np.ndarray:
    s, z = (part.double().repeat_interleave(IN // part.shape[1], 1).numpy() for part in (scale, zero_point))
    return (levels.double().numpy() - z) * s


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_levels_losses_and_pulls_are_those_of_optimal_brain_quantization(name, act_order):
    problem, scheme, x = prepared(act_order=act_order, aim=False), SCHEMES[name], inputs()
    factor, h = problem.factor, (x.T @ x).numpy()
    start = gptq.round_to_nearest(weight().float(), scheme, problem.diagonal.float())
    levels, left, loss = gptq_thin.solve_thin_columns(weight(), factor, start.scale, start.zero_point, scheme.grid)
    damped = h + np.diag(factor.added.numpy())
    spread = (
        part.double().repeat_interleave(IN // part.shape[1], 1).numpy() for part in (start.scale, start.zero_point)
    )
    expected = oracle.gptq(weight().numpy(), damped, *spread, scheme, factor.order.numpy())
    np.testing.assert_array_equal(levels.double().numpy(), expected)
    residual = weight().numpy() - values(levels, start.scale, start.zero_point)
    np.testing.assert_allclose(loss.numpy(), np.einsum("oi,ij,oj->o", residual, damped, residual), rtol=1e-9)
    pull = gptq_thin.thin_pull(left, torch.from_numpy(residual), factor).numpy()
    np.testing.assert_allclose(pull, residual @ damped, rtol=1e-9, atol=1e-12)
    undamped = gptq_thin.thin_loss(torch.from_numpy(residual), factor).numpy()
    np.testing.assert_allclose(undamped, np.einsum("oi,ij,oj->o", residual, h, residual), rtol=1e-9)


def test_the_target_is_that_of_the_hessian():
    problem, x = prepared(), inputs()
    damped = x.T @ x + torch.diag(problem.factor.added)
    expected = weight() + weight() @ difference().T @ x @ torch.linalg.inv(damped)
    found = gptq_thin.thin_target(weight(), problem.cross, problem.factor)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("sweeps", [0, 3])
def test_a_solution_is_that_of_the_way_through_the_hessian(name, sweeps):
    x, scheme = inputs(), SCHEMES[name]
    thick = gptq.prepare_problem(x.T @ x, cross=difference().T @ x)
    ours = gptq.solve_problem(prepared(), weight(), scheme, sweeps=sweeps, rows_at_once=16)
    plain = gptq.solve_problem(thick, weight(), scheme, sweeps=sweeps)
    for field in ("levels", "scale", "zero_point"):
        ours_part, plain_part = getattr(ours, field), getattr(plain, field)
        assert ours_part is plain_part or torch.equal(ours_part, plain_part)
    assert (ours.rtn_rows, ours.dead_columns, ours.dampening) == (plain.rtn_rows, 3, plain.dampening)
    assert ours.error == pytest.approx(plain.error, rel=1e-6)
    assert ours.rtn_error == pytest.approx(plain.rtn_error, rel=1e-6)


@pytest.mark.parametrize("loudness", [1.0, 300.0])
def test_float32_loses_next_to_nothing(loudness, monkeypatch):
    """Also with a channel 90,000 times as strong as others."""
    given, scheme = inputs, SCHEMES["int4-g32"]
    monkeypatch.setitem(globals(), "inputs", lambda: given() * (1 + (loudness - 1) * (torch.arange(IN) == 17)))
    exact = gptq.solve_problem(prepared(), weight(), scheme, sweeps=2)
    solution = gptq.solve_problem(prepared(dtype=torch.float32), weight().float(), scheme, sweeps=2)
    assert solution.error == pytest.approx(exact.error, rel=0.02)


def test_no_inputs_at_all_are_rounding():
    x = torch.zeros(ROWS, IN)
    solution = gptq.solve_problem(gptq.prepare_problem(x.T @ x, inputs=x), weight().float(), SCHEMES["int4-g32"])
    nearest = gptq.round_to_nearest(weight().float(), SCHEMES["int4-g32"], None)
    assert torch.equal(solution.levels, nearest.levels)
    assert solution.dead_columns == IN


def test_inputs_that_are_no_numbers_are_the_recorded_fallback():
    x = inputs()
    x[3, 4] = torch.inf
    problem = gptq.prepare_problem(x.T @ x, inputs=x)
    solution = gptq.solve_problem(problem, weight(), SCHEMES["int4-g32"])
    assert (solution.method, solution.reason) == (SolvedBy.RTN, gptq.NOT_FINITE)
