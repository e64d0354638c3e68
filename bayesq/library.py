"""`bayesq.quantize` and `bayesq.evaluate`: one call each, without configuration, files or tracking."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.allocation import DAMPING, SOLVERS, make_allocator
from bayesq.batches import Layout, TensorExamples, two_examples
from bayesq.budget import Budget
from bayesq.calibration.memory import InMemoryStatistics
from bayesq.calibration.passes import CalibrationSettings
from bayesq.contract import Method
from bayesq.defaults import (
    DESCRIPTIVE,
    MAX_BITS,
    MIN_BITS,
    MIN_STREAM_BITS,
    choices,
    construct,
    misfits,
    settings,
    suggestion,
    without_effect,
)
from bayesq.distillation import DistillationSettings
from bayesq.errors import Refused
from bayesq.evaluation import compare, paired_rows
from bayesq.in_step import KEPT
from bayesq.likelihood import LIKELIHOODS
from bayesq.metrics import METRICS
from bayesq.pipeline import quantize_network
from bayesq.posterior import WhiteningStore
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import MASK, quantizable_layers
from bayesq.quant.usage import usage_of
from bayesq.recipe import Distillation, Recipe, Subject
from bayesq.report import Report

# Keys of a batch that are labels, not inputs of the network.
TARGETS = ("labels", "label", "targets")
# Configuration keys in messages of the pipeline -> the arguments of `quantize` that replace them.
ARGUMENTS = {
    "layers.exclude": "exclude",
    "calibration.batch_size": "batch_size",
    "raise calibration.examples": "give more batches",
    "distillation.moments=true is not possible": "distill=True is not possible",
    "set it to false": "set distill=False",
    "choose another model": "give another module",
}


def quantize(
    module: nn.Module,
    batches: Iterable[Any],
    bits: float = 4,
    method: str | Method = "bayesq",
    *,
    posterior: str = "kfac",
    allocator: str | None = None,
    inputs: str | None = None,
    codec: str | None = None,
    correction: str | None = None,
    rotate: bool | None = None,
    distill: bool = False,
    likelihood: str = "categorical",
    exclude: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    **switches: Any,
) -> tuple[nn.Module, Report]:
    """Quantize a network after training; returns a quantized copy on the same device, and a report.

        quantized, report = bayesq.quantize(bert, [tokenizer(texts, padding=True, return_tensors="pt")], bits=3.5)

    Args:
        module: the network, in evaluation mode; it is not changed. Its output is a tensor or has `logits`.
        batches: a few hundred calibration examples: tensors [b, ...], (inputs, labels) pairs, whose labels are not
            read, or mappings of tensors. Sequences of different length need an attention_mask; see `encode`.
        bits: average code bits per weight, 2 to 8, fractions allowed; from 1 with codec="entropy".
        method: name of a file in conf/method (bayesq, gptq, awq, rtn, ...), or an object as `bayesq.contract.Method`.
        posterior, allocator, inputs, codec, correction, rotate, distill, seed: see these keys in conf/config.yaml;
            None = the method's default; for an object: allocator "uniform", inputs "full", codec "fixed", correction
            "none", rotate False.
        likelihood: of the outputs: "categorical", or "gaussian" for regression heads.
        exclude: patterns (fnmatch) of module names that stay in full precision.
        batch_size: examples per forward pass.
        switches: further arguments of a named method, as in its file in conf/method.

    Raises:
        Refused: an argument cannot be used; the message names it.
    """
    if codec is None:
        codec = str(settings("method", method).get("codec", "fixed")) if isinstance(method, str) else "fixed"
    _check(module, bits, codec, batch_size, exclude, seed)
    _check_flags(distill=distill, rotate=False if rotate is None else rotate)
    _one_of("posterior", posterior, choices("posterior"))
    _one_of("likelihood", likelihood, tuple(LIKELIHOODS))
    _one_of("correction", "none" if correction is None else correction, KEPT)
    hook = module.register_forward_hook(_logits)
    try:
        recipe = _recipe(
            bits, method, posterior, allocator, inputs, codec, correction, rotate, distill, batch_size, seed, switches
        )
        subject = _subject(module, batches, likelihood, exclude, batch_size)
        statistics = _statistics(subject, recipe, batch_size, seed)
        quantized = quantize_network(subject, recipe, statistics)
    except Refused as error:
        raise Refused(_with_arguments(str(error))) from error
    finally:
        hook.remove()
    return quantized.copy_of(module), Report.of(bits, quantized, subject)


def evaluate(
    module: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Any],
    labels: Tensor,
    *,
    likelihood: str = "categorical",
    metrics: Sequence[str] = ("accuracy",),
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, object]:
    """Compare a quantized network with the full-precision one, under a run's result keys.

    Args:
        module, quantized: the two networks, in evaluation mode on one device.
        batches, likelihood, batch_size: as in `quantize`.
        labels: of all examples [n], classes or numbers.
        metrics: names in `bayesq.metrics.METRICS`.
        seed: of the bootstrap intervals.

    Returns:
        fp/<metric>, q/<metric>, delta/<metric> and its 95 % interval for each metric; q/kl_to_fp, agreement, nll, ece.

    Raises:
        Refused: an argument cannot be used; the message names it.
    """
    _one_of("likelihood", likelihood, tuple(LIKELIHOODS))
    for name in metrics:
        _one_of("metrics", name, tuple(METRICS))
    examples, device = encode(module, batches), next(module.parameters()).device
    if labels.shape != (len(examples),):
        raise Refused(f"labels: have shape {list(labels.shape)}; there are {len(examples)} examples")
    examples, meaning = replace(examples, labels=labels.cpu()), LIKELIHOODS[likelihood]
    hooks = [network.register_forward_hook(_logits) for network in (module, quantized)]
    try:
        rows, _ = paired_rows(module, quantized, examples, meaning, batch_size, device, "evaluate")
    finally:
        for hook in hooks:
            hook.remove()
    return compare(rows, seed, [METRICS[name] for name in metrics])


def _with_arguments(message: str) -> str:
    """The message with arguments of `quantize` in place of configuration keys."""
    for key, argument in ARGUMENTS.items():
        message = message.replace(key, argument)
    return re.sub(r"(?<![\w.])method\.(?=\w+=)", "", message)


def _check(module: nn.Module, bits: float, codec: str, batch_size: int, exclude: Sequence[str], seed: int) -> None:
    """Check arguments that do not depend on the method."""
    least = MIN_STREAM_BITS if codec == "entropy" else MIN_BITS
    if not isinstance(module, nn.Module):
        raise Refused(f"module={module!r:.60}: needs a torch.nn.Module")
    if any(part.training for part in module.modules()):
        raise Refused("module: is in training mode, or a part of it; call module.eval() first")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not least <= bits <= MAX_BITS:
        raise Refused(f"bits={bits!r}: needs a number from {least} to {MAX_BITS}")
    if type(batch_size) is not int or batch_size < 1:
        raise Refused(f"batch_size={batch_size!r}: needs a whole number of at least 1")
    if type(seed) is not int or seed < 0:
        raise Refused(f"seed={seed!r}: needs a whole number of at least 0")
    if torch.is_inference_mode_enabled():
        raise Refused("quantize: cannot run in torch.inference_mode(); call it outside, or use torch.no_grad()")
    if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
        raise Refused(f"exclude={exclude!r}: needs a list of patterns")


def _check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise Refused(f"{name}={flag!r}: needs True or False")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a value is one of the choices."""
    if value not in choices:
        raise Refused(f"{name}={value}: choose one of {', '.join(choices)}")


