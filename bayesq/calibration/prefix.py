"""Input statistics of a layer in a network whose earlier layers are already quantized."""

import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bayesq.batches import Batch, EncodedExamples
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.statistic import LayerStatistics
from bayesq.memory import halving
from bayesq.quant.layers import MASK, Layer
from bayesq.quant.network import fill
from bayesq.quant.tensor import QuantizedTensor
from bayesq.walker import Walker

STATISTICS = {statistic.name: statistic for statistic in (INPUT_MOMENT, INPUT_MAGNITUDE)}


class PrefixInputs:
    """Input statistics behind the quantized prefix.

    `replace` puts each QuantizedTensor into `module` as it comes; when a layer's statistic is asked for, the
    calibration set runs up to that layer, from the block around it (see bayesq.walker). Layers that read the same
    tensor share one pass.

    Args:
        module: a working copy of the network, whose weights change.
        blocks: its blocks.
        layers: its layers by name.
        groups: their names, of `forward_order`.
        examples: encoded calibration examples.
        batch_size: examples per forward pass.
        device: where batches go.
        calls: how often each layer runs in a pass, which then ends with the last run; None: passes run to the end.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Collection[str],
        layers: Mapping[str, Layer],
        groups: Sequence[Sequence[str]],
        examples: EncodedExamples,
        batch_size: int,
        device: torch.device,
        calls: Mapping[str, int] | None = None,
    ) -> None:
        self.module, self.blocks, self.layers, self.groups, self.calls = module, blocks, layers, groups, calls
        self.examples, self.batch_size, self.device = examples, batch_size, device
        self.seconds = 0.0
        self.oom_retries = 0
        self._statistics: dict[str, dict[str, Tensor]] = {}
        self._walker: tuple[int, Walker[Batch]] | None = None

    def statistic(self, name: str, kind: str) -> Tensor:
        """One layer's input statistic; only the group last asked for is kept in memory."""
        if name not in self._statistics:
            start = time.perf_counter()
            group = next(group for group in self.groups if name in group)
            self._statistics = {}  # two groups' moments need not be there at once
            self._statistics, retries = halving(self.batch_size, partial(self._collect, group), "calibration")
            self.oom_retries += retries
            self.batch_size >>= retries  # what did not fit once will not fit the next time
            self.seconds += time.perf_counter() - start
        return LayerStatistics(name, STATISTICS, lambda statistic: self._statistics[name][statistic.name])(kind)

    def replace(self, name: str, tensor: QuantizedTensor) -> None:
        """From now on the layer has its quantized weights."""
        fill(self.module, {name: tensor})

    def walker(self, batch_size: int) -> Walker[Batch]:
        """The walk over batches of that many examples, where it stands."""
        if self._walker is None or self._walker[0] != batch_size:
            batches = partial(self.examples.batches, batch_size, self.device)
            walker = Walker(self.module, self.blocks, self.layers, batches, _without_inputs, self.calls)
            self._walker = batch_size, walker
        return self._walker[1]

    def _collect(self, group: Sequence[str], batch_size: int) -> dict[str, dict[str, Tensor]]:
        walker, part = self.walker(batch_size), _Part(self.module)
        watched = {name: self.layers[name] for name in group}
        collector = Collector(part, watched, STATISTICS.values(), None, torch.Generator())
        for batch, part.run in walker.passes(group):
            collector.add(batch, stop_after=walker.last_run(group))
        finished = {kind: dict(collector.finish(statistic)) for kind, statistic in STATISTICS.items()}
        return {name: {kind: finished[kind][name] for kind in STATISTICS} for name in group}


class _Part(nn.Module):
    """The network, of which a call runs what `run` runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.run = module, module.__call__

    def forward(self, **_: Tensor) -> Tensor:
        output: Tensor = self.run()
        return output


def _without_inputs(batch: Batch) -> Batch:
    """What a statistic reads of a batch: its mask and the number of its examples."""
    return Batch({name: x for name, x in batch.inputs.items() if name == MASK}, batch.labels, batch.index)
