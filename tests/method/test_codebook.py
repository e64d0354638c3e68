"""Codebooks and their closed-form tables against quadrature, sampling, naive Lloyd and the classical constants."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from bayesq import codebook
from bayesq.codebook import (
    Atoms,
    cell_distortion,
    cell_integrals,
    cells,
    expected_distortion,
    expected_lloyd,
    expected_uniform,
    level_unit,
    normal_distortion,
    normal_interval,
    normal_levels,
    table_bits,
    table_widths,
)
from bayesq.quant.codes import Codebook, shared_code
from bayesq.quant.packing import CODEBOOK_PREFIX, pack_model
from bayesq.quant.tensor import QuantizedTensor

INF = math.inf


def t64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gauss(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def quad_normal(f, mean: float, std: float, lower: float, upper: float) -> float:
    """Integral of f(w) N(w; mean, std^2) over [lower, upper), in standard units, piece by piece."""
    a, b = max((lower - mean) / std, -40.0), min((upper - mean) / std, 40.0)
    if a >= b:
        return 0.0
    inner = [z for z in range(-40, 41, 4) if a + 1e-6 < z < b - 1e-6]
    edges = [a, *inner, b]
    return sum(
        integrate.quad(lambda z: f(mean + std * z) * gauss(z), x, y, epsabs=1e-14, epsrel=1e-12)[0]
        for x, y in itertools.pairwise(edges)
    )


def some_cells() -> list[tuple[float, float, float, float, float]]:
    """(mean, std, lower, upper, level): near, far, infinite, narrow and degenerate cells; tiny and huge spreads."""
    cases = [
        (0.0, 1.0, -INF, INF, 0.0),
        (0.3, 1.0, -INF, -0.5, -1.1),
        (0.3, 1.0, 0.5, INF, 1.2),
        (0.0, 1.0, 6.0, 7.0, 6.4),
        (0.0, 1.0, -9.0, -8.0, -8.2),
        (0.0, 1.0, 30.0, INF, 31.0),
        (0.0, 1.0, -INF, -38.0, -39.0),
        (2.0, 1e-6, 1.0, 3.0, 2.4),
        (2.0, 1e-6, 2.0, 3.0, 2.4),  # the mean on a bound
        (2.0, 1e-9, -INF, 1.0, 0.0),
        (-1.0, 1e-300, -2.0, 0.0, -0.5),
        (0.5, 100.0, -0.1, 0.1, 0.05),
        (0.5, 100.0, 0.0, INF, 40.0),
        (7.0, 0.2, 6.5, 6.5, 6.5),
    ]
    random = np.random.default_rng(0)
    for _ in range(60):
        lower = random.normal(0, 3)
        cases.append(
            (
                random.normal(0, 2),
                10 ** random.uniform(-2, 1),
                lower,
                lower + random.exponential(2),
                random.normal(0, 3),
            )
        )
    return cases


@pytest.mark.parametrize(("mean", "std", "lower", "upper", "level"), some_cells())
def test_cells_match_quadrature(mean, std, lower, upper, level):
    arguments = [t64(x) for x in (mean, std, lower, upper)]
    p, first, second = (float(x) for x in cell_integrals(*arguments))
    scale = max(1.0, std, abs(mean), abs(level)) ** 2
    assert p == pytest.approx(quad_normal(lambda w: 1.0, mean, std, lower, upper), abs=1e-10)
    assert first == pytest.approx(quad_normal(lambda w: w, mean, std, lower, upper), abs=1e-10 * scale)
    # about the mean in standard units: for tiny spreads (m + s z - m)^2 would be rounding noise
    a, b = (lower - mean) / std, (upper - mean) / std
    assert second == pytest.approx(std**2 * quad_normal(lambda z: z * z, 0, 1, a, b), abs=1e-10 * scale)
    assert float(cell_distortion(*arguments, t64(level))) == pytest.approx(
        quad_normal(lambda w: (w - level) ** 2, mean, std, lower, upper), abs=1e-10 * scale
    )


@pytest.mark.parametrize("a", [0.5, 5.0, 10.0, 20.0, 35.0])
@pytest.mark.parametrize("length", [0.01, 1.0])
def test_tail_probabilities_keep_their_relative_accuracy(a, length):
    scaled, _ = integrate.quad(lambda x: math.exp(-a * x - x * x / 2), 0, length, epsabs=0, epsrel=1e-13)
    for low, high in ((a, a + length), (-a - length, -a)):
        assert float(normal_interval(t64(low), t64(high))) == pytest.approx(gauss(a) * scaled, rel=1e-10, abs=0)


def test_cells_are_those_of_the_nearest_level():
    levels = t64(-2.0, -0.5, 0.25, 3.0)
    lower, upper = cells(levels)
    for x in np.linspace(-6, 6, 241) + 1e-4:
        nearest = int(np.argmin([abs(x - c) for c in levels.tolist()]))
        assert lower[nearest] <= x < upper[nearest]


@pytest.fixture
def posterior() -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations and precisions of a few weights."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(12, generator=generator, dtype=torch.float64)
    std = 0.05 + 0.4 * torch.rand(12, generator=generator, dtype=torch.float64)
    precision = torch.rand(12, generator=generator, dtype=torch.float64) ** 2
    return mean, std, precision


def quad_distortion(mean: Tensor, std: Tensor, precision: Tensor, levels: list[float]) -> float:
    bounds = [-INF, *((a + b) / 2 for a, b in itertools.pairwise(levels)), INF]
    total = 0.0
    for m, s, p in zip(mean.tolist(), std.tolist(), precision.tolist(), strict=True):
        for k, c in enumerate(levels):
            total += p * quad_normal(lambda w, c=c: (w - c) ** 2, m, s, bounds[k], bounds[k + 1])
    return total / float(precision.sum())


def test_expected_distortion_matches_quadrature_and_sampling(posterior):
    mean, std, precision = posterior
    levels = t64(-1.5, -0.4, 0.1, 1.2)
    found = float(expected_distortion(mean, std, precision, levels))
    assert found == pytest.approx(quad_distortion(mean, std, precision, levels.tolist()), abs=1e-10)
    draws = np.random.default_rng(1).normal(mean.numpy(), std.numpy(), size=(100_000, len(mean)))
    error = np.min((draws[:, :, None] - levels.numpy()) ** 2, axis=2) @ (precision / precision.sum()).numpy()
    assert abs(found - error.mean()) < 5 * error.std() / math.sqrt(len(error))


# ------------------------------------------------------------------------------------------------- the standard normal


def lloyd_max(width: int) -> np.ndarray:
    """Lloyd-Max levels of the standard normal: root of centroid minus level over the positive half."""
    half = 2**width // 2

    def gap(positive: np.ndarray) -> np.ndarray:
        inner = (positive[1:] + positive[:-1]) / 2
        low, high = np.array([0.0, *inner]), np.array([*inner, np.inf])
        return (stats.norm.pdf(low) - stats.norm.pdf(high)) / (stats.norm.sf(low) - stats.norm.sf(high)) - positive

    start = stats.norm.ppf((np.arange(half) + half + 0.5) / (2 * half)) * 1.4
    for _ in range(50):  # Lloyd's own steps bring the root finder close
        start = start + gap(start)
    positive = optimize.root(gap, start, tol=1e-15).x
    assert np.abs(gap(positive)).max() < 1e-12
    return np.concatenate([-positive[::-1], positive])


STANDARD = t64(0.0), t64(1.0), t64(1.0)
# Max, "Quantizing for minimum distortion" (1960), tables I and II, as printed
MAX_LLOYD = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
MAX_UNIFORM = {1: (1.596, 0.3634), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154)}


@pytest.mark.parametrize("width", MAX_LLOYD)
def test_lloyd_max_distortion_of_the_standard_normal(width):
    found = normal_distortion("lloyd", width)
    # Max prints 0.009497 for 16 levels; quadrature says 0.0095010: the classical value is good to 4 decimals
    assert found == pytest.approx(MAX_LLOYD[width], abs=5e-5)
    levels = lloyd_max(width)
    assert found == pytest.approx(quad_distortion(*STANDARD, levels.tolist()), abs=1e-10)
    np.testing.assert_allclose(normal_levels("lloyd", width), levels, atol=1e-9)


def test_the_eight_lloyd_max_levels_are_the_published_ones():
    np.testing.assert_allclose(normal_levels("lloyd", 3)[4:], [0.2451, 0.7560, 1.3439, 2.1520], atol=6e-5)


@pytest.mark.parametrize("width", [5, 6, 7, 8])
def test_wide_lloyd_max_levels_are_their_cells_centroids(width):
    levels = normal_levels("lloyd", width)
    assert bool((levels.diff() > 0).all())
    bounds = [-INF, *((levels[1:] + levels[:-1]) / 2).tolist(), INF]
    for k in range(0, len(levels), max(1, len(levels) // 16)):
        mass, moment = (quad_normal(f, 0, 1, bounds[k], bounds[k + 1]) for f in (lambda w: 1.0, lambda w: w))
        assert moment / mass == pytest.approx(float(levels[k]), abs=1e-9)
    assert normal_distortion("lloyd", width) < normal_distortion("lloyd", width - 1) / 3


def uniform_distortion(step: float, width: int) -> float:
    """Distortion of 2**width symmetric uniform levels for the standard normal, from scipy's normal functions."""
    levels = (np.arange(2**width) - (2**width - 1) / 2) * step
    low = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2])
    high = np.concatenate([low[1:], [np.inf]])
    p = stats.norm.cdf(high) - stats.norm.cdf(low)
    first = stats.norm.pdf(low) - stats.norm.pdf(high)
    with np.errstate(invalid="ignore"):
        edge = np.nan_to_num(low * stats.norm.pdf(low)) - np.nan_to_num(high * stats.norm.pdf(high))
    return float((p + edge - 2 * levels * first + levels**2 * p).sum())


