"""Networks as folders that other programs read: plain weights, or a layout of quantized layers.

model.safetensors   the tensors; of a network around a transformers model, those of that model
config.json         with the tokenizer, for transformers
head.safetensors    tensors around the transformers model, which its architecture has no place for
"""

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bayesq.errors import Refused
from bayesq.quant.layers import find_layer, kind_of
from bayesq.quant.layout import Layout
from bayesq.quant.tensor import QuantizedTensor

WEIGHTS_FILE, HEAD_FILE = "model.safetensors", "head.safetensors"
# Layers that a line names; further ones are only counted.
SHOWN = 4


class Part:
    """The part of a network that another library knows: the transformers model inside, or else all of it.

    Attributes:
        prefix: of the part's names in the network's state_dict, left out in the file.
        module: the part.
        config: content of config.json; empty without a transformers model.
        rest: tensors of the network outside the part, under their names in the network.
        architecture: name of the part.
    """

    def __init__(self, network: nn.Module, architecture: str) -> None:
        self.prefix, self.module, self.architecture = "", network, architecture
        self.config: dict[str, Any] = {}
        self.rest: dict[str, Tensor] = {}
        for name, child in network.named_children():
            if hasattr(child, "save_pretrained"):
                self.prefix, self.module, self.architecture = f"{name}.", child, type(child).__name__
                self.config = json.loads(child.config.to_json_string())  # type: ignore[operator, union-attr]
                self.config["architectures"] = [self.architecture]
                state = network.state_dict()
                self.rest = {key: value for key, value in state.items() if not key.startswith(self.prefix)}
                break

    def write_beside(self, folder: Path, tokenizer: Any, dtype: str, **config: Any) -> list[str]:
        """Write config.json, the tokenizer and the rest; returns what was written, line by line."""
        lines = []
        if self.config:
            write_json(folder / "config.json", {**self.config, "dtype": dtype, **config})
            if tokenizer is not None:
                as_transformers(tokenizer).save_pretrained(folder)
                lines.append("config.json and the tokenizer are beside it")
        if self.rest:
            save(converted(self.rest, dtype), folder / HEAD_FILE)
            lines.append(f"{HEAD_FILE}: {', '.join(self.rest)}, which the library's architecture has no place for")
        return lines


def write_dequantized(
    network: nn.Module, output: Path, dtype: str = "float16", tokenizer: Any = None, architecture: str = "the network"
) -> list[str]:
    """Write plain weights; returns what was written, line by line.

    Args:
        network: with its quantized weights.
        output: folder; files of the same names in it are replaced.
        dtype: of the weights: float16 or float32.
        tokenizer: of the transformers or the tokenizers library; None = there is none.
        architecture: name of a network without a transformers model.

    Raises:
        Refused: a weight is beyond the range of the dtype.
    """
    part = Part(network, architecture)
    weights = converted(part.module.state_dict(), dtype)
    with new_folder(output) as folder:
        save(weights, folder / WEIGHTS_FILE)
        lines = [f"{WEIGHTS_FILE}: {len(weights)} tensors of {part.architecture}"]
        return lines + part.write_beside(folder, tokenizer, dtype)


def write_layout(
    network: nn.Module,
    tensors: Mapping[str, QuantizedTensor],
    output: Path,
    layout: Layout,
    dtype: str = "float16",
    tokenizer: Any = None,
    architecture: str = "the network",
) -> list[str]:
    """Write linear layers in a layout of other tools, all else as plain weights; returns lines as `write_dequantized`.

    Convolutions, embeddings and layers whose shape does not fit stay plain; the layout's configuration lists them.

    Args:
        network, output, dtype, tokenizer, architecture: as in `write_dequantized`.
        tensors: quantized layers of the network by name.
        layout: of the linear layers.

    Raises:
        Refused: the layout cannot hold a layer's grid, no layer's shape fits, or the configuration has no place.
    """
    part = Part(network, architecture)
    if layout.file is None and not part.config:
        raise Refused("the layout needs the config.json of a transformers model, and this network has none inside")
    linear = [name for name, layer in part.module.named_modules() if isinstance(layer, nn.Linear)]
    given = {name: tensors[part.prefix + name] for name in linear if part.prefix + name in tensors}
    held = {name: tensor for name, tensor in given.items() if layout.fits(tensor)}
    if not held:
        raise Refused(
            f"the layout holds Linear layers {layout.shapes}, and this network has none that is quantized: write it "
            "dequantized"
        )
    weights: dict[str, Tensor] = dict(part.module.state_dict())
    buffers: dict[str, Tensor] = {}
    for name, tensor in held.items():
        try:
            layer = layout.buffers(tensor)
        except Refused as error:
            raise Refused(f"the layout cannot hold layer {part.prefix}{name}: {error}") from error
        del weights[f"{name}.weight"]
        buffers |= {f"{name}.{key}": value for key, value in layer.items()}
    weights, quantization = converted(weights, dtype), layout.config(held, linear)
    lines = [f"{WEIGHTS_FILE}: {len(held)} layers as {layout.title} ({_bits(held)}) of {part.architecture}"]
    kinds = Counter(kind_of(find_layer(network, name)) for name in tensors) - Counter(Linear=len(held))
    if kinds:
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        small = [name for name in given if name not in held]
        named = f" (of them Linear: {', '.join(small[:SHOWN])}{', ...' if len(small) > SHOWN else ''})" if small else ""
        lines.append(f"left as {dtype} weights, because the layout has no place for them: {counted}{named}")
    with new_folder(output) as folder:
        save(weights | buffers, folder / WEIGHTS_FILE)
        if layout.file is not None:
            write_json(folder / layout.file, quantization)
        return lines + part.write_beside(folder, tokenizer, dtype, quantization_config=quantization)


def _bits(tensors: Mapping[str, QuantizedTensor]) -> str:
    widths = Counter(int(tensor.width[0]) for tensor in tensors.values())
    return ", ".join(f"{count} of {width} bits" for width, count in sorted(widths.items()))


def converted(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Floating-point tensors in another dtype, by name; whole numbers stay.

    Raises:
        Refused: an entry is beyond the dtype's range.
    """
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if bool((torch.isinf(result[name]) & torch.isfinite(tensor)).any()):
            raise Refused(f"{name} has entries beyond the range of {dtype}: use float32 (--dtype float32)")
    return result


def as_transformers(tokenizer: Any) -> Any:
    """The tokenizer itself, or a tokenizer of the tokenizers library inside one of transformers."""
    if hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    known = {key: token for key, token in special.items() if tokenizer.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file; tied weights, which the format does not know, are written twice."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, file, {"format": "pt"})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output`; on success it becomes `output`, or its files replace those in `output`."""
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
