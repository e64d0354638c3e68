"""The interface of all models: a network in evaluation mode, and the encoding of raw examples into batches."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.coverage import parameter_count
from bayesq.files import lock
from bayesq.quant.blocks import find_blocks
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.fingerprint import fingerprint
from bayesq.tensor_file import CorruptFile, digest, read_tensors, write_tensors

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Network:
    """A full-precision network, ready to be calibrated, quantized and evaluated.

    Attributes:
        module: float32, evaluation mode, on the CPU; `module(**batch.inputs)` gives logits [b, classes].
        encode: preprocessing from raw examples to batches.
        description: preprocessing, origin and number of parameters, for the result file; JSON values only.
        blueprint: what `ModelSource.bare` needs besides the settings; JSON values only.
        blocks: names of the parts that run one after the other; if empty, `find_blocks` fills it.
        left_out: names of layers that stay in full precision, besides those of the key layers.exclude.
        checksum: sha256 hex of the module's state (see `state_checksum`).
        identity: sha256 hex of everything that determines the outputs: weights, configuration, code. It is the key of
            all cached results of the network.
    """

    module: nn.Module
    encode: Callable[[Examples], EncodedExamples]
    description: dict[str, object]
    blueprint: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    checksum: str = field(init=False)
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = self.blocks or find_blocks(self.module)
        self.checksum = state_checksum(self.module)
        self.description = {**self.description, "parameters": parameter_count(self.module)}
        # before any forward pass, because some networks then store masks or tables as attributes
        parts = (self.checksum, fingerprint(self.module), json.dumps(self.blueprint, sort_keys=True))
        self.identity = hashlib.sha256("|".join(parts).encode()).hexdigest()


class ModelSource(Protocol):
    """What a `conf/model/*.yaml` instantiates."""

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network for `data`. A part that needs fitting is fitted on `data.train` once and cached."""
        ...

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The architecture of a network from `build` with this blueprint, in evaluation mode, with arbitrary weights.

        Reads neither data nor checkpoints. Without this method, networks cannot be exported as a self-contained file.
        """
        ...


def state_checksum(module: nn.Module) -> str:
    """sha256 hex of names, dtypes, shapes and bytes of the module's parameters and persistent buffers."""
    return digest(module.state_dict())


def initialised(make: Callable[[], Module]) -> Module:
    """The module from `make`, in evaluation mode; the global CPU generator is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        return make().eval()


def fit_once(
    cache_dir: Path, name: str, recipe: Mapping[str, object], fit: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Fitted tensors from the cache, or from `fit` on first use.

    `recipe` (JSON values) holds everything that determines the result. Its hash is part of the file name, so a changed
    recipe never reads old weights. If the file is damaged or has another recipe, `fit` runs again with a warning.
    Processes that need the same entry wait for the first one.
    """
    text = json.dumps(recipe, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    path = cache_dir / "models" / f"{name}-{key[:16]}.safetensors"
    with lock(path):
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("recipe") == text:
                return tensors
            logger.warning("%s is of another recipe; fitting again", path)
        except FileNotFoundError:
            pass
        except CorruptFile as error:
            logger.warning("%s; fitting again", error)
        tensors = fit()
        write_tensors(path, tensors, {"recipe": text})
        return tensors
