"""ImageNet-1k, or any part of it: a tree of photos, val/<wnid>/<photo> and perhaps train/, or parquet files."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bayesq.suite.datasets.base import DataSplits, Examples, limited, stratified
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.errors import UserError
from bayesq.suite.hub import hub_files, tell_commit

SUFFIXES = {".jpg", ".jpeg", ".png"}


class Photos(Protocol):
    """All photos of a split, of which most will not be looked at."""

    @property
    def labels(self) -> Tensor:
        """Labels [n] int64."""
        ...

    def __len__(self) -> int: ...

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        ...


class ImageNet:
    """Photos with ImageNet's labels; the class is the wnid's place among all 1,000, however many there are.

    Evaluated is the validation split. With a train split beside it, `seed` draws the calibration pool from there, and
    every seed has the same evaluation set. Without one, as for the 1,000 photos at hand, the pool is taken out of the
    validation split: **every seed then has its own evaluation set**, the photos that it does not calibrate on. With a
    pool drawn by `split_seed` instead, a pool as small as these data allow would give every seed the same calibration
    set.

    Nothing is fitted on ImageNet here, so DataSplits.train is empty: these networks bring their weights.

    Args:
        root: folder with val/<wnid>/<photo> and perhaps train/<wnid>/<photo>, or with train*.parquet and val*.parquet,
            in it or in its folder data; parquet files of other names are all evaluation photos.
        split_seed: order of the evaluation photos of a tree, and the draw of `limit`.
        calibration_pool: number of photos calibration sets are drawn from.
        seed: the run's seed, which draws the pool.
        limit: evaluate only so many photos, every class keeping its share.
        hub: data set repository on the hub that holds such parquet files, in place of `root`.
        revision: its commit, tag or branch.
        train_files, val_files: patterns of the files to fetch from there; no `train_files`: calibrate on validation
            photos.
    """

    def __init__(
        self,
        root: str | None,
        split_seed: int,
        calibration_pool: int,
        seed: int,
        limit: int | None = None,
        hub: str | None = None,
        revision: str = "main",
        train_files: str | None = None,
        val_files: str = "data/validation-*.parquet",
    ) -> None:
        if (root is None) == (hub is None):
            raise UserError("dataset=imagenet needs either dataset.root=DIR or dataset.hub=REPOSITORY")
        self.root = None if root is None else Path(root)
        self.split_seed = split_seed
        self.calibration_pool = calibration_pool
        self.seed = seed
        self.limit = limit
        self.hub = hub
        self.revision = revision
        self.train_files = train_files
        self.val_files = val_files

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with photos as inputs, not opened yet; `cache_dir` stays untouched.

        Raises:
            UserError: there are no validation photos in any of the layouts, a folder is no wnid of ImageNet, a label is
                not possible, the hub does not give the files, or the pool or the limit is not possible.
        """
        train, val, source = self._from_hub() if self.hub else self._from_root()
        pool_from = val if train is None else train
        if not 1 <= self.calibration_pool <= len(pool_from) - (1 if train is None else 0):
            kind = "photos, of which some must remain to evaluate" if train is None else "training photos"
            raise UserError(
                f"dataset.calibration_pool={self.calibration_pool} is not possible: {source['origin']} has "
                f"{len(pool_from)} {kind}"
            )
        drawn = torch.randperm(len(pool_from), generator=torch.Generator().manual_seed(self.seed))
        drawn = drawn[: self.calibration_pool]
        evaluated = torch.arange(len(val))
        if isinstance(val, PhotoTree):  # files are read in any order; a parquet file from its beginning to its end
            evaluated = torch.randperm(len(val), generator=torch.Generator().manual_seed(self.split_seed))
        if train is None:
            evaluated = evaluated[~torch.isin(evaluated, drawn)]
        if self.limit is not None:
            size = limited(len(evaluated), self.limit)
            evaluated = evaluated[stratified(val.labels[evaluated], size, self.split_seed)]
        ids = val.select(torch.arange(len(val))).ids
        return DataSplits(
            train=val.select(torch.arange(0)),
            calibration_pool=pool_from.select(drawn),
            evaluation=val.select(evaluated),
            num_classes=len(wnids()),
            primary_metric="accuracy",
            source={
                **source,
                "photos": str(len(val)),
                "classes": str(len(val.labels.unique())),
                "names_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
                "calibration_from": "val" if train is None else "train",
                "split_seed": str(self.split_seed),
                "seed": str(self.seed),
            },
        )

    def _from_root(self) -> tuple[Photos | None, Photos, dict[str, str]]:
        """Train (None: there is none) and validation photos below `root`, and their origin."""
        assert self.root is not None
        where, origin = f"dataset.root={self.root}", {"origin": str(self.root)}
        if (self.root / "val").is_dir():
            train = PhotoTree(self.root, "train") if (self.root / "train").is_dir() else None
            return train, PhotoTree(self.root, "val"), origin
        for folder in (self.root / "data", self.root):
            if files := sorted(folder.glob("*.parquet")):
                train_files, val_files = _by_split(files)
                return _opened(train_files, where), _validation(val_files, where), origin
        raise UserError(
            f"{where}: there is no folder {self.root / 'val'} of val/<wnid>/<photo>, and there are no parquet files "
            "such as validation.parquet or data/validation-*.parquet"
        )

    def _from_hub(self) -> tuple[Photos | None, Photos, dict[str, str]]:
        """As `_from_root`, of files that are fetched unless the hub's cache has them."""
        assert self.hub is not None
        where = f"dataset.hub={self.hub}"
        instead = "take files of your own with dataset.root=DIR dataset.hub=null"
        patterns = [self.val_files, *([self.train_files] if self.train_files else [])]
        found = hub_files(self.hub, patterns, self.revision, where, instead)
        tell_commit(where, self.revision, found.commit, "dataset.revision")
        val = sorted(found.folder.glob(self.val_files))
        train = sorted(found.folder.glob(self.train_files)) if self.train_files else []
        for key, pattern, files in (("val_files", self.val_files, val), ("train_files", self.train_files, train)):
            if pattern and not files:
                raise UserError(f"dataset.{key}={pattern}: {self.hub} at {self.revision} has no such file")
        source = {
            "origin": self.hub,
            "revision": found.commit,
            "train_files": " ".join(file.name for file in train),
            "val_files": " ".join(file.name for file in val),
        }
        return _opened(train, where), _validation(val, where), source


