"""Layer <-> matrix views: the one shape convention of the project.

Every quantized layer is a stack of matrices W[g, r, c] with g the convolution group (1 for Linear), r the output row
within the group and c the input column (in_features, or in_channels/groups * kh * kw). At a sample n, which is an
(example, position) pair, out[n, g, r] = sum_c W[g, r, c] x[n, g, c].
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesq.errors import Refused

# The network's input that marks real tokens (1) and padding (0), [examples, positions].
MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class ParameterLayer:
    """A weight that the network multiplies with by a function call, not by calling a Linear or a Conv2d.

    Examples: the Conv1D of GPT-2, the experts of a mixture of experts, the in_proj_weight of a MultiheadAttention, and
    a Linear whose weight another module passes to `F.linear` itself. Samples are those of a Linear.

    Attributes:
        owner: the module that has the parameter.
        parameter: its name there.
        kind: for layers.csv, such as Conv1D or Experts.
        groups: matrices in the stack: experts, or the query, key and value part of an in_proj_weight.
        transposed: each matrix is stored as [c, r].
        whole: the layer has the owner's name, not the parameter's.
    """

    owner: nn.Module
    parameter: str
    kind: str
    groups: int = 1
    transposed: bool = False
    whole: bool = False

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        weight: Tensor = getattr(self.owner, self.parameter)
        return weight

    @property
    def parts(self) -> list[Tensor]:
        """The matrix of each group, as stored: views of the parameter."""
        weight = self.weight.detach()
        return list(weight.reshape(self.groups, -1, weight.shape[-1])) if self.groups > 1 else [weight]


Layer = nn.Linear | nn.Conv2d | ParameterLayer


def quantizable_layers(module: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """Layers of `module` that can be quantized and match no pattern, by name, in definition order.

    These are Linear and Conv2d layers, and the weights of `ParameterLayer`. A weight that several layers share is
    listed once, under the first name; one that an embedding shares is not listed, because a changed table would change
    the embedding too.

    Args:
        exclude: fnmatch patterns on layer names (config key layers.exclude); a pattern may match embeddings only.

    Raises:
        Refused: a pattern matches nothing, no layer is left, or a layer is of a kind that cannot be quantized.
    """
    layers = _all_layers(module)
    tables = {name: child for name, child in module.named_modules() if isinstance(child, nn.Embedding)}
    if not layers:
        raise Refused("the network has no Linear or Conv2d layer to quantize: choose another model")
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in (*layers, *tables)):
            raise Refused(f"layers.exclude: pattern {pattern!r} matches no Linear, Conv2d or Embedding layer")
    chosen = {name: layer for name, layer in layers.items() if not _matches(name, exclude)}
    if not chosen:
        raise Refused("layers.exclude leaves no Linear or Conv2d layer to quantize")
    for name, layer in chosen.items():
        _check_plain(name, layer)
    # a weight that an excluded layer shares is not quantized
    taken = {id(table.weight) for table in tables.values()}
    taken |= {id(layer.weight) for name, layer in layers.items() if name not in chosen}
    free = {name: layer for name, layer in chosen.items() if id(layer.weight) not in taken}
    if not free:
        raise Refused("all layers share their weights with embeddings or excluded layers: none is left to quantize")
    return _once(free)


def embedding_tables(module: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Embedding]:
    """Embeddings of `module` in definition order, by name, without those that match a pattern of `exclude`.

    A table that several embeddings share is listed once; one that a Linear layer shares (a tied head) or that an
    excluded embedding shares is not listed.
    """
    tables = {name: child for name, child in module.named_modules() if isinstance(child, nn.Embedding)}
    taken = {id(layer.weight) for layer in _all_layers(module).values()}
    taken |= {id(table.weight) for name, table in tables.items() if _matches(name, exclude)}
    return _once({name: table for name, table in tables.items() if id(table.weight) not in taken})


def find_layer(module: nn.Module, name: str) -> Layer | nn.Embedding:
    """The layer of that name, see `find_layers`."""
    return find_layers(module, [name])[name]


def find_layers(module: nn.Module, names: Iterable[str]) -> dict[str, Layer | nn.Embedding]:
    """Layers as `quantizable_layers` or `embedding_tables` name them; Refused if there is none of a name."""
    modules = dict(module.named_modules())
    return {name: _found(modules, name) for name in names}


def _found(modules: Mapping[str, nn.Module], name: str) -> Layer | nn.Embedding:
    if isinstance(child := modules.get(name), nn.Linear | nn.Conv2d | nn.Embedding):
        return child
    for owner, prefix in ((name, ""), (name.rpartition(".")[0], name.rpartition(".")[2])):
        for parameter, layer in _parameter_layers(modules[owner]).items() if owner in modules else ():
            if parameter == prefix:
                return layer
    kind = f"is a {type(child).__name__}" if child is not None else "is not part of the network"
    raise Refused(f"{name:.100} {kind}, not a layer that can be quantized")


def is_layer(module: nn.Module) -> bool:
    """Whether the module is itself a layer: a Linear, a Conv2d or a Conv1D."""
    return isinstance(module, nn.Linear | nn.Conv2d) or "" in _parameter_layers(module)


def same_layer(layer: Layer, module: nn.Module, name: str) -> Layer:
    """The layer of a copy of the network that corresponds to `layer` of the original."""
    other = find_layer(module, name)
    if isinstance(layer, ParameterLayer) and isinstance(other, nn.Linear):
        return function_called(other)
    assert not isinstance(other, nn.Embedding)
    return other


def function_called(layer: nn.Linear) -> ParameterLayer:
    """A Linear whose weight the network passes to `F.linear` without calling the layer."""
    return ParameterLayer(layer, "weight", "Linear", whole=True)


def weight_key(name: str, layer: Layer | nn.Embedding) -> str:
    """Name of the layer's weight in the network's state_dict."""
    return name if isinstance(layer, ParameterLayer) and not layer.whole else f"{name}.weight"


def weight_keys(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Names in the state_dict of the weights of some layers, and of all that share one of them (tied tables)."""
    weights = {id(layer.weight) for layer in find_layers(module, names).values()}
    return {key for key, x in module.named_parameters(remove_duplicate=False) if id(x) in weights}


