"""Task-aware proxy by short Monte Carlo: how far a layer's predicted risk is from the divergence it causes.

The predicted risk is quadratic and uses one Fisher block per layer. One factor per layer corrects it:

    kappa_l = E_{w~q, x}[ KL( p(.|x, w) || p(.|x, w with layer l rounded) ) ] / predicted_l

measured at one reference width with S posterior draws and multiplied into the layer's whole risk curve before bits are
allocated. All layers share the S draws (common random numbers), so differences between factors come from the layers,
not from the draws. KL: `bayesq.likelihood`. Reference width: `pipeline.weigh_by_proxy`. Multiplied in by:
`Knapsack.allocate` and `Knapsack.steps`.

The layer is rounded on affine grids, and its risk is predicted for uniform levels.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.quant.layers import matrix_to_weight, weight_key
from bayesq.quant.one_by_one import one_by_one
from bayesq.teacher import named_layer, perturbed_weights

# A factor outside this range comes from too few draws or examples, not from the layer.
KAPPA_RANGE = (0.05, 20.0)


@dataclass(frozen=True)
class Kappa:
    """The measured factors.

    Attributes:
        factors: by layer, within KAPPA_RANGE.
        measured: mean divergence of each layer, in the likelihood's unit.
        fallbacks: how often a factor was not the measured one: kappa_undefined (measured or predicted value is not a
            positive number; the factor is 1) and kappa_clamped.
    """

    factors: dict[str, float]
    measured: dict[str, float]
    fallbacks: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def measure_kappa(
    full: nn.Module,
    layers: Collection[str],
    rounded: Callable[[str], Tensor],
    sample: Callable[[str, torch.Generator], Tensor],
    predicted: Mapping[str, float],
    inputs: Mapping[str, Tensor],
    samples: int,
    generator: torch.Generator,
    likelihood: Likelihood,
    batch_size: int | None = None,
    alone: bool = False,
) -> Kappa:
    """The factor kappa of every layer.

    A draw also differs from the rounded weights by the posterior's noise. To second order the measured divergence is

        1/2 deltaT F delta + gamma / (2 N),   delta = w_hat - mu,

    with gamma the layer's effective number of parameters. `predicted` is the first term: with the default N the second
    is negligible. With samples=0 the mean weights replace the draws, and only the first term is measured.

    Args:
        full: full-precision network, in eval mode; unchanged.
        layers: names of the layers to quantize.
        rounded: a layer's weights [g, r, c] rounded at the reference width; called once per layer.
        sample: draws a layer's weight perturbation [g, r, c], w - mu.
        predicted: predicted risk of each layer at the reference width, in the likelihood's unit.
        inputs: module arguments [n, ...] of a few calibration examples.
        samples: S.
        likelihood: of the outputs.
        batch_size: examples per forward pass; None = all at once.
        alone: each example is a separate batch, without padding.

    Raises:
        Refused: training mode, or a layer has no prediction.
    """
    if full.training:
        raise Refused("the proxy needs the network in eval mode")
    if missing := [name for name in layers if name not in predicted]:
        raise Refused(f"no predicted risk for {', '.join(missing)}")
    parts = one_by_one(inputs) if alone else _parts(inputs, batch_size)

    @cache
    def candidate(name: str) -> Tensor:
        layer = named_layer(full, name)
        return matrix_to_weight(layer, rounded(name)).to(layer.weight)

    step = partial(_divergences, full, layers, candidate, likelihood)
    measured = dict.fromkeys(layers, 0.0)
    draws = max(samples, 1)
    with tqdm(total=draws * len(parts) * len(layers), desc="proxy", disable=None, leave=False) as bar:
        for _ in range(draws):
            weights = perturbed_weights(full, layers, sample, generator) if samples else {}
            rows = [step(weights, part, bar) for part in parts]
            for name in layers:
                measured[name] += float(torch.cat([of_part[name] for of_part in rows]).mean()) / draws
    return _kappa(measured, predicted)


def _kappa(measured: dict[str, float], predicted: Mapping[str, float]) -> Kappa:
    """Factors of all layers from their measured divergences."""
    factors, fallbacks = {}, {"kappa_undefined": 0, "kappa_clamped": 0}
    for name, divergence in measured.items():
        factors[name], fallback = _factor(divergence, predicted[name])
        if fallback:
            fallbacks[fallback] += 1
    return Kappa(factors, measured, fallbacks)


def _divergences(
    full: nn.Module,
    layers: Collection[str],
    candidate: Callable[[str], Tensor],
    likelihood: Likelihood,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    bar: "tqdm[NoReturn]",
) -> dict[str, Tensor]:
    """KL [b] between the network with these weights and the same with one layer rounded, by layer.

    Args:
        candidate: a layer's rounded weight in the layer's shape.
    """
    reference, mask = _outputs(full, weights, inputs), likelihood.counted(inputs)
    mask = None if mask is None else mask.cpu()
    divergences = {}
    for name in layers:
        changed = {**weights, weight_key(name, named_layer(full, name)): candidate(name)}
        other = _outputs(full, changed, inputs)
        divergences[name] = likelihood.kl(reference, other, mask)
        bar.update()
    return divergences


def _factor(measured: float, predicted: float) -> tuple[float, str | None]:
    """kappa, and which fallback it took."""
    if not (0 < measured < math.inf and 0 < predicted < math.inf):
        return 1.0, "kappa_undefined"
    kappa = measured / predicted
    low, high = KAPPA_RANGE
    return min(max(kappa, low), high), None if low <= kappa <= high else "kappa_clamped"


def _parts(inputs: Mapping[str, Tensor], batch_size: int | None) -> list[dict[str, Tensor]]:
    count = len(next(iter(inputs.values())))
    step = batch_size or count
    return [{name: x[start : start + step] for name, x in inputs.items()} for start in range(0, count, step)]


def _outputs(module: nn.Module, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Outputs of one part, float32 on the CPU."""
    outputs: Tensor = functional_call(module, dict(weights), kwargs=dict(inputs))
    return outputs.float().cpu()