def _by_split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Train and validation files by the beginning of their names; without any such name all are validation files."""
    train, val, test = ([file for file in files if file.name.startswith(split)] for split in ("train", "val", "test"))
    return train, val if train or val or test else list(files)


def _opened(files: Sequence[Path], where: str) -> Photos | None:
    """The photos of parquet files; None of no files."""
    return ParquetPhotos(files, where, len(wnids())) if files else None


def _validation(files: Sequence[Path], where: str) -> Photos:
    """The photos of validation files.

    Raises:
        UserError: there are none.
    """
    photos = _opened(files, where)
    if photos is None or not len(photos):
        raise UserError(f"{where}: no photo in val*.parquet")
    return photos


class PhotoTree:
    """Photos below <root>/<split>/<wnid>/, by class and name.

    Raises:
        UserError: a folder is no wnid of ImageNet, or there is no photo.
    """

    def __init__(self, root: Path, split: str) -> None:
        where = f"dataset.root={root}"
        self.folder = root / split
        index = {wnid: position for position, wnid in enumerate(wnids())}
        # A train split has 1.3 million photos: their names are kept as plain strings, the rest is made on demand.
        self._names: list[tuple[str, str]] = []
        for below in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            if below.name not in index:
                raise UserError(f"{where}: {split}/{below.name} is not a WordNet id of ImageNet-1k")
            names = sorted(name for name in os.listdir(below) if os.path.splitext(name)[1].lower() in SUFFIXES)
            self._names += [(below.name, name) for name in names]
        if not self._names:
            raise UserError(f"{where}: no photo ({', '.join(sorted(SUFFIXES))}) in {split}/<wnid>/")
        self.labels = torch.tensor([index[wnid] for wnid, _ in self._names])

    def __len__(self) -> int:
        return len(self._names)

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        names = [self._names[i] for i in indices.tolist()]
        files = [self.folder / wnid / name for wnid, name in names]
        return Examples(files, self.labels[indices], [f"{wnid}/{Path(name).stem}" for wnid, name in names])


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of the class indices."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(sorted(ImageNetInfo().label_names()))
