"""The posterior-predictive teacher of a distillation, and networks drawn from the posterior (SPEC section 5).

    p(y | x) = 1/S sum_s p(y | f(x; w_s)),   w_s ~ q

The teacher's mean output (see `bayesq.likelihood`) is all that the KL divergence to a student needs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.quant.layers import Layer, find_layer, matrix_to_weight, weight_key


class Batch(Protocol):
    """Some calibration examples: `module(**inputs)` gives outputs [b, ...]; `index` [b] counts from 0 to n - 1."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Module arguments [b, ...]."""
        ...

    @property
    def index(self) -> Tensor:
        """Positions [b] of the examples in the calibration set, on the CPU."""
        ...


@torch.no_grad()
def posterior_predictive(
    full: nn.Module,
    layers: Collection[str],
    sample: Callable[[str, torch.Generator], Tensor],
    batches: Sequence[Batch],
    samples: int,
    generator: torch.Generator,
    likelihood: Likelihood,
) -> Tensor:
    """Teacher's mean outputs [n, ...] float64 on the CPU, in the order of `Batch.index`: class probabilities, or means.

    Args:
        full: full-precision network, in eval mode.
        layers: layers whose weights are drawn.
        sample: draws a layer's weight perturbation [g, r, c], w_s - mu.
        batches: all n examples, each once, on any device.
        samples: S; 0 = the full-precision network itself.
        likelihood: of the outputs.
    """
    if full.training:
        raise Refused("the teacher must be in eval mode")
    total: Tensor | None = None
    with tqdm(total=max(samples, 1) * len(batches), desc="teacher", disable=None, leave=False) as bar:
        for _ in range(max(samples, 1)):
            weights = perturbed_weights(full, layers, sample, generator) if samples else {}
            for batch in batches:
                outputs: Tensor = functional_call(full, weights, kwargs=beside(full, batch.inputs))
                p = likelihood.mean_output(outputs.detach().float()).cpu().to(torch.float64)
                if total is None:
                    total = torch.zeros(count_examples(batches), *p.shape[1:], dtype=torch.float64)
                total[batch.index] += p
                bar.update()
    if total is None:
        raise Refused("there is no example to distil from")
    return total / max(samples, 1)


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
        Refused: there is none, or it is an embedding.
    """
    layer = find_layer(module, name)
    if isinstance(layer, nn.Embedding):
        raise Refused(f"{name} is an Embedding, not a layer that multiplies its inputs")
    return layer


def count_examples(batches: Sequence[Batch]) -> int:
    """Number of examples n, checked: every index from 0 to n - 1 once."""
    index = torch.cat([batch.index for batch in batches]) if batches else torch.empty(0)
    if not torch.equal(index.sort().values, torch.arange(len(index))):
        raise Refused("the batches must hold every calibration example once")
    return len(index)


def beside(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module arguments on the device of the module's parameters: batches wait elsewhere until it is their turn."""
    device = next(module.parameters()).device
    return {name: x.to(device) for name, x in inputs.items()}
