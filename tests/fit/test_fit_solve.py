"""The solver: equal to trying everything, never worse for more bytes, exact in whole numbers, proven or said to be off."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_fit import best_of_all

from l4pack.errors import L4packError
from l4pack.fit import solve as module
from l4pack.fit.solve import CostLimit, Selection, hull, select, smallest, total

LOSS = st.one_of(st.just(0.0), st.floats(1e-7, 1.0))
COST = st.one_of(st.integers(0, 20), st.integers(10**9, 10**11))


@st.composite
def problems(draw, limits=1):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    losses = [[draw(LOSS) for _ in range(size)] for size in sizes]
    costs = [[[draw(COST) for _ in range(size)] for size in sizes] for _ in range(limits)]
    bounds = []
    for table in costs:
        low, high = sum(map(min, table)), sum(map(max, table))
        bounds.append(draw(st.integers(low - 1 if low else 0, high + 1)))
    return losses, [CostLimit(table, bound) for table, bound in zip(costs, bounds, strict=True)]


def worth(losses):
    """How much loss all bytes are worth: solutions may differ from the optimum by this at most."""
    return module.BYTES_WORTH * sum(map(max, losses)) + 1e-12


@settings(max_examples=60, deadline=None)
@given(problems())
def test_one_limit_equals_trying_everything(problem):
    check_against_everything(*problem)


@settings(max_examples=40, deadline=None)
@given(problems(limits=2))
def test_two_limits_equal_trying_everything(problem):
    check_against_everything(*problem)


def check_against_everything(losses, limits):
    found = select(losses, limits[0].costs, limits)
    best = best_of_all(losses, [(limit.costs, limit.bound) for limit in limits])
    assert (found is None) == (best is None)
    if found is not None:
        assert all(total(limit.costs, found.picks) <= limit.bound for limit in limits)
        assert found.loss == pytest.approx(total(losses, found.picks))
        assert best - 1e-12 <= found.loss <= best + worth(losses)
        assert found.optimal


@settings(max_examples=30, deadline=None)
@given(problems(), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_more_bytes_never_lose_more(problem, shares):
    losses, (limit,) = problem
    low, high = sum(map(min, limit.costs)), sum(map(max, limit.costs))
    bounds = sorted(low + int(share * (high - low)) for share in shares)
    found = [select(losses, limit.costs, [CostLimit(limit.costs, bound)]) for bound in bounds]
    for smaller, larger in pairwise(found):
        assert larger.loss <= smaller.loss + worth(losses)


def test_of_equal_losses_the_fewest_bytes_are_taken():
    losses, costs = [[0.5, 0.5, 0.5], [0.0, 0.0, 1.0]], [[30, 10, 20], [7, 5, 1]]
    assert select(losses, costs, [CostLimit(costs, 1000)]).picks == (1, 1)
    assert smallest(costs) == (1, 2)


def test_nothing_lost_anywhere_is_solved():
    costs = [[3, 1], [2, 2]]
    assert select([[0.0, 0.0], [0.0, 0.0]], costs, [CostLimit(costs, 5)]).picks == (1, 0)


def test_sums_are_exact_at_the_last_byte():
    """Costs near 2**37 that differ by one byte: the solver's floats can't tell, the answer must."""
    large = 2**37
    costs = [[large + 1, large], [large + 1, large], [large + 1, large]]
    losses = [[0.0, 1.0], [0.0, 1.1], [0.0, 1.2]]
    for extra, loss in ((3, 0.0), (2, 1.0), (1, 2.1), (0, 3.3)):
        found = select(losses, costs, [CostLimit(costs, 3 * large + extra)])
        assert total(costs, found.picks) <= 3 * large + extra
        assert found.loss >= loss - 1e-9
    assert select(losses, costs, [CostLimit(costs, 3 * large - 1)]) is None


def test_the_gap_is_stated_where_the_solver_stopped_early(monkeypatch):
    """A solver that hands back a poor answer, with what it proved: the gap is the distance between them."""
    costs, losses = [[0, 1]], [[2.0, 1.0]]

    def early(program):
        return (0,), program.value((1,))

    monkeypatch.setattr(module._Program, "run", early)
    found = select(losses, costs, [CostLimit(costs, 5)])
    assert found.picks == (0,)
    assert found.gap == pytest.approx(0.5, abs=1e-3)
    assert not found.optimal
    assert Selection((0,), 1.0, 1e-9).optimal


def test_a_solver_that_never_adds_up_is_an_error(monkeypatch):
    costs = [[0, 9]]
    monkeypatch.setattr(module._Program, "run", lambda program: ((1,), 0.0))
    with pytest.raises(L4packError, match="rounding"):
        select([[2.0, 1.0]], costs, [CostLimit(costs, 5)])


def test_a_solver_out_of_time_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "TIME_LIMIT", 0.0)
    rng = np.random.default_rng(0)
    losses = rng.random((60, 8)).tolist()
    costs = rng.integers(1, 10**9, (60, 8)).tolist()
    with pytest.raises(L4packError, match="found nothing in 0 s"):
        select(losses, costs, [CostLimit(costs, sum(map(min, costs)) + 10**9)])


@settings(max_examples=50, deadline=None)
@given(problems())
def test_every_point_of_the_hull_is_optimal_for_its_bytes(problem):
    losses, (limit,) = problem
    points = hull(losses, limit.costs)
    sizes = [total(limit.costs, picks) for picks in points]
    values = [total(losses, picks) for picks in points]
    assert sizes == sorted(sizes)
    assert values == sorted(values, reverse=True)
    assert sizes[0] == sum(map(min, limit.costs))
    assert values[-1] == pytest.approx(sum(map(min, losses)))
    for size, value in list(zip(sizes, values, strict=True))[:6]:
        assert value == pytest.approx(best_of_all(losses, [(limit.costs, size)]), abs=1e-12)


def test_the_solver_writes_nothing_of_its_own(capfd):
    rng = np.random.default_rng(1)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        losses = (rng.random((100, 7)) * 4.0 ** -np.arange(7)).tolist()
        costs = (rng.integers(10**6, 10**7, (100, 1)) * np.arange(1, 8)).tolist()
        select(losses, costs, [CostLimit(costs, int(1.4 * sum(map(min, costs))))])
    assert capfd.readouterr() == ("", "")
