"""Calibration-only distillation towards the posterior-predictive teacher of `bayesq.teacher`.

The student is the quantized network. Its codes are frozen. Scales, codebook levels, biases and the affine parameters of
the norms are trained to minimise E_x[KL(p(.|x) || p(.|f(x; student)))] on calibration inputs. A held-out part of the
calibration set selects the best step. Each candidate is evaluated in the precision in which it will be stored. A
candidate is accepted only if it is clearly better than the network before distillation, so the held-out divergence
never rises. Shapes and dtypes do not change, and neither do the stored bits.

The first candidate needs no gradient: biases and norms that match the activation moments of the full-precision network
on the training part (`bayesq.quant.correction`). If it is better, training starts from it.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from bayesq.batches import Batch
from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.observer import Observer
from bayesq.quant.layers import matrix_to_weight, weight_key
from bayesq.quant.tensor import QuantizedTensor
from bayesq.student import Student
from bayesq.teacher import Recomputed, beside, count_examples, named_layer

# A candidate must be better than the untouched network by this many standard errors of the paired difference.
# Divergences have heavy tails, and a hundred held-out examples give a noisy mean.
MARGIN = 0.5


@dataclass(frozen=True)
class DistillationSettings:
    """The budget of a distillation.

    Attributes:
        steps: number of L-BFGS steps; each gives a candidate.
        evaluations: largest number of passes over the training part in one step, after the first gradient.
        held_out: share of the examples that is not trained on and selects the best step.
    """

    steps: int = 1
    evaluations: int = 4
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for key, low in (("steps", 0), ("evaluations", 1)):
            if getattr(self, key) < low:
                raise Refused(f"distillation.{key}={getattr(self, key)}: needs a whole number of at least {low}")
        if not 0 < self.held_out < 1:
            raise Refused(f"distillation.held_out={self.held_out}: needs a share between 0 and 1")


@dataclass(frozen=True)
class Distilled:
    """Result of a distillation.

    Attributes:
        tensors: by layer, with unchanged codes and shapes.
        parameters: changed biases and norm parameters by state_dict name; empty if the network is unchanged.
        steps: number of steps; fewer than requested if the loss became NaN or infinite.
        best_step: the selected step; 0 = no step was clearly better than the start.
        started: whether training started from the parameters of `start`.
        heldout_kl_before, heldout_kl_after: mean KL(teacher || student) on the held-out examples, in nats.
    """

    tensors: dict[str, QuantizedTensor]
    parameters: dict[str, Tensor]
    steps: int
    best_step: int
    started: bool
    heldout_kl_before: float
    heldout_kl_after: float


@dataclass(frozen=True)
class _Candidate:
    """A student after a number of steps, and its KL(teacher || student) on each held-out example, float64."""

    step: int
    kl: Tensor
    tensors: dict[str, QuantizedTensor]
    parameters: dict[str, Tensor]


def distill(
    quantized: nn.Module,
    tensors: Mapping[str, QuantizedTensor],
    batches: Sequence[Batch],
    teacher: Tensor | Recomputed,
    settings: DistillationSettings,
    generator: torch.Generator,
    likelihood: Likelihood,
    start: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    observer: Observer | None = None,
) -> Distilled:
    """Train scales, codebook levels, biases and norm parameters; return the best candidate on held-out examples.

    Args:
        quantized: the network before distillation, in eval mode; it is not changed.
        tensors: the quantized layers by name.
        batches: all n calibration examples, each once; gradients are summed over them.
        teacher: result of `posterior_predictive`.
        settings: the budget.
        generator: CPU generator of the split.
        likelihood: of the outputs.
        start: maps the choice of training examples (bool [n]) to parameters by state_dict name. Training starts from
            them if they are better on the held-out part.
        observer: called after each evaluation.

    Raises:
        Refused: the network is in training mode, there are too few examples to hold any out, indices do not match the
            teacher, or two different codebooks have the same name.
    """
    if quantized.training:
        raise Refused("the student must be in eval mode: its norms keep their running statistics")
    n = count_examples(batches)
    if len(teacher) != n:
        raise Refused(f"the teacher has {len(teacher)} rows for {n} calibration examples")
    held_out = _draw_held_out(n, settings.held_out, generator)
    training, judging = _select(batches, ~held_out, teacher), _select(batches, held_out, teacher)
    observer = observer or Observer()

    def judged(step: int, tensors: Mapping[str, QuantizedTensor], parameters: Mapping[str, Tensor]) -> _Candidate:
        kl = _held_out_kl(quantized, tensors, parameters, judging=judging, likelihood=likelihood)
        observer.divergence_measured(step, "heldout", float(kl.mean()))
        return _Candidate(step, kl, dict(tensors), dict(parameters))

    best = untouched = judged(0, tensors, {})
    if begun := dict(start(~held_out)) if start is not None else {}:
        candidate = judged(0, tensors, begun)
        if _beats(candidate.kl, untouched.kl):
            best = candidate
            quantized = copy.deepcopy(quantized)
            quantized.load_state_dict(begun, strict=False)
    started, taken = best is not untouched, 0
    begun = best.parameters
    for step, stored, parameters in _train(Student(quantized, tensors), training, settings, likelihood, observer):
        taken = step
        candidate = judged(step, stored, parameters)
        candidate = replace(candidate, parameters=begun | parameters)
        if _beats(candidate.kl, untouched.kl) and candidate.kl.mean() < best.kl.mean():
            best = candidate
    means = float(untouched.kl.mean()), float(best.kl.mean())
    return Distilled(best.tensors, best.parameters, taken, best.step, started, *means)


def _draw_held_out(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of n examples are held out, bool [n]: at least two, but not all."""
    count = round(share * n)
    if not 2 <= count < n:
        raise Refused(f"{n} calibration examples are too few to hold out a share of {share:g}")
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[torch.randperm(n, generator=generator)[:count]] = True
    return held_out


