"""Rounding in randomly rotated columns, for every method whose statistics can be rotated.

With error feedback, codes of one width cost the risk 1/2 sum_r G_rr sum_c D_c e^2. A rotation R of the inputs keeps the
product of the D_c, because it keeps det A, and makes them nearly equal, so that their sum falls towards their number
times their geometric mean. It also makes the weights of a row more like draws of a normal distribution.

    W' = W RT,   A' = R A RT,   C' = R C RT
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT
from bayesq.calibration.statistic import Source, Statistic
from bayesq.contract import Allocate, Context, LayerProblem, Method, StreamBudget
from bayesq.errors import Refused
from bayesq.quant.rotation import SEED_BYTES, Rotation
from bayesq.quant.tensor import QuantizedTensor

# Statistics of inputs that have a rotated form.
ROTATED = (INPUT_MOMENT, CROSS_MOMENT)
# Stored for each layer: the seed, and a byte that tells that rows are not rotated.
STORED_BITS = 8 * (SEED_BYTES + 1)


class RotatedColumns:
    """A method that rounds W RT in place of W, with an allocator that sees W RT too.

    Args:
        method: see `bayesq.contract.Method`.
        allocator: the statistics that it reads.

    Raises:
        Refused: one of them reads a statistic without a rotated form, or the method rotates by itself.
    """

    def __init__(self, method: Method, allocator: frozenset[Statistic] = frozenset()) -> None:
        for reader, statistics in (("method", method.statistics), ("allocator", allocator)):
            fixed = sorted(
                one.name for one in statistics if one not in ROTATED and one.source is not Source.OUTPUT_GRADIENTS
            )
            if fixed:
                raise Refused(
                    f"rotate=true: this {reader} reads {fixed[0]}, which has no rotated form; choose rotate=false"
                )
        if getattr(method, "rotates", False):
            raise Refused("rotate=true: this method rotates both sides by itself; choose rotate=false")
        self.method, self.statistics = method, method.statistics
        self._rotations: dict[str, Rotation] = {}

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """The method's `prepare` with rotated layers; the seeds count as its codebooks do."""
        seeds = STORED_BITS * len(layers)

        def allocate_rest(
            layers: Sequence[LayerProblem], codebook_bits: int = 0, *rest: Any, **named: Any
        ) -> Mapping[str, Tensor]:
            return allocate(layers, codebook_bits + seeds, *rest, **named)

        if context.stream is not None:
            context = replace(context, stream=_WithSeeds(context.stream, seeds))
        return self.method.prepare([self._rotated(layer, context) for layer in layers], allocate_rest, context)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """The method's `quantize_layer` of the rotated layer."""
        rotated = self._rotated(layer, context)
        return replace(self.method.quantize_layer(rotated, width, context), rotation=rotated.rotation)

    def _rotated(self, layer: LayerProblem, context: Context) -> LayerProblem:
        if layer.name not in self._rotations:
            seed = int(torch.randint(2 ** (8 * SEED_BYTES), (1,), generator=context.generator))
            self._rotations[layer.name] = Rotation(seed, both=False)
        return rotated(layer, self._rotations[layer.name])


def rotated(layer: LayerProblem, rotation: Rotation) -> LayerProblem:
    """The layer with rotated columns."""
    prefix = layer.prefix_statistic
    return replace(
        layer,
        weight=rotation.forward(layer.weight.double()).to(layer.weight),
        statistic=partial(_turned, rotation, layer.statistic),
        prefix_statistic=None if prefix is None else partial(_turned, rotation, prefix),
        rotation=rotation,
    )


def in_columns_of(layer: LayerProblem, original: LayerProblem) -> LayerProblem:
    """The original of a layer, with all its statistics, in the columns of the layer."""
    if layer.rotation is None:
        return original
    statistic = partial(_turned, layer.rotation, original.statistic)
    return replace(original, weight=layer.weight, statistic=statistic, rotation=layer.rotation)


@dataclass(frozen=True)
class _WithSeeds:
    """A stream's budget that pays for the seeds too."""

    budget: StreamBudget
    seeds: int

    def steps(self, layers: Sequence[LayerProblem]) -> Mapping[str, Tensor]:
        return self.budget.steps(layers)

    def capacity(self, layers: Sequence[LayerProblem], overhead: float, scales: float = 0) -> float:
        return self.budget.capacity(layers, overhead + self.seeds, scales)


def _turned(rotation: Rotation, load: Callable[[str], Tensor], kind: str) -> Tensor:
    """A statistic of the rotated inputs."""
    value = load(kind)
    rotated = {one.name for one in ROTATED}
    return rotation.moment(value.double()).to(value) if kind in rotated else value
