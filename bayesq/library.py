"""`bayesq.quantize`: one call for a user's own network, without configuration, files or tracking."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.allocation import DAMPING, Budget, make_allocator
from bayesq.batches import Layout, TensorExamples, two_examples
from bayesq.calibration.memory import InMemoryStatistics
from bayesq.calibration.passes import CalibrationSettings
from bayesq.defaults import DESCRIPTIVE, MAX_BITS, MIN_BITS, choices, construct, settings, suggestion
from bayesq.distillation import DistillationSettings
from bayesq.likelihood import LIKELIHOODS
from bayesq.pipeline import quantize_network
from bayesq.posterior import WhiteningStore
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import MASK, quantizable_layers
from bayesq.quant.usage import usage_of
from bayesq.recipe import Distillation, Recipe, Subject
from bayesq.report import Report

# Entries of a batch that are no input of the network.
TARGETS = ("labels", "label", "targets")


def quantize(
    module: nn.Module,
    batches: Iterable[Any],
    bits: float = 4,
    method: str = "bayesq",
    *,
    posterior: str = "kfac",
    allocator: str | None = None,
    correction: str = "none",
    distill: bool = False,
    likelihood: str = "categorical",
    exclude: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    **switches: Any,
) -> tuple[nn.Module, Report]:
    """Quantize a network after training.

        quantized, report = bayesq.quantize(resnet, [images], bits=3)
        quantized, report = bayesq.quantize(bert, [tokenizer(texts, padding=True, return_tensors="pt")], bits=3.5)

    Args:
        module: the network, in evaluation mode; it is not changed. Its output is a tensor, or has `logits`.
        batches: a few hundred calibration examples in any number of batches: tensors [b, ...], (inputs, labels) pairs,
            of which only the inputs are read, or mappings from argument names to tensors. Sequences of different length
            need an attention_mask.
        bits: average code bits per weight, 2 to 8, fractions allowed.
        method: a file of conf/method: bayesq, gptq, awq, rtn.
        posterior: a file of conf/posterior: kfac, ekfac, diag, lowrank; read by bayesq and by allocator="knapsack".
        allocator: "uniform" or "knapsack"; None = the method's default.
        correction: "moments" matches activation moments to the full-precision network's; "none".
        distill: train scales, levels, biases and norms on the calibration inputs.
        likelihood: of the outputs: "categorical", or "gaussian" for regression heads.
        exclude: patterns (fnmatch) of module names that stay in full precision.
        batch_size: examples per forward pass.
        seed: of everything random.
        switches: the method's own, as in its file of conf/method.

    Returns:
        the quantized network, on the device of the original one, and a report.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """
    _check(module, bits, batch_size, exclude)
    _one_of("posterior", posterior, choices("posterior"))
    _one_of("likelihood", likelihood, tuple(LIKELIHOODS))
    _one_of("correction", correction, ("none", "moments"))
    recipe = _recipe(bits, method, posterior, allocator, correction == "moments", distill, seed, switches)
    hook = module.register_forward_hook(_logits)
    try:
        subject = _subject(module, batches, likelihood, exclude, batch_size)
        statistics = _statistics(subject, recipe, batch_size, seed)
        quantized = quantize_network(subject, recipe, statistics)
    finally:
        hook.remove()
    return quantized.copy_of(module), Report.of(bits, quantized, subject.weights)


def _check(module: nn.Module, bits: float, batch_size: int, exclude: Sequence[str]) -> None:
    """Refuse what no network can be quantized with; see `quantize`.

    Raises:
        ValueError: naming the argument.
    """
    if any(part.training for part in module.modules()):
        raise ValueError("module: is in training mode, or a part of it; call module.eval() first")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: needs a number from {MIN_BITS} to {MAX_BITS}")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: needs a whole number of at least 1")
    if isinstance(exclude, str):
        raise ValueError(f"exclude={exclude}: needs a list of patterns")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: naming the argument.
    """
    if value not in choices:
        raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")


