"""Codes of Ungerboeck's trellises against a shift register, and the best path against all paths one by one."""

import heapq
import itertools
import math

import numpy as np
import pytest
import torch
from naive_quant import UNGERBOECK, half_steps, shift_register, trellis_indices

from bayesq.quant.codes.trellis import POLYNOMIALS, level_indices, subset_table, uniform_levels
from bayesq.quant.entropy_search import best_path

STATES = sorted(UNGERBOECK)


def path_cost(distance: np.ndarray, states: int) -> float:
    """Cost of the path that the search finds, with the subsets that a shift register gives its bits."""
    path = np.empty(len(distance), np.uint8)
    best_path(distance, subset_table(states)[:states:2].astype(np.uint8), path)
    subsets = shift_register((path & 1).tolist(), states)
    assert subsets == (path >> 1).tolist()
    return float(sum(row[subset] for row, subset in zip(distance.astype(np.float64), subsets, strict=True)))


def viterbi(distance: np.ndarray, states: int) -> float:
    """Least cost down one long column, in float64: cost of the best path into each window, row after row."""
    h0, h1, _ = UNGERBOECK[states]
    taps = [int(h, 2) for h in (h0, h1)]
    windows = range(2 * states)
    subset = np.array([2 * ((w & taps[0]).bit_count() % 2) + (w & taps[1]).bit_count() % 2 for w in windows])
    old, cost = np.array([w >> 1 for w in windows]), np.where(np.arange(states) == 0, 0.0, np.inf)
    for row in distance.astype(np.float64):
        # the newest m bits of windows w and w + states are one and the same new state
        cost = (cost[old] + row[subset]).reshape(2, states).min(0)
    return float(cost.min())


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 40, 5), (3, 11, 4), (1, 1, 3), (6, 1, 2), (2, 4, 3)])
def test_decoding_is_a_shift_register(states: int, groups: int, rows: int, columns: int) -> None:
    codes = np.random.default_rng(states + rows).integers(0, 256, (groups * rows, columns)).astype(np.uint8)
    found = level_indices(torch.from_numpy(codes), states, groups)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), trellis_indices(codes, states, groups))


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("rows", range(1, 11))
def test_groups_shorter_than_the_register_are_decoded(states: int, rows: int) -> None:
    codes = torch.randint(0, 256, (2 * rows, 3), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    assert np.array_equal(level_indices(codes, states, 2).numpy(), trellis_indices(codes.numpy(), states, 2))


@pytest.mark.parametrize("states", STATES)
def test_a_groups_codes_mean_the_same_whatever_the_other_groups_hold(states: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 5), generator=generator, dtype=torch.uint8)
    other = codes.clone()
    other[:12] = torch.randint(0, 16, (12, 5), generator=generator, dtype=torch.uint8)
    one, two = (level_indices(c, states, 2) for c in (codes, other))
    assert torch.equal(one[12:], two[12:]) and not torch.equal(one[:12], two[:12])
    assert not torch.equal(level_indices(codes, states, 1)[12:], one[12:])


# ------------------------------------------------------------------------------------------------------------- codes


def test_every_code_of_the_table_is_tried() -> None:
    assert sorted(POLYNOMIALS) == STATES
    with pytest.raises(ValueError, match="4, 8, 16, 32, 64, 128, 256 states, not 12"):
        subset_table(12)


@pytest.mark.parametrize("states", STATES)
def test_branches_and_merges_differ_in_the_subsets_high_bit(states: int) -> None:
    subset = subset_table(states)
    assert subset.shape == (2 * states,) and set(subset.tolist()) == {0, 1, 2, 3}
    for window in range(2 * states):
        # newest bit: the two branches out of a state; oldest bit: the two branches into one
        for flipped in (window ^ 1, window ^ states):
            assert {subset[window], subset[flipped]} in ({0, 2}, {1, 3})


@pytest.mark.parametrize("states", STATES)
def test_free_distance_is_ungerboecks(states: int) -> None:
    """Cheapest way from the zero path back to it; levels of subsets s and t are (s xor t): 0, 1, 2 or 1 apart."""
    subset, apart = subset_table(states).tolist(), (0, 1, 4, 1)
    heap, reached, free = [(apart[subset[1]], 1)], set(), None
    while free is None:
        distance, state = heapq.heappop(heap)
        if state == 0:
            free = distance
        elif state not in reached:
            reached.add(state)
            for window in (2 * state, 2 * state + 1):
                heapq.heappush(heap, (distance + apart[subset[window]], window % states))
    # parallel branches, 4 levels apart, are at distance 16
    assert min(free, 16) == UNGERBOECK[states][2]


# ------------------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("states", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_the_path_found_is_the_best_of_all(states: int, rows: int) -> None:
    random = np.random.default_rng(rows)
    for _ in range(10):
        distance = (random.random((rows, 4)) ** 2 * 10 ** random.uniform(-2, 2, (rows, 1))).astype(np.float32)
        least = math.inf
        for bits in itertools.product((0, 1), repeat=rows):
            subsets = shift_register(list(bits), states)
            least = min(least, sum(float(row[subset]) for row, subset in zip(distance, subsets, strict=True)))
        assert path_cost(distance, states) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("states", STATES)
def test_long_columns_lose_no_accuracy(states: int) -> None:
    distance = np.random.default_rng(states).random((5000, 4)).astype(np.float32) + np.float32(3)
    assert path_cost(distance, states) == pytest.approx(viterbi(distance, states), rel=1e-7)


def test_uniform_levels_are_half_steps_around_the_codes() -> None:
    for width in range(2, 9):
        levels = uniform_levels(width)
        assert levels.tolist() == half_steps(width)
        assert float(levels.mean()) == (2**width - 1) / 2