@pytest.mark.parametrize("width", range(1, 9))
def test_uniform_levels_of_the_standard_normal_are_optimal(width):
    levels = normal_levels("uniform", width)
    step = float(levels[1] - levels[0])
    assert float(levels.sum()) == pytest.approx(0, abs=1e-9) and bool(torch.allclose(levels.diff(), t64(step)))
    best = optimize.minimize_scalar(
        uniform_distortion,
        bounds=(1 / 2**width, 12 / 2**width),
        args=(width,),
        options={"xatol": 1e-12},
        method="bounded",
    )
    assert step == pytest.approx(best.x, abs=1e-3 * best.x)
    # at a minimum the error of the step counts squared
    assert normal_distortion("uniform", width) == pytest.approx(best.fun, rel=1e-5)
    assert normal_distortion("uniform", width) == pytest.approx(uniform_distortion(step, width), abs=1e-12)
    if width in MAX_UNIFORM:
        assert step == pytest.approx(MAX_UNIFORM[width][0], abs=4e-4)
        assert normal_distortion("uniform", width) == pytest.approx(MAX_UNIFORM[width][1], abs=5e-5)


@pytest.mark.parametrize("kind", ["lloyd", "uniform"])
@pytest.mark.parametrize("width", range(2, 9))
def test_tables_match_quadrature(kind, width):
    levels = normal_levels(kind, width).tolist()
    assert normal_distortion(kind, width) == pytest.approx(quad_distortion(*STANDARD, levels), abs=1e-10)


