"""Posteriors against dense matrices: precision, variance, risk, and the prior precision against the evidence itself."""

import math

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, dense_statistics, seeded
from scipy import optimize
from torch import Tensor, nn

from bayesq.posterior import (
    LARGEST_PRIOR_PRECISION,
    Diagonal,
    DiagonalPosterior,
    Kfac,
    KroneckerPosterior,
    factored_damping,
    prior_precision_by_evidence,
    shrink,
)
from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.quant.method import LayerProblem
from bayesq.suite.calibration import Collector
from bayesq.suite.models.base import Batch

N = 50


def moment(size: int, groups: int, seed: int, rank: int | None = None) -> Tensor:
    """Random second moments [g, size, size], float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return x @ x.transpose(1, 2) / x.shape[2]


def problem(groups: int = 2, rows: int = 3, columns: int = 4, **statistics: Tensor) -> LayerProblem:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(groups, rows, columns, generator=generator)
    given = {
        "input_moment": moment(columns, groups, 1),
        "gradient_moment": 0.1 * moment(rows, groups, 2),
        "fisher_diagonal": torch.rand(groups, rows, columns, generator=generator) ** 3,
        **statistics,
    }
    return LayerProblem("layer", "Conv2d", weight, given.__getitem__)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    whole, start = np.zeros((size, size)), 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole


def dense_precision(posterior: DiagonalPosterior | KroneckerPosterior) -> np.ndarray:
    """P for the weight [g, r, c] flattened: rows vary slower than columns, hence kron(G, A)."""
    if isinstance(posterior, DiagonalPosterior):
        return np.diag(posterior.precision.flatten().numpy())
    return block_diagonal(
        [torch.kron(g, a).numpy() for a, g in zip(posterior.input_factor, posterior.gradient_factor, strict=True)]
    )


# ------------------------------------------------------------------------------------- the Fisher of a tiny network


def collected(module: nn.Module, images: Tensor) -> dict[str, LayerProblem]:
    layers = quantizable_layers(module)
    kinds = ("input_moment", "gradient_moment", "fisher_diagonal")
    collector = Collector(module, layers, kinds, None, torch.Generator())
    for index in torch.arange(len(images)).split(2):
        collector.add(Batch({"image": images[index]}, torch.zeros(len(index), dtype=torch.int64), index))
    statistics = {kind: collector.statistics(kind)[0] for kind in kinds}
    return {
        name: LayerProblem(
            name, type(layer).__name__, weight_to_matrix(layer), lambda kind, name=name: statistics[kind][name]
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("name", ["stem", "grouped", "head"])
def test_diagonal_precision_is_the_dense_fishers_diagonal(name):
    module = seeded(TinyConvNet())
    images = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    dense = dense_statistics(module, name, [{"image": image[None]} for image in images])
    layer = collected(module, images)[name]
    posterior = Diagonal(3.0, N, None).fit(layer)
    expected = np.diag(dense.fisher).reshape(layer.weight.shape) + 3.0 / N
    np.testing.assert_allclose(posterior.precision, expected, rtol=1e-4)
    np.testing.assert_allclose(posterior.variance(), 1 / (N * expected), rtol=1e-4)


def test_kfac_is_the_dense_fisher_where_that_is_a_kronecker_product():
    """A linear layer, one example, one position: F = (diag p - p pT) (x) x xT exactly."""
    module = seeded(TinyConvNet())
    image = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    dense = dense_statistics(module, "head", [{"image": image}])
    posterior = Kfac(0.0, N, None, shrinkage=0.0).fit(collected(module, image)["head"])
    np.testing.assert_allclose(dense_precision(posterior), dense.fisher, rtol=1e-4, atol=1e-7)
    assert np.abs(dense.fisher).max() > 1e-3


def test_kfac_factors_are_damped_moments():
    layer = problem()
    posterior = Kfac(2.0, N, None, shrinkage=0.25).fit(layer)
    for g in range(2):
        a = layer.statistic("input_moment")[g].numpy()
        every = layer.statistic("gradient_moment").numpy()
        shrunk = 0.75 * every[g] + 0.25 * np.mean([every[h, i, i] for h in range(2) for i in range(3)]) * np.eye(3)
        pi = math.sqrt(np.linalg.eigvalsh(a).mean() / np.linalg.eigvalsh(shrunk).mean())
        np.testing.assert_allclose(posterior.input_factor[g], a + pi * math.sqrt(2.0 / N) * np.eye(4), rtol=1e-10)
        np.testing.assert_allclose(
            posterior.gradient_factor[g], shrunk + math.sqrt(2.0 / N) / pi * np.eye(3), rtol=1e-10
        )


def test_factored_damping_keeps_the_product_of_the_shifts_and_balances_the_factors():
    a, g = moment(4, 2, 3), 1e-6 * moment(3, 2, 4)
    damped_a, damped_g = factored_damping(a, g, 0.04)
    for k in range(2):
        shift_a, shift_g = float((damped_a - a)[k, 0, 0]), float((damped_g - g)[k, 0, 0])
        assert shift_a * shift_g == pytest.approx(0.04, rel=1e-8)
        assert shift_a / float(a[k].trace() / 4) == pytest.approx(shift_g / float(g[k].trace() / 3), rel=1e-8)


def test_factored_damping_survives_a_layer_nothing_reaches():
    for a, g in ((torch.zeros(1, 2, 2), torch.eye(2)[None]), (torch.eye(2)[None], torch.zeros(1, 2, 2))):
        damped = factored_damping(a.double(), g.double(), 0.01)
        assert all(bool(torch.isfinite(x).all()) and float(torch.linalg.eigvalsh(x).min()) > 0 for x in damped)


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_shrinkage_keeps_the_mean_of_the_diagonal(amount):
    g = moment(4, 3, 5)
    shrunk = shrink(g, amount)
    assert float(shrunk.diagonal(dim1=1, dim2=2).mean()) == pytest.approx(float(g.diagonal(dim1=1, dim2=2).mean()))
    spread = (shrunk - shrunk.diagonal(dim1=1, dim2=2).mean() * torch.eye(4, dtype=torch.float64)).norm()
    full = (g - g.diagonal(dim1=1, dim2=2).mean() * torch.eye(4, dtype=torch.float64)).norm()
    assert float(spread) == pytest.approx((1 - amount) * float(full), abs=1e-12)


# ---------------------------------------------------------------------------------------------------- risk, variance


def fitted(kind: str) -> tuple[DiagonalPosterior | KroneckerPosterior, LayerProblem]:
    layer = problem()
    return (Diagonal(None, N, None) if kind == "diag" else Kfac(None, N, None, shrinkage=0.3)).fit(layer), layer


@pytest.mark.parametrize("kind", ["diag", "kfac"])
def test_risk_is_half_the_dense_quadratic_form(kind):
    posterior, layer = fitted(kind)
    dense = dense_precision(posterior)
    delta = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    d = delta.flatten().numpy()
    assert float(posterior.risk(delta).sum()) == pytest.approx(0.5 * d @ dense @ d, rel=1e-10)
    assert posterior.risk(delta).shape == posterior.row_risk(delta).shape == (2, 3)
    for g in range(2):
        for r in range(3):
            own = torch.zeros_like(delta)
            own[g, r] = delta[g, r]
            own_flat = own.flatten().numpy()
            assert float(posterior.risk(delta)[g, r]) == pytest.approx(0.5 * own_flat @ dense @ d, rel=1e-9)
            assert float(posterior.row_risk(delta)[g, r]) == pytest.approx(0.5 * own_flat @ dense @ own_flat, rel=1e-9)


@pytest.mark.parametrize("kind", ["diag", "kfac"])
def test_variance_is_the_dense_inverses_diagonal(kind):
    posterior, layer = fitted(kind)
    dense = dense_precision(posterior)
    shape = layer.weight.shape
    np.testing.assert_allclose(posterior.variance(), np.diag(np.linalg.inv(N * dense)).reshape(shape), rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------- evidence


def most_likely_prior(scaled: np.ndarray, squared_norm: float) -> float:
    """argmax over tau of log evidence = 1/2 sum_i log(tau / (N f_i + tau)) - tau/2 ||mu||^2 + const.

    The prior N(0, 1/tau) contributes D/2 log tau - tau/2 ||mu||^2, the Laplace integral -1/2 sum_i log(N f_i + tau).
    """

    def minus_log_evidence(log_tau: float) -> float:
        return 0.5 * np.log1p(scaled * np.exp(-log_tau)).sum() + 0.5 * np.exp(log_tau) * squared_norm

    grid = np.linspace(-30, 30, 601)
    best = grid[np.argmin([minus_log_evidence(x) for x in grid])]
    found = optimize.minimize_scalar(
        minus_log_evidence, bounds=(best - 0.2, best + 0.2), method="bounded", options={"xatol": 1e-10}
    )
    return math.exp(found.x)


@pytest.mark.parametrize(
    ("eigenvalues", "squared_norm"),
    [
        (np.random.default_rng(0).lognormal(-8, 3, 400), 2.0),
        (np.random.default_rng(1).lognormal(0, 1, 50), 0.01),  # the data determine everything
        (np.random.default_rng(2).lognormal(-18, 1, 3000), 5.0),  # hardly anything: the plain iteration swings for ever
        (np.full(1000, 1e-5), 1.0),
        (np.concatenate([np.zeros(500), np.ones(3)]), 1.0),
        (np.array([1e3]), 4.0),
    ],
)
def test_prior_precision_maximises_the_evidence(eigenvalues, squared_norm):
    n = 100_000
    tau, gamma = prior_precision_by_evidence(torch.from_numpy(eigenvalues), squared_norm, n)
    assert tau == pytest.approx(most_likely_prior(n * eigenvalues, squared_norm), rel=1e-4)
    assert gamma == pytest.approx((n * eigenvalues / (n * eigenvalues + tau)).sum(), rel=1e-4)
    assert tau == pytest.approx(gamma / squared_norm, rel=1e-4)


def test_prior_precision_is_finite_without_evidence():
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert prior_precision_by_evidence(ones, 0.0, N) == (LARGEST_PRIOR_PRECISION, 0.0)
    assert prior_precision_by_evidence(zeros, 4.0, N) == (0.25, 0.0)
    assert prior_precision_by_evidence(-1e-9 * ones, 4.0, N) == (0.25, 0.0)  # round-off of a singular moment


@pytest.mark.parametrize("kind", ["diag", "kfac"])
def test_fit_chooses_the_prior_by_the_evidence_of_its_own_fisher(kind):
    posterior, layer = fitted(kind)
    if kind == "diag":
        eigenvalues = layer.statistic("fisher_diagonal").double().flatten().numpy()
    else:
        g = shrink(layer.statistic("gradient_moment"), 0.3)
        blocks = [torch.kron(x, y) for x, y in zip(g, layer.statistic("input_moment"), strict=True)]
        eigenvalues = np.concatenate([np.linalg.eigvalsh(block.numpy()) for block in blocks])
    expected = most_likely_prior(N * eigenvalues, float(layer.weight.double().square().sum()))
    assert posterior.prior_precision == pytest.approx(expected, rel=1e-4)
    assert layer.notes["prior_precision"] == posterior.prior_precision
    assert layer.notes["effective_parameters"] == posterior.effective_parameters
    assert 0 < posterior.effective_parameters < layer.weight.numel()


@pytest.mark.parametrize("kind", ["diag", "kfac"])
def test_a_given_prior_precision_overrides_the_evidence(kind):
    for tau in (0.0, 7.5):
        posterior = (Diagonal(tau, N, None) if kind == "diag" else Kfac(tau, N, None, 0.5)).fit(layer := problem())
        assert posterior.prior_precision == layer.notes["prior_precision"] == tau
        assert math.isfinite(posterior.effective_parameters)
    assert problem().notes == {}


def test_a_second_fit_is_the_first_without_its_eigenvalues(monkeypatch):
    layer = problem()
    first = Kfac(None, N, None, 0.5).fit(layer)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda _: pytest.fail("eigenvalues computed twice"))
    second = Kfac(None, N, None, 0.5).fit(layer)
    torch.testing.assert_close(second.input_factor, first.input_factor, rtol=0, atol=0)
    torch.testing.assert_close(second.gradient_factor, first.gradient_factor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"prior_precision": -1.0}, "posterior.prior_precision"),
        ({"prior_precision": math.nan}, "posterior.prior_precision"),
        ({"num_data": 0}, "posterior.num_data"),
        ({"samples": 0}, "posterior.samples"),
        ({"shrinkage": 1.5}, "posterior.shrinkage"),
        ({"shrinkage": -0.1}, "posterior.shrinkage"),
    ],
)
def test_impossible_settings_name_their_key(arguments, key):
    defaults = {"prior_precision": None, "num_data": N, "samples": None, "shrinkage": 0.5}
    with pytest.raises(ValueError, match=key):
        Kfac(**{**defaults, **arguments})
    if "shrinkage" not in arguments:
        with pytest.raises(ValueError, match=key):
            Diagonal(**{key: value for key, value in {**defaults, **arguments}.items() if key != "shrinkage"})
