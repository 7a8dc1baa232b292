"""Where a GPU may round the factors of its products, as the pretended one does when torch is told to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pretend_device import pretend_device, tf32

from l4pack.calibration import batch_units, moments
from l4pack.quant import gptq, gptq_batch, two_sided_batch, two_sided_gptq
from l4pack.quant.precision import tensor_cores, whole_factors
from l4pack.quant.scheme import Scheme
from l4pack.stream.compute import calibrating, float32_on

TOKENS, WIDTH, OUTPUTS = 96, 64, 48
INT4 = Scheme(num_bits=4, group_size=32)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pretend_device(tf32=True) as done:
        yield done


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def failing(settings) -> None:
    with tensor_cores():
        assert settings.allow_tf32
        with whole_factors():
            assert not settings.allow_tf32
        assert settings.allow_tf32
        raise ZeroDivisionError


def test_as_it_was_afterwards():
    settings = torch.backends.cuda.matmul
    assert not settings.allow_tf32
    with pytest.raises(ZeroDivisionError):
        failing(settings)
    assert not settings.allow_tf32


def test_tf32_has_ten_bits_of_fraction():
    values = numbers(1000)
    error = (tf32(values) - values).abs() / values.abs()
    assert 0 < error.max() <= 2**-11
    assert torch.equal(tf32(values.bfloat16().float()), values.bfloat16().float())


@pytest.mark.parametrize("batched", [False, True])
def test_moments_are_products_of_rounded_factors(device, batched):
    """So they are moments of some inputs, and as definite as any."""
    inputs, difference = numbers(TOKENS, WIDTH), numbers(TOKENS, WIDTH, seed=1) * 0.1
    original = inputs + difference
    place = torch.device("cuda:0")
    with calibrating():
        if batched:
            found = batch_units.Moments(1, WIDTH, cross=True, device=place)
            one = torch.ones(1, TOKENS).to("cuda")
            found.add(batch_units.Block(inputs[None].to("cuda"), original[None].to("cuda"), one, None))
            found.finish(one.sum(1))
            hessian, cross = found.hessian[0], found.cross[0]
        else:
            summed = moments.Moments(WIDTH, cross=True, device=place, thin=False)
            summed.add(inputs.to("cuda"), original.to("cuda"))
            gathered = summed.finish()
            hessian, cross = gathered.hessian, gathered.cross
    rounded, apart = tf32(inputs).double(), tf32(original - inputs).double()
    torch.testing.assert_close(hessian.cpu().double(), rounded.T @ rounded / TOKENS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross.cpu().double(), apart.T @ rounded / TOKENS, rtol=1e-5, atol=1e-6)
    whole = inputs.double()
    assert (hessian.cpu().double() - whole.T @ whole / TOKENS).abs().max() > 1e-5


def solved_alone(place: str, *, both: bool) -> list[torch.Tensor]:
    inputs, weight = numbers(TOKENS, WIDTH), numbers(OUTPUTS, WIDTH, seed=2) * 0.1
    cross = numbers(WIDTH, WIDTH, seed=3) * 0.01
    problem = gptq.prepare_problem((inputs.T @ inputs / TOKENS).to(place), cross=cross.to(place), outputs=OUTPUTS)
    if not both:
        solution = gptq.solve_problem(problem, weight.to(place), INT4, sweeps=2)
    else:
        gradients = numbers(TOKENS, OUTPUTS, seed=4)
        outputs = two_sided_gptq.OutputMoments((gradients.T @ gradients).to(place), 0.05)
        solution = two_sided_gptq.solve_two_sided(problem, outputs, weight.to(place), INT4, sweeps=2)
    return [solution.levels.cpu(), solution.scale.cpu()]


def solved_together(place: str, *, both: bool) -> list[torch.Tensor]:
    inputs, weight = numbers(2, TOKENS, WIDTH), (numbers(2, OUTPUTS, WIDTH, seed=2) * 0.1).to(place)
    hessian, fraction = (inputs.mT @ inputs / TOKENS).to(place), torch.full((2,), 0.01).to(place)
    cross = (numbers(2, WIDTH, WIDTH, seed=3) * 0.01).to(place)
    problems = gptq_batch.prepare_problems(hessian, cross, fraction, act_order=True, outputs=OUTPUTS)
    target = gptq_batch.asymmetric_target(weight, problems)
    scheme = gptq.with_scales(INT4, "BF16")
    found = gptq_batch.solve_problems(problems, weight, scheme, sweeps=2, target=target)
    if both:
        gradients = numbers(2, TOKENS, OUTPUTS, seed=4)
        outputs = two_sided_batch.prepare_outputs((gradients.mT @ gradients).to(place), fraction, act_order=True)
        by_sides = two_sided_batch.solve_by_sides(problems, outputs, weight, scheme, found, target=target, sweeps=2)
        return [by_sides.rounded.levels.cpu(), by_sides.loss.cpu()]
    return [found.rounded.levels.cpu(), found.loss.cpu()]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("solve", [solved_alone, solved_together])
def test_solvers_take_whole_factors(device, solve, both):
    with calibrating():
        ours = solve("cuda", both=both)
    assert all(map(torch.equal, ours, solve("cuda", both=both)))


def test_how_it_is_computed_is_part_of_a_job():
    assert float32_on("cuda").parts()["products"] == "tf32"
    assert "products" not in float32_on("cpu").parts()
    assert "products" not in replace(float32_on("cuda"), dtype=torch.bfloat16).parts()
