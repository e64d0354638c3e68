"""What a network's outputs mean: classes, means of unit-variance Gaussians, or next tokens (SPEC section 10).

    Categorical   logits [b, K]       y ~ softmax(f)                     one prediction per example
    Gaussian      means [b, d]        y ~ N(f, I), for regression heads  one prediction per example
    Tokens        logits [b, t, V]    y_i ~ softmax(f_i) at each position i that the mask counts

Everything that compares two networks does so in nats per prediction under the likelihood of their data set: per example
for the first two, per predicted token for the third, where a whole sequence is one example. A likelihood works over the
last dimension of the outputs; `Tokens` then takes the mean over an example's counted positions.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# What is drawn from the predictive distribution for the Fisher; see `Categorical.fisher_directions`.
DRAWS = ("signs", "labels")
# Up to this many classes the expectation over labels is exact (one backward pass per class, one in all for two
# classes); with more classes it is drawn.
EXACT_CLASSES = 4
DEFAULT_SAMPLES = 1


class Likelihood(ABC):
    """Meaning of a network's outputs.

    Attributes:
        name: as the key posterior.likelihood names it.
        unit: of KL, negative log-likelihood and risk.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "nats per example"

    @abstractmethod
    def kl(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """KL(p_reference || p_other) of each example in nats per prediction, [b] float64.

        Args:
            reference, other: outputs of two networks on the same examples.
            mask: positions that count, bool [b, t]; read by `Tokens`.
        """

    @abstractmethod
    def kl_from_mean(self, mean: Tensor, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """KL [b] from the distribution with that `mean_output` to that of the outputs."""

    @abstractmethod
    def mean_output(self, outputs: Tensor) -> Tensor:
        """E[y|x], of the outputs' shape: class probabilities, or the means themselves."""

    @abstractmethod
    def nll(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """-log p(target) of each example in nats per prediction, [b] float64.

        Args:
            outputs: of the network.
            target: [b] classes or numbers; [b, t] next tokens.
            mask: as in `kl`.
        """

    @abstractmethod
    def fisher_directions(
        self,
        outputs: Tensor,
        samples: int | None,
        generator: torch.Generator,
        draws: str = "signs",
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Vectors v_k, of the outputs' shape, whose outer products sum to the Fisher of the outputs.

        Their pullbacks through the network are the output gradients of the true Fisher: what is drawn follows the
        network's own predictive distribution, never the labels of the data.

        Args:
            outputs: of the network.
            samples: draws per example; None = the exact expectation up to EXACT_CLASSES outputs, DEFAULT_SAMPLES draws
                beyond.
            generator: CPU generator of the draws.
            draws: one of DRAWS; read by categorical likelihoods.
            mask: as in `kl`.

        Raises:
            ValueError: another kind of draw.
        """

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Number of predictions in each example, [b] float64: the weights of a mean per prediction."""
        return torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes: outputs are logits [..., K]."""

    name: ClassVar[str] = "categorical"

    def kl(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """KL(softmax(reference) || softmax(other)) over the last dimension."""
        p, q = (torch.log_softmax(x.to(torch.float64), dim=-1) for x in (reference, other))
        return (p.exp() * (p - q)).sum(-1)

    def kl_from_mean(self, mean: Tensor, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """KL(mean || softmax(outputs)) over the last dimension."""
        return (torch.xlogy(mean, mean) - mean * torch.log_softmax(outputs, dim=-1)).sum(-1)

    def mean_output(self, outputs: Tensor) -> Tensor:
        """Class probabilities."""
        return torch.softmax(outputs, dim=-1)

    def nll(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-entropy of each prediction."""
        log_p = torch.log_softmax(outputs.to(torch.float64), dim=-1)
        return -log_p.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)

    def fisher_directions(
        self,
        outputs: Tensor,
        samples: int | None,
        generator: torch.Generator,
        draws: str = "signs",
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """sum_k v_k v_kT = E_{y ~ p}[(e_y - p)(e_y - p)T] = diag(p) - p pT, in expectation if drawn.

            labels   v = e_y - p,  y ~ p
            signs    v = s - p sum_k s_k,  s_k = +-sqrt(p_k) with fair signs,
                     E[v vT] = (D - p sqrt(p)T)(D - p sqrt(p)T)T with D = diag(sqrt(p)), which is diag(p) - p pT

        Where the network is sure, nearly all drawn labels are its favourite class and carry no information; the rare
        others carry the whole expectation. With signs every example contributes to every draw.
        """
        if draws not in DRAWS:
            raise ValueError(f"draws {draws!r}: choose from {', '.join(DRAWS)}")
        classes, count = outputs.shape[-1], samples or DEFAULT_SAMPLES
        p = torch.softmax(outputs.detach().to(torch.float32), dim=-1)
        if samples is None and classes == 2:
            direction = p.prod(-1, keepdim=True).sqrt()
            return [torch.cat([direction, -direction], -1)]
        if samples is None and classes <= EXACT_CLASSES:
            one_hot = torch.eye(classes, device=p.device)
            return [p[..., k : k + 1].sqrt() * (one_hot[k] - p) for k in range(classes)]
        if draws == "signs":
            signs = 2 * torch.randint(2, (count, *p.shape), generator=generator, dtype=torch.int8) - 1
            drawn = signs.to(p.device) * p.sqrt()
            return list((drawn - p * drawn.sum(-1, keepdim=True)) / count**0.5)
        flat = p.reshape(-1, classes)
        labels = torch.multinomial(flat.cpu(), count, replacement=True, generator=generator).to(p.device)
        one_hot = torch.nn.functional.one_hot(labels, classes).to(p.dtype)
        return [((one_hot[:, k] - flat) / count**0.5).reshape(p.shape) for k in range(count)]


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Numbers: outputs are the means [..., d] of Gaussians of unit variance."""

    name: ClassVar[str] = "gaussian"

    def kl(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """KL(N(f, I) || N(g, I)) = 1/2 |f - g|^2."""
        return (reference.to(torch.float64) - other.to(torch.float64)).square().sum(-1) / 2

    def kl_from_mean(self, mean: Tensor, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """1/2 |mean - outputs|^2."""
        return (mean - outputs).square().sum(-1) / 2

    def mean_output(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs

    def nll(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """-log N(target; f, I), for one number per example: outputs [b, 1], target [b]."""
        squared = (outputs[..., 0].to(torch.float64) - target.to(torch.float64)).square()
        return (squared + math.log(2 * math.pi)) / 2

    def fisher_directions(
        self,
        outputs: Tensor,
        samples: int | None,
        generator: torch.Generator,
        draws: str = "signs",
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """sum_k v_k v_kT = E_{y ~ N(f, I)}[(y - f)(y - f)T] = I, so that F = E[JT J]."""
        if draws not in DRAWS:
            raise ValueError(f"draws {draws!r}: choose from {', '.join(DRAWS)}")
        numbers, count = outputs.shape[-1], samples or DEFAULT_SAMPLES
        if samples is None and numbers <= EXACT_CLASSES:
            identity = torch.eye(numbers, device=outputs.device)
            return [identity[k].expand(*outputs.shape[:-1], -1) for k in range(numbers)]
        noise = torch.randn(count, *outputs.shape, generator=generator) / count**0.5
        return list(noise.to(outputs.device))


@dataclass(frozen=True)
class Tokens(Categorical):
    """Next tokens: outputs are logits [b, t, V], with a mask [b, t] of the positions that count (None = all)."""

    name: ClassVar[str] = "tokens"
    unit: ClassVar[str] = "nats per token"

    def kl(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the counted positions of each sequence."""
        return _masked_mean(super().kl(reference, other), mask)

    def kl_from_mean(self, mean: Tensor, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the counted positions of each sequence."""
        return _masked_mean(super().kl_from_mean(mean, outputs), mask)

    def nll(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the counted positions of each sequence; `target` may have any value at the others."""
        if mask is not None:
            target = target.masked_fill(~mask, 0)
        return _masked_mean(super().nll(outputs, target), mask)

    def fisher_directions(
        self,
        outputs: Tensor,
        samples: int | None,
        generator: torch.Generator,
        draws: str = "signs",
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Drawn at every position; one backward pass sums over a sequence's t counted positions, each over sqrt(t).

        Positions are drawn independently, so that the expected outer product is the mean Fisher of the positions.
        """
        directions = super().fisher_directions(outputs, samples or DEFAULT_SAMPLES, generator, draws)
        weight = self.predictions(outputs, mask).clamp(min=1).rsqrt().to(outputs.device, torch.float32)[:, None, None]
        if mask is not None:
            weight = weight * mask.unsqueeze(-1)
        return [direction * weight for direction in directions]

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Counted positions of each sequence."""
        if mask is None:
            return torch.full((len(outputs),), float(outputs.shape[1]), dtype=torch.float64, device=outputs.device)
        return mask.sum(1, dtype=torch.float64)


LIKELIHOODS: dict[str, Likelihood] = {one.name: one for one in (Categorical(), Gaussian(), Tokens())}


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means over the counted positions of values [b, t], [b]; 0 where none counts."""
    if mask is None:
        return values.mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def kl_divergence(reference: Tensor, other: Tensor, likelihood: str = "categorical") -> Tensor:
    """Old name, goes with the strings."""
    return LIKELIHOODS[likelihood].kl(reference, other)


def mean_output(logits: Tensor, likelihood: str = "categorical") -> Tensor:
    """Old name, goes with the strings."""
    return LIKELIHOODS[likelihood].mean_output(logits)


def divergence_from_mean(mean: Tensor, logits: Tensor, likelihood: str = "categorical") -> Tensor:
    """Old name, goes with the strings."""
    return LIKELIHOODS[likelihood].kl_from_mean(mean, logits)
