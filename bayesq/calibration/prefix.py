"""Inputs of layers behind the layers that are quantized before them, alone or in step with full precision."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.batches import Batch, EncodedExamples
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT, PairedSums
from bayesq.calibration.samples import counted_samples, in_stack
from bayesq.calibration.statistic import LayerStatistics, Statistic
from bayesq.errors import Refused
from bayesq.memory import halving
from bayesq.quant.layers import MASK, Layer, ParameterLayer, groups_of, weight_to_matrix
from bayesq.quant.network import fill
from bayesq.quant.tensor import QuantizedTensor
from bayesq.quant.watch import watching_inputs
from bayesq.visits import is_inside
from bayesq.walker import KEPT_BYTES, Walker


@dataclass(frozen=True)
class Network:
    """A network, and what passes through it need.

    Attributes:
        module: in eval mode.
        layers: by name.
        blocks: names of its blocks, see `bayesq.walker`.
        calls: how often each layer runs in a pass, which then ends with the last run; None: passes run to the end.
    """

    module: nn.Module
    layers: Mapping[str, Layer]
    blocks: Collection[str]
    calls: Mapping[str, int] | None = None


@dataclass
class _Sums:
    """Running sums of one layer's inputs.

    Attributes:
        statistics: behind the prefix.
        samples: so far; of a stack, of each group [g].
        paired: over both networks; None if only the prefix runs, or if the inputs cannot be paired.
    """

    statistics: dict[Statistic, Tensor] = field(default_factory=dict)
    samples: int | Tensor = 0
    paired: PairedSums | None = None


# The group of a stack (None elsewhere) and the input of each run of a layer in one pass.
Runs = list[tuple[int | None, Tensor]]


class PrefixInputs:
    """Input statistics behind the quantized prefix, and of both networks in step.

    `replace` puts a layer's QuantizedTensor into the network. When a layer's statistic is read, the calibration set
    runs from the start of the layer's block up to the layer (see bayesq.walker). Layers that read the same tensor
    share one pass, and Linear layers among them share the sums.

    Args:
        prefix: a working copy of the network, whose weights change.
        groups: names of the layers, of `forward_order`.
        examples: encoded calibration examples.
        batch_size: examples per forward pass.
        device: where batches go.
        statistics: of the inputs behind the prefix.
        full: the full-precision network, which then runs in step; None = the prefix runs alone.
        folder: for temporary files of inputs that exceed the memory, see `bayesq.walker`.
    """

    def __init__(
        self,
        prefix: Network,
        groups: Sequence[Sequence[str]],
        examples: EncodedExamples,
        batch_size: int,
        device: torch.device,
        statistics: Iterable[Statistic],
        full: Network | None = None,
        folder: Path | None = None,
    ) -> None:
        self.networks = (prefix,) if full is None else (prefix, full)
        self.statistics = {statistic.name: statistic for statistic in statistics}
        self.groups, self.examples, self.batch_size, self.device = groups, examples, batch_size, device
        self.seconds, self.folder = 0.0, folder
        self.oom_retries = 0
        self._sums: dict[str, _Sums] = {}
        self._unpaired: set[str] = set()
        self._walkers: tuple[int, list[Walker[Batch]]] | None = None
        self._full: _FullInputs | None = None

    def statistic(self, name: str, kind: str) -> Tensor:
        """One layer's input statistic behind the prefix.

        Raises:
            Refused: the method compares the inputs of both networks, and this layer's cannot be paired.
        """
        if kind == CROSS_MOMENT.name:
            layers = self.networks[0].layers
            names = [each for each, layer in layers.items() if each == name or not _can_be_paired(layer)]
            raise Refused(
                f"layer {name}: this method needs the same samples in both networks, which stacks of matrices "
                f"(experts) and layers at different positions do not have: set layers.exclude="
                f"[{','.join(names)}], or choose another method"
            )
        return LayerStatistics(name, self.statistics, partial(self._finished, name))(kind)

    def paired(self, name: str) -> PairedSums | None:
        """Sums of a layer's inputs in both networks; None if only the prefix runs, or they cannot be paired."""
        paired = self._of(name).paired
        return paired if paired is not None and paired.prefix is not None else None

    def replace(self, name: str, tensor: QuantizedTensor, parameters: Mapping[str, Tensor] | None = None) -> None:
        """From now on the layer has its quantized weights, and the network these biases and norm parameters."""
        fill(self.networks[0].module, {name: tensor}, parameters)

    def walkers(self, batch_size: int) -> list[Walker[Batch]]:
        """The walker of each network over batches of that many examples, at the block it has reached."""
        if self._walkers is None or self._walkers[0] != batch_size:
            batches = partial(self.examples.batches, batch_size, self.device)
            walkers: list[Walker[Batch]] = []
            for network in self.networks:
                settings = network.blocks, network.layers, batches, _without_inputs, network.calls
                like = walkers[0] if walkers else None
                last = last_of_each_block(self.groups, network.blocks) if walkers else frozenset[str]()
                walkers.append(Walker(network.module, *settings, like=like, folder=self.folder, last=last))
            self._walkers = batch_size, walkers
            self._full = _FullInputs(walkers[1], self.groups, self.networks[-1].blocks) if walkers[1:] else None
        return self._walkers[1]

    def _of(self, name: str) -> _Sums:
        """The layer's sums; only those of the group read last stay in memory."""
        if name not in self._sums:
            start = time.perf_counter()
            group = next(group for group in self.groups if name in group)
            self._sums = {}  # frees one group's moments before the next are collected
            try:
                self._sums, retries = halving(self.batch_size, partial(self._collect, group), "calibration")
            except _Unpaired:
                self._unpaired.update(group)
                self._sums, retries = halving(self.batch_size, partial(self._collect, group), "calibration")
            self.oom_retries += retries
            self.batch_size >>= retries  # what did not fit once will not fit the next time
            self.seconds += time.perf_counter() - start
        return self._sums[name]

    def _finished(self, name: str, statistic: Statistic) -> Tensor:
        sums = self._of(name)
        groups, rows, columns = weight_to_matrix(self.networks[0].layers[name]).shape
        if statistic == INPUT_MOMENT and sums.paired is not None and sums.paired.prefix is not None:
            return sums.paired.moments(centred=False).prefix.float()
        if statistic not in sums.statistics:  # no example reached it
            return statistic.neutral(groups, rows, columns)
        return statistic.finish(sums.statistics[statistic].clone(), sums.samples, (groups, rows, columns)).cpu()

    @torch.no_grad()
    def _collect(self, group: Sequence[str], batch_size: int) -> dict[str, _Sums]:
        walkers, layers = self.walkers(batch_size), self.networks[0].layers
        sums = _start(group, layers, paired=len(walkers) > 1 and not self._unpaired & set(group))
        first, others = 0, [self._full.of(group)] if self._full is not None else []
        for (batch, run), *full in zip(walkers[0].passes(group), *others, strict=True):
            given = [inputs_of(walkers[0], group, run), *full]
            _part(sums, group, given)
            for name in group:
                if sums[name] is not sums[group[0]] or name == group[0]:
                    self._add(sums[name], layers[name], batch, first, *(runs[name] for runs in given))
            first += len(batch)
        return sums

    def _add(self, sums: _Sums, layer: Layer, batch: Batch, first: int, runs: Runs, full: Runs | None = None) -> None:
        """Add a layer's inputs behind the prefix and in full precision; `first` is the batch's first example."""
        mask = batch.inputs.get(MASK)
        if sums.paired is not None and full is not None and [x.shape for _, x in full] != [x.shape for _, x in runs]:
            raise _Unpaired
        for run, (k, x) in enumerate(runs):
            if not x.numel():
                continue
            paired: Iterator[tuple[slice, Tensor, int | Tensor]] = iter(())
            if sums.paired is not None and full is not None:
                paired = counted_samples(layer, full[run][1], len(batch), mask)
            for part, samples, count in counted_samples(layer, x, len(batch), mask):
                sums.samples = sums.samples + in_stack(groups_of(layer), k, torch.as_tensor(count).expand(1))
                rows = samples.transpose(0, 1).flatten(1, 2)  # [g, n, c]
                for statistic in self.statistics.values():
                    if sums.paired is not None and statistic == INPUT_MOMENT:
                        continue  # is among the paired sums
                    new = in_stack(groups_of(layer), k, statistic.contribution(rows))
                    sums.statistics[statistic] = statistic.add(sums.statistics.get(statistic), new)
                if sums.paired is not None and full is not None:
                    sums.paired.add(next(paired)[1], samples, _each(samples, mask, part), first + part.start)


