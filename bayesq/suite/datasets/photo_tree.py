"""Photos in a tree of folders: their list, their ids, and a warning about files that are left out."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png"}
CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}  # not hidden; added by Windows and by archives of macOS


class PhotoTree:
    """Photos below <root>/<split>/<class>/, by class and name, without hidden files and folders.

    An id is <class>/<name without suffix>. If two photos of a class differ in the suffix only, the ids of that class
    have the suffix.

    `classes` are the folders' names in the order of their labels: for ImageNet, its WordNet ids. `where` is the key and
    value that led to the photos.

    Attributes:
        labels: [n] int64.
        left_out: description of the files that are not read; "" if there are none. It is also logged as a warning.

    Raises:
        UserError: a folder is none of the classes, something cannot be read, or there is no photo.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str], where: str = "", level: str = "<wnid>") -> None:
        where = where or f"dataset.root={root}"
        self.folder = root / split
        # A train split has 1.3 million photos: only their names are in memory; paths and ids are made on demand.
        self._names: list[str] = []
        self._with_suffix: set[str] = set()
        label_of = {name: label for label, name in enumerate(classes)}
        labels: list[int] = []
        left_out: list[str] = []
        try:
            for folder in visible(self.folder):
                if not folder.is_dir():
                    left_out.append(folder.name)
                    continue
                if folder.name not in label_of:
                    raise UserError(f"{where}: {split}/{folder.name} is not a WordNet id of ImageNet-1k")
                left_out += self._add(folder)
                labels += [label_of[folder.name]] * (len(self._names) - len(labels))
        except OSError as error:
            raise UserError(f"{where}: {error.filename or split} cannot be read ({error.strerror or error})") from error
        self.labels = torch.tensor(labels)
        self.left_out = _counted(left_out)
        if not self._names:
            rest = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(f"{where}: no photo ({', '.join(sorted(SUFFIXES))}) in {Path(split) / level}/{rest}")
        if self.left_out:
            log.warning(f"{where}: {len(self)} photos of {split or '.'}/ are read; left out: {self.left_out}")

    def __len__(self) -> int:
        return len(self._names)

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        names = [self._names[i] for i in indices.tolist()]
        ids = [name if name.partition("/")[0] in self._with_suffix else os.path.splitext(name)[0] for name in names]
        return Examples([self.folder / name for name in names], self.labels[indices], [_storable(name) for name in ids])

    def _add(self, folder: "os.DirEntry[str]") -> list[str]:
        """Add the photos of one class, and return the names of all else in its folder."""
        entries = [(f"{folder.name}/{entry.name}", entry.is_dir()) for entry in visible(folder.path)]
        # A broken link counts as a photo; reading it fails later.
        photos = [name for name, is_dir in entries if not is_dir and _suffix(name) in SUFFIXES]
        if len({os.path.splitext(name)[0] for name in photos}) < len(photos):
            self._with_suffix.add(folder.name)
        self._names += photos
        others = [name + "/" * is_dir for name, is_dir in entries if is_dir or _suffix(name) not in SUFFIXES]
        return others if photos else [*others, f"{folder.name}/"]


def _counted(names: Sequence[str]) -> str:
    """The number of names of each kind, and one example; "" without names."""
    kinds = Counter("folders" if name.endswith("/") else _suffix(name) for name in names)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return one_line(_storable(f"{counts} (such as {min(names)})")) if names else ""


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "(no suffix)"


def visible(folder: str | Path) -> list["os.DirEntry[str]"]:
    """The entries of a folder by name, without hidden ones and CLUTTER."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not (entry.name.startswith(".") or entry.name.lower() in CLUTTER)]
    return sorted(shown, key=lambda entry: entry.name)


def _storable(name: str) -> str:
    """`name` with escapes for bytes that are not UTF-8 and for carriage returns, which a CSV file cannot hold."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")