def _logits(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """Forward hook: the output, or its `logits` if it holds more than them."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise Refused(
            f"module: its output is a {type(output).__name__}, not a tensor or something with `logits`; wrap it in a "
            "module that returns the logits"
        )
    return logits


def _recipe(
    bits: float,
    method: str | Method,
    posterior: str,
    allocator: str | None,
    inputs: str | None,
    codec: str,
    correction: str | None,
    rotate: bool | None,
    distill: bool,
    batch_size: int,
    seed: int,
    switches: Mapping[str, Any],
) -> Recipe:
    """Method, posterior and allocator by their names, or with a method of the caller's."""
    content = _content(method, switches)
    for key, needs in without_effect(content, codec):
        raise Refused(f"{key}={content[key]}: {needs}")
    allocator = content["allocator"] if allocator is None else allocator
    _one_of("allocator", allocator, ("uniform", *SOLVERS))
    uses_posterior = content.get("uses_posterior") is True
    store, of_posterior = None, settings("posterior", posterior)
    rotates = of_posterior.get("rotate", content.get("rotate", False))
    if uses_posterior or allocator != "uniform":
        store = WhiteningStore(construct(of_posterior))
    defaults = settings("", "config")
    options = defaults["distillation"]
    more = {"whitenings": store} if uses_posterior else {}
    return Recipe(
        method=construct(content, **more) if isinstance(method, str) else method,
        allocator=make_allocator(allocator, store, **defaults["allocation"], damping=content.get("damping", DAMPING)),
        budget=Budget(float(bits), "code"),
        whitenings=store,
        correction=content.get("correction", "none") if correction is None else correction,
        distillation=Distillation(
            DistillationSettings(options["steps"], options["evaluations"], options["held_out"]),
            options["samples"],
            options["moments"],
            batch_size,
        )
        if distill
        else None,
        seed=seed,
        inputs=content.get("inputs", "full") if inputs is None else inputs,
        codec=codec,
        rotate=rotates if rotate is None else rotate,
    )


def _content(method: str | Method, switches: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method's file with the caller's switches; for an object the allocator alone.

    Raises:
        Refused: there is no such method or switch, a switch has another type, or the object is no method.
    """
    if not isinstance(method, str):
        lacks = [name for name in ("statistics", "prepare", "quantize_layer") if not hasattr(method, name)]
        if lacks or isinstance(method, type):
            reason = f"it has no {lacks[0]}, see bayesq.contract.Method" if lacks else "it is a class: make an instance"
            raise Refused(f"method={method!r:.60}: needs a name or a method object; {reason}")
        if switches:
            raise Refused(
                f"{next(iter(switches))}: only a method given by name takes switches; set them when you make the object"
            )
        return {"allocator": "uniform"}
    content = settings("method", method)
    arguments = [key for key in content if key not in (*DESCRIPTIVE, "_target_")]
    for key in switches:
        if key not in arguments:
            raise Refused(f"{key}: method={method} has no such switch{suggestion(key, arguments)}")
    content |= switches
    for key, needs in misfits(content):
        raise Refused(f"{key}={content[key]!r}: {needs}")
    return content


def _subject(
    module: nn.Module, batches: Iterable[Any], likelihood: str, exclude: Sequence[str], batch_size: int
) -> Subject:
    """The network with its encoded calibration examples."""
    examples = encode(module, batches)
    device = next(module.parameters()).device
    layers = quantizable_layers(module, list(exclude))
    more = (batch.inputs for batch in examples.batches(batch_size, device))
    usage = usage_of(module, layers, two_examples(examples, device).inputs, more)
    if not usage.layers:
        raise Refused("module: no layer takes part in the forward pass")
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
        subject.module,
        subject.layers,
        subject.examples,
        settings,
        subject.device,
        overwritten=subject.usage.overwritten,
    )


def encode(module: nn.Module, batches: Iterable[Any]) -> TensorExamples:
    """Batches in any form that `quantize` takes, as examples with named inputs.

    Sequences of different length need an attention_mask [b, t]; all other inputs are then [b, t, ...].

    Raises:
        Refused: there is no batch, a batch has another form, or shapes differ and there is no attention mask.
    """
    if isinstance(batches, Tensor | Mapping):
        raise Refused("batches: is a single batch; put it in a list")
    if not isinstance(batches, Iterable):
        raise Refused(f"batches={batches!r:.60}: needs a list of batches")
    named = [_named(module, batch) for batch in batches]
    if not named:
        raise Refused("batches: there is none; give a few hundred examples")
    keys = list(named[0])
    if any(batch.keys() != named[0].keys() for batch in named):
        raise Refused("batches: all batches need the same inputs")
    for batch in named:
        _check_sizes(batch)
    if MASK not in keys:
        for key in keys:
            if len(shapes := {tuple(batch[key].shape[1:]) for batch in named}) > 1:
                raise Refused(f"batches: {key}: shapes {sorted(shapes)} differ; sequences need an {MASK}")
        inputs = {key: torch.cat([batch[key] for batch in named]) for key in keys}
        return TensorExamples(inputs, torch.zeros(len(inputs[keys[0]])))
    left = any(bool((batch[MASK][:, 0] == 0).any()) for batch in named)
    longest = max(batch[MASK].shape[1] for batch in named)
    inputs = {key: torch.cat([_padded(batch[key], longest, left) for batch in named]) for key in keys}
    return TensorExamples(
        inputs, torch.zeros(len(inputs[MASK])), inputs[MASK].sum(1), Layout(side="left" if left else "right")
    )


def _check_sizes(batch: Mapping[str, Tensor]) -> None:
    """Check that all inputs have the same number of examples and, beside an attention mask, of tokens."""
    first, dimensions = (MASK, ("examples", "tokens")) if MASK in batch else (next(iter(batch)), ("examples",))
    common = batch[first].shape[: len(dimensions)]
    for key, x in batch.items():
        if x.ndim < len(dimensions) or x.shape[: len(dimensions)] != common:
            raise Refused(
                f"batches: {key} has shape {list(x.shape)}; it must begin with {' and '.join(dimensions)}, "
                f"{list(common)} as in {first}"
            )


def _padded(x: Tensor, length: int, left: bool) -> Tensor:
    """[b, t, ...] with zeros up to [b, length, ...]."""
    missing = length - x.shape[1]
    behind = (0, 0) * (x.ndim - 2)
    return nn.functional.pad(x, (*behind, missing, 0) if left else (*behind, 0, missing)) if missing else x


def _named(module: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The inputs of one batch by argument name, on the CPU."""
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in TARGETS and isinstance(value, Tensor)}
    else:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        name = next(iter(inspect.signature(module.forward).parameters), None)
        inputs = {name: x} if isinstance(x, Tensor) and name is not None else {}
    if not inputs:
        raise Refused(
            f"batches: a {type(batch).__name__} is no batch; give tensors, (inputs, labels) pairs or dicts of tensors"
        )
    return {key: value.detach().cpu() for key, value in inputs.items()}