@pytest.mark.parametrize("kind", ["lloyd", "uniform"])
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_posterior_noise_widens_the_source(kind, noise):
    """Weights w ~ N(0, 1), each known up to N(0, noise^2): their mixture by nested quadrature."""
    spread = math.sqrt(1 + noise**2)
    levels = [spread * c for c in normal_levels(kind, 2).tolist()]
    nodes = np.arange(-9, 9.05, 0.1)  # the trapezoid rule is exact to 1e-12 for so smooth a mixture
    mixture = t64(*nodes), torch.full((len(nodes),), noise, dtype=torch.float64), t64(*stats.norm.pdf(nodes))
    found = normal_distortion(kind, 2, noise)
    assert found == pytest.approx(quad_distortion(*mixture, levels), rel=1e-9)
    assert found == pytest.approx((1 + noise**2) * normal_distortion(kind, 2), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------- designs


def test_lloyd_never_raises_the_distortion(posterior, monkeypatch):
    levels = t64(*np.linspace(-3, 3, 8))
    distortions = [float(expected_distortion(*posterior, levels))]
    monkeypatch.setattr(codebook, "LLOYD_STEPS", 1)
    for _ in range(30):
        levels = expected_lloyd(*posterior, levels)
        distortions.append(float(expected_distortion(*posterior, levels)))
    assert bool((levels.diff() > 0).all())
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(distortions))
    assert distortions[-1] < 0.7 * distortions[0]


