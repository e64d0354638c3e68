"""Files that a finished run has read and that were modified since: its settings, and so its run id, stay the same."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bayesq.suite.config import flatten

# Keys of a model or a data set that hold paths.
PLACES = ("adapter", "calibration_source", "checkpoint", "file", "folder", "path", "root", "source", "val")
# A folder is as new as itself and all below it to this depth: DIR/train/CLASS changes with each photo that is added.
DEPTH = 2


def newer_than(result: Path, config: Mapping[str, Any]) -> list[str]:
    """The keys of a resolved config, each with its path, whose files were modified after the file `result`."""
    written = result.stat().st_mtime
    places = flatten({group: config.get(group) or {} for group in ("model", "dataset")})
    return [
        f"{key}={place}"
        for key, place in places.items()
        if key.rpartition(".")[2] in PLACES and isinstance(place, str) and _modified(Path(place).absolute()) > written
    ]


@cache
def _modified(path: Path) -> float:
    """When a file or folder was last modified; 0 if it cannot be read. Cached, for the many runs of a sweep."""
    try:
        return _newest(path, DEPTH) if path.is_dir() else path.stat().st_mtime
    except OSError:
        return 0.0


def _newest(folder: Path, depth: int) -> float:
    newest = folder.stat().st_mtime
    with os.scandir(folder) as entries:
        for entry in entries:
            if depth > 1 and entry.is_dir():
                newest = max(newest, _newest(Path(entry.path), depth - 1))
            elif depth == DEPTH or entry.is_dir():  # files in a class folder are many, and the folder's time tells
                newest = max(newest, entry.stat().st_mtime)
    return newest
