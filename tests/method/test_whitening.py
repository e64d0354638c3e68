"""Whitening: distances in whitened coordinates, and gains that turn rounding errors into risk."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesq.posterior import DiagonalPosterior, EkfacPosterior, KroneckerPosterior, LowRankPosterior
from bayesq.quant.grids import minmax_grid
from bayesq.quant.method import LayerProblem, stack_groups
from bayesq.rounding import round_layer, rounding_gain
from bayesq.whitening import Shelf, layer_whitening, whiten, whitening

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
    distance = (whiten(posterior, w) - whiten(posterior, w_hat)).square().sum()
    assert whiten(posterior, w).shape == w.shape
    assert float(distance) == pytest.approx(2 * float(posterior.risk(w.double() - w_hat.double()).sum()), rel=1e-10)


def test_kronecker_whitening_is_a_square_root_of_the_dense_precision():
    posterior = kronecker()
    basis = torch.eye(ROWS * COLUMNS, dtype=torch.float64).reshape(-1, ROWS, COLUMNS)
    for g in range(GROUPS):
        one = KroneckerPosterior(posterior.input_factor[g : g + 1], posterior.gradient_factor[g : g + 1], 100, 1.0, 1.0)
        root = torch.stack([whiten(one, e[None]).flatten() for e in basis], 1)
        dense = torch.kron(posterior.gradient_factor[g], posterior.input_factor[g])
        np.testing.assert_allclose(root.T @ root, dense, rtol=1e-9, atol=1e-12)


def round_coarsely(geometry, width: int = 3):
    w = weight()
    widths = torch.full((GROUPS * ROWS,), width, dtype=torch.uint8)
    rounded = round_layer(w, geometry, *minmax_grid(stack_groups(w).double(), widths), widths, {})
    return w.double(), rounded


def one_sided_risk(delta: np.ndarray, a: np.ndarray, own: np.ndarray) -> np.ndarray:
    """1/2 G_rr delta_r A delta_rT of each row, by loops over columns."""
    risk = np.zeros(delta.shape[:2])
    for g, r in np.ndindex(*risk.shape):
        for i in range(delta.shape[2]):
            for j in range(delta.shape[2]):
                risk[g, r] += 0.5 * own[g, r] * delta[g, r, i] * a[g, i, j] * delta[g, r, j]
    return risk


def test_gains_turn_feedback_errors_into_one_sided_risk():
    posterior = kronecker()
    geometry = whitening(posterior, feedback=True, damping=DAMPING)
    w, rounded = round_coarsely(geometry)
    delta = rounded.values.reshape(w.shape) - w
    damped = np.stack([a + DAMPING * np.trace(a) / COLUMNS * np.eye(COLUMNS) for a in posterior.input_factor.numpy()])
    own = np.stack([np.diag(g) for g in posterior.gradient_factor.numpy()])
    error = (rounded.met - rounded.values).reshape(w.shape)
    by_gain = 0.5 * (geometry.row_gain[..., None] * geometry.column_gain * error.square()).sum(-1)
    np.testing.assert_allclose(by_gain, one_sided_risk(delta.numpy(), damped, own), rtol=1e-9)
    # feedback did something: what entries met is not the weight
    assert float((rounded.met.reshape(w.shape) - w).abs().max()) > 0.1
    # and the risk without the extra damping is the posterior's own
    without = one_sided_risk(delta.numpy(), posterior.input_factor.numpy(), own)
    np.testing.assert_allclose(posterior.row_risk(delta), without, rtol=1e-9)


@pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS)
def test_nearest_gains_are_the_precisions_diagonal(posterior):
    geometry = whitening(posterior, feedback=False, damping=DAMPING)
    assert geometry.factors is None and geometry.retries == 0
    gain = geometry.row_gain[..., None] * geometry.column_gain
    # an error of 1 in one weight alone has the risk P_ii / 2
    expected = torch.zeros(GROUPS, ROWS, COLUMNS, dtype=torch.float64)
    for place in np.ndindex(GROUPS, ROWS, COLUMNS):
        delta = torch.zeros(GROUPS, ROWS, COLUMNS, dtype=torch.float64)
        delta[place] = 1.0
        expected[place] = 2 * posterior.risk(delta).sum()
    torch.testing.assert_close(gain.expand_as(expected), expected)
    rows = rounding_gain(geometry, ROWS).reshape(GROUPS, ROWS, COLUMNS)
    torch.testing.assert_close(geometry.row_gain[..., None] * rows, expected)


@pytest.mark.parametrize("kind", ["diag", "lowrank"])
def test_diagonal_and_low_rank_posteriors_feed_nothing_back(kind):
    one, other = (whitening(POSTERIORS[kind], feedback=feedback, damping=DAMPING) for feedback in (True, False))
    assert one.factors is None and torch.equal(one.column_gain, other.column_gain)


def test_ekfac_feedback_is_kfacs_where_the_precision_is_a_kronecker_product():
    kfac = kronecker()
    values_a, q_a = torch.linalg.eigh(kfac.input_factor)
    values_g, q_g = torch.linalg.eigh(kfac.gradient_factor)
    eigenvalues = values_g[:, :, None] * values_a[:, None, :]
    same = EkfacPosterior(kfac.input_factor, q_a, q_g, eigenvalues, 100, 1.0, 1.0)
    expected, found = (whitening(posterior, feedback=True, damping=DAMPING) for posterior in (kfac, same))
    torch.testing.assert_close(found.row_gain, expected.row_gain)
    torch.testing.assert_close(found.column_gain, expected.column_gain)


def test_ekfac_feedback_leaves_each_row_its_trace():
    posterior = ekfac()
    geometry = whitening(posterior, feedback=True, damping=DAMPING)
    for g, r in np.ndindex(GROUPS, ROWS):
        own = sum(float(posterior.diagonal()[g, r, c]) for c in range(COLUMNS))
        assert float(geometry.row_gain[g, r]) * float(posterior.input_moment[g].trace()) == pytest.approx(own)
    expected = whitening(kronecker(), feedback=True, damping=DAMPING).column_gain
    torch.testing.assert_close(geometry.column_gain, expected, rtol=1e-10, atol=0)


def test_ekfac_without_inputs_keeps_finite_gains():
    posterior = ekfac()
    posterior.input_moment[0] = 0
    geometry = whitening(posterior, feedback=True, damping=DAMPING)
    assert bool(torch.isfinite(geometry.row_gain[..., None] * geometry.column_gain).all())


def test_feedback_gains_are_conditional_precisions():
    """1 / U_jj^2 is what A leaves of column j once all columns rounded after it have adapted."""
    posterior = kronecker()
    geometry = whitening(posterior, feedback=True, damping=0.0)
    for g in range(GROUPS):
        a = posterior.input_factor[g].numpy()
        order = sorted(range(COLUMNS), key=lambda j: (-a[j, j], j))
        for position, j in enumerate(order):
            later = order[position + 1 :]
            adapted = a[j, later] @ np.linalg.solve(a[np.ix_(later, later)], a[later, j]) if later else 0.0
            assert float(geometry.column_gain[g, 0, j]) == pytest.approx(a[j, j] - adapted, rel=1e-8)


def test_retries_are_counted():
    singular = torch.ones(GROUPS, COLUMNS, COLUMNS, dtype=torch.float64)
    posterior = KroneckerPosterior(singular, torch.eye(ROWS).double().expand(GROUPS, -1, -1), 100, 0.0, 0.0)
    assert whitening(posterior, feedback=True, damping=0.0).retries > 0
    assert whitening(posterior, feedback=True, damping=0.01).retries == 0
    singular_rows = torch.ones(GROUPS, ROWS, ROWS, dtype=torch.float64)
    posterior = KroneckerPosterior(moment(COLUMNS, 1), singular_rows, 100, 0.0, 0.0)
    assert whitening(posterior, True, 0.01, 0.0).retries > 0
    assert whitening(posterior, True, 0.01, 0.1).retries == whitening(posterior, True, 0.01).retries == 0


@pytest.mark.parametrize("row_damping", [0.0, 0.1, 1.0])
def test_row_factors_are_triangular_decompositions_of_the_damped_g(row_damping):
    posterior = kronecker()
    geometry = whitening(posterior, True, DAMPING, row_damping)
    plain = whitening(posterior, True, DAMPING)
    assert plain.row_factors is None
    torch.testing.assert_close(geometry.column_gain, plain.column_gain)
    for g in range(GROUPS):
        factor, own = geometry.row_factors[g], posterior.gradient_factor[g].numpy()
        order = sorted(range(ROWS), key=lambda r: (-own[r, r], r))
        assert factor.order.tolist() == order
        whole = own + row_damping * np.trace(own) / ROWS * np.eye(ROWS)
        upper, gain = factor.upper.numpy(), geometry.row_gain[g, order].numpy()
        assert np.array_equal(upper, np.triu(upper)) and (upper.diagonal() == 1).all()
        np.testing.assert_allclose(upper * gain @ upper.T, whole[np.ix_(order, order)], rtol=1e-8)
        # what an error in a row costs once later rows have made up for it
        schur = np.linalg.inv(np.linalg.inv(whole[np.ix_(order, order)])[:1, :1])
        np.testing.assert_allclose(gain[0], schur[0, 0], rtol=1e-8)


@pytest.mark.parametrize("kind", ["diag", "ekfac", "lowrank"])
def test_row_feedback_needs_a_kronecker_product(kind):
    with pytest.raises(ValueError, match=r"method\.rounding=two_sided needs .*posterior=kfac"):
        whitening(POSTERIORS[kind], True, DAMPING, 0.1)


def counted_posterior(limit: int | None) -> SimpleNamespace:
    """A posterior whose fits are counted, with a shelf of `limit` bytes or none."""
    posterior = SimpleNamespace(fits=0, whitenings=None if limit is None else Shelf(limit))

    def fit(_layer):
        posterior.fits += 1
        return kronecker()

    posterior.fit = fit
    return posterior


def layer(name: str) -> LayerProblem:
    return LayerProblem(name, "Linear", weight(), statistic=lambda _: None)


def test_a_shelf_has_a_layer_whitened_once_for_each_setting():
    posterior = counted_posterior(2**20)
    first = layer_whitening(posterior, layer("a"), True, DAMPING)
    assert layer_whitening(posterior, layer("a"), True, DAMPING) is first and posterior.fits == 1
    assert layer_whitening(posterior, layer("b"), True, DAMPING) is not first
    others = [(False, DAMPING, None), (True, 2 * DAMPING, None), (True, DAMPING, 0.1), (True, DAMPING, 0.0)]
    geometries = [layer_whitening(posterior, layer("a"), *setting) for setting in others]
    assert len({id(geometry) for geometry in [first, *geometries]}) == 5
    assert posterior.fits == 6


def test_a_full_shelf_and_no_shelf_keep_nothing_more():
    size = whitening(kronecker(), True, DAMPING).nbytes
    # U and two gains, float64: factors dominate
    assert size >= kronecker().input_factor.nbytes
    for limit, fits in ((2 * size - 1, 3), (2 * size, 2), (None, 4)):
        posterior = counted_posterior(limit)
        for _ in range(2):
            for name in "ab":
                found = layer_whitening(posterior, layer(name), True, DAMPING)
                assert torch.equal(found.column_gain, whitening(kronecker(), True, DAMPING).column_gain)
        assert posterior.fits == fits


class Disk(dict):
    """Has room for so many."""

    room = 1

    def __setitem__(self, key, value):
        if len(self) == self.room:
            raise OSError("no space left")
        super().__setitem__(key, value)


def test_what_a_full_shelf_cannot_keep_goes_beyond_until_that_is_full():
    posterior, disk = counted_posterior(whitening(kronecker(), True, DAMPING).nbytes), Disk()
    posterior.whitenings.beyond = disk
    first = [layer_whitening(posterior, layer(name), True, DAMPING) for name in "abc"]
    again = [layer_whitening(posterior, layer(name), True, DAMPING) for name in "abc"]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True, False]
    assert [key[0] for key in disk] == ["b"] and [key[0] for key in posterior.whitenings] == ["a"]
    assert posterior.fits == 4
    disk.room = 5  # somebody made room: nothing is tried again after a refusal
    layer_whitening(posterior, layer("d"), True, DAMPING)
    assert len(disk) == 1
    with pytest.raises(KeyError):
        posterior.whitenings["absent"]
    with pytest.raises(KeyError):
        Shelf(0)["absent"]


def test_an_unknown_posterior_is_refused():
    with pytest.raises(TypeError, match="no whitening for SimpleNamespace"):
        whitening(SimpleNamespace(), True, 0.01)
    with pytest.raises(TypeError, match="no whitening for str"):
        whiten("posterior", weight())
