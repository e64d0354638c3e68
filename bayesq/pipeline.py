"""From a network and calibration examples to quantized tensors.

    statistics -> posterior -> bit allocation -> rounding, layer by layer -> moment correction -> distillation

Nothing here reads a configuration or writes a file. `bayesq.quantize` and the suite's runner call `quantize_network`.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bayesq.allocation import Knapsack
from bayesq.batches import in_one_batch, needs_no_padding
from bayesq.budget import Allocation, Budget
from bayesq.calibration.block_samples import BLOCK_SAMPLES, BlockSource
from bayesq.calibration.order import forward_order
from bayesq.calibration.prefix import Network, PrefixInputs
from bayesq.contract import Context, LayerProblem
from bayesq.entropy import StreamAllocation
from bayesq.errors import Refused
from bayesq.in_step import InStep
from bayesq.loop import quantize_layers
from bayesq.memory import halving
from bayesq.nearest import round_to_nearest
from bayesq.observer import Observer
from bayesq.posterior import WhiteningStore
from bayesq.progress import bar, elapsed
from bayesq.proxy import measure_kappa
from bayesq.quant.layers import kernel_positions, kind_of, same_layer, weight_to_matrix
from bayesq.quant.mean_takers import mean_takers
from bayesq.recipe import Proxy, Quantized, Recipe, Statistics, Subject
from bayesq.repair import correct, distill_student, posterior_draw
from bayesq.rotated import RotatedColumns
from bayesq.uniform import Uniform


def quantize_network(
    subject: Subject,
    recipe: Recipe,
    statistics: Statistics,
    observer: Observer | None = None,
) -> Quantized:
    """Run a recipe on a network; `observer` is told of each rounded layer and each evaluation of a distillation.

    Raises:
        Refused: no allocation meets the budget, a layer's weights or statistics are not finite, no calibration
            example reaches a layer, or a stage cannot handle this network. The message names the layer or the key.
    """
    result = Quantized(observer=observer or Observer())
    groups = calibrate(subject, recipe, statistics, result)
    problems = layer_problems(subject, statistics, groups)
    round_embeddings(subject, recipe.budget, result)
    fit_posterior(subject, recipe, problems, result)
    round_layers(subject, recipe, statistics, groups, problems, result)
    if recipe.whitenings is not None:
        note_achieved_risk(recipe.whitenings, problems, result)
        recipe.whitenings.release()
    result.oom_retries += statistics.out_of_memory()
    if recipe.correction != "none" and recipe.inputs == "full":
        start = time.perf_counter()
        correct(subject, result)
        result.seconds["quantize"] += time.perf_counter() - start
    if recipe.distillation is not None:
        start = time.perf_counter()
        distill_student(subject, recipe, recipe.distillation, result)
        result.seconds["distill"] = time.perf_counter() - start
    return result


def calibrate(subject: Subject, recipe: Recipe, statistics: Statistics, result: Quantized) -> list[list[str]]:
    """Prepare the statistics; return the names of the layers as `layer_order` does.

    Raises:
        Refused: no calibration example reaches some layer.
    """
    start = time.perf_counter()
    with elapsed("statistics"):
        statistics.prepare(recipe.statistics)
    spent = time.perf_counter() - start
    refuse_unseen(statistics)
    inherited = recipe.whitenings.inherited_seconds if recipe.whitenings else 0.0
    result.seconds["calibrate"] = statistics.total_s
    result.reused_s = statistics.total_s + inherited - spent
    return layer_order(subject)


def refuse_unseen(statistics: Statistics) -> None:
    """Refuse layers that no calibration example reaches: nothing else tells which widths they need."""
    if statistics.unseen:
        raise Refused(
            f"no calibration example reaches {', '.join(sorted(statistics.unseen))}: add them to layers.exclude, or "
            "raise calibration.examples"
        )


def layer_order(subject: Subject) -> list[list[str]]:
    """Names of the layers in forward order; successive layers that read the same tensor form one group."""
    return forward_order(subject.module, subject.layers, next(subject.examples.batches(1, subject.device)))


def layer_problems(subject: Subject, statistics: Statistics, groups: Sequence[Sequence[str]]) -> list[LayerProblem]:
    """The layers as methods see them, in forward order; `groups` is the result of `layer_order`."""
    return [
        LayerProblem(
            name=name,
            kind=kind_of(subject.layers[name]),
            weight=weight_to_matrix(subject.layers[name]).float().cpu(),
            statistic=partial(statistics.statistic, name),
            positions_per_channel=kernel_positions(subject.layers[name]),
        )
        for group in groups
        for name in group
    ]


def round_embeddings(subject: Subject, budget: Budget, result: Quantized) -> None:
    """Round embedding tables to nearest, with one grid per row, in the same way for every method.

    A lookup reads one row and multiplies nothing, so there are no input correlations to exploit. With a fractional
    budget, the rows whose error falls most get the next width.

    Raises:
        Refused: a table has NaN or infinite entries, or the budget does not allow the smallest width.
    """
    problems = [
        LayerProblem(name, type(table).__name__, weight_to_matrix(table).float().cpu(), statistic=_no_statistic)
        for name, table in subject.embeddings.items()
    ]
    if not problems:
        return
    start = time.perf_counter()
    widths = Allocation(Uniform(), budget)(problems)
    for problem in problems:
        tensor = round_to_nearest(problem, widths[problem.name], "mse")
        seconds = time.perf_counter() - start
        result.add(problem, tensor, seconds)
        result.seconds["quantize"] += seconds
        start = time.perf_counter()


def _no_statistic(kind: str) -> Tensor:
    raise Refused(f"embeddings have no statistic {kind}")


def fit_posterior(subject: Subject, recipe: Recipe, problems: Sequence[LayerProblem], result: Quantized) -> None:
    """Prepare the posterior, which may need all layers at once, and measure the proxy."""
    start = time.perf_counter()
    inherited = 0.0
    if recipe.whitenings is not None:
        inherited = recipe.whitenings.inherited_seconds
        with elapsed("posterior"):
            recipe.whitenings.prepare(problems)
    if recipe.proxy is not None:
        result.oom_retries += weigh_by_proxy(subject, recipe, recipe.proxy, problems)
    result.seconds["posterior"] = time.perf_counter() - start + inherited


def round_layers(
    subject: Subject,
    recipe: Recipe,
    statistics: Statistics,
    groups: Sequence[Sequence[str]],
    problems: Sequence[LayerProblem],
    result: Quantized,
) -> None:
    """Allocate bits and round; the method may ask for inputs behind the quantized prefix."""
    result.problems |= {problem.name: problem for problem in problems}
    prefix = None
    if recipe.inputs != "full":
        prefix = open_prefix(subject, recipe, statistics.batch_size, groups, result)
    fits_before = recipe.whitenings.seconds if recipe.whitenings else 0.0
    context = Context.of_seed(recipe.seed, subject.device)
    if recipe.codec == "entropy":
        context = replace(context, stream=StreamAllocation(recipe.allocator, recipe.budget, result.problems))
    allocate = Allocation(recipe.allocator, recipe.budget)
    start = last = time.perf_counter()
    method = RotatedColumns(recipe.method) if recipe.rotate else recipe.method
    counts_codes = recipe.codec == "fixed" and recipe.budget.count == "code"
    most_bits = recipe.budget.bits * sum(problem.weight.numel() for problem in problems) if counts_codes else None
    rounded = quantize_layers(method, problems, allocate, context, prefix, most_bits)
    for problem, tensor in bar(rounded, "quantize", total=len(problems)):
        now = time.perf_counter()
        result.add(problem, tensor, now - last)
        last = now
    fits = recipe.whitenings.seconds - fits_before if recipe.whitenings else 0.0
    behind_prefix = prefix.inputs.seconds if prefix else 0.0
    result.oom_retries += prefix.inputs.oom_retries if prefix else 0
    result.parameters |= prefix.parameters if prefix else {}
    result.seconds["posterior"] += fits
    result.seconds["calibrate"] += behind_prefix
    result.seconds["quantize"] += last - start - fits - behind_prefix


def open_prefix(
    subject: Subject, recipe: Recipe, batch_size: int, groups: Sequence[Sequence[str]], result: Quantized
) -> InStep:
    """The network whose layers are replaced one by one, in step with full precision where the recipe asks for it."""
    working = result.copy_of(subject.module)
    layers = {name: same_layer(layer, working, name) for name, layer in subject.layers.items()}
    calls, keep = subject.usage.calls, recipe.correction
    full = Network(subject.module, subject.layers, subject.blocks, calls)
    inputs = PrefixInputs(
        Network(working, layers, subject.blocks, calls),
        groups,
        subject.examples,
        batch_size,
        subject.device,
        recipe.behind_prefix,
        full if recipe.in_step else None,
        recipe.folder,
    )
    takers: dict[str, str] = {}
    if keep != "none":
        takers = mean_takers(subject.module, subject.layers, next(subject.examples.batches(1, subject.device)).inputs)
        for name in subject.layers.keys() - takers:
            result.problems[name].count("uncorrected_layers")
    blocks = None
    if BLOCK_SAMPLES in recipe.compares:
        blocks = BlockSource(inputs, subject.likelihood, recipe.seed)
    targets = recipe.inputs == "paired" and not recipe.compares
    return InStep(inputs, targets, keep, takers, blocks)


def note_achieved_risk(whitenings: WhiteningStore, problems: Iterable[LayerProblem], result: Quantized) -> None:
    """Note the posterior risk of each rounded layer, in nats."""
    for problem in bar(problems, "achieved risk"):
        delta = result.tensors[problem.name].dequantize() - problem.weight
        problem.notes["achieved_risk"] = float(whitenings.fit(problem).risk(delta).sum())


def weigh_by_proxy(subject: Subject, recipe: Recipe, proxy: Proxy, problems: Sequence[LayerProblem]) -> int:
    """Note kappa in each layer: measured divergence over predicted risk at one width.

    Both are measured without rotation; kappa is assumed to hold for rotated columns too.

    Returns:
        how often memory ran out and the measurement was repeated with smaller batches.

    Raises:
        Refused: the allocator does not use risks.
    """
    knapsack, whitenings = recipe.allocator, recipe.whitenings
    if not isinstance(knapsack, Knapsack) or whitenings is None:
        raise Refused("proxy=mc weighs predicted risks: it needs allocator=knapsack or allocator=ilp")
    width = min(knapsack.widths, key=lambda w: (abs(w - recipe.budget.bits), w))
    at = knapsack.widths.index(width)
    by_name = {problem.name: problem for problem in problems}
    batch = in_one_batch(subject.examples, proxy.examples, subject.device)
    measure = partial(
        measure_kappa,
        subject.module,
        list(by_name),
        lambda name: knapsack.rounded(by_name[name], width),
        posterior_draw(whitenings, by_name),
        {problem.name: float(knapsack.predict(problem)[:, at].sum()) for problem in problems},
        batch.inputs,
        proxy.samples,
        likelihood=subject.likelihood,
        alone=needs_no_padding(subject.examples),
    )
    kappa, retries = halving(
        len(batch.index),
        lambda size: measure(torch.Generator().manual_seed(recipe.seed), batch_size=size),
        "proxy",
    )
    for name, factor in kappa.factors.items():
        by_name[name].notes["kappa"] = factor
    for kind, times in kappa.fallbacks.items():
        problems[0].count(kind, times)
    return retries
