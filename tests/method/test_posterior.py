"""Posteriors against dense matrices: precision, variance, risk, draws, and the prior precision against the evidence."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, dense_statistics, seeded
from scipy import optimize
from torch import Tensor, nn

from bayesq.calibration.passes import CalibrationSettings
from bayesq.likelihood import LIKELIHOODS
from bayesq.posterior import (
    LARGEST_PRIOR_PRECISION,
    Diagonal,
    DiagonalPosterior,
    Ekfac,
    EkfacPosterior,
    Kfac,
    KroneckerPosterior,
    LayerPosterior,
    LowRank,
    LowRankPosterior,
    factored_damping,
    prior_precision_by_evidence,
    proper_root,
    shrink,
)
from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.quant.method import LayerProblem
from bayesq.suite.calibration import Calibration
from bayesq.suite.models.base import TensorExamples, state_checksum

N = 50
KINDS = ("diag", "kfac", "ekfac", "lowrank")


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
        "gradient_directions": 0.2 * torch.randn(3, groups, rows, columns, generator=generator),
        "fisher_eigenvalues": torch.rand(groups, rows, columns, generator=generator) ** 3,
        **statistics,
    }
    given["fisher_diagonal"] = given["fisher_diagonal"] + given["gradient_directions"].square().sum(0)
    for factor in ("input", "gradient"):
        given[f"{factor}_basis"] = torch.linalg.eigh(given[f"{factor}_moment"])[1]
    return LayerProblem("layer", "Conv2d", weight, given.__getitem__)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    whole, start = np.zeros((size, size)), 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole


def dense_precision(posterior: LayerPosterior) -> np.ndarray:
    """P for the weight [g, r, c] flattened: rows vary slower than columns, hence kron(G, A)."""
    if isinstance(posterior, DiagonalPosterior):
        return np.diag(posterior.precision.flatten().numpy())
    if isinstance(posterior, LowRankPosterior):
        whole = np.diag(posterior.residual.flatten().numpy())
        for u in posterior.directions.flatten(1).numpy():
            whole += np.outer(u, u)
        return whole
    if isinstance(posterior, EkfacPosterior):
        bases = [
            np.kron(q_g, q_a)
            for q_a, q_g in zip(posterior.input_basis.numpy(), posterior.gradient_basis.numpy(), strict=True)
        ]
        values = posterior.eigenvalues.flatten(1).numpy()
        return block_diagonal([q @ np.diag(v) @ q.T for q, v in zip(bases, values, strict=True)])
    assert isinstance(posterior, KroneckerPosterior)
    return block_diagonal(
        [torch.kron(g, a).numpy() for a, g in zip(posterior.input_factor, posterior.gradient_factor, strict=True)]
    )


# ------------------------------------------------------------------------------------- the Fisher of a tiny network


def collected(
    module: nn.Module, examples: TensorExamples, folder: Path, likelihood: str = "categorical"
) -> dict[str, LayerProblem]:
    layers = quantizable_layers(module)
    calibration = Calibration(
        module,
        state_checksum(module),
        layers,
        examples,
        CalibrationSettings(batch_size=2, samples=None, seed=0, likelihood=LIKELIHOODS[likelihood]),
        folder,
        torch.device("cpu"),
    )
    lowrank = LowRank(1.0, N, None, rank=16)
    calibration.prepare(Diagonal.statistics | Kfac.statistics | Ekfac.statistics | lowrank.statistics)
    return {
        name: LayerProblem(name, type(layer).__name__, weight_to_matrix(layer), partial(calibration.statistic, name))
        for name, layer in layers.items()
    }


def images(count: int = 5) -> TensorExamples:
    generator = torch.Generator().manual_seed(1)
    return TensorExamples({"image": torch.randn(count, 2, 6, 6, generator=generator)}, torch.zeros(count).long())


def sentences() -> TensorExamples:
    """Padded to 6 tokens, with other ids beyond the ends."""
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(6) < torch.tensor([3, 6, 1, 4])[:, None]).long()
    return TensorExamples({"input_ids": ids, "attention_mask": mask}, torch.zeros(4).long())


def one_by_one(examples: TensorExamples) -> list[dict[str, Tensor]]:
    """Each example alone, without any padding."""
    found = []
    for i in range(len(examples)):
        inputs = {name: value[i : i + 1] for name, value in examples.inputs.items()}
        if "attention_mask" in inputs:
            inputs = {name: value[:, : int(inputs["attention_mask"].sum())] for name, value in inputs.items()}
        found.append(inputs)
    return found


NETWORKS = {
    "images": (TinyConvNet, images, ("stem", "grouped", "head")),
    "text": (TinyEncoder, sentences, ("key", "up")),
}
LAYERS = [(network, name) for network, (_, _, names) in NETWORKS.items() for name in names]


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize(("network", "name"), LAYERS)
def test_posteriors_are_approximations_of_the_dense_fisher(network, name, likelihood, tmp_path):
    """Each as its definition says: a diagonal, a projection onto K-FAC's eigenbasis, or all of it with enough rank."""
    build, examples, _ = NETWORKS[network]
    module, tau = seeded(build(3)), 3.0
    fisher = dense_statistics(module, name, one_by_one(examples()), likelihood).fisher
    layer = collected(module, examples(), tmp_path, likelihood=likelihood)[name]
    expected = fisher + tau / N * np.eye(len(fisher))
    close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(fisher).max()}
    np.testing.assert_allclose(dense_precision(Diagonal(tau, N, None).fit(layer)), np.diag(np.diag(expected)), **close)

    ekfac = Ekfac(tau, N, None).fit(layer)
    groups, rows, columns = layer.weight.shape
    size = rows * columns
    for g in range(groups):
        block = slice(g * size, (g + 1) * size)
        q = np.kron(ekfac.gradient_basis[g].numpy(), ekfac.input_basis[g].numpy())
        turned = np.diag(q.T @ expected[block, block] @ q)
        np.testing.assert_allclose(dense_precision(ekfac)[block, block], q @ np.diag(turned) @ q.T, **close)

    lowrank = LowRank(tau, N, None, rank=16).fit(layer)  # 5 examples and 3 outputs have no more directions
    np.testing.assert_allclose(dense_precision(lowrank), expected, **close)
    truncated = LowRank(tau, N, None, rank=1).fit(layer)
    np.testing.assert_allclose(np.diag(dense_precision(truncated)), np.diag(expected), **close)
    below = dense_precision(truncated) - np.diag(truncated.residual.flatten().numpy())
    assert np.linalg.eigvalsh(fisher - below).min() > -close["atol"]  # directions are summed in float32
    assert np.linalg.eigvalsh(below)[-1] > 0.9 * np.linalg.eigvalsh(fisher)[-1]


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.skipif(not __debug__, reason="torch differentiates no softmax forwards under python -O")
def test_against_curvlinops(likelihood, tmp_path):
    """Fisher, K-FAC and EKFAC of another implementation, for the same network."""
    curvlinops = pytest.importorskip("curvlinops")
    module = seeded(TinyConvNet(3)).double()
    examples = images()
    problems = collected(seeded(TinyConvNet(3)), examples, tmp_path, likelihood=likelihood)
    if likelihood == "categorical":
        data, loss = [(examples.inputs["image"].double(), examples.labels)], nn.CrossEntropyLoss()
        scale = 1.0
    else:  # its squared error is a mean over outputs without a factor 1/2
        data, loss = [(examples.inputs["image"].double(), torch.zeros(5, 3).double())], nn.MSELoss()
        scale = 3 / 2
    kfac_arguments = {"fisher_type": "type-2", "kfac_approx": "expand"}
    for name in ("stem", "grouped", "head"):
        weight = [module.get_submodule(name).weight]
        eye = torch.eye(weight[0].numel(), dtype=torch.float64)
        fisher = scale * (curvlinops.GGNLinearOperator(module, loss, weight, data) @ eye).numpy()
        close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(fisher).max()}
        diagonal = Diagonal(1e-9, 1, None).fit(problems[name])
        np.testing.assert_allclose(diagonal.diagonal().flatten(), np.diag(fisher), **close)
        lowrank = LowRank(1e-9, 1, None, rank=16).fit(problems[name])
        np.testing.assert_allclose(dense_precision(lowrank), fisher, **close)
        if name == "grouped":  # curvlinops knows no groups
            continue
        kfac = scale * (curvlinops.KFACLinearOperator(module, loss, weight, data, **kfac_arguments) @ eye).numpy()
        exact = replace(problems[name], notes={})  # without the prior noted above
        ours = dense_precision(Kfac(0.0, 1, None, shrinkage=0.0).fit(exact))
        np.testing.assert_allclose(ours, kfac, rtol=1e-3, atol=1e-5 * np.abs(kfac).max())
        ekfac = scale * (curvlinops.EKFACLinearOperator(module, loss, weight, data, **kfac_arguments) @ eye).numpy()
        ours = dense_precision(Ekfac(0.0, 1, None).fit(exact))
        np.testing.assert_allclose(ours, ekfac, rtol=1e-3, atol=1e-4 * np.abs(ekfac).max())


