"""Bitshift codes: decoding against strings of digits, the search against enumeration, distortion of normal weights."""

from itertools import product

import numpy as np
import pytest
import torch
from naive_quant import naive_dequantize
from quant_strategies import identical, tensor_of
from torch import Tensor

from bayesq.codebook import normal_distortion
from bayesq.quant.bitshift import BitshiftGrid, best_ring, bitshift_distortion
from bayesq.quant.codes import Bitshift, Congruential
from bayesq.quant.codes.bitshift import MULTIPLIERS, normal_levels
from bayesq.quant.feedback import feedback_factor, feedback_round
from bayesq.quant.packing import pack_model, unpack, unpack_model

# Expected squared errors for a standard normal source with 2**16 states, as published.
PUBLISHED = {2: 0.0683, 3: 0.0176, 4: 0.0047}


def test_levels_are_the_normal_quantiles_in_another_order() -> None:
    levels = normal_levels(4096)
    quantiles = torch.special.ndtri((torch.arange(4096).double() + 0.5) / 4096).half().float()
    assert torch.equal(levels.sort().values, quantiles)
    assert torch.equal(levels, levels.half().float())
    # states that share all bits but the newest or the oldest have unrelated levels
    for other in (torch.arange(4096) ^ 1, torch.arange(4096) ^ 2048):
        assert abs(float((levels * levels[other]).mean())) < 0.05


@pytest.mark.parametrize("states", MULTIPLIERS)
@pytest.mark.parametrize("width", range(2, 9))
def test_congruential_levels_spread_paths_that_part_or_meet(states: int, width: int) -> None:
    """Normal quantiles; of the 2**width states after, or before, one state, each has a level of its own order."""
    levels = Congruential(states).levels(width)
    quantiles = torch.special.ndtri((torch.arange(states).double() + 0.5) / states)
    middle, unit = 2.0 ** (width - 1), 2.0 ** (width - 3)
    torch.testing.assert_close(levels.sort().values.double(), middle + quantiles * unit, rtol=0, atol=2e-3 * unit)
    rank = torch.special.ndtr((levels.double() - middle) / unit) * states
    if states >> width > 1:
        for step in (1, states >> width):  # the newest bits differ, or the oldest
            together = rank.reshape(-1, 1 << width) if step == 1 else rank.reshape(1 << width, step).T
            gaps = together.sort(dim=1).values.diff(dim=1)
            assert float(gaps.min()) > (states >> width) / 4


@pytest.mark.parametrize("widths", [[3] * 7, [2, 8, 3, 2, 5, 4]])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("code", [Bitshift(512), Congruential(256), Congruential(4096)])
def test_packed_codes_are_decoded_digit_by_digit(widths: list[int], groups: int, code: Bitshift) -> None:
    tensor = tensor_of(groups * len(widths), 5, groups * widths, code=code)
    tensor = type(tensor)(**{**vars(tensor), "groups": groups})
    expected = torch.from_numpy(naive_dequantize(tensor)).float()
    torch.testing.assert_close(tensor.dequantize(), expected)
    read = unpack_model(*pack_model({"layer": tensor}))["layer"]
    assert identical(read, tensor)


def test_bad_headers_are_refused() -> None:
    buffers, _ = pack_model({"layer": tensor_of(4, 3, [4] * 4, code=Bitshift(256))})
    facts = {"shape": [4, 3], "groups": 1, "group_size": None, "mixed": False, "code": "bitshift", "states": 256}
    own = {key.removeprefix("layer/"): value for key, value in buffers.items()}
    assert unpack(own, facts, {}).code.states == 256
    for states in (100, 2**17, -1, None, "256", True):
        with pytest.raises(ValueError, match=r"^states: needs one of 256, 512"):
            unpack(own, facts | {"states": states}, {})


def every_value(code: Bitshift, widths: list[int]) -> Tensor:
    """Levels [n, N] of all N rings."""
    every = torch.tensor(list(product(*(range(2**w) for w in widths))), dtype=torch.uint8).T.contiguous()
    width = torch.tensor(widths, dtype=torch.uint8)
    table = torch.cat([part.levels for part in code.parts(width)])
    return table[code.positions(every, width, 1)].double()


