"""The W&B charts of a run: their tables, computed from layers.csv and predictions.csv, and W&B's presets.

This module does not need W&B. `bayesq.suite.tracking` logs the charts, `bayesq.suite.dashboard` arranges them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesq.metrics import ECE_BINS

Rows = Sequence[Mapping[str, Any]]

# Smaller KLs are raised to this: zero has no logarithm, and a float32 softmax is not more precise.
SMALLEST_KL = 1e-12
# More examples than this are replaced by quantiles: a W&B chart has a limit, and the histogram stays the same.
MAX_QUANTILES = 1000
NETWORKS = {"fp": "full precision", "q": "quantized"}


@dataclass(frozen=True)
class Chart:
    """A W&B chart of one run, logged under `key`.

    Attributes:
        preset: W&B's name of the chart's type.
        fields: the table's column for each field of the preset.
        rows: computes the table from the rows of layers.csv and predictions.csv; no rows: no chart.
        texts: title and labels, by the preset's names.
    """

    key: str
    texts: Mapping[str, str]
    preset: str
    fields: Mapping[str, str]
    columns: tuple[str, ...]
    rows: Callable[[Rows, Rows], list[list[Any]]]

    @property
    def table_key(self) -> str:
        """The key under which W&B stores the chart's table."""
        return f"{self.key}_table"


def bits_per_layer(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """Code and stored bits per weight of each layer. A number before the name shows the forward order."""
    digits = len(str(len(layers)))
    return [[f"{i:0{digits}} {row['name']}", row["bits/code"], row["bits/stored"]] for i, row in enumerate(layers, 1)]


def risks(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """log10 of predicted and achieved risk of each layer with both above 0."""
    pairs = [(row["name"], row.get("predicted_risk") or 0, row.get("achieved_risk") or 0) for row in layers]
    return [[name, math.log10(x), math.log10(y)] for name, x, y in pairs if x > 0 and y > 0]


def reliability(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """Confidence and accuracy by bin of the ECE, for both networks, and the diagonal; no rows for a regression."""
    if not predictions or "q_confidence" not in predictions[0]:
        return []
    points: list[list[Any]] = []
    for prefix, name in NETWORKS.items():
        confidence, correct = (
            np.array([row[f"{prefix}_{column}"] for row in predictions], dtype=np.float64)
            for column in ("confidence", "correct")
        )
        points += [[name, *figures] for figures in confidence_bins(confidence, correct)]
    return points + [["perfect", edge, edge, 0] for edge in (0.0, 1.0)]


def confidence_bins(confidence: np.ndarray, correct: np.ndarray) -> Iterator[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of examples of each bin of the ECE, in increasing order, without empty bins.

    `confidence` [n] is the probability of the predicted class, `correct` [n] says whether this is the label.
    """
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64), 1, ECE_BINS)
    for number in np.unique(bins):
        inside = bins == number
        yield float(confidence[inside].mean()), float(correct[inside].mean()), int(inside.sum())


def divergences(layers: Rows, predictions: Rows) -> list[list[Any]]:
    """log10 of the KL of each example, or MAX_QUANTILES evenly spaced quantiles of it."""
    kl = np.array([row["kl"] for row in predictions], dtype=np.float64)
    kl = np.log10(np.maximum(kl[np.isfinite(kl)], SMALLEST_KL))
    if len(kl) > MAX_QUANTILES:
        kl = np.quantile(kl, (np.arange(MAX_QUANTILES) + 0.5) / MAX_QUANTILES)
    return [[value] for value in kl.tolist()]


CHARTS = (
    Chart(
        key="plots/bits_per_layer",
        texts={"title": "Code bits per weight by layer"},
        preset="wandb/bar/v0",
        fields={"label": "layer", "value": "code_bits"},
        columns=("layer", "code_bits", "stored_bits"),
        rows=bits_per_layer,
    ),
    Chart(
        key="plots/risk",
        texts={"title": "Risk of each layer, predicted (x) and achieved (y), log10"},
        preset="wandb/scatter/v0",
        fields={"x": "log10_predicted", "y": "log10_achieved"},
        columns=("layer", "log10_predicted", "log10_achieved"),
        rows=risks,
    ),
    Chart(
        key="plots/reliability",
        texts={"title": "Accuracy by confidence (bins of the ECE)", "xname": "confidence"},
        preset="wandb/lineseries/v0",
        fields={"step": "confidence", "lineKey": "network", "lineVal": "accuracy"},
        columns=("network", "confidence", "accuracy", "examples"),
        rows=reliability,
    ),
    Chart(
        key="plots/kl",
        texts={"title": "KL of each example to full precision, log10 nats"},
        preset="wandb/histogram/v0",
        fields={"value": "log10_kl"},
        columns=("log10_kl",),
        rows=divergences,
    ),
)
