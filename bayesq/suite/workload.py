"""Network and data of a run: loaded, encoded, checked, before any long work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples, two_examples
from bayesq.errors import Refused
from bayesq.quant.layers import embedding_tables, quantizable_layers
from bayesq.quant.usage import OtherUseError, usage_of
from bayesq.recipe import Subject
from bayesq.suite.coverage import Coverage, coverage, report
from bayesq.suite.datasets.base import Dataset, DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.forward import naming_model
from bayesq.suite.models.base import ModelSource, Network


@dataclass(frozen=True)
class Workload:
    """Network and data of a run.

    Attributes:
        network: as its source built it; `subject.module` is its module.
        data: all parts of the data set.
        subject: what is quantized, with the calibration examples.
        evaluation: encoded evaluation examples.
        coverage: what share of the network is quantized.
    """

    network: Network
    data: DataSplits
    subject: Subject
    evaluation: EncodedExamples
    coverage: Coverage


@dataclass(frozen=True)
class Selection:
    """Which layers and which calibration examples a run takes.

    Attributes:
        exclude: patterns (fnmatch) of module names that stay in full precision.
        include_embeddings: round embeddings to nearest as well.
        examples: number of calibration examples.
        batch_size: calibration examples per forward pass.
        seed: draws the calibration examples.
    """

    exclude: Sequence[str]
    include_embeddings: bool
    examples: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Names:
    """What messages call a run's parts.

    Attributes:
        dataset, model: their names.
        tasks: names of the tasks that the model can do.
    """

    dataset: str
    model: str
    tasks: Sequence[str]


def load(
    dataset: Dataset,
    model: ModelSource,
    named: Names,
    selection: Selection,
    device: torch.device,
    cache_dir: Path,
) -> Workload:
    """Load data and network, encode the examples, and look at how the network uses its layers.

    Args:
        dataset: of the key dataset.
        model: of the key model.
        named: what messages call them.
        selection: see `Selection`.
        device: where the network goes.
        cache_dir: root of the caches.

    Raises:
        UserError: the calibration set cannot be drawn, no layer is left to quantize, there are no embeddings to
            include, the model is not for the data set's task, or the network has weights that are no numbers.
    """
    data, name = dataset.load(cache_dir), named.model
    if data.task.name not in named.tasks:
        raise UserError(
            f"dataset={named.dataset} is for {data.task.name}, but model={name} is for {' or '.join(named.tasks)}: "
            "choose a dataset and a model of one task"
        )
    with naming_model(name, "building it"):
        network = model.build(data, cache_dir)
    module = network.module
    check_network(module, name)
    module.to(device)
    try:
        examples = data.calibration(selection.examples, selection.seed)
        layers = quantizable_layers(module, list(selection.exclude))
    except Refused as error:
        raise UserError(str(error)) from error
    embeddings = embedding_tables(module, list(selection.exclude)) if selection.include_embeddings else {}
    if selection.include_embeddings and not embeddings:
        raise UserError(f"layers.include_embeddings=true: model={name} has no embedding left to quantize")
    with naming_model(name, "encoding its inputs"):
        calibration, evaluation = network.encode(examples), network.encode(data.evaluation)
    with naming_model(name, "its forward pass"):
        try:
            more = (batch.inputs for batch in calibration.batches(selection.batch_size, device))
            usage = usage_of(module, layers, two_examples(calibration, device).inputs, more)
        except OtherUseError as error:
            raise UserError(f"model={name}: {error}") from error
    if not usage.layers:
        raise UserError(f"model={name}: no layer takes part in the forward pass: choose another model")
    covered = coverage(module, {**usage.layers, **embeddings})
    report(covered, module, usage.unreached)
    subject = Subject(module, usage, calibration, data.likelihood, device, embeddings, network.blocks)
    return Workload(network, data, subject, evaluation, covered)


def check_network(module: nn.Module, name: str) -> None:
    """Refuse parameters and statistics of norms that are no numbers: whatever is measured with them would be none.

    Args:
        module: the network.
        name: of the model, for the message.

    Raises:
        UserError: NaN or infinite entries, or a variance below zero; the message names the first.
    """
    running = ("running_mean", "running_var")
    buffers = ((key, buffer) for key, buffer in module.named_buffers() if key.rpartition(".")[2] in running)
    for key, tensor in (*module.named_parameters(), *buffers):
        if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor.detach())):
            raise UserError(f"model={name}: {key} has NaN or infinite entries: choose other weights")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise UserError(f"model={name}: {key} has variances below zero: choose other weights")


def check_finite(outputs: Tensor, remedy: str) -> None:
    """Refuse predictions that are no numbers, before metrics of them pass for results.

    Args:
        outputs: [n, ...].
        remedy: what the message ends with.

    Raises:
        UserError: some are NaN or infinite.
    """
    wrong = int((~torch.isfinite(outputs)).reshape(len(outputs), -1).any(1).sum())
    if wrong:
        raise UserError(f"logits are NaN or infinite for {wrong} of {len(outputs)} evaluation examples: {remedy}")


def select_device(name: str) -> torch.device:
    """The torch device of the key `device`; auto prefers cuda, then mps."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
