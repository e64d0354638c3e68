"""Calibration statistics in memory, for a single call that needs no cache on disk."""

import time
from collections.abc import Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedBatches, EncodedExamples
from bayesq.calibration.passes import CalibrationSettings, Passes, Report
from bayesq.calibration.statistic import LayerStatistics, Source, Statistic, families
from bayesq.memory import halving
from bayesq.quant.layers import Layer


class InMemoryStatistics:
    """Statistics of a network on its calibration examples.

    Args:
        module: network in eval mode on its device.
        layers: layers by name.
        examples: encoded calibration examples.
        settings: see CalibrationSettings.
        device: of the batches.
        overwritten: see `Passes`.

    Attributes:
        unseen: layers that no example reached.
        total_s: seconds spent in `prepare`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        examples: EncodedExamples,
        settings: CalibrationSettings,
        device: torch.device,
        overwritten: Collection[str] = (),
    ) -> None:
        self.passes = Passes(module, layers, settings, overwritten=overwritten)
        self.layers, self.examples, self.settings, self.device = layers, examples, settings, device
        self.unseen: set[str] = set()
        self.total_s = 0.0
        self._retries = 0
        self._named: dict[str, Statistic] = {}
        self._tensors: dict[tuple[str, str], Tensor] = {}

    @property
    def batch_size(self) -> int:
        """Examples per forward pass."""
        return self.settings.batch_size

    def out_of_memory(self) -> int:
        """How often passes over the examples ran out of memory."""
        return self._retries

    def prepare(self, statistics: Iterable[Statistic]) -> None:
        """Compute the statistics that are still missing."""
        start = time.perf_counter()
        for family in families(statistics):
            missing = [one for one in family if one.name not in self._named]
            if not missing:
                continue
            if missing[0].source is Source.STATISTICS:
                self._derive(missing)
            else:
                report, retries = halving(self.batch_size, partial(self._run, missing), "calibration")
                self.unseen.update(report.unseen)
                self._retries += retries
            self._named |= {one.name: one for one in missing}
        self.total_s += time.perf_counter() - start

    def statistic(self, layer: str, name: str) -> Tensor:
        """One layer's statistic by its name, checked.

        Raises:
            ValueError: it was not prepared, or see `Statistic.check`.
        """
        return LayerStatistics(layer, self._named, partial(self._load, layer))(name)

    def _load(self, layer: str, statistic: Statistic) -> Tensor:
        return self._tensors[layer, statistic.name]

    def _write(self, layer: str, statistic: Statistic, tensor: Tensor) -> None:
        self._tensors[layer, statistic.name] = tensor

    def _run(self, statistics: list[Statistic], batch_size: int) -> Report:
        title = f"calibrate {'+'.join(one.name for one in statistics)}"
        batches = EncodedBatches(self.examples, batch_size, self.device, title)
        return self.passes.run(statistics, batches, self._write, self._load)

    def _derive(self, statistics: list[Statistic]) -> None:
        for layer in self.layers:
            for one in statistics:
                required = {other.name: self._load(layer, other) for other in one.requires}
                self._write(layer, one, one.derive(required))
