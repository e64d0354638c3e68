"""The prior precision against the evidence, of one layer and of all."""

import math

import numpy as np
import pytest
import torch
from posterior_layers import KINDS, N, dense_precision, fitted, posterior_of, problem
from scipy import optimize

from bayesq.contract import LayerProblem
from bayesq.posterior import Kfac
from bayesq.posterior.evidence import LARGEST_PRIOR_PRECISION, prior_precision_by_evidence
from bayesq.posterior.factors import shrink


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


@pytest.mark.parametrize("kind", KINDS)
def test_fit_chooses_the_prior_by_the_evidence_of_its_own_fisher(kind):
    posterior, layer = fitted(kind)
    if kind in ("diag", "ekfac"):
        name = {"diag": "fisher_diagonal", "ekfac": "fisher_eigenvalues"}[kind]
        eigenvalues = layer.statistic(name).double().flatten().numpy()
    elif kind == "lowrank":  # of the two parts of F
        u = layer.statistic("gradient_directions").double().flatten(1).numpy()
        rest = layer.statistic("fisher_diagonal").double().flatten().numpy() - (u**2).sum(0)
        eigenvalues = np.concatenate([rest.clip(0), np.linalg.eigvalsh(u @ u.T)])
    else:
        g = shrink(layer.statistic("gradient_moment"), 0.3)
        blocks = [torch.kron(x, y) for x, y in zip(g, layer.statistic("input_moment"), strict=True)]
        eigenvalues = np.concatenate([np.linalg.eigvalsh(block.numpy()) for block in blocks])
    expected = most_likely_prior(N * eigenvalues, float(layer.weight.double().square().sum()))
    assert posterior.prior_precision == pytest.approx(expected, rel=1e-4)
    assert layer.notes["prior_precision"] == posterior.prior_precision
    assert layer.notes["effective_parameters"] == posterior.effective_parameters
    assert 0 < posterior.effective_parameters < layer.weight.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_prior_precision_overrides_the_evidence(kind):
    for tau in (0.5 if kind == "lowrank" else 0.0, 7.5):
        posterior = posterior_of(kind, tau).fit(layer := problem())
        assert posterior.prior_precision == layer.notes["prior_precision"] == tau
        assert posterior.effective_parameters is None and "effective_parameters" not in layer.notes
    assert problem().notes == {}


def test_the_diagonals_evidence_is_that_of_a_diagonal_posterior():
    """K-FAC's own diagonal, taken for the Fisher of a diagonal Laplace, asks for the same tau."""
    layer = problem()
    kronecker = Kfac(None, N, None, 0.5, evidence="diagonal")
    a, g = kronecker._factors(layer)
    diagonal = torch.einsum("grr,gcc->grc", g, a)
    tau, gamma = prior_precision_by_evidence(diagonal, float(layer.weight.double().square().sum()), N)
    posterior = kronecker.fit(layer)
    assert posterior.prior_precision == pytest.approx(tau, rel=1e-5)
    assert posterior.effective_parameters == pytest.approx(gamma, rel=1e-5)
    whole = Kfac(None, N, None, 0.5, evidence="eigenvalues").fit(problem())
    assert posterior.prior_precision != whole.prior_precision
    with pytest.raises(ValueError, match=r"posterior\.evidence=guess"):
        Kfac(None, N, None, 0.5, evidence="guess")


def test_a_second_fit_is_the_first_without_its_eigenvalues(monkeypatch):
    layer = problem()
    first = Kfac(None, N, None, 0.5).fit(layer)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda _: pytest.fail("eigenvalues computed twice"))
    second = Kfac(None, N, None, 0.5).fit(layer)
    torch.testing.assert_close(second.input_factor, first.input_factor, rtol=0, atol=0)
    torch.testing.assert_close(second.gradient_factor, first.gradient_factor, rtol=0, atol=0)


def test_low_rank_effective_parameters_are_the_dense_ones_but_for_the_rank():
    posterior, _ = fitted("lowrank")
    tau = posterior.prior_precision
    eigenvalues = N * np.linalg.eigvalsh(dense_precision(posterior)) - tau
    true = (eigenvalues / (eigenvalues + tau)).sum()
    assert true <= posterior.effective_parameters <= true + 3


def several() -> list[LayerProblem]:
    layers = [problem(), problem(rows=2, columns=5), problem(groups=1)]
    for i, layer in enumerate(layers):
        layer.weight, layer.name = (0.1 + i) * layer.weight, f"layer{i}"
    return layers


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_prior_maximises_the_evidence_of_all_layers(kind):
    layers, posterior = several(), posterior_of(kind, prior_scope="global")
    spectra = [posterior.spectrum(layer).flatten().double().numpy() for layer in layers]
    posterior.prepare(layers)
    norm = sum(float(layer.weight.double().square().sum()) for layer in layers)
    tau = most_likely_prior(N * np.concatenate(spectra), norm)
    for layer, f in zip(layers, spectra, strict=True):
        assert layer.notes["prior_precision"] == pytest.approx(tau, rel=1e-4)
        assert layer.notes["effective_parameters"] == pytest.approx((N * f / (N * f + tau)).sum(), rel=1e-4)
        assert posterior.fit(layer).prior_precision == layer.notes["prior_precision"]
    assert len({layer.notes["prior_precision"] for layer in layers}) == 1
    single = [posterior_of(kind).fit(layer).prior_precision for layer in several()]
    assert min(single) < 0.9 * tau and 1.1 * tau < max(single)


@pytest.mark.parametrize("settings", [{}, {"prior_precision": 2.0, "prior_scope": "global"}])
def test_prepare_does_nothing_where_there_is_nothing_to_share(settings):
    layers = several()
    posterior = posterior_of("kfac", **settings)
    posterior.prepare(layers)
    assert all(layer.notes == {} for layer in layers)
    assert math.isfinite(posterior.fit(layers[0]).prior_precision)


def test_a_second_prepare_changes_nothing(monkeypatch):
    layers, posterior = several(), posterior_of("kfac", prior_scope="global")
    posterior.prepare(layers)
    notes = [dict(layer.notes) for layer in layers]
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda _: pytest.fail("eigenvalues computed twice"))
    posterior.prepare(layers)
    assert [layer.notes for layer in layers] == notes


def test_a_global_prior_without_all_layers_is_refused():
    with pytest.raises(RuntimeError, match="has not seen layer layer"):
        posterior_of("diag", prior_scope="global").fit(problem())
