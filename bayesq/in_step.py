"""Layers behind the quantized prefix: each gets its inputs and target when its turn comes, and leaves kept moments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT
from bayesq.calibration.prefix import PrefixInputs
from bayesq.contract import LayerProblem
from bayesq.quant.tensor import QuantizedTensor
from bayesq.target import choose_target, output_variance, row_factors


@dataclass(frozen=True)
class Keep:
    """Moments of a layer's outputs that are kept at no stored bit.

    Attributes:
        mean: by biases and norms.
        variance: by row scales.
        centred: round in the metric of centred inputs where the mean is kept.
    """

    mean: bool = False
    variance: bool = False
    centred: bool = False


class InStep:
    """The network behind which layers are quantized one by one.

    Args:
        inputs: statistics behind the prefix.
        targets: round the target of `bayesq.target` in place of W.
        keep: see `Keep`.
        takers: by layer, the module whose bias or running mean takes up the mean of its outputs.
    """

    def __init__(self, inputs: PrefixInputs, targets: bool, keep: Keep, takers: Mapping[str, str]) -> None:
        self.inputs, self.targets, self.keep, self.takers = inputs, targets, keep, takers
        self.parameters: dict[str, Tensor] = {}

    def take(self, layer: LayerProblem, row_weights: Tensor | None = None) -> LayerProblem:
        """The layer with the target for its weight, and with its inputs behind the prefix."""
        sums = self.inputs.paired(layer.name)
        statistic = partial(self.inputs.statistic, layer.name)
        if sums is None:
            return replace(layer, prefix_statistic=statistic)
        centred = self.keep.centred and layer.name in self.takers
        weight = layer.weight
        if self.targets:
            target = choose_target(weight, sums, centred, row_weights)
            layer.notes["target_lambda"], layer.notes["target_change"] = target.penalty, target.change
            weight = target.weight

        def load(kind: str) -> Tensor:
            if kind == CROSS_MOMENT.name:
                return sums.moments(centred).cross.float()
            return sums.moments(centred).prefix.float() if kind == INPUT_MOMENT.name else statistic(kind)

        return replace(layer, weight=weight, prefix_statistic=load)

    def give(self, layer: LayerProblem, tensor: QuantizedTensor) -> QuantizedTensor:
        """Put the rounded layer into the network; returns it with the row scales that keep its outputs' variance."""
        sums, parameters = self.inputs.paired(layer.name), {}
        if sums is not None:
            moments = sums.moments(centred=True)
            full_mean, mean = moments.full_mean, moments.prefix_mean
            if self.keep.variance:
                a = layer.statistic(INPUT_MOMENT.name).double()
                a = a - full_mean[:, :, None] * full_mean[:, None, :]
                now = output_variance(tensor.dequantize(), moments.prefix)
                factors = row_factors(output_variance(layer.weight, a), now)
                layer.notes["variance_ratio"] = float(factors.square().mean())
                tensor = scaled(tensor, factors.flatten())
            shift = torch.einsum("grc,gc->gr", layer.weight.double(), full_mean)
            shift = (shift - torch.einsum("grc,gc->gr", tensor.dequantize().double(), mean)).flatten()
            if self.keep.mean and layer.name in self.takers:
                parameters = taken_up(self.inputs.networks[0].module, self.takers[layer.name], shift)
        self.inputs.replace(layer.name, tensor, parameters)
        self.parameters |= parameters
        return tensor


def scaled(tensor: QuantizedTensor, factors: Tensor) -> QuantizedTensor:
    """The tensor with its rows times factors [R]."""
    if tensor.code.absolute:
        return tensor
    return replace(tensor, scale=(tensor.scale.double() * factors[:, None]).to(torch.float16))


def taken_up(module: nn.Module, name: str, shift: Tensor) -> dict[str, Tensor]:
    """The parameter of a module that raises the mean of what it gives by shift [c]: its bias, or a running mean.

    Returns:
        the changed parameter or buffer by state_dict name.
    """
    taker: Any = module.get_submodule(name)
    if getattr(taker, "running_mean", None) is not None:
        return {f"{name}.running_mean": (taker.running_mean.double() - shift.to(taker.running_mean.device)).float()}
    return {f"{name}.bias": (taker.bias.double() + shift.to(taker.bias.device)).to(taker.bias.dtype)}
