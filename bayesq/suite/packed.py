"""The packed file of a run, results/<run_id>/quantized.safetensors, and the record of the run in it.

The record has the run_id, the version of bayesq, the settings that determine the result, the checksum of the
full-precision weights, and in self-contained files the network's blueprint. Equal runs write equal files on every
machine. `bayesq.quant.file` defines the file itself.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import bayesq
from bayesq.quant.file import Packed, read_packed, untrusted
from bayesq.suite.config import id_of, resolved, settings_that_matter
from bayesq.suite.models.base import Network

RUN_KEYS = ("bayesq", "config", "network", "run_id")


def run_record(cfg: DictConfig, network: Network) -> dict[str, Any]:
    """What a packed file says about its run."""
    config = settings_that_matter(resolved(cfg))
    return {
        "run_id": id_of(config, bayesq.__version__),
        "bayesq": bayesq.__version__,
        "config": config,
        "network": {"weights": network.checksum},
    }


def read_run(path: Path) -> Packed:
    """Read a packed file and check its record, if it has one.

    Raises FileNotFoundError, or CorruptFile if the file is damaged, contradicts itself, or is no packed file.
    """
    packed = read_packed(path)
    try:
        if packed.run:
            _check_run(packed.run)
    except (ValueError, RecursionError) as error:
        raise untrusted(path, error) from error
    return packed


def _check_run(run: dict[str, Any]) -> None:
    """Raise ValueError if `run_record` could not have written this record."""
    config, network = run.get("config"), run.get("network")
    if sorted(run) != list(RUN_KEYS) or not isinstance(config, dict) or not isinstance(network, dict):
        raise ValueError(f"header: run needs {', '.join(RUN_KEYS)}, and config and network are mappings")
    if not all(isinstance(text, str) for text in (run["bayesq"], run["run_id"], network.get("weights"))):
        raise ValueError("header: the version, the run_id and the checksum of the weights must be strings")
    if run["run_id"] != id_of(config, run["bayesq"]):
        raise ValueError(f"header: run_id {run['run_id']:.20} does not belong to the config")
