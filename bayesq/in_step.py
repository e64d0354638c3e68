"""Layers behind the quantized prefix, in forward order: inputs and target of each; its output moments are preserved."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.calibration.block_samples import BlockSource
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT, PairedMoments
from bayesq.calibration.prefix import PrefixInputs
from bayesq.contract import LayerProblem
from bayesq.quant.grids import FP16_MAX
from bayesq.quant.tensor import QuantizedTensor
from bayesq.target import choose_target, output_variance, row_factors

# Which output moments of a layer are preserved: means by biases and norms, variances by row scales.
KEPT = ("none", "mean", "moments")


class InStep:
    """The network behind which layers are quantized one by one.

    Args:
        inputs: statistics behind the prefix.
        targets: round the target of `bayesq.target` in place of W.
        keep: one of KEPT: which moments of each layer's outputs stay those of full precision.
        takers: by layer, the module whose bias or running mean takes up the mean of its outputs.
        blocks: for methods that reconstruct whole blocks.

    Attributes:
        parameters: biases and running means that keep the means, by state_dict name.
    """

    def __init__(
        self,
        inputs: PrefixInputs,
        targets: bool,
        keep: str,
        takers: Mapping[str, str],
        blocks: BlockSource | None = None,
    ) -> None:
        self.inputs, self.targets, self.keep, self.takers, self.blocks = inputs, targets, keep, takers, blocks
        self.parameters: dict[str, Tensor] = {}

    def take(self, layer: LayerProblem) -> LayerProblem:
        """The layer with the target as its weight, and with its inputs behind the prefix.

        Where the mean of its outputs is kept, its input moment is that of the centred inputs.
        """
        if self.blocks is not None:
            layer = replace(layer, block=partial(self.blocks.block, layer.name))
            if not self.inputs.statistics:  # the method reads no moments
                return layer
        sums = self.inputs.paired(layer.name)
        statistic = partial(self.inputs.statistic, layer.name)
        if sums is None:
            return replace(layer, prefix_statistic=statistic)
        centred = layer.name in self.takers
        weight = layer.weight
        if self.targets:
            target = choose_target(weight, sums, centred)
            weight, layer.notes["target_change"] = target.weight, target.change
            if math.isfinite(target.penalty):
                layer.notes["target_lambda"] = target.penalty

        def load(kind: str) -> Tensor:
            if kind == CROSS_MOMENT.name:
                return sums.moments(centred).cross.float()
            return sums.moments(centred).prefix.float() if kind == INPUT_MOMENT.name else statistic(kind)

        return replace(layer, weight=weight, prefix_statistic=load)

    def give(self, layer: LayerProblem, tensor: QuantizedTensor) -> QuantizedTensor:
        """Put the rounded layer into the network; returns it, with keep="moments" scaled to full-precision variance."""
        sums = self.inputs.paired(layer.name) if self.blocks is None or self.keep != "none" else None
        parameters: dict[str, Tensor] = {}
        if sums is not None:
            moments = sums.moments(centred=True)
            if self.keep == "moments":
                tensor = self._with_variance(layer, tensor, moments)
            full, now = (
                torch.einsum("grc,gc->gr", w.double(), mean).flatten()
                for w, mean in ((layer.weight, moments.full_mean), (tensor.dequantize(), moments.prefix_mean))
            )
            if layer.name in self.takers:
                parameters = taken_up(self.inputs.networks[0].module, self.takers[layer.name], full - now)
            else:
                layer.notes["mean_shift"] = float((now - full).square().mean().sqrt())
        self.inputs.replace(layer.name, tensor, parameters)
        self.parameters |= parameters
        return tensor

    def _with_variance(self, layer: LayerProblem, tensor: QuantizedTensor, moments: PairedMoments) -> QuantizedTensor:
        """The tensor with row scales that give each output its full-precision variance."""
        mean = moments.full_mean
        centred = layer.statistic(INPUT_MOMENT.name).double() - mean[:, :, None] * mean[:, None, :]
        full = output_variance(layer.weight, centred)
        now = output_variance(tensor.dequantize(), moments.prefix)
        layer.notes["variance_ratio"] = float(now.sum() / full.sum()) if bool(full.any()) else 1.0
        return scaled(tensor, row_factors(full, now).flatten())


def scaled(tensor: QuantizedTensor, factors: Tensor) -> QuantizedTensor:
    """The tensor with its rows times factors [R]; unchanged if rows are rotated: no stored number is of one row."""
    if tensor.rotation is not None and tensor.rotation.both:
        return tensor
    if tensor.code.absolute:
        return replace(tensor, code=tensor.code.times(factors, tensor.width))
    scale = (tensor.scale.double() * factors[:, None]).clamp(max=FP16_MAX)
    return replace(tensor, scale=scale.to(torch.float16))


def taken_up(module: nn.Module, name: str, shift: Tensor) -> dict[str, Tensor]:
    """The parameter of a module that adds shift [c] to the mean of a layer's outputs: its bias, or a running mean.

    Returns:
        the changed parameter or buffer by state_dict name.
    """
    taker: Any = module.get_submodule(name)
    if getattr(taker, "running_mean", None) is not None:
        return {f"{name}.running_mean": (taker.running_mean.double() - shift.to(taker.running_mean.device)).float()}
    return {f"{name}.bias": (taker.bias.double() + shift.to(taker.bias.device)).to(taker.bias.dtype)}
