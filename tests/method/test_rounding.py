"""Rounding: GPTQ as a special case, nearest by brute force, refits by least squares, predicted and achieved risk."""

import itertools

import numpy as np
import pytest
import torch
from naive_quant import naive_levels, ring_states
from torch import Tensor

from baselines.gptq import GPTQ
from bayesq.codebook import level_unit, normal_distortion, normal_levels
from bayesq.contract import LayerProblem, stack_groups
from bayesq.posterior import DiagonalPosterior, Kfac, KroneckerPosterior
from bayesq.quant.codes import Congruential
from bayesq.quant.feedback import feedback_factor
from bayesq.quant.grids import CLIP_RULES, FP16_TINY, minmax_grid, mse_grid, stored_scale, zero_code, zero_value
from bayesq.rounding import SPREADS, Rounded, first_rows, predicted_risk, refit_rows, round_layer, rounding_curvature

DAMPING = 0.01


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_moment(columns: int, groups: int, seed: int, shared: float = 0.7) -> Tensor:
    """Second moment of inputs with a common part and columns of different energy."""
    x = normal(groups, columns, 3 * columns, seed=seed).double() + shared * normal(
        groups, 1, 3 * columns, seed=seed + 1
    )
    x = x * (0.3 + normal(groups, columns, 1, seed=seed + 2).abs())
    return x @ x.transpose(1, 2) / x.shape[2]


# ---------------------------------------------------------------------------------------------------------- feedback


@pytest.mark.parametrize("clip", CLIP_RULES)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 9, 150), (3, 4, 18), (1, 1, 1)])
def test_with_input_moment_and_identity_it_is_gptq(clip, width, groups, rows, columns):
    weight = normal(groups, rows, columns, seed=0)
    statistics = {
        "input_moment": inputs_moment(columns, groups, seed=1).float(),
        "gradient_moment": torch.eye(rows).expand(groups, -1, -1),
    }
    layer = LayerProblem("layer", "Conv2d", weight, statistics.__getitem__)
    posterior = Kfac(0.0, 1000, None, shrinkage=0.5).fit(layer)
    widths = torch.full((groups * rows,), width, dtype=torch.uint8)
    scale, zero = CLIP_RULES[clip](stack_groups(weight).double(), widths)
    rounded = round_layer(weight, posterior.whitening(True, DAMPING), scale, zero, widths, {})

    gptq = GPTQ(clip, act_order=True, damping=DAMPING, group_size=None)
    for g in range(groups):  # group by group there, all at once here
        moment, own = statistics["input_moment"][g : g + 1], slice(g * rows, (g + 1) * rows)
        factor = feedback_factor(moment[0], DAMPING)
        codes, gptq_scale, gptq_zero, values = gptq.round_layer(weight[g : g + 1], moment, [factor], widths[own])
        assert torch.equal(rounded.codes[own], codes)
        assert torch.equal(rounded.scale[own], gptq_scale[:, 0]) and torch.equal(rounded.zero[own], gptq_zero[:, 0])
        torch.testing.assert_close(rounded.values[own], values)


def test_feedback_lowers_the_risk_it_is_meant_to_lower():
    weight = normal(1, 8, 64, seed=5)
    posterior = KroneckerPosterior(inputs_moment(64, 1, seed=6), torch.eye(8).double()[None], 1000, 1.0, 1.0)
    widths = torch.full((8,), 3, dtype=torch.uint8)
    grid = mse_grid(weight[0].double(), widths)
    risk = {}
    for feedback in (True, False):
        rounded = round_layer(weight, posterior.whitening(feedback, DAMPING), *grid, widths, {})
        risk[feedback] = float(posterior.risk(rounded.values[None] - weight.double()).sum())
    assert risk[True] < 0.8 * risk[False]


# ----------------------------------------------------------------------------------------------------------- nearest


def table(width: int, books: dict[int, Tensor]) -> list[float]:
    return books[width].tolist() if width in books else list(range(2**width))


