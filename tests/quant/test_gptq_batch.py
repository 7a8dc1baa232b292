"""Matrices solved together against the same matrices solved one at a time."""

from __future__ import annotations

import pytest
import torch
from pretend_device import pretend_device

from l4pack.quant import gptq, gptq_batch, torch_scales, triangular
from l4pack.quant.dampening import fractions
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Rounded

OUT, IN = 40, 192
SCHEMES = {
    "int4-g32": Scheme(num_bits=4, group_size=32, scale_dtype="bfloat16"),
    "int4-g64-asym-mse": Scheme(num_bits=4, group_size=64, symmetric=False, observer="mse", scale_dtype="bfloat16"),
    "nvfp4-mse": Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, observer="mse"),
    "fp8-channel": Scheme(num_bits=8, type="float", strategy="channel", scale_dtype="bfloat16"),
    "fp8-block-mse": Scheme(
        num_bits=8, type="float", strategy="block", block_structure=(8, 128), observer="mse", scale_dtype="bfloat16"
    ),
    "int8-channel-mse": Scheme(num_bits=8, strategy="channel", observer="mse", scale_dtype="bfloat16"),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(triangular, "TILE", 80)
    monkeypatch.setattr(triangular, "INVERT_AT_ONCE", 50)
    monkeypatch.setattr(gptq_batch, "ROWS_AT_ONCE", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, seed: int) -> torch.Tensor:
    mixed = random(tokens, IN, seed=seed) @ (random(IN, IN, seed=seed + 1) / IN**0.5 + 0.3 * torch.eye(IN))
    return mixed * (1 + 5 * (torch.arange(IN) % 37 == 0))


def indefinite(lowest: float) -> torch.Tensor:
    """What takes more dampening than 1 %."""
    direction = torch.ones(IN, dtype=torch.float64) / IN**0.5
    hessian = torch.eye(IN, dtype=torch.float64) + (lowest - 1) * torch.outer(direction, direction)
    return hessian / hessian.diagonal().mean()


def moments(kind: str, seed: int) -> torch.Tensor:
    """A Hessian of every kind there is."""
    x = inputs(20 if kind == "thin" else 700, seed)
    if kind == "dead":
        x[:, [5, 70, 71]] = 0
    hessian = x.T @ x / len(x)
    if kind == "broken":
        hessian[3, 3] = torch.inf
    never = hessian * 0 + 5 - 4 * torch.eye(IN)
    never[0, 1] = never[1, 0] = 400
    others = {"unseen": hessian * 0, "ladder": indefinite(-0.2), "never": never}
    return others.get(kind, hessian)


KINDS = ("many", "thin", "dead", "unseen", "ladder", "never", "broken")


def stacked(kinds: tuple[str, ...] = KINDS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, Hessians and cross moments."""
    weight = torch.stack([random(OUT, IN, seed=100 + number) * 0.02 for number in range(len(kinds))])
    hessian = torch.stack([moments(kind, 10 * number) for number, kind in enumerate(kinds)])
    noise = torch.stack([random(IN, IN, seed=200 + number) for number in range(len(kinds))])
    return weight, hessian, 0.02 * (noise @ hessian.nan_to_num(posinf=0.0)) / IN**0.5


def climbed(hessian: torch.Tensor, **options: bool) -> torch.Tensor:
    """The fraction each Hessian takes, found the slow way."""
    found = []
    for one in hessian:
        factor = gptq.prepare_problem(one.clone(), **options).factor
        found.append(fractions(0.01)[-1] if factor is None else factor.dampening)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "act_order", "crossing", "sweeps"),
    [
        ("int4-g32", False, None, 0),
        ("int4-g32", True, OUT, 2),
        ("int4-g64-asym-mse", True, IN + 1, 2),
        ("int4-g64-asym-mse", False, OUT, 1),
        ("nvfp4-mse", True, OUT, 2),
        ("int8-channel-mse", True, None, 2),
        ("fp8-channel", True, OUT, 2),
        ("fp8-block-mse", True, IN + 1, 2),
    ],
)
def test_together_they_are_solved_as_one_by_one(name, act_order, crossing, sweeps):
    scheme, (weight, hessian, cross) = SCHEMES[name], stacked()
    outputs, crosses = crossing or 0, None if crossing is None else cross
    problems = gptq_batch.prepare_problems(
        hessian.clone(),
        None if crosses is None else crosses.clone(),
        climbed(hessian),
        act_order=act_order,
        outputs=outputs,
    )
    over = torch_scales.global_scale(weight.abs().amax((-2, -1)).float()) if scheme.globally_scaled else None
    ours = gptq_batch.solve_problems(problems, weight, scheme, sweeps=sweeps, over=over)
    assert problems.shifting == (crossing == IN + 1)
    for number, kind in enumerate(KINDS):
        problem = gptq.prepare_problem(
            hessian[number].clone(),
            cross=None if crosses is None else crosses[number].clone(),
            act_order=act_order,
            outputs=outputs,
        )
        own = None if over is None else global_scale(float(weight[number].abs().max()))
        theirs = gptq.solve_problem(problem, weight[number], scheme, sweeps=sweeps, global_scale=own)
        assert (ours.rounded.levels[number] == theirs.levels).all(), kind
        assert torch.equal(ours.rounded.scale[number], theirs.scale), kind
        if theirs.zero_point is not None:
            assert torch.equal(ours.rounded.zero_point[number].to(torch.int8), theirs.zero_point), kind
        assert int(ours.kept[number].sum()) == theirs.rtn_rows, kind
        if kind != "broken":
            assert float(ours.loss[number].sum()) == pytest.approx(theirs.error, rel=1e-6, abs=1e-12), kind
            assert float(ours.rtn_loss[number].sum()) == pytest.approx(theirs.rtn_error, rel=1e-6, abs=1e-12), kind
    assert problems.finite.tolist() == [kind != "broken" for kind in KINDS]
    assert problems.definite.tolist() == [kind != "never" for kind in KINDS]


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block-mse"])
def test_fp8_on_a_device_has_the_levels_of_the_cpu(name):
    scheme, few = SCHEMES[name], 16
    weight, hessian, _ = stacked(("many", "dead"))
    given = weight[:, :24, :few], hessian[:, :few, :few]

    def solved(device: str) -> Rounded:
        own, moments = (part.to(device).contiguous() for part in given)
        fractions = torch.full((2,), 0.01, dtype=moments.dtype).to(device)
        problems = gptq_batch.prepare_problems(moments, None, fractions, act_order=True, outputs=24)
        return gptq_batch.solve_problems(problems, own, scheme, sweeps=1).rounded.mapped(lambda part: part.cpu())

    ours = solved("cpu")
    with pretend_device():
        theirs = solved("cuda")
    assert (ours.levels == theirs.levels).all()
    assert torch.equal(ours.scale, theirs.scale)
