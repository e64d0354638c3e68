"""What goes backward for the Fisher: exact for few outputs, unbiased where it is drawn."""

import pytest
import torch
from torch import Tensor

from bayesq.likelihood import DEFAULT_SAMPLES, DRAWS, EXACT_CLASSES, LIKELIHOODS

fisher_directions = LIKELIHOODS["categorical"].fisher_directions
gaussian_directions = LIKELIHOODS["gaussian"].fisher_directions


def outer(directions: list[Tensor]) -> Tensor:
    return sum(v[:, :, None] * v[:, None, :] for v in directions)


def label_covariance(logits: Tensor) -> Tensor:
    """E_{y ~ p}[(e_y - p)(e_y - p)T], label by label."""
    p, classes = torch.softmax(logits.double(), 1), logits.shape[1]
    found = torch.zeros(len(logits), classes, classes, dtype=torch.float64)
    for i in range(len(logits)):
        for y in range(classes):
            d = -p[i].clone()
            d[y] += 1
            found[i] += p[i, y] * torch.outer(d, d)
    return found


@pytest.mark.parametrize("classes", [2, 3, EXACT_CLASSES])
def test_directions_are_exact_for_few_classes(classes):
    logits = 2 * torch.randn(5, classes, generator=torch.Generator().manual_seed(4))
    directions = fisher_directions(logits, None, torch.Generator())
    assert len(directions) == (1 if classes == 2 else classes)
    torch.testing.assert_close(outer(directions).double(), label_covariance(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("classes", [2, 5, EXACT_CLASSES + 1])
def test_drawn_directions_are_unbiased(classes, kind):
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(5))
    count = 20_000
    directions = fisher_directions(logits, count, torch.Generator().manual_seed(6), draws=kind)
    assert len(directions) == count
    single = torch.stack([count * v[:, :, None] * v[:, None, :] for v in directions]).double()
    error = single.std(0) / count**0.5
    assert bool(((single.mean(0) - label_covariance(logits)).abs() <= 5 * error + 1e-6).all())


def test_signs_vary_less_than_labels_where_the_network_is_sure():
    logits = torch.zeros(1, 10)
    logits[0, 3] = 6.0
    spread = {}
    for kind in DRAWS:
        directions = fisher_directions(logits, 5_000, torch.Generator().manual_seed(6), draws=kind)
        spread[kind] = float(torch.stack([v.square().sum() for v in directions]).std())
    assert 10 * spread["signs"] < spread["labels"]


def test_many_classes_are_sampled():
    logits = torch.zeros(3, EXACT_CLASSES + 1)
    first, again, other = (fisher_directions(logits, None, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert len(first) == DEFAULT_SAMPLES
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("outputs", [1, 3, EXACT_CLASSES])
def test_gaussian_directions_are_the_outputs_unit_vectors(outputs):
    directions = gaussian_directions(torch.randn(5, outputs), None, torch.Generator())
    assert len(directions) == outputs
    assert torch.equal(outer(directions), torch.eye(outputs).expand(5, -1, -1))


@pytest.mark.parametrize("outputs", [2, EXACT_CLASSES + 1])
def test_sampled_gaussian_directions_are_unbiased(outputs):
    draws = 20_000
    directions = gaussian_directions(torch.zeros(3, outputs), draws, torch.Generator().manual_seed(6))
    assert len(directions) == draws
    torch.testing.assert_close(outer(directions), torch.eye(outputs).expand(3, -1, -1), rtol=0, atol=0.05)
    many = gaussian_directions(torch.zeros(1, EXACT_CLASSES + 1), None, torch.Generator())
    assert len(many) == DEFAULT_SAMPLES


@pytest.mark.parametrize("directions", [fisher_directions, gaussian_directions])
def test_an_unknown_draw_is_refused(directions):
    with pytest.raises(ValueError, match="draws 'dice'"):
        directions(torch.zeros(1, 2), None, torch.Generator(), draws="dice")
