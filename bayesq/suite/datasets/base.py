"""The common form of the data sets: raw examples in three disjoint splits, one of them for calibration draws."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
class Photo(Protocol):
    """An encoded photo: a file, or a part of a larger file; `str` says where it is."""

    def read_bytes(self) -> bytes:
        """The encoded photo; OSError or ValueError if it cannot be read."""
        ...

    def __lt__(self, other: Any, /) -> bool:
        """Whether it is stored before `other`."""
        ...


@dataclass(frozen=True)
class Excerpt:
    """Windows of a text, which do not overlap: the raw input of language models.

    A model's tokenizer cuts the text. The last tokens that fill no window are left out.

    Attributes:
        text: as it is in the file.
        key: the setting that names the text, for messages.
        window: tokens of a window, with the bos token if there is one.
        bos: whether every window begins with the tokenizer's bos token.
        count: number of windows; None: all.
        count_key: the setting of `count`, for messages.
        seed: draws the windows, without replacement; None: the first ones. For one seed, a smaller draw is the
            beginning of a larger one.
    """

    text: str
    key: str
    window: int
    bos: bool = False
    count: int | None = None
    count_key: str = "dataset.limit"
    seed: int | None = None


# Raw inputs, before any model-specific encoding: sentences, sentence pairs, photos of any size, images
# [n, channels, height, width] as floats in [0, 1], or a text that is cut into windows. A new kind of input changes
# `select`, `checksum` and the model's `encode` only.
Inputs = Sequence[str] | Sequence[tuple[str, str]] | Sequence[Photo] | Sequence[Excerpt] | Tensor


@dataclass(frozen=True)
class Examples:
    """Raw examples of one split: n `inputs`, `labels` [n] and `ids`, a stable name per example.

    Labels are classes (int64), or the numbers of a regression (floats).
    """

    inputs: Inputs
    labels: Tensor
    ids: list[str]

    def __post_init__(self) -> None:
        """Reject parts of different lengths: they would give inputs the labels of other examples."""
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
        """sha256 hex of inputs (of photos: the encoded bytes), labels and ids in their order."""
        ids = json.dumps(self.ids)
        if isinstance(self.inputs, Tensor):
            return digest({"inputs": self.inputs, "labels": self.labels}, {"ids": ids})
        inputs = [photo_sha256(item) if isinstance(item, Photo) else item for item in self.inputs]
        return digest({"labels": self.labels}, {"ids": ids, "inputs": json.dumps(inputs, default=vars)})


def photo_sha256(photo: Photo) -> str:
    """sha256 hex of a photo's encoded bytes."""
    return hashlib.sha256(photo.read_bytes()).hexdigest()


@dataclass(frozen=True)
class DataSplits:
    """A loaded data set: what `load(cache_dir)` returns, the method of the classes that conf/dataset/*.yaml name.

    The splits depend on `split_seed` only, not on the run's `seed`. The exception is a data set whose YAML passes the
    seed on (imagenet); its docstring says how the seed is used.

    Attributes:
        train: what FP heads and small networks are fitted on.
        calibration_pool: what calibration sets are drawn from; never trained or evaluated on.
        evaluation: what every reported metric is measured on.
        num_classes: width of the logits; 1 for regression.
        primary_metric: result key of the metric the tables show, e.g. "accuracy".
        source: provenance (origin, versions, checksums) for the result file.
        metrics: what is measured; the primary metric is one of them.
        task: what a model has to do with the inputs.
        classes: names of the classes in the order of their labels; () if they have none.
        subset: name of the part of the data set, for models with a checkpoint for each part; "" without parts.
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
        return self.calibration_pool.select(shuffled(pool, seed)[:examples])


def shuffled(count: int, seed: int) -> Tensor:
    """The positions [count] int64 in an order drawn by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def limited(available: int, limit: int | None) -> int:
    """Number of evaluation examples that `dataset.limit` leaves; None: all. UserError if there are fewer."""
    if limit is None:
        return available
    if not 1 <= limit <= available:
        raise UserError(f"dataset.limit={limit} is not possible: choose 1 to {available}, or null for all")
    return limit


