"""What every data set gives: raw examples in three disjoint splits, one of them for calibration draws."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.metrics import ACCURACY, Metric
from bayesq.suite.errors import UserError
from bayesq.suite.tasks import IMAGE_CLASSIFICATION, Task
from bayesq.tensor_file import digest


@runtime_checkable
class StoredPhoto(Protocol):
    """A photo kept inside a larger file, in the encoding it was stored with; `str` says where it is."""

    def read(self) -> bytes:
        """The encoded photo.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        ...

    def __lt__(self, other: Any, /) -> bool:
        """Whether it is stored before `other`."""
        ...


# Raw inputs, before any model-specific encoding: sentences, sentence pairs, photos of any size (files of their own or
# inside larger ones), or images [n, channels, height, width] as floats in [0, 1]. Only `select`, `checksum` and the
# model's `encode` look inside, so a new kind of input changes only these three.
Inputs = Sequence[str] | Sequence[tuple[str, str]] | Sequence[Path] | Sequence[StoredPhoto] | Tensor


@dataclass(frozen=True)
class Examples:
    """Raw examples of one split: n `inputs`, `labels` [n] and `ids`, a stable name per example.

    Labels are classes (int64), or the numbers of a regression (floats).
    """

    inputs: Inputs
    labels: Tensor
    ids: list[str]

    def __post_init__(self) -> None:
        """Reject parts of different length, which would pair inputs with foreign labels."""
        if not len(self.inputs) == len(self.labels) == len(self.ids):
            raise ValueError(
                f"{len(self.inputs)} inputs, {len(self.labels)} labels and {len(self.ids)} ids do not match"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Tensor) -> "Examples":
        """The examples at `indices` [k] int64, in that order."""
        positions = indices.tolist()
        if isinstance(self.inputs, Tensor):
            inputs: Inputs = self.inputs[indices]
        else:
            inputs = cast(Inputs, [self.inputs[i] for i in positions])
        return Examples(inputs, self.labels[indices], [self.ids[i] for i in positions])

    def checksum(self) -> str:
        """sha256 hex over inputs (of photos their files' content), labels and ids, order included."""
        ids = json.dumps(self.ids)
        if isinstance(self.inputs, Tensor):
            return digest({"inputs": self.inputs, "labels": self.labels}, {"ids": ids})
        inputs = [photo_sha256(item) if isinstance(item, Path | StoredPhoto) else item for item in self.inputs]
        return digest({"labels": self.labels}, {"ids": ids, "inputs": json.dumps(inputs)})


def photo_sha256(photo: Path | StoredPhoto) -> str:
    """sha256 hex of a photo's encoded bytes."""
    return hashlib.sha256(photo.read_bytes() if isinstance(photo, Path) else photo.read()).hexdigest()


@dataclass(frozen=True)
class DataSplits:
    """A loaded data set.

    Attributes:
        train: what FP heads and small networks are fitted on.
        calibration_pool: what calibration sets are drawn from; never trained or evaluated on.
        evaluation: what every reported metric is measured on.
        num_classes: width of the logits; 1 for regression.
        primary_metric: result key of the metric the tables show, e.g. "accuracy".
        source: provenance (origin, versions, checksums) for the result file.
        metrics: what is measured; the primary metric is one of them.
        task: what a model has to do with the inputs.
        classes: names of the classes in the order of their labels, where they have any.
        subset: which of the data set's parts it is, for models with a checkpoint for each; "" where there is one only.
    """

    train: Examples
    calibration_pool: Examples
    evaluation: Examples
    num_classes: int
    primary_metric: str
    source: dict[str, str]
    metrics: tuple[Metric, ...] = (ACCURACY,)
    task: Task = IMAGE_CLASSIFICATION
    classes: tuple[str, ...] = ()
    subset: str = ""

    @property
    def likelihood(self) -> Likelihood:
        """Likelihood of the network's outputs for this task."""
        return self.task.likelihood

    def calibration(self, examples: int, seed: int) -> Examples:
        """Draw a calibration set from the pool, without replacement.

        For one seed a smaller draw is the beginning of a larger one: sweeps over the size are nested.

        Raises:
            ValueError: `examples` is below 1 or exceeds the pool.
        """
        pool = len(self.calibration_pool)
        if not 1 <= examples <= pool:
            raise Refused(
                f"calibration.examples={examples} is not possible: choose 1 to {pool}, "
                "the size of the data set's calibration pool"
            )
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))
        return self.calibration_pool.select(order[:examples])


