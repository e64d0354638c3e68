"""Feedback rounding against optimal brain quantization with an explicitly downdated inverse."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from naive_quant import RULES, affine_nearest, damped, moment_of, naive_gptq, row_errors, visiting_order
from torch import Tensor

from bayesq.quant.feedback import (
    feedback_factor,
    feedback_factors,
    feedback_round,
    feedback_round_groups,
    output_error,
)
from bayesq.quant.grids import AffineGrid, CodebookGrid

DAMPING = 0.01
SIZES = [1, 15, 16, 17, 127, 130, 300]  # around the inner block of 16 and the outer of 128


def random_problem(columns: int, rows: int = 5, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight[:, list(dead)] = 0
    return weight, moment_of(columns, 2 * columns + 3, generator, dead)


def affine(weight: Tensor, widths: list[int]) -> AffineGrid:
    pairs = [RULES["minmax"](row.numpy(), width) for row, width in zip(weight, widths, strict=True)]
    scale, zero = torch.tensor(pairs, dtype=torch.float64).T
    return AffineGrid(scale[:, None].contiguous(), zero[:, None].contiguous(), torch.tensor(widths, dtype=torch.uint8))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [1, 17, 130])
def test_the_factor_is_a_triangular_decomposition_of_the_damped_moment(columns: int, act_order: bool) -> None:
    _, moment = random_problem(columns)
    factor = feedback_factor(moment, DAMPING, act_order)
    order = visiting_order(moment.numpy(), act_order)
    assert factor.order.tolist() == order
    a = damped(moment.numpy(), DAMPING)[np.ix_(order, order)]
    upper, gain = factor.upper.numpy(), factor.column_curvature.numpy()[order]
    assert np.array_equal(upper, np.triu(upper)) and (np.diag(upper) == 1).all() and (gain > 0).all()
    assert np.abs(upper @ np.diag(gain) @ upper.T - a).max() < 1e-13 * np.abs(a).max()
    assert factor.retries == 0 and not factor.dead.any()


def test_act_order_visits_large_columns_first_and_ties_in_column_order() -> None:
    many = torch.ones(500).index_fill(0, torch.tensor([77, 400]), 2.0)
    rest = [j for j in range(500) if j not in (77, 400)]
    assert feedback_factor(torch.diag(many), DAMPING).order.tolist() == [77, 400, *rest]
    moment = torch.diag(torch.tensor([1.0, 5.0, 2.0, 5.0, 1.0]))
    assert feedback_factor(moment, DAMPING).order.tolist() == [1, 3, 2, 0, 4]
    assert feedback_factor(moment, DAMPING, act_order=False).order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", SIZES)
def test_rounding_equals_explicit_elimination(columns: int, act_order: bool) -> None:
    weight, moment = random_problem(columns)
    widths = [2, 3, 4, 5, 8]
    grid = affine(weight, widths)
    factor = feedback_factor(moment, DAMPING, act_order)
    codes, values, met = feedback_round(weight, factor, grid)

    def rounder(entry: float, r: int, j: int) -> tuple[int, float]:
        return affine_nearest(entry, float(grid.scale[r, 0]), float(grid.zero[r, 0]), widths[r])

    naive = naive_gptq(weight.numpy(), moment.numpy(), DAMPING, act_order, rounder)
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), naive.codes)
    np.testing.assert_allclose(values.numpy(), naive.values, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(met.numpy(), naive.target, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(factor.column_curvature.numpy(), naive.gain, rtol=1e-8)
    ours, theirs = (row_errors(v - weight.numpy(), moment.numpy()) for v in (values.numpy(), naive.values))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-15)

    # sum_j D_j e_j^2 with e_j the error made at column j is the whole damped error
    by_column = ((met - values).square() * factor.column_curvature).sum(1).numpy()
    whole = row_errors(values.numpy() - weight.numpy(), damped(moment.numpy(), DAMPING))
    np.testing.assert_allclose(by_column, whole, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("act_order", [False, True])
def test_rounding_on_codebooks_equals_explicit_elimination(act_order: bool) -> None:
    weight, moment = random_problem(40, rows=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    widths = [2, 3, 3, 5]
    books = {w: torch.sort(torch.randn(2**w, generator=generator)).values.half() for w in (2, 3)}
    scale = torch.tensor([1.0, 0.9, 1.1, 0.2], dtype=torch.float64)
    zero = torch.tensor([0.1, -0.0, 0.2, 15.5], dtype=torch.float64)
    grid = CodebookGrid(scale, zero, torch.tensor(widths, dtype=torch.uint8), books)

    def rounder(entry: float, r: int, j: int) -> tuple[int, float]:
        levels = books[widths[r]].tolist() if widths[r] in books else range(2 ** widths[r])
        reals = [float(scale[r]) * (level - float(zero[r])) for level in levels]
        code = min(range(len(reals)), key=lambda k: abs(reals[k] - entry))
        return code, reals[code]

    codes, values, _ = feedback_round(weight, feedback_factor(moment, DAMPING, act_order), grid)
    naive = naive_gptq(weight.numpy(), moment.numpy(), DAMPING, act_order, rounder)
    assert np.array_equal(codes.numpy(), naive.codes)
    np.testing.assert_allclose(values.numpy(), naive.values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [1, 9, 17])
def test_groups_at_once_are_rounded_like_groups_one_by_one(columns: int, act_order: bool) -> None:
    dead = [(), (0,), (columns - 1,), tuple(range(columns))]
    weight, moments = (
        torch.stack(parts)
        for parts in zip(*(random_problem(columns, 3, seed, dead[seed]) for seed in range(4)), strict=True)
    )
    widths = [2, 3, 5] * 4
    grid = affine(weight.flatten(0, 1), widths)
    factors = feedback_factors(moments, DAMPING, act_order)
    found = feedback_round_groups(weight, factors, grid)
    for g, factor in enumerate(factors):
        own = slice(3 * g, 3 * g + 3)
        alone = feedback_factor(moments[g], DAMPING, act_order)
        assert torch.equal(factor.order, alone.order) and torch.equal(factor.dead, alone.dead) and factor.retries == 0
        torch.testing.assert_close(factor.upper, alone.upper, rtol=1e-9, atol=1e-12)
        part = AffineGrid(grid.scale[own], grid.zero[own], grid.width[own])
        codes, values, met = feedback_round(weight[g], alone, part)
        assert torch.equal(found[0][own], codes)
        torch.testing.assert_close(found[1][own], values, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[2][own], met, rtol=1e-9, atol=1e-9)


MEMORY_PROGRAM = """
import sys, torch
from pathlib import Path
from bayesq.quant.feedback import feedback_factor

