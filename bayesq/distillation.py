"""Calibration-only distillation towards the posterior-predictive teacher (SPEC section 5).

The teacher averages the predictions of S networks drawn from the posterior, on calibration inputs alone:

    p(y | x) = 1/S sum_s softmax(f(x; w_s))_y,   w_s ~ q

(of a regression head the mean outputs; KL is then half the squared difference, see `bayesq.likelihood`).

The student is the quantized network. Its codes are frozen; what turns codes into weights is trained, and with it the
biases and the affine parameters of the norms, to minimise E_x[KL(p(.|x) || softmax f(x; student))]. A held-out part of
the calibration set decides which step is kept. Every candidate is judged in the precision it will be stored in, and
one that does not clearly beat the network as it came is no candidate, so the held-out divergence never rises. Shapes
and types stay, and so do the stored bits.

The first candidate costs no gradient: biases and norms that match the activation moments of the full-precision network
on the training part (`bayesq.quant.correction`). Where it is kept, training goes on from there.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from bayesq.likelihood import divergence_from_mean, mean_output
from bayesq.quant.grids import FP16_MAX, MAX_WIDTH, stored_scale, zero_value
from bayesq.quant.layers import Layer, find_layer, is_layer, matrix_to_weight, weight_key
from bayesq.quant.tensor import Codebook, QuantizedTensor

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm
# A candidate has to beat the untouched network by this many standard errors of the paired difference: divergences have
# heavy tails, and a hundred held-out examples say little.
MARGIN = 0.5


class Batch(Protocol):
    """Some calibration examples: `module(**inputs)` gives logits [b, classes]; `index` [b] counts from 0 to n - 1."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Module arguments [b, ...]."""
        ...

    @property
    def index(self) -> Tensor:
        """Positions [b] of the examples in the calibration set, on the CPU."""
        ...


