"""Targets behind a quantized prefix and kept moments, against least squares on samples in float64."""

import math

import numpy as np
import pytest
import torch

from bayesq.calibration.paired import PairedSums, is_held_out
from bayesq.target import LAMBDAS, choose_target, output_variance, ridge, row_factors

ROWS, COLUMNS, EXAMPLES, POSITIONS = 3, 5, 40, 6


def samples(noise: float, shrink: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [e, 1, l, c] with a mean, and x' = shrink x + noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    x = torch.randn(EXAMPLES, 1, POSITIONS, COLUMNS, generator=generator) @ mix + 0.5
    return x, shrink * x + noise * torch.randn(x.shape, generator=generator)


def sums_of(x: torch.Tensor, prefix: torch.Tensor) -> PairedSums:
    sums = PairedSums()
    for first in range(0, EXAMPLES, 8):
        part = slice(first, first + 8)
        sums.add(x[part], prefix[part], torch.full((8,), POSITIONS), first)
    return sums


def weight() -> torch.Tensor:
    return torch.randn(1, ROWS, COLUMNS, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_target_minimises_the_penalised_error_on_the_samples(penalty, centred):
    x, prefix = samples(0.3)
    found = ridge(weight().double(), sums_of(x, prefix).moments(centred), penalty)[0].numpy()
    a, b = (part.reshape(-1, COLUMNS).double().numpy() for part in (x, prefix))
    if centred:
        a, b = a - a.mean(0), b - b.mean(0)
    w = weight()[0].double().numpy()
    size = penalty * np.mean(np.diag(b.T @ b / len(b)))
    stacked = np.concatenate([b / math.sqrt(len(b)), math.sqrt(size) * np.eye(COLUMNS)])
    right = np.concatenate([a @ w.T / math.sqrt(len(b)), math.sqrt(size) * w.T])
    np.testing.assert_allclose(found, np.linalg.lstsq(stacked, right, rcond=None)[0].T, rtol=1e-4, atol=1e-5)


def test_where_the_prefix_changes_nothing_the_weights_stay():
    x, _ = samples(0.0)
    target = choose_target(weight(), sums_of(x, x), centred=True)
    torch.testing.assert_close(target.weight, weight(), rtol=1e-3, atol=1e-4)


def test_a_systematic_change_is_undone_and_pure_noise_is_not_followed():
    x, prefix = samples(0.0, shrink=0.5)
    undone = choose_target(weight(), sums_of(x, prefix), centred=True)
    a, b = ((part - part.mean((0, 2), keepdim=True)).reshape(-1, COLUMNS) for part in (x, prefix))
    left, all_of_it = (a @ weight()[0].T - b @ undone.weight[0].T).norm(), (a @ weight()[0].T).norm()
    assert undone.penalty == LAMBDAS[0] and float(left) < 0.05 * float(all_of_it)
    _, other = samples(1.0, seed=1)  # inputs that have nothing to do with x
    far = choose_target(weight(), sums_of(x, other), centred=True)
    assert float(far.weight.norm()) < 0.5 * float(weight().norm())


@pytest.mark.parametrize("noise", [0.02, 0.3, 0.8, 2.0, 20.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lambda_is_the_one_with_the_least_error_on_the_held_out_examples(noise, seed):
    x, prefix = samples(noise, seed=seed)
    sums = sums_of(x, prefix)
    found = choose_target(weight(), sums, centred=True)
    w, fitted = weight().double(), sums.split(True)[0]
    held = torch.tensor([is_held_out(i) for i in range(EXAMPLES)])
    a, b = (
        (part[held] - part.mean((0, 2), keepdim=True)).reshape(-1, COLUMNS).double()
        for part in (x.double(), prefix.double())
    )
    errors = {p: float((a @ w[0].T - b @ ridge(w, fitted, p)[0].T).square().sum()) for p in LAMBDAS}
    assert found.penalty == min(errors, key=errors.__getitem__)


def test_inputs_without_correct_digits_keep_the_weights():
    """A mean of 1e4 leaves no digit of a variance of 1e-6 in float32 sums."""
    x = 1e4 + 1e-3 * samples(0.0)[0]
    target = choose_target(weight(), sums_of(x, x), centred=True)
    assert target.penalty == math.inf and target.change == 0 and torch.equal(target.weight, weight())


def test_row_factors_restore_each_outputs_variance():
    x, prefix = samples(0.0, shrink=0.7)
    a, b = ((part - part.mean((0, 2), keepdim=True)).reshape(-1, COLUMNS).double() for part in (x, prefix))
    full, now = (output_variance(weight(), (part.T @ part / len(part))[None]) for part in (a, b))
    outputs = a @ weight()[0].double().T
    torch.testing.assert_close(full[0], outputs.var(0, unbiased=False), rtol=1e-4, atol=1e-6)
    factors = row_factors(full, now)
    torch.testing.assert_close(factors, torch.full_like(factors, 1 / 0.7), rtol=1e-3, atol=1e-3)
    assert row_factors(full, torch.zeros_like(now)).eq(1).all()  # a constant output has nothing to scale