def kind_of(layer: Layer | nn.Embedding) -> str:
    """The kind of layer, for layers.csv."""
    return layer.kind if isinstance(layer, ParameterLayer) else type(layer).__name__


def _all_layers(module: nn.Module) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            layers[name] = child
        for parameter, layer in _parameter_layers(child).items():
            layers[".".join(filter(None, (name, parameter)))] = layer
    return layers


def _parameter_layers(owner: nn.Module) -> dict[str, ParameterLayer]:
    """Weights of a module that are not modules, by the name after the module's, or "" for the module's name itself.

    Classes of transformers are known by name and attributes, because importing them costs seconds.
    """
    kind = type(owner).__name__
    matrices = {name: x for name, x in owner.named_parameters(recurse=False) if x.ndim >= 2}
    if kind == "Conv1D" and hasattr(owner, "nf") and "weight" in matrices:
        return {"": ParameterLayer(owner, "weight", kind, transposed=True, whole=True)}
    if isinstance(owner, nn.MultiheadAttention) and "in_proj_weight" in matrices:
        return {"in_proj_weight": ParameterLayer(owner, "in_proj_weight", kind, groups=3)}
    if hasattr(owner, "num_experts"):
        transposed = bool(getattr(owner, "is_transposed", False))
        return {
            name: ParameterLayer(owner, name, "Experts", groups=len(x), transposed=transposed)
            for name, x in matrices.items()
            if x.ndim == 3
        }
    return {}


