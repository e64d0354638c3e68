"""Row-side feedback against sequential rounding of the whole flattened matrix with a dense inverse."""

import numpy as np
import pytest
import torch
from naive_quant import damped, moment_of, visiting_order
from torch import Tensor

from bayesq.posterior import KroneckerPosterior
from bayesq.quant.feedback import feedback_factor, feedback_round
from bayesq.quant.grids import CodebookGrid, mse_grid
from bayesq.quant.two_sided import TwoSidedGrid
from bayesq.rounding import round_layer
from bayesq.whitening import whitening

DAMPING, ROW_DAMPING = 0.01, 0.1
WIDTHS = [2, 3, 4, 3, 8, 2, 5]


def correlated(rows: int, columns: int, seed: int, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [r, c], A [c, c] and G [r, r], both far from diagonal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, moment_of(columns, 3 * columns, generator), moment_of(rows, 3 * rows, generator, dead)


def books_of(widths: list[int], seed: int) -> dict[int, Tensor]:
    """Irregular levels of 2 and 3 bits around the codes; wider rows are affine."""
    random = np.random.default_rng(seed)
    return {w: torch.from_numpy(np.sort(random.uniform(0, 2**w - 1, 2**w))) for w in (2, 3) if w in widths}


def naive_two_sided(
    weight: np.ndarray, a: np.ndarray, g: np.ndarray, values: list[list[float]], order: tuple[list[int], list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values; a, g damped. One entry after the other, down each column:

    with UT U = P^-1, P = kron(A, G) in visiting order, entry i's error (x_i - q_i) / U_ii goes to k > i as U_ik.
    """
    columns, rows = order
    upper = np.linalg.cholesky(np.linalg.inv(np.kron(a[np.ix_(columns, columns)], g[np.ix_(rows, rows)]))).T
    x = np.array([weight[r, c] for c in columns for r in rows])
    codes, found = np.zeros(weight.shape, int), np.zeros(weight.shape)
    for i, (c, r) in enumerate((c, r) for c in columns for r in rows):
        code = min(range(len(values[r])), key=lambda k: abs(values[r][k] - x[i]))
        codes[r, c], found[r, c] = code, values[r][code]
        error = (x[i] - found[r, c]) / upper[i, i]
        for k in range(i + 1, len(x)):
            x[k] -= error * upper[i, k]
    return codes, found


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (7, 1), (7, 20), (5, 40)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [(), (0,)])
def test_rounding_equals_sequential_rounding_of_the_flattened_matrix(
    rows: int, columns: int, seed: int, dead: tuple[int, ...]
) -> None:
    weight, a, g = correlated(rows, columns, seed, dead)
    widths = torch.tensor(WIDTHS[:rows], dtype=torch.uint8)
    scale, zero = mse_grid(weight, widths)
    books = books_of(WIDTHS[:rows], seed)
    row_factor = feedback_factor(g, ROW_DAMPING)
    grid = TwoSidedGrid(scale, zero, widths, books, row_factor)
    codes, values, _ = feedback_round(weight, feedback_factor(a, DAMPING), grid)

    levels = [books[w].tolist() if w in books else list(range(2**w)) for w in widths.tolist()]
    reals = [[float(s) * (level - float(z)) for level in own] for s, z, own in zip(scale, zero, levels, strict=True)]
    order = visiting_order(a.numpy(), True), visiting_order(g.numpy(), True)
    expected = naive_two_sided(weight.numpy(), damped(a.numpy(), DAMPING), damped(g.numpy(), ROW_DAMPING), reals, order)
    assert np.array_equal(codes.numpy(), expected[0])
    np.testing.assert_allclose(values.numpy(), expected[1], rtol=1e-12, atol=1e-14)


def test_without_coupled_rows_it_is_plain_feedback() -> None:
    weight, a, _ = correlated(7, 50, seed=4)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)
    scale, zero = mse_grid(weight, widths)
    books = books_of(WIDTHS, 4)
    factor = feedback_factor(a, DAMPING)
    plain = feedback_round(weight, factor, CodebookGrid(scale, zero, widths, books))
    for g in (torch.eye(7), torch.diag(torch.tensor([3.0, 0.1, 5.0, 1.0, 1.0, 9.0, 2.0]))):
        grid = TwoSidedGrid(scale, zero, widths, books, feedback_factor(g.double(), ROW_DAMPING))
        for found, expected in zip(feedback_round(weight, factor, grid), plain, strict=True):
            assert torch.equal(found, expected)
    coupled = TwoSidedGrid(scale, zero, widths, books, feedback_factor(correlated(7, 50, seed=4)[2], ROW_DAMPING))
    assert not torch.equal(feedback_round(weight, factor, coupled)[0], plain[0])


def test_a_column_is_rounded_without_touching_its_entries() -> None:
    weight, _, g = correlated(7, 3, seed=5)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)
    grid = TwoSidedGrid(*mse_grid(weight, widths), widths, {}, feedback_factor(g, ROW_DAMPING))
    column = weight[:, 1].contiguous()
    first, again = grid.round(column, 1), grid.round(column, 1)
    assert torch.equal(column, weight[:, 1])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert bool((first[0] >= 0).all()) and bool((first[0] < 2 ** widths.long()).all())


def test_it_lowers_the_risk_of_coupled_rows() -> None:
    ratios = []
    for seed in range(15):
        weight, a, g = correlated(24, 40, 100 + seed)
        posterior = KroneckerPosterior(a[None], g[None], 1000, 1.0, 1.0)
        widths = torch.full((24,), 3, dtype=torch.uint8)
        grid = mse_grid(weight, widths)
        risk = []
        for row_damping in (ROW_DAMPING, None):
            geometry = whitening(posterior, True, DAMPING, row_damping)
            rounded = round_layer(weight[None], geometry, *grid, widths, {})
            risk.append(float(posterior.risk(rounded.values[None] - weight[None]).sum()))
        ratios.append(risk[0] / risk[1])
    assert float(np.median(ratios)) < 0.85
    assert sum(ratio < 1 for ratio in ratios) >= 13