class Dataset(Protocol):
    """What a `conf/dataset/*.yaml` instantiates."""

    def load(self, cache_dir: Path) -> DataSplits:
        """Load the splits, fetching or caching files under `cache_dir` where needed.

        Membership depends on the data set's own `split_seed` only, never on the run's `seed`; a data set whose YAML
        passes the seed on (imagenet) is the exception and says what it does with it.
        """
        ...


def limited(available: int, limit: int | None) -> int:
    """Number of evaluation examples that `dataset.limit` leaves of those available; None leaves all.

    Raises:
        UserError: `limit` is below 1 or exceeds `available`.
    """
    if limit is None:
        return available
    if not 1 <= limit <= available:
        raise UserError(f"dataset.limit={limit} is not possible: choose 1 to {available}, or null for all")
    return limit


def stratified(labels: Tensor, size: int, seed: int) -> Tensor:
    """Positions [size] int64, in increasing order, of a seeded subset in which every class keeps its share.

    A class of n_c among n examples gets floor(size n_c / n) places; those left over go to the largest remainders, equal
    ones in an order that the seed draws: otherwise a subset smaller than the number of classes would hold the first
    classes only. Labels that are no integers (regression) have no classes: then it is a plain draw.

    Args:
        labels: [n].
        size: from 1 to n (see `limited`).
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if labels.is_floating_point():
        return order[:size].sort().values
    classes, number, counts = labels.unique(return_inverse=True, return_counts=True)
    places, remainder = size * counts // len(labels), size * counts % len(labels)
    tie = torch.randperm(len(classes), generator=generator)
    first = tie[remainder[tie].argsort(descending=True, stable=True)]
    places[first[: size - int(places.sum())]] += 1
    # the rank of each drawn example within its class, in the drawn order
    drawn = number[order]
    by_class = drawn.argsort(stable=True)
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(labels)) - start[drawn[by_class]]
    return order[rank < places[drawn]].sort().values


@dataclass(frozen=True)
class SeededSplits:
    """A data set without splits of its own, cut by a seed.

    Attributes:
        split_seed: seed of the shuffle that assigns examples to splits.
        calibration_pool: number of examples calibration sets are drawn from.
        evaluation: number of evaluation examples; what remains is the train split.
        limit: keep only the first `limit` evaluation examples; this moves no example to another split.
    """

    split_seed: int
    calibration_pool: int
    evaluation: int
    limit: int | None = None
    task: ClassVar[Task] = IMAGE_CLASSIFICATION

    def cut(self, examples: Examples, num_classes: int, source: Mapping[str, str]) -> DataSplits:
        """Disjoint splits of `examples`.

        The evaluation set comes first in the shuffled order: it stays the same whatever the size of the pool.

        Raises:
            UserError: a size is not positive, or nothing would be left to train on.
        """
        for key in ("evaluation", "calibration_pool", "limit"):
            if (size := getattr(self, key)) is not None and size < 1:
                raise UserError(f"dataset.{key}={size} must be at least 1")
        if self.evaluation + self.calibration_pool >= len(examples):
            raise UserError(
                f"dataset.evaluation={self.evaluation} and dataset.calibration_pool={self.calibration_pool} leave "
                f"nothing to train on: their sum must stay below {len(examples)}, the size of the data set"
            )
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.split_seed))
        evaluated, pool, train = order.tensor_split([self.evaluation, self.evaluation + self.calibration_pool])
        return DataSplits(
            train=examples.select(train),
            calibration_pool=examples.select(pool),
            evaluation=examples.select(evaluated[: self.limit]),
            num_classes=num_classes,
            primary_metric="accuracy",
            source={**source, "split_seed": str(self.split_seed)},
            task=self.task,
        )
