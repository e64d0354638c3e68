"""Statistics of a network on its calibration examples, computed when they are first needed.

`InMemoryStatistics` serves a single call. The suite stores statistics on disk (`bayesq.suite.calibration`).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedBatches, EncodedExamples
from bayesq.calibration.passes import SUM_BYTES, CalibrationSettings, Passes, Report
from bayesq.calibration.statistic import LayerStatistics, Source, Statistic, families
from bayesq.memory import halving
from bayesq.observer import Observer
from bayesq.progress import bar
from bayesq.quant.layers import Layer


@dataclass(eq=False)
class NetworkStatistics(ABC):
    """Computes statistics; subclasses decide when to compute them and where to store them.

    Attributes:
        module: network in eval mode on its device.
        layers: by name.
        examples: encoded calibration examples.
        settings: see CalibrationSettings.
        device: where batches go.
        room, overwritten: see `Passes`.
        observer: called after each batch of a pass.
        statistics: those prepared so far, by name.
        unseen: layers that no example reached.
    """

    module: nn.Module
    layers: Mapping[str, Layer]
    examples: EncodedExamples
    settings: CalibrationSettings
    device: torch.device
    room: int = SUM_BYTES
    overwritten: Collection[str] = ()
    observer: Observer = field(kw_only=True, default_factory=Observer)
    statistics: dict[str, Statistic] = field(init=False, default_factory=dict)
    unseen: set[str] = field(init=False, default_factory=set)

    @property
    def passes(self) -> Passes:
        """The passes over the examples."""
        return Passes(self.module, self.layers, self.settings, self.room, self.overwritten)

    @property
    def batch_size(self) -> int:
        """Examples per forward pass."""
        return self.settings.batch_size

    def statistic(self, layer: str, name: str) -> Tensor:
        """One layer's statistic by its name.

        Raises:
            ValueError: the statistic was not prepared, or it has unusable values (see `Statistic.check`).
        """
        return LayerStatistics(layer, self.statistics, partial(self.load, layer))(name)

    @abstractmethod
    def load(self, layer: str, statistic: Statistic) -> Tensor:
        """One layer's statistic, not checked."""

    def compute(
        self, statistics: Sequence[Statistic], write: Callable[[str, Statistic, Tensor], None]
    ) -> tuple[Report, int]:
        """Compute statistics of one family; the statistics that they require must be prepared.

        Args:
            statistics: of one of `families`.
            write: takes each layer's finished statistic.

        Returns:
            the report of the passes, and how often they ran out of memory. Each time all passes begin again with
            smaller batches, because the random draws of a batch depend on its size.
        """
        if statistics[0].source is Source.STATISTICS:
            for one in statistics:
                for layer in bar(self.layers, one.name):
                    required = {other.name: self.statistic(layer, other.name) for other in one.requires}
                    write(layer, one, one.derive(required))
            return Report(), 0
        title = f"calibrate {'+'.join(one.name for one in statistics)}"

        def attempt(batch_size: int) -> Report:
            batches = EncodedBatches(self.examples, batch_size, self.device, title, self.observer)
            return self.passes.run(statistics, batches, write, self.load)

        return halving(self.batch_size, attempt, "calibration")


@dataclass(eq=False)
class InMemoryStatistics(NetworkStatistics):
    """Statistics in memory.

    Attributes:
        total_s: seconds that computing them took.
    """

    total_s: float = field(init=False, default=0.0)
    _retries: int = field(init=False, default=0)
    _tensors: dict[tuple[str, str], Tensor] = field(init=False, default_factory=dict)

    def prepare(self, statistics: Iterable[Statistic]) -> None:
        """Compute the statistics, and those they require, that are not computed yet."""
        start = time.perf_counter()
        for family in families(statistics):
            missing = [one for one in family if one.name not in self.statistics]
            if missing:
                report, retries = self.compute(missing, self._write)
                self.unseen.update(report.unseen)
                self._retries += retries
                self.statistics |= {one.name: one for one in missing}
        self.total_s += time.perf_counter() - start

    def out_of_memory(self) -> int:
        """How often passes over the examples ran out of memory."""
        return self._retries

    def load(self, layer: str, statistic: Statistic) -> Tensor:
        """One layer's statistic, not checked."""
        return self._tensors[layer, statistic.name]

    def _write(self, layer: str, statistic: Statistic, tensor: Tensor) -> None:
        self._tensors[layer, statistic.name] = tensor
