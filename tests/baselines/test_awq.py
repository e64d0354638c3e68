"""AWQ against a naive search, and never worse than the plain rounding it contains."""

import math

import numpy as np
import pytest
import torch
from naive_quant import FixedWidths, affine_nearest, problem, range_grid, row_errors
from rounding_loop import rounded
from torch import Tensor

from baselines.awq import AWQ
from bayesq.contract import LayerProblem
from bayesq.quant.accounting import stored_bytes
from bayesq.quant.packing import pack
from bayesq.quant.tensor import QuantizedTensor

STEPS = 10
LOWEST = 0.5


def inputs(
    groups: int,
    channels: int,
    positions: int,
    generator: torch.Generator,
    spread: float = 2.0,
    dead: int | None = None,
    strong: int = 0,
) -> tuple[Tensor, Tensor]:
    """Moment [g, c, c] and mean magnitude [g, c] of inputs whose channels have very unequal energies.

    Args:
        spread: standard deviation of the channels' log amplitudes.
        dead: channel that is always 0.
        strong: that many channels have 30 times the others' amplitude.
    """
    columns = channels * positions
    x = torch.randn(200, groups, columns, generator=generator, dtype=torch.float64)
    x = x + 0.5 * x.mean(2, keepdim=True)
    energy = (spread * torch.randn(groups, channels, generator=generator, dtype=torch.float64)).exp()
    energy[:, :strong] *= 30
    if dead is not None:
        energy[:, dead] = 0
    x = x * energy.repeat_interleave(positions, dim=1)
    return torch.einsum("ngi,ngj->gij", x, x) / 200, x.abs().mean(0)


def quantize(layer: LayerProblem, widths: list[int], exponents: int = 10, clip_steps: int = STEPS) -> QuantizedTensor:
    awq = AWQ(exponents, clip_steps, LOWEST)
    ((_, tensor),) = rounded(awq, [layer], FixedWidths(layer=torch.tensor(widths, dtype=torch.uint8)))
    return tensor


def naive_row(row: np.ndarray, spread: np.ndarray, shrink: float, width: int) -> tuple[list[int], np.ndarray]:
    """Codes and deployed values of one row, channels scaled up by `spread` and down again."""
    scaled = row * spread
    low, high = min(0.0, float(scaled.min())), max(0.0, float(scaled.max()))
    grid = range_grid(shrink * low, shrink * high, width)
    found = [affine_nearest(float(w), *grid, width) for w in scaled]
    return [code for code, _ in found], np.array([value for _, value in found]) / spread


def naive_clip(
    weight: np.ndarray, moments: np.ndarray, spread: np.ndarray, widths: list[int], steps: int = STEPS
) -> tuple[float, list[list[int]]]:
    """Total output error and codes with every row's best range."""
    total, codes = 0.0, []
    for i, width in enumerate(widths):
        g, r = divmod(i, weight.shape[1])
        best, least = None, math.inf
        for k in range(steps + 1):
            found, values = naive_row(weight[g, r], spread[g], 1 - k / max(steps, 1) * (1 - LOWEST), width)
            error = float(row_errors((values - weight[g, r])[None], moments[g])[0])
            if error < least:
                best, least = found, error
        total += least
        codes.append(best)
    return total, codes


def naive_awq(
    weight: np.ndarray, moments: np.ndarray, magnitude: np.ndarray, positions: int, widths: list[int], exponents: int
) -> tuple[float, list[list[int]], np.ndarray]:
    """Exponent with the least unclipped error, then clipping; the clipped identity if that is better after all."""
    groups, _, columns = weight.shape
    channel = np.array(
        [[magnitude[g, c : c + positions].mean() for c in range(0, columns, positions)] for g in range(groups)]
    )
    channel = np.maximum(channel, channel.max() * 1e-4)
    best, least = np.ones_like(channel), math.inf
    for k in range(exponents + 1):
        scale = channel ** (k / exponents)
        scale = (scale / math.sqrt(scale.max() * scale.min())).astype(np.float16).astype(np.float64)
        error, _ = naive_clip(weight, moments, np.repeat(scale, positions, axis=1), widths, steps=0)
        if error < least:
            best, least = scale, error
    plain = naive_clip(weight, moments, np.ones((groups, columns)), widths)
    scaled = naive_clip(weight, moments, np.repeat(best, positions, axis=1), widths)
    return (*scaled, best) if scaled[0] < plain[0] else (*plain, np.ones_like(channel))


def error_of(tensor: QuantizedTensor, weight: Tensor, moments: Tensor) -> float:
    delta = (tensor.dequantize() - weight).double().numpy()
    return sum(float(row_errors(d, a).sum()) for d, a in zip(delta, moments.numpy(), strict=True))


@pytest.mark.parametrize(
    ("groups", "rows", "channels", "positions"), [(1, 4, 12, 1), (1, 3, 4, 9), (2, 2, 3, 4), (4, 1, 1, 9)]
)
@pytest.mark.parametrize("seed", range(2))
def test_the_search_equals_a_naive_one(groups: int, rows: int, channels: int, positions: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, channels * positions, generator=generator)
    moments, magnitude = inputs(groups, channels, positions, generator)
    widths = [3, 4, 2, 8][: groups * rows]
    tensor = quantize(problem(weight, moments, magnitude, positions), widths, exponents=6)
    error, codes, scale = naive_awq(
        weight.double().numpy(), moments.numpy(), magnitude.numpy(), positions, widths, exponents=6
    )
    assert tensor.codes.tolist() == codes
    found = np.ones_like(scale) if tensor.column_scale is None else tensor.column_scale.double().numpy()
    np.testing.assert_array_equal(found, scale)
    # what is deployed is what the search judged
    assert error_of(tensor, weight, moments) == pytest.approx(error, rel=1e-5)


