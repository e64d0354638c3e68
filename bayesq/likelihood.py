"""What a network's outputs mean: classes, means of unit-variance Gaussians, or next tokens.

    Categorical   logits [b, K]       y ~ softmax(f)                     one prediction per example
    Gaussian      means [b, d]        y ~ N(f, I), for regression heads  one prediction per example
    Tokens        logits [b, t, V]    y_i ~ softmax(f_i) at each position i that the mask counts

Two networks are compared in nats per prediction: per example for the first two, per predicted token for the third,
where one example is a whole sequence. A likelihood works over the last dimension of the outputs; `Tokens` then takes
the mean over the positions that count.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.quant.layers import MASK

# Kinds of draws from the predictive distribution for the Fisher; see `Categorical.fisher_directions`.
DRAWS = ("signs", "labels")
# Up to this many classes the expectation over labels is exact: one backward pass per class, or a single one for two
# classes. With more classes it is estimated from draws.
EXACT_CLASSES = 4
DEFAULT_SAMPLES = 1
# `Tokens` compares at most this many logits at a time: 128 MiB in float64 for each array, for any vocabulary.
CHUNK_ELEMENTS = 2**24
# Name of the input of a language model that holds its tokens, [b, t].
TOKENS = "input_ids"


class Likelihood(ABC):
    """Meaning of a network's outputs.

    Attributes:
        name: its value of the key posterior.likelihood.
        unit: of KL, negative log-likelihood and risk.
        streams: whether outputs are too many to store those of a whole data set.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "nats per example"
    streams: ClassVar[bool] = False

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

        Their pullbacks through the network are the output gradients of the true Fisher: draws come from the network's
        predictive distribution, never from the labels of the data.

        Args:
            outputs: of the network.
            samples: draws per example; None = the exact expectation up to EXACT_CLASSES outputs, DEFAULT_SAMPLES draws
                beyond.
            generator: CPU generator of the draws.
            draws: one of DRAWS; read by categorical likelihoods.
            mask: as in `kl`.

        Raises:
            Refused: `draws` is not one of DRAWS.
        """

    @abstractmethod
    def summary(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Numbers [b] by name that evaluation stores for each example of one network.

        Always `nll`. Also `prediction` if an example has one prediction, `correct` if it can be right or wrong (for
        `Tokens` the share of right tokens), and `confidence` if it has a probability.

        Args:
            outputs, target, mask: as in `nll`.
        """

    def agreement(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Share of an example's predictions on which both networks agree, [b] float64; None for regression."""
        return None

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Number of predictions in each example, [b] float64: the weights of a mean per prediction."""
        return torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)

    def counted(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """The mask of a batch, bool [b, t]: positions whose predictions count; None where every output counts.

        Args:
            inputs: the module's arguments.
        """
        return None

    def target(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Targets of a batch: its labels [b], or the next tokens [b, t].

        Args:
            inputs: the module's arguments.
            labels: of the batch.
        """
        return labels


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

    def summary(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """nll, the predicted class, whether it is the target (0 or 1), and its probability in float64."""
        predicted = outputs.argmax(-1)
        return {
            "prediction": predicted,
            "correct": (predicted == target).long(),
            "confidence": torch.softmax(outputs.to(torch.float64), dim=-1).amax(-1),
            "nll": self.nll(outputs, target),
        }

    def agreement(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Whether both networks predict the same class, 0 or 1."""
        return (reference.argmax(-1) == other.argmax(-1)).to(torch.float64)

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

        If the network is sure, nearly all drawn labels are its most probable class and carry no information; a few rare
        draws carry the whole expectation. With signs, every example contributes to every draw.
        """
        if draws not in DRAWS:
            raise Refused(f"draws {draws!r}: choose from {', '.join(DRAWS)}")
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
        """-log N(target; f, I) = 1/2 (|f - target|^2 + d log 2 pi); `target` is [b] where d = 1."""
        squared = (outputs.to(torch.float64) - target.to(torch.float64).reshape(outputs.shape)).square().sum(-1)
        return (squared + outputs.shape[-1] * math.log(2 * math.pi)) / 2

    def summary(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """nll and the predicted number, for outputs [b, 1]."""
        return {"prediction": outputs.squeeze(-1), "nll": self.nll(outputs, target)}

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
            raise Refused(f"draws {draws!r}: choose from {', '.join(DRAWS)}")
        numbers, count = outputs.shape[-1], samples or DEFAULT_SAMPLES
        if samples is None and numbers <= EXACT_CLASSES:
            identity = torch.eye(numbers, device=outputs.device)
            return [identity[k].expand(*outputs.shape[:-1], -1) for k in range(numbers)]
        noise = torch.randn(count, *outputs.shape, generator=generator) / count**0.5
        return list(noise.to(outputs.device))


@dataclass(frozen=True)
class Tokens(Categorical):
    """Next tokens: outputs are logits [b, t, V], with a mask bool [b, t] of the positions that count (None = all).

    Outputs at other positions are never read: padding may leave NaN there.
    """

    name: ClassVar[str] = "tokens"
    unit: ClassVar[str] = "nats per token"
    streams: ClassVar[bool] = True

    def kl(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the counted positions of each sequence; 0 where none counts."""
        return _mean_over_positions(super().kl, mask, reference, other)

    def kl_from_mean(self, mean: Tensor, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the counted positions of each sequence; 0 where none counts."""
        return _mean_over_positions(super().kl_from_mean, mask, mean, outputs)

    def nll(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the counted positions of each sequence; 0 where none counts."""
        return _mean_over_positions(super().nll, mask, outputs, target)

    def summary(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """nll, and the share of the counted tokens that are predicted right."""

        def right(logits: Tensor, token: Tensor) -> Tensor:
            return (logits.argmax(-1) == token).to(torch.float64)

        correct = _mean_over_positions(right, mask, outputs, target)
        return {"correct": correct, "nll": self.nll(outputs, target, mask)}

    def agreement(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Share of the counted positions where both networks predict the same token."""

        def same(first: Tensor, second: Tensor) -> Tensor:
            return (first.argmax(-1) == second.argmax(-1)).to(torch.float64)

        return _mean_over_positions(same, mask, reference, other)

    def fisher_directions(
        self,
        outputs: Tensor,
        samples: int | None,
        generator: torch.Generator,
        draws: str = "signs",
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Independent draws at every position that counts, each over sqrt(t) if t positions of its sequence count.

        So one backward pass gives an outer product whose expectation is the mean Fisher of the positions.
        """
        mask = _all_positions(outputs) if mask is None else mask
        drawn = super().fisher_directions(outputs.detach()[mask], samples or DEFAULT_SAMPLES, generator, draws)
        weight = mask.sum(1).to(torch.float32).rsqrt()[:, None].expand(mask.shape)[mask]
        directions = []
        for at_counted in drawn:
            direction = torch.zeros(outputs.shape, device=outputs.device)
            direction[mask] = at_counted * weight[:, None]
            directions.append(direction)
        return directions

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Counted positions of each sequence."""
        return (_all_positions(outputs) if mask is None else mask).sum(1, dtype=torch.float64)

    def counted(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Positions of tokens that a token follows: not the last one, and no padding on either side.

        Args:
            inputs: with `input_ids` [b, t], and `attention_mask` [b, t] where sequences are padded.
        """
        tokens = inputs[TOKENS]
        real = inputs[MASK].bool() if MASK in inputs else torch.ones_like(tokens, dtype=torch.bool)
        return torch.cat([real[:, :-1] & real[:, 1:], torch.zeros_like(real[:, :1])], 1)

    def target(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The next token of each position; of the last one, which never counts, the first token."""
        return inputs[TOKENS].roll(-1, 1)


# Values of the key posterior.likelihood; `Tokens` is chosen by data sets only.
LIKELIHOODS: dict[str, Likelihood] = {one.name: one for one in (Categorical(), Gaussian())}


def _all_positions(outputs: Tensor) -> Tensor:
    return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)


def _mean_over_positions(per_position: Callable[..., Tensor], mask: Tensor | None, *values: Tensor) -> Tensor:
    """Means over each sequence's counted positions, [b]; 0 where none counts.

    Args:
        per_position: from arguments [p, ...] at p positions to one number for each, [p].
        mask: bool [b, t]; None = all.
        values: the arguments at all positions, [b, t, ...].
    """
    mask = _all_positions(values[0]) if mask is None else mask
    sequence, place = mask.nonzero(as_tuple=True)
    step = max(CHUNK_ELEMENTS // max(x[0, 0].numel() for x in values), 1)
    parts = [
        per_position(*(x[rows, columns] for x in values))
        for rows, columns in zip(sequence.split(step), place.split(step), strict=True)
    ]
    measured = torch.cat(parts)
    spread = torch.zeros(mask.shape, dtype=measured.dtype, device=measured.device).masked_scatter(mask, measured)
    return spread.sum(1) / mask.sum(1).clamp(min=1)