@dataclass(frozen=True)
class _Part:
    """Some examples of a batch: inputs, number, and a function that gives the teacher's mean outputs of them."""

    inputs: dict[str, Tensor]
    examples: int
    teacher: Callable[[], Tensor]


def _train(
    student: Student,
    training: Sequence[_Part],
    settings: DistillationSettings,
    likelihood: Likelihood,
    observer: Observer,
) -> Iterator[tuple[int, dict[str, QuantizedTensor], dict[str, Tensor]]]:
    """Yield each step's number, tensors and parameters, until the loss is NaN or infinite.

    A network has thousands of rows, the calibration set only hundreds of examples. L-BFGS on the whole training part
    first changes what all examples agree on. Adam on batches changed all scales by similar amounts and overfitted from
    the first steps (measured on ResNet-20 and MiniLM).
    """
    moves = student.moves()
    optimizer = torch.optim.LBFGS(
        moves,
        max_iter=1,
        max_eval=settings.evaluations,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=max(settings.steps, 1),
        line_search_fn="strong_wolfe",
    )
    step = 0

    def closure() -> Tensor:
        loss = _training_loss(student, training, likelihood)
        observer.divergence_measured(step, "training", float(loss))
        return loss

    for step in tqdm(range(1, settings.steps + 1), desc="distill", disable=None, leave=False):
        loss = optimizer.step(closure)
        if not math.isfinite(float(loss)) or not all(bool(torch.isfinite(x).all()) for x in moves):
            return
        yield step, *student.stored()


def _training_loss(student: Student, training: Sequence[_Part], likelihood: Likelihood) -> Tensor:
    """Mean KL(teacher || student) of the training examples, a float64 scalar; sets the gradients of the moves."""
    # Weights are decoded once for all batches; their summed gradient then passes through the decoder once.
    decoded = student.overrides()
    weights = {name: x.detach().requires_grad_(True) for name, x in decoded.items()}
    leaves = list(weights.values())
    sums = [torch.zeros_like(x) for x in leaves]
    examples = sum(part.examples for part in training)
    losses = []
    for part in training:
        loss = _divergence(student.module, weights, part, likelihood).sum() / examples
        # Not backward(), which would also accumulate gradients in the network's parameters.
        for x, gradient in zip(sums, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            if gradient is not None:
                x += gradient
        losses.append(loss.detach())  # stays on the device: reading it here would synchronise
    moves = student.moves()
    gradients = torch.autograd.grad(list(decoded.values()), moves, sums, allow_unused=True)
    for x, gradient in zip(moves, gradients, strict=True):
        x.grad = torch.zeros_like(x) if gradient is None else gradient
    return torch.tensor(sum(torch.stack(losses).tolist()), dtype=torch.float64)


def _select(batches: Sequence[Batch], chosen: Tensor, teacher: Tensor | Recomputed) -> list[_Part]:
    """The examples of `chosen` (bool [n]), batch by batch; batches without such examples are omitted."""
    parts = []
    for batch in batches:
        rows = chosen[batch.index].nonzero()[:, 0]
        if len(rows):
            inputs = {name: x[rows.to(x.device)] for name, x in batch.inputs.items()}
            outputs: Callable[[], Tensor]
            if isinstance(teacher, Recomputed):
                outputs = partial(teacher, inputs)
            else:
                outputs = partial(teacher.__getitem__, batch.index[rows])
            parts.append(_Part(inputs, len(rows), outputs))
    return parts


def _divergence(
    module: nn.Module,
    overrides: Mapping[str, Tensor],
    part: _Part,
    likelihood: Likelihood,
) -> Tensor:
    """KL(teacher || student) of each example [b], float32; `overrides` are weights and parameters of the student."""
    inputs = beside(module, part.inputs)
    outputs = functional_call(module, dict(overrides), kwargs=inputs).float()
    p = part.teacher().to(outputs.device, torch.float32)
    return likelihood.kl_from_mean(p, outputs, likelihood.counted(inputs))


@torch.no_grad()
def _held_out_kl(
    module: nn.Module,
    tensors: Mapping[str, QuantizedTensor],
    parameters: Mapping[str, Tensor],
    judging: Sequence[_Part],
    likelihood: Likelihood,
) -> Tensor:
    """KL(teacher || student) of each held-out example, float64, with the weights of `dequantize`."""
    overrides = dict(parameters)
    for name, tensor in tensors.items():
        layer = named_layer(module, name)
        overrides[weight_key(name, layer)] = matrix_to_weight(layer, tensor.dequantize()).to(layer.weight)
    divergences = [_divergence(module, overrides, part, likelihood) for part in judging]
    return torch.cat(divergences).cpu().to(torch.float64)


def _beats(candidate: Tensor, untouched: Tensor) -> bool:
    """Whether the mean of paired divergences [n] is lower by more than MARGIN standard errors."""
    improvement = untouched - candidate
    return bool(improvement.mean() > MARGIN * improvement.std() / math.sqrt(len(improvement)))
