"""Calibration statistics: collected once per (model, data, settings), kept on disk, shared by a whole sweep.

Names and shapes of the statistics are in bayesq.quant.method.STATISTICS. Each kind has a file of its own under
<cache_dir>/statistics/<key>/, whose key covers the model's weights, the calibration examples, the layers and every
setting that changes a number. Padding never enters a statistic.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.posterior import DRAWS, LIKELIHOODS
from bayesq.quant.layers import (
    MASK,
    Layer,
    ParameterLayer,
    groups_of,
    input_blocks,
    input_samples,
    kind_of,
    mask_samples,
    output_samples,
    sample_shape,
    weight_to_matrix,
)
from bayesq.quant.method import STATISTICS
from bayesq.quant.watch import contiguous_gradients, watching
from bayesq.suite.cache import CorruptCache, TensorWriter, tensor_writer, verify
from bayesq.suite.files import lock
from bayesq.suite.memory import give_back_freed, halving
from bayesq.suite.models.base import Batch, EncodedExamples, count_batches
from bayesq.suite.stopping import stop_if_asked

log = logging.getLogger(__name__)

INPUT_STATISTICS = ("input_moment", "input_magnitude")
GRADIENT_STATISTICS = ("gradient_moment", "fisher_diagonal", "gradient_directions", "fisher_eigenvalues")
# Of each example's weight gradient, which takes its inputs and output gradients together.
PAIRED_STATISTICS = frozenset(GRADIENT_STATISTICS) - {"gradient_moment"}
BASIS_STATISTICS = ("input_basis", "gradient_basis")
# Computed together, in this order; each family may need files of those before it.
FAMILIES = (
    (*INPUT_STATISTICS, "gradient_moment", "fisher_diagonal"),
    ("gradient_directions",),
    BASIS_STATISTICS,
    ("fisher_eigenvalues",),
)
REQUIRES = {
    "input_basis": ("input_moment",),
    "gradient_basis": ("gradient_moment",),
    "fisher_eigenvalues": ("input_basis", "gradient_basis", "input_moment", "gradient_moment"),
}
# Raise when the numbers of a statistic change, so that caches of older versions are not read.
FORMAT = "5"
# Up to this many classes the expectation over labels is exact (one backward pass a class, one in all for two classes);
# beyond it the expectation is drawn.
EXACT_CLASSES = 4
DEFAULT_SAMPLES = 1
# Room in a file's header for what it tells besides the layers no example reached.
METADATA_BYTES = 1024
# Rows a sketch carries for each direction it keeps. A flat spectrum suffers most from truncating while streaming: where
# 16 directions held 67 % of a tiny convolution's Fisher, ratios of 1, 2, 3 found 93.9, 99.2, 99.9 % of the best.
OVERSAMPLING = 2
# Bytes of all running sums of one pass; more layers than fit take further passes over the examples, which cost time
# and change no number. Those of MiniLM (142 MiB) and ResNet-50 fit, those of BERT-base (1139 MiB) take two passes.
SUM_BYTES = 640 * 2**20
# The same for passes with sketches, which are many times as large as any other sum.
SKETCH_BYTES = 2 * 2**30
# The same for calibration.offload=disk, or what the largest layer takes.
OFFLOADED_SUM_BYTES = 64 * 2**20


def fisher_directions(
    logits: Tensor,
    samples: int | None,
    generator: torch.Generator,
    likelihood: str = "categorical",
    draws: str = "signs",
) -> list[Tensor]:
    """Vectors v_k [b, classes] whose sum of outer products is the Fisher of the outputs (in expectation, if drawn).

        categorical   sum_k v_k v_kT = E_{y ~ p(.|x)}[(e_y - p)(e_y - p)T] = diag(p) - p pT
        gaussian      sum_k v_k v_kT = E_{y ~ N(f(x), I)}[(y - f)(y - f)T] = I, so that F = E[JT J]

    Their pullbacks through the network are the output gradients of the true Fisher: what is drawn follows the model's
    own predictive, never the labels of the data. Two draws have this expectation for a classifier:

        labels   v = e_y - p,  y ~ p(.|x)
        signs    v = s - p sum_k s_k,  s_k = +-sqrt(p_k) with fair signs:  E[v vT] = (D - p sqrt(p)T)(D - p sqrt(p)T)T
                 with D = diag(sqrt(p)), which is diag(p) - p pT

    Where the network is sure, nearly all labels are its favourite and say nothing, and the rare others carry all of
    the expectation. Signs let every example speak in every draw.

    Args:
        logits: [b, classes]; for the Gaussian the predicted means f(x), whose unit of variance is one.
        samples: draws per example; None = the exact expectation up to EXACT_CLASSES classes, and DEFAULT_SAMPLES draws
            beyond.
        generator: CPU generator for the draws.
        likelihood: one of LIKELIHOODS.
        draws: "signs" or "labels"; read by the categorical likelihood.

    Raises:
        ValueError: another likelihood or kind of draw.
    """
    if draws not in DRAWS:
        raise ValueError(f"draws {draws!r}: choose from {', '.join(DRAWS)}")
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood {likelihood!r}: choose from {', '.join(LIKELIHOODS)}")
    classes, count = logits.shape[1], samples or DEFAULT_SAMPLES
    if likelihood == "gaussian":
        if samples is None and classes <= EXACT_CLASSES:
            identity = torch.eye(classes, device=logits.device)
            return [identity[k].expand(len(logits), -1) for k in range(classes)]
        noise = torch.randn(count, *logits.shape, generator=generator) / count**0.5
        return list(noise.to(logits.device))
    p = torch.softmax(logits.detach().to(torch.float32), dim=1)
    if samples is None and classes == 2:
        direction = p.prod(1, keepdim=True).sqrt()
        return [torch.cat([direction, -direction], 1)]
    if samples is None and classes <= EXACT_CLASSES:
        one_hot = torch.eye(classes, device=p.device)
        return [p[:, k : k + 1].sqrt() * (one_hot[k] - p) for k in range(classes)]
    if draws == "signs":
        signs = 2 * torch.randint(2, (count, *p.shape), generator=generator, dtype=torch.int8) - 1
        drawn = signs.to(p.device) * p.sqrt()
        return list((drawn - p * drawn.sum(2, keepdim=True)) / count**0.5)
    labels = torch.multinomial(p.cpu(), count, replacement=True, generator=generator).to(p.device)
    one_hot = torch.nn.functional.one_hot(labels, classes).to(p.dtype)
    return [(one_hot[:, k] - p) / count**0.5 for k in range(count)]


@dataclass
class _Sums:
    """Running sums of one layer; shapes as in STATISTICS."""

    sums: dict[str, Tensor]
    samples: int | Tensor = 0
    called: int = 0
    calls_now: int = 0  # in the forward pass under way
    gradients: list[tuple[int | None, Tensor | None, Tensor]] = field(default_factory=list)  # (group, x, d) that wait


class Collector:
    """Accumulates the sums of all layers over batches, with hooks on the layers while a pass runs.

    Args:
        module: the network, in eval mode.
        layers: the layers to watch, by name.
        kinds: statistics to collect.
        samples, generator, likelihood, draws: see `fisher_directions`.
        rank: k of gradient_directions.
        bases: Q_A and Q_G by layer, for fisher_eigenvalues.
        others: further layers that gradients go through, by name, though nothing of them is collected: what is
            collected has the same bits whether they are watched or not.
        overwritten: layers whose inputs are changed in place later: statistics that need them until the backward pass
            keep a copy.

    A layer that runs several times in one forward pass adds up its runs: samples of all of them enter the moments, and
    an example's weight gradient is the sum over them.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        kinds: Iterable[str],
        samples: int | None,
        generator: torch.Generator,
        likelihood: str = "categorical",
        draws: str = "signs",
        rank: int = 16,
        bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        others: Mapping[str, Layer] | None = None,
        overwritten: Collection[str] = (),
    ) -> None:
        self.module = module
        self.overwritten = overwritten
        self.layers = layers
        self.others = others or {}
        self.kinds = frozenset(kinds)
        self._left = set(self.kinds)
        self.needs_inputs = bool(self.kinds & set(INPUT_STATISTICS))
        self.needs_gradients = bool(self.kinds & set(GRADIENT_STATISTICS))
        self.samples = samples
        self.generator = generator
        self.likelihood, self.draws = likelihood, draws
        self.rank = rank
        self.bases = bases or {}
        self.sums = {name: _Sums({}) for name in layers}
        self.gradient_examples = 0
        self.backward_s = 0.0
        self._batch: Batch | None = None
        self._stop_after: tuple[str, int] | None = None
        self._backward = self._recomputing = False

    def add(self, batch: Batch, gradients: bool = True, stop_after: tuple[str, int] | None = None) -> None:
        """One forward pass, and the backward passes if a gradient statistic is asked for.

        Args:
            gradients: False leaves this batch out of the gradient statistics.
            stop_after: without backward passes, end the forward pass when this layer has run so many times.
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
                    logits = self.module(**batch.inputs)
                    start = time.perf_counter()
                    directions = fisher_directions(logits, self.samples, self.generator, self.likelihood, self.draws)
                    self._recomputing = True  # a checkpointed part runs once more, with the same inputs
                    for k, direction in enumerate(directions):
                        # The sum over the batch gives each example its own gradient: rows of logits are independent.
                        (logits * direction.to(logits.dtype)).sum().backward(retain_graph=k + 1 < len(directions))
                        self._finish_examples()
                    self._recomputing = False
                    self.backward_s += time.perf_counter() - start
                self.gradient_examples += len(batch.labels)

    @property
    def unseen(self) -> list[str]:
        """Layers that no example reached."""
        return [name for name in self.layers if not self.sums[name].called]

    def statistics(self, kind: str) -> tuple[dict[str, Tensor], list[str]]:
        """Finished statistic of every layer, and the layers no example reached; see `finish`."""
        return dict(self.finish(kind)), self.unseen

    def finish(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Each layer with its finished statistic, float32 on the CPU.

        The running sums turn into the statistic one by one, so that no second copy needs memory: each kind can be had
        once. A layer that was never called gets the identity (or ones, and no directions): its columns are then all
        alike.

        Raises:
            ValueError: the kind was not collected, or was had before.
        """
        if kind not in self._left:
            raise ValueError(f"{kind} was not collected, or its sums were handed over already")
        self._left.remove(kind)
        return ((name, self._finished(name, layer, kind)) for name, layer in self.layers.items())

    def _finished(self, name: str, layer: Layer, kind: str) -> Tensor:
        state = self.sums[name]
        neutral = partial(_neutral, layer, kind, self.rank)
        if not state.called:
            return neutral()
        if kind not in state.sums:  # it runs, but the logits do not depend on it: no gradient ever arrives
            return torch.zeros_like(neutral())
        total = state.sums.pop(kind)
        if kind == "gradient_directions":
            top = truncate(total, self.rank) / self.gradient_examples**0.5
            directions = torch.zeros_like(neutral())
            directions[: len(top)] = top.reshape(-1, *directions.shape[1:])
            return directions
        if kind in INPUT_STATISTICS:
            return _mean_input(total, torch.as_tensor(state.samples)).cpu()
        return total.div_(self.gradient_examples).cpu()

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
        """A layer has run: take what its input tells, and wait for the gradient of its output."""
        if name not in self.layers or not x.numel():
            return _leaf(output)[1] if self._backward else None
        assert self._batch is not None
        state, x = self.sums[name], x.detach()
        self._check_use(name, x)
        state.called += 1
        state.calls_now += 1
        if self.needs_inputs and not self._recomputing:
            self._inputs(name, group, x)
        if not self._backward:
            if self._stop_after == (name, state.calls_now):
                raise _Reached
            return None
        leaf, replaced = _leaf(output)
        kept = x if self.kinds & PAIRED_STATISTICS else None  # until the backward pass
        if kept is not None and name in self.overwritten:
            kept = kept.clone()
        leaf.register_hook(lambda gradient: self._gradient(name, group, kept, gradient.detach()))
        return replaced

    def _check_use(self, name: str, x: Tensor) -> None:
        """Refuse a use of a layer that no statistics can be taken of.

        Raises:
            ValueError: naming the layer.
        """
        assert self._batch is not None
        examples = len(self._batch.labels)
        if isinstance(self.layers[name], nn.Conv2d) and x.dim() != 4:
            raise ValueError(
                f"layer {name}: its input of shape {list(x.shape)} is an image without a batch in front: add {name} to "
                "layers.exclude"
            )
        rows = len(x) if isinstance(self.layers[name], nn.Conv2d) else x.numel() // x.shape[-1]
        if rows % examples:
            raise ValueError(
                f"layer {name}: an input of shape {list(x.shape)} does not hold the {examples} examples of the batch "
                "one after the other: set calibration.batch_size=1"
            )
        if self._backward and not torch.is_grad_enabled():
            raise ValueError(
                f"layer {name} runs where no gradient is taken (torch.no_grad, or a function with a backward pass of "
                f"its own): add {name} to layers.exclude"
            )

    def _inputs(self, name: str, group: int | None, x: Tensor) -> None:
        assert self._batch is not None
        layer, state, mask = self.layers[name], self.sums[name], self._batch.inputs.get(MASK)
        for part, blocks in _input_parts(layer, x, len(self._batch.labels), whole=mask is not None):
            for _, block in blocks:
                rows, count = mask_samples(block, None if mask is None else mask[part])
                state.samples = state.samples + _in_stack(layer, group, torch.as_tensor(count).expand(1))
                rows = rows.transpose(0, 1).flatten(1, 2)  # [g, n, c]
                if "input_moment" in self.kinds:
                    _accumulate(state, "input_moment", _in_stack(layer, group, rows.transpose(1, 2) @ rows))
                if "input_magnitude" in self.kinds:
                    _accumulate(state, "input_magnitude", _in_stack(layer, group, rows.abs().sum(1)))

    def _gradient(self, name: str, group: int | None, x: Tensor | None, gradient: Tensor) -> None:
        """The gradient of one run's output; an example's weight gradient is complete with those of all its runs."""
        assert self._batch is not None
        layer, state, mask = self.layers[name], self.sums[name], self._batch.inputs.get(MASK)
        samples = output_samples(layer, gradient, len(self._batch.labels))
        d, _ = mask_samples(samples.to(torch.float32), mask)  # [b, g, l, r]
        if "gradient_moment" in self.kinds:
            rows = d.transpose(0, 1).flatten(1, 2)
            _accumulate(state, "gradient_moment", _in_stack(layer, group, rows.transpose(1, 2) @ rows))
        if x is None:
            return
        state.gradients.append((group, x, d))
        if len(state.gradients) == state.calls_now:
            self._paired(name)

    def _finish_examples(self) -> None:
        """A backward pass is over: runs whose gradient did not come add nothing."""
        for name, state in self.sums.items():
            if state.gradients:
                self._paired(name)

    def _paired(self, name: str) -> None:
        """Statistics of each example's weight gradient, from all runs of a layer."""
        assert self._batch is not None
        layer, state, examples = self.layers[name], self.sums[name], len(self._batch.labels)
        runs, state.gradients = state.gradients, []
        if self.kinds & {"fisher_diagonal", "gradient_directions"}:
            for pairs in _paired_parts(layer, runs, examples):
                # [e, g, r, c], the weight gradient of each example
                whole = _add(_in_stack(layer, group, own.transpose(2, 3) @ rows, 1) for group, own, rows in pairs)
                if "gradient_directions" in self.kinds:
                    self._sketch(state, whole.flatten(1))
                if "fisher_diagonal" in self.kinds:
                    _accumulate(state, "fisher_diagonal", whole.square_().sum(0))
        if "fisher_eigenvalues" in self.kinds:
            q_a, q_g = (basis.to(runs[0][2]) for basis in self.bases[name])
            r, c = q_g.shape[-1], q_a.shape[-1]
            # The cheaper of two ways: turn the samples, or the gradients summed over them.
            turn_samples = runs[0][2].shape[2] * (r * r + c * c) < r * c * (r + c)
            for pairs in _paired_parts(layer, runs, examples):
                if turn_samples and groups_of(layer) == runs[0][2].shape[1]:
                    turned = _add((own @ q_g).transpose(2, 3) @ (rows @ q_a) for _, own, rows in pairs)
                else:
                    stacked = (_in_stack(layer, group, own.transpose(2, 3) @ rows, 1) for group, own, rows in pairs)
                    turned = q_g.transpose(1, 2) @ _add(stacked) @ q_a
                _accumulate(state, "fisher_eigenvalues", turned.square_().sum(0))

    def _sketch(self, state: _Sums, gradients: Tensor) -> None:
        """Add gradients [e, D] to the sketch S [l, D] of a layer, whose ST S never exceeds the sum of g gT."""
        kept = state.sums.get("gradient_directions")
        stacked = gradients if kept is None else torch.cat([kept, gradients])
        state.sums["gradient_directions"] = truncate(stacked, sketch_rows(self.rank))