def _check_plain(name: str, layer: Layer) -> None:
    """Refuse a layer that does not multiply by the weight it stores.

    Raises:
        Refused: naming the layer.
    """
    if isinstance(layer, ParameterLayer):
        return
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        # weight_norm, spectral_norm or a parametrization would overwrite the quantized weight
        raise Refused(
            f"layer {name} computes its weight from other parameters (weight_norm or the like): "
            f"add {name} to layers.exclude"
        )
    if isinstance(layer, nn.Conv2d) and not is_plain(layer) and not _is_dynamic_same(layer):
        # For example a weight-standardised convolution, which does not multiply with its stored weight.
        raise Refused(
            f"layer {name} is a {type(layer).__name__} with another forward pass than Conv2d, which may change its "
            f"weight: add {name} to layers.exclude"
        )


def is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether calling the layer does what calling a Linear or Conv2d of torch does."""
    plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    return type(layer).forward is plain.forward


Weighted = TypeVar("Weighted", nn.Embedding, "nn.Linear | nn.Conv2d | ParameterLayer")


def _once(layers: dict[str, Weighted]) -> dict[str, Weighted]:
    """The layers without those that share the weight of one before them."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        first.setdefault(id(layer.weight), name)
    return {name: layer for name, layer in layers.items() if first[id(layer.weight)] == name}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def groups_of(layer: Layer | nn.Embedding) -> int:
    """Number of groups g: of a convolution, or matrices in a stack; 1 for all others."""
    return layer.groups if isinstance(layer, nn.Conv2d | ParameterLayer) else 1


def weight_to_matrix(layer: Layer | nn.Embedding) -> Tensor:
    """The layer's weight as a stack of matrices [g, r, c] (a view where the memory layout allows it).

    Of an embedding, r is the entry that a token selects.
    """
    weight, groups = layer.weight.detach(), groups_of(layer)
    if isinstance(layer, ParameterLayer):
        stack = weight.reshape(groups, -1, weight.shape[-1])
        return stack.transpose(1, 2) if layer.transposed else stack
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def matrix_to_weight(layer: Layer | nn.Embedding, matrix: Tensor) -> Tensor:
    """Inverse of `weight_to_matrix`: [g, r, c] -> the shape of the layer's weight."""
    if isinstance(layer, ParameterLayer) and layer.transposed:
        matrix = matrix.transpose(1, 2)
    return matrix.reshape(layer.weight.shape)