def naive_lloyd(points: np.ndarray, weights: np.ndarray, levels: np.ndarray, steps: int) -> np.ndarray:
    levels = levels.copy()
    for _ in range(steps):
        nearest = np.array([np.argmin(np.abs(x - levels)) for x in points])
        for k in range(len(levels)):
            if (nearest == k).any():
                levels[k] = (weights * points)[nearest == k].sum() / weights[nearest == k].sum()
    return levels


def test_without_posterior_spread_it_is_lloyd_on_points(monkeypatch):
    random = np.random.default_rng(2)
    points, weights, start = random.normal(size=300), random.random(300), np.linspace(-2, 2, 8)
    monkeypatch.setattr(codebook, "LLOYD_TOLERANCE", 0.0)
    found = expected_lloyd(t64(*points), torch.full((300,), 1e-9, dtype=torch.float64), t64(*weights), t64(*start))
    np.testing.assert_allclose(found, naive_lloyd(points, weights, start, codebook.LLOYD_STEPS), atol=1e-7)


def test_with_posterior_spread_levels_are_posterior_centroids(posterior, monkeypatch):
    monkeypatch.setattr(codebook, "LLOYD_STEPS", 6)
    monkeypatch.setattr(codebook, "LLOYD_TOLERANCE", 0.0)
    levels = [-1.0, -0.2, 0.3, 1.4]
    found = expected_lloyd(*posterior, t64(*levels))
    rows = list(zip(*(x.tolist() for x in posterior), strict=True))
    for _ in range(6):
        bounds = [-INF, *((a + b) / 2 for a, b in itertools.pairwise(levels)), INF]
        levels = [
            sum(p * quad_normal(lambda w: w, m, s, bounds[k], bounds[k + 1]) for m, s, p in rows)
            / sum(p * quad_normal(lambda w: 1.0, m, s, bounds[k], bounds[k + 1]) for m, s, p in rows)
            for k in range(4)
        ]
    np.testing.assert_allclose(found, levels, atol=1e-10)


def test_early_stopping_costs_next_to_nothing(posterior, monkeypatch):
    start = t64(*np.linspace(-2, 2, 8))
    stopped = float(expected_distortion(*posterior, expected_lloyd(*posterior, start)))
    monkeypatch.setattr(codebook, "LLOYD_TOLERANCE", 0.0)
    monkeypatch.setattr(codebook, "LLOYD_STEPS", 3000)
    assert stopped <= 1.001 * float(expected_distortion(*posterior, expected_lloyd(*posterior, start)))


@pytest.mark.parametrize("far", [20.0, 60.0, 65.0, 66.0, 67.0, 68.0, 90.0])
def test_levels_nothing_reaches_stay_in_order(far, monkeypatch):
    """The outermost cell's mass runs from small through subnormal to zero."""
    monkeypatch.setattr(codebook, "LLOYD_STEPS", 1)
    levels = expected_lloyd(t64(0.0), t64(1.0), t64(1e-60), t64(-1.0, 1.0, far))
    assert bool((levels.diff() > 0).all())
    assert float(levels[2]) >= (far + 1) / 2


def test_expected_uniform_beats_every_other_step(posterior):
    found = expected_uniform(*posterior, width=2)
    assert torch.allclose(found.diff(), (found[1] - found[0]).expand(3))
    least = float(expected_distortion(*posterior, found))
    codes = t64(-1.5, -0.5, 0.5, 1.5)
    others = [float(expected_distortion(*posterior, codes * step)) for step in np.geomspace(0.01, 10, 400)]
    assert least <= min(others) * (1 + 1e-6)


# ------------------------------------------------------------------------------------------------------------ atoms


