"""The Gaussian rate-distortion bound, against closed forms, bisection and the dense problem."""

import math

import pytest
import torch

from analysis.rate_distortion import layer_rates, rate, risk_components, water_level
from bayesq.posterior import DiagonalPosterior, EkfacPosterior, KroneckerPosterior


def moment(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / (2 * size)


def bisected(variances: torch.Tensor, distortion: float) -> float:
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(min(middle, float(v)) for v in variances)
        low, high = (middle, high) if total < distortion else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("bits", [0.5, 2, 3.5])
def test_a_single_component_gives_the_textbook_formula(bits: float) -> None:
    variance = torch.tensor([1.7], dtype=torch.float64)
    assert rate(variance, water_level(variance, 1.7 * 2 ** (-2 * bits))) == pytest.approx(bits)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.1, 1e-4])
def test_water_level_agrees_with_bisection(share: float) -> None:
    variances = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    variances[:3] = 0
    distortion = share * float(variances.sum())
    level = water_level(variances, distortion)
    assert level == pytest.approx(bisected(variances, distortion), rel=1e-9)
    expected = sum(0.5 * math.log2(float(v) / level) for v in variances if v > level)
    assert rate(variances, level) == pytest.approx(expected)


def test_a_risk_above_that_of_no_weights_takes_no_bits() -> None:
    variances = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert rate(variances, water_level(variances, 0.75)) == 0
    assert rate(variances, water_level(variances, 9.0)) == 0


def test_components_are_the_eigenvalues_of_the_dense_problem() -> None:
    a, g = torch.stack([moment(3, 1), moment(3, 2)]), torch.stack([moment(2, 3), moment(2, 4)])
    weight = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(5))
    found = risk_components(KroneckerPosterior(a, g, 1, 0.0, None), weight)
    expected = []
    for group in range(2):
        # P over weights flattened row by row, scaled to unit variance from both sides
        scale = weight[group].double().var(-1, unbiased=False).sqrt().repeat_interleave(3)
        dense = 0.5 * torch.kron(g[group], a[group]) * scale[:, None] * scale[None, :]
        expected.append(torch.linalg.eigvalsh(dense))
    torch.testing.assert_close(found.sort().values, torch.cat(expected).sort().values)


def test_a_diagonal_posterior_needs_no_rotation() -> None:
    precision = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]], dtype=torch.float64)
    weight = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # row variances 1 and 0
    found = risk_components(DiagonalPosterior(precision, 1, 0.0, None), weight)
    assert found.tolist() == [0.5, 1.0, 0.0, 0.0]


def test_other_posteriors_are_refused() -> None:
    empty = torch.zeros(1, 1, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match="EkfacPosterior"):
        risk_components(EkfacPosterior(empty, empty, empty, empty, 1, 0.0, None), empty)


def test_one_level_for_all_layers_takes_no_more_bits_than_a_level_for_each() -> None:
    layers = [torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in (0, 2)]
    own, common = layer_rates(layers, [0.1, 0.9])
    assert sum(common) < sum(own)
    # equal water levels leave nothing to gain
    level = 0.05
    risks = [float(v.clamp(max=level).sum()) for v in layers]
    own, common = layer_rates(layers, risks)
    assert common == pytest.approx(own)
    assert own == pytest.approx([rate(v, level) for v in layers])
