"""The trained part of a quantized network: scales, codebook levels, biases and norm parameters (SPEC section 5)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.quant.grids import FP16_MAX, MAX_WIDTH, stored_scale, zero_value
from bayesq.quant.layers import Layer, is_layer, matrix_to_weight, weight_key
from bayesq.quant.tensor import Codebook, QuantizedTensor
from bayesq.teacher import named_layer

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm


class Student:
    """The trained part of a quantized network.

        W = scale * exp(factor) * (level(code) - zero) / column_scale

    Trained are factor [R, S] per row and column group, levels per codebook (shared by the layers that name it), biases
    and norm parameters, each as a move from where it was: in logarithms, in level units over the square root of the
    number of rows that read the level, and in root mean squares of the tensor, so that moves of one size matter alike.
    (In plain level units a gradient step moves the few shared levels and little else: on MRPC the divergence rose
    fivefold.) Codes, zeros and column scales stay.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
        self.module, self.tensors = module, tensors
        self.levels: dict[str, Tensor] = {}
        readers: dict[str, int] = {}
        for name, tensor in tensors.items():
            for width, book in tensor.codebooks.items():
                readers[book.name] = readers.get(book.name, 0) + int((tensor.width == width).sum())
                levels = book.levels.to(named_layer(module, name).weight.device, torch.float32)
                if not torch.equal(self.levels.setdefault(book.name, levels), levels):
                    raise ValueError(f"two different codebooks are named {book.name}")
        self.level_units = {name: max(rows, 1) ** -0.5 for name, rows in readers.items()}
        self.layers = {name: _Decoder(named_layer(module, name), tensor) for name, tensor in tensors.items()}
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
        """Levels of each codebook where training has taken them."""
        return {name: x + self.level_units[name] * self.level_moves[name] for name, x in self.levels.items()}

    def moved_affine(self) -> dict[str, Tensor]:
        """Biases and norm parameters where training has taken them."""
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
        books = {
            name: Codebook(name, in_order(x).clamp(-FP16_MAX, FP16_MAX).to("cpu", torch.float16))
            for name, x in self.moved_levels().items()
        }
        tensors = {}
        for name, tensor in self.tensors.items():
            scale = tensor.scale.to(torch.float32)
            moved = stored_scale(scale * self.factors[name].detach().cpu().exp())
            # a scale that is not positive has no logarithm and stays
            scale = torch.where(scale > 0, moved, scale).to(torch.float16)
            own = {width: books[book.name] for width, book in tensor.codebooks.items()}
            tensors[name] = replace(tensor, scale=scale, codebooks=own)
        moved_affine = self.moved_affine()
        return tensors, {name: x for name, x in moved_affine.items() if not torch.equal(x, self.affine[name])}


def in_order(levels: Tensor) -> Tensor:
    """Non-decreasing levels: the mean of the running maximum from below and the running minimum from above.

    Both are non-decreasing, and both leave ordered levels as they are.
    """
    return (levels.cummax(0).values + levels.flip(0).cummin(0).values.flip(0)) / 2


class _Decoder:
    """Differentiable dequantization of one layer; see `Student`.

    Attributes:
        index: [R, C] int16 position of each weight's level in the layer's table: the levels of its widths, one after
            the other.
    """

    def __init__(self, layer: Layer, tensor: QuantizedTensor) -> None:
        self.layer, self.groups, self.group_size = layer, tensor.groups, tensor.group_size
        device = layer.weight.device
        offset, start = torch.zeros(MAX_WIDTH + 1, dtype=torch.long), 0
        # what each width in use reads: a trained codebook by name, or levels that stay
        self.parts: list[str | Tensor] = []
        for width in tensor.width.unique().tolist():
            levels = tensor.levels(width)
            offset[width], start = start, start + len(levels)
            self.parts.append(tensor.codebooks[width].name if width in tensor.codebooks else levels.to(device))
        index = tensor.level_indices() + offset[tensor.width.long()][:, None]
        self.index = index.to(device, torch.int16)
        self.scale = tensor.scale.to(device, torch.float32)
        self.zero = zero_value(tensor.zero, tensor.width[:, None], torch.float32).to(device)
        self.column_scale = None
        if tensor.column_scale is not None:
            channels = tensor.column_scale.shape[1]
            spread = tensor.column_scale.repeat_interleave(tensor.codes.shape[1] // channels, dim=1)
            self.column_scale = spread.to(device, torch.float32)[:, None, :]

    def weight(self, factor: Tensor, levels: Mapping[str, Tensor]) -> Tensor:
        """The layer's weight in its own shape.

        Args:
            factor: [R, S] logarithm of what multiplies the scale.
            levels: codebook name -> levels.
        """
        table = torch.cat([levels[part] if isinstance(part, str) else part for part in self.parts])
        level: Tensor = _Lookup.apply(table, self.index)
        scale, zero = self.scale * factor.exp(), self.zero
        if self.group_size is not None:
            columns = self.index.shape[1]
            scale, zero = (x.repeat_interleave(self.group_size, dim=1)[:, :columns] for x in (scale, zero))
        value = (scale * (level - zero)).reshape(self.groups, -1, self.index.shape[1])
        if self.column_scale is not None:
            value = value / self.column_scale
        return matrix_to_weight(self.layer, value).to(self.layer.weight.dtype)


class _Lookup(torch.autograd.Function):
    """table[index], keeping only the int16 index for the backward pass: indexing itself keeps eight bytes a weight."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        """Entries of table [L] at index [R, C]."""
        ctx.save_for_backward(index)
        ctx.length = len(table)
        return table[index.int()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        """Gradient of each table entry: the sum over the places it went to."""
        if not ctx.needs_input_grad[0]:
            return None, None
        (index,), (gradient,) = ctx.saved_tensors, gradients
        return torch.bincount(index.flatten(), gradient.flatten(), minlength=ctx.length).to(gradient), None


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Biases of layers and affine parameters of norms, by state_dict name, each shared one once."""
    chosen: dict[str, Tensor] = {}
    for name, x in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        parent = module.get_submodule(owner)
        if isinstance(parent, Norm) or (kind == "bias" and is_layer(parent)):
            chosen[name] = x
    return chosen


def _size(x: Tensor) -> float:
    """Root mean square of a tensor, 1 where all is zero."""
    return float(x.detach().square().mean().sqrt()) or 1.0
