"""Moment correction: what rounding did to the mean and variance of activations, undone without touching a code.

Rounded weights shift and rescale the outputs of their layer. Batch normalisation divides by statistics of the
full-precision network, so the shift survives it and grows from layer to layer. One pass in forward order repairs this
for every method alike. With m, v the per-channel mean and variance in the full-precision network and m', v' those in
the quantized network whose earlier part is already corrected:

    input of a BatchNorm         x <- (x - m') sqrt(v / v') + m,   folded into the norm's affine parameters
    output of any other layer    x <- x - m' + m,                  folded into the layer's bias

A related correction from batch normalisation statistics alone is in Nagel et al., arXiv 1906.04721, section 4.2.

With inputs=prefix or paired, the moments of each layer are matched when it is rounded instead (`bayesq.in_step`).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.errors import Refused
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import MASK, find_layer, mask_samples
from bayesq.quant.mean_takers import moment_stops, movable_layers
from bayesq.quant.one_by_one import one_by_one
from bayesq.quant.resume import INPUT, OUTPUT, Readers, Resumable

Norm = nn.BatchNorm1d | nn.BatchNorm2d
# Bounds of v / v'. Beyond them a variance is an estimate from few active positions rather than an effect of rounding.
VARIANCE_RATIO = (0.25, 4.0)
# A variance below this share of the squared mean is what float32 activations leave of a constant channel.
CONSTANT_CHANNEL = 1e-12
# Examples that go through the networks together, which bounds the memory.
MAX_EXAMPLES = 256
# Examples that go through a network as one batch; the activations of more would not fit in the caches.
PART_EXAMPLES = 16
# Elements converted to float64 at a time, but at least one example: 1 MiB, which fits in a cache.
PART_ELEMENTS = 2**17


@dataclass(frozen=True)
class Correction:
    """What a correction changed.

    Attributes:
        tensors: changed parameters and buffers by state_dict name: norm affine parameters (running statistics of
            norms without any) and layer biases, in their own dtype.
        uncorrected: quantized layers that nothing corrects: without a bias and without a BatchNorm that reads their
            output, never called, or called several times in one forward pass.
    """

    tensors: dict[str, Tensor]
    uncorrected: tuple[str, ...]


@dataclass
class _Reference:
    """Measured in the full-precision network.

    Attributes:
        moments: at every stop where a correction is possible; not valid for modules that are called several times.
        calls: how often a pass calls each stop.
        read_by: which norm reads which layer's output.
        readers: see `Resumable.learn`.
    """

    moments: dict[str, "_Moments"]
    calls: Counter[str]
    read_by: dict[str, str]
    readers: Readers


@torch.no_grad()
def correct_moments(
    full: nn.Module,
    quantized: nn.Module,
    layers: Collection[str],
    inputs: Mapping[str, Tensor],
    max_examples: int = MAX_EXAMPLES,
    alone: bool = False,
) -> Correction:
    """Match the moments of `quantized` to those of `full`, in place, norm by norm and layer by layer.

    The full-precision network is measured first, in small batches. In the quantized one all batches stop together at
    each module: the moments over all examples are corrected there, then the passes continue, so every module gets
    corrected inputs. `max_examples` evenly spaced examples are used; they go to the network's device, so their number
    bounds the memory. Padding (inputs["attention_mask"]) does not count. LayerNorm standardises each position
    separately; layers before it are corrected through their bias.

    Args:
        full: full-precision network, in eval mode.
        quantized: a copy of it with quantized weights; changed in place.
        layers: names of the quantized layers. Those that are not modules, such as experts, stay uncorrected.
        inputs: module arguments [n, ...]; `module(**inputs)` runs the network.
        max_examples: examples that are used.
        alone: each example is a separate batch without padding, for networks whose outputs depend on the batch, or
            whose layers have inputs in which the batch is not the first dimension.

    Raises:
        Refused: a network is in training mode, a name is no layer, there is no example, or batches take different ways
            through the network.
    """
    if full.training or quantized.training:
        raise Refused("moments can only be matched in eval mode")
    for name in layers:
        find_layer(full, name)
    movable = movable_layers(full, layers)
    device = next(full.parameters()).device
    inputs = {name: x.to(device) for name, x in _thin_out(inputs, max_examples).items()}
    parts = one_by_one(inputs) if alone else _parts(inputs)
    stops, blocks = moment_stops(full, layers), find_blocks(full)
    reference = _record(full, stops, movable, blocks, parts)

    def norm_corrects(layer: str) -> bool:
        return reference.calls[reference.read_by.get(layer, "")] == 1

    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    # Two calls would need two corrections of one set of parameters.
    corrected = {
        name: which
        for name, which in stops.items()
        if reference.calls[name] == 1 and (which == INPUT or (name in movable and not norm_corrects(name)))
    }
    correct = partial(_correct, quantized, reference, corrected, parts)
    Resumable(quantized, corrected, blocks).in_step(parts, correct, reference.readers)
    changed = {name: x for name, x in quantized.state_dict().items() if not torch.equal(x, before[name])}
    uncorrected = tuple(
        name for name in layers if reference.calls[name] != 1 or not (norm_corrects(name) or name in movable)
    )
    return Correction({name: tensor.clone() for name, tensor in changed.items()}, uncorrected)


def _correct(
    quantized: nn.Module,
    reference: _Reference,
    corrected: Mapping[str, str],
    parts: Sequence[Mapping[str, Tensor]],
    name: str,
    x: Sequence[Tensor],
) -> None:
    """Match the moments of one module; if they are those of its output, also shift the outputs `x` in place.

    Args:
        quantized: the network; changed in place.
        reference: moments of the full-precision network.
        corrected: whether the moments of a module are those of its INPUT or of its output.
        parts: the batches.
        name: of the module.
        x: its inputs or outputs for each batch.
    """
    module: Any = quantized.get_submodule(name)
    target, now = reference.moments[name], _Moments.over(x, parts, module)
    if corrected[name] == INPUT:
        _fold(module, *target.mean_variance(), *now.mean_variance())
        return
    shift = target.mean() - now.mean()
    module.bias += shift.to(module.bias)
    for output in x:
        output += _along_channels(shift.to(output), output, _channel_dim(module))


def _thin_out(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """At most `count` examples, evenly spaced: batches may be sorted, by length for instance."""
    total = len(next(iter(inputs.values()))) if inputs else 0
    if not total or count < 1:
        raise Refused("there is no example to match moments on")
    if total <= count:
        return dict(inputs)
    return {name: x[(torch.arange(count) * total // count).to(x.device)] for name, x in inputs.items()}


def _parts(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Small batches; sequences are sorted by length, each batch trimmed to its longest."""
    mask = inputs.get(MASK)
    if mask is None or mask.dim() != 2:
        split = [x.split(PART_EXAMPLES) for x in inputs.values()]
        return [dict(zip(inputs, part, strict=True)) for part in zip(*split, strict=True)]
    # One past the last real token: padding in front of it stays.
    ends = (mask != 0).mul(torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    parts = []
    for index in ends.argsort(descending=True, stable=True).split(PART_EXAMPLES):
        longest = max(int(ends[index].max()), 1)
        parts.append(
            {name: x[index, :longest] if x.shape[:2] == mask.shape else x[index] for name, x in inputs.items()}
        )
    return parts


def _record(
    full: nn.Module,
    stops: Mapping[str, str],
    movable: Collection[str],
    blocks: Collection[str],
    parts: Sequence[Mapping[str, Tensor]],
) -> _Reference:
    """The moments at every stop where a correction is possible, batch by batch.

    Raises:
        Refused: the batches take different ways through the network.
    """
    resumable = Resumable(full, stops, blocks)
    sums: dict[str, _Moments] = {}
    order: list[str] = []
    read_by: dict[str, str] = {}
    # Weak references: identity can be checked while the tensor lives, and no activation is kept for it.
    outputs: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def look(inputs: Mapping[str, Tensor], way: list[str], name: str, x: Tensor) -> None:
        way.append(name)
        if name in sums:
            sums[name].add(x, inputs)

    def look_first(name: str, x: Tensor) -> None:
        look(parts[0], order, name, x)
        if stops[name] == OUTPUT:
            outputs[name] = weakref.ref(x), x._version
            return
        for layer, (output, version) in outputs.items():
            # An in-place activation keeps the tensor and raises its version: the norm then reads something else.
            if output() is x and x._version == version:
                read_by[layer] = name

    def begin() -> Callable[[str, Tensor], None]:
        for learnt in (order, read_by, outputs):
            learnt.clear()
        measured = (name for name, which in stops.items() if which == INPUT or name in movable)
        sums.update({name: _Moments(full.get_submodule(name)) for name in measured})
        return look_first

    readers = resumable.learn(parts[0], begin)
    for inputs in parts[1:]:
        way: list[str] = []
        resumable.pass_through(inputs, partial(look, inputs, way))
        if way != order:
            name = next(a or b for a, b in zip_longest(way, order) if a != b)
            raise Refused(f"{name}: not every batch calls it, or not in the same order")
    return _Reference(sums, Counter(order), read_by, readers)


def _channel_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d) else -1


