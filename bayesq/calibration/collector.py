"""Running sums of statistics, from hooks on the layers of a network."""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayesq.batches import Batch
from bayesq.calibration.samples import Run, counted_samples, in_stack, paired_parts
from bayesq.calibration.statistic import Source, Statistic
from bayesq.errors import Refused
from bayesq.likelihood import LIKELIHOODS, Likelihood
from bayesq.quant.layers import MASK, Layer, groups_of, mask_samples, output_samples, weight_to_matrix
from bayesq.quant.watch import contiguous_gradients, watching


@dataclass
class _Sums:
    """State of one layer.

    Attributes:
        sums: running sums by statistic.
        samples: input samples so far; of a stack, of each group [g].
        called: runs so far.
        calls_now: runs in the current forward pass.
        waiting: runs whose output gradient has arrived; an example's weight gradient is the sum over all runs.
    """

    sums: dict[Statistic, Tensor] = field(default_factory=dict)
    samples: int | Tensor = 0
    called: int = 0
    calls_now: int = 0
    waiting: list[Run] = field(default_factory=list)

    def add(self, statistic: Statistic, contribution: Tensor) -> None:
        self.sums[statistic] = statistic.add(self.sums.get(statistic), contribution)


class Collector:
    """Accumulates the sums of all layers over batches, with hooks on the layers while a pass runs.

    Args:
        module: the network, in eval mode.
        layers: the layers to watch, by name.
        statistics: to collect; none with Source.STATISTICS.
        samples, generator, draws: see `Likelihood.fisher_directions`.
        likelihood: of the network's outputs.
        required: by layer and name, the values of statistics that those to collect require.
        others: further layers by name that gradients pass through. They are watched without being collected, so that
            the bits of a statistic do not depend on which layers share the pass.
        overwritten: layers whose inputs the network changes in place later; they are copied for the backward pass.

    If a layer runs several times in one forward pass, samples of all runs enter the moments, and an example's weight
    gradient is the sum over the runs.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        statistics: Iterable[Statistic],
        samples: int | None,
        generator: torch.Generator,
        likelihood: Likelihood = LIKELIHOODS["categorical"],
        draws: str = "signs",
        required: Mapping[str, Mapping[str, Tensor]] | None = None,
        others: Mapping[str, Layer] | None = None,
        overwritten: Collection[str] = (),
    ) -> None:
        self.module, self.layers, self.others = module, layers, others or {}
        self.overwritten, self.required = overwritten, required or {}
        self.statistics = list(statistics)
        self._left = set(self.statistics)
        self.of_inputs, self.of_outputs, self.of_weights = (
            [statistic for statistic in self.statistics if statistic.source is source]
            for source in (Source.INPUTS, Source.OUTPUT_GRADIENTS, Source.WEIGHT_GRADIENTS)
        )
        self.samples, self.generator = samples, generator
        self.likelihood, self.draws = likelihood, draws
        self.sums = {name: _Sums() for name in layers}
        self.gradient_examples = 0
        self.backward_s = 0.0
        self._batch: Batch | None = None
        self._stop_after: tuple[str, int] | None = None
        self._backward = self._recomputing = False

    @property
    def needs_inputs(self) -> bool:
        """Whether every batch has to run."""
        return bool(self.of_inputs)

    @property
    def needs_gradients(self) -> bool:
        """Whether some batches need backward passes."""
        return bool(self.of_outputs or self.of_weights)

    def add(self, batch: Batch, gradients: bool = True, stop_after: tuple[str, int] | None = None) -> None:
        """One forward pass, and the backward passes if a gradient statistic is asked for.

        Args:
            gradients: False leaves this batch out of the gradient statistics.
            stop_after: (layer, n) ends a forward pass without backward passes after the n-th run of the layer.
        """
        self._batch, self._stop_after = batch, stop_after
        for state in self.sums.values():
            state.calls_now = 0
        self._backward = gradients and self.needs_gradients
        with self._hooks():
            if not self._backward:
                with torch.no_grad(), suppress(_Reached):
                    self.module(**batch.inputs)
            else:
                with torch.enable_grad():
                    self._run_backward(self.module(**batch.inputs), batch)
                self.gradient_examples += len(batch)

    def _run_backward(self, outputs: Tensor, batch: Batch) -> None:
        start = time.perf_counter()
        mask = batch.inputs.get(MASK)
        directions = self.likelihood.fisher_directions(
            outputs, self.samples, self.generator, self.draws, None if mask is None else mask.bool()
        )
        self._recomputing = True  # gradient checkpointing runs parts again on the same inputs
        for k, direction in enumerate(directions):
            # One sum over the batch is enough: each example's outputs depend on that example only.
            (outputs * direction.to(outputs.dtype)).sum().backward(retain_graph=k + 1 < len(directions))
            for name, state in self.sums.items():
                if state.waiting:  # runs without a gradient add nothing
                    self._take_weight_gradients(name)
        self._recomputing = False
        self.backward_s += time.perf_counter() - start

    @property
    def unseen(self) -> list[str]:
        """Layers that no example reached."""
        return [name for name in self.layers if not self.sums[name].called]

    def finish(self, statistic: Statistic) -> Iterator[tuple[str, Tensor]]:
        """Each layer with its finished statistic, float32 on the CPU.

        The running sums are overwritten one by one, which saves the memory of a copy; so each statistic can be read
        once. A layer that was never called gets `Statistic.neutral`.

        Raises:
            Refused: the statistic was not collected, or was read before.
        """
        if statistic not in self._left:
            raise Refused(f"{statistic.name} was not collected, or was read before")
        self._left.remove(statistic)
        return ((name, self._finished(name, layer, statistic)) for name, layer in self.layers.items())

    def _finished(self, name: str, layer: Layer, statistic: Statistic) -> Tensor:
        state = self.sums[name]
        groups, rows, columns = weight_to_matrix(layer).shape
        if not state.called:
            return statistic.neutral(groups, rows, columns)
        if statistic not in state.sums:  # it runs, but the outputs do not depend on it: no gradient ever arrives
            return torch.zeros(statistic.shape(groups, rows, columns))
        count = state.samples if statistic.source is Source.INPUTS else self.gradient_examples
        tensor = statistic.finish(state.sums.pop(statistic), count, (groups, rows, columns)).cpu()
        if tuple(tensor.shape) != (shape := tuple(statistic.shape(groups, rows, columns))):
            given = f"{list(tensor.shape)}, and its `shape` says {list(shape)}"
            raise Refused(f"layer {name}: the statistic {statistic.name} has shape {given}: make them equal")
        return tensor

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        frozen = [p for p in self.module.parameters() if p.requires_grad]
        try:
            for p in frozen:  # only the layers' outputs need gradients
                p.requires_grad_(False)
            with contiguous_gradients(self.module), watching({**self.others, **self.layers}, self._seen):
                yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    def _seen(self, name: str, group: int | None, x: Tensor, output: Tensor) -> Tensor | None:
        """A layer has run: add its input, and wait for the gradient of its output."""
        if name not in self.layers or not x.numel():
            return _leaf(output)[1] if self._backward else None
        state, x = self.sums[name], x.detach()
        self._check_use(name, x)
        state.called += 1
        state.calls_now += 1
        if self.of_inputs and not self._recomputing:
            self._take_inputs(name, group, x)
        if not self._backward:
            if self._stop_after == (name, state.calls_now):
                raise _Reached
            return None
        leaf, replaced = _leaf(output)
        needed = x if self.of_weights else None  # until the backward pass
        if needed is not None and name in self.overwritten:
            needed = needed.clone()
        leaf.register_hook(lambda gradient: self._take_gradient(name, group, needed, gradient.detach()))
        return replaced

    def _check_use(self, name: str, x: Tensor) -> None:
        """Refuse a use of a layer that has no statistics.

        Raises:
            Refused: naming the layer.
        """
        assert self._batch is not None
        examples = len(self._batch)
        if isinstance(self.layers[name], nn.Conv2d) and x.dim() != 4:
            raise Refused(
                f"layer {name}: its input of shape {list(x.shape)} has no batch dimension: add {name} to layers.exclude"
            )
        rows = len(x) if isinstance(self.layers[name], nn.Conv2d) else x.numel() // x.shape[-1]
        if rows % examples:
            raise Refused(
                f"layer {name}: an input of shape {list(x.shape)} does not hold the {examples} examples of the batch "
                "one after the other: set calibration.batch_size=1"
            )
        if self._backward and not torch.is_grad_enabled():
            raise Refused(
                f"layer {name} runs where no gradient is taken (torch.no_grad, or a custom autograd "
                f"function): add {name} to layers.exclude"
            )

    def _take_inputs(self, name: str, group: int | None, x: Tensor) -> None:
        assert self._batch is not None
        layer, state, mask = self.layers[name], self.sums[name], self._batch.inputs.get(MASK)
        groups = groups_of(layer)
        for _, samples, count in counted_samples(layer, x, len(self._batch), mask):
            state.samples = state.samples + in_stack(groups, group, torch.as_tensor(count).expand(1))
            rows = samples.transpose(0, 1).flatten(1, 2)  # [g, n, c]
            for statistic in self.of_inputs:
                state.add(statistic, in_stack(groups, group, statistic.contribution(rows)))

    def _take_gradient(self, name: str, group: int | None, x: Tensor | None, gradient: Tensor) -> None:
        """Take the gradient of one run's output; the last run completes each example's weight gradient."""
        assert self._batch is not None
        layer, state, mask = self.layers[name], self.sums[name], self._batch.inputs.get(MASK)
        samples = output_samples(layer, gradient, len(self._batch))
        d, _ = mask_samples(samples.to(torch.float32), mask)  # [b, g, l, r]
        if self.of_outputs:
            rows = d.transpose(0, 1).flatten(1, 2)  # [g, n, r]
            for statistic in self.of_outputs:
                state.add(statistic, in_stack(groups_of(layer), group, statistic.contribution(rows)))
        if x is None:
            return
        state.waiting.append((group, x, d))
        if len(state.waiting) == state.calls_now:
            self._take_weight_gradients(name)

    def _take_weight_gradients(self, name: str) -> None:
        """Statistics of each example's weight gradient, from all runs of a layer."""
        assert self._batch is not None
        state = self.sums[name]
        runs, state.waiting = state.waiting, []
        required = {key: value.to(runs[0][2]) for key, value in self.required.get(name, {}).items()}
        for pairs in paired_parts(self.layers[name], runs, len(self._batch)):
            for statistic in self.of_weights:
                state.add(statistic, statistic.contribution(statistic.gradients(pairs, required)))


class _Reached(Exception):
    """The layers of interest have run; the rest of the forward pass is not needed."""


def _leaf(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tensor that receives the gradient of a layer's output, and the output's replacement (None: not replaced).

    If nothing before the layer needs gradients, the graph begins at its output. The clone protects that leaf from later
    in-place activations.
    """
    if output.requires_grad:
        return output, None
    leaf = output.detach().requires_grad_(True)
    return leaf, leaf.clone()
