"""BRECQ (Li et al., arXiv 2102.05426): learned rounding of all layers of a block together.

The block gets its inputs x' behind the quantized prefix and is to give its full-precision outputs z:

    mean over positions of sum_i f_i (z_i - block(x'; W(v))_i)^2

with f = 1, or the diagonal of the output's Fisher, in units of its mean. Each step reads one batch. A block is a part
that the network runs as a whole (a residual block, a transformer layer), or a single layer outside of all blocks.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from baselines.learned_rounding import Schedule, SoftLayer, learn
from bayesq.calibration.block_samples import BLOCK_SAMPLES, Block, BlockBatch
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Allocate, Context, LayerProblem
from bayesq.errors import Refused
from bayesq.quant.grids import CLIP_RULES
from bayesq.quant.tensor import QuantizedTensor


class BRECQ:
    """The published algorithm.

    Args:
        clip: of the grids, "minmax" or "mse".
        fisher: weigh output errors by the Fisher; False = plain squared errors.
        steps, learning_rate, strength: see `Schedule`.
    """

    statistics: frozenset[Statistic] = frozenset({BLOCK_SAMPLES})

    def __init__(self, clip: str, fisher: bool, steps: int, learning_rate: float, strength: float) -> None:
        if clip not in CLIP_RULES:
            raise Refused(f"method.clip={clip}: choose from {', '.join(CLIP_RULES)}")
        self.clip, self.fisher = clip, fisher
        self.schedule = Schedule(steps, learning_rate, strength)

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths."""
        self._layers = {layer.name: layer for layer in layers}
        self._widths = allocate(layers)
        self._learned: dict[str, QuantizedTensor] = {}
        return self._widths

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Learn the rounding of the whole block at its first layer's turn; then return layer after layer."""
        if layer.name not in self._learned:
            if layer.block is None:
                raise Refused(f"layer {layer.name}: BRECQ needs the samples of its block; choose inputs=paired")
            self._learned |= self.learn_block(layer.block(), context)
        return self._learned.pop(layer.name)

    def learn_block(self, block: Block, context: Context) -> dict[str, QuantizedTensor]:
        """The block's layers with their learned rounding, by name."""
        soft = {
            name: SoftLayer.of(self._layers[name], self._widths[name], self.clip, context.device)
            for name in block.layers
        }
        total = sum(float(batch.fisher.sum()) for batch in block.batches)
        mean = total / sum(batch.fisher.numel() for batch in block.batches)
        order = _endless(block.batches, context.generator)

        def error(step: int) -> Tensor:
            batch = next(order)
            squares = (block.output({name: layer.weight() for name, layer in soft.items()}, batch) - batch.target) ** 2
            if self.fisher and mean > 0:
                squares = squares * (batch.fisher / mean)
            channels = squares.shape[1 if squares.ndim == 4 else -1]
            return squares.mean() * channels

        learn(list(soft.values()), error, self.schedule)
        return {name: layer.tensor() for name, layer in soft.items()}


def _endless(batches: Sequence[BlockBatch], generator: torch.Generator) -> Iterator[BlockBatch]:
    """All batches in random order, again and again."""
    while True:
        for k in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[k]
