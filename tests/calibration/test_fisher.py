"""Gradient directions and eigenvalues against the dense Fisher."""

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, dense_statistics, seeded
from tiny_sets import collect, images, one_by_one, open_calibration, sentences

from bayesq.calibration import samples
from bayesq.fisher import FISHER_EIGENVALUES, GradientDirections, truncate
from bayesq.quant.layers import quantizable_layers, weight_to_matrix


@pytest.mark.parametrize(("module", "examples"), [(TinyConvNet(3), images()), (TinyEncoder(3), sentences(9, False))])
def test_all_gradient_directions_give_the_dense_fisher(module, examples):
    """Five or six examples with three classes: their gradients have rank 12 at most."""
    module = seeded(module)
    found = collect(module, examples, statistics=(GradientDirections(16),))["gradient_directions"]
    for name, layer in quantizable_layers(module).items():
        fisher = dense_statistics(module, name, one_by_one(examples)).fisher
        assert found[name].shape == (16, *weight_to_matrix(layer).shape)
        u = found[name].flatten(1).double().numpy()
        np.testing.assert_allclose(u.T @ u, fisher, rtol=1e-3, atol=1e-5 * np.abs(fisher).max())


def test_few_gradient_directions_are_nearly_the_best_and_never_exceed_the_fisher():
    module, rank = seeded(TinyConvNet(3)), 4
    examples = images(40)
    found = collect(module, examples, statistics=(GradientDirections(rank),))["gradient_directions"]
    for name in ("stem", "grouped"):
        fisher = dense_statistics(module, name, one_by_one(examples)).fisher
        u = found[name].flatten(1).double().numpy()
        values = np.linalg.eigvalsh(fisher)
        assert np.linalg.eigvalsh(fisher - u.T @ u).min() > -1e-6 * values[-1]
        assert (u**2).sum() > 0.9 * values[-rank:].sum()
        dimensions = np.linalg.matrix_rank(fisher, tol=1e-6 * values[-1])
        assert dimensions > 2 * GradientDirections(rank).sketch_rows  # something was dropped


def test_truncation_keeps_the_largest_part():
    rows = torch.randn(7, 12, generator=torch.Generator().manual_seed(8))
    kept = truncate(rows, 3).double()
    _, values, right = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    expected = right[:3].T @ np.diag(values[:3] ** 2) @ right[:3]
    np.testing.assert_allclose(kept.T @ kept, expected, rtol=1e-4, atol=1e-4)
    assert truncate(rows, 20).shape == (7, 12)


@pytest.mark.parametrize("limit", [1, 2**25])
@pytest.mark.parametrize(("module", "examples"), [(TinyConvNet(3), images()), (TinyEncoder(3), sentences(9, False))])
def test_eigenvalues_are_the_dense_fishers_diagonal_in_the_factors_eigenbasis(
    module, examples, limit, tmp_path, monkeypatch
):
    monkeypatch.setattr(samples, "PART_ELEMENTS", limit)
    module = seeded(module)
    opened = open_calibration(module, tmp_path, examples)
    opened.prepare([FISHER_EIGENVALUES])
    for name, layer in quantizable_layers(module).items():
        groups, rows, columns = weight_to_matrix(layer).shape
        dense = dense_statistics(module, name, one_by_one(examples))
        for g in range(groups):
            q_a, q_g = (opened.statistic(name, f"{kind}_basis")[g].double().numpy() for kind in ("input", "gradient"))
            for q, moment in ((q_a, dense.input_moment[g]), (q_g, dense.gradient_moment[g])):
                np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-6)
                turned = q.T @ moment @ q
                assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-5 * np.abs(moment).max()
            block = slice(g * rows * columns, (g + 1) * rows * columns)
            basis = np.kron(q_g, q_a)
            expected = np.diag(basis.T @ dense.fisher[block, block] @ basis).reshape(rows, columns)
            found = opened.statistic(name, "fisher_eigenvalues")[g]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_at_least_one_direction():
    with pytest.raises(ValueError, match=r"posterior\.rank=0"):
        GradientDirections(0)
