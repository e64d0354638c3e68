"""Trellis codes against a shift register, all paths one by one, a float64 Viterbi search and known distortions."""

import heapq
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_quant import UNGERBOECK, half_steps, moment_of, shift_register, trellis_indices
from torch import Tensor

from bayesq.codebook import normal_distortion
from bayesq.quant.codes.trellis import POLYNOMIALS, level_indices, subset_table, uniform_levels
from bayesq.quant.feedback import feedback_factor, feedback_round
from bayesq.quant.grids import CodebookGrid
from bayesq.quant.trellis import TrellisGrid, normal_trellis, trellis_distortion

STATES = sorted(UNGERBOECK)
WIDTHS = [3, 2, 5, 2, 4, 3, 8, 2]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trellis_grid(widths: list[int], states: int, seed: int = 0, designed: tuple[int, ...] = ()) -> TrellisGrid:
    """Rows of unequal scales, zeros and gains; irregular levels at the widths of `designed`."""
    random = np.random.default_rng(seed)
    books = {w: torch.from_numpy(np.sort(random.uniform(-0.5, 2**w - 0.5, 2 ** (w + 1)))) for w in designed}
    width = torch.tensor(widths, dtype=torch.uint8)
    scale = torch.from_numpy(random.uniform(0.3, 1.5, len(widths))) * 2 ** (2.0 - width)
    zero = torch.from_numpy(random.uniform(0.3, 0.7, len(widths))) * 2.0**width
    gain = torch.from_numpy(10 ** random.uniform(-2, 2, len(widths)))
    return TrellisGrid(scale, zero, width, books, gain, states)


def reals(grid: TrellisGrid) -> list[list[float]]:
    """The values each row can take, in the order of its levels."""
    found = []
    for scale, zero, width in zip(grid.scale.tolist(), grid.zero.tolist(), grid.width.tolist(), strict=True):
        levels = grid.codebooks[width].tolist() if width in grid.codebooks else half_steps(width)
        found.append([scale * (level - zero) for level in levels])
    return found


def least_of_all_paths(x: list[float], values: list[list[float]], gain: list[float], states: int) -> float:
    """Least sum of gain times squared error over every path of bits and, on it, every level of its subsets."""
    least = math.inf
    for bits in itertools.product((0, 1), repeat=len(x)):
        total = 0.0
        for entry, own, cost, subset in zip(x, values, gain, shift_register(list(bits), states), strict=True):
            total += cost * min((entry - value) ** 2 for value in own[subset::4])
        least = min(least, total)
    return least


def viterbi(units: np.ndarray, weight: np.ndarray, levels: np.ndarray, states: int) -> float:
    """Least distortion down one long column, in float64: cost of the best path into each window, row after row."""
    h0, h1, _ = UNGERBOECK[states]
    taps = [int(h, 2) for h in (h0, h1)]
    windows = range(2 * states)
    subset = np.array([2 * ((w & taps[0]).bit_count() % 2) + (w & taps[1]).bit_count() % 2 for w in windows])
    old, cost = np.array([w >> 1 for w in windows]), np.where(np.arange(states) == 0, 0.0, np.inf)
    errors = (units[:, None] - levels[None, :]) ** 2
    nearest = np.stack([errors[:, s::4].min(1) for s in range(4)], 1) * weight[:, None]
    for row in nearest:
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


