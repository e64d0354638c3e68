"""Rehearsal: a run's method quantizes a few small random layers before its time is measured.

Some work is done once in a process or an installation: numba compiles functions, tables of normal codes are designed,
libraries start threads. Without a rehearsal, this time would count for the first run of a sweep. The layers are of the
kinds in the run's network; the result is discarded.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bayesq.allocation import Knapsack
from bayesq.budget import Budget
from bayesq.calibration.samples import Pairs
from bayesq.calibration.statistic import LayerStatistics, Source, Statistic, with_required
from bayesq.contract import Context, Distortion, LayerProblem, RowBits
from bayesq.entropy import StreamAllocation
from bayesq.loop import quantize_layers
from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH
from bayesq.quant.layers import Layer, kernel_positions, weight_to_matrix
from bayesq.quant.tensor import QuantizedTensor
from bayesq.recipe import Recipe

log = logging.getLogger(__name__)

# Limits of a rehearsed layer: groups, rows of all groups together, and columns (or one kernel's positions if more).
GROUPS, ROWS, COLUMNS = 8, 256, 288
# Least number of weights of all rehearsed layers, if the network has as many: from about 36,000 weights on, BayesQ with
# levels=lloyd stores a table of levels for 3 bits and chooses the initial ranges of such rows differently.
WEIGHTS = 36_000
# Least budget of a rehearsed stream: small layers have little room.
REHEARSED_BITS = 3
# With codec=entropy, BayesQ codes layers with fewer rows in a group, or few bits in a column, differently.
FEW_ROWS = 4
# Random examples behind the statistics, and how many of them have a gradient of the weight.
EXAMPLES, GRADIENTS = 320, 16


def rehearse(recipe: Recipe, layers: Mapping[str, Layer]) -> None:
    """Quantize and decode random layers like those of the network. The run reports the errors, which are ignored here.

    `recipe` is a second instance of the run's recipe, because the rehearsal changes it.
    """
    method, allocator = recipe.method, recipe.allocator
    problems = small_problems(layers, recipe.statistics | method.statistics)

    def allocate(
        layers: Sequence[LayerProblem],
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
        row_bits: RowBits | None = None,
        scales: int = 0,
    ) -> Mapping[str, Tensor]:
        copies = [replace(layer, notes={}) for layer in layers]  # discards the predicted risks
        priced = () if row_bits is None else (row_bits,)
        allocator.allocate(copies, Budget(MAX_WIDTH, "code"), 0, distortion, *priced)
        return {layer.name: all_widths(layer.rows) for layer in layers}

    try:
        if recipe.whitenings is not None:
            recipe.whitenings.prepare(problems)
        if isinstance(allocator, Knapsack):
            allocator.pinned, allocator.allowed = {}, {}  # patterns may match no rehearsed layer
            if recipe.proxy is not None:
                allocator.rounded(problems[0], MIN_WIDTH)
        prefix = RandomPrefix() if recipe.inputs != "full" else None
        context = Context.of_seed(0)
        if recipe.codec == "entropy":
            budget = Budget(max(recipe.budget.bits, REHEARSED_BITS), "code")
            context = replace(context, stream=StreamAllocation(allocator, budget, {p.name: p for p in problems}))
        for _, tensor in quantize_layers(method, problems, allocate, context, prefix):
            tensor.dequantize()
    except Exception as error:
        log.debug("the rehearsal ended early: %s", error)


def all_widths(rows: int) -> Tensor:
    """Widths uint8 [rows] that cycle through all widths."""
    return (MIN_WIDTH + torch.arange(rows) % (MAX_WIDTH - MIN_WIDTH + 1)).to(torch.uint8)


def small_problems(layers: Mapping[str, Layer], statistics: Iterable[Statistic]) -> list[LayerProblem]:
    """Random layers: one of each kind, then more until they have WEIGHTS weights.

    Kinds differ in the layer's type, in having several groups or kernel positions, and in few rows in a group.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(weight_to_matrix(layer).shape) for name, layer in layers.items()}
    problems: list[LayerProblem] = []
    kinds, weights = set(), 0
    for name in sorted(layers, key=lambda name: -torch.Size(shapes[name]).numel()):
        kernel = kernel_positions(layers[name])
        g, r, c = shapes[name]
        kind = (type(layers[name]), g > 1, min(r, FEW_ROWS), kernel > 1)
        if kind in kinds and weights >= WEIGHTS:
            continue
        kinds.add(kind)
        channels = min(c // kernel, max(COLUMNS // kernel, 1))
        g = min(g, GROUPS)
        shape = (g, min(r, ROWS // g), kernel * channels)
        weight = torch.randn(shape, generator=generator)
        weights += weight.numel()
        read = LayerStatistics(name, with_required(statistics), partial(random_statistic, shape))
        problems.append(LayerProblem(name, type(layers[name]).__name__, weight, read, positions_per_channel=kernel))
    return problems


class RandomPrefix:
    """Replaces the quantized prefix: the inputs of each layer stay its random ones."""

    def take(self, layer: LayerProblem) -> LayerProblem:
        """The layer with the same inputs behind the prefix."""
        return replace(layer, prefix_statistic=layer.statistic)

    def give(self, layer: LayerProblem, tensor: QuantizedTensor) -> QuantizedTensor:
        """The tensor as it is."""
        return tensor


def random_statistic(shape: tuple[int, int, int], statistic: Statistic) -> Tensor:
    """A statistic of random inputs and gradients for a layer of shape g, r, c; the same in every call."""
    required = {one.name: random_statistic(shape, one) for one in statistic.requires}
    if statistic.source is Source.STATISTICS:
        return statistic.derive(required)
    if statistic.source is Source.PAIRED_INPUTS:
        return statistic.neutral(*shape)
    generator = torch.Generator().manual_seed(0)
    g, r, c = shape
    d, x = (torch.randn(g, EXAMPLES, size, generator=generator) for size in (r, c))
    values, count = x if statistic.source is Source.INPUTS else d, EXAMPLES
    if statistic.source is Source.WEIGHT_GRADIENTS:  # few examples, because each gradient is as large as the weight
        one_by_one = [part[:, :GRADIENTS].transpose(0, 1).unsqueeze(2) for part in (d, x)]
        pairs = Pairs(g, 1, True, lambda: iter([(None, one_by_one[0], one_by_one[1])]))
        values, count = statistic.gradients(pairs, required), GRADIENTS
    return statistic.finish(statistic.add(None, statistic.contribution(values)), count, shape)