def weights_met(width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in level units around the codes of a width: means, variances, precisions."""
    random = np.random.default_rng(seed)
    mean = random.normal((2**width - 1) / 2, 2**width / 5, size=(40, 100))
    return tuple(torch.from_numpy(x) for x in (mean, 0.02 * random.random(mean.shape), random.random(mean.shape) + 0.1))  # type: ignore[return-value]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_atoms_keep_mass_mean_and_second_moment(width):
    mean, variance, precision = weights_met(width)
    mean[0, :5] = t64(-1e4, 1e4, -(2.0**width), 3 * 2.0**width, 0.0)  # far outside: joins the outermost cells
    atoms = Atoms.of(mean, variance, precision, width)
    m, s, p = atoms.gaussians()
    assert len(m) <= codebook.ATOMS and bool((s > 0).all())
    assert float(p.sum()) == pytest.approx(float(precision.sum()), rel=1e-12)
    assert float((p * m).sum()) == pytest.approx(float((precision * mean).sum()), rel=1e-10)
    second = float((precision * (mean.square() + variance)).sum())
    floor = float(p.sum()) * (1e-2 * atoms.cell) ** 2
    assert second * (1 - 1e-12) <= float((p * (m.square() + s.square())).sum()) <= second * (1 + 1e-12) + floor


def test_pooled_atoms_are_the_atoms_of_the_pool():
    one, other = weights_met(3, seed=1), weights_met(3, seed=2)
    pooled = Atoms.of(*one, 3).add(Atoms.of(*other, 3))
    whole = Atoms.of(*(torch.cat(pair) for pair in zip(one, other, strict=True)), 3)
    torch.testing.assert_close(pooled.moments, whole.moments)
    assert pooled.cell == whole.cell


@pytest.mark.parametrize("width", [2, 3, 4])
def test_designs_on_atoms_are_designs_on_the_weights(width):
    mean, variance, precision = weights_met(width)
    raw = mean.flatten(), variance.flatten().sqrt(), precision.flatten()
    atoms = Atoms.of(mean, variance, precision, width)
    start = torch.arange(2**width, dtype=torch.float64)
    by_atoms, by_weights = (expected_lloyd(*source, start) for source in (atoms.gaussians(), raw))
    np.testing.assert_allclose(by_atoms, by_weights, atol=0.05)
    assert expected_distortion(*raw, by_atoms) == pytest.approx(float(expected_distortion(*raw, by_weights)), rel=1e-3)
    assert expected_distortion(*atoms.gaussians(), start) == pytest.approx(
        float(expected_distortion(*raw, start)), rel=1e-3
    )


# ------------------------------------------------------------------------------------------------------- level sums


# ----------------------------------------------------------------------------------------------------------- tables


def test_the_level_unit_is_the_step_of_the_best_uniform_code():
    assert level_unit(3) == pytest.approx(0.5860, abs=1e-4)  # Max (1960)


@pytest.mark.parametrize("widths", [(), (2,), (2, 3, 4), (2, 3, 4, 5, 6)])
def test_tables_cost_what_is_stored_for_them(widths):
    rows = (*widths, 8)
    tensor = QuantizedTensor(
        codes=torch.zeros(len(rows), 4, dtype=torch.uint8),
        width=torch.tensor(rows, dtype=torch.uint8),
        scale=torch.ones(len(rows), 1, dtype=torch.float16),
        zero=torch.zeros(len(rows), 1, dtype=torch.uint8),
        code=shared_code({w: Codebook(f"levels/{w}", normal_levels("lloyd", w).to(torch.float16)) for w in widths}),
    )
    buffers, _ = pack_model({"layer": tensor})
    stored = sum(8 * b.numel() * b.element_size() for name, b in buffers.items() if name.startswith(CODEBOOK_PREFIX))
    assert stored == table_bits(widths)


def test_tables_are_for_models_large_enough_to_pay_for_them():
    """x bits a weight more or less change a risk that goes as 2**(-2 bits) by the factor 2 ln 2 x."""
    for weights in (1000, 20_000, 40_000, 80_000, 10**6, 10**9):
        worth = []
        for width in range(2, 9):
            bits_per_weight = 16 * 2**width / weights
            if math.log(2.0 ** (2 * bits_per_weight)) <= 0.005 and width <= 6:
                worth.append(width)
        assert table_widths(weights) == tuple(worth)
    assert table_widths(10**9) == (2, 3, 4, 5, 6) and table_widths(1000) == ()
