"""On-disk tensors that are whole or absent: atomic writes, and a digest checked on every load."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayesq.suite.files import atomic_path

# One header entry for everything: safetensors orders several entries at random, and files should be reproducible.
HEADER_KEY = "bayesq"


class CorruptCache(Exception):
    """A cache file that cannot be trusted: unreadable, truncated, or its content differs from its digest."""


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Folder of what bayesq may recompute: the config key, else BAYESQ_CACHE_DIR, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("BAYESQ_CACHE_DIR") or platformdirs.user_cache_dir("bayesq")
    return Path(chosen).expanduser().absolute()


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """sha256 over names, dtypes, shapes and bytes of `tensors` (in name order) and over `metadata`."""
    return _digest(sorted(tensors), tensors.__getitem__, metadata or {})


def _digest(names: list[str], load: Callable[[str], Tensor], metadata: Mapping[str, str]) -> str:
    state = hashlib.sha256()
    for name in names:
        tensor = load(name).detach().cpu().contiguous()
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    for key in sorted(metadata):
        state.update(f"{key}={metadata[key]}|".encode())
    return state.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears under `path` only when complete; its digest travels in its header."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.dumps({"digest": digest(whole, metadata), "metadata": dict(metadata or {})}, sort_keys=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        _save(file, whole, {HEADER_KEY: header})


# Names of the safetensors format.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _save(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors one after the other in the safetensors format.

    The package's own `save_file` first makes bytes of all of them, which doubles the memory that the statistics of a
    network take. The order is its own: wide types first, so that every tensor is aligned, and then by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        if tensors[name].numel():
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def verify(path: Path) -> dict[str, str]:
    """Check a file of `write_tensors` tensor by tensor, holding one at a time, and return its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCache: the file is truncated, not ours, or its content does not match its digest.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            metadata: dict[str, str] = header["metadata"]
            expected = header["digest"]
            found = _digest(sorted(file.keys()), file.get_tensor, metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCache(f"{path} cannot be read: {error}") from error
    if expected != found:
        raise CorruptCache(f"{path} does not match its digest")
    return metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote; raises as `verify` does."""
    metadata = verify(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
