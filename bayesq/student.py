"""The trained part of a quantized network: scales, codebook levels, biases and norm parameters."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.errors import Refused
from bayesq.quant.grids import stored_scale
from bayesq.quant.layers import Layer, is_layer, matrix_to_weight, weight_key
from bayesq.quant.tensor import QuantizedTensor
from bayesq.teacher import named_layer

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm


class Student:
    """The trained part of a quantized network.

        W' = scale * exp(factor) * (level(code) - zero) / column_scale

    W' is the weight, rotated if the layer is (`QuantizedTensor.rotation`). Trained are the factors [R, S] (one per row
    and column group), the stored levels (tables of layers or rows), biases and norm parameters. Each is trained as a
    move from its start value. Units are chosen so that moves of equal size change the outputs about equally: logarithms
    for factors; level steps over the square root of the number of rows that read the level; root mean squares of the
    tensor for biases and norms. (In plain level steps, a gradient step changes almost only the few shared levels: on
    MRPC the divergence rose fivefold.) Codes, zeros, column scales, rotations and overlays do not change.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
        self.module, self.tensors = module, tensors
        self.levels: dict[str, Tensor] = {}
        steps: dict[str, float | Tensor] = {}
        readers: dict[str, int] = {}
        for name, tensor in tensors.items():
            device = named_layer(module, name).weight.device
            for part in tensor.code.parts(tensor.width):
                key = part.key(name)
                if key is None:
                    continue
                levels = part.levels.to(device)
                if not torch.equal(self.levels.setdefault(key, levels), levels):
                    raise Refused(f"two different codebooks are named {key}")
                readers[key] = readers.get(key, 0) + part.rows
                steps[key] = part.step.to(device) if isinstance(part.step, Tensor) else part.step
        self.level_units = {key: steps[key] * rows**-0.5 for key, rows in readers.items()}
        self.layers = {name: _Decoder(name, named_layer(module, name), tensor) for name, tensor in tensors.items()}
        self.affine = {name: x.detach().clone() for name, x in trained_parameters(module).items()}
        self.factors = {name: torch.zeros_like(decoder.scale) for name, decoder in self.layers.items()}
        self.level_moves = {name: torch.zeros_like(x) for name, x in self.levels.items()}
        self.affine_moves = {name: torch.zeros_like(x) for name, x in self.affine.items()}
        for x in self.moves():
            x.requires_grad_(True)

    def moves(self) -> list[Tensor]:
        """Everything that is trained."""
        return [*self.factors.values(), *self.level_moves.values(), *self.affine_moves.values()]

    def moved_levels(self) -> dict[str, Tensor]:
        """Levels of each codebook after the moves."""
        return {name: x + self.level_units[name] * self.level_moves[name] for name, x in self.levels.items()}

    def moved_affine(self) -> dict[str, Tensor]:
        """Biases and norm parameters after the moves."""
        return {name: x + _size(x) * self.affine_moves[name] for name, x in self.affine.items()}

    def overrides(self) -> dict[str, Tensor]:
        """Weights, biases and norm parameters by state_dict name, differentiable."""
        levels = self.moved_levels()
        weights = {
            weight_key(name, decoder.layer): decoder.weight(self.factors[name], levels)
            for name, decoder in self.layers.items()
        }
        return {**weights, **self.moved_affine()}

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """The student as a file holds it: QuantizedTensors, and the parameters that differ from the network's."""
        levels = self.moved_levels()
        tensors = {}
        for name, tensor in self.tensors.items():
            scale = tensor.scale.to(torch.float32)
            moved = stored_scale(scale * self.factors[name].detach().cpu().exp())
            # a scale that is not positive has no logarithm and stays
            scale = torch.where(scale > 0, moved, scale).to(torch.float16)
            parts = tensor.code.parts(tensor.width)
            moved_parts = {part.name: levels[key] for part in parts if part.name and (key := part.key(name))}
            tensors[name] = replace(tensor, scale=scale, code=tensor.code.with_levels(moved_parts, tensor.width))
        moved_affine = self.moved_affine()
        return tensors, {name: x for name, x in moved_affine.items() if not torch.equal(x, self.affine[name])}


class _Decoder:
    """Differentiable dequantization of one layer; see `Student`.

    Attributes:
        parts: the parts of the layer's table: names of trained levels, or fixed levels.
        index: [R, C] position of each weight's level in the table; int16 if the table is short enough.
        scale: [R, S] float32.
    """

    def __init__(self, name: str, layer: Layer, tensor: QuantizedTensor) -> None:
        self.layer, self.tensor = layer, tensor
        device = layer.weight.device
        parts = tensor.code.parts(tensor.width)
        self.parts = [part.key(name) or part.levels.to(device) for part in parts]
        short = sum(len(part.levels) for part in parts) <= torch.iinfo(torch.int16).max
        self.index = tensor.positions().to(device, torch.int16 if short else torch.int32)
        self.scale = tensor.scale.to(device, torch.float32)

    def weight(self, factor: Tensor, levels: Mapping[str, Tensor]) -> Tensor:
        """The layer's weight in its shape.

        Args:
            factor: [R, S] logarithm of the factor on the scale.
            levels: name -> trained levels.
        """
        table = torch.cat([levels[part] if isinstance(part, str) else part for part in self.parts])
        level: Tensor = _Lookup.apply(table, self.index)
        value = self.tensor.weights(level, self.scale * factor.exp())
        return matrix_to_weight(self.layer, value).to(self.layer.weight.dtype)


class _Lookup(torch.autograd.Function):
    """table[index] that saves only the short index for the backward pass; plain indexing saves 8 bytes per weight."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        """Entries of table [L] at index [R, C]."""
        ctx.save_for_backward(index)
        ctx.length = len(table)
        return table[index.int()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        """Gradient of each table entry: the sum over all weights that use it."""
        if not ctx.needs_input_grad[0]:
            return None, None
        (index,), (gradient,) = ctx.saved_tensors, gradients
        return torch.bincount(index.flatten(), gradient.flatten(), minlength=ctx.length).to(gradient), None


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Biases of layers and affine parameters of norms, by state_dict name; shared parameters appear once."""
    chosen: dict[str, Tensor] = {}
    for name, x in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        parent = module.get_submodule(owner)
        if isinstance(parent, Norm) or (kind == "bias" and is_layer(parent)):
            chosen[name] = x
    return chosen


def _size(x: Tensor) -> float:
    """Root mean square of a tensor; 1 for zeros."""
    return float(x.detach().square().mean().sqrt()) or 1.0
