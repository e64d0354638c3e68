"""Task metrics and the uncertainty of their difference between two networks on the same examples.

Every metric takes weights: how often each example counts, one row per bootstrap resample. All resamples are then
computed by operations on whole arrays, also for metrics that are not a mean over examples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ECE_BINS = 15
BOOTSTRAP_RESAMPLES = 10_000
# Resamples are drawn in parts; the weights of a part have at most this many elements: 32 MiB in float64.
PART_ELEMENTS = 2**22


def hits(predicted: Floats, labels: Floats) -> NDArray[np.int64]:
    """1 for each example [n] whose predicted class is the label, 0 for others."""
    return np.asarray(predicted == labels, dtype=np.int64)


def accuracy(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Share of the examples [resamples] whose predicted class [n] is the label [n]."""
    return np.asarray(weights @ hits(predicted, labels).astype(np.float64) / weights.sum(1))


def f1(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """2 TP / (2 TP + FP + FN) [resamples] of class 1; 0 if it is neither predicted nor a label."""
    tp, fp, fn, _ = _binary_counts(predicted, labels, weights)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def matthews(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Matthews correlation [resamples] of two classes; 0 if all predictions or all labels are equal."""
    tp, fp, fn, tn = _binary_counts(predicted, labels, weights)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def pearson(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Pearson correlation [resamples] of predictions [n] and labels [n]; 0 if either is constant."""
    return _correlation(predicted, labels, weights)


def spearman(predicted: Floats, labels: Floats, weights: Floats) -> Floats:
    """Spearman correlation [resamples]: Pearson's of the ranks within each resample, ties at their mean rank."""
    return _correlation(_ranks(predicted, weights), _ranks(labels, weights), weights)


def perplexity(nll: Floats, predictions: Floats, weights: Floats) -> Floats:
    """exp of the mean negative log-likelihood per token [resamples].

    Args:
        nll: nats per token of each sequence [n].
        predictions: tokens of each sequence [n].
        weights: how often each sequence counts [resamples, n].
    """
    tokens = weights * predictions
    return np.asarray(np.exp(tokens @ nll / tokens.sum(1)))


@dataclass(frozen=True)
class Metric:
    """A metric of a data set.

    Attributes:
        name: its result key, as in fp/<name>.
        function: from two numbers per example [n] and weights [resamples, n] to the metric [resamples].
        unit: of `scale` times the metric.
        scale: the factor in tables: 100 for shares and correlations, else 1.
        higher_is_better: whether a larger value is an improvement.
        reads: columns of the evaluation's rows: one of the network (without its prefix fp_ or q_), and one that both
            networks share.
        per_example: scores of the examples, if the metric is their mean; resampling these is much faster.
        start, stop: the evaluation examples it is measured on, as in a slice.
    """

    name: str
    function: Callable[[Floats, Floats, Floats], Floats]
    unit: str
    scale: float = 100
    higher_is_better: bool = True
    reads: tuple[str, str] = ("prediction", "label")
    per_example: Callable[[Floats, Floats], NDArray[np.int64]] | None = None
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        """The evaluation examples it is measured on."""
        return slice(self.start, self.stop)

    def scaled(self, value: float) -> float:
        """A value or a difference in the metric's unit."""
        return self.scale * value


ACCURACY = Metric("accuracy", accuracy, "%", per_example=hits)
METRICS = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric("f1", f1, "%"),
        Metric("matthews", matthews, "x100"),
        Metric("pearson", pearson, "x100"),
        Metric("spearman", spearman, "x100"),
        Metric(
            "perplexity",
            perplexity,
            "e^nats/token",
            scale=1,
            higher_is_better=False,
            reads=("nll", "predictions"),
        ),
    )
}


def metric_of(key: str) -> Metric:
    """The metric that a result names, such as accuracy or accuracy_mismatched; unknown ones are treated as accuracy."""
    return METRICS.get(key) or METRICS.get(key.partition("_")[0], ACCURACY)


def measure(metric: Metric, numbers: Floats, shared: Floats) -> float:
    """The metric of one network; NaN if it has no example.

    Args:
        numbers, shared: the columns of `Metric.reads` [n] for all evaluation examples.
    """
    numbers, shared = numbers[metric.rows], shared[metric.rows]
    if not len(numbers):
        return float("nan")
    return float(metric.function(numbers, shared, np.ones((1, len(numbers))))[0])


def difference_interval(
    metric: Metric, before: Floats, after: Floats, shared: Floats, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of metric(after) - metric(before), by resampling examples with replacement.

    Both networks are measured on the same resamples. Examples with the same three numbers are interchangeable, so a
    resample is a multinomial draw over the distinct triples.

    Args:
        before, after: the networks' numbers [n] of all evaluation examples.
        shared: the examples' numbers [n].
        seed: of the resampling.

    Returns:
        the two ends, or None if the metric has no example.
    """
    triples = np.stack([shared[metric.rows], before[metric.rows], after[metric.rows]])
    count = triples.shape[1]
    if not count:
        return None
    if metric.per_example is not None:
        beside, first, second = triples
        return bootstrap_interval(metric.per_example(second, beside) - metric.per_example(first, beside), seed)
    (beside, first, second), counts = np.unique(triples, axis=1, return_counts=True)
    function, generator = metric.function, np.random.default_rng(seed)
    step = max(PART_ELEMENTS // len(counts), 1)
    differences = []
    for start in range(0, BOOTSTRAP_RESAMPLES, step):
        size = min(step, BOOTSTRAP_RESAMPLES - start)
        weights = generator.multinomial(count, counts / count, size=size).astype(np.float64)
        differences.append(function(second, beside, weights) - function(first, beside, weights))
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval(differences: NDArray[np.generic], seed: int) -> tuple[float, float]:
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


def _binary_counts(predicted: Floats, labels: Floats, weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """True and false positives, false and true negatives, [resamples] each."""
    says, is_one = predicted == 1, labels == 1
    cells = np.stack([says & is_one, says & ~is_one, ~says & is_one, ~says & ~is_one], axis=1)
    tp, fp, fn, tn = (weights @ cells.astype(np.float64)).T
    return tp, fp, fn, tn


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, or 0 if the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Weighted Pearson correlations [resamples] of x and y, [n] or [resamples, n]."""
    total = weights.sum(1, keepdims=True)
    x, y = (a - (weights * a).sum(1, keepdims=True) / total for a in (x, y))
    covariance, of_x, of_y = ((weights * a).sum(1) for a in (x * y, x * x, y * y))
    return _ratio(covariance, np.sqrt(of_x * of_y))


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Ranks [resamples, n] of values [n] that occur `weights` times; equal values share their mean rank."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    times = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(times, axis=1) - (times - 1) / 2)[:, place])
