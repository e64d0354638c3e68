"""Files of tensors with atomic writes and a digest that is checked on every load."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayesq.files import atomic_path

# All metadata is one header entry: safetensors writes several entries in random order, and files must be reproducible.
HEADER_KEY = "bayesq"
# Bytes per read for a digest.
CHUNK = 2**20


class CorruptFile(Exception):
    """A file that is unreadable, truncated, or differs from its digest."""


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

TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """sha256 over names, dtypes, shapes and bytes of `tensors` (in name order) and over `metadata`."""
    parts = (
        (name, tensors[name].dtype, tuple(tensors[name].shape), [_bytes(tensors[name])]) for name in sorted(tensors)
    )
    return _digest(parts, metadata or {})


def _digest(
    parts: Iterable[tuple[str, torch.dtype, tuple[int, ...], Iterable[bytes | memoryview]]],
    metadata: Mapping[str, str],
) -> str:
    state = hashlib.sha256()
    for name, dtype, shape, chunks in parts:
        state.update(f"{name}|{dtype}|{shape}|".encode())
        for chunk in chunks:
            state.update(chunk)
    for key in sorted(metadata):
        state.update(f"{key}={metadata[key]}|".encode())
    return state.hexdigest()


def _bytes(tensor: Tensor) -> bytes | memoryview:
    if not tensor.numel():
        return b""
    view: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with its digest in the header.

    `safetensors.save_file` first copies all tensors to bytes, which doubles their memory.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    places = _places({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in whole.items()})
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_header(places, digest(whole, metadata), metadata or {}))
        for name in places:
            file.write(_bytes(whole[name]))


class TensorWriter:
    """Writes a file like that of `write_tensors` one tensor at a time, in any order; see `tensor_writer`."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], room: int) -> None:
        self._file, self._places = file, _places(shapes)
        self._start = len(_header(self._places, digest({}), {})) + room
        self._start += -self._start % 8
        self._missing = set(shapes)
        self.finished = False

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: the tensor is not part of the file, or is written already.
        """
        dtype, shape, start, _ = self._places.get(name, (None, None, 0, 0))
        if name not in self._missing or (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} has no place in this file")
        self._missing.remove(name)
        self._file.seek(self._start + start)
        self._file.write(_bytes(tensor))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header with the digest.

        Raises:
            ValueError: a tensor is missing, or the metadata is longer than `room`.
        """
        if self._missing:
            raise ValueError(f"not written: {', '.join(sorted(self._missing))}")
        checksum = _digest(_parts(self._file, self._places, self._start), metadata)
        header = _header(self._places, checksum, metadata, self._start)
        if len(header) > self._start:
            raise ValueError(f"{len(header)} bytes of header do not fit in {self._start}")
        self._file.seek(0)
        self._file.write(header)
        self.finished = True


@contextmanager
def tensor_writer(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], room: int
) -> Iterator[TensorWriter]:
    """A writer for tensors of known dtypes and shapes; the file appears under `path` after `TensorWriter.finish`.

    Args:
        shapes: name -> dtype and shape.
        room: bytes reserved for the metadata as JSON.

    Raises:
        ValueError: the block did not call `TensorWriter.finish`.
    """
    with atomic_path(path) as temporary, temporary.open("wb+") as file:
        writer = TensorWriter(file, shapes, room)
        yield writer
        if not writer.finished:
            raise ValueError(f"{path} was not finished")


# dtype, shape, first byte and end, counted from the end of the header.
Place = tuple[torch.dtype, tuple[int, ...], int, int]


def _places(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Place]:
    """Place of each tensor, ordered by falling item size and then by name, so that every tensor is aligned."""
    places = {}
    end = 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = (dtype, shape, start, end)
    return places


def _header(places: Mapping[str, Place], checksum: str, metadata: Mapping[str, str], size: int = 0) -> bytes:
    """Header of a safetensors file with its length, padded with blanks to `size` and to a multiple of 8 bytes."""
    ours = json.dumps({"digest": checksum, "metadata": dict(metadata)}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {HEADER_KEY: ours}}
    for name, (dtype, shape, start, end) in places.items():
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(size - 8)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(
    file: BinaryIO, places: Mapping[str, Place], base: int
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Iterator[bytes]]]:
    """The tensors of a file in name order, in chunks; a memory-mapped file would count as used memory."""
    for name in sorted(places):
        dtype, shape, start, end = places[name]
        yield name, dtype, shape, _chunks(file, base + start, base + end)


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        chunk = file.read(min(CHUNK, end - start))
        if not chunk:
            raise ValueError("the file ends early")
        start += len(chunk)
        yield chunk


def verify(path: Path) -> dict[str, str]:
    """Check a file of `write_tensors` in chunks, and return its metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFile: the file is truncated, was not written by `write_tensors`, or does not match its digest.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as checked:  # sizes, offsets and types are consistent
            header = json.loads((checked.metadata() or {})[HEADER_KEY])
            metadata: dict[str, str] = header["metadata"]
            expected = header["digest"]
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
            places = {
                name: (TORCH_TYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in entries.items()
                if name != "__metadata__"
            }
            actual = _digest(_parts(file, places, 8 + length), metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
    if expected != actual:
        raise CorruptFile(f"{path} does not match its digest")
    return metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote; raises as `verify` does."""
    metadata = verify(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
