"""What every model gives: a network in evaluation mode, and the encoding of raw examples into its batches."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bayesq.suite.cache import CorruptCache, digest, read_tensors, write_tensors
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.files import lock
from bayesq.suite.fingerprint import fingerprint

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

# Which sequences share a batch: any, filled up with padding; those of one length; none.
PADDED, EQUAL, ALONE = "padded", "equal", "alone"


@dataclass(frozen=True)
class Batch:
    """One batch: `module(**inputs)` gives logits [b, classes].

    `labels` [b] lie on the device of the inputs. `index` [b] int64, on the CPU, holds each example's position
    in the split, because batches need not come in the split's order.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor


class EncodedExamples(Protocol):
    """Examples a model can read."""

    @property
    def labels(self) -> Tensor:
        """Labels [n], in the order of the split."""
        ...

    def __len__(self) -> int: ...

    def checksum(self) -> str:
        """sha256 hex of everything `batches` yields."""
        ...

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every example once, in an order that depends on nothing but the examples."""
        ...


@dataclass(frozen=True)
class Layout:
    """How sequences of different length are put into batches.

    Attributes:
        side: "right" or "left", where padding lies.
        together: PADDED, EQUAL or ALONE; the last two show a network no padding.
    """

    side: str = "right"
    together: str = PADDED

    def __str__(self) -> str:
        kinds = {PADDED: f"padded on the {self.side}", EQUAL: "of equal length", ALONE: "of one example"}
        return kinds[self.together]


@dataclass(frozen=True)
class TensorExamples:
    """Encoded examples that fit in memory.

    Attributes:
        inputs: name of the module's argument -> tensor [n, ...].
        labels: [n].
        lengths: [n] numbers of tokens for padded sequences [n, length], else None. Sequences are batched by
            falling length, each batch trimmed to its longest: the first batch needs the most memory, so
            one that does not fit fails at once.
        layout: which sequences share a batch, and on which side of `inputs` their padding lies.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    lengths: Tensor | None = None
    layout: Layout = Layout()

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """sha256 hex over inputs and labels, and over what shares a batch where that is not any."""
        tensors = {"labels": self.labels, **{f"inputs.{name}": value for name, value in self.inputs.items()}}
        together = self.layout.together
        return digest(tensors, {} if together == PADDED else {"together": together})

    def split(self, batch_size: int) -> list[Tensor]:
        """Positions [b] of the examples of each batch; there are more batches than examples / `batch_size` where
        sequences of other length are kept apart.
        """
        if self.lengths is None:
            return list(torch.arange(len(self)).split(batch_size))
        order = torch.argsort(self.lengths, descending=True, stable=True)
        if self.layout.together == PADDED:
            return list(order.split(batch_size))
        if self.layout.together == ALONE:
            return list(order.split(1))
        sizes = self.lengths[order].unique_consecutive(return_counts=True)[1]
        return [batch for group in order.split(sizes.tolist()) for batch in group.split(batch_size)]

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every example once; no batch has more than `batch_size` examples, some may have fewer."""
        for index in self.split(batch_size):
            inputs = {name: value[index] for name, value in self.inputs.items()}
            if self.lengths is not None:
                longest = int(self.lengths[index].max())
                part = slice(longest) if self.layout.side == "right" else slice(-longest, None)
                inputs = {name: value[:, part] for name, value in inputs.items()}
            yield Batch(
                {name: value.to(device) for name, value in inputs.items()},
                self.labels[index].to(device),
                index,
            )


def count_batches(examples: EncodedExamples, batch_size: int) -> int:
    """Number of batches that `examples.batches` yields."""
    if isinstance(examples, TensorExamples):
        return len(examples.split(batch_size))
    return -(-len(examples) // batch_size)


def needs_no_padding(examples: EncodedExamples) -> bool:
    """Whether the network may see no padding: who takes a batch of `in_one_batch` apart has to remove it."""
    return isinstance(examples, TensorExamples) and examples.layout.together != PADDED


def two_examples(examples: EncodedExamples, device: torch.device | str) -> Batch:
    """The first batch of two examples; of one where no two may share a batch."""
    batches = examples.batches(2, device)
    first = next(batches)
    return first if len(first.index) == 2 else next((batch for batch in batches if len(batch.index) == 2), first)


def in_one_batch(examples: EncodedExamples, count: int, device: torch.device | str) -> Batch:
    """The first `count` examples of `batches` as one batch, with padding whether the network may see it or not."""
    if isinstance(examples, TensorExamples):
        examples = replace(examples, layout=replace(examples.layout, together=PADDED))
    return next(iter(examples.batches(count, device)))


@dataclass
class Network:
    """A full-precision network, ready to be calibrated, quantized and evaluated.

    Attributes:
        module: float32, evaluation mode, on the CPU; `module(**batch.inputs)` gives logits [b, classes].
        encode: preprocessing from raw examples to batches.
        description: preprocessing and origin for the result file, to which the size is added; JSON values only.
        blueprint: what `ModelSource.bare` needs beside the settings; JSON values only.
        checksum: sha256 hex over the module's state (see `state_checksum`).
        identity: checksum of all that decides the network's outputs: weights, configuration, code. What is cached for
            a network is kept under it.
    """

    module: nn.Module
    encode: Callable[[Examples], EncodedExamples]
    description: dict[str, object]
    blueprint: dict[str, Any] = field(default_factory=dict)
    checksum: str = field(init=False)
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        self.checksum = state_checksum(self.module)
        self.description = {**self.description, "parameters": parameter_count(self.module)}
        # now, because some networks keep masks or tables of a forward pass as attributes
        parts = (self.checksum, fingerprint(self.module), json.dumps(self.blueprint, sort_keys=True))
        self.identity = hashlib.sha256("|".join(parts).encode()).hexdigest()


class ModelSource(Protocol):
    """What a `conf/model/*.yaml` instantiates."""

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network for `data`; whatever has to be fitted is fitted on `data.train` once and cached."""
        ...

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The architecture of a network that `build` made, in evaluation mode, with weights that mean nothing.

        Reads neither data nor checkpoints. A source without it can be run, but not exported as a self-contained file.

        Args:
            blueprint: that network's.
        """
        ...


def state_checksum(module: nn.Module) -> str:
    """sha256 hex over names, dtypes, shapes and bytes of the module's parameters and persistent buffers."""
    return digest(module.state_dict())


def parameter_count(module: nn.Module) -> int:
    """Number of trainable and frozen parameters, each shared tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def initialised(make: Callable[[], Module]) -> Module:
    """What `make` builds, in evaluation mode, without a draw from the caller's generator.

    The random initialisation is overwritten by weights.
    """
    with torch.random.fork_rng(devices=[]):
        return make().eval()


def fit_once(
    cache_dir: Path, name: str, recipe: Mapping[str, object], fit: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Fitted tensors from the cache, or from `fit` on first use.

    `recipe` (JSON values) holds all that determines the outcome. Its hash is part of the file name: a changed
    recipe never meets old weights. A damaged file, or one of another recipe under this name, costs a warning and
    another fit. Processes that want the same entry wait for the first one.
    """
    text = json.dumps(recipe, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    path = cache_dir / "models" / f"{name}-{key[:16]}.safetensors"
    with lock(path):
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("recipe") == text:
                return tensors
            logger.warning("%s is of another recipe; fitting again", path)
        except FileNotFoundError:
            pass
        except CorruptCache as error:
            logger.warning("%s; fitting again", error)
        tensors = fit()
        write_tensors(path, tensors, {"recipe": text})
        return tensors