def _leaf(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the gradient of a layer's output arrives, and what takes the output's place, if anything has to.

    Where nothing before the layer needs gradients, the graph begins there. The clone keeps later in-place activations
    off the leaf.
    """
    if output.requires_grad:
        return output, None
    leaf = output.detach().requires_grad_(True)
    return leaf, leaf.clone()


def sketch_rows(rank: int) -> int:
    """Rows a sketch for `rank` directions carries."""
    return OVERSAMPLING * rank


def truncate(rows: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` part of S [m, D] as min(m, rank) orthogonal rows, longest first: T = QT S with Q [m, rank].

    Q holds the leading eigenvectors of S ST, hence TT T = ST Q QT S is at most ST S.
    """
    _, vectors = torch.linalg.eigh((rows @ rows.T).cpu().to(torch.float64))  # ascending
    top: Tensor = vectors.flip(1)[:, :rank].T.to(rows) @ rows
    return top


# Elements of the largest temporary a hook may build: 16 MiB in float32, near the size of a core's cache.
PART_ELEMENTS = 2**22


def _input_parts(
    layer: Layer, x: Tensor, examples: int, extra: int = 0, whole: bool = False
) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """Samples float32 of a few examples at a time, so that unfolding a convolution stays bounded.

    Args:
        extra: further elements needed for each example of a part.
        whole: keep an example's positions together, however many there are.

    Yields:
        the examples e of a part, and its samples in blocks: the positions, and [e, g, l, c]. There is one block,
        unless a part is one example that is larger than a part should be.
    """
    by_example = x.reshape(examples, -1, *x.shape[1:])
    size = math.prod(sample_shape(layer, by_example[0], 1))
    step = max(1, PART_ELEMENTS // max(size, extra))
    for start in range(0, examples, step):
        part = slice(start, min(start + step, examples))
        inputs, count = by_example[part].flatten(0, 1), part.stop - start
        if size > PART_ELEMENTS and not whole:
            blocks = input_blocks(layer, inputs, PART_ELEMENTS)
        else:
            blocks = iter([(slice(None), input_samples(layer, inputs, count))])
        yield part, ((positions, rows.to(torch.float32)) for positions, rows in blocks)


def _paired_parts(
    layer: Layer, runs: Sequence[tuple[int | None, Tensor | None, Tensor]], examples: int
) -> Iterator[Iterator[tuple[int | None, Tensor, Tensor]]]:
    """Output gradients and inputs of the same positions, of a few examples at a time.

    Args:
        runs: group, input and output gradients [b, g, l, r] of each run of the layer.

    Yields:
        for each few examples e, of each block of each run: group, d [e, g, l, r] and x [e, g, l, c].
    """
    if len(runs) == 1:
        ((group, x, d),) = runs
        assert x is not None
        for part, blocks in _input_parts(layer, x, examples, extra=layer.weight.numel()):
            yield ((group, d[part][:, :, positions], rows) for positions, rows in blocks)
        return
    for k in range(examples):
        yield _blocks_of_runs(layer, runs, examples, k)


def _blocks_of_runs(
    layer: Layer, runs: Sequence[tuple[int | None, Tensor | None, Tensor]], examples: int, k: int
) -> Iterator[tuple[int | None, Tensor, Tensor]]:
    """`_paired_parts` of example k."""
    for group, x, d in runs:
        assert x is not None
        for _, blocks in _input_parts(layer, x.reshape(examples, -1, *x.shape[1:])[k], 1):
            for positions, rows in blocks:
                yield group, d[k : k + 1, :, positions], rows


def _in_stack(layer: Layer, group: int | None, value: Tensor, dim: int = 0) -> Tensor:
    """What belongs to one group of a stack [.., 1, ..], with zeros for the other groups: [.., g, ..] in `dim`."""
    if group is None:
        return value
    shape = list(value.shape)
    shape[dim] = groups_of(layer)
    stack = value.new_zeros(shape)
    stack.select(dim, group).copy_(value.select(dim, 0))
    return stack


def _add(terms: Iterator[Tensor]) -> Tensor:
    """Sum of tensors, the first of which becomes the sum."""
    total = next(terms)
    for term in terms:
        total += term
    return total


def spread(count: int, total: int) -> list[bool]:
    """Which of `total` places hold one of `count` marks that lie as evenly as they can; the last place has one.

    Batches may come ordered (by falling length, say), so the batches that stand for all are taken from everywhere.
    """
    return [(i + 1) * count // total > i * count // total for i in range(total)]


def _accumulate(state: _Sums, kind: str, value: Tensor) -> None:
    if kind in state.sums:
        state.sums[kind] += value
    else:
        state.sums[kind] = value


def statistic_shape(layer: Layer, kind: str, rank: int) -> tuple[int, ...]:
    """Shape of a layer's statistic, see `STATISTICS`; `rank` is the k of gradient_directions."""
    groups, rows, columns = weight_to_matrix(layer).shape
    shapes: dict[str, tuple[int, ...]] = {
        "input_magnitude": (groups, columns),
        "input_moment": (groups, columns, columns),
        "input_basis": (groups, columns, columns),
        "gradient_moment": (groups, rows, rows),
        "gradient_basis": (groups, rows, rows),
        "gradient_directions": (rank, groups, rows, columns),
    }
    return shapes.get(kind, (groups, rows, columns))


def sum_bytes(layer: Layer, kinds: Sequence[str], rank: int) -> int:
    """Memory that the running sums of a layer's statistics take, and the bases they are taken in."""
    kinds = [*kinds, *(BASIS_STATISTICS if "fisher_eigenvalues" in kinds else ())]
    total = 0
    for kind in kinds:
        rows = sketch_rows(rank) if kind == "gradient_directions" else rank
        total += 4 * math.prod(statistic_shape(layer, kind, rows))
    return total


def _mean_input(total: Tensor, samples: Tensor) -> Tensor:
    """Sums over samples [g, ..] as means; a group of a stack that no sample reached gets the mean over all groups.

    Args:
        samples: number of samples, or numbers [g].
    """
    if samples.numel() == 1:
        return total.div_(int(samples))
    counts = samples.reshape(-1, *[1] * (total.dim() - 1)).to(total.device)
    pooled = total.sum(0, keepdim=True) / counts.sum()
    return torch.where(counts > 0, total / counts.clamp_min(1), pooled)


def _neutral(layer: Layer, kind: str, rank: int) -> Tensor:
    shape = statistic_shape(layer, kind, rank)
    if kind == "gradient_directions":
        return torch.zeros(shape)
    if kind in ("input_moment", "gradient_moment"):
        return torch.eye(shape[-1]).expand(shape).contiguous()
    return torch.ones(shape)


def forward_order(module: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> list[list[str]]:
    """Layers in the order of their first call, neighbours that read the very same tensor together.

    Layers the batch does not reach come last, in definition order.
    """
    order: list[list[str]] = []
    found: set[str] = set()
    inputs: list[Tensor] = []  # kept alive, so that identity means identity

    def seen(name: str, _: int | None, x: Tensor, __: Tensor) -> None:
        if name in found:
            return
        found.add(name)
        if inputs and inputs[-1] is x:
            order[-1].append(name)
        else:
            order.append([name])
            inputs.append(x)

    with torch.no_grad(), watching(layers, seen):
        module(**batch.inputs)
    return order + [[name] for name in layers if name not in found]


@dataclass(frozen=True)
class CalibrationSettings:
    """What determines the statistics besides model and data.

    Attributes:
        batch_size: examples per forward pass (changes float32 sums in the last digits, hence part of the key).
        samples: see `fisher_directions`.
        seed: of the label draws.
        gradient_examples: so many examples, rounded up to whole batches spread over the set, give the gradient
            statistics, which cost backward passes; None = all of them. Input statistics always come from all.
        likelihood, draws: see `fisher_directions`.
        rank: k of gradient_directions.
    """

    batch_size: int
    samples: int | None
    seed: int
    gradient_examples: int | None = None
    likelihood: str = "categorical"
    draws: str = "signs"
    rank: int = 16

    def __post_init__(self) -> None:
        """Refuse what gives no statistics.

        Raises:
            ValueError: no example or no direction is left, or the likelihood is unknown.
        """
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood {self.likelihood!r}: choose from {', '.join(LIKELIHOODS)}")
        if self.rank < 1:
            raise ValueError(f"posterior.rank={self.rank}: must be at least 1")
        if self.gradient_examples is not None and self.gradient_examples < 1:
            raise ValueError(f"posterior.examples={self.gradient_examples}: must be at least 1, or null for all")


@dataclass
class _Found:
    """What passes over the examples tell besides the statistics."""

    unseen: list[str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    backward_s: float = 0.0


class Calibration:
    """Statistics of a network on its calibration examples, on disk, computed when first asked for.

    Args:
        module: network in eval mode on its device.
        identity: of the network, as `Network.identity`.
        layers: layers by name.
        examples: encoded calibration examples.
        settings: see CalibrationSettings.
        cache_dir: root of the caches.
        device: where batches go.
        room: bytes of running sums that may be held at once, save that each layer's own have to be; which layers
            share a pass over the examples changes no number.
        overwritten: see `Collector`.
    """

    def __init__(
        self,
        module: nn.Module,
        identity: str,
        layers: Mapping[str, Layer],
        examples: EncodedExamples,
        settings: CalibrationSettings,
        cache_dir: Path,
        device: torch.device,
        room: int = SUM_BYTES,
        overwritten: Collection[str] = (),
    ) -> None:
        self.room, self.overwritten = room, overwritten
        self.module, self.layers, self.examples = module, layers, examples
        self.settings, self.device = settings, device
        content = {
            "format": FORMAT,
            "torch": torch.__version__,
            "device": device.type,
            "model": identity,
            "architecture": repr(module),
            "examples": examples.checksum(),
            "layers": [
                (name, kind_of(layer), isinstance(layer, ParameterLayer), list(layer.weight.shape), groups_of(layer))
                for name, layer in layers.items()
            ],
            "batch_size": settings.batch_size,
        }
        self.gradient_examples = min(settings.gradient_examples or len(examples), len(examples))
        fisher = {
            **content,
            "samples": settings.samples,
            "seed": settings.seed,
            "gradient_batches": -(-self.gradient_examples // settings.batch_size),
            "likelihood": settings.likelihood,
            "draws": settings.draws,
        }
        self._keys = {kind: _key({**content, "kind": kind}) for kind in (*INPUT_STATISTICS, "input_basis")}
        self._keys |= {kind: _key({**fisher, "kind": kind}) for kind in (*GRADIENT_STATISTICS, "gradient_basis")}
        self._keys["gradient_directions"] = _key({**fisher, "kind": "gradient_directions", "rank": settings.rank})
        self.folder = cache_dir / "statistics"
        self.seconds: dict[str, float] = {}
        self.forward_s = 0.0
        self.unseen: set[str] = set()
        self.reused: dict[str, bool] = {}
        self.oom_retries: dict[str, int] = {}

    def path(self, kind: str) -> Path:
        """File of one kind of statistic."""
        return self.folder / self._keys[kind] / f"{kind}.safetensors"

    def prepare(self, kinds: Iterable[str]) -> None:
        """Make sure the files of `kinds` exist and are whole; compute together what is missing.

        Broken files are reported and computed again. Another process that needs the same file waits for it.

        Raises:
            ValueError: a kind is not one of STATISTICS.
        """
        chosen = set(kinds)
        if unknown := chosen - STATISTICS.keys():
            raise ValueError(f"no statistic named {', '.join(sorted(unknown))}: choose from {', '.join(STATISTICS)}")
        chosen.update(*(REQUIRES.get(kind, ()) for kind in chosen))
        for family in FAMILIES:
            wanted = [kind for kind in family if kind in chosen]
            with ExitStack() as locks:
                # always in the order of `family`, so that two processes never wait for each other
                for path in dict.fromkeys(self.path(kind) for kind in family if kind in wanted):
                    locks.enter_context(lock(path))
                missing = [kind for kind in wanted if not self._check(kind)]
                if missing:
                    self._compute(missing)

    def missing(self, kinds: Iterable[str]) -> list[str]:
        """Statistics of `kinds`, and those they need, that have no file yet."""
        needed = set(kinds).union(*(REQUIRES.get(kind, ()) for kind in kinds))
        return [kind for family in FAMILIES for kind in family if kind in needed and not self.path(kind).exists()]

    @property
    def total_s(self) -> float:
        """What the prepared statistics take in a run that has none of them yet, wherever these came from."""
        return self.forward_s + sum(self.seconds.values())

    def statistic(self, name: str, kind: str) -> Tensor:
        """One layer's statistic, read from disk."""
        with safe_open(self.path(kind), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _check(self, kind: str) -> bool:
        try:
            metadata = verify(self.path(kind))
        except FileNotFoundError:
            return False
        except CorruptCache as error:
            log.warning("calibration cache: %s; computing it again", error)
            return False
        self._note(kind, metadata, reused=True)
        return True

    def _note(self, kind: str, metadata: Mapping[str, str], reused: bool) -> None:
        self.seconds[kind] = float(metadata["seconds"])
        self.forward_s = max(self.forward_s, float(metadata["forward_s"]))
        self.unseen |= set(json.loads(metadata["unseen"]))
        self.reused[kind] = reused
        self.oom_retries[kind] = int(metadata["oom_retries"])

    def _compute(self, kinds: Sequence[str]) -> None:
        start = time.perf_counter()
        with ExitStack() as files:
            room = len(json.dumps(json.dumps(list(self.layers)))) + METADATA_BYTES
            writers = {
                kind: files.enter_context(tensor_writer(self.path(kind), self._shapes(kind), room)) for kind in kinds
            }
            if kinds[0] in BASIS_STATISTICS:
                for kind in kinds:
                    for name in tqdm(self.layers, desc=kind, disable=None, leave=False):
                        writers[kind].write(name, eigenbasis(self.statistic(name, REQUIRES[kind][0])))
                found, retries = _Found(), 0
            else:
                # All passes begin again with smaller batches: the draws of a batch are those of its size.
                found, retries = halving(self.settings.batch_size, partial(self._stream, kinds, writers), "calibration")
            # One forward pass can serve the whole first family, whichever of it was asked for first: it counts once.
            total = time.perf_counter() - start
            forward = total - found.backward_s if kinds[0] in FAMILIES[0] else 0.0
            own = [kind for kind in kinds if kind not in INPUT_STATISTICS]
            seconds = dict.fromkeys(kinds, 0.0) | dict.fromkeys(own, (total - forward) / max(len(own), 1))
            examples = dict.fromkeys(kinds, len(self.examples)) | found.examples
            for kind, writer in writers.items():
                metadata = {
                    "seconds": f"{seconds[kind]:.3f}",
                    "forward_s": f"{forward:.3f}",
                    "unseen": json.dumps(found.unseen),
                    "examples": str(examples[kind]),
                    "oom_retries": str(retries if kind == kinds[0] else 0),  # of the pass, once
                }
                writer.finish(metadata)
                self._note(kind, metadata, reused=False)

    def _shapes(self, kind: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rank = self.settings.rank
        return {name: (torch.float32, statistic_shape(layer, kind, rank)) for name, layer in self.layers.items()}

    def _stream(self, kinds: Sequence[str], writers: Mapping[str, TensorWriter], batch_size: int) -> "_Found":
        """All passes over the examples; each one's statistics go to the files before the next begins."""
        found = _Found()
        reached: set[str] = set()
        for watched, own in self.passes(kinds):
            start = time.perf_counter()
            collector = self._collect(watched, own, batch_size)
            alone = not collector.needs_inputs and bool(reached)
            found.backward_s += time.perf_counter() - start if alone else collector.backward_s
            if collector.needs_gradients:
                found.examples |= {kind: collector.gradient_examples for kind in own if kind not in INPUT_STATISTICS}
            reached.update(watched.keys() - set(collector.unseen))
            for name in reached & watched.keys():
                collector.sums[name].called += 1  # if only by examples whose gradients are not asked for
            for kind in own:
                for name, statistic in collector.finish(kind):
                    writers[kind].write(name, statistic)
            give_back_freed()  # the sums of the next pass have other sizes
        found.unseen = [name for name in self.layers if name not in reached]
        return found

    def passes(self, kinds: Sequence[str]) -> list[tuple[dict[str, Layer], list[str]]]:
        """The layers of each pass over the examples, and their statistics: all in one, unless the sums would not fit.

        Then gradients take passes of their own, which run the network on fewer examples, and of both kinds of passes
        each has as many layers as fit.
        """
        inputs = [kind for kind in kinds if kind in INPUT_STATISTICS]
        gradients = [kind for kind in kinds if kind not in INPUT_STATISTICS]
        together = self._passes(list(kinds))
        if len(together) == 1 or not (inputs and gradients):
            return together
        return self._passes(inputs) + self._passes(gradients)

    def _passes(self, kinds: list[str]) -> list[tuple[dict[str, Layer], list[str]]]:
        """`passes` of statistics that are taken together."""
        passes: list[dict[str, Layer]] = [{}]
        most = max(self.room, SKETCH_BYTES) if "gradient_directions" in kinds and self.room >= SUM_BYTES else self.room
        room = most
        for name, layer in self.layers.items():
            size = sum_bytes(layer, kinds, self.settings.rank)
            if size > room and passes[-1]:
                passes.append({})
                room = most
            passes[-1][name] = layer
            room -= size
        return [(layers, kinds) for layers in passes]

    def _collect(self, layers: Mapping[str, Layer], kinds: Sequence[str], batch_size: int) -> Collector:
        """Run the examples; every call draws the same labels."""
        bases = None
        if "fisher_eigenvalues" in kinds:
            bases = {
                name: (self.statistic(name, "input_basis"), self.statistic(name, "gradient_basis")) for name in layers
            }
        generator = torch.Generator().manual_seed(self.settings.seed)
        collector = Collector(
            self.module,
            layers,
            kinds,
            self.settings.samples,
            generator,
            likelihood=self.settings.likelihood,
            draws=self.settings.draws,
            rank=self.settings.rank,
            bases=bases,
            others={name: layer for name, layer in self.layers.items() if name not in layers},
            overwritten=self.overwritten,
        )
        batches = self.examples.batches(batch_size, self.device)
        total, count = len(self.examples), count_batches(self.examples, batch_size)
        wanted = -(-self.gradient_examples // batch_size)
        if count > -(-total // batch_size):  # sequences of other length are kept apart, in smaller batches
            wanted = -(-self.gradient_examples * count // total)
        with_gradients = spread(wanted, count)
        title = f"calibrate {'+'.join(kinds)}"
        for i, batch in enumerate(tqdm(batches, total=count, desc=title, disable=None, leave=False)):
            stop_if_asked()
            gradients = collector.needs_gradients and with_gradients[i]
            if gradients or collector.needs_inputs:
                collector.add(batch, gradients=gradients)
        return collector


def eigenbasis(moment: Tensor) -> Tensor:
    """Eigenvectors, in columns, of each of the moments [g, n, n].

    They are stored, not recomputed: where eigenvalues nearly coincide, any rotation among them is as good, and the
    eigenvalues measured in one basis mean nothing in another.
    """
    vectors: Tensor = torch.linalg.eigh(moment.to(torch.float64))[1]
    return vectors.to(torch.float32)


class _Reached(Exception):
    """The layers of interest have run; the rest of the forward pass is not needed."""


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
