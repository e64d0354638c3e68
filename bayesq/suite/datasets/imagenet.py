"""ImageNet-1k, or any part of it: a tree of photos, val/<wnid>/<photo> and perhaps train/, or parquet files."""

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch

from bayesq.suite.datasets.base import DataSplits, limited, stratified
from bayesq.suite.datasets.parquet_files import listed, of_split, shards
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.datasets.photo_tree import PhotoTree
from bayesq.suite.errors import UserError
from bayesq.suite.hub import hub_files, tell_commit

Photos = PhotoTree | ParquetPhotos


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
            in its folder data or in it; where no file is named so, all are evaluation photos. Files that say how many
            they are (`-of-00014`) must all be there, and a split's files must differ in a number only. Of a tree
            PhotoTree tells what is left out.
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
                not possible, the hub does not give the files, a parquet file is missing or one too many, or the pool or
                the limit is not possible.
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
            train = PhotoTree(self.root, "train", wnids()) if (self.root / "train").is_dir() else None
            val = PhotoTree(self.root, "val", wnids())
            left_out = {"left_out": val.left_out} if val.left_out else {}
            return train, val, origin | left_out
        for folder in (self.root / "data", self.root):
            if files := listed(folder, "*.parquet"):
                return *_opened(*_by_split(files, where), where), origin
        raise UserError(
            f"{where}: there is no folder {self.root / 'val'} of val/<wnid>/<photo>, and there are no parquet files "
            "such as validation.parquet or data/validation-*.parquet"
        )

    def _from_hub(self) -> tuple[Photos | None, Photos, dict[str, str]]:
        """Like `_from_root`, for files on the hub; files in the hub's cache are not fetched again."""
        assert self.hub is not None
        where = f"dataset.hub={self.hub}"
        instead = "take files of your own with dataset.root=DIR dataset.hub=null"
        patterns = [self.val_files, *([self.train_files] if self.train_files else [])]
        files = hub_files(self.hub, patterns, self.revision, where, instead)
        tell_commit(where, self.revision, files.commit, "dataset.revision")
        val = self._matching("val_files", files.folder)
        train = self._matching("train_files", files.folder)
        source = {
            "origin": self.hub,
            "revision": files.commit,
            "train_files": " ".join(file.name for file in train),
            "val_files": " ".join(file.name for file in val),
        }
        return *_opened(train, val, where), source

    def _matching(self, key: str, folder: Path) -> list[Path]:
        """The hub's files in `folder` that match the pattern under `key`; none if the pattern is null.

        Raises:
            UserError: there are none, or some that the pattern asks for are missing (offline, of a part in the cache).
        """
        pattern: str | None = getattr(self, key)
        if not pattern:
            return []
        where = f"dataset.{key}={pattern}"
        files = shards(
            listed(folder, pattern), where, lambda file: fnmatch(file.relative_to(folder).as_posix(), pattern)
        )
        if not files:
            raise UserError(f"{where}: {self.hub} at {self.revision} has no such file")
        return files


def _by_split(files: Sequence[Path], where: str) -> tuple[list[Path], list[Path]]:
    """Train and validation files by the beginning of their names; without any such name all are validation files.

    Raises:
        UserError: a file of a split is missing, or one belongs to something else.
    """
    splits = ("train", "val", "test")
    train, val, test = ([file for file in files if file.name.startswith(split)] for split in splits)
    if not (train or val or test):
        return [], shards(files, where)
    if strays := [file for file in files if not file.name.startswith(splits)]:
        raise UserError(
            f"{where}: {strays[0]} begins with none of {', '.join(splits)}, as others there do: move it away"
        )
    return of_split(train, where), of_split(val, where)


def _opened(train: Sequence[Path], val: Sequence[Path], where: str) -> tuple[Photos | None, Photos]:
    """The train photos (None: there are no train files) and the validation photos of parquet files.

    Raises:
        UserError: there are no validation photos.
    """
    photos = [ParquetPhotos(files, where, len(wnids()), wnids()) if files else None for files in (train, val)]
    if not photos[1]:
        raise UserError(f"{where}: no photo in val*.parquet")
    return photos[0], photos[1]


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of the class indices."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(sorted(ImageNetInfo().label_names()))