def test_scaling_helps_where_a_few_channels_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 16, 64, generator=generator)
    moments, magnitude = inputs(1, 64, 1, generator, spread=0.0, strong=3)
    tensor = quantize(problem(weight, moments, magnitude), [3] * 16)
    plain, _ = naive_clip(weight.double().numpy(), moments.numpy(), np.ones((1, 64)), [3] * 16)
    assert tensor.column_scale is not None
    assert error_of(tensor, weight, moments) < 0.8 * plain


@pytest.mark.parametrize("seed", range(12))
def test_never_worse_than_rounding_with_the_same_clip_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 3, 10, generator=generator)
    moments, magnitude = inputs(1, 10, 1, generator, spread=0.4)
    tensor = quantize(problem(weight, moments, magnitude), [2, 3, 4])
    plain, _ = naive_clip(weight.double().numpy(), moments.numpy(), np.ones((1, 10)), [2, 3, 4])
    assert error_of(tensor, weight, moments) <= plain * (1 + 1e-6)


def test_equal_channels_need_no_scales_and_pay_for_none() -> None:
    weight = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(1))
    layer = problem(weight, torch.eye(9)[None], torch.ones(1, 9))
    tensor = quantize(layer, [3] * 4)
    assert tensor.column_scale is None
    assert "column_scale" not in pack(tensor)[0]


@pytest.mark.parametrize("positions", [1, 4])
def test_scales_are_stored_once_a_channel_and_counted(positions: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 8, 6 * positions, generator=generator)
    moments, magnitude = inputs(2, 6, positions, generator, spread=0.0, strong=1)
    tensor = quantize(problem(weight, moments, magnitude, positions), [3] * 16)
    assert tensor.column_scale is not None and tensor.column_scale.shape == (2, 6)
    codes = -(-3 * weight.numel() // 8)
    assert stored_bytes(tensor) == codes + 1 + 16 * 3 + 2 * 2 * 6


@pytest.mark.parametrize("positions", [1, 3])
def test_a_dead_channel_does_no_harm(positions: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1, 6, 8 * positions, generator=generator)
    moments, magnitude = inputs(1, 8, positions, generator, dead=5)
    tensor = quantize(problem(weight, moments, magnitude, positions), [4] * 6)
    found = tensor.dequantize()
    assert bool(torch.isfinite(found).all())
    if tensor.column_scale is not None:
        assert bool((tensor.column_scale > 0).all())
    plain, _ = naive_clip(weight.double().numpy(), moments.numpy(), np.ones((1, 8 * positions)), [4] * 6)
    assert error_of(tensor, weight, moments) <= plain * (1 + 1e-6)


def test_inputs_that_are_all_zero_leave_plain_rounding() -> None:
    weight = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(4))
    tensor = quantize(problem(weight, torch.zeros(1, 5, 5), torch.zeros(1, 5)), [8] * 3)
    assert tensor.column_scale is None
    assert float((tensor.dequantize() - weight).abs().max()) < 0.02


@pytest.mark.parametrize(("exponents", "clip_steps", "lowest"), [(0, 1, 0.5), (1, -1, 0.5), (1, 1, 0.0), (1, 1, 1.1)])
def test_impossible_settings_are_refused(exponents: int, clip_steps: int, lowest: float) -> None:
    with pytest.raises(ValueError, match=r"method\.exponents"):
        AWQ(exponents, clip_steps, lowest)


@pytest.mark.parametrize("symmetric", [False, True])
def test_column_groups_are_rounded_on_their_own_grids(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(1, 3, 12, generator=generator)
    moments, magnitude = inputs(1, 12, 1, generator)
    method = AWQ(4, 0, LOWEST, group_size=5, symmetric=symmetric)
    widths = FixedWidths(layer=torch.tensor([3, 4, 2], dtype=torch.uint8))
    ((_, tensor),) = rounded(method, [problem(weight, moments, magnitude)], widths)
    spread = torch.ones(12) if tensor.column_scale is None else tensor.column_scale[0].float()
    found = tensor.dequantize()[0] * spread
    scaled = weight[0].double() * spread.double()
    for r, width in enumerate([3, 4, 2]):
        for first in (0, 5, 10):
            part = scaled[r, first : first + 5].numpy()
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            if symmetric:
                high = max(-low, high)
                grid = float(np.float16(2 * high / (2**width - 1))), 2 ** (width - 1)
            else:
                grid = range_grid(low, high, width)
            values = [affine_nearest(float(w), *grid, width)[1] for w in part]
            np.testing.assert_allclose(found[r, first : first + 5], values, rtol=1e-5, atol=1e-7)
    assert tensor.scale.shape == (3, 3)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.group_size=2\.5: must be at least 1"):
        AWQ(4, 0, LOWEST, group_size=2.5)
    with pytest.raises(ValueError, match=r"method\.symmetric=yes: needs true or false"):
        AWQ(4, 0, LOWEST, symmetric="yes")
