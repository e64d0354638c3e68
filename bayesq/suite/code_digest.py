"""What tells whether the code that computes a run has changed since it ran.

The code of a run is what its targets (`_target_` of method, posterior, model and data set) and the runner import, from
their own packages: another method beside them, a README, a plot or the command line do not count. Two digests of it
are kept in result.json under `code`: of the bytes, which is quick to compare, and, where these differ, of the syntax,
which no comment, docstring or line break changes.
"""

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import bayesq

KEY = "code"
GROUPS = ("method", "posterior", "model", "dataset")
START = "bayesq.suite.runner"
# what the runner imports too and what changes no number: how a run is started, reported and stopped
NO_NUMBERS = frozenset({"bayesq.files", "bayesq.stopping"}).union(
    f"bayesq.suite.{module}"
    for module in (
        *("cli", "code_digest", "composition", "config", "construct", "errors", "forward", "labels"),
        *("coverage", "launchers", "loading", "plots", "preflight", "progress", "provenance", "rehearsal", "relog"),
        *("results", "schema", "session", "summary", "terminal", "tracking", "wandb_environment", "wandb_names"),
    )
)
IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|.*)|import[ \t]+(.*))", re.MULTILINE)


def targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The `_target_`s below method, model, data set and, where the run reads it, posterior of a resolved config."""
    reads = config.get("allocator") == "knapsack" or config["method"].get("uses_posterior") is True
    groups = [group for group in GROUPS if group != "posterior" or reads]
    return tuple(sorted({target for group in groups for target in _targets(config.get(group))}))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)


@cache
def digests(targets: tuple[str, ...]) -> dict[str, str] | None:
    """`bytes` and `syntax`: digests of the code behind these targets; None where a target's source is not found.

    Found once a process: what is edited later is not what runs.
    """
    files = _files(targets)
    if files is None:
        return None
    return {
        "bytes": _digest((name, _source(path)) for name, path in files),
        "syntax": _digest((name, _syntax(path)) for name, path in files),
    }


def has_changed(result: Mapping[str, Any]) -> bool:
    """Whether the code of a finished run is known to differ from what is there now.

    Results of earlier versions keep no digests, and a target may not be here any more: then nothing is known.
    """
    recorded = result.get(KEY)
    if not isinstance(recorded, Mapping) or not isinstance(result.get("config"), Mapping):
        return False
    files = _files(targets(result["config"]))
    if files is None or _digest((name, _source(path)) for name, path in files) == recorded.get("bytes"):
        return False
    return _digest((name, _syntax(path)) for name, path in files) != recorded.get("syntax")


def _digest(parts: Iterable[tuple[str, bytes]]) -> str:
    """16 hexadecimal digits of names and contents."""
    total = hashlib.sha256()
    for name, content in parts:
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


@cache
def _files(targets: tuple[str, ...]) -> list[tuple[str, Path]] | None:
    """Modules that the targets and the runner import from their own packages, with their files, by name."""
    found: dict[str, Path] = {}
    for target in targets:
        module = _module(target)
        if module is None:
            return None
        _follow(module, found)
    _follow(START, found)
    return sorted(found.items())


def _follow(start: str, found: dict[str, Path]) -> None:
    """Add to `found` what `start` imports, and what that imports: from bayesq, its own package and beside it."""
    package = start.partition(".")[0]
    roots = {"bayesq", "baselines", package}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        root = name.partition(".")[0]
        if name in found or name in NO_NUMBERS or not (root in roots or _are_neighbours(root, package)):
            continue
        path = _path(name)
        if path is None:
            continue
        found[name] = path
        waiting += _imports(name, path)


def files_behind(module: str) -> set[Path]:
    """Source files of a module and of what it imports from its own package and from beside it, bayesq's aside.

    Of a library that is installed, only the module itself: the library's version tells the rest.
    """
    path = _path(module)
    if path is None or _home(module.partition(".")[0]) is None:
        return set() if path is None else {path}
    found: dict[str, Path] = {}
    _follow(module, found)
    return {path for name, path in found.items() if name.partition(".")[0] not in ("bayesq", "baselines")}


def _are_neighbours(first: str, second: str) -> bool:
    """Whether two top-level modules or packages lie in one folder of the user's."""
    home = _home(first)
    return home is not None and home == _home(second)


@cache
def _home(root: str) -> Path | None:
    """The folder that a top-level module or package lies in; None for installed ones, Python's own and ours."""
    path = None if root in ("bayesq", "baselines", *sys.stdlib_module_names) else _path(root)
    if path is None or {"site-packages", "dist-packages"} & set(path.parts):
        return None
    return path.parents[1] if path.name == "__init__.py" else path.parent


@cache
def _imports(name: str, path: Path) -> tuple[str, ...]:
    """What a module's text seems to import; names that are no modules are for the caller to drop."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imported: list[str] = []
    if _home(name.partition(".")[0]) is not None:
        found = _imports_by_syntax(path)
    else:
        found = IMPORT.findall(_source(path).decode(errors="replace"))
    for origin, names, plain in found:
        for entry in re.sub(r"#.*", "", plain).split(","):
            imported += _with_parents(entry.split(" as ")[0].strip())
        if not origin:
            continue
        level = len(origin) - len(origin.lstrip("."))
        parents = package.split(".")
        base = [*parents[: len(parents) - level + 1], origin.lstrip(".")] if level else [origin]
        module = ".".join(filter(None, base))
        imported += _with_parents(module)
        for entry in re.sub(r"#.*", "", names).strip("()").split(","):
            imported.append(f"{module}.{entry.split(' as ')[0].strip()}")
    return tuple(imported)


def _imports_by_syntax(path: Path) -> list[tuple[str, str, str]]:
    """What IMPORT finds, of a user's file: wherever on a line it stands."""
    try:
        tree = ast.parse(_source(path))
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        names = ",".join(alias.name for alias in node.names) if isinstance(node, ast.Import | ast.ImportFrom) else ""
        if isinstance(node, ast.Import):
            found.append(("", "", names))
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), names, ""))
    return found


def _with_parents(name: str) -> list[str]:
    """A module and the packages that Python runs on the way to it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _module(target: str) -> str | None:
    """The module of a dotted name of a class or function."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if _path(name := ".".join(parts[:end])) is not None:
            return name
    return None


@cache
def _path(name: str) -> Path | None:
    """The source file of a module, found without importing it."""
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        return None
    for folder in _folders(first):
        base = folder.joinpath(*rest)
        for file in (base / "__init__.py", base.with_suffix(".py") if rest else folder / "__init__.py"):
            if file.is_file():
                return file
    if rest:
        return None
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    return origin if origin is not None and origin.suffix == ".py" and origin.is_file() else None


@cache
def _folders(package: str) -> tuple[Path, ...]:
    """Where the modules of a top-level package lie; empty for a single module."""
    if package in ("bayesq", "baselines"):
        return (Path(bayesq.__file__).parents[1] / package,)
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ()
    return tuple(map(Path, (spec.submodule_search_locations or ()) if spec else ()))


@cache
def _source(path: Path) -> bytes:
    return path.read_bytes()


@cache
def _syntax(path: Path) -> bytes:
    """The syntax tree without docstrings; the bytes of a file that does not parse or that nobody edits."""
    source = _source(path)
    if "site-packages" in path.parts:
        return source
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and _begins_with_text(node.body):
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def _begins_with_text(body: Collection[ast.stmt]) -> bool:
    first = next(iter(body), None)
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