@pytest.mark.parametrize("code", [Bitshift(256), Congruential(256)])
@pytest.mark.parametrize("widths", [[2] * 6, [3, 2, 4, 3]])
def test_the_search_finds_the_best_of_all_rings(code: Bitshift, widths: list[int]) -> None:
    """In short columns, with rows of unequal scale, zero and cost; without feedback, with costs entry by entry."""
    generator = torch.Generator().manual_seed(len(widths))
    n = len(widths)
    scale, curvature = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    width = torch.tensor(widths, dtype=torch.uint8)
    zero = torch.tensor([code.middle(w) for w in widths], dtype=torch.float64) + 0.1
    values = scale[:, None] * (every_value(code, widths) - zero[:, None])
    x = values.std() * torch.randn(n, 12, generator=generator, dtype=torch.float64)
    grid = BitshiftGrid(scale, zero, width, code, curvature)
    costs = curvature[:, None] * (0.1 + torch.rand(n, 12, generator=generator, dtype=torch.float64))
    codes, found = grid.round_matrix(x, costs)
    decoded = torch.cat([part.levels for part in code.parts(width)])[code.positions(codes.contiguous(), width, 1)]
    torch.testing.assert_close(scale[:, None] * (decoded - zero[:, None]), found)
    for c in range(12):
        least = (costs[:, c, None] * (x[:, c, None] - values).square()).sum(0).min()
        assert float((costs[:, c] * (x[:, c] - found[:, c]).square()).sum()) == pytest.approx(float(least), rel=1e-5)
        _, value = grid.round(x[:, c], c)
        least = (curvature[:, None] * (x[:, c, None] - values).square()).sum(0).min()
        assert float((curvature * (x[:, c] - value).square()).sum()) == pytest.approx(float(least), rel=1e-5)


