"""The packed file of a run: quantized tensors, changed parameters, and the run they come from.

`quantized.safetensors` of a run needs the network that was quantized: what is not quantized (norms, biases, heads) is
not in it, save what correction or distillation changed. A self-contained file has all of that as well.

The header, one JSON text, holds a digest over everything else and under "metadata"
    layers   shapes and the like, see `bayesq.quant.packing`
    run      run_id, the version of bayesq, the settings that determine the result (not where it was run or logged, so
             that equal runs make equal files), and the network: the checksum of its full-precision weights and, in
             self-contained files, what its architecture cannot be built without

Sizes: everything behind the header is buffers, without a gap. With h the header's length, told by the first 8 bytes,

    file size - 8 - h = bytes/packed + bytes/parameters,     bits/stored = 8 bytes/packed / quantized weights

where bytes/parameters are the changed biases and norm parameters: every method ships those in full precision, so they
take no bits of the quantized weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import bayesq
from bayesq.quant.accounting import buffer_bytes
from bayesq.quant.layers import find_layer, matrix_to_weight, weight_key, weight_to_matrix
from bayesq.quant.packing import PARAMETER_PREFIX, STATE_PREFIX, pack_model, parsed, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.suite.cache import CorruptCache, read_tensors, write_tensors
from bayesq.suite.config import determines_result, id_of, one_line
from bayesq.suite.models.base import Network

RUN_KEYS = ("bayesq", "config", "network", "run_id")


@dataclass(frozen=True)
class Packed:
    """What a packed file holds.

    Attributes:
        tensors: by layer.
        parameters: changed biases and norm parameters, by state_dict name.
        state: of a self-contained file all that is not quantized, by state_dict name; else empty.
        run: `run_record`; empty in files of versions that kept none.
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


def run_record(cfg: DictConfig, network: Network) -> dict[str, Any]:
    """What a packed file says about its run: nothing that differs between runs of equal results."""
    config = determines_result(cfg)
    return {
        "run_id": id_of(config, bayesq.__version__),
        "bayesq": bayesq.__version__,
        "config": config,
        "network": {"weights": network.checksum},
    }


def write_packed(path: Path, packed: Packed) -> Sizes:
    """Write a packed file, atomically, and tell what its buffers take.

    Raises:
        ValueError: names of layers or codebooks clash.
    """
    buffers, header = pack_model(packed.tensors)
    more = {PARAMETER_PREFIX + name: value for name, value in packed.parameters.items()}
    rest = {STATE_PREFIX + name: value for name, value in packed.state.items()}
    if packed.run:
        header["run"] = json.dumps(packed.run, sort_keys=True)
    write_tensors(path, buffers | more | rest, header)
    return Sizes(buffer_bytes(buffers), buffer_bytes(more))


def read_packed(path: Path) -> Packed:
    """Read and check a packed file.

    The digest finds damage. A digest can be made anew, so everything the file says is checked against the rest of it
    as well: what is returned has one meaning.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCache: it is damaged, contradicts itself, or is no packed file.
    """
    try:
        buffers, header = read_tensors(path)
        tensors = unpack_model(buffers, header)
        if unknown := sorted(set(header) - {"layers", "run"}):
            raise ValueError(f"header: {unknown[0]!r:.60} is not part of the format")
        run = _checked_run(parsed(header, "run")) if "run" in header else {}
    except (ValueError, RecursionError) as error:
        raise CorruptCache(f"{path} is no packed file that can be trusted: {one_line(str(error))}") from error
    return Packed(tensors, _behind(PARAMETER_PREFIX, buffers), _behind(STATE_PREFIX, buffers), run)


def _behind(prefix: str, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in buffers.items() if name.startswith(prefix)}


def _checked_run(run: dict[str, Any]) -> dict[str, Any]:
    """`run`, if it is what `run_record` makes.

    Raises:
        ValueError: a part is missing, of another kind, or does not belong to the others.
    """
    config, network = run.get("config"), run.get("network")
    if sorted(run) != list(RUN_KEYS) or not isinstance(config, dict) or not isinstance(network, dict):
        raise ValueError(f"header: run needs {', '.join(RUN_KEYS)}, two of them with keys of their own")
    if not all(isinstance(text, str) for text in (run["bayesq"], run["run_id"], network.get("weights"))):
        raise ValueError("header: the version, the run_id and the checksum of the weights are texts")
    if run["run_id"] != id_of(config, run["bayesq"]):
        raise ValueError(f"header: run_id {run['run_id']:.20} is not that of the config")
    return run


def fill(
    module: nn.Module, tensors: Mapping[str, QuantizedTensor], parameters: Mapping[str, Tensor] | None = None
) -> None:
    """Replace layers' weights by what their QuantizedTensors stand for, and `parameters` by state_dict name.

    Raises:
        ValueError: the module has no such layer or parameter, or one of another shape or dtype. It stays as it was.
    """
    layers = {name: find_layer(module, name) for name in tensors}
    state = module.state_dict() if parameters else {}
    for name, tensor in tensors.items():
        shape = list(weight_to_matrix(layers[name]).shape)
        if shape != [tensor.groups, len(tensor.codes) // tensor.groups, tensor.codes.shape[1]]:
            raise ValueError(f"layer {name} has groups, rows and columns {shape}, not those of its codes")
    quantized = {weight_key(name, layer) for name, layer in layers.items()}
    for name, value in (parameters or {}).items():
        if name not in state or name in quantized:
            raise ValueError(f"the network has no parameter {name:.100} beside its quantized weights")
        if state[name].shape != value.shape or state[name].dtype != value.dtype:
            raise ValueError(f"parameter {name} has another shape or dtype in the network")
    for name, tensor in tensors.items():
        with torch.no_grad():
            layers[name].weight.copy_(matrix_to_weight(layers[name], tensor.dequantize()))
    if parameters:
        module.load_state_dict(dict(parameters), strict=False)
