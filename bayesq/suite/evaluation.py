"""Evaluation: predictions of a network on the evaluation set, and the metrics that compare two of them."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.likelihood import kl_divergence
from bayesq.suite.cache import CorruptCache, read_tensors, write_tensors
from bayesq.suite.files import lock
from bayesq.suite.memory import halving
from bayesq.suite.metrics import ECE_BINS, Metric, difference_interval, measure
from bayesq.suite.models.base import EncodedExamples, count_batches

log = logging.getLogger(__name__)

ACCURACY = (Metric("accuracy", "accuracy"),)
# Raise when `logits` changes numerically, so that cached full-precision logits of older versions are not read.
FORMAT = "3"


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
        autocast: name of the torch dtype of matrix products, see suite.schema; None = float32 throughout.
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
    total = count_batches(examples, batch_size)
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
    identity: str,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    cache_dir: Path,
    autocast: str | None = None,
) -> tuple[Tensor, int]:
    """`logits` of the full-precision network, computed once for all runs on the same evaluation set.

    Args:
        identity: of the network, as `Network.identity`.
    """
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
        except CorruptCache as error:
            log.warning("full-precision cache: %s; computing it again", error)
        computed, retries = logits(module, examples, batch_size, device, "evaluate full precision", autocast)
        write_tensors(path, {"logits": computed}, {"oom_retries": str(retries)})
        return computed, retries


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


def confidence(logit: Tensor) -> Tensor:
    """Probability [n] in float64 of the predicted class, from logits [n, classes]."""
    return torch.softmax(logit.to(torch.float64), dim=1).amax(1)


def autocast_effect(full: Tensor, lower: Tensor, likelihood: str = "categorical") -> dict[str, object]:
    """What evaluation.autocast alone does to the full-precision network, under a key of its own.

    Args:
        full, lower: logits [n, classes] of the same network in float32 and under autocast.
        likelihood: of the outputs.
    """
    return {"autocast/kl_to_float32": float(kl_divergence(full, lower, likelihood).mean())}


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
        flat metrics under the result keys of the contract, and one row per example for predictions.csv; confidences
        are the probabilities of the predicted classes.
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
    if not regression:
        confidences = confidence(full).tolist(), confidence(quantized).tolist()
        for row, fp, q in zip(rows, *confidences, strict=True):
            row |= {"fp_confidence": fp, "q_confidence": q}
    return found, rows


def _correctness(label: int, before: int, after: int) -> dict[str, object]:
    return {"fp_correct": int(before == label), "q_correct": int(after == label)}


def _squared_errors(label: float, before: float, after: float) -> dict[str, object]:
    return {"fp_squared_error": (before - label) ** 2, "q_squared_error": (after - label) ** 2}
