"""Properties of metrics for tables and figures; only this module of analysis/ imports the suite's metrics."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayesq import metrics

Floats = NDArray[np.float64]

# Shares and correlations are shown times 100; `as_share` makes other metrics fit.
SCALE = 100


def with_unit(metric: str) -> str:
    """A metric's name on an axis: `accuracy (%)`, `matthews (x100)`."""
    return f"{metric} ({metrics.metric_of(metric).unit})"


def in_words(metric: str) -> str:
    """A metric's name in a caption: `accuracy in %`, `matthews times 100`."""
    unit = metrics.metric_of(metric).unit
    return f"{metric} {'in %' if unit == '%' else unit.replace('x100', 'times 100')}"


def as_share(metric: Any, value: float | None) -> float:
    """A value or difference, such that SCALE times it is in the metric's unit; shares stay as they are, None is NaN."""
    return math.nan if value is None else value * (metrics.metric_of(str(metric)).scale / SCALE)


def limits(metric: str) -> tuple[float, float]:
    """The least and the largest value in the metric's unit; infinite where only percentages have limits."""
    return (0.0, 100.0) if metrics.metric_of(metric).unit == "%" else (-math.inf, math.inf)


def is_better(delta: float, metric: Any) -> bool:
    """Whether a difference of scores is an improvement: accuracy should grow, perplexity should fall."""
    return delta > 0 if metrics.metric_of(str(metric)).higher_is_better else delta < 0


def function(metric: str) -> Callable[[Floats, Floats, Floats], Floats]:
    """The metric [resamples] of predictions [n], labels [n] and weights [resamples, n]."""
    return metrics.METRICS[metric].function


def measure(metric: str, predicted: Floats, labels: Floats) -> float:
    """The metric of predictions [n], classes or numbers; NaN where there are none."""
    return metrics.measure(metrics.METRICS[metric], predicted, labels)