def input_samples(layer: Layer, x: Tensor, examples: int) -> Tensor:
    """The layer's input as samples x[b, g, l, c]: example b, group g, position l, column c.

    A convolution's positions are its output pixels: sum_c W[g,r,c] x[b,g,l,c] is its output there. A Linear's
    positions are all leading dimensions after the batch. Leading dimensions larger than the batch (window partitions)
    are folded into positions.

    Args:
        x: input as the layer receives it.
        examples: batch size b.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(examples, 1, -1, x.shape[-1])
    columns = _unfold(layer, _pad(layer, x))
    b, _, length, _ = columns.shape
    if b == examples:
        return columns
    return columns.reshape(examples, b // examples, layer.groups, length, -1).transpose(1, 2).flatten(2, 3)


def sample_shape(layer: Layer, x: Tensor, examples: int) -> tuple[int, int, int, int]:
    """Shape [b, g, l, c] of `input_samples` without computing them."""
    if not isinstance(layer, nn.Conv2d):
        return examples, 1, x.numel() // (examples * x.shape[-1]), x.shape[-1]
    height, width = _output_size(layer, _pad(layer, torch.empty(x.shape, device="meta")))
    columns = x.shape[1] // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    return examples, layer.groups, x.shape[0] // examples * height * width, columns


def input_blocks(layer: Layer, x: Tensor, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """`input_samples` of one example, some of its positions at a time.

    A convolution's blocks are whole rows of output pixels: at least one, and as many as have at most `elements`
    elements. Other inputs, and those of a convolution whose batch is larger than one, are a single block.

    Args:
        x: input as the layer receives it, of one example.
        elements: largest number of elements of a block.

    Yields:
        the positions, and their samples [1, g, l, c].
    """
    shape = sample_shape(layer, x, 1)
    if not isinstance(layer, nn.Conv2d) or x.shape[0] > 1 or math.prod(shape) <= elements:
        yield slice(0, shape[2]), input_samples(layer, x, 1)
        return
    padded = _pad(layer, x)
    height, width = _output_size(layer, padded)
    step = max(1, elements * height // math.prod(shape))
    stride, reach = layer.stride[0], layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    for start in range(0, height, step):
        stop = min(start + step, height)
        part = padded[:, :, start * stride : (stop - 1) * stride + reach]
        yield slice(start * width, stop * width), _unfold(layer, part)


def _unfold(layer: nn.Conv2d, padded: Tensor) -> Tensor:
    """Samples [b, g, l, c] of a padded input, stored as [g, c, b, l].

    A product over all samples then needs no copy; after F.unfold it would need one.
    """
    padded = padded.unfold(2, layer.dilation[0] * (layer.kernel_size[0] - 1) + 1, layer.stride[0])
    padded = padded.unfold(3, layer.dilation[1] * (layer.kernel_size[1] - 1) + 1, layer.stride[1])
    windows = padded[..., :: layer.dilation[0], :: layer.dilation[1]]  # [b, channel, h, w, kh, kw]
    b, _, height, width = windows.shape[:4]
    columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(layer.groups, -1, b, height * width)
    return columns.permute(2, 0, 3, 1)


def _output_size(layer: nn.Conv2d, padded: Tensor) -> tuple[int, int]:
    height, width = (
        (padded.shape[2 + axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1) // layer.stride[axis] + 1
        for axis in range(2)
    )
    return height, width


def output_samples(layer: Layer, gradient: Tensor, examples: int) -> Tensor:
    """Output-shaped tensor (an output gradient) as samples d[b, g, l, r]; same conventions as `input_samples`."""
    if not isinstance(layer, nn.Conv2d):
        return gradient.reshape(examples, 1, -1, gradient.shape[-1])
    b, channels = gradient.shape[:2]
    rows = gradient.reshape(b, layer.groups, channels // layer.groups, -1).transpose(2, 3)
    if b == examples:
        return rows
    return rows.reshape(examples, b // examples, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)


def _pad(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply the convolution's padding, so that unfolding needs none."""
    if _is_dynamic_same(layer):
        pads = [_same_padding(x.shape[-1 - i], layer, 1 - i) for i in range(2)]
        return F.pad(x, [*pads[0], *pads[1]])
    if layer.padding == "valid":
        return x
    # nn.Conv2d stores the padding that results from "same", numbers and modes in this list, in F.pad's order.
    pad = list(layer._reversed_padding_repeated_twice)
    if not any(pad):
        return x
    return F.pad(x, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _is_dynamic_same(layer: Layer) -> bool:
    # By name: timm's class pads inside forward from the input size, and importing timm here costs seconds.
    return type(layer).__name__ == "Conv2dSame"


def _same_padding(size: int, layer: nn.Conv2d, axis: int) -> tuple[int, int]:
    """TensorFlow's "same" rule along one axis (0 height, 1 width): output = ceil(size / stride), extra pixel behind."""
    kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def mask_samples(samples: Tensor, mask: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """Zero the samples at masked positions and count those that remain.

    Args:
        samples: [b, g, l, c].
        mask: [b, l] with 1 for real tokens, or None; ignored where the layer has other positions than the mask
            (a pooled input, for instance, has one position an example).

    Returns:
        samples with padding set to zero, and the number of (example, position) pairs that count: with a mask a tensor
        on its device, because reading the number would wait for the device.
    """
    b, _, length, _ = samples.shape
    if mask is None or mask.shape != (b, length) or length == 1:
        return samples, b * length
    keep = mask.to(device=samples.device, dtype=torch.bool)
    return samples * keep[:, None, :, None].to(samples.dtype), keep.sum()


def kernel_positions(layer: Layer) -> int:
    """kh * kw of a convolution, 1 for Linear: neighbouring columns that read the same input channel."""
    return layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1
