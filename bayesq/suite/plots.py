"""The plots of a run, as tables and W&B's own chart presets: numbers from layers.csv and predictions.csv, no drawing.

Nothing here needs W&B: `bayesq.suite.tracking` logs the charts, `bayesq.suite.dashboard` arranges them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayesq.metrics import ECE_BINS

Rows = Sequence[Mapping[str, Any]]

# A KL of zero has no logarithm; a float32 softmax resolves no smaller KL than this.
SMALLEST_KL = 1e-12
# An evaluation set can exceed the limit of a W&B chart; this many quantiles give the same histogram.
MAX_QUANTILES = 1000
NETWORKS = {"fp": "full precision", "q": "quantized"}


@dataclass(frozen=True)
class Chart:
    """A plot of one run.

    Attributes:
        key: what it is logged under.
        title: shown above it.
        preset: W&B's name of the kind of chart.
        fields: columns of the table by the preset's names for them.
        columns: of the table.
        rows: the table's rows from those of layers.csv and predictions.csv; none where the run has nothing to plot.
        labels: further texts of the preset.
    """

    key: str
    title: str
    preset: str
    fields: Mapping[str, str]
    columns: tuple[str, ...]
    rows: Callable[[Rows, Rows], list[list[Any]]]
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def table_key(self) -> str:
        """What W&B stores the chart's table under."""
        return f"{self.key}_table"

    @property
    def texts(self) -> dict[str, str]:
        """Title and labels as the preset takes them."""
        return {"title": self.title, **self.labels}


def bits_per_layer(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """Code and stored bits per weight of each layer; numbered, because the chart orders layers by their width."""
    digits = len(str(len(layers)))
    return [[f"{i:0{digits}} {row['name']}", row["bits/code"], row["bits/stored"]] for i, row in enumerate(layers, 1)]


def risks(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """Decimal logarithms of predicted and achieved risk, for layers that have both; risks span orders of magnitude."""
    points = []
    for row in layers:
        predicted, achieved = row.get("predicted_risk"), row.get("achieved_risk")
        if predicted and achieved and min(predicted, achieved) > 0:
            points.append([row["name"], math.log10(predicted), math.log10(achieved)])
    return points


def reliability(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """Mean confidence and accuracy in the bins of the ECE, of both networks, and the line of perfect calibration.

    A regression has no confidences and gives no rows.
    """
    if not predictions or "q_confidence" not in predictions[0]:
        return []
    points: list[list[Any]] = []
    for prefix, name in NETWORKS.items():
        for confidence, accuracy, examples in confidence_bins(
            np.array([row[f"{prefix}_confidence"] for row in predictions], dtype=np.float64),
            np.array([row[f"{prefix}_correct"] for row in predictions], dtype=np.float64),
        ):
            points.append([name, confidence, accuracy, examples])
    return points + [["perfect", edge, edge, 0] for edge in (0.0, 1.0)]


def confidence_bins(confidence: np.ndarray, correct: np.ndarray) -> Iterator[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of examples in each bin of the ECE that has any, in increasing order.

    Args:
        confidence: probability [n] of the predicted class.
        correct: [n], whether it is the label.
    """
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64), 1, ECE_BINS)
    for number in np.unique(bins):
        inside = bins == number
        yield float(confidence[inside].mean()), float(correct[inside].mean()), int(inside.sum())


def divergences(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """Decimal logarithms of the per-example KL, or of evenly spaced quantiles where there are many examples."""
    kl = np.array([row["kl"] for row in predictions], dtype=np.float64)
    kl = np.log10(np.maximum(kl[np.isfinite(kl)], SMALLEST_KL))
    if len(kl) > MAX_QUANTILES:
        kl = np.quantile(kl, (np.arange(MAX_QUANTILES) + 0.5) / MAX_QUANTILES)
    return [[value] for value in kl.tolist()]


CHARTS = (
    Chart(
        key="plots/bits_per_layer",
        title="Code bits per weight by layer",
        preset="wandb/bar/v0",
        fields={"label": "layer", "value": "code_bits"},
        columns=("layer", "code_bits", "stored_bits"),
        rows=bits_per_layer,
    ),
    Chart(
        key="plots/risk",
        title="Risk of each layer, predicted (x) and achieved (y), log10",
        preset="wandb/scatter/v0",
        fields={"x": "log10_predicted", "y": "log10_achieved"},
        columns=("layer", "log10_predicted", "log10_achieved"),
        rows=risks,
    ),
    Chart(
        key="plots/reliability",
        title="Accuracy by confidence (bins of the ECE)",
        preset="wandb/lineseries/v0",
        fields={"step": "confidence", "lineKey": "network", "lineVal": "accuracy"},
        columns=("network", "confidence", "accuracy", "examples"),
        rows=reliability,
        labels={"xname": "confidence"},
    ),
    Chart(
        key="plots/kl",
        title="KL of each example to full precision, log10 nats",
        preset="wandb/histogram/v0",
        fields={"value": "log10_kl"},
        columns=("log10_kl",),
        rows=divergences,
    ),
)
