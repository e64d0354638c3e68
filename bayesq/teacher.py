"""The posterior-predictive teacher of a distillation, and draws of a network's weights.

    p(y | x) = 1/S sum_s p(y | f(x; w_s)),   w_s ~ q

The KL divergence to a student needs only the teacher's mean output (see `bayesq.likelihood`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesq.batches import Batch
from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.progress import bar
from bayesq.quant.layers import Layer, find_layer, matrix_to_weight, weight_key

# Largest stored outputs. A language model with a vocabulary of 50,000 takes 400 kB a token, a classifier with 1,000
# classes 8 kB an example.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Recomputed:
    """A teacher whose outputs are not stored but computed for each batch whenever they are needed.

    Attributes:
        full: full-precision network.
        draws: weights by state_dict name, of each posterior draw; one empty draw is the network itself.
        likelihood: of the outputs.
        examples: number n of calibration examples.
    """

    full: nn.Module
    draws: Sequence[Mapping[str, Tensor]]
    likelihood: Likelihood
    examples: int

    def __len__(self) -> int:
        return self.examples

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean outputs [b, ...] float64 on the CPU."""
        outputs = [mean_outputs(self.full, weights, inputs, self.likelihood) for weights in self.draws]
        return torch.stack(outputs).sum(0) / len(outputs)


@torch.no_grad()
def posterior_predictive(
    full: nn.Module,
    layers: Collection[str],
    sample: Callable[[str, torch.Generator], Tensor],
    batches: Sequence[Batch],
    samples: int,
    generator: torch.Generator,
    likelihood: Likelihood,
) -> Tensor | Recomputed:
    """Teacher's mean outputs [n, ...] float64 on the CPU, in the order of `Batch.index`: class probabilities, or means.

    If they take more than MOST_BYTES, or differ in shape because sequences differ in length, each batch's are computed
    again whenever they are needed.

    Args:
        full: full-precision network, in eval mode.
        layers: layers whose weights are drawn.
        sample: draws a layer's weight perturbation [g, r, c], w_s - mu.
        batches: all n examples, each once, on any device.
        samples: S; 0 = the full-precision network itself.
        likelihood: of the outputs.

    Raises:
        Refused: the network is in training mode, or the batches do not hold every example once.
    """
    if full.training:
        raise Refused("the teacher must be in eval mode")
    if not batches:
        raise Refused("there is no example to distil from")
    count, total = count_examples(batches), None
    for drawn in range(max(samples, 1)):
        weights = perturbed_weights(full, layers, sample, generator) if samples else {}
        for batch in bar(batches, "teacher"):
            p = mean_outputs(full, weights, batch.inputs, likelihood)
            if total is None and count * p[0].nbytes <= MOST_BYTES:
                total = torch.zeros(count, *p.shape[1:], dtype=torch.float64)
            if total is None or p.shape[1:] != total.shape[1:]:
                others = [perturbed_weights(full, layers, sample, generator) for _ in range(drawn + 1, samples)]
                return Recomputed(full, [weights, *others], likelihood, count)
            total[batch.index] += p
    assert total is not None
    return total / max(samples, 1)


def mean_outputs(
    full: nn.Module, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], likelihood: Likelihood
) -> Tensor:
    """Mean output [b, ...] float64 on the CPU of the network with some of its weights replaced."""
    outputs: Tensor = functional_call(full, dict(weights), kwargs=beside(full, inputs))
    return likelihood.mean_output(outputs.detach().float()).cpu().to(torch.float64)


def perturbed_weights(
    full: nn.Module,
    layers: Collection[str],
    sample: Callable[[str, torch.Generator], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One draw mu + sample of all layers' weights, by state_dict name, in the layers' own shapes."""
    drawn = {}
    for name in layers:
        layer = named_layer(full, name)
        delta = matrix_to_weight(layer, sample(name, generator))
        drawn[weight_key(name, layer)] = layer.weight.detach() + delta.to(layer.weight)
    return drawn


def named_layer(module: nn.Module, name: str) -> Layer:
    """The layer of that name.

    Raises:
        Refused: the network has no such layer, or it is an embedding.
    """
    layer = find_layer(module, name)
    if isinstance(layer, nn.Embedding):
        raise Refused(f"{name} is an Embedding, not a layer that multiplies its inputs")
    return layer


def count_examples(batches: Sequence[Batch]) -> int:
    """Number of examples n.

    Raises:
        Refused: the indices are not 0 to n - 1, each once.
    """
    index = torch.cat([batch.index for batch in batches]) if batches else torch.empty(0)
    if not torch.equal(index.sort().values, torch.arange(len(index))):
        raise Refused("the batches must hold every calibration example once")
    return len(index)


def beside(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module arguments on the device of the module's parameters; batches may be on another device."""
    device = next(module.parameters()).device
    return {name: x.to(device) for name, x in inputs.items()}
