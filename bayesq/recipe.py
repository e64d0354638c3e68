"""Inputs, settings and results of the pipeline: the values that its stages exchange."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples, needs_no_padding
from bayesq.budget import Allocator, Budget
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT
from bayesq.calibration.statistic import Source, Statistic, with_required
from bayesq.contract import CODECS, INPUTS, LayerProblem, Method
from bayesq.distillation import DistillationSettings
from bayesq.errors import Refused
from bayesq.ilp import ilp_knapsack
from bayesq.likelihood import Likelihood
from bayesq.nearest import clamped_scales
from bayesq.observer import Observer
from bayesq.posterior import WhiteningStore
from bayesq.quant.layers import Layer
from bayesq.quant.network import fill
from bayesq.quant.tensor import QuantizedTensor
from bayesq.quant.usage import Usage
from bayesq.rotated import RotatedColumns


class Statistics(Protocol):
    """Source of a network's calibration statistics: computed in memory, or read from a cache.

    Attributes:
        total_s: seconds it takes to compute the prepared statistics, without a cache.
        batch_size: examples per forward pass.
        unseen: layers that no calibration example reached.
    """

    unseen: set[str]

    @property
    def total_s(self) -> float: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def prepare(self, statistics: Iterable[Statistic]) -> None:
        """Compute the statistics that do not exist yet."""

    def statistic(self, layer: str, name: str) -> Tensor:
        """One layer's statistic by its name."""

    def out_of_memory(self) -> int:
        """How often memory ran out and a pass was repeated with smaller batches."""


@dataclass(frozen=True)
class Subject:
    """The network to quantize, and its calibration examples.

    Attributes:
        module: full-precision network in evaluation mode, on `device`; it is not changed.
        usage: how it uses its layers; only layers in its forward pass are quantized.
        examples: encoded calibration examples.
        likelihood: of the outputs.
        device: of the network.
        embeddings: embedding tables to round, by name.
        blocks: names of parts that the network runs in sequence, see `bayesq.walker`.
    """

    module: nn.Module
    usage: Usage
    examples: EncodedExamples
    likelihood: Likelihood
    device: torch.device
    embeddings: Mapping[str, nn.Embedding] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def layers(self) -> dict[str, Layer]:
        """Layers to quantize, by name, in definition order."""
        return self.usage.layers

    @property
    def alone(self) -> bool:
        """Whether the network must see each example of a padded batch alone."""
        return bool(self.usage.alone) or needs_no_padding(self.examples)

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(layer.weight.numel() for layer in (*self.layers.values(), *self.embeddings.values()))