def _logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: the logits of networks that return them with other things."""
    return getattr(output, "logits", output)


def _recipe(
    bits: float,
    method: str,
    posterior: str,
    allocator: str | None,
    correction: bool,
    distill: bool,
    seed: int,
    switches: Mapping[str, Any],
) -> Recipe:
    """Method, posterior and allocator by their names.

    Raises:
        ValueError: there is no such choice or switch, or a constructor refuses a value.
    """
    content = settings("method", method)
    arguments = [key for key in content if key not in (*DESCRIPTIVE, "_target_")]
    for key in switches:
        if key not in arguments:
            raise ValueError(f"{key}: method={method} has no such switch{suggestion(key, arguments)}")
    allocator = content["allocator"] if allocator is None else allocator
    _one_of("allocator", allocator, ("uniform", "knapsack"))
    uses_posterior = content.get("uses_posterior") is True
    store = None
    if uses_posterior or allocator == "knapsack":
        store = WhiteningStore(construct(settings("posterior", posterior)))
    defaults = settings("", "config")
    options = defaults["distillation"]
    return Recipe(
        method=construct({**content, **switches}, **({"whitenings": store} if uses_posterior else {})),
        allocator=make_allocator(
            allocator, store, **defaults["allocation"], damping=switches.get("damping", content.get("damping", DAMPING))
        ),
        budget=Budget(float(bits), "code"),
        whitenings=store,
        correction=correction,
        distillation=Distillation(
            DistillationSettings(options["steps"], options["evaluations"], options["held_out"]),
            options["samples"],
            options["moments"],
            options["batch_size"],
        )
        if distill
        else None,
        seed=seed,
    )


def _subject(
    module: nn.Module, batches: Iterable[Any], likelihood: str, exclude: Sequence[str], batch_size: int
) -> Subject:
    """The network with its encoded calibration examples.

    Raises:
        ValueError: no layer can be quantized, or the batches do not fit the network.
    """
    examples = encode(module, batches)
    device = next(module.parameters()).device
    layers = quantizable_layers(module, list(exclude))
    more = (batch.inputs for batch in examples.batches(batch_size, device))
    usage = usage_of(module, layers, two_examples(examples, device).inputs, more)
    if not usage.layers:
        raise ValueError("module: no layer takes part in the forward pass")
    return Subject(module, usage, examples, LIKELIHOODS[likelihood], device, blocks=find_blocks(module))


def _statistics(subject: Subject, recipe: Recipe, batch_size: int, seed: int) -> InMemoryStatistics:
    posterior = recipe.whitenings.posterior if recipe.whitenings else None
    settings = CalibrationSettings(
        1 if subject.usage.alone else batch_size,
        posterior.samples if posterior else None,
        seed,
        posterior.examples if posterior else None,
        subject.likelihood,
        posterior.draws if posterior else "signs",
    )
    return InMemoryStatistics(
        subject.module, subject.layers, subject.examples, settings, subject.device, subject.usage.overwritten
    )


def encode(module: nn.Module, batches: Iterable[Any]) -> TensorExamples:
    """Batches in any of the forms of `quantize` as examples of named inputs.

    Raises:
        ValueError: there is no batch, one is of another kind, or their shapes differ without an attention mask.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ValueError("batches: is a single batch; put it in a list")
    named = [_named(module, batch) for batch in batches]
    if not named:
        raise ValueError("batches: there is none; a few hundred examples are needed")
    keys = list(named[0])
    if any(list(batch) != keys for batch in named):
        raise ValueError("batches: all need the same inputs")
    if MASK not in keys:
        shapes = {tuple(x.shape[1:]) for x in (batch[keys[0]] for batch in named)}
        if len(shapes) > 1:
            raise ValueError(f"batches: shapes {sorted(shapes)} differ; sequences need an {MASK}")
        inputs = {key: torch.cat([batch[key] for batch in named]) for key in keys}
        return TensorExamples(inputs, torch.zeros(len(inputs[keys[0]])))
    left = any(bool((batch[MASK][:, 0] == 0).any()) for batch in named)
    longest = max(batch[MASK].shape[1] for batch in named)
    inputs = {key: torch.cat([_padded(batch[key], longest, left) for batch in named]) for key in keys}
    return TensorExamples(
        inputs, torch.zeros(len(inputs[MASK])), inputs[MASK].sum(1), Layout(side="left" if left else "right")
    )


def _padded(x: Tensor, length: int, left: bool) -> Tensor:
    """[b, t] with zeros up to [b, length]."""
    missing = length - x.shape[1]
    return nn.functional.pad(x, (missing, 0) if left else (0, missing)) if missing else x


def _named(module: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The inputs of one batch by argument name, on the CPU."""
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in TARGETS and isinstance(value, Tensor)}
    else:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        name = next(iter(inspect.signature(module.forward).parameters), None)
        inputs = {name: x} if isinstance(x, Tensor) and name is not None else {}
    if not inputs:
        raise ValueError(
            f"batches: a {type(batch).__name__} is no batch; give tensors, (inputs, labels) pairs or dicts of tensors"
        )
    return {key: value.detach().cpu() for key, value in inputs.items()}
