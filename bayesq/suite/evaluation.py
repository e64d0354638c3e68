"""Evaluation: predictions of a network on the evaluation set, and the metrics that compare two of them."""

import hashlib
import json
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.suite.cache import CorruptCache, lock, read_tensors, write_tensors
from bayesq.suite.memory import halving
from bayesq.suite.models.base import EncodedExamples

log = logging.getLogger(__name__)

ECE_BINS = 15
BOOTSTRAP_RESAMPLES = 10_000
# Raise when `logits` changes numerically, so that cached full-precision logits of older versions are not read.
FORMAT = "2"


@torch.no_grad()
def logits(
    module: nn.Module,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    label: str,
    autocast: str | None = None,
) -> tuple[Tensor, int]:
    """Logits [n, classes] float32 on the CPU, in the order of the examples, and how often memory ran out before.

    Args:
        label: what the progress bar says.
        autocast: name of the torch dtype of matrix products, see config.AUTOCAST; None = float32 throughout.
    """
    return halving(batch_size, partial(_logits, module, examples, device, label, autocast), label)


def _logits(
    module: nn.Module,
    examples: EncodedExamples,
    device: torch.device,
    label: str,
    autocast: str | None,
    batch_size: int,
) -> Tensor:
    total = -(-len(examples) // batch_size)
    collected: Tensor | None = None
    lower = nullcontext() if autocast is None else torch.autocast(device.type, getattr(torch, autocast))
    for batch in tqdm(examples.batches(batch_size, device), total=total, desc=label, disable=None, leave=False):
        with lower:
            out = module(**batch.inputs).float()
        if collected is None:
            collected = out.new_empty(len(examples), out.shape[1])
        collected[batch.index.to(device)] = out  # stays on the device: fetching each batch would wait for it
    if collected is None:
        raise ValueError("there is no example to evaluate")
    return collected.cpu()


def cached_logits(
    module: nn.Module,
    network_checksum: str,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    cache_dir: Path,
    autocast: str | None = None,
) -> tuple[Tensor, int]:
    """`logits` of the full-precision network, computed once for all runs on the same evaluation set."""
    content = {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": device.type,
        "model": network_checksum,
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
        except CorruptCache as error:
            log.warning("full-precision cache: %s; computing it again", error)
        computed, retries = logits(module, examples, batch_size, device, "evaluate full precision", autocast)
        write_tensors(path, {"logits": computed}, {"oom_retries": str(retries)})
        return computed, retries


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(p_reference || p_other) of each example in nats, [n] float64, from logits [n, classes]."""
    p, q = (torch.log_softmax(x.to(torch.float64), dim=1) for x in (reference, other))
    return (p.exp() * (p - q)).sum(1)


def negative_log_likelihood(logit: Tensor, labels: Tensor) -> float:
    """Mean -log p(label) in nats."""
    return float(torch.nn.functional.cross_entropy(logit.to(torch.float64), labels))


def expected_calibration_error(logit: Tensor, labels: Tensor) -> float:
    """ECE with 15 equal-width confidence bins (Guo et al., arXiv 1706.04599, section 3)."""
    confidence, predicted = torch.softmax(logit.to(torch.float64), dim=1).max(1)
    correct = (predicted == labels).to(torch.float64)
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gap = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return float(gap.abs().sum() / len(labels))


def bootstrap_interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences [n], by resampling examples with replacement.

    Differences of accuracies take the three values -1, 0 and 1, so a resample is a multinomial draw over the distinct
    values: the same distribution as drawing n indices, without an n x resamples table.
    """
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        len(differences), counts / len(differences), size=BOOTSTRAP_RESAMPLES
    )
    low, high = np.percentile(drawn @ values / len(differences), [2.5, 97.5])
    return float(low), float(high)


def autocast_effect(full: Tensor, lower: Tensor) -> dict[str, object]:
    """What evaluation.autocast alone does to the full-precision network, under keys of its own.

    Args:
        full, lower: logits [n, classes] of the same network in float32 and under autocast.
    """
    return {
        "autocast/kl_to_float32": float(kl_divergence(full, lower).mean()),
        "autocast/agreement": float((full.argmax(1) == lower.argmax(1)).double().mean()),
    }


def compare(
    full: Tensor, quantized: Tensor, labels: Tensor, seed: int
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """All metrics of a quantized classifier against its full-precision original.

    Args:
        full, quantized: logits [n, classes].
        labels: [n].
        seed: of the bootstrap.

    Returns:
        flat metrics under the result keys of the contract, and one row per example for predictions.csv.
    """
    predicted_full, predicted = full.argmax(1), quantized.argmax(1)
    correct_full, correct = predicted_full == labels, predicted == labels
    kl = kl_divergence(full, quantized)
    fp, q = float(correct_full.double().mean()), float(correct.double().mean())
    interval = bootstrap_interval((correct.int() - correct_full.int()).numpy(), seed)
    metrics: dict[str, object] = {
        "fp/accuracy": fp,
        "q/accuracy": q,
        "delta/accuracy": q - fp,
        "delta/accuracy/ci95": list(interval),
        "q/kl_to_fp": float(kl.mean()),
        "q/agreement": float((predicted_full == predicted).double().mean()),
        "q/nll": negative_log_likelihood(quantized, labels),
        "q/ece": expected_calibration_error(quantized, labels),
        "fp/nll": negative_log_likelihood(full, labels),
        "fp/ece": expected_calibration_error(full, labels),
    }
    rows: list[dict[str, object]] = [
        {
            "label": label,
            "fp_prediction": before,
            "q_prediction": after,
            "fp_correct": int(before == label),
            "q_correct": int(after == label),
            "kl": divergence,
        }
        for label, before, after, divergence in zip(
            labels.tolist(), predicted_full.tolist(), predicted.tolist(), kl.tolist(), strict=True
        )
    ]
    return metrics, rows
