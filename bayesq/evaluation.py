"""Evaluation: both networks' outputs are reduced, batch by batch, to rows of numbers per example, and rows to metrics.

If a network has few outputs, those of the full-precision network are computed once and stored. A language model has too
many outputs to store: then both networks run on the same batches. Memory holds the outputs of one batch and a few
numbers per example.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.batches import Batch, EncodedExamples, count_batches
from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.memory import halving
from bayesq.metrics import ECE_BINS, Metric, difference_interval, measure

# Numbers of each example by name, [n] on the CPU.
Rows = dict[str, Tensor]
# Outputs of the full-precision and of the quantized network on a batch.
Pair = tuple[Tensor, Tensor, Batch]
# Columns of predictions.csv if an example has one label, and if it is a sequence. Columns without numbers are left out.
EXAMPLE_COLUMNS = (
    "label",
    "fp_prediction",
    "q_prediction",
    "fp_correct",
    "q_correct",
    "fp_squared_error",
    "q_squared_error",
    "kl",
    "fp_confidence",
    "q_confidence",
)
SEQUENCE_COLUMNS = ("predictions", "fp_nll", "q_nll", "fp_correct", "q_correct", "agreement", "kl")


def _forward(module: nn.Module, batch: Batch, device: torch.device, autocast: str | None) -> Tensor:
    """Outputs of a batch in float32, on the device."""
    lower = nullcontext() if autocast is None else torch.autocast(device.type, getattr(torch, autocast))
    with torch.no_grad(), lower:
        outputs: Tensor = module(**batch.inputs).float()
    return outputs


def outputs_of(
    module: nn.Module,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    label: str,
    autocast: str | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """A network's outputs [b, ...] float32 on the device, batch by batch.

    Args:
        label: of the progress bar.
        autocast: name of the torch dtype of matrix products, see conf/config.yaml; None = float32 throughout.
    """
    total = count_batches(examples, batch_size)
    for batch in tqdm(examples.batches(batch_size, device), total=total, desc=label, disable=None, leave=False):
        yield _forward(module, batch, device, autocast), batch


def logits(
    module: nn.Module,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    label: str,
    autocast: str | None = None,
) -> tuple[Tensor, int]:
    """All outputs [n, ...] float32 on the CPU, in the order of the examples, and how often memory ran out.

    Args:
        label, autocast: as in `outputs_of`.
    """

    def attempt(size: int) -> Tensor:
        collected: Tensor | None = None
        for out, batch in outputs_of(module, examples, size, device, label, autocast):
            if collected is None:
                collected = out.new_empty(len(examples), *out.shape[1:])
            collected[batch.index.to(device)] = out  # on the device: copying each batch to the CPU would wait for it
        if collected is None:
            raise Refused("there is no example to evaluate")
        return collected.cpu()

    return halving(batch_size, attempt, label)


def pairs(
    full: Tensor | nn.Module,
    quantized: nn.Module,
    examples: EncodedExamples,
    batch_size: int,
    device: torch.device,
    label: str,
    autocast: str | None = None,
) -> Iterator[Pair]:
    """The outputs of both networks, batch by batch: on the CPU if those of the first are stored, else on the device.

    Args:
        full: stored outputs [n, ...] of the full-precision network, or that network.
        label, autocast: as in `outputs_of`.
    """
    on_cpu = isinstance(full, Tensor) or device.type == "mps"  # MPS has no float64
    place = torch.device("cpu") if on_cpu else device
    for out, batch in outputs_of(quantized, examples, batch_size, device, label, autocast):
        reference = full[batch.index] if isinstance(full, Tensor) else _forward(full, batch, device, autocast)
        yield reference.to(place), out.to(place), batch


def batch_rows(full: Tensor, quantized: Tensor, batch: Batch, likelihood: Likelihood) -> Rows:
    """The numbers that evaluation keeps of the examples of a batch, [b] each.

    kl and agreement compare the two networks; predictions counts an example's predictions; label is there if an example
    has one. The prefixes fp_ and q_ mark what `Likelihood.summary` returns for each network.

    Args:
        full, quantized: outputs [b, ...] on one device.
    """
    mask, target = likelihood.counted(batch.inputs), likelihood.target(batch.inputs, batch.labels).to(full.device)
    mask = None if mask is None else mask.to(full.device)
    rows = {"kl": likelihood.kl(full, quantized, mask), "predictions": likelihood.predictions(full, mask)}
    if (agreement := likelihood.agreement(full, quantized, mask)) is not None:
        rows["agreement"] = agreement
    if target.dim() == 1:
        rows["label"] = target
    for prefix, outputs in (("fp", full), ("q", quantized)):
        rows |= {f"{prefix}_{name}": values for name, values in likelihood.summary(outputs, target, mask).items()}
    return rows


def collect_rows(both: Iterable[Pair], count: int, likelihood: Likelihood) -> Rows:
    """`batch_rows` of all `count` examples, in their order.

    Raises:
        Refused: there is none.
    """
    collected: Rows = {}
    for full, quantized, batch in both:
        for name, values in batch_rows(full, quantized, batch, likelihood).items():
            if name not in collected:
                collected[name] = torch.empty(count, dtype=values.dtype)
            collected[name][batch.index] = values.cpu()
    if not collected:
        raise Refused("there is no example to evaluate")
    return collected


def paired_rows(
    full: Tensor | nn.Module,
    quantized: nn.Module,
    examples: EncodedExamples,
    likelihood: Likelihood,
    batch_size: int,
    device: torch.device,
    label: str,
    autocast: str | None = None,
) -> tuple[Rows, int]:
    """`collect_rows` of all examples, and how often memory ran out; arguments as in `pairs`."""

    def attempt(size: int) -> Rows:
        both = pairs(full, quantized, examples, size, device, label, autocast)
        return collect_rows(both, len(examples), likelihood)

    return halving(batch_size, attempt, label)


def compare(rows: Rows, seed: int, metrics: Sequence[Metric]) -> dict[str, object]:
    """All metrics of a quantized network against its full-precision original, under the contract's result keys.

    q/agreement, q/ece and fp/ece are None for a regression.

    Args:
        rows: of `collect_rows`.
        seed: of the bootstrap over examples.
        metrics: of the task.
    """
    result: dict[str, object] = {}
    for metric in metrics:
        of_network, of_example = metric.reads
        first, second, shared = (
            rows[name].to(torch.float64).numpy() for name in (f"fp_{of_network}", f"q_{of_network}", of_example)
        )
        fp, q = measure(metric, first, shared), measure(metric, second, shared)
        interval = difference_interval(metric, first, second, shared, seed)
        result |= {
            f"fp/{metric.name}": fp,
            f"q/{metric.name}": q,
            f"delta/{metric.name}": q - fp,
            f"delta/{metric.name}/ci95": None if interval is None else list(interval),
        }
    result |= {
        "q/kl_to_fp": _per_prediction(rows, "kl"),
        "q/agreement": _per_prediction(rows, "agreement") if "agreement" in rows else None,
    }
    for prefix in ("q", "fp"):
        result |= {f"{prefix}/nll": mean_nll(rows[f"{prefix}_nll"], rows["predictions"]), f"{prefix}/ece": None}
        if f"{prefix}_confidence" in rows:
            error = expected_calibration_error(rows[f"{prefix}_confidence"], rows[f"{prefix}_correct"])
            result[f"{prefix}/ece"] = error
    return result


def _per_prediction(rows: Rows, name: str) -> float:
    weights = rows["predictions"]
    return float((rows[name] * weights).sum() / weights.sum())


def mean_nll(nll: Tensor, predictions: Tensor) -> float:
    """Mean negative log-likelihood in nats per prediction.

    Args:
        nll: of each example in nats per prediction [n].
        predictions: of each example [n].
    """
    # Summed in the order of torch's cross-entropy, so that results stay equal to those of earlier versions.
    zeros = torch.zeros(len(nll), dtype=torch.long)
    total = torch.nn.functional.nll_loss(-(nll * predictions)[:, None], zeros, reduction="sum")
    return float(total / predictions.sum())


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """ECE with 15 equal-width confidence bins (Guo et al., arXiv 1706.04599, section 3).

    Args:
        confidence: probability of the predicted class [n] float64.
        correct: whether it is the label [n].
    """
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gap = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct.to(torch.float64) - confidence)
    return float(gap.abs().sum() / len(confidence))


def prediction_rows(rows: Rows, ids: Sequence[str]) -> list[dict[str, object]]:
    """The rows of predictions.csv, one per example.

    Args:
        rows: of `collect_rows`.
        ids: of the examples.
    """
    shown = dict(rows)
    if "label" in rows and rows["label"].is_floating_point():
        shown["label"] = rows["label"].to(torch.float64).round(decimals=6)
        for prefix in ("fp", "q"):
            error = shown["label"] - rows[f"{prefix}_prediction"].to(torch.float64)
            shown[f"{prefix}_squared_error"] = error.square()
    names = [name for name in (EXAMPLE_COLUMNS if "label" in rows else SEQUENCE_COLUMNS) if name in shown]
    columns = (shown[name].tolist() for name in names)
    return [{**dict(zip(names, values, strict=True)), "id": name} for *values, name in zip(*columns, ids, strict=True)]
