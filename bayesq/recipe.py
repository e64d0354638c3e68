"""What is quantized, what is done to it, and what comes out: the values that the pipeline's stages pass on."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from bayesq.allocation import Allocator, Budget
from bayesq.batches import EncodedExamples, needs_no_padding
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT
from bayesq.calibration.statistic import Source, Statistic
from bayesq.contract import LayerProblem, Method
from bayesq.distillation import DistillationSettings
from bayesq.in_step import Keep
from bayesq.likelihood import Likelihood
from bayesq.nearest import clamped_scales
from bayesq.posterior import WhiteningStore
from bayesq.quant.layers import Layer
from bayesq.quant.network import fill
from bayesq.quant.tensor import QuantizedTensor
from bayesq.quant.usage import Usage


class Statistics(Protocol):
    """Where the calibration statistics of a network come from: computed in memory, or read from a cache.

    Attributes:
        total_s: seconds that the prepared statistics take where none of them is cached.
        batch_size: examples per forward pass.
        unseen: layers that no calibration example reached.
    """

    unseen: set[str]

    @property
    def total_s(self) -> float: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def prepare(self, statistics: Iterable[Statistic]) -> None:
        """Compute what is not there yet."""
        ...

    def statistic(self, layer: str, name: str) -> Tensor:
        """One layer's statistic by its name."""
        ...

    def out_of_memory(self) -> int:
        """How often a pass began again with smaller batches because memory ran out."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is quantized, and the examples that tell how.

    Attributes:
        module: full-precision network in evaluation mode, on `device`; it is not changed.
        usage: how it uses its layers; only those that take part in its forward pass are quantized.
        examples: encoded calibration examples.
        likelihood: of the outputs.
        device: where the network is.
        embeddings: tables to round as well, by name.
        blocks: names of parts that the network runs one after the other, see `bayesq.walker`.
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
        """Whether a padded batch has to be taken apart into its examples before the network sees it."""
        return bool(self.usage.alone) or needs_no_padding(self.examples)

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(layer.weight.numel() for layer in (*self.layers.values(), *self.embeddings.values()))


@dataclass(frozen=True)
class Proxy:
    """Settings of the task-aware proxy (SPEC section 5).

    Attributes:
        samples: posterior draws, the same for all layers; 0: the posterior mean.
        examples: calibration examples it is measured on.
    """

    samples: int
    examples: int


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation.

    Attributes:
        settings: the optimizer's budget.
        samples: posterior draws the teacher averages; 0: the full-precision network itself.
        moments: start from matched activation moments where the held-out part agrees.
        batch_size: examples per forward pass.
    """

    settings: DistillationSettings
    samples: int
    moments: bool
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """What is done to a network.

    Attributes:
        method: rounds the layers.
        allocator: chooses row widths.
        budget: average bits per weight.
        whitenings: the posterior and what has been computed of it; None where neither method nor allocator reads it.
        proxy: weighs predicted risks by a measured divergence; None = not.
        correction: match activation moments to the full-precision network's after rounding.
        distillation: train what is stored in full precision after rounding; None = not.
        seed: of everything random.
    """

    method: Method
    allocator: Allocator
    budget: Budget
    whitenings: WhiteningStore | None = None
    proxy: Proxy | None = None
    correction: bool = False
    distillation: Distillation | None = None
    seed: int = 0
    inputs: str = "full"
    keep: Keep = field(default_factory=Keep)

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics of full-precision inputs and gradients that it reads."""
        of_posterior = self.whitenings.statistics if self.whitenings else frozenset[Statistic]()
        of_method = self.method.statistics
        if self.inputs != "full":
            of_method = of_method - self.behind_prefix - {CROSS_MOMENT}
        if self.keep.variance:
            of_method = of_method | {INPUT_MOMENT}
        return self.allocator.statistics | of_posterior | of_method

    @property
    def behind_prefix(self) -> frozenset[Statistic]:
        """The statistics of inputs that are collected behind the quantized prefix."""
        if self.inputs == "full":
            return frozenset()
        return frozenset(one for one in self.method.statistics if one.source is Source.INPUTS)


@dataclass
class Quantized:
    """What a recipe made of a network.

    Attributes:
        tensors: by layer, in forward order.
        parameters: biases and norm parameters that correction and distillation changed, by state_dict name.
        problems: the layers as the method saw them, with its notes and fallbacks.
        layer_seconds: wall time of each layer.
        seconds: wall time of the stages calibrate, posterior, quantize (with correction) and distill; reused statistics
            and whitenings count what they once took.
        reused_s: what reused statistics and whitenings once took, less what reading them took.
        distillation: numbers of the distillation under their result keys; empty without one.
        oom_retries: how often a stage began again with smaller batches because memory ran out.
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

    def layers(self, subject: Subject) -> dict[str, QuantizedTensor]:
        """The tensors of layers; embeddings are rounded once and stay."""
        return {name: tensor for name, tensor in self.tensors.items() if name in subject.layers}

    def add(self, problem: LayerProblem, tensor: QuantizedTensor, seconds: float) -> None:
        """Keep one rounded layer."""
        self.problems[problem.name], self.tensors[problem.name] = problem, tensor
        self.layer_seconds[problem.name] = seconds
        problem.count("clamped_scales", clamped_scales(problem.weight, tensor))

    def copy_of(self, module: nn.Module) -> nn.Module:
        """A copy of the network with what has been quantized, corrected and distilled so far."""
        quantized = copy.deepcopy(module)
        fill(quantized, self.tensors, self.parameters)
        return quantized