def peak():  # bytes since the last reset
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

n = int(sys.argv[1])
moment = torch.eye(n, dtype=torch.float64).add_(0.5)
feedback_factor(moment[:64, :64], 0.01)  # whatever the first call loads
Path("/proc/self/clear_refs").write_text("5")
before = peak()
feedback_factor(moment, 0.01)
print((peak() - before) / moment.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_factoring_takes_two_matrices_besides_the_moment() -> None:
    program = [sys.executable, "-c", MEMORY_PROGRAM, "2048"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    assert 1.5 < float(done.stdout) < 2.5


def test_a_group_that_needs_more_damping_gets_it_alone() -> None:
    _, moment = random_problem(6)
    singular = torch.ones(6, 6, dtype=torch.float64)
    one, other = feedback_factors(torch.stack([moment, singular]), 0.0)
    assert one.retries == 0 and other.retries == feedback_factor(singular, 0.0).retries > 0
    assert torch.equal(other.upper, feedback_factor(singular, 0.0).upper)
    with pytest.raises(ValueError, match="NaN or infinite"):
        feedback_factors(torch.stack([moment, torch.full((6, 6), torch.nan)]), 0.0)


def test_feedback_beats_rounding_to_nearest() -> None:
    weight, moment = random_problem(130, seed=3)
    grid = affine(weight, [3] * 5)
    _, values, met = feedback_round(weight, feedback_factor(moment, DAMPING), grid)
    nearest = torch.stack([grid.round(weight[:, j], j)[1] for j in range(130)], 1)
    assert not torch.equal(met, weight)
    assert float(output_error(values - weight, moment).sum()) < 0.7 * float(
        output_error(nearest - weight, moment).sum()
    )


def test_observers_see_blocks_with_all_earlier_errors_fed_back() -> None:
    weight, moment = random_problem(300, rows=2)
    grid = affine(weight, [3, 4])
    seen = []
    factor = feedback_factor(moment, DAMPING, act_order=False)
    plain = feedback_round(weight, factor, grid)
    observed = feedback_round(weight, factor, grid, lambda x, start, stop: seen.append((start, stop, x.clone())))
    assert torch.equal(plain[0], observed[0]) and torch.equal(plain[1], observed[1])  # values follow from codes
    torch.testing.assert_close(plain[2], observed[2], rtol=1e-12, atol=1e-12)  # other blocks, other sums
    assert [(start, stop) for start, stop, _ in seen] == [(0, 128), (128, 256), (256, 300)]
    assert torch.equal(seen[0][2], weight.T)
    for start, _, x in seen:
        # given the columns so far, the optimum of the columns not yet rounded: d_F = -A_FF^-1 A_FS d_S
        a = damped(moment.numpy(), DAMPING)
        done = (plain[1] - weight).numpy()[:, :start]
        rest = weight.numpy()[:, start:] - (np.linalg.solve(a[start:, start:], a[start:, :start]) @ done.T).T
        np.testing.assert_allclose(x[start:].T.numpy(), rest, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-9, 2.0, 1e9])
@pytest.mark.parametrize("dead", [(), (3, 20)])
def test_any_multiple_of_the_moment_gives_the_same_codes(scale: float, dead: tuple[int, ...]) -> None:
    weight, moment = random_problem(40, dead=dead, seed=4)
    grid = affine(weight, [2, 3, 4, 5, 6])
    codes = [feedback_round(weight, feedback_factor(scale * m, DAMPING), grid)[0] for m in (moment, moment / scale)]
    assert torch.equal(*codes)


def test_dead_columns_are_named_and_touch_no_other() -> None:
    dead = (0, 17, 39)
    weight, moment = random_problem(40, dead=dead, seed=5)
    factor = feedback_factor(moment, DAMPING)
    assert factor.dead.nonzero().flatten().tolist() == list(dead)
    live = [j for j in range(40) if j not in dead]
    grid = affine(weight, [3] * 5)
    codes, values, _ = feedback_round(weight, factor, grid)
    alone = feedback_round(weight[:, live], feedback_factor(moment[live][:, live], DAMPING), grid)
    assert torch.equal(codes[:, live], alone[0])
    assert not values[:, list(dead)].any()
    nothing = feedback_factor(torch.zeros(3, 3), DAMPING)
    assert bool(nothing.dead.all()) and bool(torch.isfinite(nothing.upper).all())


def test_retries_are_counted_and_only_when_needed() -> None:
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    singular = x.T @ x  # rank 4 of 24
    assert feedback_factor(singular, DAMPING).retries == 0
    indefinite = singular - 1e-5 * singular.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    factor = feedback_factor(indefinite, 0.0)
    # 1e-8 * 10^k of the mean exceeds the -1e-5 at the fourth retry
    assert factor.retries == 4
    assert bool(torch.isfinite(factor.upper).all())
    assert feedback_factor(torch.eye(3), 0.0).retries == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_moment_that_is_not_finite_is_refused(bad: float) -> None:
    moment = torch.eye(4)
    moment[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        feedback_factor(moment, DAMPING)


def test_a_moment_no_damping_cures_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        feedback_factor(torch.diag(torch.tensor([1.0, -1e12])), DAMPING)


def test_the_factor_leaves_its_input_alone() -> None:
    _, moment = random_problem(9, dead=(2,))
    before = moment.clone()
    feedback_factor(moment, DAMPING)
    assert torch.equal(moment, before)


def test_output_error_is_the_quadratic_form_of_each_row() -> None:
    generator = torch.Generator().manual_seed(7)
    delta = torch.randn(2, 3, 5, generator=generator)
    moments = torch.stack([moment_of(5, 9, generator) for _ in range(2)])
    found = output_error(delta, moments)
    assert found.dtype == torch.float64 and found.shape == (2, 3)
    for g in range(2):
        for r in range(3):
            d, a = delta[g, r].tolist(), moments[g].tolist()
            naive = sum(d[i] * a[i][j] * d[j] for i in range(5) for j in range(5))
            assert float(found[g, r]) == pytest.approx(naive, rel=1e-12)
