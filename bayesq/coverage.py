"""What share of a network is quantized, and what stays in full precision."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bayesq.quant.layers import Layer, embedding_tables, weight_key

log = logging.getLogger(__name__)

# How many unquantized tensors the result names, largest first, and how many the log line names.
NAMED, SHOWN = 5, 2


@dataclass(frozen=True)
class Coverage:
    """How much of a network is quantized.

    Attributes:
        share: quantized weights over all parameters, each shared tensor counted once.
        left_out: parameters with at least two dimensions that are not quantized: name -> number of weights, the NAMED
            largest.
    """

    share: float
    left_out: dict[str, int]


def parameter_count(module: nn.Module) -> int:
    """Number of trainable and frozen parameters, each shared tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def coverage(module: nn.Module, layers: Mapping[str, Layer | nn.Embedding]) -> Coverage:
    """What quantizing `layers`, by name, covers of `module`."""
    quantized = {weight_key(name, layer) for name, layer in layers.items()}
    shared = {id(layer.weight) for layer in layers.values()}
    left = {
        name: x.numel()
        for name, x in module.named_parameters()
        if name not in quantized and id(x) not in shared and x.ndim >= 2
    }
    largest = sorted(left, key=lambda name: (-left[name], name))[:NAMED]
    weights = sum(layer.weight.numel() for layer in layers.values())
    return Coverage(weights / parameter_count(module), {name: left[name] for name in largest})


def report(covered: Coverage, module: nn.Module, unreached: Iterable[str]) -> None:
    """Log the quantized share (a warning below one half), and warn of layers that the forward pass never uses."""
    tables = {f"{name}.weight" for name in embedding_tables(module)}
    names = list(covered.left_out)[:SHOWN]
    left = ", ".join(f"{name} ({_millions(covered.left_out[name])})" for name in names)
    hint = "; layers.include_embeddings=true rounds embeddings" if tables.intersection(names) else ""
    rest = f"; largest of the rest: {left}{hint}" if left else ""
    level = logging.WARNING if covered.share < 0.5 else logging.INFO
    log.log(level, f"quantizing {100 * covered.share:.0f} % of {_millions(parameter_count(module))} parameters{rest}")
    if names := list(unreached):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.warning(
            f"{len(names)} layers take no part in the forward pass and stay in full precision: "
            f"{', '.join(names[:NAMED])}{more}"
        )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
