"""Encoded examples and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from bayesq.observer import Observer
from bayesq.tensor_file import digest

# Which sequences share a batch: any, with padding; sequences of equal length; none.
PADDED, EQUAL, ALONE = "padded", "equal", "alone"


@dataclass(frozen=True)
class Batch:
    """One batch: `module(**inputs)` returns outputs [b, ...], see `bayesq.likelihood`.

    `labels` [b] are on the device of the inputs. `index` [b] int64, on the CPU, is each example's position in the
    split: the order of batches may differ from that of the split.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def split(self, size: int) -> Iterator["Batch"]:
        """The same examples in batches of at most `size`."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch({name: x[part] for name, x in self.inputs.items()}, self.labels[part], self.index[part])


class EncodedExamples(Protocol):
    """Examples a model can read."""

    @property
    def labels(self) -> Tensor:
        """Labels [n], in the order of the split."""

    def __len__(self) -> int: ...

    def checksum(self) -> str:
        """sha256 hex of everything `batches` yields."""

    def batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """Every example once, in an order that depends only on the examples."""


@dataclass(frozen=True)
class Layout:
    """How sequences of different length form batches.

    Attributes:
        side: of the padding, "right" or "left".
        together: PADDED, EQUAL or ALONE; batches of the last two have no padding.
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
        lengths: [n] numbers of tokens for padded sequences [n, length], else None. Sequences are batched by decreasing
            length, and each batch is trimmed to its longest sequence. The first batch needs the most memory, so a batch
            size that is too large fails at once.
        layout: which sequences share a batch, and the side of the padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    lengths: Tensor | None = None
    layout: Layout = Layout()

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """sha256 hex over inputs and labels, and over `layout.together` unless it is PADDED."""
        tensors = {"labels": self.labels, **{f"inputs.{name}": value for name, value in self.inputs.items()}}
        together = self.layout.together
        return digest(tensors, {} if together == PADDED else {"together": together})

    def split(self, batch_size: int) -> list[Tensor]:
        """Positions [b] of the examples of each batch; EQUAL and ALONE give more batches than PADDED."""
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
        """Every example once, in batches of at most `batch_size` examples."""
        for index in self.split(batch_size):
            inputs = {name: value[index] for name, value in self.inputs.items()}
            if self.lengths is not None:
                longest = int(self.lengths[index].max())
                tokens = slice(longest) if self.layout.side == "right" else slice(-longest, None)
                inputs = {name: value[:, tokens] for name, value in inputs.items()}
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
    """Whether the network must not see padding; parts of a batch of `in_one_batch` then have to be trimmed."""
    return isinstance(examples, TensorExamples) and examples.layout.together != PADDED


def two_examples(examples: EncodedExamples, device: torch.device | str) -> Batch:
    """The first batch of two examples, or of one example if no two may share a batch."""
    batches = examples.batches(2, device)
    first = next(batches)
    return first if len(first.index) == 2 else next((batch for batch in batches if len(batch.index) == 2), first)


def in_one_batch(examples: EncodedExamples, count: int, device: torch.device | str) -> Batch:
    """The first `count` examples of `batches` as one batch, padded even if the network must not see padding."""
    if isinstance(examples, TensorExamples):
        examples = replace(examples, layout=replace(examples.layout, together=PADDED))
    return next(iter(examples.batches(count, device)))


@dataclass(frozen=True)
class EncodedBatches:
    """Encoded examples as `bayesq.calibration.passes.Batches`, with a progress bar; `observer` is told of each one."""

    encoded: EncodedExamples
    batch_size: int
    device: torch.device
    title: str
    observer: Observer = field(default_factory=Observer)

    @property
    def examples(self) -> int:
        """Number of examples in all batches."""
        return len(self.encoded)

    def __len__(self) -> int:
        return count_batches(self.encoded, self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.encoded.batches(self.batch_size, self.device)
        total = len(self)
        for number, batch in enumerate(tqdm(batches, total=total, desc=self.title, disable=None, leave=False), 1):
            yield batch
            self.observer.batch_seen(number, total, len(batch.index))