def test_nearest_takes_the_nearest_of_all_storable_values():
    weight = normal(2, 4, 11, seed=7)
    widths = torch.tensor([2, 3, 4, 5, 2, 3, 8, 2], dtype=torch.uint8)
    books = {w: normal_levels("lloyd", w) + (2**w - 1) / 2 for w in (2, 3)}
    scale = 0.3 + normal(8, seed=8).double().abs()
    zero = 2.0 ** widths.double() * (0.3 + 0.4 * torch.rand(8, generator=torch.Generator().manual_seed(9)))
    posterior = DiagonalPosterior(torch.rand(2, 4, 11).double(), 100, 1.0, 1.0)
    rounded = round_layer(weight, posterior.whitening(True, DAMPING), scale, zero, widths, books)
    # what is rounded to is what can be stored
    assert torch.equal(rounded.scale, stored_scale(scale)) and not torch.equal(rounded.scale, scale)
    assert torch.equal(rounded.zero, zero_value(zero_code(zero, widths), widths, torch.float64))
    assert torch.equal(rounded.target, stack_groups(weight).double())
    for row, entries in enumerate(stack_groups(weight).tolist()):
        values = [
            float(rounded.scale[row]) * (level - float(rounded.zero[row])) for level in table(int(widths[row]), books)
        ]
        for column, entry in enumerate(entries):
            code = int(rounded.codes[row, column])
            assert float(rounded.values[row, column]) == pytest.approx(values[code], rel=1e-12)
            assert abs(values[code] - entry) <= min(abs(value - entry) for value in values) + 1e-12


def test_nearest_is_optimal_for_a_diagonal_posterior():
    weight = normal(1, 2, 4, seed=10)
    posterior = DiagonalPosterior(torch.tensor([[[1.0, 0.1, 5.0, 2.0], [0.2, 3.0, 1.0, 0.5]]]).double(), 100, 1.0, 1.0)
    widths = torch.tensor([2, 2], dtype=torch.uint8)
    scale, zero = minmax_grid(weight[0].double(), widths)
    rounded = round_layer(weight, posterior.whitening(True, DAMPING), scale, zero, widths, {})
    achieved = posterior.risk(rounded.values[None] - weight.double())[0]
    for row in range(2):
        values = [float(scale[row]) * (code - float(zero[row])) for code in range(4)]
        risks = [
            sum(
                0.5 * p * (v - w) ** 2
                for p, v, w in zip(posterior.precision[0, row].tolist(), choice, weight[0, row].tolist(), strict=True)
            )
            for choice in itertools.product(values, repeat=4)
        ]
        assert float(achieved[row]) == pytest.approx(min(risks), rel=1e-6)


# ------------------------------------------------------------------------------------------------- -------- trellis


