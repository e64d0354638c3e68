"""Outputs of full-precision networks, computed once for all runs on the same evaluation set and stored in the cache."""

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.evaluation import logits
from bayesq.files import lock
from bayesq.tensor_file import CorruptFile, read_tensors, write_tensors

log = logging.getLogger(__name__)

# Raise when `bayesq.evaluation.logits` changes numerically, so that files of older versions are not read.
FORMAT = "3"


def cached_logits(
    module: nn.Module,
    identity: str,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    cache_dir: Path,
    autocast: str | None = None,
) -> tuple[Tensor, int]:
    """`bayesq.evaluation.logits` of a network, from the cache if they are there; `identity` is `Network.identity`."""
    content = {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": device.type,
        "model": identity,
        "architecture": repr(module),
        "examples": examples.checksum(),
        "batch_size": batch_size,
        "autocast": autocast,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir / "full_precision" / f"{key}.safetensors"
    with lock(path):
        try:
            tensors, metadata = read_tensors(path)
            return tensors["logits"], int(metadata["oom_retries"])
        except FileNotFoundError:
            pass
        except CorruptFile as error:
            log.warning("full-precision cache: %s; computing it again", error)
        computed, retries = logits(module, examples, batch_size, device, "evaluate full precision", autocast)
        write_tensors(path, {"logits": computed}, {"oom_retries": str(retries)})
        return computed, retries
