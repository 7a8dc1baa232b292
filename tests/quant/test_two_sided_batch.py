"""Matrices solved by both sides together against the same matrices solved one at a time, on the CPU."""

from __future__ import annotations

import pytest
import torch

from l4pack.quant import gptq, gptq_batch, torch_scales, two_sided, two_sided_batch, two_sided_gptq
from l4pack.quant.dampening import fractions
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Kept
from l4pack.quant.two_sided_gptq import OutputMoments

OUT, IN = 40, 64
SCHEMES = {
    "int4-g32": Scheme(num_bits=4, group_size=32, scale_dtype="bfloat16"),
    "int4-g16-asym-mse": Scheme(num_bits=4, group_size=16, symmetric=False, observer="mse", scale_dtype="bfloat16"),
    "int8-channel": Scheme(num_bits=8, strategy="channel", scale_dtype="bfloat16"),
    "fp8-channel": Scheme(num_bits=8, type="float", strategy="channel", scale_dtype="bfloat16"),
    "nvfp4-mse": Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, observer="mse"),
}
# Moments of a matrix' inputs, and of the gradients at its outputs.
KINDS = (
    ("many", "many"),
    ("dead", "none"),
    ("many", "ladder"),
    ("broken", "many"),
    ("many", "broken"),
    ("many", "dead"),
)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Tiles that divide neither rows nor columns into whole ones."""
    monkeypatch.setattr(two_sided, "TILE", 24)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(kind: str, size: int, seed: int) -> torch.Tensor:
    mixed = random(400, size, seed=seed) @ (random(size, size, seed=seed + 1) / size**0.5 + 0.3 * torch.eye(size))
    mixed *= 1 + 4 * (torch.arange(size) % 13 == 0)
    if kind == "dead":
        mixed[:, 5] = 0
    found = mixed.T @ mixed / len(mixed)
    if kind == "broken":
        found[3, 3] = torch.inf
    if kind == "ladder":  # what takes more dampening than 5 %
        direction = torch.ones(size, dtype=torch.float64) / size**0.5
        found = torch.eye(size, dtype=torch.float64) - 1.2 * torch.outer(direction, direction)
    return found * 0 if kind == "none" else found


def given() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each kind: weights, a Hessian, cross moments, and moments of gradients."""
    found = []
    for number, (inputs, outputs) in enumerate(KINDS):
        weight, h = random(OUT, IN, seed=100 + number) * 0.02, moments(inputs, IN, 10 * number)
        cross = 0.05 * h.nan_to_num(posinf=0.0).roll(1, 0)
        found.append((weight, h, cross, moments(outputs, OUT, 10 * number + 5)))
    return found


def climbed(sides: list[torch.Tensor]) -> torch.Tensor:
    """The fraction of dampening that moments take, found the slow way."""
    found = [two_sided.prepare_outputs(one.clone(), dampening=0.05) for one in sides]
    steps = [fractions(0.05)[0] if one is None else one.factor.dampening for one in found]
    return torch.tensor(steps, dtype=torch.float64)


def together(name: str, sweeps: int) -> two_sided_batch.BySides:
    scheme, (weight, h, cross, sides) = SCHEMES[name], (torch.stack(one) for one in zip(*given(), strict=True))
    inputs = torch.full((len(KINDS),), 0.01, dtype=torch.float64)
    problems = gptq_batch.prepare_problems(h, cross, inputs, act_order=True, outputs=OUT)
    over = torch_scales.global_scale(weight.abs().amax((-2, -1)).float()) if scheme.globally_scaled else None
    target, fraction = gptq_batch.asymmetric_target(weight, problems), climbed(list(sides))
    options = {"sweeps": sweeps, "over": over, "target": target}
    found = gptq_batch.solve_problems(problems, weight, scheme, **options)
    outputs = two_sided_batch.prepare_outputs(sides, fraction, act_order=True)
    return two_sided_batch.solve_by_sides(problems, outputs, weight, scheme, found, **options)


@pytest.mark.parametrize(
    ("name", "sweeps"),
    [("int4-g32", 0), ("int4-g16-asym-mse", 2), ("int8-channel", 1), ("fp8-channel", 1), ("nvfp4-mse", 2)],
)
def test_together_they_are_solved_as_one_by_one(name, sweeps):
    ours, scheme = together(name, sweeps), SCHEMES[name]
    for number, (weight, h, cross, sides) in enumerate(given()):
        problem = gptq.prepare_problem(h, cross=cross)
        own = global_scale(float(weight.abs().max())) if scheme.globally_scaled else None
        theirs = two_sided_gptq.solve_two_sided(
            problem, OutputMoments(sides, dampening=0.05), weight, scheme, sweeps=sweeps, global_scale=own
        )
        kept = theirs.two_sided
        assert kept is not None
        assert (kept.reason != "") == ("broken" in KINDS[number])
        assert torch.equal(ours.rounded.levels[number], theirs.levels), KINDS[number]
        assert torch.equal(ours.rounded.scale[number], theirs.scale), KINDS[number]
        assert int(ours.kept[number]) == theirs.rtn_rows, KINDS[number]
        if KINDS[number][0] == "broken":
            continue
        assert float(ours.loss[number]) == pytest.approx(theirs.error, rel=1e-6), KINDS[number]
        assert float(ours.rtn_loss[number]) == pytest.approx(theirs.rtn_error, rel=1e-6), KINDS[number]
        if not kept.reason:
            losses = ours.losses[:, number].tolist()
            assert losses[1:] == pytest.approx((kept.gptq_error, kept.rtn_error), rel=1e-6), KINDS[number]
            assert losses[int(ours.ended[number])] == pytest.approx(kept.error, rel=1e-6), KINDS[number]
            if KINDS[number][1] != "none":  # else both solves are one
                assert two_sided_batch.CHOICES[int(ours.ended[number])] is kept.kept, KINDS[number]


def test_rounding_to_nearest_is_kept_where_it_is_better(monkeypatch):
    losses = iter([torch.full((len(KINDS),), 2.0), torch.full((len(KINDS),), 1.0)])
    monkeypatch.setattr(two_sided_batch, "loss_of", lambda *_: next(losses))
    monkeypatch.setattr(
        two_sided_batch, "best_nested", lambda *given, **_: (given[4], torch.full((len(KINDS),), torch.nan))
    )
    ours = together("int4-g32", 2)
    solvable = [not {"broken"} & set(kind) for kind in KINDS]
    assert [two_sided_batch.CHOICES[int(one)] is Kept.RTN for one in ours.ended] == solvable
    weight, h, _, _ = given()[0]
    nearest = gptq.round_to_nearest(weight.float(), SCHEMES["int4-g32"], h.diagonal().float())
    assert torch.equal(ours.rounded.levels[0], nearest.levels)
    assert int(ours.kept[0]) == OUT
    assert float(ours.loss[0]) == float(ours.rtn_loss[0])


def test_outputs_that_matrices_share_take_no_more_memory():
    outputs = two_sided_batch.prepare_outputs(moments("many", OUT, 3)[None], torch.tensor([0.05]), act_order=True)
    shared = outputs.shared_by(3)
    assert shared.factors.upper.shape == (3, OUT, OUT)
    assert shared.damped.data_ptr() == outputs.damped.data_ptr()
    assert shared.definite.tolist() == [True] * 3
