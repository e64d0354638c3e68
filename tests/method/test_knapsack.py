"""The greedy knapsack against exact optima."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesq.knapsack import greedy_knapsack, lower_hull


@st.composite
def knapsacks(draw) -> tuple[Tensor, Tensor, int]:
    """Integer costs; risks of any shape, ties and rises included; a capacity that at least the cheapest widths fit."""
    blocks, widths = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    steps = st.lists(st.integers(1, 6), min_size=widths, max_size=widths)
    bits = np.cumsum([draw(steps) for _ in range(blocks)], axis=1)
    falling = draw(st.booleans())
    drops = st.lists(st.integers(0 if falling else -5, 12), min_size=widths, max_size=widths)
    risk = 50 - np.cumsum([draw(drops) for _ in range(blocks)], axis=1)
    scale = draw(st.sampled_from([1.0, 1e-9, 0.1]))
    least = int(bits[:, 0].sum())
    capacity = draw(st.integers(least, int(bits[:, -1].sum()) + 3))
    return torch.from_numpy(risk * scale), torch.from_numpy(bits).double(), capacity


def total(table: Tensor, choice: Tensor) -> float:
    return sum(float(table[block, k]) for block, k in enumerate(choice.tolist()))


def exact(risk: Tensor, bits: Tensor, capacity: int) -> float:
    """Least risk within an integer capacity, by dynamic programming over the bits spent."""
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    for r, b in zip(risk.tolist(), bits.tolist(), strict=True):
        longer = np.full(capacity + 1, np.inf)
        for cost, value in zip(b, r, strict=True):
            shift = int(cost)
            if shift <= capacity:
                longer[shift:] = np.minimum(longer[shift:], best[: capacity + 1 - shift] + value)
        best = longer
    return float(best.min())


def largest_step(risk: Tensor, bits: Tensor) -> float:
    """Largest decrease between neighbours of a block's hull."""
    hulls = [brute_hull(r, b) for r, b in zip(risk.tolist(), bits.tolist(), strict=True)]
    drops = [risk[k, i] - risk[k, j] for k, hull in enumerate(hulls) for i, j in itertools.pairwise(hull)]
    return max(map(float, drops), default=0.0)


def brute_hull(risk: list[float], bits: list[float]) -> list[int]:
    """Vertices of the decreasing part of the lower hull: points no pair of others lies below or on, and that pay."""
    vertices = []
    for k in range(len(risk)):
        if any(risk[i] <= risk[k] for i in range(k)):
            continue
        below = False
        for i in range(k):
            for j in range(k + 1, len(risk)):
                share = (bits[k] - bits[i]) / (bits[j] - bits[i])
                below |= (1 - share) * risk[i] + share * risk[j] <= risk[k] + 1e-12 * abs(risk[k])
        if not below:
            vertices.append(k)
    return vertices


@given(knapsacks())
def test_lower_hull_is_the_convex_hull(case):
    risk, bits, _ = case
    risk = risk.round(decimals=0)  # integers: whether three points are collinear is then exact
    hulls, lengths = lower_hull(risk.numpy(), bits.numpy())
    assert [own[:n].tolist() for own, n in zip(hulls, lengths, strict=True)] == [
        brute_hull(r, b) for r, b in zip(risk.tolist(), bits.tolist(), strict=True)
    ]


@settings(max_examples=300)
@given(knapsacks())
def test_greedy_is_feasible_and_within_one_step_of_the_optimum(case):
    risk, bits, capacity = case
    choice = greedy_knapsack(risk, bits, capacity)
    assert total(bits, choice) <= capacity
    optimum, tolerance = exact(risk, bits, capacity), 1e-9 * float(risk.abs().max() + 1e-12)
    assert optimum - tolerance <= total(risk, choice) <= optimum + largest_step(risk, bits) + tolerance
    assert torch.equal(choice, greedy_knapsack(risk, bits, capacity))


@settings(max_examples=200)
@given(knapsacks())
def test_a_larger_budget_never_raises_the_risk(case):
    risk, bits, _ = case
    least, most = int(bits[:, 0].sum()), int(bits[:, -1].sum())
    risks = [total(risk, greedy_knapsack(risk, bits, capacity)) for capacity in range(least, most + 1)]
    assert all(after <= before + 1e-9 * abs(before) for before, after in itertools.pairwise(risks))
    assert risks[-1] == pytest.approx(float(risk.min(1).values.sum()))


def test_unlimited_capacity_buys_every_decrease_and_no_rise():
    risk = torch.tensor([[5.0, 3.0, 4.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    bits = torch.tensor([[2.0, 3.0, 4.0]]).expand(3, -1)
    assert greedy_knapsack(risk, bits, 1e9).tolist() == [1, 2, 0]


def test_ties_go_to_the_earlier_block():
    risk = torch.tensor([[4.0, 2.0]]).expand(5, -1)
    bits = torch.tensor([[2.0, 3.0]]).expand(5, -1)
    for extra in range(6):
        assert greedy_knapsack(risk, bits, 10 + extra).tolist() == [1] * extra + [0] * (5 - extra)


def test_what_does_not_fit_leaves_room_for_smaller_steps():
    risk = torch.tensor([[100.0, 0.0], [3.0, 1.0], [2.0, 1.0]])
    bits = torch.tensor([[2.0, 12.0], [2.0, 4.0], [2.0, 3.0]])
    assert greedy_knapsack(risk, bits, 9).tolist() == [0, 1, 1]
    assert greedy_knapsack(risk, bits, 16).tolist() == [1, 0, 0]  # one bit short of two steps, and the third left out
    assert greedy_knapsack(risk, bits, 17).tolist() == [1, 0, 1]


def test_infeasible_or_undefined_problems_are_refused():
    risk, bits = torch.tensor([[2.0, 1.0]]), torch.tensor([[4.0, 8.0]])
    with pytest.raises(ValueError, match="need 4 bits, the budget has 3"):
        greedy_knapsack(risk, bits, 3)
    for bad in ([torch.nan, 1.0], [torch.inf, torch.inf]):
        with pytest.raises(ValueError, match="NaN, or infinite"):
            greedy_knapsack(torch.tensor([bad]), bits, 100)
    with pytest.raises(ValueError, match="need 8 bits, the budget has 7"):
        greedy_knapsack(torch.tensor([[torch.inf, 1.0]]), bits, 7)


@settings(max_examples=200)
@given(knapsacks(), st.data())
def test_choices_of_infinite_risk_do_not_exist(case, data):
    risk, bits, _ = case
    some = st.sets(st.sampled_from(range(risk.shape[1])), min_size=1).map(sorted)
    keep = [data.draw(some, label="keep") for _ in range(len(risk))]
    masked = torch.full_like(risk, torch.inf, dtype=torch.float64)
    for k, own in enumerate(keep):
        masked[k, own] = risk[k, own].double()
    cheapest = int(sum(bits[k, own[0]] for k, own in enumerate(keep)))
    capacity = data.draw(st.integers(cheapest, int(bits[:, -1].sum()) + 1), label="capacity")
    choice = greedy_knapsack(masked, bits, capacity)
    assert all(c in own for c, own in zip(choice.tolist(), keep, strict=True))
    assert total(bits, choice) <= capacity
    tolerance = 1e-9 * float(risk.abs().max() + 1e-12)
    step = max(largest_step(risk[k : k + 1, own], bits[k : k + 1, own]) for k, own in enumerate(keep))
    assert total(risk, choice) <= exact(masked, bits, capacity) + step + tolerance
