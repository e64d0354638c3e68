"""The stages after rounding, the same for every method: moment correction and distillation."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bayesq.batches import in_one_batch
from bayesq.contract import LayerProblem
from bayesq.distillation import Distilled, distill
from bayesq.errors import Refused
from bayesq.memory import halving
from bayesq.posterior import WhiteningStore
from bayesq.progress import elapsed
from bayesq.quant.correction import MAX_EXAMPLES, Correction, correct_moments
from bayesq.recipe import Distillation, Quantized, Recipe, Subject
from bayesq.teacher import posterior_predictive

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
# Moment matching before a distillation uses at most this many of its batches, so halving the batch size halves its
# examples.
START_BATCHES = 16


def correct(subject: Subject, result: Quantized) -> None:
    """Match activation moments to those of the full-precision network.

    Raises:
        Refused: the moments of this network cannot be matched.
    """
    batch = in_one_batch(subject.examples, len(subject.examples), CPU)

    def attempt(examples: int) -> Correction:
        student = result.copy_of(subject.module)
        return correct_moments(subject.module, student, list(subject.layers), batch.inputs, examples, subject.alone)

    try:
        with elapsed("match moments"):
            correction, retries = halving(min(MAX_EXAMPLES, len(subject.examples)), attempt, "correction")
    except Refused as error:
        raise Refused(f"correction=moments is not possible ({error}): choose correction=none") from error
    result.oom_retries += retries
    result.parameters |= correction.tensors
    for name in correction.uncorrected:
        result.problems[name].count("uncorrected_layers")


def distill_student(subject: Subject, recipe: Recipe, settings: Distillation, result: Quantized) -> None:
    """Train scales, levels, biases and norms towards the posterior-predictive teacher.

    Raises:
        Refused: the calibration set is too small, or the moments cannot be matched.
    """
    tensors = result.layers(subject)

    def attempt(batch_size: int) -> Distilled:
        batches = list(subject.examples.batches(batch_size, CPU))  # one batch at a time is moved to the device
        generator = torch.Generator().manual_seed(recipe.seed)
        # Without a posterior the teacher is the full-precision network.
        samples = settings.samples if recipe.whitenings else 0
        draw = posterior_draw(recipe.whitenings, result.problems)
        teacher = posterior_predictive(subject.module, tensors, draw, batches, samples, generator, subject.likelihood)
        start = None
        # After correction=moments the moments match already.
        if settings.moments and recipe.correction == "none":
            start = moment_start(subject, result, START_BATCHES * batch_size)
        student = result.copy_of(subject.module)
        likelihood, observer = subject.likelihood, result.observer
        return distill(student, tensors, batches, teacher, settings.settings, generator, likelihood, start, observer)

    distilled, retries = halving(settings.batch_size, attempt, "distillation")
    result.oom_retries += retries
    result.tensors |= distilled.tensors
    result.parameters |= distilled.parameters
    result.distillation = {
        "best_step": distilled.best_step,
        "moments": distilled.started,
        "heldout_kl_before": distilled.heldout_kl_before,
        "heldout_kl_after": distilled.heldout_kl_after,
    }
    log.info(
        f"distillation: {'started from matched moments; ' if distilled.started else ''}selected step "
        f"{distilled.best_step} of {distilled.steps}, held-out KL {distilled.heldout_kl_before:.2g} -> "
        f"{distilled.heldout_kl_after:.2g}"
    )


def moment_start(subject: Subject, result: Quantized, examples: int) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """A function from chosen calibration examples (bool [n]) to parameters that match activation moments on them.

    It uses at most `examples` of them.
    """

    def start(chosen: Tensor) -> Mapping[str, Tensor]:
        batch = in_one_batch(subject.examples, len(subject.examples), CPU)
        rows = chosen[batch.index]
        inputs = {name: x[rows] for name, x in batch.inputs.items()}
        student = result.copy_of(subject.module)
        layers, most = list(subject.layers), min(examples, MAX_EXAMPLES)
        try:
            return correct_moments(subject.module, student, layers, inputs, most, subject.alone).tensors
        except Refused as error:
            raise Refused(f"distillation.moments=true is not possible ({error}): set it to false") from error

    return start


def posterior_draw(
    whitenings: WhiteningStore | None, problems: Mapping[str, LayerProblem]
) -> Callable[[str, torch.Generator], Tensor]:
    """A function that draws w - mu [g, r, c] of a layer, given its name; not called in runs without a posterior."""

    def draw(name: str, generator: torch.Generator) -> Tensor:
        assert whitenings is not None
        return whitenings.fit(problems[name]).sample(generator)

    return draw
