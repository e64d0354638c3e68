"""Quantized networks from their packed files.

The file of a run, results/<run_id>/quantized.safetensors, holds the quantized tensors. The rest is loaded again, as the
run's settings say, and the checksum of the weights is compared. A self-contained file
(`python -m bayesq.suite.export ... --to packed`) needs nothing else.

A file may come from an untrusted person. So it can only name classes of the suite and of packages that the caller
trusts, and Hydra, which would resolve interpolations and names inside the settings, is not used.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayesq.defaults import DESCRIPTIVE, suggestion
from bayesq.quant.file import Packed, fill_from
from bayesq.quant.layers import weight_keys
from bayesq.quant.network import fill
from bayesq.suite.config import flatten, one_line, resolve_cache_dir
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network
from bayesq.suite.packed import read_run
from bayesq.tensor_file import CorruptFile

# Modules whose classes a file may name.
NAMEABLE = ("bayesq.suite.models.", "bayesq.suite.datasets.")


def load_quantized(
    path: str | Path,
    settings: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    trusted: Sequence[str] = (),
) -> nn.Module:
    """The network that a run evaluated: its outputs are the run's, bit for bit, on the same machine.

    It takes preprocessed inputs: `source.model` in the run's result.json has the size, mean and standard deviation of
    images, or the maximum length of texts.

    Args:
        path: `quantized.safetensors` of a run, or a self-contained file.
        settings: changed settings, such as {"model.checkpoint": "/new/place"}; relative paths are taken from the
            current folder. The weights must still be those of the run.
        cache_dir: as the config key; holds what the run trained or downloaded.
        trusted: further packages, such as "mypackage", whose models and data sets the file may name.

    Returns:
        The module in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: it is damaged, contradicts itself, or has no settings.
        UserError: the full-precision network is missing, or has other weights.
    """
    path = Path(path)
    packed = read_run(path)
    if packed.state:
        return self_contained(packed, path, trusted)
    network = base_network(packed, path, settings or {}, cache_dir, trusted)
    fill_from(network.module, packed, path)
    return network.module


def base_network(
    packed: Packed, path: Path, settings: Mapping[str, Any], cache_dir: str | None, trusted: Sequence[str] = ()
) -> Network:
    """The full-precision network that was quantized, loaded as the run did; arguments as in `load_quantized`.

    Raises:
        CorruptFile: the file has no settings, or they describe no network.
        UserError: data or weights are missing, or the weights are not those of the run.
    """
    config = changed(_config(packed, path), settings)
    cache = resolve_cache_dir(cache_dir)
    where = f"{path}: the network that was quantized cannot be loaded"
    with _explained(where):
        data = source(config, "dataset", trusted).load(cache)
        network: Network = source(config, "model", trusted).build(data, cache)
    expected = packed.run["network"]["weights"]
    if network.checksum != expected:
        raise UserError(
            f"{where}: its weights have changed (sha256 {network.checksum[:12]}..., the run had {expected[:12]:.12}...)"
        )
    return network


def self_contained(packed: Packed, path: Path, trusted: Sequence[str] = ()) -> nn.Module:
    """The network of a self-contained file.

    Raises:
        CorruptFile: the file's tensors are not those of the network that it describes.
        UserError: its kind of model cannot be built without data.
    """
    config, blueprint = _config(packed, path), packed.run["network"].get("blueprint")
    with _explained(f"{path}: its network cannot be built"):
        model = source(config, "model", trusted)
        if not hasattr(model, "bare"):
            raise UserError(f"model={config['model'].get('name')} has no method `bare`")
        with torch.device("meta"):  # compare the sizes before memory is allocated
            _check_state(model.bare(blueprint), packed)
        module: nn.Module = model.bare(blueprint)
        module.load_state_dict(packed.state, strict=False)
        fill(module, packed.tensors)
    return module.eval()


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Put `where` before the message of any error: a file can hold any arguments, and constructors raise anything."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        raise CorruptFile(f"{where}: {type(error).__name__}, {one_line(str(error))[:200]}") from error


def _check_state(module: nn.Module, packed: Packed) -> None:
    """Raise ValueError unless the file has every tensor of the network once, and no other."""
    if packed.parameters:
        raise ValueError("changed parameters belong to files that are not self-contained")
    weights = weight_keys(module, packed.tensors)
    expected = module.state_dict()
    for name in [*expected, *packed.state, *weights]:
        if (name in packed.state) + (name in weights) != 1 or name not in expected:
            raise ValueError(f"{name:.100} is missing, given twice, or not part of the network")
        given = packed.state.get(name)
        if given is not None and (given.shape != expected[name].shape or given.dtype != expected[name].dtype):
            raise ValueError(f"{name} has another shape or dtype in the network")


def _config(packed: Packed, path: Path) -> dict[str, Any]:
    """The settings of the run; raises CorruptFile if the file has none."""
    if not packed.run:
        raise CorruptFile(
            f"{path} has no settings of a run. A file of report.save: `packed = bayesq.quant.file.read_packed(path)`, "
            "then `bayesq.quant.network.fill(network, packed.tensors, packed.parameters)`. A file of an earlier "
            "version: make the run again (force=true)"
        )
    config: dict[str, Any] = packed.run["config"]
    return config


def changed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with other values under some dotted keys; UserError if there is no such key."""
    copied = deepcopy(dict(config))
    known = flatten(copied)
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"unknown key '{key}'{suggestion(key, known)}")
        *parents, last = key.split(".")
        reduce(getitem, parents, copied)[last] = value
    return copied


def source(config: Mapping[str, Any], group: str, trusted: Sequence[str]) -> Any:
    """The model or data set of a file's settings.

    Raises:
        UserError: the class does not exist, or a file may not name it.
        TypeError, ValueError: the class does not take these arguments.
    """
    node = config.get(group)
    target = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(node, dict) or not isinstance(target, str):
        raise ValueError(f"the settings have no {group} with a _target_")
    module, _, name = target.rpartition(".")
    if not f"{module}.".startswith((*NAMEABLE, *(f"{package}." for package in trusted))):
        raise UserError(
            f"{group}._target_={target:.100} is no class of the suite: name its package in `trusted` (export: --trust)"
        )
    arguments = {key: value for key, value in node.items() if key not in (*DESCRIPTIVE, "_target_")}
    if any(part.startswith("_") for key in flatten(arguments) for part in key.split(".")):
        raise UserError(f"{group}: keys that begin with an underscore have no place in a file")
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{group}._target_={target:.100}: there is no such module") from error
    if not isinstance(kind, type) or kind.__module__ != module:
        raise UserError(f"{group}._target_={target:.100} is no class of that module")
    return kind(**arguments)