@pytest.mark.parametrize("name", ["stem", "grouped", "head"])
def test_diagonal_precision_is_the_dense_fishers_diagonal(name, tmp_path):
    module = seeded(TinyConvNet())
    dense = dense_statistics(module, name, one_by_one(images()))
    layer = collected(module, images(), tmp_path)[name]
    posterior = Diagonal(3.0, N, None).fit(layer)
    expected = np.diag(dense.fisher).reshape(layer.weight.shape) + 3.0 / N
    np.testing.assert_allclose(posterior.precision, expected, rtol=1e-4)
    np.testing.assert_allclose(posterior.variance(), 1 / (N * expected), rtol=1e-4)


def test_kfac_is_the_dense_fisher_where_that_is_a_kronecker_product(tmp_path):
    """A linear layer, one example, one position: F = (diag p - p pT) (x) x xT exactly."""
    module = seeded(TinyConvNet())
    dense = dense_statistics(module, "head", one_by_one(images(1)))
    layer = collected(module, images(1), tmp_path)["head"]
    posterior = Kfac(0.0, N, None, shrinkage=0.0).fit(layer)
    np.testing.assert_allclose(dense_precision(posterior), dense.fisher, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(dense_precision(Ekfac(0.0, N, None).fit(layer)), dense.fisher, rtol=1e-4, atol=1e-7)
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


def posterior_of(kind: str, prior_precision: float | None = None, **more):
    if kind == "diag":
        return Diagonal(prior_precision, N, None, **more)
    if kind == "kfac":
        return Kfac(prior_precision, N, None, shrinkage=0.3, evidence="eigenvalues", **more)
    if kind == "ekfac":
        return Ekfac(prior_precision, N, None, **more)
    return LowRank(prior_precision, N, None, rank=3, **more)


def fitted(kind: str) -> tuple[LayerPosterior, LayerProblem]:
    layer = problem()
    return posterior_of(kind).fit(layer), layer


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_variance_is_the_dense_inverses_diagonal(kind):
    posterior, layer = fitted(kind)
    dense = dense_precision(posterior)
    shape = layer.weight.shape
    np.testing.assert_allclose(posterior.variance(), np.diag(np.linalg.inv(N * dense)).reshape(shape), rtol=1e-9)
    np.testing.assert_allclose(posterior.diagonal(), np.diag(dense).reshape(shape), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_dense_inverse_for_covariance(kind):
    posterior, layer = fitted(kind)
    covariance = np.linalg.inv(N * dense_precision(posterior))
    generator, count = torch.Generator().manual_seed(4), 20_000
    draws = torch.stack([posterior.sample(generator) for _ in range(count)])
    assert draws.shape[1:] == layer.weight.shape and draws.dtype == torch.float64
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, draws.flatten(1).numpy().T)
    # of a standard normal: the mean of n draws is off by 1/sqrt(n), each second moment by sqrt(2/n) or less
    assert np.abs(white.mean(1)).max() < 5 / count**0.5
    assert np.abs(white @ white.T / count - np.eye(len(white))).max() < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_generators(kind):
    posterior, _ = fitted(kind)
    state = torch.get_rng_state()
    one, same, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_low_rank_variance_stays_positive_where_directions_explain_everything():
    directions = torch.randn(8, 1, 2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    posterior = LowRankPosterior(torch.full((1, 2, 4), 1e-18).double(), directions, N, 1.0, 1.0)
    assert bool((posterior.variance() >= 0.999 / (N * posterior.diagonal())).all())


def test_low_rank_residual_is_never_negative():
    layer = problem()
    layer.statistic = {
        "gradient_directions": layer.statistic("gradient_directions"),
        "fisher_diagonal": torch.zeros(2, 3, 4),
    }.get
    posterior = LowRank(2.0, N, None, rank=3).fit(layer)
    torch.testing.assert_close(posterior.residual, torch.full((2, 3, 4), 2.0 / N, dtype=torch.float64))


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


def test_the_posterior_stays_proper_where_inputs_never_came():
    """One group never saw its last input, the other any; where A is regular nothing changes."""
    posterior, _ = fitted("kfac")
    plain = posterior.variance()
    posterior.input_factor = posterior.input_factor.clone()
    posterior.input_factor[0, -1] = posterior.input_factor[0, :, -1] = 0
    variance = posterior.variance()
    assert torch.isfinite(variance).all() and (variance > 0).all()
    torch.testing.assert_close(variance[1], plain[1], rtol=1e-10, atol=0)
    assert float(variance[0, :, -1].min()) > 1e4 * float(variance[0, :, :-1].max())
    assert torch.isfinite(posterior.sample(torch.Generator().manual_seed(0))).all()
    posterior.input_factor[1] = 0
    assert torch.isfinite(posterior.variance()).all()
    with pytest.raises(ValueError, match="positive definite"):
        proper_root(-torch.eye(3, dtype=torch.float64)[None])


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


def test_more_directions_than_calibration_kept_are_refused():
    with pytest.raises(ValueError, match=r"posterior\.rank=4: the calibration kept 3"):
        LowRank(None, N, None, rank=4).fit(problem())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"prior_precision": -1.0}, "posterior.prior_precision"),
        ({"prior_precision": math.nan}, "posterior.prior_precision"),
        ({"num_data": 0}, "posterior.num_data"),
        ({"samples": 0}, "posterior.samples"),
        ({"examples": 0}, "posterior.examples"),
        ({"prior_scope": "network"}, "posterior.prior_scope"),
        ({"likelihood": "poisson"}, "posterior.likelihood"),
        ({"draws": "dice"}, "posterior.draws"),
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


@pytest.mark.parametrize(("rank", "prior_precision", "key"), [(0, None, "rank"), (4, 0.0, "prior_precision")])
def test_impossible_low_rank_settings_name_their_key(rank, prior_precision, key):
    with pytest.raises(ValueError, match=f"posterior.{key}"):
        LowRank(prior_precision, N, None, rank)