@dataclass(frozen=True)
class DistillationSettings:
    """The budget of a distillation.

    Attributes:
        steps: L-BFGS steps, each of which is a candidate.
        evaluations: most passes over the training part that one step may take, besides the very first gradient's.
        held_out: share of the examples that only judges.
    """

    steps: int = 1
    evaluations: int = 4
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for key, low in (("steps", 0), ("evaluations", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"distillation.{key}={getattr(self, key)}: needs a whole number of at least {low}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"distillation.held_out={self.held_out}: needs a share between 0 and 1")


@dataclass(frozen=True)
class Distilled:
    """What a distillation returns.

    Attributes:
        tensors: by layer, codes and shapes as they came.
        parameters: changed biases and norm parameters by state_dict name; empty if nothing was kept.
        steps: steps taken; fewer than asked for where the loss ceased to be finite.
        best_step: the step that was kept; 0 = none was clearly better than what it started from.
        started: whether training started from the parameters that `start` gave.
        heldout_kl_before, heldout_kl_after: mean KL(teacher || student) on the held-out examples, in nats.
    """

    tensors: dict[str, QuantizedTensor]
    parameters: dict[str, Tensor]
    steps: int
    best_step: int
    started: bool
    heldout_kl_before: float
    heldout_kl_after: float


@torch.no_grad()
def posterior_predictive(
    full: nn.Module,
    layers: Collection[str],
    sample: Callable[[str, torch.Generator], Tensor],
    batches: Sequence[Batch],
    samples: int,
    generator: torch.Generator,
    likelihood: str = "categorical",
) -> Tensor:
    """Teacher probabilities [n, classes] float64 on the CPU, in the order of `Batch.index`; means of a regression head.

    Args:
        full: full-precision network, in eval mode.
        layers: layers whose weights are drawn.
        sample: draws a layer's weight perturbation [g, r, c], w_s - mu.
        batches: all n examples, each once, on any device.
        samples: S; 0 = the full-precision network itself.
        likelihood: of the outputs.
    """
    if full.training:
        raise ValueError("the teacher must be in eval mode")
    total: Tensor | None = None
    with tqdm(total=max(samples, 1) * len(batches), desc="teacher", disable=None, leave=False) as bar:
        for _ in range(max(samples, 1)):
            weights = perturbed_weights(full, layers, sample, generator) if samples else {}
            for batch in batches:
                logits: Tensor = functional_call(full, weights, kwargs=beside(full, batch.inputs))
                p = mean_output(logits.detach().float(), likelihood).cpu().to(torch.float64)
                if total is None:
                    total = torch.zeros(_count(batches), p.shape[1], dtype=torch.float64)
                total[batch.index] += p
                bar.update()
    if total is None:
        raise ValueError("there is no example to distil from")
    return total / max(samples, 1)


def perturbed_weights(
    full: nn.Module,
    layers: Collection[str],
    sample: Callable[[str, torch.Generator], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One draw mu + sample of all layers' weights, by state_dict name, in the layers' own shapes."""
    drawn = {}
    for name in layers:
        layer = named_layer(full, name)
        delta = matrix_to_weight(layer, sample(name, generator))
        drawn[weight_key(name, layer)] = layer.weight.detach() + delta.to(layer.weight)
    return drawn


def distill(
    quantized: nn.Module,
    tensors: Mapping[str, QuantizedTensor],
    batches: Sequence[Batch],
    teacher: Tensor,
    settings: DistillationSettings,
    generator: torch.Generator,
    start: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    likelihood: str = "categorical",
) -> Distilled:
    """Train scales, codebook levels, biases and norm parameters; keep what is best on held-out examples.

    A network has thousands of rows and the calibration set hundreds of examples, so the optimizer decides what is
    learnt. Steps along the gradient of the whole training part move what all examples agree on first; Adam on batches
    moved every scale alike and overfitted from the first steps (measured on ResNet-20 and MiniLM).

    Args:
        quantized: the network with its biases and norms as they are before distillation, in eval mode; unchanged.
        tensors: the quantized layers by name.
        batches: all n calibration examples, each once; gradients are summed over them.
        teacher: probabilities [n, classes], or means of a regression head.
        settings: the budget.
        generator: CPU generator of the split.
        start: gives parameters by state_dict name to start from, if the held-out part agrees; it is told which of the
            n examples train (bool [n]).
        likelihood: of the outputs.

    Raises:
        ValueError: training mode, too few examples to hold any out, indices that do not match the teacher, or two
            different codebooks of one name.
    """
    if quantized.training:
        raise ValueError("the student must be in eval mode: its norms keep their running statistics")
    n = _count(batches)
    if len(teacher) != n:
        raise ValueError(f"the teacher has {len(teacher)} rows for {n} calibration examples")
    count = round(settings.held_out * n)
    if not 2 <= count < n:
        raise ValueError(f"{n} calibration examples are too few to hold out a share of {settings.held_out:g}")
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[torch.randperm(n, generator=generator)[:count]] = True
    training = [part for batch in batches if (part := _select(batch, ~held_out, teacher)) is not None]
    judging = [part for batch in batches if (part := _select(batch, held_out, teacher)) is not None]

    best_tensors, best_parameters = dict(tensors), dict[str, Tensor]()
    held_out_kl = partial(_held_out_kl, judging=judging, likelihood=likelihood)
    untouched = held_out_kl(quantized, best_tensors, best_parameters)
    best = untouched
    taken = best_step = 0
    begun = dict(start(~held_out)) if start is not None else {}
    kl = held_out_kl(quantized, best_tensors, begun) if begun else untouched
    started = _beats(kl, untouched)
    if started:
        best, best_parameters = kl, begun
        quantized = copy.deepcopy(quantized)
        quantized.load_state_dict(begun, strict=False)
    else:
        begun = {}
    student = Student(quantized, tensors)
    moves = student.moves()
    examples = n - count

    def closure() -> Tensor:
        # Decoded once for all batches: gradients are summed over weights and go through the decoder together.
        decoded = student.overrides()
        weights = {name: x.detach().requires_grad_(True) for name, x in decoded.items()}
        leaves = list(weights.values())
        sums = [torch.zeros_like(x) for x in leaves]
        losses = []
        for inputs, p in training:
            logits = functional_call(quantized, weights, kwargs=beside(quantized, inputs))
            loss = _divergence(p, logits, likelihood).sum() / examples
            # Not backward(): the network's own parameters are no part of this and must not collect gradients.
            for x, gradient in zip(sums, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
                if gradient is not None:
                    x += gradient
            losses.append(loss.detach())  # stays on the device: reading each would wait for it
        gradients = torch.autograd.grad(list(decoded.values()), moves, sums, allow_unused=True)
        for x, gradient in zip(moves, gradients, strict=True):
            x.grad = torch.zeros_like(x) if gradient is None else gradient
        return torch.tensor(sum(torch.stack(losses).tolist()), dtype=torch.float64)

    optimizer = torch.optim.LBFGS(
        moves,
        max_iter=1,
        max_eval=settings.evaluations,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=max(settings.steps, 1),
        line_search_fn="strong_wolfe",
    )
    for step in tqdm(range(1, settings.steps + 1), desc="distill", disable=None, leave=False):
        loss = optimizer.step(closure)
        if not math.isfinite(float(loss)) or not all(bool(torch.isfinite(x).all()) for x in moves):
            break
        taken = step
        candidate, parameters = student.stored()
        kl = held_out_kl(quantized, candidate, parameters)
        if _beats(kl, untouched) and kl.mean() < best.mean():
            best, best_step, best_tensors, best_parameters = kl, step, candidate, begun | parameters
    means = float(untouched.mean()), float(best.mean())
    return Distilled(best_tensors, best_parameters, taken, best_step, started, *means)


class Student:
    """The trained part of a quantized network.

        W = scale * exp(factor) * (level(code) - zero) / column_scale

    Trained are factor [R, S] per row and column group, levels per codebook (shared by the layers that name it), biases
    and norm parameters, each as a move from where it was: in logarithms, in level units over the square root of the
    number of rows that read the level, and in root mean squares of the tensor, so that moves of one size matter alike.
    (In plain level units a gradient step moves the few shared levels and little else: on MRPC the divergence rose
    fivefold.) Codes, zeros and column scales stay.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
        self.module, self.tensors = module, tensors
        self.levels: dict[str, Tensor] = {}
        readers: dict[str, int] = {}
        for name, tensor in tensors.items():
            for width, book in tensor.codebooks.items():
                readers[book.name] = readers.get(book.name, 0) + int((tensor.width == width).sum())
                levels = book.levels.to(named_layer(module, name).weight.device, torch.float32)
                if not torch.equal(self.levels.setdefault(book.name, levels), levels):
                    raise ValueError(f"two different codebooks are named {book.name}")
        self.level_units = {name: max(rows, 1) ** -0.5 for name, rows in readers.items()}
        self.layers = {name: _Decoder(named_layer(module, name), tensor) for name, tensor in tensors.items()}
        self.affine = {name: x.detach().clone() for name, x in trained_parameters(module).items()}
        self.factors = {name: torch.zeros_like(decoder.scale) for name, decoder in self.layers.items()}
        self.level_moves = {name: torch.zeros_like(x) for name, x in self.levels.items()}
        self.affine_moves = {name: torch.zeros_like(x) for name, x in self.affine.items()}
        for x in self.moves():
            x.requires_grad_(True)

    def moves(self) -> list[Tensor]:
        """Everything that is trained."""
        return [*self.factors.values(), *self.level_moves.values(), *self.affine_moves.values()]

    def moved_levels(self) -> dict[str, Tensor]:
        """Levels of each codebook where training has taken them."""
        return {name: x + self.level_units[name] * self.level_moves[name] for name, x in self.levels.items()}

    def moved_affine(self) -> dict[str, Tensor]:
        """Biases and norm parameters where training has taken them."""
        return {name: x + _size(x) * self.affine_moves[name] for name, x in self.affine.items()}

    def overrides(self) -> dict[str, Tensor]:
        """Weights, biases and norm parameters by state_dict name, differentiable."""
        levels = self.moved_levels()
        weights = {
            weight_key(name, decoder.layer): decoder.weight(self.factors[name], levels)
            for name, decoder in self.layers.items()
        }
        return {**weights, **self.moved_affine()}

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """The student as a file holds it: QuantizedTensors, and the parameters that differ from the network's."""
        books = {
            name: Codebook(name, in_order(x).clamp(-FP16_MAX, FP16_MAX).to("cpu", torch.float16))
            for name, x in self.moved_levels().items()
        }
        tensors = {}
        for name, tensor in self.tensors.items():
            scale = tensor.scale.to(torch.float32)
            moved = stored_scale(scale * self.factors[name].detach().cpu().exp())
            # a scale that is not positive has no logarithm and stays
            scale = torch.where(scale > 0, moved, scale).to(torch.float16)
            own = {width: books[book.name] for width, book in tensor.codebooks.items()}
            tensors[name] = replace(tensor, scale=scale, codebooks=own)
        moved_affine = self.moved_affine()
        return tensors, {name: x for name, x in moved_affine.items() if not torch.equal(x, self.affine[name])}


def in_order(levels: Tensor) -> Tensor:
    """Non-decreasing levels: the mean of the running maximum from below and the running minimum from above.

    Both are non-decreasing, and both leave ordered levels as they are.
    """
    return (levels.cummax(0).values + levels.flip(0).cummin(0).values.flip(0)) / 2


class _Decoder:
    """Differentiable dequantization of one layer; see `Student`.

    Attributes:
        index: [R, C] int16 position of each weight's level in the layer's table: the levels of its widths, one after
            the other.
    """

    def __init__(self, layer: Layer, tensor: QuantizedTensor) -> None:
        self.layer, self.groups, self.group_size = layer, tensor.groups, tensor.group_size
        device = layer.weight.device
        offset, start = torch.zeros(MAX_WIDTH + 1, dtype=torch.long), 0
        # what each width in use reads: a trained codebook by name, or levels that stay
        self.parts: list[str | Tensor] = []
        for width in tensor.width.unique().tolist():
            levels = tensor.levels(width)
            offset[width], start = start, start + len(levels)
            self.parts.append(tensor.codebooks[width].name if width in tensor.codebooks else levels.to(device))
        index = tensor.level_indices() + offset[tensor.width.long()][:, None]
        self.index = index.to(device, torch.int16)
        self.scale = tensor.scale.to(device, torch.float32)
        self.zero = zero_value(tensor.zero, tensor.width[:, None], torch.float32).to(device)
        self.column_scale = None
        if tensor.column_scale is not None:
            channels = tensor.column_scale.shape[1]
            spread = tensor.column_scale.repeat_interleave(tensor.codes.shape[1] // channels, dim=1)
            self.column_scale = spread.to(device, torch.float32)[:, None, :]

    def weight(self, factor: Tensor, levels: Mapping[str, Tensor]) -> Tensor:
        """The layer's weight in its own shape.

        Args:
            factor: [R, S] logarithm of what multiplies the scale.
            levels: codebook name -> levels.
        """
        table = torch.cat([levels[part] if isinstance(part, str) else part for part in self.parts])
        level: Tensor = _Lookup.apply(table, self.index)
        scale, zero = self.scale * factor.exp(), self.zero
        if self.group_size is not None:
            columns = self.index.shape[1]
            scale, zero = (x.repeat_interleave(self.group_size, dim=1)[:, :columns] for x in (scale, zero))
        value = (scale * (level - zero)).reshape(self.groups, -1, self.index.shape[1])
        if self.column_scale is not None:
            value = value / self.column_scale
        return matrix_to_weight(self.layer, value).to(self.layer.weight.dtype)


class _Lookup(torch.autograd.Function):
    """table[index], keeping only the int16 index for the backward pass: indexing itself keeps eight bytes a weight."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        """Entries of table [L] at index [R, C]."""
        ctx.save_for_backward(index)
        ctx.length = len(table)
        return table[index.int()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        """Gradient of each table entry: the sum over the places it went to."""
        if not ctx.needs_input_grad[0]:
            return None, None
        (index,), (gradient,) = ctx.saved_tensors, gradients
        return torch.bincount(index.flatten(), gradient.flatten(), minlength=ctx.length).to(gradient), None


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Biases of layers and affine parameters of norms, by state_dict name, each shared one once."""
    chosen: dict[str, Tensor] = {}
    for name, x in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        parent = module.get_submodule(owner)
        if isinstance(parent, Norm) or (kind == "bias" and is_layer(parent)):
            chosen[name] = x
    return chosen


def named_layer(module: nn.Module, name: str) -> Layer:
    """The layer of that name.

    Raises:
        ValueError: there is none, or it is an embedding.
    """
    layer = find_layer(module, name)
    if isinstance(layer, nn.Embedding):
        raise ValueError(f"{name} is an Embedding, not a layer that multiplies its inputs")
    return layer


def _size(x: Tensor) -> float:
    """Root mean square of a tensor, 1 where all is zero."""
    return float(x.detach().square().mean().sqrt()) or 1.0


def _count(batches: Sequence[Batch]) -> int:
    """Number of examples n, checked: every index from 0 to n - 1 once."""
    index = torch.cat([batch.index for batch in batches]) if batches else torch.empty(0)
    if not torch.equal(index.sort().values, torch.arange(len(index))):
        raise ValueError("the batches must hold every calibration example once")
    return len(index)


def beside(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module arguments on the device of the module's parameters: batches wait elsewhere until it is their turn."""
    device = next(module.parameters()).device
    return {name: x.to(device) for name, x in inputs.items()}


def _select(batch: Batch, chosen: Tensor, teacher: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """Inputs and teacher rows of the batch's examples that are in `chosen` [n]; None if there are none."""
    rows = chosen[batch.index].nonzero()[:, 0]
    if not len(rows):
        return None
    inputs = {name: x[rows.to(x.device)] for name, x in batch.inputs.items()}
    return inputs, teacher[batch.index[rows]]


def _divergence(p: Tensor, logits: Tensor, likelihood: str) -> Tensor:
    """KL(teacher || student) of each example [b] in nats, float32 on the device of the logits."""
    return divergence_from_mean(p.to(logits.device, torch.float32), logits.float(), likelihood)


@torch.no_grad()
def _held_out_kl(
    module: nn.Module,
    tensors: Mapping[str, QuantizedTensor],
    parameters: Mapping[str, Tensor],
    judging: Sequence[tuple[dict[str, Tensor], Tensor]],
    likelihood: str,
) -> Tensor:
    """KL(teacher || student) of each held-out example, float64, with the very weights that `dequantize` gives."""
    weights = {}
    for name, tensor in tensors.items():
        layer = named_layer(module, name)
        weights[weight_key(name, layer)] = matrix_to_weight(layer, tensor.dequantize()).to(layer.weight)
    divergences = [
        _divergence(p, functional_call(module, {**weights, **parameters}, kwargs=beside(module, inputs)), likelihood)
        for inputs, p in judging
    ]
    return torch.cat(divergences).cpu().to(torch.float64)


def _beats(candidate: Tensor, untouched: Tensor) -> bool:
    """Whether the mean of paired divergences [n] is lower by more than MARGIN standard errors."""
    gain = untouched - candidate
    return bool(gain.mean() > MARGIN * gain.std() / math.sqrt(len(gain)))