@pytest.mark.parametrize(("code", "rows"), [(Bitshift(1024), 16), (Congruential(1024), 32), (Congruential(256), 64)])
def test_the_states_at_the_seam_are_guessed_well(code: Bitshift, rows: int) -> None:
    """The ring is nearly as good as the best one over all states at the seam."""
    x = torch.randn(8, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = np.zeros((9, code.states), np.float32)
    levels[3] = code.levels(3)
    ones, widths, middle = np.ones(rows, np.float32), np.full(rows, 3), code.middle(3)
    grid = BitshiftGrid(torch.ones(rows), torch.full((rows,), middle), torch.full((rows,), 3), code)
    source, state = np.empty((rows, code.states >> 2), np.uint8), np.empty(rows, np.int64)
    least = total = 0.0
    for column in x:
        errors = []
        for first in range(code.states >> 3):
            units = (column + middle).float().numpy()
            best_ring(units, ones, widths, levels, first, source, state)
            errors.append(float(np.square(levels[3, state] - units).sum()))
        least, total = least + min(errors), total + float((grid.round(column, 0)[1] - column).square().sum())
    assert 0.9999 * least <= total < 1.03 * least


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_long_column_has_the_path_of_a_float64_search(bits: int) -> None:
    """For given bits at the seam, against the Viterbi algorithm as it is written down, state by state."""
    code, rows, first = Congruential(256), 300, 5 % (256 >> bits)
    levels = np.zeros((9, 256), np.float32)
    levels[bits] = code.levels(bits)
    units = (
        code.middle(bits) + 2.0 ** (bits - 3) * torch.randn(rows, generator=torch.Generator().manual_seed(bits))
    ).numpy()
    weight = np.random.default_rng(bits).uniform(0.5, 2, rows).astype(np.float32)
    state, source = np.empty(rows, np.int64), np.empty((rows, 64), np.uint8)
    found = best_ring(units, weight, np.full(rows, bits), levels, first, source, state)
    before = np.arange(256) & ((256 >> bits) - 1)  # the bits of a state that the next row keeps
    cost = np.where(np.arange(256) >> bits == first, 0.0, np.inf)
    for r in range(rows):
        if r > 0:
            ways = np.array([cost[before == kept].min() for kept in range(256 >> bits)])
            cost = ways[np.arange(256) >> bits]
        cost = cost + weight[r] * (levels[bits].astype(float) - units[r]) ** 2
    assert float(found) == pytest.approx(float(cost[before == first].min()), rel=1e-5)
    assert np.array_equal(state[1:] >> bits, before[state[:-1]]) and before[state[-1]] == first == state[0] >> bits


def test_columns_are_rounded_one_by_one_with_feedback() -> None:
    """The compiled block is the same as one search per column, with the errors fed to later columns."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    x = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    factor = feedback_factor(x.T @ x, 0.01, act_order=False)
    grid = BitshiftGrid(torch.full((12,), 1.1), torch.zeros(12), torch.full((12,), 3), Bitshift(256))
    codes, _, targets = feedback_round(weight, factor, grid)
    moved = weight.clone()
    for j in range(40):
        code, value = grid.round(moved[:, j], j)
        torch.testing.assert_close(moved[:, j], targets[:, j])
        assert torch.equal(code, codes[:, j])
        moved[:, j + 1 :] += (weight[:, j] - value)[:, None] * factor.upper[j, j + 1 :]
    with pytest.raises(ValueError, match="fewer bits than a state"):
        BitshiftGrid(torch.ones(3), torch.zeros(3), torch.full((3,), 2), Bitshift(256))


@pytest.mark.parametrize("width", [2, 3, 4])
def test_distortion_of_normal_weights_nears_the_published_one(width: int) -> None:
    few, more = (bitshift_distortion(width, Bitshift(states), 256, 1.1) for states in (256, 4096))
    assert PUBLISHED[width] < more < few
    assert more < 1.25 * PUBLISHED[width]


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 3, 4])
def test_distortion_with_as_many_states_as_published(width: int) -> None:
    assert bitshift_distortion(width, Bitshift(2**16), 256, 1.1) == pytest.approx(PUBLISHED[width], rel=0.05)


# Squared errors over the rate-distortion bound 2**(-2 width) that the levels were chosen for, in long columns.
KNOWN = {(256, 2): 1.21, (256, 3): 1.25, (256, 4): 1.36, (1024, 2): 1.155, (1024, 3): 1.18, (1024, 4): 1.22}


@pytest.mark.parametrize(("states", "width"), KNOWN)
def test_congruential_levels_are_near_the_rate_distortion_bound(states: int, width: int) -> None:
    """Below those of hashed levels with four times as many states; `pytest -s -k rate_distortion` prints them."""
    scale = (1.04 + 0.04 * width) * 2.0 ** (3 - width)
    found = bitshift_distortion(width, Congruential(states), 256, scale) * 4.0**width
    hashed = bitshift_distortion(width, Bitshift(4 * states), 256, 1.1) * 4.0**width
    scalar = normal_distortion("lloyd", width) * 4.0**width
    print(f"{width} bits, {states} states: {found:.3f} times the bound; hashed levels, {4 * states} states: ", end="")
    print(f"{hashed:.3f} times; scalar Lloyd-Max levels: {scalar:.2f} times")
    assert found == pytest.approx(KNOWN[states, width], rel=0.05)
    assert found < hashed < scalar


def test_rows_that_cost_nothing_steer_the_path_for_those_that_do() -> None:
    """With every second row free, its bits serve the others: less error there than with all rows alike."""
    one, costly = torch.ones(400, dtype=torch.float64), torch.arange(400) % 2 == 0
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    width, code = torch.full((400,), 3), Congruential(256)
    grid = BitshiftGrid(1.16 * one, 4 * one, width, code)
    error = {}
    for name, cost in (("alike", one), ("unequal", costly.double() + 1e-6)):
        values = grid.round_matrix(x, cost[:, None].expand_as(x))[1]
        error[name] = float((values - x)[costly].square().sum())
    assert error["unequal"] < 0.7 * error["alike"]
    for factor in (1e-200, 2.0**90, 1e200):  # only ratios count
        again = BitshiftGrid(1.16 * one, 4 * one, width, code, factor * one)
        assert torch.equal(again.round(x[:, 0], 0)[0], grid.round(x[:, 0], 0)[0])
    free = BitshiftGrid(1.16 * one, 4 * one, width, code, 0 * one)
    assert torch.isfinite(free.round(x[:, 0], 0)[1]).all()


@pytest.mark.parametrize("code", [Bitshift(256), Congruential(1024)])
@pytest.mark.parametrize("entry", [1e300, -1e30, float("inf"), float("nan")])
def test_entries_beyond_all_bounds_leave_a_path(code: Bitshift, entry: float) -> None:
    """One of them gets an outermost level and the others what they would have without it; NaN gets any level."""
    width, zero = torch.full((24,), 3), torch.full((24,), code.middle(3), dtype=torch.float64)
    x = code.unit(3) ** -1 * torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = BitshiftGrid(torch.ones(24, dtype=torch.float64), zero, width, code, torch.ones(24))
    plain = (grid.round(x, 0)[1] - x).square().sum()
    x[5] = entry
    codes, values = grid.round(x, 0)
    assert bool((codes < 8).all())
    table = torch.cat([part.levels for part in code.parts(width)])
    decoded = table[code.positions(codes[:, None], width, 1)][:, 0].double() - zero
    torch.testing.assert_close(values, decoded)
    if entry == entry:
        assert abs(values[5]) > 2.5 / code.unit(3) and values[5] * entry > 0
        rest = torch.arange(24) != 5
        assert (values - x)[rest].square().sum() < 4 * plain


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 3, 4])
def test_no_other_multiplier_has_much_less_error(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All odd numbers below 128 (n and 256 - n give mirrored levels), on 2,048 normal weights."""
    scale, errors = (1.04 + 0.04 * width) * 2.0 ** (3 - width), []
    kept = bitshift_distortion(width, Congruential(256), 256, scale)
    for multiplier in range(1, 128, 2):
        levels = torch.special.ndtri(((multiplier * torch.arange(256)) % 256 + 0.5).double() / 256).float()
        other = 2.0 ** (width - 1) + 2.0 ** (width - 3) * levels
        monkeypatch.setattr(Congruential, "levels", lambda self, w, other=other: other)
        errors.append(bitshift_distortion.__wrapped__(width, Congruential(256), 256, scale))
    assert kept < 1.03 * min(errors) and kept < 0.95 * sorted(errors)[len(errors) // 2]
