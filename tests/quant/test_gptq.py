"""GPTQ against the column-at-a-time oracle, its promises, and its fallbacks."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from l4pack.quant import gptq, gptq_blocks, packing
from l4pack.quant.dequantize import dequantize
from l4pack.quant.quantize import NonFiniteError
from l4pack.quant.quantized import Quantized
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Rounded, Solution, SolvedBy

OUT, IN = 48, 192
SCHEMES = {
    name: Scheme(scale_dtype="bfloat16", **numbers)
    for name, numbers in {
        "int4-g32": {"num_bits": 4, "group_size": 32},
        "int4-g64-asym-mse": {"num_bits": 4, "group_size": 64, "symmetric": False, "observer": "mse"},
        "int4-channel": {"num_bits": 4, "strategy": "channel"},
        "int8-g32": {"num_bits": 8, "group_size": 32},
    }.items()
}
SCHEMES["fp8-channel"] = Scheme(num_bits=8, type="float", strategy="channel", scale_dtype="bfloat16")
SCHEMES["fp8-block"] = Scheme(
    num_bits=8, type="float", strategy="block", block_structure=(16, 128), scale_dtype="bfloat16"
)
SCHEMES["mxfp4"] = Scheme(num_bits=4, type="float", group_size=32)
SCHEMES["nvfp4-mse"] = Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, observer="mse")


@pytest.fixture(autouse=True)
def two_threads():
    """The same sums everywhere, and rows shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 1000) -> torch.Tensor:
    """Correlated inputs with a few loud channels, [tokens, in]."""
    mixed = random(tokens, IN, seed=1) @ (random(IN, IN, seed=2) / IN**0.5 + 0.3 * torch.eye(IN))
    return mixed * (1 + 5 * (torch.arange(IN) % 37 == 0))


def hessian(x: torch.Tensor | None = None) -> torch.Tensor:
    x = inputs() if x is None else x
    return x.T @ x / len(x)


def weight() -> torch.Tensor:
    return random(OUT, IN, seed=3) * 0.02


def over(scheme: Scheme) -> float | None:
    return global_scale(float(weight().abs().max())) if scheme.globally_scaled else None


def rounded(scheme: Scheme, importance: torch.Tensor | None = None) -> Rounded:
    return gptq.round_to_nearest(weight(), scheme, importance, over(scheme))


