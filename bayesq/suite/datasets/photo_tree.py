"""Photos in a tree of folders: their list, their ids, and a warning about files that are left out."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png"}
CLUTTER = {"thumbs.db", "desktop.ini"}  # what Windows leaves in folders; other systems' files are hidden


class PhotoTree:
    """Photos below <root>/<split>/<wnid>/, by class and name; hidden files and folders do not count.

    An id is <wnid>/<name without suffix>. Of a class with two photos of one such name all ids keep the suffix.

    Args:
        root: folder of the splits.
        split: name of the folder below.
        wnids: the classes in the order of their labels.

    Attributes:
        labels: [n] int64.
        left_out: description of the files that are not read; "" if there are none. It is also logged as a warning.

    Raises:
        UserError: a folder is no wnid of ImageNet, something cannot be read, or there is no photo.
    """

    def __init__(self, root: Path, split: str, wnids: Sequence[str]) -> None:
        where = f"dataset.root={root}"
        self.folder = root / split
        # A train split has 1.3 million photos: their names are kept as plain strings, the rest is made on demand.
        self._names: list[tuple[str, str]] = []
        self._with_suffix: set[str] = set()
        index = {wnid: label for label, wnid in enumerate(wnids)}
        left_out: list[str] = []
        try:
            for below in _visible(self.folder):
                if not below.is_dir():
                    left_out.append(below.name)
                elif below.name not in index:
                    raise UserError(f"{where}: {split}/{below.name} is not a WordNet id of ImageNet-1k")
                else:
                    left_out += self._list(below)
        except OSError as error:
            raise UserError(f"{where}: {error.filename or split} cannot be read ({error.strerror or error})") from error
        self.left_out = _counted(left_out)
        if not self._names:
            rest = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(f"{where}: no photo ({', '.join(sorted(SUFFIXES))}) in {split}/<wnid>/{rest}")
        if self.left_out:
            log.warning(f"{where}: {len(self)} photos of {split}/ are read; left out: {self.left_out}")
        self.labels = torch.tensor([index[wnid] for wnid, _ in self._names])

    def __len__(self) -> int:
        return len(self._names)

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        names = [self._names[i] for i in indices.tolist()]
        files = [self.folder / wnid / name for wnid, name in names]
        return Examples(files, self.labels[indices], [self._id(wnid, name) for wnid, name in names])

    def _id(self, wnid: str, name: str) -> str:
        return f"{wnid}/{_storable(name if wnid in self._with_suffix else os.path.splitext(name)[0])}"

    def _list(self, folder: "os.DirEntry[str]") -> Iterator[str]:
        """Take in the photos of one class, and yield what else its folder holds."""
        names = []
        for entry in _visible(folder.path):
            # A broken link counts as a photo; reading it fails later.
            if _suffix(entry.name) in SUFFIXES and not entry.is_dir():
                names.append(entry.name)
            else:
                yield f"{folder.name}/{entry.name}{'/' if entry.is_dir() else ''}"
        if len({os.path.splitext(name)[0] for name in names}) < len(names):
            self._with_suffix.add(folder.name)
        if not names:
            yield f"{folder.name}/"
        self._names += [(folder.name, name) for name in names]


def _counted(names: Sequence[str]) -> str:
    """How many of which kind there are, and one of them."""
    kinds = Counter("folders" if name.endswith("/") else _suffix(name) for name in names)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return one_line(_storable(f"{counts} (such as {min(names)})")) if names else ""


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "(no suffix)"


def _visible(folder: str | Path) -> list["os.DirEntry[str]"]:
    """What a folder holds, in the order of names, but nothing hidden."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not (entry.name.startswith(".") or entry.name.lower() in CLUTTER)]
    return sorted(shown, key=lambda entry: entry.name)


def _storable(name: str) -> str:
    """`name` with escapes for what a text file or a CSV reader could not keep: bytes that are no UTF-8, and returns."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")
