"""The integer linear program against enumeration, and against the greedy knapsack."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from test_knapsack import exact, knapsacks, total

from bayesq.allocation import make_allocator
from bayesq.ilp import GAP, ilp_knapsack
from bayesq.knapsack import greedy_knapsack


@settings(max_examples=40, deadline=None)
@given(knapsacks())
def test_the_optimum_of_tiny_cases_is_reached(case):
    risk, bits, capacity = case
    choice = ilp_knapsack(risk, bits, capacity)
    assert total(bits, choice) <= capacity
    assert total(risk, choice) == pytest.approx(exact(risk, bits, capacity), rel=GAP, abs=GAP * float(risk.abs().max()))


def test_the_greedy_choice_can_be_worse_than_the_optimum():
    risk = torch.tensor([[10.0, 4.0], [10.0, 5.0], [10.0, 5.0]])
    bits = torch.tensor([[2.0, 7.0], [2.0, 6.5], [2.0, 6.5]])
    best = min(
        (picked for picked in itertools.product(range(2), repeat=3) if total(bits, torch.tensor(picked)) <= 15),
        key=lambda picked: total(risk, torch.tensor(picked)),
    )
    assert ilp_knapsack(risk, bits, 15).tolist() == list(best) == [0, 1, 1]
    assert greedy_knapsack(risk, bits, 15).tolist() == [1, 0, 0]


def test_a_total_may_not_exceed_the_capacity_by_a_tolerance():
    """HiGHS alone would accept one bit too much among a million."""
    risk, bits = torch.tensor([[2.0, 1.0]] * 2), torch.tensor([[2e6, 3e6]] * 2)
    assert sorted(ilp_knapsack(risk, bits, 5e6).tolist()) == [0, 1]
    assert ilp_knapsack(risk, bits, 5e6 - 1).tolist() == [0, 0]


def test_infeasible_or_undefined_problems_are_refused_as_by_the_greedy_knapsack():
    risk, bits = torch.tensor([[2.0, 1.0]]), torch.tensor([[4.0, 8.0]])
    with pytest.raises(ValueError, match="need 4 bits, the budget has 3"):
        ilp_knapsack(risk, bits, 3)
    with pytest.raises(ValueError, match="NaN, or infinite"):
        ilp_knapsack(torch.tensor([[torch.nan, 1.0]]), bits, 100)


def test_an_unknown_allocator_is_refused_by_name():
    with pytest.raises(ValueError, match="allocator=best: choose one of uniform, knapsack, ilp"):
        make_allocator("best", None, "row", [2, 3])
    with pytest.raises(ValueError, match="allocator=ilp needs a posterior"):
        make_allocator("ilp", None, "row", [2, 3])