def _along_channels(values: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """[c] shaped to broadcast over the channels of `like`."""
    shape = [1] * like.dim()
    shape[channel_dim] = -1
    return values.reshape(shape)


def _samples(
    x: Tensor, channel_dim: int, examples: int, mask: Tensor | None
) -> Iterator[tuple[Tensor, list[int], int | Tensor]]:
    """A few examples at a time in float64, padding zero; the dimensions that are not channels; how many samples.

    Args:
        x: [examples, ..] with channels in dimension 1 or -1; leading dimensions larger than the batch are positions.
        mask: [examples, positions] or None.
    """
    channels = x.shape[channel_dim]
    if x.numel() % (examples * channels):  # without a batch dimension, such as position embeddings
        examples, mask = 1, None
    if mask is None and channel_dim == 1:
        # Images as they lie in memory: bringing channels last costs three times as much.
        by_example, over = x.reshape(len(x), channels, -1), [0, 2]
    else:
        by_example, over = x.movedim(channel_dim, -1).reshape(examples, 1, -1, channels), [0, 1, 2]
    step = max(1, PART_ELEMENTS // max(by_example[0].numel(), 1))
    for start in range(0, len(by_example), step):
        part = slice(start, start + step)
        samples = by_example[part].to(widest(x.device))
        count: int | Tensor = by_example[part].numel() // channels
        if mask is not None:
            samples, count = mask_samples(samples, mask[part])
        yield samples, over, count


class _Moments:
    """Sums over examples and positions in float64, padding left out.

    Args:
        module: a norm, for mean and variance of its inputs, or a layer, for the mean of its outputs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.channel_dim = _channel_dim(module)
        self.squared = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        self.total = self.squares = self.count = torch.zeros(())

    @classmethod
    def over(cls, x: Sequence[Tensor], parts: Sequence[Mapping[str, Tensor]], module: nn.Module) -> "_Moments":
        """The moments of all parts' tensors."""
        moments = cls(module)
        for part, inputs in zip(x, parts, strict=True):
            moments.add(part, inputs)
        return moments

    def add(self, x: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Add the tensor of one part, see `_samples`."""
        if not self.total.dim():
            self.total = self.squares = self.count = torch.zeros((), dtype=widest(x.device), device=x.device)
        mask = inputs.get(MASK)
        if not self.squared and self.channel_dim == -1 and mask is not None and x.shape[:-1] == mask.shape:
            # Tokens of one sequence are added in their own precision, by a product, without float64 copies.
            self.total = self.total + (mask.to(x)[:, None] @ x).to(self.total.dtype).sum((0, 1))
            self.count = self.count + mask.sum()
            return
        for samples, over, n in _samples(x, self.channel_dim, len(next(iter(inputs.values()))), mask):
            self.total, self.count = self.total + samples.sum(over), self.count + n
            if self.squared:
                self.squares = self.squares + samples.square().sum(over)

    def mean(self) -> Tensor:
        """[c] float64."""
        return self.total / self.count

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [c] in float64, because the variance may be a small difference of large numbers."""
        mean = self.mean()
        return mean, (self.squares / self.count - mean.square()).clamp_(min=0)


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no wider numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def _fold(norm: Norm, mean: Tensor, variance: Tensor, now_mean: Tensor, now_variance: Tensor) -> None:
    """Put x -> (x - m') a + m, a = sqrt(v / v'), in front of the norm.

        weight' = a weight,   bias' = bias + weight (m - running_mean - a (m' - running_mean)) / sigma,
        sigma = sqrt(running_var + eps)

    A norm without affine parameters gets running_var' = sigma^2 / a^2 - eps and running_mean' = m' + (running_mean
    - m) / a instead.

    Args:
        mean, variance: m, v [c].
        now_mean, now_variance: m', v' [c].
    """
    assert norm.running_mean is not None and norm.running_var is not None
    varies = now_variance > CONSTANT_CHANNEL * now_mean.square()
    ratio = torch.where(varies, variance / now_variance, torch.ones_like(variance)).clamp(*VARIANCE_RATIO)
    factor = ratio.sqrt()
    wide = widest(norm.running_mean.device)
    center, spread = norm.running_mean.to(wide), norm.running_var.to(wide) + norm.eps
    if norm.affine:
        weight = norm.weight.to(wide)
        shift = weight * (mean - center - factor * (now_mean - center)) / spread.sqrt()
        norm.weight.copy_(factor * weight)
        norm.bias.add_(shift.to(norm.bias))
    else:
        norm.running_mean.copy_(now_mean + (center - mean) / factor)
        norm.running_var.copy_((spread / ratio - norm.eps).clamp(min=0))
