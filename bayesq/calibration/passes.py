"""Passes of a network over its calibration examples: the layers of each pass, and their statistics."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from bayesq.batches import Batch
from bayesq.calibration.collector import Collector
from bayesq.calibration.statistic import Source, Statistic
from bayesq.errors import Refused
from bayesq.likelihood import LIKELIHOODS, Likelihood
from bayesq.memory import give_back_freed
from bayesq.quant.layers import Layer, weight_to_matrix

# Largest total of the running sums of one pass, in bytes. Beyond it there are several passes over the examples, which
# cost time and change no number. MiniLM (142 MiB) and ResNet-50 take one pass. BERT-base (1139 MiB) and SmolLM2-135M
# (1160 MiB) take two: one for the inputs, one for the gradients.
SUM_BYTES = 704 * 2**20
# The same limit for statistics with `Statistic.alone`.
ALONE_SUM_BYTES = 2 * 2**30


class Batches(Protocol):
    """Calibration examples in batches; each iteration gives the same batches.

    Attributes:
        examples: in all batches together.
        batch_size: of the largest batch.
    """

    @property
    def examples(self) -> int: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class CalibrationSettings:
    """What determines the statistics besides model and data.

    Attributes:
        batch_size: examples per forward pass (changes float32 sums in the last digits).
        samples: see `Likelihood.fisher_directions`.
        seed: of the draws from the model's predictive distribution.
        gradient_examples: number of examples for the gradient statistics, which need backward passes; rounded up to
            whole batches, spread over the set; None = all. Input statistics always use all examples.
        likelihood: of the network's outputs.
        draws: see `Likelihood.fisher_directions`.
    """

    batch_size: int
    samples: int | None
    seed: int
    gradient_examples: int | None = None
    likelihood: Likelihood = LIKELIHOODS["categorical"]
    draws: str = "signs"

    def __post_init__(self) -> None:
        """Check `gradient_examples`.

        Raises:
            Refused: it is below 1.
        """
        if self.gradient_examples is not None and self.gradient_examples < 1:
            raise Refused(f"posterior.examples={self.gradient_examples}: must be at least 1, or null for all")


@dataclass
class Report:
    """What passes over the examples return beside the statistics.

    Attributes:
        unseen: layers that no example reached.
        gradient_examples: examples behind the gradient statistics.
        backward_s: seconds that the gradients took.
    """

    unseen: list[str] = field(default_factory=list)
    gradient_examples: int = 0
    backward_s: float = 0.0


@dataclass(frozen=True)
class Passes:
    """A network and the settings of its passes.

    Attributes:
        module: network in eval mode on its device.
        layers: by name.
        settings: see CalibrationSettings.
        room: bytes of running sums in one pass; a single layer may exceed it. Which layers share a pass changes no
            number.
        overwritten: see `Collector`.
    """

    module: nn.Module
    layers: Mapping[str, Layer]
    settings: CalibrationSettings
    room: int = SUM_BYTES
    overwritten: Collection[str] = ()

    def plan(self, statistics: Sequence[Statistic]) -> list[tuple[dict[str, Layer], list[Statistic]]]:
        """Layers and statistics of each pass: a single pass if all sums fit.

        Otherwise inputs and gradients have separate passes, because gradients may need fewer examples; each pass has as
        many layers as fit.
        """
        inputs = [statistic for statistic in statistics if statistic.source is Source.INPUTS]
        gradients = [statistic for statistic in statistics if statistic.source is not Source.INPUTS]
        together = self._fill(list(statistics))
        if len(together) == 1 or not (inputs and gradients):
            return together
        return self._fill(inputs) + self._fill(gradients)

    def _fill(self, statistics: list[Statistic]) -> list[tuple[dict[str, Layer], list[Statistic]]]:
        """`plan` for statistics that share their passes."""
        passes: list[dict[str, Layer]] = [{}]
        alone = self.room >= SUM_BYTES and any(statistic.alone for statistic in statistics)
        most = max(self.room, ALONE_SUM_BYTES) if alone else self.room
        room = most
        for name, layer in self.layers.items():
            size = sum_bytes(layer, statistics)
            if size > room and passes[-1]:
                passes.append({})
                room = most
            passes[-1][name] = layer
            room -= size
        return [(layers, statistics) for layers in passes]

    def run(
        self,
        statistics: Sequence[Statistic],
        batches: Batches,
        write: Callable[[str, Statistic, Tensor], None],
        load: Callable[[str, Statistic], Tensor],
    ) -> Report:
        """All passes over the examples; the statistics of each pass are written before the next pass.

        Args:
            statistics: of one of `families`.
            batches: of at most `settings.batch_size` examples; smaller ones after running out of memory.
            write: takes each layer's finished statistic.
            load: returns a layer's statistic that others require.
        """
        report = Report()
        reached: set[str] = set()
        for layers, taken in self.plan(statistics):
            start = time.perf_counter()
            collector = self._collect(layers, taken, batches, load)
            again = not collector.needs_inputs and bool(reached)  # this pass exists only for gradients
            report.backward_s += time.perf_counter() - start if again else collector.backward_s
            report.gradient_examples = max(report.gradient_examples, collector.gradient_examples)
            reached.update(layers.keys() - set(collector.unseen))
            for name in reached & layers.keys():
                collector.sums[name].called += 1  # a layer reached by examples without gradients counts too
            for statistic in taken:
                for name, tensor in collector.finish(statistic):
                    write(name, statistic, tensor)
            give_back_freed()  # the sums of the next pass have other sizes
        report.unseen = [name for name in self.layers if name not in reached]
        return report

    def _collect(
        self,
        layers: Mapping[str, Layer],
        statistics: Sequence[Statistic],
        batches: Batches,
        load: Callable[[str, Statistic], Tensor],
    ) -> Collector:
        """One pass; all passes use the same draws."""
        requires = {required for statistic in statistics for required in statistic.requires}
        collector = Collector(
            self.module,
            layers,
            statistics,
            self.settings.samples,
            torch.Generator().manual_seed(self.settings.seed),
            likelihood=self.settings.likelihood,
            draws=self.settings.draws,
            required={name: {one.name: load(name, one) for one in requires} for name in layers if requires},
            others={name: layer for name, layer in self.layers.items() if name not in layers},
            overwritten=self.overwritten,
        )
        with_gradients = self._with_gradients(batches)
        for i, batch in enumerate(batches):
            gradients = collector.needs_gradients and with_gradients[i]
            if gradients or collector.needs_inputs:
                collector.add(batch, gradients=gradients)
        return collector

    def gradient_examples(self, examples: int) -> int:
        """How many of `examples` examples give gradients, before rounding up to whole batches."""
        return min(self.settings.gradient_examples or examples, examples)

    def _with_gradients(self, batches: Batches) -> list[bool]:
        """Which batches have a backward pass."""
        count, total = len(batches), batches.examples
        wanted = -(-self.gradient_examples(total) // batches.batch_size)
        if count > -(-total // batches.batch_size):  # sequences of different lengths are in separate, smaller batches
            wanted = -(-self.gradient_examples(total) * count // total)
        return spread(wanted, count)


def spread(count: int, total: int) -> list[bool]:
    """`count` True values spread evenly over `total` places; the last place is True.

    Batches may be sorted (by falling length, for example), so a sample of them is spread over all batches.
    """
    return [(i + 1) * count // total > i * count // total for i in range(total)]


def sum_bytes(layer: Layer, statistics: Iterable[Statistic]) -> int:
    """Memory of the running sums of a layer's statistics, and of the statistics read while they are collected."""
    return sum(statistic.sum_bytes(*weight_to_matrix(layer).shape) for statistic in statistics)
