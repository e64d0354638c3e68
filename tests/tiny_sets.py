"""Small examples and networks of known statistics, and how tests collect these."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from naive_fisher import Dense, TinyConvNet
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_BASIS, INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.memory import InMemoryStatistics
from bayesq.calibration.passes import CalibrationSettings
from bayesq.fisher import FISHER_DIAGONAL, FISHER_EIGENVALUES, GRADIENT_BASIS, GRADIENT_MOMENT, GradientDirections
from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.suite.calibration import Calibration
from bayesq.suite.models.base import state_checksum

CPU = torch.device("cpu")
# Those that one pass collects without the results of another.
COLLECTED = (INPUT_MOMENT, INPUT_MAGNITUDE, GRADIENT_MOMENT, FISHER_DIAGONAL)
# All of them, by name.
STATISTICS = {
    statistic.name: statistic
    for statistic in (*COLLECTED, GradientDirections(16), INPUT_BASIS, GRADIENT_BASIS, FISHER_EIGENVALUES)
}
LENGTHS = torch.tensor([3, 5, 1, 4, 2, 5])


def images(count: int = 5) -> TensorExamples:
    generator = torch.Generator().manual_seed(1)
    return TensorExamples({"image": torch.randn(count, 2, 6, 6, generator=generator)}, torch.zeros(count).long())


def sentences(padded: int = 5, trimmed: bool = True) -> TensorExamples:
    """Token ids with other ids, not zeros, beyond each sentence's end."""
    ids = torch.randint(11, (6, 20), generator=torch.Generator().manual_seed(2))[:, :padded]
    mask = (torch.arange(padded) < LENGTHS[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    return TensorExamples(inputs, torch.zeros(6).long(), LENGTHS if trimmed else None)


def one_by_one(examples: TensorExamples) -> list[dict[str, Tensor]]:
    """Each example alone, without any padding."""
    found = []
    for i in range(len(examples)):
        inputs = {name: value[i : i + 1] for name, value in examples.inputs.items()}
        if "attention_mask" in inputs:
            inputs = {name: value[:, : int(LENGTHS[i])] for name, value in inputs.items()}
        found.append(inputs)
    return found


def collect(
    module: nn.Module,
    examples: TensorExamples,
    batch_size: int = 2,
    samples: int | None = None,
    statistics=COLLECTED,
    seed: int = 0,
    **more,
) -> dict[str, dict[str, Tensor]]:
    """Statistic's name -> layer -> tensor."""
    layers = quantizable_layers(module)
    collector = Collector(module, layers, statistics, samples, torch.Generator().manual_seed(seed), **more)
    for batch in examples.batches(batch_size, CPU):
        collector.add(batch)
    return {statistic.name: dict(collector.finish(statistic)) for statistic in statistics}


def assert_equal(found: dict[str, dict[str, Tensor]], name: str, dense: Dense, layer: nn.Module) -> None:
    expected = {
        "input_moment": dense.input_moment,
        "input_magnitude": dense.input_magnitude,
        "gradient_moment": dense.gradient_moment,
        "fisher_diagonal": np.diag(dense.fisher).reshape(weight_to_matrix(layer).shape),
    }
    for kind, value in expected.items():
        assert found[kind][name].dtype == torch.float32
        np.testing.assert_allclose(found[kind][name], value, rtol=2e-4, atol=2e-5 * np.abs(value).max(), err_msg=kind)
        assert np.abs(value).max() > 1e-4


class Counting(TinyConvNet):
    """Counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(image)


SETTINGS = CalibrationSettings(batch_size=2, samples=None, seed=0)


def open_calibration(module: nn.Module, folder: Path, examples=None, room: int = 2**29, **changes) -> Calibration:
    return Calibration(
        module,
        quantizable_layers(module),
        examples or images(),
        dataclasses.replace(SETTINGS, **changes),
        CPU,
        room,
        identity=state_checksum(module),
        cache_dir=folder,
    )


def in_memory(module: nn.Module, statistics, examples=None, room: int = 2**29, **changes) -> InMemoryStatistics:
    """Prepared statistics of the module's layers."""
    settings = dataclasses.replace(SETTINGS, **changes)
    opened = InMemoryStatistics(module, quantizable_layers(module), examples or images(), settings, CPU, room)
    opened.prepare(statistics)
    return opened


class WithIdleLayers(TinyConvNet):
    """A layer that never runs, and one whose output the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.beside = nn.Conv2d(2, 4, 3, groups=2), nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        self.beside(image.flatten(1)[:, :6])
        return super().forward(image)
