"""Weights from a user's file: safetensors, or a PyTorch file of which nothing but tensors is unpickled."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bayesq.suite.errors import UserError

SAFETENSORS, PYTORCH = (".safetensors",), (".pt", ".pth", ".th", ".bin")
# Keys that training scripts put around the weights, and what DataParallel puts before their names.
WRAPPERS = ("state_dict", "model")
PREFIX = "module."


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrappers and without DataParallel's prefix.

    A checkpoint cannot run code: PyTorch files are read with weights_only=True.

    Raises:
        UserError: there is no such file, its ending is none of the known ones, or it does not hold tensors by name.
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
    except ValueError as error:
        raise refused from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(map(_is_weight, content.items())):
        raise refused
    return {name.removeprefix(PREFIX): tensor for name, tensor in content.items()}


def checkpoint_sha256(path: Path) -> str:
    """sha256 hex of a checkpoint's file; of a folder those of its safetensors files, in the order of their names."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = []
    for file in files:
        with file.open("rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return ", ".join(found)


def _is_weight(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _load(path: Path) -> object:
    """What the file holds.

    Raises:
        ValueError: it is damaged, or it holds more than tensors and plain containers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() in SAFETENSORS:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AttributeError) as error:
        raise ValueError(str(error)) from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path, network: str) -> None:
    """Load `weights` into `module`, all of them and nothing else.

    Args:
        checkpoint: where they come from, for the message.
        network: what they should be the weights of, for the message.

    Raises:
        UserError: names or shapes differ; the message has the first difference.
    """
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UserError(
            f"model.checkpoint={checkpoint}: these are not the weights of {network} "
            f"({_first_difference(module.state_dict(), weights)})"
        ) from error


def _first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first name, in order, that one state lacks or that has another shape."""
    for name in {**expected, **found}:
        if name.endswith("num_batches_tracked"):  # older than the counter, checkpoints may do without
            continue
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not part of it"
        if expected[name].shape != found[name].shape:
            return f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
    return "no difference in names and shapes"
