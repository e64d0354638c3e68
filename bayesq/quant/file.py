"""The packed file: quantized tensors, changed parameters, and a record of where they come from.

A packed file needs the network that was quantized: what is not quantized (norms, biases, heads) is not in it, except
what correction or distillation changed. A self-contained file contains the rest of the network too.

The header, one JSON text, holds a digest over everything else and under "metadata"
    layers   shapes and the like, see `bayesq.quant.packing`
    run      the record of a run, see `bayesq.suite.packed`; absent in files that no run wrote

Sizes: after the header come buffers only, without gaps. With h the header's length, stored in the first 8 bytes,

    file size - 8 - h = bytes/packed + bytes/parameters,     bits/stored = 8 bytes/packed / quantized weights

where bytes/parameters are the changed biases and norm parameters: every method ships those in full precision, so they
take no bits of the quantized weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayesq.quant.accounting import buffer_bytes
from bayesq.quant.network import fill
from bayesq.quant.packing import PARAMETER_PREFIX, STATE_PREFIX, pack_model, parsed, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.tensor_file import CorruptFile, read_tensors, write_tensors


@dataclass(frozen=True)
class Packed:
    """What a packed file holds.

    Attributes:
        tensors: by layer.
        parameters: changed biases and norm parameters, by state_dict name.
        state: of a self-contained file all that is not quantized, by state_dict name; else empty.
        run: the record of the run that wrote it; else empty.
    """

    tensors: dict[str, QuantizedTensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a packed file's buffers: those of quantized layers, and changed parameters."""

    packed: int
    parameters: int


def write_packed(path: Path, packed: Packed) -> Sizes:
    """Write a packed file, atomically, and return the sizes of its buffers.

    Raises:
        ValueError: names of layers or codebooks clash.
    """
    buffers, header = pack_model(packed.tensors)
    parameters = {PARAMETER_PREFIX + name: value for name, value in packed.parameters.items()}
    state = {STATE_PREFIX + name: value for name, value in packed.state.items()}
    if packed.run:
        header["run"] = json.dumps(packed.run, sort_keys=True)
    write_tensors(path, buffers | parameters | state, header)
    return Sizes(buffer_bytes(buffers), buffer_bytes(parameters))


def read_packed(path: str | Path) -> Packed:
    """Read and check a packed file; the record of the run is not checked.

    The digest detects damage. Anyone can compute a new digest, so the parts of the file are also checked against each
    other.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: it is damaged, contradicts itself, or is no packed file.
    """
    path = Path(path)
    try:
        buffers, header = read_tensors(path)
        tensors = unpack_model(buffers, header)
        if unknown := sorted(set(header) - {"layers", "run"}):
            raise ValueError(f"header: {unknown[0]!r:.60} is not part of the format")
        run = parsed(header, "run") if "run" in header else {}
        if "run" in header and not run:
            raise ValueError("header: run is empty")
    except (ValueError, RecursionError) as error:
        raise untrusted(path, error) from error
    return Packed(tensors, _behind(PARAMETER_PREFIX, buffers), _behind(STATE_PREFIX, buffers), run)


def untrusted(path: Path, error: Exception) -> CorruptFile:
    """The error for a file whose content is wrong, in one line."""
    return CorruptFile(f"{path} is no packed file that can be trusted: {' '.join(str(error).split())}")


def _behind(prefix: str, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in buffers.items() if name.startswith(prefix)}


def fill_from(module: nn.Module, packed: Packed, path: Path) -> None:
    """`fill` from a file of any origin.

    Raises:
        CorruptFile: its layers or parameters are not the module's.
    """
    try:
        fill(module, packed.tensors, packed.parameters)
    except ValueError as error:
        raise CorruptFile(f"{path} does not fit its network: {error}") from error
