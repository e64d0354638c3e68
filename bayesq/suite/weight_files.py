"""A network's tensors in files that other libraries read: what goes into one file, and what is written beside it."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesq.suite.errors import UserError
from bayesq.suite.results import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bayesq.suite.models.base import Network

WEIGHTS_FILE, HEAD_FILE = "model.safetensors", "head.safetensors"


def converted(tensors: Mapping[str, "Tensor"], dtype: str) -> dict[str, "Tensor"]:
    """Floating-point tensors in another dtype, by name; whole numbers stay.

    Raises:
        UserError: an entry is beyond the dtype's range.
    """
    import torch

    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if bool((torch.isinf(result[name]) & torch.isfinite(tensor)).any()):
            raise UserError(f"{name} has entries beyond the range of {dtype}: use --dtype float32")
    return result


@dataclass
class Part:
    """The tensors that one file holds, and what is written beside it.

    Attributes:
        prefix: of the part's names in the network's state_dict, left out in the file.
        module: the part.
        config: content of config.json, for transformers; else empty.
        rest: tensors of the network outside the part, under their own names.
    """

    prefix: str
    module: "nn.Module"
    config: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, "Tensor"] = field(default_factory=dict)


def transformers_part(module: "nn.Module") -> Part:
    """The part of a network that another library knows, which is all of it where no transformers model is inside."""
    for name, child in module.named_children():
        if hasattr(child, "save_pretrained"):
            prefix = f"{name}."
            config = json.loads(child.config.to_json_string())  # type: ignore[operator, union-attr]
            config["architectures"] = [type(child).__name__]
            rest = {key: value for key, value in module.state_dict().items() if not key.startswith(prefix)}
            return Part(prefix, child, config, rest)
    return Part("", module)


def write_beside(part: Part, network: "Network", folder: Path, config: dict[str, Any]) -> list[str]:
    """config.json, the tokenizer and what of the network lies outside its part; what was written, line by line."""
    lines = []
    if part.config:
        write_json(folder / "config.json", part.config | config)
        if save_tokenizer(getattr(network.encode, "tokenizer", None), folder):
            lines.append("config.json and the tokenizer are beside it")
    if part.rest:
        save(converted(part.rest, config["dtype"]), folder / HEAD_FILE)
        lines.append(f"{HEAD_FILE}: {', '.join(part.rest)}, which the library's architecture has no place for")
    return lines


def save_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Save a tokenizer of the transformers or the tokenizers library; whether there is one."""
    if tokenizer is None:
        return False
    if not hasattr(tokenizer, "save_pretrained"):
        from transformers import PreTrainedTokenizerFast

        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        known = {key: token for key, token in special.items() if tokenizer.token_to_id(token) is not None}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)
    tokenizer.save_pretrained(folder)
    return True


def save(tensors: Mapping[str, "Tensor"], file: Path) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    # tied weights share memory, which the format does not know
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, file, {"format": "pt"}
    )


def architecture(part: Part, network: "Network") -> str:
    """What the part is called."""
    return str((part.config.get("architectures") or [network.description.get("architecture")])[0])


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output` that becomes it, or whose files replace those in it, on success."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        output.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(temporary)