@settings(max_examples=60, deadline=None)
@given(
    states=st.sampled_from(STATES),
    widths=st.lists(st.integers(2, 8), min_size=1, max_size=24),
    designed=st.lists(st.integers(2, 8), unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_codes_are_a_path_that_rounding_finds_again(
    states: int, widths: list[int], designed: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(0, 2 ** np.array(widths)[:, None], (len(widths), 3)).astype(np.uint8))
    grid = trellis_grid(widths, states, seed, tuple(designed))
    index = level_indices(codes, states, 1)
    assert bool((index < 2 ** (torch.tensor(widths)[:, None] + 1)).all()) and bool((index >= 0).all())
    values = torch.from_numpy(np.array([np.array(own)[row] for own, row in zip(reals(grid), index, strict=True)]))
    found, rounded = grid.round_matrix(values)
    assert torch.equal(found, codes.long())
    torch.testing.assert_close(rounded, values, rtol=1e-12, atol=1e-12)


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


# ---------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("states", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("designed", [(), (2, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_path_found_is_the_best_of_all(states: int, rows: int, designed: tuple[int, ...], seed: int) -> None:
    grid = trellis_grid(WIDTHS[:rows], states, seed, designed)
    values, gain = reals(grid), grid.row_curvature.tolist()
    x = 1.5 * normal(rows, 4, seed=seed)
    x[0, 3] = 20.0  # beyond the last level
    codes, rounded = grid.round_matrix(x)
    assert bool((codes >= 0).all()) and bool((codes < 2 ** grid.width[:, None].long()).all())
    index = trellis_indices(codes.numpy(), states, 1)
    for c in range(x.shape[1]):
        assert rounded[:, c].tolist() == pytest.approx([values[r][index[r, c]] for r in range(rows)], rel=1e-12)
        achieved = sum(gain[r] * (values[r][index[r, c]] - float(x[r, c])) ** 2 for r in range(rows))
        least = least_of_all_paths(x[:, c].tolist(), values, gain, states)
        assert least * (1 - 1e-12) <= achieved <= least * (1 + 1e-5)


@pytest.mark.parametrize("states", [4, 8])
def test_entries_of_unequal_cost_are_weighed_entry_by_entry(states: int) -> None:
    grid = trellis_grid(WIDTHS, states, seed=7)
    x = normal(8, 5, seed=8)
    gain = 10 ** normal(8, 5, seed=9)
    values = reals(grid)
    index = trellis_indices(grid.round_matrix(x, gain)[0].numpy(), states, 1)
    for c in range(5):
        cost = gain[:, c].tolist()
        achieved = sum(cost[r] * (values[r][index[r, c]] - float(x[r, c])) ** 2 for r in range(8))
        assert achieved == pytest.approx(least_of_all_paths(x[:, c].tolist(), values, cost, states), rel=1e-5)
    assert not torch.equal(grid.round_matrix(x, gain)[0], grid.round_matrix(x)[0])
    # a gain that is the rows' own says nothing new
    assert torch.equal(grid.round_matrix(x, grid.row_curvature[:, None].expand_as(x))[0], grid.round_matrix(x)[0])


@pytest.mark.parametrize("states", [4, 64, 256])
def test_a_matrix_is_rounded_column_by_column_and_alike_every_time(states: int) -> None:
    widths = (WIDTHS * 9)[:70]
    grid = trellis_grid(widths, states, seed=1, designed=(3, 4))
    x = normal(70, 9, seed=2)
    codes, values = grid.round_matrix(x)
    for c in range(9):
        code, value = grid.round(x[:, c], c)
        assert torch.equal(code, codes[:, c]) and torch.equal(value, values[:, c])
    again = trellis_grid(widths, states, seed=1, designed=(3, 4)).round_matrix(x)
    assert torch.equal(again[0], codes) and torch.equal(again[1], values)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("width", [2, 3, 5])
def test_it_is_never_worse_than_choosing_row_by_row(states: int, width: int) -> None:
    """Two scalar codes are paths too: all bits zero, and in each row the nearest level that the last rows allow.

    The former has every fourth level. The latter has every second one, steps of 1, like a scalar code of its width.
    """
    rows = 200
    one = torch.ones(rows, dtype=torch.float64)
    grid = TrellisGrid(one, 0 * one, torch.full((rows,), width), {}, one, states)
    # half a step of 1 inside the outermost levels of both alphabets
    x = torch.from_numpy(np.random.default_rng(width).uniform(-0.25, 2**width - 1.25, (rows, 3)))
    error = (grid.round_matrix(x)[1] - x).square().sum(0)
    fourth = {width - 1: torch.tensor(half_steps(width)[::4])}
    coarse = CodebookGrid(one, 0 * one, torch.full((rows,), width - 1), fourth)
    assert bool((error <= (coarse.round_matrix(x)[1] - x).square().sum(0)).all())
    for c in range(3):
        bits: list[int] = []
        greedy = 0.0
        for entry in x[:, c].tolist():
            options = []
            for bit in (0, 1):
                subset = shift_register([*bits[-states.bit_length() :], bit], states)[-1]
                options.append((min((entry - level) ** 2 for level in half_steps(width)[subset::4]), bit))
            distance, bit = min(options)
            assert distance <= 0.75**2
            greedy += distance
            bits.append(bit)
        assert float(error[c]) < 0.95 * greedy


@pytest.mark.parametrize("states", [4, 8])
def test_long_columns_lose_no_accuracy(states: int) -> None:
    rows, width = 20_000, 3
    levels = normal_trellis(width, states, True)[0]
    one = torch.ones(rows, dtype=torch.float64)
    # costs over many powers of ten, a light row's choice next to heavy ones included
    gain = 10 ** torch.from_numpy(np.random.default_rng(0).uniform(-3, 1, rows))
    grid = TrellisGrid(one, 0 * one, torch.full((rows,), width), {width: levels}, gain, states)
    x = normal(rows, seed=3)
    _, values = grid.round(x, 0)
    achieved = float((gain * (values - x).square()).sum())
    least = viterbi(x.numpy(), gain.numpy(), levels.numpy(), states)
    assert least * (1 - 1e-12) <= achieved <= least * (1 + 1e-9)


def test_the_cost_of_rows_counts_in_ratios_only() -> None:
    grid, x = trellis_grid(WIDTHS, 8), normal(8, 20, seed=4)
    codes = grid.round_matrix(x)[0]
    for factor in (1e-200, 2.0**-70, 2.0**90, 1e200):
        same = TrellisGrid(grid.scale, grid.zero, grid.width, {}, grid.row_curvature * factor, 8)
        assert torch.equal(same.round_matrix(x)[0], codes)
    free = TrellisGrid(grid.scale, grid.zero, grid.width, {}, 0 * grid.row_curvature, 8)
    assert torch.isfinite(free.round_matrix(x)[1]).all()


def test_rows_that_cost_nothing_steer_the_path_for_those_that_do() -> None:
    """With every second row free, its bits serve the others: less error there than with all rows alike."""
    one = torch.ones(400, dtype=torch.float64)
    costly = torch.arange(400) % 2 == 0
    x = 2 * normal(400, 4, seed=5) + 3.5
    error = {}
    for name, gain in (("alike", one), ("unequal", costly.double() + 1e-6)):
        values = TrellisGrid(one, 0 * one, torch.full((400,), 3), {}, gain, 16).round_matrix(x)[1]
        error[name] = float((values - x)[costly].square().sum())
    assert error["unequal"] < 0.7 * error["alike"]


def test_feedback_meets_a_trellis_like_any_grid() -> None:
    """By columns, what each met less what it became, squared and times its gain, is the whole error."""
    generator = torch.Generator().manual_seed(6)
    weight, moment = normal(30, 40, seed=6), moment_of(40, 90, generator)
    grid = trellis_grid((WIDTHS * 4)[:30], 16, seed=3)
    factor = feedback_factor(moment, 0.0)
    codes, values, met = feedback_round(weight, factor, grid)
    for c in range(40):
        code, value = grid.round(met[:, c], c)
        assert torch.equal(code.to(torch.uint8), codes[:, c]) and torch.equal(value, values[:, c])
    by_column = ((met - values).square() * factor.column_curvature).sum(1)
    delta = (values - weight).numpy()
    np.testing.assert_allclose(by_column, [d @ moment.numpy() @ d for d in delta], rtol=1e-8)


# -------------------------------------------------------------------------------------------------- normal distortions


def test_uniform_levels_are_half_steps_around_the_codes() -> None:
    for width in range(2, 9):
        levels = uniform_levels(width)
        assert levels.tolist() == half_steps(width)
        assert float(levels.mean()) == (2**width - 1) / 2


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("designed", [True, False])
def test_more_states_and_more_bits_distort_less(width: int, designed: bool) -> None:
    by_states = [normal_trellis(width, states, designed)[1] for states in STATES]
    # each doubling gains 1 to 2 percent; all use the same draws
    assert all(more < 0.999 * fewer for fewer, more in itertools.pairwise(by_states))
    # rate-distortion bound; best scalar levels of the same kind
    assert 2.0 ** (-2 * width) < by_states[-1]
    assert by_states[0] < normal_distortion("lloyd" if designed else "uniform", width)
    assert normal_trellis(width + 1, 4, designed)[1] < by_states[-1] / 2.5


@pytest.mark.parametrize("width", range(2, 9))
def test_designed_levels_beat_half_steps_and_both_beat_scalar_ones(width: int) -> None:
    (levels, designed), (steps, plain) = (normal_trellis(width, 64, kind) for kind in (True, False))
    assert 2.0 ** (-2 * width) < designed < plain
    assert designed < 0.72 * normal_distortion("lloyd", width)
    assert plain < 0.82 * normal_distortion("uniform", width)
    for found in (levels, steps):
        assert found.shape == (2 ** (width + 1),) and bool((found.diff() >= 0).all())
        torch.testing.assert_close(found, -found.flip(0))
    torch.testing.assert_close(steps.diff(), steps.diff()[:1].expand(len(steps) - 1))
    # what is written down is what is found
    assert trellis_distortion(width, 64, True) == pytest.approx(designed, rel=1e-5)
    assert trellis_distortion(width, 64, False) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("width", "states", "low", "high"), [(3, 64, 0.0222, 0.0228), (2, 64, 0.0808, 0.0828), (4, 64, 0.00622, 0.00640)]
)
def test_known_distortions(width: int, states: int, low: float, high: float) -> None:
    """Levels designed on some draws distort others as much: they did not learn the draws."""
    levels, designed = normal_trellis(width, states, True)
    assert low < designed < high
    x = normal(4096, 8, seed=10)
    one = torch.ones(len(x), dtype=torch.float64)
    grid = TrellisGrid(one, 0 * one, torch.full((len(x),), width), {width: levels}, one, states)
    fresh = (grid.round_matrix(x)[1] - x).square().mean() / x.square().mean()
    assert low < float(fresh) < high


def test_no_step_of_half_steps_distorts_much_less() -> None:
    x = normal(4096, 8, seed=11)
    one = torch.ones(len(x), dtype=torch.float64)
    levels = normal_trellis(3, 64, False)[0]

    def distortion(factor: float) -> float:
        grid = TrellisGrid(one, 0 * one, torch.full((len(x),), 3), {3: factor * levels}, one, 64)
        return float((grid.round_matrix(x)[1] - x).square().mean())

    assert distortion(1.0) < 1.02 * min(distortion(factor) for factor in np.geomspace(0.7, 1.4, 15))
