"""Weights from a user's file: safetensors, or a PyTorch file read with weights_only=True.

Damaged files: PyTorch's zip files have a checksum for every record, so a flipped bit is detected. Safetensors and
PyTorch's older files have none. There, a flipped bit inside a weight is detected only if it makes the weight NaN or
infinite. The result file holds the sha256 of the checkpoint, to compare with the source.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bayesq.files import file_sha256
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Module

T = TypeVar("T")

SAFETENSORS, PYTORCH = (".safetensors",), (".pt", ".pth", ".th", ".bin")
# Training scripts store the weights under these keys. DataParallel adds the prefix to their names.
WRAPPERS = ("state_dict", "model")
PREFIX = "module."


def from_checkpoint(make: Callable[[], Module], checkpoint: str, network: str) -> tuple[Module, dict[str, object]]:
    """The module from `make` with the weights of a file, and their origin; UserError if the file does not fit."""
    path = Path(checkpoint)
    weights = read_checkpoint(path)
    module = make()
    load_weights(module, weights, path, network)
    return module, {"fp_source": str(path), "checkpoint_sha256": checkpoint_sha256(path)}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrapper keys and DataParallel's prefix.

    Raises:
        UserError: the file is missing or unreadable, has an unknown ending, or holds more than tensors by name.
    """
    where = f"model.checkpoint={path}"
    known = (*SAFETENSORS, *PYTORCH)
    if path.suffix.lower() not in known:
        raise UserError(f"{where}: needs a file that ends in one of {', '.join(known)}")
    refused = UserError(f"{where}: not a checkpoint that holds tensors by name and nothing else (weights_only=True)")
    try:
        with path.open("rb"):
            pass
        content = _load(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise UserError(f"{refused} ({one_line(str(error))[:200]})") from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise refused
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise refused
    return {name.removeprefix(PREFIX): tensor for name, tensor in content.items()}


def checkpoint_sha256(path: Path) -> str:
    """sha256 hex of a checkpoint file; for a folder, those of its safetensors files in name order."""
    return ", ".join(map(file_sha256, sorted(path.glob("*.safetensors")) if path.is_dir() else [path]))


def _load(path: Path) -> object:
    """Content of the file; many kinds of errors if it is damaged or holds more than tensors and plain containers.

    The checksums of a zip file's records are compared, because torch.load does not. So files saved after
    torch.serialization.set_crc32_options(False) are refused too: all their checksums are wrong.
    """
    if path.suffix.lower() in SAFETENSORS:
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path, network: str) -> None:
    """Load `weights` into `module`; messages name the file `checkpoint` and the expected `network`.

    Raises:
        UserError: names or shapes differ, or integers stand for floats; the message lists the differences.
    """
    for name, tensor in module.state_dict().items():
        if name in weights and tensor.is_floating_point() != weights[name].is_floating_point():
            raise UserError(f"model.checkpoint={checkpoint}: {name} holds {weights[name].dtype}, not {tensor.dtype}")
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UserError(
            f"model.checkpoint={checkpoint}: these are not the weights of {network} "
            f"({one_line(str(error).partition(':')[2])[:300]})"
        ) from error


def reading(what: str, load: Callable[[], T]) -> T:
    """The result of `load()`; any error becomes a UserError of one line (a damaged file raises many kinds)."""
    try:
        return load()
    except Exception as error:
        raise UserError(f"{what}: cannot be read ({one_line(str(error))[:300]})") from error
