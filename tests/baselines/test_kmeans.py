"""Exact weighted k-means of rows against enumeration and a naive dynamic program."""

import itertools

import numpy as np
import pytest
import torch

from baselines.kmeans import best_levels, in_fp16, nearest


def cost(w: np.ndarray, h: np.ndarray, levels: np.ndarray) -> float:
    """Weighted squared error of the nearest levels."""
    return float((h * np.square(w[:, None] - levels).min(1)).sum())


def enumerated(w: np.ndarray, h: np.ndarray, count: int) -> float:
    """The least cost over every assignment of the weights to `count` clusters."""
    least = np.inf
    for codes in itertools.product(range(count), repeat=len(w)):
        total = 0.0
        for k in set(codes):
            chosen = np.array(codes) == k
            if h[chosen].sum() > 0:
                total += (h * np.square(w - (h * w)[chosen].sum() / h[chosen].sum()))[chosen].sum()
        least = min(least, total)
    return least


def naive_program(w: np.ndarray, h: np.ndarray, count: int) -> float:
    """E[k, j] over all i, each cost computed anew."""
    order = np.argsort(w)
    w, h = w[order], h[order]
    n = len(w)

    def run(i: int, j: int) -> float:
        mean = (h[i:j] * w[i:j]).sum() / h[i:j].sum()
        return float((h[i:j] * np.square(w[i:j] - mean)).sum())

    costs = {(i, j): run(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    least = [np.inf] + [costs[0, j] for j in range(1, n + 1)]
    for _ in range(1, count):
        least = [np.inf] + [min([least[j]] + [least[i] + costs[i, j] for i in range(1, j)]) for j in range(1, n + 1)]
    return least[n]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [1, 2, 4, 6])
def test_levels_are_the_optimum_of_all_assignments(columns: int, count: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    curvature = torch.rand(3, columns, generator=generator, dtype=torch.float64).pow(4)
    curvature[1, ::2] = 0
    levels = best_levels(weight, curvature, count).numpy()
    for row in range(3):
        w, h = weight[row].numpy(), curvature[row].numpy()
        h = h if h.any() else np.ones_like(h)
        assert cost(w, h, levels[row]) == pytest.approx(enumerated(w, h, count), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("count", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("columns", [9, 33, 100])
def test_levels_are_those_of_the_program_that_tries_every_start(columns: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(4, columns, generator=generator, dtype=torch.float64) * 0.01 + 5
    curvature = torch.randn(4, columns, generator=generator, dtype=torch.float64).mul(3).exp() * 1e-9
    levels = best_levels(weight, curvature, count)
    assert bool((levels.diff(dim=1) >= 0).all())
    for row in range(4):
        w, h = weight[row].numpy(), curvature[row].numpy()
        spread = (h * np.square(w - w.mean())).sum()
        assert cost(w, h, levels[row].numpy()) == pytest.approx(
            naive_program(w, h, count), rel=1e-7, abs=1e-11 * spread
        )


def test_weights_that_cost_nothing_move_no_level_and_rows_without_curvature_count_equally() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 100.0], [0.0, 0.0, 4.0, 4.0]])
    curvature = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert best_levels(weight, curvature, 2)[1].tolist() == [0.0, 4.0]
    assert best_levels(weight, curvature, 4)[0].tolist() == [0.0, 1.0, 2.0, 2.0]
    assert best_levels(weight, curvature, 1)[0].tolist() == [1.0]


def test_codes_are_those_of_the_nearest_stored_level() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, generator=generator)
    levels = in_fp16(best_levels(weight, torch.ones(5, 40), 8))
    codes, values = nearest(weight, levels)
    assert torch.equal(levels, levels.half().double())
    for row in range(5):
        distance = (weight[row].double()[:, None] - levels[row]).abs()
        assert torch.equal(values[row], levels[row][codes[row].long()])
        assert torch.equal((weight[row].double() - values[row]).abs(), distance.amin(1))