class _FullInputs:
    """Inputs of layers in the full-precision network, which never changes, group by group.

    In each block the first pass returns the inputs of all groups but the last one; they stay in memory up to a limit.
    The last group has a separate pass, which can also return the inputs of the next block.

    Args:
        walker: of the network.
        groups: see `PrefixInputs`.
        blocks: names of the network's blocks.
    """

    def __init__(self, walker: Walker[Batch], groups: Sequence[Sequence[str]], blocks: Collection[str]) -> None:
        self.walker, self.groups = walker, [tuple(group) for group in groups]
        self._last = last_of_each_block(groups, blocks)
        self._block = {
            group: next((block for block in blocks if all(is_inside(name, block) for name in group)), None)
            for group in self.groups
        }
        self._kept: dict[tuple[str, ...], list[dict[str, Runs]]] = {}
        self._fits = True  # whether the inputs of a further group fitted the last time

    def of(self, group: Sequence[str]) -> Iterator[dict[str, Runs]]:
        """The inputs of a group's layers for every batch."""
        asked = tuple(group)
        if asked in self._kept:
            yield from self._kept[asked]
            del self._kept[asked]
            return
        self._kept = {}
        kept: dict[tuple[str, ...], list[dict[str, Runs]]] = {names: [] for names in self._following(asked)}
        sizes, tried = dict.fromkeys(kept, 0), bool(kept)
        for _, run in self.walker.passes([*asked, *chain.from_iterable(kept)]):
            given = inputs_of(self.walker, [*asked, *chain.from_iterable(kept)], run)
            for names, batches in kept.items():
                batches.append({name: given[name] for name in names})
                sizes[names] += sum({id(x): x.nbytes for name in names for _, x in given[name]}.values())
            while sum(sizes.values()) > KEPT_BYTES:
                sizes.popitem()
                kept.popitem()
            yield {name: given[name] for name in asked}
        self._kept = kept
        self._fits = not tried or bool(kept)

    def _following(self, group: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The groups between this one and the last one of its block."""
        block = self._block.get(group)
        rest = self.groups[self.groups.index(group) + 1 :] if block is not None and self._fits else []
        return [*takewhile(lambda other: self._block[other] == block and not self._last.issuperset(other), rest)]


def _start(group: Sequence[str], layers: Mapping[str, Layer], paired: bool) -> dict[str, _Sums]:
    """Empty sums; Linear layers that read one tensor share theirs."""
    sums: dict[str, _Sums] = {}
    for name in group:
        layer = layers[name]
        pair = paired and _can_be_paired(layer)
        linear = type(layer) is nn.Linear and type(layers[group[0]]) is nn.Linear
        sums[name] = sums[group[0]] if sums and linear else _Sums(paired=PairedSums() if pair else None)
    return sums


def last_of_each_block(groups: Sequence[Sequence[str]], blocks: Collection[str]) -> frozenset[str]:
    """The layers of the last group in each block."""
    last = {block: group for group in groups for block in blocks if is_inside(group[-1], block)}
    return frozenset(name for group in last.values() for name in group)


def _can_be_paired(layer: Layer) -> bool:
    """Whether each matrix has the same samples in both networks; tokens may go to different experts."""
    return not (isinstance(layer, ParameterLayer) and groups_of(layer) > 1)


def _part(sums: dict[str, _Sums], group: Sequence[str], given: Sequence[Mapping[str, Runs]]) -> None:
    """Separate a layer's sums from those of the first layer as soon as the two read different tensors."""
    for name in group[1:]:
        same = all(
            len(runs[name]) == len(runs[group[0]])
            and all(x is y for (_, x), (_, y) in zip(runs[name], runs[group[0]], strict=True))
            for runs in given
        )
        if sums[name] is sums[group[0]] and not same:
            sums[name] = copy.deepcopy(sums[name])


def _each(samples: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    """Number of samples of each example that count, [e]."""
    e, _, length, _ = samples.shape
    if mask is None or mask.shape[1:] != (length,) or length == 1:
        return torch.full((e,), length)
    return mask[part].bool().sum(1).cpu()


def inputs_of(walker: Walker[Batch], group: Sequence[str], run: Callable[[], Any]) -> dict[str, Runs]:
    """The inputs of a group's layers in one pass, which ends when the last of them is about to run.

    Copies, since networks change inputs in place; layers that read the same tensor get the same copy.
    """
    inputs: dict[str, Runs] = {name: [] for name in group}
    last = walker.last_run(group)
    before: list[tuple[Tensor, int, Tensor]] = []  # the tensor read last, its version and its copy

    def seen(name: str, k: int | None, x: Tensor) -> None:
        if not (before and before[0][0] is x and before[0][1] == x._version):
            before[:] = [(x, x._version, x.clone())]
        inputs[name].append((k, before[0][2]))
        if last == (name, len(inputs[name])):
            raise _Reached

    with watching_inputs({name: walker.layers[name] for name in group}, seen), suppress(_Reached):
        run()
    return inputs


class _Unpaired(Exception):
    """The two networks run a layer a different number of times, or at different positions."""


class _Reached(Exception):
    """The layers of interest have their inputs; the rest of the pass is not needed."""


def _without_inputs(batch: Batch) -> Batch:
    """What a statistic reads of a batch: its mask and the number of its examples."""
    return Batch({name: x for name, x in batch.inputs.items() if name == MASK}, batch.labels, batch.index)
