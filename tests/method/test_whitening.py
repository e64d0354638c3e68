"""Whitening: distances in whitened coordinates, and gains that turn rounding errors into risk."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesq.contract import stack_groups
from bayesq.posterior import DiagonalPosterior, EkfacPosterior, KroneckerPosterior, LowRankPosterior
from bayesq.quant.grids import minmax_grid
from bayesq.rounding import round_layer, rounding_curvature
from bayesq.whitening import Whitening

GROUPS, ROWS, COLUMNS = 2, 5, 24
DAMPING = 0.01


def moment(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(GROUPS, size, 2 * size, generator=generator, dtype=torch.float64)
    x = x * (0.2 + torch.rand(GROUPS, size, 1, generator=generator, dtype=torch.float64)) + 0.3
    return x @ x.transpose(1, 2) / x.shape[2]


def diagonal() -> DiagonalPosterior:
    precision = torch.rand(GROUPS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).double() + 0.01
    return DiagonalPosterior(precision, 100, 1.0, 1.0)


def kronecker() -> KroneckerPosterior:
    return KroneckerPosterior(moment(COLUMNS, 1), 0.01 * moment(ROWS, 2), 100, 1.0, 1.0)


def ekfac() -> EkfacPosterior:
    a, g = moment(COLUMNS, 1), 0.01 * moment(ROWS, 2)
    eigenvalues = torch.rand(GROUPS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)).double() + 0.01
    return EkfacPosterior(a, torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1], eigenvalues, 100, 1.0, 1.0)


def low_rank() -> LowRankPosterior:
    directions = torch.randn(3, GROUPS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(6)).double()
    return LowRankPosterior(diagonal().precision, directions, 100, 1.0, 1.0)


POSTERIORS = {"diag": diagonal(), "kfac": kronecker(), "ekfac": ekfac(), "lowrank": low_rank()}


def weight(seed: int = 3) -> Tensor:
    return torch.randn(GROUPS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS)
def test_squared_distance_in_whitened_space_is_twice_the_risk(posterior):
    w, w_hat = weight(), weight(4)
    distance = (posterior.whiten(w) - posterior.whiten(w_hat)).square().sum()
    assert posterior.whiten(w).shape == w.shape
    assert float(distance) == pytest.approx(2 * float(posterior.risk(w.double() - w_hat.double()).sum()), rel=1e-10)


def test_kronecker_whitening_is_a_square_root_of_the_dense_precision():
    posterior = kronecker()
    basis = torch.eye(ROWS * COLUMNS, dtype=torch.float64).reshape(-1, ROWS, COLUMNS)
    for g in range(GROUPS):
        one = KroneckerPosterior(posterior.input_factor[g : g + 1], posterior.gradient_factor[g : g + 1], 100, 1.0, 1.0)
        root = torch.stack([one.whiten(e[None]).flatten() for e in basis], 1)
        dense = torch.kron(posterior.gradient_factor[g], posterior.input_factor[g])
        np.testing.assert_allclose(root.T @ root, dense, rtol=1e-9, atol=1e-12)


def round_coarsely(whitening: Whitening, width: int = 3):
    w = weight()
    widths = torch.full((GROUPS * ROWS,), width, dtype=torch.uint8)
    rounded = round_layer(w, whitening, *minmax_grid(stack_groups(w).double(), widths), widths, {})
    return w.double(), rounded


def one_sided_risk(delta: np.ndarray, a: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """1/2 G_rr delta_r A delta_rT of each row, by loops over columns."""
    risk = np.zeros(delta.shape[:2])
    for g, r in np.ndindex(*risk.shape):
        for i in range(delta.shape[2]):
            for j in range(delta.shape[2]):
                risk[g, r] += 0.5 * curvature[g, r] * delta[g, r, i] * a[g, i, j] * delta[g, r, j]
    return risk


def test_gains_turn_feedback_errors_into_one_sided_risk():
    posterior = kronecker()
    whitening = posterior.whitening(feedback=True, damping=DAMPING)
    w, rounded = round_coarsely(whitening)
    delta = rounded.values.reshape(w.shape) - w
    damped = np.stack([a + DAMPING * np.trace(a) / COLUMNS * np.eye(COLUMNS) for a in posterior.input_factor.numpy()])
    own = np.stack([np.diag(g) for g in posterior.gradient_factor.numpy()])
    error = (rounded.target - rounded.values).reshape(w.shape)
    by_gain = 0.5 * (whitening.row_curvature[..., None] * whitening.column_curvature * error.square()).sum(-1)
    np.testing.assert_allclose(by_gain, one_sided_risk(delta.numpy(), damped, own), rtol=1e-9)
    # feedback did something: what entries met is not the weight
    assert float((rounded.target.reshape(w.shape) - w).abs().max()) > 0.1
    # and the risk without the extra damping is the posterior's own
    without = one_sided_risk(delta.numpy(), posterior.input_factor.numpy(), own)
    np.testing.assert_allclose(posterior.row_risk(delta), without, rtol=1e-9)


@pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS)
def test_nearest_gains_are_the_precisions_diagonal(posterior):
    whitening = posterior.whitening(feedback=False, damping=DAMPING)
    assert whitening.factors is None and whitening.retries == 0
    gain = whitening.row_curvature[..., None] * whitening.column_curvature
    # an error of 1 in one weight alone has the risk P_ii / 2
    expected = torch.zeros(GROUPS, ROWS, COLUMNS, dtype=torch.float64)
    for place in np.ndindex(GROUPS, ROWS, COLUMNS):
        delta = torch.zeros(GROUPS, ROWS, COLUMNS, dtype=torch.float64)
        delta[place] = 1.0
        expected[place] = 2 * posterior.risk(delta).sum()
    torch.testing.assert_close(gain.expand_as(expected), expected)
    rows = rounding_curvature(whitening, ROWS).reshape(GROUPS, ROWS, COLUMNS)
    torch.testing.assert_close(whitening.row_curvature[..., None] * rows, expected)


@pytest.mark.parametrize("kind", ["diag", "lowrank"])
def test_diagonal_and_low_rank_posteriors_feed_nothing_back(kind):
    one, other = (POSTERIORS[kind].whitening(feedback=feedback, damping=DAMPING) for feedback in (True, False))
    assert one.factors is None and torch.equal(one.column_curvature, other.column_curvature)


def test_ekfac_feedback_is_kfacs_where_the_precision_is_a_kronecker_product():
    kfac = kronecker()
    values_a, q_a = torch.linalg.eigh(kfac.input_factor)
    values_g, q_g = torch.linalg.eigh(kfac.gradient_factor)
    eigenvalues = values_g[:, :, None] * values_a[:, None, :]
    same = EkfacPosterior(kfac.input_factor, q_a, q_g, eigenvalues, 100, 1.0, 1.0)
    expected, found = (posterior.whitening(feedback=True, damping=DAMPING) for posterior in (kfac, same))
    torch.testing.assert_close(found.row_curvature, expected.row_curvature)
    torch.testing.assert_close(found.column_curvature, expected.column_curvature)


def test_ekfac_feedback_leaves_each_row_its_trace():
    posterior = ekfac()
    whitening = posterior.whitening(feedback=True, damping=DAMPING)
    for g, r in np.ndindex(GROUPS, ROWS):
        own = sum(float(posterior.diagonal()[g, r, c]) for c in range(COLUMNS))
        assert float(whitening.row_curvature[g, r]) * float(posterior.input_moment[g].trace()) == pytest.approx(own)
    expected = kronecker().whitening(feedback=True, damping=DAMPING).column_curvature
    torch.testing.assert_close(whitening.column_curvature, expected, rtol=1e-10, atol=0)


def test_ekfac_without_inputs_keeps_finite_gains():
    posterior = ekfac()
    posterior.input_moment[0] = 0
    whitening = posterior.whitening(feedback=True, damping=DAMPING)
    assert bool(torch.isfinite(whitening.row_curvature[..., None] * whitening.column_curvature).all())


def test_feedback_gains_are_conditional_precisions():
    """1 / U_jj^2 is what A leaves of column j once all columns rounded after it have adapted."""
    posterior = kronecker()
    whitening = posterior.whitening(feedback=True, damping=0.0)
    for g in range(GROUPS):
        a = posterior.input_factor[g].numpy()
        order = sorted(range(COLUMNS), key=lambda j: (-a[j, j], j))
        for position, j in enumerate(order):
            later = order[position + 1 :]
            adapted = a[j, later] @ np.linalg.solve(a[np.ix_(later, later)], a[later, j]) if later else 0.0
            assert float(whitening.column_curvature[g, 0, j]) == pytest.approx(a[j, j] - adapted, rel=1e-8)


def test_retries_are_counted():
    singular = torch.ones(GROUPS, COLUMNS, COLUMNS, dtype=torch.float64)
    posterior = KroneckerPosterior(singular, torch.eye(ROWS).double().expand(GROUPS, -1, -1), 100, 0.0, 0.0)
    assert posterior.whitening(feedback=True, damping=0.0).retries > 0
    assert posterior.whitening(feedback=True, damping=0.01).retries == 0
