"""A checksum of all that determines a network's function, except its weights; part of the key of its cached files.

The `repr` of a network lacks, for example, the number of attention heads, the epsilon of a norm, and masks. Modules
keep these values in attributes and configurations. The checksum covers both for every module, the source files of the
modules' classes, and the versions of the libraries.
"""

import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bayesq
from bayesq.files import file_sha256
from bayesq.suite.code_digest import is_users, sources

# Libraries whose functions networks call.
LIBRARIES = ("numpy", "timm", "torch", "torchvision", "transformers")
# Attributes that no forward pass reads: of every module, of timm, and of transformers.
OF_TIMM = {"default_cfg", "pretrained_cfg"}
OF_TRANSFORMERS = {"_commit_hash", "_name_or_path", "generation_config", "name_or_path", "transformers_version"}
NO_FUNCTION = {*vars(nn.Module()), *OF_TIMM, *OF_TRANSFORMERS, "warnings_issued"}
# Maximum depth of nested objects.
DEPTH = 6


def fingerprint(module: nn.Module) -> str:
    """sha256 (hex) of all that determines the module's function, except parameters and persistent buffers."""
    state = set(module.state_dict())
    shared: dict[int, str] = {}
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in LIBRARIES}
    content: list[Any] = [bayesq.__version__, versions, sorted(_sources(module))]
    for name, child in module.named_modules(remove_duplicate=False):
        content.append([name, shared.setdefault(id(child), name), _plain(child, 0, frozenset())])
    for name, x in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        values = None if name in state else _plain(x, 0, frozenset())
        content.append([name, shared.setdefault(id(x), name), list(x.shape), str(x.dtype), values])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sources(module: nn.Module) -> set[str]:
    """Checksums of the source files of the modules' classes, and of the user's files in the same folder.

    The versions of the libraries cover torch's files, and the files that installed libraries import.
    """
    files: set[Path] = set()
    for kind in {base for child in module.modules() for base in type(child).__mro__}:
        package = kind.__module__.partition(".")[0]
        if package in ("builtins", "torch"):
            continue
        try:
            file = Path(inspect.getfile(kind))
        except (OSError, TypeError):  # defined in an interactive session: `_plain` hashes the code of its functions
            continue
        files |= {file, *(sources(package) if is_users(package, file) else ())}
    return {_checksum(file, file.stat().st_mtime_ns) for file in files if file.is_file()}


@functools.lru_cache(maxsize=512)
def _checksum(file: Path, changed: int) -> str:  # `changed` is in the cache key: an edited file is read again
    return file_sha256(file)


def _plain(value: Any, depth: int, inside: frozenset[int]) -> Any:
    """A value in JSON types; equal values give the same JSON in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1)
        data = content.view(torch.uint8).numpy().data if content.numel() else b""
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, torch.dtype | torch.Size | Enum | complex | bytes):
        return str(value)
    if isinstance(value, torch.device | Path | torch.Generator):
        return type(value).__name__  # its value does not change the function
    kind = _name(type(value))
    if id(value) in inside or depth > DEPTH:
        return kind
    inside |= {id(value)}

    def inner(x: Any) -> Any:
        return _plain(x, depth + 1, inside)

    if isinstance(value, list | tuple):
        return [kind, *map(inner, value)]
    if isinstance(value, set | frozenset):
        return [kind, *sorted(json.dumps(inner(x), sort_keys=True) for x in value)]
    if isinstance(value, dict):
        known = ([str(key), inner(x)] for key, x in value.items() if str(key) not in NO_FUNCTION)
        return [kind, *sorted(known, key=str)]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), *value.co_names, inner(value.co_consts)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [_name(value), inner(value.__code__), inner([value.__defaults__, value.__kwdefaults__, cells])]
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return _name(value)
    if isinstance(value, nn.Module):
        named = nn.Module | nn.Parameter  # `fingerprint` covers these under their names
        attributes = {key: x for key, x in vars(value).items() if key not in NO_FUNCTION and not isinstance(x, named)}
        hooks = [list(registered.values()) for registered in (value._forward_pre_hooks, value._forward_hooks)]
        # a class defined in a function may use values of that function
        made = [base for base in type(value).__mro__ if "<locals>" in base.__qualname__]
        values = [{key: x for key, x in vars(base).items() if not key.startswith("__")} for base in made]
        return [kind, value.extra_repr(), inner(attributes), inner(hooks), inner(values)]
    return [kind, *map(inner, _state(value))]


def _state(value: Any) -> list[Any]:
    """The state that pickle would store of an object; empty if it cannot be pickled."""
    try:
        reduced = value.__reduce_ex__(2)
    except TypeError:
        return []
    if isinstance(reduced, str):
        return [reduced]
    _, *parts = reduced
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