def stratified(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Positions [limit] int64, in increasing order, of a seeded subset of `labels` [n], or all n without a limit.

    Every class keeps its share: one with n_c of the n examples gets floor(limit n_c / n) places. The remaining places
    go to the largest remainders. The seed orders equal remainders: otherwise a subset smaller than the number of
    classes would hold the first classes only. Labels that are not integers (regression) have no classes: the draw is a
    plain one. UserError if the limit is not from 1 to n.
    """
    if limit is None:
        return torch.arange(len(labels))
    size = limited(len(labels), limit)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if labels.is_floating_point():
        return order[:size].sort().values
    classes, number, counts = labels.unique(return_inverse=True, return_counts=True)
    places, remainder = size * counts // len(labels), size * counts % len(labels)
    tie = torch.randperm(len(classes), generator=generator)
    first = tie[remainder[tie].argsort(descending=True, stable=True)]
    places[first[: size - int(places.sum())]] += 1
    drawn = number[order]
    chosen = [order[drawn == index][:count] for index, count in enumerate(places.tolist())]
    return torch.cat(chosen).sort().values


class Rows(Protocol):
    """Examples that may not be opened yet: Examples, PhotoTree, ParquetPhotos."""

    @property
    def labels(self) -> Tensor: ...  # noqa: D102

    def __len__(self) -> int: ...

    def select(self, indices: Tensor) -> Examples:
        """The examples at `indices` [k] int64, in that order."""
        ...


@dataclass(frozen=True, kw_only=True)
class UserSplits:
    """Splits of a user's own data: those of the files, or a share that a seed holds out.

    Attributes: the keys of conf/dataset/csv.yaml, which explains them.
    """

    split_seed: int = 0
    calibration_pool: int = 1024
    held_out: float = 0.2
    limit: int | None = None

    def parts(self, rows: Rows, evaluated: Rows | None = None, *, fitted: bool) -> tuple[Examples, Examples, Examples]:
        """The train split, the calibration pool and the evaluation set; each class has the same share in all of them.

        Args:
            rows: examples to calibrate on.
            evaluated: examples to evaluate; None = the share `held_out` of `rows`.
            fitted: a model may be fitted on the train split; the pool then has at most half of the examples.

        Raises:
            UserError: a part would be empty, or there are fewer examples than `limit`.
        """
        rest = torch.arange(len(rows))
        if evaluated is None:
            count = round(self.held_out * len(rows)) if math.isfinite(self.held_out) else 0
            if not 1 <= count < len(rows):
                raise UserError(
                    f"dataset.held_out={self.held_out}: evaluates {count} of {len(rows)} examples: choose another"
                )
            evaluated, chosen = rows, stratified(rows.labels, count, self.split_seed)
            rest = rest[~torch.isin(rest, chosen)]
        else:
            chosen = torch.arange(len(evaluated))
        chosen = chosen[stratified(evaluated.labels[chosen], self.limit, self.split_seed)]
        size = min(self.calibration_pool, len(rest) // 2 if fitted else len(rest))
        if size < 1:
            raise UserError(f"dataset.calibration_pool={self.calibration_pool}: {len(rest)} examples are left for it")
        pool = rest[stratified(rows.labels[rest], size, self.split_seed)]
        train = rest[~torch.isin(rest, pool)] if fitted else rest[:0]
        return rows.select(train), rows.select(pool), evaluated.select(chosen)


@dataclass(frozen=True)
class SeededSplits:
    """A data set that comes without splits; a seed draws them.

    Attributes: the keys of conf/dataset/digits.yaml, which explains them. `limit` moves no example to another split.
    """

    split_seed: int
    calibration_pool: int
    evaluation: int
    limit: int | None = None
    task: ClassVar[Task] = IMAGE_CLASSIFICATION

    def cut(self, examples: Examples, num_classes: int, source: Mapping[str, str]) -> DataSplits:
        """Disjoint splits of `examples`.

        The evaluation set comes first in the shuffled order, so it does not depend on the size of the pool.

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
        order = shuffled(len(examples), self.split_seed)
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