def spread(values: torch.Tensor) -> np.ndarray:
    return values.double().repeat_interleave(IN // values.shape[1], 1).numpy()


def values(solution: Solution) -> np.ndarray:
    zero_point = 0 if solution.zero_point is None else spread(solution.zero_point)
    return (solution.levels.double().numpy() - zero_point) * spread(solution.scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_levels_are_those_of_optimal_brain_quantization(name, act_order):
    scheme, h = SCHEMES[name], hessian().double()
    factor = gptq.factorize(h, act_order=act_order, dampening=0.03)
    start = rounded(scheme, h.diagonal().float())
    damped = h.numpy() + 0.03 * h.diagonal().mean().item() * np.eye(IN)
    order = np.argsort(-h.diagonal().numpy(), kind="stable") if act_order else np.arange(IN)
    expected = oracle.gptq(weight().numpy(), damped, spread(start.scale), spread(start.zero_point), scheme, order)
    for block_size in (7, 128, IN):
        solved, errors = gptq.solve_columns(weight(), factor, start, scheme, block_size)
        np.testing.assert_array_equal(solved.levels.double().numpy(), expected)
        quantized = (expected - spread(start.zero_point)) * spread(start.scale)
        losses = errors.square().sum(1).numpy()
        np.testing.assert_allclose(losses, oracle.row_losses(weight().numpy(), quantized, damped), rtol=1e-9)
        pull = gptq.pull_of(errors, factor).numpy()
        np.testing.assert_allclose(pull, (weight().double().numpy() - quantized) @ damped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_loss_is_what_it_says_and_no_row_is_worse_than_rounding(name, act_order):
    scheme, h = SCHEMES[name], hessian()
    solution = gptq.solve(weight(), h, scheme, act_order=act_order, global_scale=over(scheme))
    nearest = rounded(scheme, h.diagonal())
    losses = oracle.row_losses(weight().numpy(), values(solution), h.numpy())
    rtn = oracle.row_losses(weight().numpy(), nearest.values().double().numpy(), h.numpy())
    assert solution.error == pytest.approx(losses.sum(), rel=1e-4)
    assert solution.rtn_error == pytest.approx(rtn.sum(), rel=1e-4)
    assert (losses <= rtn * (1 + 1e-4)).all()
    assert solution.error < 0.7 * solution.rtn_error
    assert (solution.method, solution.reason, solution.dampening) == (SolvedBy.GPTQ, "", 0.01)


def test_float32_loses_next_to_nothing():
    scheme, h = SCHEMES["int4-g32"], hessian()
    exact = gptq.solve(weight(), h.double(), scheme)
    solution = gptq.solve(weight(), h, scheme)
    assert solution.error == pytest.approx(exact.error, rel=0.01)
    assert (solution.levels == exact.levels).float().mean() > 0.97


def test_the_stored_form_needs_no_index():
    scheme = SCHEMES["int4-g64-asym-mse"]
    solution = gptq.solve(weight(), hessian(), scheme, act_order=True)
    stored = Quantized(
        packing.pack_levels(solution.levels.numpy(), 4),
        solution.scale.view(torch.uint16).numpy(),
        packing.pack_zero_points(solution.zero_point.numpy(), 4),
    )
    np.testing.assert_array_equal(dequantize(stored, scheme, OUT, IN), values(solution).astype(np.float32))


@pytest.mark.parametrize("name", ["int4-g64-asym-mse", "nvfp4-mse", "fp8-block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_block_is_the_kernel(dtype, name):
    factor = gptq.factorize(hessian().to(dtype), act_order=False, dampening=0.01)
    start = rounded(SCHEMES[name])
    group = torch.arange(IN) // (IN // start.scale.shape[1])
    given = (weight().to(dtype), factor.upper, start.scale, start.zero_point, group, SCHEMES[name].grid)
    ours, theirs = gptq_blocks.solve_block(*given), gptq_blocks.solve_block_torch(*given)
    agreement = (ours.levels == theirs.levels).double().mean().item()
    assert agreement == 1.0 if dtype is torch.float64 else agreement > 0.97
    if dtype is torch.float64:
        torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_and_touch_nothing(act_order):
    x = inputs()
    dead = torch.tensor([5, 70, 71])
    x[:, dead] = 0
    loud = weight()
    loud[:, dead] = 0.015
    scheme = SCHEMES["int4-g32"]
    solution = gptq.solve(loud, hessian(x), scheme, act_order=act_order)
    assert solution.dead_columns == 3
    nearest = gptq.round_to_nearest(loud, scheme, None)
    assert torch.equal(solution.levels[:, dead], nearest.levels[:, dead])
    alive = np.delete(np.arange(IN), dead)
    assert (solution.levels[:, dead] != 0).all()
    quiet = loud.clone()
    quiet[:, dead] = 0.013  # the group's scale does not depend on it
    again = gptq.solve(quiet, hessian(x), scheme, act_order=act_order)
    assert torch.equal(again.levels[:, alive], solution.levels[:, alive])


def test_all_columns_dead_is_rounding():
    solution = gptq.solve(weight(), torch.zeros(IN, IN), SCHEMES["int4-g32"])
    assert torch.equal(solution.levels, gptq.round_to_nearest(weight(), SCHEMES["int4-g32"], None).levels)
    assert solution.error == pytest.approx(0, abs=1e-12)
    assert solution.dead_columns == IN


def test_fewer_tokens_than_inputs_still_solve():
    solution = gptq.solve(weight(), hessian(inputs(20)), SCHEMES["int4-g32"])
    assert solution.method is SolvedBy.GPTQ
    assert solution.error < 0.5 * solution.rtn_error


@pytest.mark.parametrize(("lowest", "expected"), [(-0.05, 0.1), (-0.2, 0.3), (-0.9, 1.0)])
def test_dampening_climbs_until_the_hessian_can_be_factored(lowest, expected):
    h = torch.eye(IN)
    direction = torch.ones(IN) / IN**0.5
    h += (lowest - 1) * torch.outer(direction, direction)
    h /= h.diagonal().mean()
    solution = gptq.solve(weight(), h, SCHEMES["int4-g32"])
    assert solution.dampening == expected


def test_rounding_is_the_recorded_fallback():
    scheme = SCHEMES["int4-g32"]
    nearest = gptq.round_to_nearest(weight(), scheme, None).levels
    indefinite = torch.ones(IN, IN) * 5 - 4 * torch.eye(IN)
    indefinite[0, 1] = indefinite[1, 0] = 400
    broken = hessian()
    broken[3, 3] = torch.inf
    for h, reason in ((indefinite, "positive definite"), (broken, "not finite")):
        solution = gptq.solve(weight(), h, scheme)
        assert solution.method is SolvedBy.RTN
        assert reason in solution.reason
        assert solution.rtn_rows == OUT
        assert torch.equal(solution.levels, nearest)
    assert gptq.solve(weight(), hessian(), scheme, cross=broken).method is SolvedBy.RTN


def test_asymmetric_calibration_meets_the_original_outputs_better():
    x = inputs()
    original = x + 0.3 * random(*x.shape, seed=9) @ (random(IN, IN, seed=10) / IN**0.5) + 0.1 * x.roll(1, 1)
    cross = (original - x).T @ x / len(x)
    scheme, h = SCHEMES["int4-g32"], hessian(x)

    def output_error(solution: Solution) -> float:
        quantized = torch.from_numpy(values(solution)).float()
        return float((x @ quantized.T - original @ weight().T).square().sum())

    plain = gptq.solve(weight(), h, scheme)
    same = gptq.solve(weight(), h, scheme, cross=torch.zeros(IN, IN))
    asymmetric = gptq.solve(weight(), h, scheme, cross=cross)
    assert torch.equal(same.levels, plain.levels)
    assert output_error(asymmetric) < 0.9 * output_error(plain)
    target = weight().double() + weight().double() @ cross.double() @ torch.linalg.inv(
        h.double() + 0.01 * h.diagonal().mean() * torch.eye(IN)
    )
    losses = oracle.row_losses(target.numpy(), values(asymmetric), h.numpy())
    assert asymmetric.error == pytest.approx(losses.sum(), rel=1e-3)


def test_wrong_requests_are_refused():
    whole = Scheme(num_bits=8, type="float", strategy="tensor")
    with pytest.raises(ValueError, match="one scale a matrix"):
        gptq.solve(weight(), hessian(), whole)
    with pytest.raises(ValueError, match="does not fit"):
        gptq.solve(weight(), torch.eye(4), SCHEMES["int4-g32"])
    bad = weight()
    bad[7, 9] = torch.nan
    with pytest.raises(NonFiniteError, match="output 7, input 9"):
        gptq.solve(bad, hessian(), SCHEMES["int4-g32"])


@pytest.mark.parametrize(("source", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_scales_are_stored_in_the_sources_dtype(source, dtype):
    solution = gptq.solve(weight(), hessian(), Scheme(num_bits=4, group_size=32), source_dtype=source)
    assert solution.scale.dtype is dtype


def test_sweeps_at_once_are_sweeps_one_by_one():
    scheme, h = SCHEMES["int4-g32"], hessian().double()
    factor = gptq.factorize(h, act_order=True, dampening=0.01)
    one = at_once = gptq.round_to_nearest(weight(), scheme, h.diagonal().float())
    options = {"scheme": scheme, "block_size": 128}
    for _ in range(3):
        one, _ = gptq.descend(weight().double(), h, factor.added, one, **options)
    at_once, _ = gptq.descend(weight().double(), h, factor.added, at_once, sweeps=3, **options)
    assert torch.equal(one.levels, at_once.levels)
    assert torch.equal(one.scale, at_once.scale)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_sweep_never_raises_the_loss_and_stops_at_a_level_no_column_wants_to_leave(name):
    scheme, h = SCHEMES[name], hessian().double()
    factor = gptq.factorize(h, act_order=True, dampening=0.01)
    damped = h.numpy() + np.diag(factor.added.numpy())
    start = solved = rounded(scheme, h.diagonal().float())

    def loss(rounded):
        quantized = (rounded.levels.double().numpy() - spread(rounded.zero_point)) * spread(rounded.scale)
        return oracle.row_losses(weight().numpy(), quantized, damped)

    losses = [loss(solved)]
    for _ in range(40):
        solved, gain = gptq.descend(weight().double(), h, factor.added, solved, scheme, block_size=70)
        losses.append(loss(solved))
        np.testing.assert_allclose(losses[-2] - losses[-1], gain.numpy(), rtol=1e-6, atol=1e-9 * losses[0].max())
        assert (losses[-1] <= losses[-2] * (1 + 1e-12)).all()
        if (losses[-1] == losses[-2]).all():
            break
    assert losses[-1].sum() < 0.9 * losses[0].sum()
    assert torch.equal(solved.scale, start.scale)
    scale, zero_point = torch.from_numpy(spread(solved.scale)), torch.from_numpy(spread(solved.zero_point))
    allowed = torch.tensor(scheme.grid.levels) / scheme.grid.unit
    for step in (-1, 1):
        for column in range(0, IN, 17):
            moved = solved.levels.double()
            place = torch.searchsorted(allowed, moved[:, column].float())
            moved[:, column] = allowed[(place + step).clamp(0, len(allowed) - 1)].double()
            quantized = (moved - zero_point) * scale
            assert (oracle.row_losses(weight().numpy(), quantized.numpy(), damped) >= losses[-1] * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_torch_descent_is_the_kernel(name):
    scheme, h = SCHEMES[name], hessian().double()
    start = rounded(scheme)
    added = torch.full((IN,), 0.01 * h.diagonal().mean().item(), dtype=torch.float64)
    residual = weight().double() - start.values()
    pull = residual @ h + residual * added
    qparams = start.scale.double(), start.zero_point.double()
    ours, theirs = start.levels.clone(), start.levels.clone()
    kernel = gptq_blocks.descend(ours, pull.clone(), h, added, *qparams, scheme.grid, block_size=50, sweeps=3)
    plain = gptq_blocks.descend_torch(theirs, pull, h, added, *qparams, scheme.grid, 50, 3)
    assert (ours == theirs).all()
    torch.testing.assert_close(kernel, plain, rtol=1e-9, atol=1e-12)
    assert (ours != start.levels).float().mean() > 0.05


def test_a_shift_found_first_is_the_one_found_for_each_matrix():
    x = inputs()
    cross = 0.1 * (x.roll(1, 1) - x).T @ x / len(x)
    h, scheme = hessian(x).double(), SCHEMES["int4-g32"]
    shared = gptq.prepare_problem(h, cross=cross.double(), outputs=IN + 1)
    assert shared.shifting
    ours = gptq.solve_problem(shared, weight().double(), scheme, sweeps=2)
    plain = gptq.solve_problem(gptq.prepare_problem(h, cross=cross.double()), weight().double(), scheme, sweeps=2)
    assert torch.equal(ours.levels, plain.levels)
    assert ours.error == pytest.approx(plain.error, rel=1e-6)


def test_rows_in_pieces_are_rows_at_once():
    h, scheme = hessian().double(), SCHEMES["int4-g64-asym-mse"]
    problem = gptq.prepare_problem(h, cross=0.01 * h)
    whole = gptq.solve_problem(problem, weight().double(), scheme, sweeps=2)
    pieces = gptq.solve_problem(problem, weight().double(), scheme, sweeps=2, rows_at_once=13)
    for field in ("levels", "scale", "zero_point"):
        assert torch.equal(getattr(pieces, field), getattr(whole, field))
    assert (pieces.rtn_rows, pieces.error) == (whole.rtn_rows, pytest.approx(whole.error, rel=1e-9))
