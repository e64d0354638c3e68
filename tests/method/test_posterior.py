"""Posteriors against dense matrices: precision, variance, risk and draws."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, dense_statistics, seeded
from posterior_layers import KINDS, N, dense_precision, fitted, moment, problem
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration.passes import CalibrationSettings
from bayesq.contract import LayerProblem
from bayesq.likelihood import LIKELIHOODS
from bayesq.posterior import Diagonal, Ekfac, Kfac, LowRank, LowRankPosterior
from bayesq.posterior.factors import factored_damping, proper_root, shrink
from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.suite.calibration import Calibration
from bayesq.suite.models.base import state_checksum

# ------------------------------------------------------------------------------------- the Fisher of a tiny network


def collected(
    module: nn.Module, examples: TensorExamples, folder: Path, likelihood: str = "categorical"
) -> dict[str, LayerProblem]:
    layers = quantizable_layers(module)
    calibration = Calibration(
        module,
        layers,
        examples,
        CalibrationSettings(batch_size=2, samples=None, seed=0, likelihood=LIKELIHOODS[likelihood]),
        torch.device("cpu"),
        identity=state_checksum(module),
        cache_dir=folder,
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


def test_more_directions_than_calibration_kept_are_refused():
    with pytest.raises(ValueError, match=r"posterior\.rank=4: the calibration has 3"):
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
