"""Grids against loops over every level, and clip rules against loops over every range."""

import math

import numpy as np
import pytest
import torch
from naive_quant import RULES, affine_nearest, mse
from torch import Tensor

from bayesq.quant.grids import (
    CLIP_RULES,
    AffineGrid,
    CodebookGrid,
    curvature_grid,
    minmax_grid,
    mse_grid,
    round_affine,
    stored_scale,
    zero_code,
    zero_value,
)

WIDTHS = torch.tensor([2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)


def rows(columns: int = 21, seed: int = 0) -> Tensor:
    """One row for each width, some wholly positive or negative, float64."""
    weight = torch.randn(len(WIDTHS), columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[1] = weight[1].abs() + 0.3
    weight[4] = -weight[4].abs() - 0.2
    weight[2, 5] = 9.0  # an outlier, so that clipping pays
    return weight * 0.07


@pytest.mark.parametrize("rule", sorted(CLIP_RULES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("seed", [0, 1])
def test_clip_rules_equal_loops_over_rows_of_mixed_widths(rule: str, dtype: torch.dtype, seed: int) -> None:
    weight = rows(seed=seed)
    scale, zero = CLIP_RULES[rule](weight, WIDTHS, dtype)
    for r, width in enumerate(WIDTHS.tolist()):
        expected = RULES[rule](weight[r].numpy(), width, single=dtype == torch.float32)
        # mse_grid searches in float32
        assert (float(scale[r]), float(zero[r])) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(scale.to(dtype).to(scale.dtype), scale)


@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e200])
def test_the_gain_rule_weighs_every_column(unit: float) -> None:
    weight = rows(seed=2)
    gain = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 4
    gain[3] = 0  # a row whose errors cost nothing
    scale, zero = curvature_grid(weight, WIDTHS, gain * unit)
    for r, width in enumerate(WIDTHS.tolist()):
        assert (float(scale[r]), float(zero[r])) == mse(weight[r].numpy(), width, gain=gain[r].numpy())
    assert not torch.equal(scale, curvature_grid(weight, WIDTHS, torch.ones_like(gain))[0])


def test_the_minmax_grid_reaches_both_ends_and_zero() -> None:
    weight = rows()
    scale, zero = minmax_grid(weight, WIDTHS, torch.float32)
    _, value = round_affine(weight, scale, zero, WIDTHS)
    assert bool(((value - weight).abs() <= 0.5 * scale[:, None] * (1 + 1e-6)).all())
    assert bool((round_affine(torch.zeros_like(weight), scale, zero, WIDTHS)[1] == 0).all())


def test_mse_clips_the_tails_of_narrow_rows() -> None:
    weight = torch.randn(len(WIDTHS), 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ratio = mse_grid(weight, WIDTHS)[0] / minmax_grid(weight, WIDTHS)[0]
    assert bool((ratio[:3] < 0.9).all()) and bool((ratio <= 1).all())


@pytest.mark.parametrize("outlier", [2.0, 3.5, 40.0])
def test_mse_clips_an_outlier_as_far_as_the_search_goes(outlier: float) -> None:
    weight = torch.rand(1, 400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    weight[0, 7] = outlier
    scale, zero = mse_grid(weight, WIDTHS[:1])
    assert (float(scale), float(zero)) == RULES["mse"](weight[0].numpy(), 2)


DEGENERATE = {
    "zero": [0.0, 0.0, 0.0],
    "constant": [0.3, 0.3, 0.3],
    "negative constant": [-0.3, -0.3, -0.3],
    "huge": [3e38, -3e38, 1.0],
    "tiny": [1e-38, -1e-40, 0.0],
    "one huge": [1e30, 0.1, -0.1],
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("rule", sorted(CLIP_RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_rows_get_finite_storable_grids(name: str, rule: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([DEGENERATE[name]] * len(WIDTHS), dtype=dtype)
    scale, zero = CLIP_RULES[rule](weight, WIDTHS)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert torch.equal(scale.to(torch.float16).to(dtype), scale)
    assert torch.equal(zero_value(zero_code(zero, WIDTHS), WIDTHS, dtype), zero)
    code, value = round_affine(weight, scale, zero, WIDTHS)
    assert bool(torch.isfinite(value).all())
    assert bool((code >= 0).all()) and bool((code < 2.0 ** WIDTHS[:, None]).all())
    if name == "zero":
        assert not value.any()
    if name.endswith("constant"):
        assert bool(((value - weight).abs() <= 0.501 * scale[:, None] + 3e-4).all())


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_small_weights_keep_the_precision_their_width_promises(spread: float) -> None:
    weight = torch.randn(1, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread
    width = torch.tensor([8], dtype=torch.uint8)
    _, value = round_affine(weight, *mse_grid(weight, width), width)
    assert float((value - weight).norm() / weight.norm()) < 0.012


def test_stored_scales_are_the_nearest_fp16() -> None:
    scale = torch.logspace(-9, 7, 400, dtype=torch.float64)
    stored = stored_scale(scale)
    largest, smallest = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_subnormal)
    for wanted, found in zip(scale.tolist(), stored.tolist(), strict=True):
        assert found == float(np.float16(min(max(wanted, smallest), largest)))


@pytest.mark.parametrize("width", WIDTHS.tolist())
def test_integer_zero_points_are_stored_exactly(width: int) -> None:
    zero = torch.arange(2**width, dtype=torch.float64)
    bits = torch.full((2**width,), width, dtype=torch.uint8)
    code = zero_code(zero, bits)
    assert code.dtype == torch.uint8
    assert torch.equal(zero_value(code, bits, torch.float64), zero)
    assert code.tolist() == [k * 2 ** (8 - width) for k in range(2**width)]


@pytest.mark.parametrize("width", WIDTHS.tolist())
def test_fractional_zero_points_are_off_by_half_a_unit_and_bounded_at_the_ends(width: int) -> None:
    zero = torch.linspace(-1, 2**width + 1, 301, dtype=torch.float64)
    bits = torch.full((301,), width, dtype=torch.uint8)
    found = zero_value(zero_code(zero, bits), bits, torch.float64)
    unit = 2.0 ** (width - 8)
    for wanted, value in zip(zero.tolist(), found.tolist(), strict=True):
        assert abs(value - min(max(wanted, 0), 2**width - unit)) <= unit / 2


@pytest.mark.parametrize("group_size", [None, 4])
def test_an_affine_grid_finds_the_nearest_of_all_its_values(group_size: int | None) -> None:
    weight = 3 * rows(10)
    generator = torch.Generator().manual_seed(3)
    groups = 1 if group_size is None else 3
    scale = 0.02 + 0.1 * torch.rand(len(WIDTHS), groups, generator=generator, dtype=torch.float64)
    zero = torch.floor(
        torch.rand(len(WIDTHS), groups, generator=generator, dtype=torch.float64) * 2.0 ** WIDTHS[:, None]
    )
    grid = AffineGrid(scale, zero, WIDTHS, group_size)
    for column in range(10):
        code, value = grid.round(weight[:, column], column)
        s = 0 if group_size is None else column // group_size
        for r, width in enumerate(WIDTHS.tolist()):
            step, offset = float(scale[r, s]), float(zero[r, s])
            distances = [abs(step * (k - offset) - float(weight[r, column])) for k in range(2**width)]
            assert distances[int(code[r])] <= min(distances) + 1e-15
            assert float(value[r]) == step * (int(code[r]) - offset)
            assert (int(code[r]), float(value[r])) == affine_nearest(float(weight[r, column]), step, offset, width)
    if group_size is None:
        code, value = round_affine(weight, scale[:, 0], zero[:, 0], WIDTHS)
        single = [grid.round(weight[:, column], column) for column in range(10)]
        assert torch.equal(code, torch.stack([c for c, _ in single], 1))
        assert torch.equal(value, torch.stack([v for _, v in single], 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_codebook_grid_finds_the_nearest_level_at_every_width(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Widths 5 and 7 have no codebook: their levels are 0, 1, 2, ...
    books = {
        w: torch.sort(torch.randn(2**w, generator=generator)).values.half() for w in WIDTHS.tolist() if w not in (5, 7)
    }
    weight = rows(40, seed)
    weight[:, 0], weight[:, 1] = 1e6, -1e6  # beyond both ends
    scale = 0.03 + 0.05 * torch.rand(len(WIDTHS), generator=generator, dtype=torch.float64)
    zero = torch.rand(len(WIDTHS), generator=generator, dtype=torch.float64)
    grid = CodebookGrid(scale, zero, WIDTHS, books)
    codes, values = grid.round_matrix(weight)
    for r, width in enumerate(WIDTHS.tolist()):
        levels = books[width].tolist() if width in books else list(range(2**width))
        for column in range(40):
            reals = [float(scale[r]) * (level - float(zero[r])) for level in levels]
            distances = [abs(real - float(weight[r, column])) for real in reals]
            code = int(codes[r, column])
            assert 0 <= code < 2**width
            assert math.isclose(distances[code], min(distances), rel_tol=1e-12, abs_tol=1e-12)
            assert math.isclose(float(values[r, column]), reals[code], rel_tol=1e-12, abs_tol=1e-15)
    for column in (0, 1, 17):
        code, value = grid.round(weight[:, column], column)
        assert torch.equal(code, codes[:, column]) and torch.equal(value, values[:, column])


def test_an_affine_codebook_rounds_like_the_affine_grid() -> None:
    weight = rows(50, 5)
    scale, zero = minmax_grid(weight, WIDTHS)
    codes, values = CodebookGrid(scale, zero, WIDTHS, {}).round_matrix(weight)
    expected, reals = round_affine(weight, scale, zero, WIDTHS)
    assert torch.equal(codes.double(), expected) and torch.equal(values, reals)
