"""Outputs of full-precision networks, computed once for all runs on the same examples and stored in the cache."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.evaluation import logits
from bayesq.files import lock
from bayesq.suite.zeroshot import ZeroShot
from bayesq.tensor_file import CorruptFile, read_tensors, write_tensors

log = logging.getLogger(__name__)

# Raise when `bayesq.evaluation.logits` or `ZeroShot.score` changes numerically, so that no file of an older version is
# read.
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
        "model": identity,
        "architecture": repr(module),
        "examples": examples.checksum(),
        "batch_size": batch_size,
        "autocast": autocast,
    }

    def compute() -> tuple[dict[str, Tensor], int]:
        computed, retries = logits(module, examples, batch_size, device, "evaluate full precision", autocast)
        return {"logits": computed}, retries

    tensors, retries = _cached(content, device, cache_dir, compute)
    return tensors["logits"], retries


def cached_scores(
    zeroshot: ZeroShot, module: nn.Module, identity: str, cache_dir: Path, pairs: Sequence[tuple[str, str]], label: str
) -> tuple[Tensor, Tensor]:
    """`zeroshot.score(module, pairs, label)`, from the cache if it is there; `identity` is `Network.identity`."""
    content = {
        "model": identity,
        "tokens": [zeroshot.tokens(*pair) for pair in pairs],
        "batch_size": zeroshot.batch_size,
    }

    def compute() -> tuple[dict[str, Tensor], int]:
        return dict(zip(("scores", "greedy"), zeroshot.score(module, pairs, label), strict=True)), 0

    tensors, _ = _cached(content, zeroshot.device, cache_dir, compute)
    return tensors["scores"], tensors["greedy"]


def _cached(
    content: Mapping[str, Any],
    device: torch.device,
    cache_dir: Path,
    compute: Callable[[], tuple[dict[str, Tensor], int]],
) -> tuple[dict[str, Tensor], int]:
    """Tensors, and how often memory ran out, from the file of this `content`, or from `compute` on first use."""
    content = {"format": FORMAT, "torch": torch.__version__, "device": device.type, **content}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir / "full_precision" / f"{key}.safetensors"
    with lock(path):
        try:
            tensors, metadata = read_tensors(path)
            return tensors, int(metadata["oom_retries"])
        except FileNotFoundError:
            pass
        except CorruptFile as error:
            log.warning("full-precision cache: %s; computing it again", error)
        tensors, retries = compute()
        write_tensors(path, tensors, {"oom_retries": str(retries)})
        return tensors, retries
