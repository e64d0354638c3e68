"""Evaluation: predictions of a network on the evaluation set, and the metrics that compare two of them."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.likelihood import kl_divergence
from bayesq.suite.cache import CorruptCache, lock, read_tensors, write_tensors
from bayesq.suite.metrics import Metric, difference_interval, measure
from bayesq.suite.models.base import EncodedExamples

log = logging.getLogger(__name__)

ECE_BINS = 15
ACCURACY = (Metric("accuracy", "accuracy"),)
# Raise when `logits` changes numerically, so that cached full-precision logits of older versions are not read.
FORMAT = "1"


@torch.no_grad()
def logits(module: nn.Module, examples: EncodedExamples, batch_size: int, device: torch.device, label: str) -> Tensor:
    """Logits [n, classes] float32 on the CPU, in the order of the examples.

    Args:
        label: what the progress bar says.
    """
    total = -(-len(examples) // batch_size)
    collected: Tensor | None = None
    for batch in tqdm(examples.batches(batch_size, device), total=total, desc=label, disable=None, leave=False):
        out = module(**batch.inputs).float().cpu()
        if collected is None:
            collected = out.new_empty(len(examples), out.shape[1])
        collected[batch.index] = out
    if collected is None:
        raise ValueError("there is no example to evaluate")
    return collected


def cached_logits(
    module: nn.Module,
    network_checksum: str,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    cache_dir: Path,
) -> Tensor:
    """`logits` of the full-precision network, computed once for all runs on the same evaluation set."""
    content = {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": device.type,
        "model": network_checksum,
        "architecture": repr(module),
        "examples": examples.checksum(),
        "batch_size": batch_size,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir / "full_precision" / f"{key}.safetensors"
    with lock(path):
        try:
            return read_tensors(path)[0]["logits"]
        except FileNotFoundError:
            pass
        except CorruptCache as error:
            log.warning("full-precision cache: %s; computing it again", error)
        computed = logits(module, examples, batch_size, device, "evaluate full precision")
        write_tensors(path, {"logits": computed})
        return computed


def negative_log_likelihood(logit: Tensor, labels: Tensor, likelihood: str = "categorical") -> float:
    """Mean -log p(label) in nats, for the Gaussian the density of unit variance."""
    if likelihood == "gaussian":
        squared = (logit[:, 0].to(torch.float64) - labels.to(torch.float64)).square()
        return float(squared.mean() + math.log(2 * math.pi)) / 2
    return float(torch.nn.functional.cross_entropy(logit.to(torch.float64), labels))


def expected_calibration_error(logit: Tensor, labels: Tensor) -> float:
    """ECE with 15 equal-width confidence bins (Guo et al., arXiv 1706.04599, section 3)."""
    confidence, predicted = torch.softmax(logit.to(torch.float64), dim=1).max(1)
    correct = (predicted == labels).to(torch.float64)
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gap = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return float(gap.abs().sum() / len(labels))


def compare(
    full: Tensor,
    quantized: Tensor,
    labels: Tensor,
    seed: int,
    metrics: Sequence[Metric] = ACCURACY,
    likelihood: str = "categorical",
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """All metrics of a quantized network against its full-precision original.

    What a regression head has no meaning for is null: q/agreement, q/ece and fp/ece.

    Args:
        full, quantized: logits [n, classes], or [n, 1] of a regression head.
        labels: [n].
        seed: of the bootstrap.
        metrics: of the task.
        likelihood: of the outputs, "categorical" or "gaussian".

    Returns:
        flat metrics under the result keys of the contract, and one row per example for predictions.csv.
    """
    regression = likelihood == "gaussian"
    before, after = (x[:, 0] if regression else x.argmax(1) for x in (full, quantized))
    kl = kl_divergence(full, quantized, likelihood)
    first, second, truth = (x.to(torch.float64).numpy() for x in (before, after, labels))
    found: dict[str, object] = {}
    for metric in metrics:
        fp, q = measure(metric, first, truth), measure(metric, second, truth)
        interval = difference_interval(metric, first, second, truth, seed)
        found |= {
            f"fp/{metric.name}": fp,
            f"q/{metric.name}": q,
            f"delta/{metric.name}": q - fp,
            f"delta/{metric.name}/ci95": None if interval is None else list(interval),
        }
    found |= {
        "q/kl_to_fp": float(kl.mean()),
        "q/agreement": None if regression else float((before == after).double().mean()),
        "q/nll": negative_log_likelihood(quantized, labels, likelihood),
        "q/ece": None if regression else expected_calibration_error(quantized, labels),
        "fp/nll": negative_log_likelihood(full, labels, likelihood),
        "fp/ece": None if regression else expected_calibration_error(full, labels),
    }
    score = _squared_errors if regression else _correctness
    shown = [round(label, 6) for label in labels.tolist()] if regression else labels.tolist()
    rows: list[dict[str, object]] = [
        {"label": label, "fp_prediction": x, "q_prediction": y, **score(label, x, y), "kl": divergence}
        for label, x, y, divergence in zip(shown, before.tolist(), after.tolist(), kl.tolist(), strict=True)
    ]
    return found, rows


def _correctness(label: int, before: int, after: int) -> dict[str, object]:
    return {"fp_correct": int(before == label), "q_correct": int(after == label)}


def _squared_errors(label: float, before: float, after: float) -> dict[str, object]:
    return {"fp_squared_error": (before - label) ** 2, "q_squared_error": (after - label) ** 2}
