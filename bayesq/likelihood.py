"""What the logits of a network mean: probabilities of classes, or the means of unit-variance Gaussians.

Everything that compares two networks does so in nats under the likelihood of their data set:

    categorical   KL(softmax(f) || softmax(f'))
    gaussian      KL(N(f, I) || N(f', I)) = 1/2 |f - f'|^2, for regression heads
"""

import torch
from torch import Tensor

LIKELIHOODS = ("categorical", "gaussian")


def kl_divergence(reference: Tensor, other: Tensor, likelihood: str = "categorical") -> Tensor:
    """KL(p_reference || p_other) of each example in nats, [n] float64, from logits [n, outputs]."""
    f, g = reference.to(torch.float64), other.to(torch.float64)
    if likelihood == "gaussian":
        return (f - g).square().sum(1) / 2
    p, q = torch.log_softmax(f, dim=1), torch.log_softmax(g, dim=1)
    return (p.exp() * (p - q)).sum(1)


def mean_output(logits: Tensor, likelihood: str = "categorical") -> Tensor:
    """E[y|x] of each example, [n, outputs]: the class probabilities, or the logits themselves."""
    return logits if likelihood == "gaussian" else torch.softmax(logits, dim=1)


def divergence_from_mean(mean: Tensor, logits: Tensor, likelihood: str = "categorical") -> Tensor:
    """KL in nats of each example [n] from the distribution with that `mean_output` to that of the logits."""
    if likelihood == "gaussian":
        return (mean - logits).square().sum(1) / 2
    return (torch.xlogy(mean, mean) - mean * torch.log_softmax(logits, dim=1)).sum(1)
