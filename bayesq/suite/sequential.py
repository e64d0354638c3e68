"""Input statistics behind a prefix that is quantized layer by layer."""

import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.statistic import LayerStatistics
from bayesq.memory import halving
from bayesq.quant.layers import Layer, ParameterLayer, groups_of
from bayesq.quant.network import fill
from bayesq.quant.tensor import QuantizedTensor
from bayesq.suite.replay import Replay

STATISTICS = {statistic.name: statistic for statistic in (INPUT_MOMENT, INPUT_MAGNITUDE)}


class SequentialInputs:
    """Input statistics of a layer in a model whose earlier layers are already quantized.

    The runner loads each QuantizedTensor into `module` as it comes; when a layer's statistic is asked for, the
    calibration set runs up to that layer, from the last module before it whose inputs cannot change any more (see
    bayesq.suite.replay). Layers that read the same tensor share one pass.

    Args: as Calibration; `module` is a working copy whose weights change, `groups` come from `forward_order`, `calls`
        tells how often each layer runs in a pass, which then ends with the last run; without it, passes run to the end.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        groups: Sequence[Sequence[str]],
        examples: EncodedExamples,
        batch_size: int,
        device: torch.device,
        calls: Mapping[str, int] | None = None,
    ) -> None:
        self.module, self.layers, self.groups, self.calls = module, layers, groups, calls or {}
        self.examples, self.batch_size, self.device = examples, batch_size, device
        self.seconds = 0.0
        self.oom_retries = 0
        self._held: dict[str, dict[str, Tensor]] = {}
        self._replay: tuple[int, Replay] | None = None

    def statistic(self, name: str, kind: str) -> Tensor:
        """One layer's input statistic; only the group last asked for is kept in memory."""
        if name not in self._held:
            start = time.perf_counter()
            group = next(group for group in self.groups if name in group)
            self._held, retries = halving(self.batch_size, partial(self._collect, group), "calibration")
            self.oom_retries += retries
            self.batch_size >>= retries  # what did not fit once will not fit the next time
            self.seconds += time.perf_counter() - start
        return LayerStatistics(name, STATISTICS, lambda statistic: self._held[name][statistic.name])(kind)

    def replace(self, name: str, tensor: QuantizedTensor) -> None:
        """From now on the layer has its quantized weights."""
        fill(self.module, {name: tensor})

    def _collect(self, group: Sequence[str], batch_size: int) -> dict[str, dict[str, Tensor]]:
        if self._replay is None or self._replay[0] != batch_size:
            batches = partial(self.examples.batches, batch_size, self.device)
            self._replay = batch_size, Replay(self.module, list(self.layers), batches)
        replay = self._replay[1]
        watched = {name: self.layers[name] for name in group}
        collector = Collector(replay, watched, STATISTICS.values(), None, torch.Generator())
        for batch in replay.batches(group):
            collector.add(batch, stop_after=self._last_run(group))
        finished = {kind: dict(collector.finish(statistic)) for kind, statistic in STATISTICS.items()}
        return {name: {kind: finished[kind][name] for kind in STATISTICS} for name in group}

    def _last_run(self, group: Sequence[str]) -> tuple[str, int] | None:
        """The layer and the number of its run after which all of the group has run; None if that is not known.

        Experts run as often as tokens are sent to them.
        """
        calls = [self.calls.get(name) for name in group]
        if any(isinstance(self.layers[name], ParameterLayer) and groups_of(self.layers[name]) > 1 for name in group):
            return None
        if len(group) == 1 and calls[0] is not None:
            return group[0], calls[0]
        return (group[-1], 1) if set(calls) == {1} else None
