"""What quantizing a network gave: bits, bytes, fallbacks, and the risk of each layer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesq.coverage import Coverage, coverage
from bayesq.quant.accounting import buffer_bytes, code_bits, stored_bytes
from bayesq.quant.file import Packed, write_packed
from bayesq.quant.packing import pack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.recipe import Quantized, Subject

FALLBACKS = (
    "dead_columns",
    "damping_retries",
    "unseen_layers",
    "clamped_scales",
    "uncorrected_layers",
    "kappa_undefined",
    "kappa_clamped",
    "oom_retries",
)
# Keys of `LayerProblem.notes`, and their defaults.
NOTES = {
    "predicted_risk": None,  # nats per example at the chosen widths or steps; by the knapsack or CodedRounds.collect
    "achieved_risk": None,  # nats per example of the rounded weights; written by the pipeline with a posterior
    "kappa": 1.0,  # measured divergence over predicted risk; written by the pipeline with a proxy
    "target_lambda": None,  # lambda of `bayesq.target`, in mean squares of the inputs; empty: W itself is rounded
    "target_change": None,  # |T - W| / |W| of the target T of inputs=paired
    "mean_shift": None,  # root mean square of output mean shifts that no bias or norm corrects; not with inputs=full
    "variance_ratio": None,  # output variance over that in full precision, before correction=moments scales the rows
    "prior_precision": None,  # tau; written by the posterior
    "effective_parameters": None,  # number of weights that the data determine; written by the posterior
}


def fallbacks(quantized: Quantized, unreached: int = 0) -> dict[str, int]:
    """How often a fallback was used, of each kind in FALLBACKS.

    Args:
        quantized: what the recipe made of the network.
        unreached: layers that take no part in the forward pass and stay in full precision.
    """
    total = dict.fromkeys(FALLBACKS, 0) | {"oom_retries": quantized.oom_retries, "unseen_layers": unreached}
    for problem in quantized.problems.values():
        for kind, times in problem.fallbacks.items():
            total[kind] = total.get(kind, 0) + times
    return total


def layer_rows(quantized: Quantized) -> list[dict[str, Any]]:
    """The rows of layers.csv."""
    rows = []
    for name, tensor in quantized.tensors.items():
        problem = quantized.problems[name]
        weights = problem.weight.numel()
        rows.append(
            {
                "name": name,
                "kind": problem.kind,
                "shape": "x".join(str(size) for size in problem.weight.shape),
                "bits/code": code_bits(tensor) / weights,
                "bits/stored": 8 * stored_bytes(tensor) / weights,
                "relative_error": relative_error(tensor, problem.weight),
                **{key: problem.notes.get(key, default) for key, default in NOTES.items()},
                "seconds": quantized.layer_seconds[name],
            }
        )
    return rows


def relative_error(tensor: QuantizedTensor, weight: Tensor) -> float | None:
    """|Q - W| / |W| (Frobenius norms) of the weights [g, r, c] that the packed file has; None if W is zero.

    It needs no calibration, so it compares all methods. It does not measure outputs: with inputs=paired and corrections
    the weights move away from W on purpose.
    """
    norm = float(weight.norm())
    return float((tensor.dequantize() - weight).norm()) / norm if norm else None


@dataclass(frozen=True)
class Report:
    """What `bayesq.quantize` did.

    Attributes:
        target_bits: the budget, bits per quantized weight.
        code_bits: bits of the codes per quantized weight, as the literature counts.
        stored_bits: bits of everything stored for them: codes, scales, zero points, tables, width maps.
        stored_bytes: the same in bytes.
        layers: one row per layer: name, shape, bits, relative weight error, predicted and achieved risk in nats per
            example, seconds.
        fallbacks: how often a fallback was used, of each kind in FALLBACKS.
        coverage: the share of the network's parameters that is quantized, and the largest of the others.
        packed: what `save` writes: the quantized layers, and biases and norm parameters that correction or distillation
            changed.
    """

    target_bits: float
    code_bits: float
    stored_bits: float
    stored_bytes: int
    layers: list[dict[str, Any]]
    fallbacks: dict[str, int]
    coverage: Coverage
    packed: Packed = field(repr=False)

    @classmethod
    def of(cls, bits: float, quantized: Quantized, subject: Subject) -> "Report":
        """The report of what was quantized.

        Args:
            bits: the budget.
            quantized: what the pipeline returned.
            subject: what it was given.
        """
        buffers, _ = pack_model(quantized.tensors)
        stored, weights = buffer_bytes(buffers), subject.weights
        codes = sum(code_bits(tensor) for tensor in quantized.tensors.values())
        counted = fallbacks(quantized, len(subject.usage.unreached))
        covered = coverage(subject.module, {**subject.layers, **subject.embeddings})
        packed = Packed(quantized.tensors, quantized.parameters)
        sizes = codes / weights, 8 * stored / weights, stored
        return cls(bits, *sizes, layer_rows(quantized), counted, covered, packed)

    def save(self, path: str | Path) -> None:
        """Write the packed file."""
        write_packed(Path(path), self.packed)

    def __str__(self) -> str:
        width = max(len(row["name"]) for row in self.layers)
        lines = [f"{'layer':{width}}  {'shape':>14}  bits/code  bits/stored  achieved risk"]
        for row in self.layers:
            risk = "" if row["achieved_risk"] is None else f"{row['achieved_risk']:.3g}"
            bits = f"{row['bits/code']:9.3f}  {row['bits/stored']:11.3f}"
            lines.append(f"{row['name']:{width}}  {row['shape']:>14}  {bits}  {risk:>13}")
        total = (
            f"{self.code_bits:.3f} bits per weight in codes, {self.stored_bits:.3f} stored, {self.stored_bytes:,} bytes"
        )
        left_out = ", ".join(f"{name} ({count:,})" for name, count in self.coverage.left_out.items())
        rest = f"; largest of the rest: {left_out}" if left_out else ""
        return "\n".join([*lines, total, f"{100 * self.coverage.share:.0f} % of the parameters are quantized{rest}"])
