"""Layer <-> matrix views: the one shape convention of the project.

Every quantized layer is a stack of matrices W[g, r, c] with g the convolution group (1 for Linear), r the output row
within the group and c the input column (in_features, or in_channels/groups * kh * kw). At a sample n, which is an
(example, position) pair, out[n, g, r] = sum_c W[g, r, c] x[n, g, c].
"""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d
# The network's input that tells real tokens from padding, [examples, positions].
MASK = "attention_mask"


def quantizable_layers(module: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """Linear and Conv2d layers of `module` in definition order, by name, without those that match a pattern.

    Args:
        exclude: fnmatch patterns on module names (config key layers.exclude); one that matches an embedding only is
            no mistake.

    Raises:
        ValueError: a pattern matches nothing, no layer is left, or a layer is of a kind that cannot be quantized.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    if not layers:
        raise ValueError("the network has no Linear or Conv2d layer to quantize: choose another model")
    names = [*layers, *(name for name, child in module.named_modules() if isinstance(child, nn.Embedding))]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"layers.exclude: pattern {pattern!r} matches no Linear, Conv2d or Embedding layer")
    kept = {name: layer for name, layer in layers.items() if not _matches(name, exclude)}
    if not kept:
        raise ValueError("layers.exclude leaves no Linear or Conv2d layer to quantize")
    for name, layer in kept.items():
        plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        if type(layer).forward is not plain.forward and not _is_dynamic_same(layer):
            # A weight-standardised convolution, say: its stored weight is not the one it multiplies with.
            raise ValueError(
                f"layer {name} is a {type(layer).__name__} with a forward pass of its own, which may change its "
                f"weight: add {name} to layers.exclude"
            )
    return kept


def embedding_tables(module: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Embedding]:
    """Embeddings of `module` in definition order, by name, without those that match a pattern of `exclude`."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding) and not _matches(name, exclude)
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def groups_of(layer: Layer | nn.Embedding) -> int:
    """Number of convolution groups g; 1 for all others."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def weight_to_matrix(layer: Layer | nn.Embedding) -> Tensor:
    """The layer's weight as a stack of matrices [g, r, c] (a view where the memory layout allows it).

    Of an embedding, r is the entry that a token selects.
    """
    weight = layer.weight.detach()
    return weight.reshape(groups_of(layer), weight.shape[0] // groups_of(layer), -1)


def matrix_to_weight(layer: Layer | nn.Embedding, matrix: Tensor) -> Tensor:
    """Inverse of `weight_to_matrix`: [g, r, c] -> the layer's own weight shape."""
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
    if isinstance(layer, nn.Linear):
        return x.reshape(examples, 1, -1, x.shape[-1])
    columns = _unfold(layer, _pad(layer, x))
    b, _, length, _ = columns.shape
    if b == examples:
        return columns
    return columns.reshape(examples, b // examples, layer.groups, length, -1).transpose(1, 2).flatten(2, 3)


def sample_shape(layer: Layer, x: Tensor, examples: int) -> tuple[int, int, int, int]:
    """Shape [b, g, l, c] of `input_samples` without computing them."""
    if isinstance(layer, nn.Linear):
        return examples, 1, x.numel() // (examples * x.shape[-1]), x.shape[-1]
    height, width = _output_size(layer, _pad(layer, torch.empty(x.shape, device="meta")))
    columns = x.shape[1] // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    return examples, layer.groups, x.shape[0] // examples * height * width, columns


def input_blocks(layer: Layer, x: Tensor, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """`input_samples` of one example, some of its positions at a time.

    A convolution's are whole rows of output pixels, as many as give at most `elements` elements, at least one; the
    samples of other inputs, and of a convolution whose batch is larger than one, come at once.

    Args:
        x: input as the layer receives it, of one example.
        elements: of a block.

    Yields:
        the positions, and their samples [1, g, l, c].
    """
    shape = sample_shape(layer, x, 1)
    if isinstance(layer, nn.Linear) or x.shape[0] > 1 or math.prod(shape) <= elements:
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
    """[b, g, l, c]"""
    columns = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return columns.reshape(len(columns), layer.groups, -1, columns.shape[-1]).transpose(2, 3)


def _output_size(layer: nn.Conv2d, padded: Tensor) -> tuple[int, int]:
    height, width = (
        (padded.shape[2 + axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1) // layer.stride[axis] + 1
        for axis in range(2)
    )
    return height, width


def output_samples(layer: Layer, gradient: Tensor, examples: int) -> Tensor:
    """Output-shaped tensor (an output gradient) as samples d[b, g, l, r]; same conventions as `input_samples`."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(examples, 1, -1, gradient.shape[-1])
    b, channels = gradient.shape[:2]
    rows = gradient.reshape(b, layer.groups, channels // layer.groups, -1).transpose(2, 3)
    if b == examples:
        return rows
    return rows.reshape(examples, b // examples, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)


def _pad(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply the convolution's own padding, so that unfolding needs none."""
    if _is_dynamic_same(layer):
        pads = [_same_padding(x.shape[-1 - i], layer, 1 - i) for i in range(2)]
        return F.pad(x, [*pads[0], *pads[1]])
    if layer.padding == "valid":
        return x
    # nn.Conv2d keeps the padding it resolved from "same", numbers and modes in this list, in F.pad's order.
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
        samples with padding set to zero, and the number of (example, position) pairs that count; where a mask decides
        it, a tensor on its device, because reading it would wait for the device.
    """
    b, _, length, _ = samples.shape
    if mask is None or mask.shape != (b, length) or length == 1:
        return samples, b * length
    keep = mask.to(device=samples.device, dtype=torch.bool)
    return samples * keep[:, None, :, None].to(samples.dtype), keep.sum()