@dataclass(frozen=True)
class Proxy:
    """Settings of the task-aware proxy.

    Attributes:
        samples: number of posterior draws, the same for all layers; 0 = the posterior mean.
        examples: number of calibration examples it is measured on.
    """

    samples: int
    examples: int


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation.

    Attributes:
        settings: the optimizer's budget.
        samples: number of posterior draws that the teacher averages; 0 = the full-precision network.
        moments: start from matched activation moments if they are better on the held-out part.
        batch_size: examples per forward pass.
    """

    settings: DistillationSettings
    samples: int
    moments: bool
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """How a network is quantized.

    Attributes:
        method: rounds the layers.
        allocator: chooses row widths.
        budget: average bits per weight.
        whitenings: the posterior and its fits; None if neither method nor allocator reads it.
        proxy: scales predicted risks by a measured divergence; None = no proxy.
        correction: match activation moments to those of the full-precision network: "none", "mean" or "moments"; after
            rounding with full inputs, else layer by layer.
        distillation: train scales, levels, biases and norms after rounding; None = no distillation.
        seed: of all random draws.
        inputs: one of INPUTS.
        codec: one of CODECS.
        rotate: round in randomly rotated columns, see `bayesq.rotated`.
        folder: existing folder for temporary files of calibration inputs that exceed the memory; None = no files.
    """

    method: Method
    allocator: Allocator
    budget: Budget
    whitenings: WhiteningStore | None = None
    proxy: Proxy | None = None
    correction: str = "none"
    distillation: Distillation | None = None
    seed: int = 0
    inputs: str = "full"
    codec: str = "fixed"
    rotate: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Refuse inputs that the method cannot use.

        Raises:
            Refused: naming the key.
        """
        if hasattr(self.method, "inputs"):
            name = type(self.method).__name__
            raise Refused(f"{name}.inputs is not read: write `inputs: {self.method.inputs}` in the method's YAML")
        with_required([*self.statistics, *self.method.statistics, INPUT_MOMENT, CROSS_MOMENT])  # each name once
        if self.codec not in CODECS:
            raise Refused(f"codec={self.codec}: choose one of {', '.join(CODECS)}")
        if self.codec == "entropy" and not getattr(self.method, "entropy", False):
            raise Refused("codec=entropy: this method has no entropy-coded form; choose codec=fixed")
        if self.codec == "fixed" and not getattr(self.method, "fixed", True):
            raise Refused("codec=fixed: this method is for entropy-coded codes alone; choose codec=entropy")
        if self.codec == "entropy" and getattr(self.allocator, "solve", None) is ilp_knapsack:
            raise Refused("allocator=ilp: codec=entropy has no widths to solve for; choose allocator=knapsack")
        if self.rotate:
            # refuses statistics that have no rotated form
            RotatedColumns(self.method, self.allocator.statistics)
        if self.inputs not in INPUTS:
            raise Refused(f"inputs={self.inputs}: choose one of {', '.join(INPUTS)}")
        if self.compares and self.inputs != "paired":
            raise Refused(f"inputs={self.inputs}: this method compares both networks' inputs; choose inputs=paired")
        if self.inputs != "full" and not self.behind_prefix and not self.compares and not self._only_targets:
            raise Refused(f"inputs={self.inputs}: this method reads no inputs; choose inputs=full")
        if self.correction == "mean" and self.inputs == "full":
            raise Refused("correction=mean: needs inputs=prefix or inputs=paired; choose correction=moments")

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics of full-precision inputs and gradients that the recipe reads."""
        of_posterior = self.whitenings.statistics if self.whitenings else frozenset[Statistic]()
        of_method = self.method.statistics
        if self.inputs != "full":
            of_method = of_method - self.behind_prefix - self.compares
            if self.correction == "moments":
                of_method = of_method | {INPUT_MOMENT}
        if self.codec == "entropy" and not self.rotate:
            of_method = of_method | getattr(self.method, "entropy_statistics", frozenset())
        return self.allocator.statistics | of_posterior | of_method

    @property
    def in_step(self) -> bool:
        """Whether the full-precision network runs in step with the quantized prefix."""
        return self.inputs == "paired" or (self.inputs == "prefix" and self.correction != "none")

    @property
    def _only_targets(self) -> bool:
        """Whether a method whose posterior reads no inputs, such as diag, only rounds targets and preserves moments."""
        posterior = getattr(self.method, "whitenings", None)  # one that the allocator alone reads does not count
        return self.inputs == "paired" and posterior is not None and bool(self.method.statistics)

    @property
    def compares(self) -> frozenset[Statistic]:
        """The statistics of both networks in step, with which the method handles the two inputs itself."""
        return frozenset(one for one in self.method.statistics if one.source is Source.PAIRED_INPUTS)

    @property
    def behind_prefix(self) -> frozenset[Statistic]:
        """The statistics of inputs that are collected behind the quantized prefix."""
        if self.inputs == "full":
            return frozenset()
        return frozenset(one for one in self.method.statistics if one.source is Source.INPUTS)


@dataclass
class Quantized:
    """The result of a recipe.

    Attributes:
        tensors: by layer, in forward order.
        parameters: biases and norm parameters that correction and distillation changed, by state_dict name.
        problems: the layers, with notes and fallbacks.
        layer_seconds: wall time of each layer.
        seconds: wall time of the stages calibrate, posterior, quantize (with correction) and distill. Reused statistics
            and whitenings count with the time of their first computation.
        reused_s: time of the first computation of reused statistics and whitenings, less the time of reading them.
        distillation: numbers of the distillation under their result keys; empty without distillation.
        oom_retries: how often memory ran out and a stage was repeated with smaller batches.
        observer: called after each rounded layer and each evaluation of a distillation.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, LayerProblem] = field(default_factory=dict)
    layer_seconds: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calibrate", "posterior", "quantize", "distill"), 0.0)
    )
    reused_s: float = 0.0
    distillation: dict[str, float | bool] = field(default_factory=dict)
    oom_retries: int = 0
    observer: Observer = field(default_factory=Observer)

    def layers(self, subject: Subject) -> dict[str, QuantizedTensor]:
        """The tensors of layers, without those of embeddings."""
        return {name: tensor for name, tensor in self.tensors.items() if name in subject.layers}

    def add(self, problem: LayerProblem, tensor: QuantizedTensor, seconds: float) -> None:
        """Add one rounded layer."""
        self.problems[problem.name], self.tensors[problem.name] = problem, tensor
        self.layer_seconds[problem.name] = seconds
        problem.count("clamped_scales", clamped_scales(problem.weight, tensor))
        self.observer.layer_rounded(problem, tensor, seconds)

    def copy_of(self, module: nn.Module) -> nn.Module:
        """A copy of the network with the current tensors and parameters."""
        quantized = copy.deepcopy(module)
        fill(quantized, self.tensors, self.parameters)
        return quantized