def trellis_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight of three groups, and storable grids of several widths."""
    weight = normal(3, 4, 15, seed=20)
    widths = torch.tensor([3, 2, 4, 3] * 3, dtype=torch.uint8)
    scale = stack_groups(weight).double().std(1) * 2.0 ** (3 - widths.double())
    return weight, scale, 2.0 ** (widths.double() - 1) + 0.25, widths


def factors(groups: int = 3, rows: int = 4, columns: int = 15) -> KroneckerPosterior:
    a, g = inputs_moment(columns, groups, seed=22), inputs_moment(rows, groups, seed=25)
    return KroneckerPosterior(a, g, 100, 1.0, 1.0)


@pytest.mark.parametrize("feedback", [True, False])
def test_trellis_codes_stand_for_the_values(feedback):
    weight, scale, zero, widths = trellis_problem()
    whitening = factors().whitening(feedback, DAMPING)
    rounded = round_layer(weight, whitening, scale, zero, widths, {}, Congruential(256))
    index = ring_states(rounded.codes.numpy(), widths.tolist(), 256, 3)
    assert torch.equal(rounded.width, widths) and rounded.codes.dtype == torch.uint8
    assert torch.equal(rounded.zero, zero_value(zero_code(zero, widths), widths, torch.float64))
    for row, width in enumerate(widths.tolist()):
        levels = naive_levels(Congruential(256), width, row, widths.tolist())
        expected = [float(rounded.scale[row]) * (levels[i] - float(rounded.zero[row])) for i in index[row].tolist()]
        assert rounded.values[row].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("posterior", ["kfac", "diag"])
def test_without_feedback_the_trellis_weighs_every_error_by_its_risk(posterior):
    """The rows of a column compete, so what an error costs in each of them decides: all rings of 4 rows, one by one."""
    weight, scale, zero, widths = trellis_problem()
    # rows whose errors cost very different amounts
    own = 10 ** (2 * torch.rand(3, 4, generator=torch.Generator().manual_seed(28)).double() - 1)
    if posterior == "kfac":
        q = KroneckerPosterior(inputs_moment(15, 3, seed=22), torch.diag_embed(own), 100, 1.0, 1.0)
    else:
        q = DiagonalPosterior(own[:, :, None] * (0.1 + normal(3, 4, 15, seed=29).double().abs()), 100, 1.0, 1.0)
    rounded = round_layer(weight, q.whitening(False, DAMPING), scale, zero, widths, {}, Congruential(256))
    every = np.array(list(itertools.product(*(range(2**w) for w in widths[:4].tolist()))), np.uint8).T
    states = ring_states(every, widths[:4].tolist(), 256, 1)
    levels = [np.array(naive_levels(Congruential(256), w, 0, [w])) for w in widths[:4].tolist()]
    cost = q.diagonal()
    for g, c in itertools.product(range(3), range(15)):
        total, achieved = 0.0, 0.0
        for r in range(4):
            row = 4 * g + r
            values = float(rounded.scale[row]) * (levels[r][states[r]] - float(rounded.zero[row]))
            total = total + float(cost[g, r, c]) * (values - float(weight[g, r, c])) ** 2
            achieved += float(cost[g, r, c]) * (float(rounded.values[row, c]) - float(weight[g, r, c])) ** 2
        assert achieved == pytest.approx(total.min(), rel=1e-5)


def test_a_trellis_lowers_the_risk():
    weight = normal(1, 40, 60, seed=30)
    posterior = factors(1, 40, 60)
    widths = torch.full((40,), 3, dtype=torch.uint8)
    whitening = posterior.whitening(True, DAMPING)
    unit, middle = torch.full((40,), 1.16, dtype=torch.float64), torch.full((40,), 4.0, dtype=torch.float64)
    grids = [
        mse_grid(weight[0].double(), widths),
        *2 * [first_rows(weight[0], rounding_curvature(whitening, 40), widths, unit, middle)],
    ]
    risk = [
        float(posterior.row_risk(round_layer(weight, whitening, *grid, widths, {}, code).values - weight[0]).sum())
        for grid, code in zip(grids, (None, Congruential(256), Congruential(1024)), strict=True)
    ]
    assert risk[1] < 0.75 * risk[0] and risk[2] < risk[1]


# -------------------------------------------------------------------------------------------------------- first grids


def lloyd_error(row: np.ndarray, gain: np.ndarray, mean: float, spread: float, bits: int) -> float:
    """What scalar Lloyd-Max levels of this spread about the mean cost, each weight with its nearest level."""
    levels = mean + spread * normal_levels("lloyd", bits).numpy()
    return sum(g * min((w - level) ** 2 for level in levels) for w, g in zip(row, gain, strict=True))


def first_scalar_rows(weight: Tensor, gain: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """For tables of scalar levels."""
    unit = torch.tensor([level_unit(w) for w in width.tolist()], dtype=torch.float64)
    return first_rows(weight, gain, width, unit, (2 ** width.double() - 1) / 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_first_grids_have_the_spread_that_costs_least(bits):
    weight = normal(6, 40, seed=bits).double() * torch.tensor([1e-6, 0.1, 1.0, 1.0, 30.0, 1.0])[:, None]
    weight[3] += 1.2  # a mean far from zero
    weight[5, :2] = torch.tensor([9.0, -14.0])  # outliers
    gain = normal(6, 40, seed=9).double().square()
    scale, zero = first_scalar_rows(weight, gain, torch.full((6,), bits, dtype=torch.uint8))
    centre = (2**bits - 1) / 2
    spread, mean = scale / level_unit(bits), scale * (centre - zero)
    assert mean.tolist() == pytest.approx(np.average(weight, axis=1, weights=gain).tolist(), rel=1e-9)
    for row, g, m, s in zip(weight.numpy(), gain.numpy(), mean.tolist(), spread.tolist(), strict=True):
        deviation = np.sqrt(np.average((row - m) ** 2, weights=g))
        reach = abs(m) / (centre * level_unit(bits))  # zero points end where codes do
        low = max(deviation / 2, reach)
        high = max(np.abs(row - m).max() / normal_levels("lloyd", bits).numpy()[-1], low)
        tried = np.geomspace(low, high, SPREADS)
        errors = [lloyd_error(row, g, m, t, bits) for t in tried]
        assert s == pytest.approx(tried[int(np.argmin(errors))], rel=1e-9)


def test_first_grids_of_odd_rows():
    """Zeros, a constant, one weight, gains that are all zero or that leave one column: finite and storable."""
    weight = torch.zeros(5, 8, dtype=torch.float64)
    weight[1:4] = torch.tensor([2.5, -1e30, 1e-30], dtype=torch.float64)[:, None]
    weight[4] = torch.arange(8)
    gain = torch.ones_like(weight)
    gain[4] = 0
    widths = torch.tensor([2, 3, 4, 5, 3], dtype=torch.uint8)
    scale, zero = first_scalar_rows(weight, gain, widths)
    assert bool((torch.isfinite(scale) & torch.isfinite(zero) & (scale >= FP16_TINY)).all())
    assert scale[0] == FP16_TINY
    middle = scale * ((2 ** widths.double() - 1) / 2 - zero)
    assert middle[:3].tolist() == pytest.approx([0.0, 2.5, -1e30], rel=1e-9)
    assert bool(((zero >= -1e-9) & (zero <= 2 ** widths.double() - 1 + 1e-9))[[0, 1, 2, 4]].all())
    # no gain anywhere counts like the same gain everywhere
    even = first_scalar_rows(weight[4:], torch.ones(1, 8), widths[4:])
    assert scale[4] == even[0] and zero[4] == even[1]
    one_scale, one_zero = first_scalar_rows(torch.tensor([[3.0], [-0.5]]), torch.ones(2, 1), torch.tensor([3, 3]))
    assert (one_scale * (3.5 - one_zero)).tolist() == pytest.approx([3.0, -0.5], rel=1e-9)


# ------------------------------------------------------------------------------------------------------------- refits


@pytest.fixture
def rounded_and_gain() -> tuple[Rounded, Tensor]:
    weight = normal(2, 5, 30, seed=11)
    posterior = KroneckerPosterior(
        inputs_moment(30, 2, seed=12), torch.eye(5).double().expand(2, -1, -1), 100, 1.0, 1.0
    )
    whitening = posterior.whitening(True, DAMPING)
    widths = torch.tensor([2, 3, 4, 2, 3] * 2, dtype=torch.uint8)
    books = {2: normal_levels("lloyd", 2) + 1.5}
    rounded = round_layer(weight, whitening, *minmax_grid(stack_groups(weight).double(), widths), widths, books)
    return rounded, rounding_curvature(whitening, 5)


def weighted_error(rounded: Rounded, gain: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    levels = rounded.values / rounded.scale[:, None] + rounded.zero[:, None]
    return (gain * (rounded.target - scale[:, None] * (levels - zero[:, None])).square()).sum(1)


def test_refit_solves_the_weighted_least_squares(rounded_and_gain):
    rounded, gain = rounded_and_gain
    scale, zero = refit_rows(rounded, gain)
    for row in range(10):
        level = (rounded.values[row] / rounded.scale[row] + rounded.zero[row]).numpy()
        root = gain[row].sqrt().numpy()
        design = np.stack([level, np.ones(30)], 1) * root[:, None]
        slope, offset = np.linalg.lstsq(design, rounded.target[row].numpy() * root, rcond=None)[0]
        assert float(scale[row]) == pytest.approx(slope, rel=1e-8)
        assert float(-scale[row] * zero[row]) == pytest.approx(offset, rel=1e-6, abs=1e-9)
    before = weighted_error(rounded, gain, rounded.scale, rounded.zero)
    after = weighted_error(rounded, gain, scale, zero)
    assert bool((after <= before * (1 + 1e-12)).all()) and float(after.sum()) < 0.9 * float(before.sum())


def test_rows_without_a_usable_fit_keep_their_grid():
    level = torch.tensor([[2.0, 2.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]).double()
    scale, zero = torch.full((3,), 0.5).double(), torch.ones(3).double()
    met = torch.tensor([[0.1, 0.9, 0.3], [1.0, 0.0, -1.0], [-0.6, 0.1, 0.5]]).double()
    widths = torch.full((3,), 2, dtype=torch.uint8)
    rounded = Rounded(level.to(torch.uint8), scale, zero, widths, 0.5 * (level - 1), met)
    new_scale, new_zero = refit_rows(rounded, torch.ones(3, 3).double())
    # one code everywhere; a slope below zero; a proper fit
    assert new_scale.tolist()[:2] == [0.5, 0.5] and new_zero.tolist()[:2] == [1.0, 1.0]
    assert new_scale[2] == pytest.approx(0.55) and bool((new_scale > 0).all())


# --------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("kind", ["lloyd", "uniform"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_predicted_risk_is_achieved_on_gaussian_weights(kind, feedback, width):
    groups, rows, columns = 2, 100, 96
    spread = 0.5 + torch.rand(groups, rows, 1, generator=torch.Generator().manual_seed(13))
    weight = spread * normal(groups, rows, columns, seed=14) + 0.2
    g = torch.diag_embed(0.1 + normal(groups, rows, seed=15).double().abs())
    posterior = KroneckerPosterior(inputs_moment(columns, groups, seed=16, shared=0.4), g, 100, 1.0, 1.0)
    whitening = posterior.whitening(feedback, 0.0)
    predicted = predicted_risk(weight, whitening, [1e-5, normal_distortion(kind, width)])[:, 1]

    stacked = stack_groups(weight).double()
    mean, std = stacked.mean(1), stacked.std(1, unbiased=False)
    centre = (2**width - 1) / 2
    levels = normal_levels(kind, width)
    # levels fill the codes' range; the zero point moves the row's mean to their middle
    step = float(levels[-1] - levels[0]) / (2 * centre)
    widths = torch.full((groups * rows,), width, dtype=torch.uint8)
    rounded = round_layer(
        weight, whitening, std * step, centre - mean / (std * step), widths, {width: levels / step + centre}
    )
    delta = (rounded.values - stacked).reshape(weight.shape)
    achieved = stack_groups(posterior.row_risk(delta))
    assert float(achieved.sum()) == pytest.approx(float(predicted.sum()), rel=0.15)
    assert float(torch.corrcoef(torch.stack([achieved.log(), predicted.log()]))[0, 1]) > 0.9


def test_predicted_risk_is_the_closed_form():
    weight = normal(2, 3, 7, seed=17)
    precision = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(18)).double()
    whitening = DiagonalPosterior(precision, 100, 1.0, 1.0).whitening(True, DAMPING)
    found = predicted_risk(weight, whitening, [0.11748, 0.011543])
    for row in range(6):
        w, p = stack_groups(weight)[row].double().numpy(), stack_groups(precision)[row].numpy()
        for k, distortion in enumerate([0.11748, 0.011543]):
            assert float(found[row, k]) == pytest.approx(0.5 * w.var() * distortion * p.sum(), rel=1e-4)
