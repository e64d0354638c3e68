"""A digest of the source code of a run in result.json: it shows whether the code has changed since the run.

It covers all files of bayesq, baselines and the packages that the configuration names (`_target_`), also unused files.
"""

import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayesq.suite.config import flatten

KEY = "code"
OURS = ("baselines", "bayesq")


def packages(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Top-level packages of the `_target_`s of a resolved config, without `OURS`."""
    targets = [value for key, value in flatten(config).items() if key.rpartition(".")[2] == "_target_"]
    return tuple(sorted({target.partition(".")[0] for target in targets if isinstance(target, str)} - {*OURS}))


@cache
def digest(packages: tuple[str, ...]) -> str | None:
    """Digest (16 hexadecimal digits) of the sources of `OURS` and `packages`; None if a package has no sources.

    Cached, because a later edit does not change the code that this process has loaded.
    """
    total = hashlib.sha256()
    for package in (*OURS, *packages):
        files = sources(package)
        if not files:
            return None
        for file in files:
            content = file.read_bytes()
            total.update(f"{package}\0{file.name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


def has_changed(result: Mapping[str, Any]) -> bool:
    """Whether the code has changed since a finished run.

    False if that is unknown: the result has no digest (earlier versions), or a package is no longer installed.
    """
    recorded, config = result.get(KEY), result.get("config")
    if not isinstance(recorded, str) or not isinstance(config, Mapping):
        return False
    now = digest(packages(config))
    return now is not None and now != recorded


@cache
def sources(package: str) -> tuple[Path, ...]:
    """Sorted source files of a top-level module or package, without importing it.

    For the user's own code, also the modules and packages in the same folder, because it may import them.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # for example __main__
        spec = None
    if spec is None or not (spec.origin or "").endswith(".py"):
        return ()
    file = Path(str(spec.origin))
    folders = [file.parent] if spec.submodule_search_locations else []
    files = {file}
    if is_users(package, file):
        home = file.parents[1] if folders else file.parent
        files.update(home.glob("*.py"))
        folders = [below.parent for below in home.glob("*/__init__.py")]
    return tuple(sorted(files.union(*(folder.rglob("*.py") for folder in folders))))


def is_users(package: str, file: Path) -> bool:
    """Whether a top-level module or package is neither installed, nor in the standard library, nor in `OURS`."""
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not installed and package not in (*OURS, *sys.stdlib_module_names)
